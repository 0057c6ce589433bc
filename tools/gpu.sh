#!/usr/bin/env bash
# On a GPU machine, with .venv when its torch has CUDA, else with the machine's own python3:
#   tools/gpu.sh check            all of tests/cuda, then all of benchmarks/gpu, however long it takes
#   tools/gpu.sh check quick      what ten minutes suffice for: small sizes, headline benchmarks
#   tools/gpu.sh check full N     everything in three commands of ten minutes each: N is 1, 2 or 3
#   tools/gpu.sh test ...         tests alone; files among what follows are run in place of all, the rest goes
#                                 to pytest: -k attention, or tests/cuda/test_unmask.py -x
#   tools/gpu.sh bench ...        benchmarks alone, in the same way
#   tools/gpu.sh sanitize ...     tests under compute-sanitizer: all of memcheck, racecheck, initcheck and
#                                 synccheck, or those named first; then as test
# Every file has a process of its own and DLLM_FILE_SECONDS (300; sanitize: 3600) to end: what kills or hangs it
# loses that file alone. Output and a line for each file that has ended go to $OUT when set, else to
# benchmarks/results. Libraries that were built from other sources are built anew. Where the sources are no git
# checkout, DLLM_COMMIT says which commit they are.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${OUT:-benchmarks/results}
tools=(memcheck racecheck initcheck synccheck)
sees_gpu='import torch, sys; sys.exit(not torch.cuda.is_available())'

fail() {
  echo "gpu: $*" >&2
  exit 1
}

# ---- what it runs with -------------------------------------------------------------------------
find_python() {
  for python in "${PYTHON:-}" .venv/bin/python python3; do
    if [ -n "$python" ] && "$python" -c "$sees_gpu" 2>/dev/null; then echo "$python"; return; fi
  done
}

# Sets `python`; builds the libraries unless those there are of these sources.
set_up() {
  python=$(find_python)
  if [ -z "$python" ]; then
    make build && python=$(find_python)
  fi
  [ -n "$python" ] || fail "no Python here has a torch that sees a GPU (name one with PYTHON=...)"
  local missing=
  for module in pytest pytest_benchmark hypothesis setuptools pybind11; do
    "$python" -c "import $module" 2>/dev/null || missing="$missing $module"
  done
  [ -z "$missing" ] || fail "$python lacks:$missing"
  "$python" -c 'import torch, sys; print("gpu: python", sys.version.split()[0], "torch", torch.__version__, "on", torch.cuda.get_device_name())'
  # The stable-ABI libraries run under any Python and any torch from 2.11 up; only _host must fit this one.
  if [ -e dllm_kernels/lib/_C_cuda.so ] && "$python" cmake/source_hash.py dllm_kernels/lib; then
    echo "gpu: using the libraries in dllm_kernels/lib"
    DLLM_CUDA=OFF DLLM_TARGET=_host DLLM_BUILD_DIR=build/host "$python" setup.py -q build_ext --inplace
  else
    echo "gpu: building the libraries of these sources"
    DLLM_CUDA=ON "$python" setup.py -q build_ext --inplace
  fi
  export DLLM_REQUIRE_GPU=1
}

# ---- one file after the other ------------------------------------------------------------------
command=                                # in the names of what is written
deadline=                               # in seconds since the start, where there is one
file_seconds=${DLLM_FILE_SECONDS:-300}  # of each file at most
under=()                                # a command to run Python under
ran=0 failed=0                          # files

# The order of files of tests: what the others rest on first, what takes everything together last.
rank() {
  case $1 in
    *wrappers*) echo 0 ;;
    *advance* | *kv_write* | *unmask* | *token_filters* | *loss* | *debug* | *layer_kernels*) echo 1 ;;
    *hopper* | *linear* | *weights*) echo 3 ;;
    *attention*) echo 2 ;;
    *) echo 4 ;;
  esac
}

# `test_files FIRST LAST`: those of these ranks, in order.
test_files() {
  local file
  for file in tests/cuda/test_*.py; do echo "$(rank "$file") $file"; done | sort -n -k1,1 -s |
    while read -r rank file; do
      if [ "$rank" -ge "$1" ] && [ "$rank" -le "$2" ]; then echo "$file"; fi
    done
}

verdict() {
  case $1 in
    0) echo passed ;;
    1) echo failed ;;
    2 | 3 | 4) echo error ;;
    5) echo empty ;;
    99) echo sanitizer ;;
    124 | 137) echo timeout ;;
    *) echo "crash $1" ;;
  esac
}

# `note FILE VERDICT SECONDS COUNTS`: a line of the summary.
note() {
  local summary=$results/gpu_${command}_files.tsv
  [ -e "$summary" ] || printf 'file\tverdict\tseconds\tcounts\n' >"$summary"
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$summary"
}

