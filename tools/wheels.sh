#!/usr/bin/env bash
# What cibuildwheel calls inside its containers, which are AlmaLinux 8:
#
#   tools/wheels.sh needs    before each build: torch, the tools that compile, and headers of CUTLASS
#   tools/wheels.sh nvcc     once, for the wheels with CUDA
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:?needs or nvcc} in
  needs)
    pip install --index-url https://download.pytorch.org/whl/cpu "torch==2.11.*"
    pip install "setuptools>=77" "cmake>=3.25" ninja "pybind11>=3.0"
    pip install --no-deps nvidia-cutlass==4.2.0.0
    ;;
  nvcc)
    dnf install -y dnf-plugins-core
    dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
    dnf install -y cuda-nvcc-13-0 cuda-cudart-devel-13-0 cuda-crt-13-0 libnvvm-13-0
    ln -s /usr/local/cuda-13.0/bin/nvcc /usr/local/bin/nvcc
    ;;
  *)
    echo "wheels.sh: $1 is not needs or nvcc" >&2
    exit 2
    ;;
esac
