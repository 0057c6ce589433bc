#!/usr/bin/env bash
# On a GPU machine: builds what is missing, runs tests/gpu and the GPU benchmarks. Results go to $OUT when
# set, else to benchmarks/results. It uses .venv when its torch has CUDA, else the machine's own python3.
# Where the sources are no git checkout, DLLM_COMMIT says which commit they are.
set -euo pipefail
cd "$(dirname "$0")/.."
sees_gpu='import torch, sys; sys.exit(not torch.cuda.is_available())'
find_python() {
  for python in "${PYTHON:-}" .venv/bin/python python3; do
    if [ -n "$python" ] && "$python" -c "$sees_gpu" 2>/dev/null; then echo "$python"; return; fi
  done
}
found=$(find_python)
if [ -z "$found" ]; then
  make build && found=$(find_python)
fi
if [ -z "$found" ]; then
  echo "gpu-check: no Python here has a torch that sees a GPU (name one with PYTHON=...)" >&2
  exit 1
fi
for module in pytest pytest_benchmark hypothesis setuptools pybind11; do
  "$found" -c "import $module" 2>/dev/null || missing="${missing:-} $module"
done
if [ -n "${missing:-}" ]; then
  echo "gpu-check: $found lacks:$missing" >&2
  exit 1
fi
echo "gpu-check: $("$found" -c 'import torch, sys; print("python", sys.version.split()[0], "torch", torch.__version__, "on", torch.cuda.get_device_name())')"

# The stable-ABI libraries run under any Python and any torch from 2.11 up; only _host must fit this one.
if [ -e dllm_kernels/lib/_C.so ] && [ -e dllm_kernels/lib/_C_cuda.so ]; then
  echo "gpu-check: using the libraries in dllm_kernels/lib"
  DLLM_CUDA=OFF DLLM_TARGET=_host DLLM_BUILD_DIR=build/host "$found" setup.py -q build_ext --inplace
else
  DLLM_CUDA=ON "$found" setup.py -q build_ext --inplace
fi
results=${OUT:-benchmarks/results}
mkdir -p "$results"
export DLLM_REQUIRE_GPU=1
{
  status=0
  "$found" -m pytest -q tests/gpu || status=$?
  "$found" -m pytest -q benchmarks -m gpu --results "$results" || status=$?
  exit $status
} 2>&1 | tee "$results/gpu_check.txt"
