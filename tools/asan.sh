#!/usr/bin/env bash
# Builds the CPU libraries with address and undefined-behaviour sanitizers and runs the operator tests on
# them: tools/asan.sh PYTHON [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$1
shift

# A package of links to the sources with libraries of its own, so that the ordinary build stays as it is.
package=$root/build/asan/site/dllm_kernels
mkdir -p "$package/lib"
DLLM_SANITIZE=address,undefined DLLM_CUDA=OFF DLLM_BUILD_DIR=build/asan/cmake DLLM_LIB_DIR=$package/lib \
  "$python" setup.py -q build_ext --inplace
find "$package" -maxdepth 1 -type l -delete
for entry in dllm_kernels/*; do
  [ "$entry" = dllm_kernels/lib ] || ln -s "$root/$entry" "$package"
done

# libstdc++ goes in as well: Python does not link it, and the sanitizer must find __cxa_throw when it starts.
# Leaks are not looked for: the interpreter keeps much until it ends.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$root/build/asan/site
case $python in */*) python=$(realpath -s "$python") ;; esac
cd build/asan/site
"$python" -c "
from dllm_kernels import _library
assert 'address' in _library.build_info()['sanitizers'], f'{_library.FOLDER} is not the sanitizer build'"
tests=("$root"/tests/ops "$root"/tests/test_block_{pool,cache}.py)
"$python" -m pytest -q -c "$root/pyproject.toml" -o pythonpath= -p no:cacheprovider "${tests[@]}" "$@"
