#!/usr/bin/env bash
# On a GPU machine, with .venv when its torch has CUDA, else with the machine's own python3:
#   tools/gpu.sh check      builds what is missing, runs tests/gpu, then the GPU benchmarks. Results go to $OUT
#                           when set, else to benchmarks/results. Where the sources are no git checkout,
#                           DLLM_COMMIT says which commit they are.
#   tools/gpu.sh test       the tests alone, bench: the benchmarks alone; what follows goes to pytest: -k attention
#   tools/gpu.sh sanitize   tests/gpu under compute-sanitizer: memcheck, racecheck, initcheck and synccheck
set -euo pipefail
cd "$(dirname "$0")/.."
sees_gpu='import torch, sys; sys.exit(not torch.cuda.is_available())'

find_python() {
  for python in "${PYTHON:-}" .venv/bin/python python3; do
    if [ -n "$python" ] && "$python" -c "$sees_gpu" 2>/dev/null; then echo "$python"; return; fi
  done
}

fail() {
  echo "gpu: $*" >&2
  exit 1
}

# Sets `python`; builds the libraries that are not there.
set_up() {
  python=$(find_python)
  if [ -z "$python" ]; then
    make build && python=$(find_python)
  fi
  [ -n "$python" ] || fail "no Python here has a torch that sees a GPU (name one with PYTHON=...)"
  for module in pytest pytest_benchmark hypothesis setuptools pybind11; do
    "$python" -c "import $module" 2>/dev/null || missing="${missing:-} $module"
  done
  [ -z "${missing:-}" ] || fail "$python lacks:$missing"
  "$python" -c 'import torch, sys; print("gpu: python", sys.version.split()[0], "torch", torch.__version__, "on", torch.cuda.get_device_name())'
  # The stable-ABI libraries run under any Python and any torch from 2.11 up; only _host must fit this one.
  if [ -e dllm_kernels/lib/_C.so ] && [ -e dllm_kernels/lib/_C_cuda.so ]; then
    echo "gpu: using the libraries in dllm_kernels/lib"
    DLLM_CUDA=OFF DLLM_TARGET=_host DLLM_BUILD_DIR=build/host "$python" setup.py -q build_ext --inplace
  else
    DLLM_CUDA=ON "$python" setup.py -q build_ext --inplace
  fi
  export DLLM_REQUIRE_GPU=1
}

results=${OUT:-benchmarks/results}
run_tests() { "$python" -m pytest -q tests/gpu "$@"; }
run_benchmarks() { "$python" -m pytest -q benchmarks/gpu --results "$results" "$@"; }

check() {
  local status=0
  run_tests || status=$?
  run_benchmarks || status=$?
  return $status
}

# `recorded NAME COMMAND` also keeps what the command prints.
recorded() {
  mkdir -p "$results"
  "${@:2}" 2>&1 | tee "$results/gpu_$1.txt"
}

# Only our kernels are looked at; memory comes straight from the driver, so that every tensor has borders.
sanitize() {
  local status=0
  command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is missing: it comes with the CUDA toolkit"
  for tool in memcheck racecheck initcheck synccheck; do
    echo "gpu: $tool"
    # What others wrote counts for initcheck: it watches every kernel.
    only=(--kernel-name kernel_substring=dllm)
    [ $tool = initcheck ] && only=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool "${only[@]}" \
      --error-exitcode 1 "$python" -m pytest -q -x tests/gpu || status=$?
  done
  return $status
}

case "${1:-}" in
  check) set_up; recorded check check ;;
  test) set_up; recorded test run_tests "${@:2}" ;;
  bench) set_up; recorded bench run_benchmarks "${@:2}" ;;
  sanitize) set_up; sanitize ;;
  *) fail "what to do: check, test, bench or sanitize" ;;
esac