# `run_file LABEL FILE PYTEST-OPTIONS`: a process for one file.
run_file() {
  local label=$1 start=$SECONDS limit=$file_seconds status=0 log
  shift
  if [ -n "$deadline" ] && [ $((deadline - SECONDS)) -lt "$limit" ]; then
    limit=$((deadline - SECONDS))
    if [ $limit -lt 20 ]; then
      failed=$((failed + 1))
      note "$label" "not run" 0 "the time was over"
      return
    fi
  fi
  log=$(mktemp)
  printf '\ngpu: %s\n' "$label"
  PYTHONUNBUFFERED=1 timeout --kill-after=10 "$limit" ${under[@]+"${under[@]}"} "$python" -m pytest -q \
    -o faulthandler_timeout=60 "$@" 2>&1 | tee "$log" || status=$?
  note "$label" "$(verdict $status)" $((SECONDS - start)) "$(grep -E ' in [0-9.]+s' "$log" | tail -n 1 | tr -d '=')"
  rm -f "$log"
  [ $status = 5 ] || ran=$((ran + 1))
  [ $status = 0 ] || [ $status = 5 ] || failed=$((failed + 1))
}

# Splits what was given into `files`, and `options` for pytest.
split_arguments() {
  files=() options=()
  local argument
  for argument in "$@"; do
    if [[ ${argument%%::*} == *.py && -e ${argument%%::*} ]]; then files+=("$argument"); else options+=("$argument"); fi
  done
}

run_tests() {
  split_arguments "$@"
  [ ${#files[@]} -gt 0 ] || mapfile -t files < <(test_files 0 4)
  local file
  for file in "${files[@]}"; do run_file "$file" "$file" ${options[@]+"${options[@]}"}; done
}

run_benchmarks() {
  split_arguments "$@"
  [ ${#files[@]} -gt 0 ] || files=(benchmarks/gpu/test_*.py)
  local file
  for file in "${files[@]}"; do
    run_file "$file" "$file" --results "$results" ${options[@]+"${options[@]}"}
  done
}

# ---- what can be asked for ---------------------------------------------------------------------
# A part of everything: those that take ten minutes have to end before.
check() {
  case "${1:-} ${2:-}" in
    " ")
      run_tests
      run_benchmarks
      ;;
    "quick ")
      deadline=570
      # Sizes that a CPU compares slowly, and the build of the emulator, are left to the others.
      run_tests -m "not hardware" -k "not the_emulator_gives"
      run_benchmarks --seconds 0.5 -k "not scaling and not dual and (merged or not step)" \
        benchmarks/gpu/test_{unmask,cached_attention,layer_attention,sampling,attention}.py
      ;;
    "full 1")
      deadline=570
      mapfile -t part < <(test_files 0 2)
      run_tests "${part[@]}"
      ;;
    "full 2")
      deadline=570
      mapfile -t part < <(test_files 3 4)
      run_tests "${part[@]}"
      run_benchmarks benchmarks/gpu/test_{unmask,cached_attention,layer_attention,loss,layer_kernels}.py
      ;;
    "full 3")
      deadline=570
      run_benchmarks --seconds 1 benchmarks/gpu/test_{attention,sampling,projections}.py
      ;;
    *) fail "what to check: nothing more, quick, or full with 1, 2 or 3" ;;
  esac
}

# Only our kernels are looked at. Memory comes straight from the driver, so that every tensor has borders,
# except where graphs are captured: torch refuses to capture without its own memory.
sanitize() {
  command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is missing: it comes with the CUDA toolkit"
  local chosen=() tool file
  while [[ " ${tools[*]} " == *" ${1:-none} "* ]]; do
    chosen+=("$1")
    shift
  done
  [ ${#chosen[@]} -gt 0 ] || chosen=("${tools[@]}")
  split_arguments "$@"
  [ ${#files[@]} -gt 0 ] || mapfile -t files < <(test_files 0 4)
  file_seconds=${DLLM_FILE_SECONDS:-3600}
  for tool in "${chosen[@]}"; do
    under=(compute-sanitizer --tool "$tool" --error-exitcode 99)
    # What others wrote counts for initcheck: it watches every kernel.
    [ "$tool" = initcheck ] || under+=(--kernel-name kernel_substring=dllm)
    for file in "${files[@]}"; do
      export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      run_file "$tool $file" "$file" ${options[@]+"${options[@]}"}
      unset PYTORCH_NO_CUDA_MEMORY_CACHING
      run_file "$tool $file (graphs)" "$file" ${options[@]+"${options[@]}"} -m graph
    done
  done
}

# `recorded NAME COMMAND`: also keeps what the command prints, and says at its end how the files went.
recorded() {
  command=$1
  mkdir -p "$results"
  rm -f "$results/gpu_${command}_files.tsv"
  {
    "${@:2}"
    printf '\n'
    cat "$results/gpu_${command}_files.tsv"
    [ $ran -gt 0 ] || fail "no test was selected"
    [ $failed = 0 ] || fail "$failed files did not pass"
  } 2>&1 | tee "$results/gpu_$command.txt"
}

case "${1:-}" in
  check) name=$(IFS=_ && echo "$*") action=check ;;
  test) name=test action=run_tests ;;
  bench) name=bench action=run_benchmarks ;;
  sanitize) name=sanitize action=sanitize ;;
  *) fail "what to do: check, test, bench or sanitize" ;;
esac
set_up
recorded "$name" $action "${@:2}"
