"""tools/gpu.sh, with stand-ins for Python and compute-sanitizer that record how they were called."""

import ast
import csv
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Sees a GPU, has every module, and "runs" pytest: $OUTCOMES says how files end.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS.all"
[ "${NO_GPU:-}" = "" ] || case $* in *is_available*) exit 1 ;; esac
case $* in
  *source_hash*) exit "${OTHER_SOURCES:-0}" ;;
  *build_ext*) exit "${BUILD:-0}" ;;
  "-m pytest"*) ;;
  *) exit 0 ;;
esac
echo "$* | uncached=${PYTORCH_NO_CUDA_MEMORY_CACHING:-} gpu=$DLLM_REQUIRE_GPU unbuffered=$PYTHONUNBUFFERED" \\
  >>"$CALLS"
[ ! -e "$OUT"/gpu_*_files.tsv ] || cp "$OUT"/gpu_*_files.tsv "$CALLS.before"
for outcome in $OUTCOMES; do
  [[ $* == *${outcome%=*}* ]] || continue
  case ${outcome#*=} in
    crash) kill -SEGV $$ ;;
    hang) exec sleep 600 ;;
    empty) echo "no tests ran in 0.01s"; exit 5 ;;
    fail) echo "1 failed, 2 passed in 0.50s"; exit 1 ;;
    *) exit "${outcome#*=}" ;;
  esac
done
echo "3 passed, 1 skipped in 0.50s"
"""
SANITIZER = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in
    --tool) tool=$2; shift 2 ;;
    --error-exitcode) errors=$2; shift 2 ;;
    --kernel-name) shift 2 ;;
  esac
done
echo "$tool" >>"$CALLS.tools"
"$@" || exit $?
[[ "${FINDS:-none}" != "$tool" ]] || exit "$errors"
"""


class Run(NamedTuple):
    """calls: of pytest. files: verdict by file. tools: of compute-sanitizer. everything: Python was asked."""

    status: int
    output: str
    calls: list[str]
    files: dict[str, str]
    tools: list[str]
    everything: str
    results: Path


@pytest.fixture
def gpu_script(tmp_path):
    tree, calls, results = tmp_path / "tree", tmp_path / "calls", tmp_path / "results"
    for folder in ("tests/cuda", "benchmarks/gpu"):
        (tree / folder).mkdir(parents=True)
        for path in (ROOT / folder).glob("test_*.py"):
            (tree / folder / path.name).touch()
    (tree / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "gpu.sh", tree / "tools")
    (tree / "dllm_kernels" / "lib").mkdir(parents=True)
    (tree / "dllm_kernels" / "lib" / "_C_cuda.so").touch()
    (tree / "Makefile").write_text("build:\n\t@echo nothing to build\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("python3", PYTHON), ("compute-sanitizer", SANITIZER)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)

    def run(*arguments, outcomes="", **environment) -> Run:
        environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "CALLS": str(calls),
            "OUT": str(results),
        } | environment
        done = subprocess.run(
            ["bash", tree / "tools" / "gpu.sh", *arguments],
            env={"OUTCOMES": outcomes, "HOME": os.environ.get("HOME", "/")} | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

        def lines(path: Path) -> list[str]:
            return path.read_text().splitlines() if path.exists() else []

        (summary,) = [*results.glob("gpu_*_files.tsv")] or [results / "none"]
        rows = csv.DictReader(lines(summary), delimiter="\t")
        return Run(
            done.returncode, done.stdout, lines(calls), {row["file"]: row["verdict"] for row in rows},
            lines(Path(f"{calls}.tools")), "\n".join(lines(Path(f"{calls}.all"))), results,
        )  # fmt: skip

    return run


def files_of(calls: list[str]) -> list[str]:
    return [re.search(r"(?:tests/cuda|benchmarks/gpu)/(test_\w+)\.py", call)[1] for call in calls]


ALL_TESTS = sorted(path.stem for path in (ROOT / "tests/cuda").glob("test_*.py"))
ALL_BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks/gpu").glob("test_*.py"))


def test_without_a_gpu_it_says_so(gpu_script):
    run = gpu_script("check", NO_GPU="1")
    assert run.status != 0 and "no Python here has a torch that sees a GPU" in run.output
    assert not run.calls


@pytest.mark.parametrize(
    "arguments", [(), ("chek",), ("check", "all"), ("check", "full"), ("check", "full", "4")]
)
def test_what_it_does_not_know_is_refused(gpu_script, arguments):
    run = gpu_script(*arguments)
    assert run.status != 0 and re.search("gpu: what to (do|check): ", run.output) and not run.calls


def test_every_file_has_a_process_with_what_the_others_rest_on_first(gpu_script):
    run = gpu_script("test")
    order = files_of(run.calls)
    assert run.status == 0 and sorted(order) == ALL_TESTS
    assert order[:2] == ["test_wrappers", "test_wrappers_sm90"] and order[-1] == "test_sampling"
    place = order.index
    assert place("test_kv_write") < place("test_cached_attention") < place("test_attention_hopper")
    assert place("test_attention_backward_hopper") < place("test_merged_projections")
    for call in run.calls:
        assert "gpu=1 unbuffered=1" in call and "-o faulthandler_timeout=" in call


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [("crash", "crash 139"), ("hang", "timeout"), ("fail", "failed"), ("4", "error")],
)
def test_a_file_that_goes_wrong_is_lost_alone(gpu_script, outcome, verdict):
    run = gpu_script("test", outcomes=f"test_kv_write={outcome}", DLLM_FILE_SECONDS="3")
    assert run.status != 0 and "1 files did not pass" in run.output
    assert sorted(files_of(run.calls)) == ALL_TESTS
    wrong = {file: verdict for file, verdict in run.files.items() if verdict != "passed"}
    assert wrong == {"tests/cuda/test_kv_write.py": verdict}


def test_results_are_written_after_each_file(gpu_script):
    run = gpu_script("test")
    before_the_last = Path(run.results.parent / "calls.before").read_text()
    assert before_the_last.count("passed\t") == len(ALL_TESTS) - 1
    rows = (run.results / "gpu_test_files.tsv").read_text().splitlines()
    assert rows[0].split("\t") == ["file", "verdict", "seconds", "counts"]
    assert rows[1].startswith("tests/cuda/test_wrappers.py\tpassed\t") and "3 passed, 1 skipped" in rows[1]
    assert "tests/cuda/test_sampling.py\tpassed" in (run.results / "gpu_test.txt").read_text()


def test_results_of_the_call_before_are_not_mixed_in(gpu_script):
    gpu_script("test")
    assert [*gpu_script("test", "tests/cuda/test_unmask.py").files] == ["tests/cuda/test_unmask.py"]


@pytest.mark.parametrize("command", ["test", "bench", "sanitize"])
def test_arguments_go_to_pytest_and_files_stand_for_all(gpu_script, command):
    folder = "benchmarks/gpu" if command == "bench" else "tests/cuda"
    run = gpu_script(command, f"{folder}/test_unmask.py", "-k", "greedy", "-x")
    assert run.status == 0 and {*files_of(run.calls)} == {"test_unmask"}
    assert all("-k greedy -x" in call for call in run.calls)


def test_files_of_which_nothing_is_selected_do_not_fail(gpu_script):
    selected = "tests/cuda/test_unmask.py"
    others = " ".join(f"{name}.py=empty" for name in ALL_TESTS if name != "test_unmask")
    run = gpu_script("test", "-k", "captured", outcomes=others)
    assert run.status == 0 and {file for file, verdict in run.files.items() if verdict != "empty"} == {
        selected
    }
    run = gpu_script("test", "-k", "nonsense", outcomes="test_=empty")
    assert run.status != 0 and "no test was selected" in run.output


def test_a_check_is_all_tests_and_then_all_benchmarks(gpu_script):
    run = gpu_script("check", outcomes="test_kv_write=fail")
    assert run.status != 0
    order = files_of(run.calls)
    assert sorted(order[: len(ALL_TESTS)]) == ALL_TESTS and order[len(ALL_TESTS) :] == ALL_BENCHMARKS
    for call in run.calls:
        assert ("--results" in call) == ("benchmarks/gpu" in call)


def test_three_full_checks_are_everything(gpu_script):
    for part in "123":
        run = gpu_script("check", "full", part)
        assert run.status == 0 and (run.results / f"gpu_check_full_{part}_files.tsv").exists()
        (run.results / f"gpu_check_full_{part}_files.tsv").unlink()
    assert sorted(files_of(run.calls)) == sorted(ALL_TESTS + ALL_BENCHMARKS)


def test_a_quick_check_has_benchmarks_and_no_large_sizes(gpu_script):
    run = gpu_script("check", "quick")
    tests = [call for call in run.calls if "tests/cuda" in call]
    assert sorted(files_of(tests)) == ALL_TESTS and all("-m not hardware" in call for call in tests)
    assert len(run.calls) > len(tests)


def test_libraries_of_these_sources_are_used(gpu_script):
    run = gpu_script("test")
    assert "using the libraries" in run.output and run.everything.count("setup.py -q build_ext") == 1


def test_libraries_of_other_sources_are_built_anew(gpu_script):
    run = gpu_script("test", OTHER_SOURCES="1")
    assert "building the libraries of these sources" in run.output
    assert run.everything.count("setup.py -q build_ext") == 1


def test_a_build_that_fails_ends_it(gpu_script):
    for sources in "01":
        run = gpu_script("test", OTHER_SOURCES=sources, BUILD="1")
        assert run.status != 0 and not run.calls


def test_sanitizing_runs_what_captures_graphs_by_itself_with_torch_s_own_memory(gpu_script):
    run = gpu_script("sanitize", "tests/cuda/test_kv_write.py", "tests/cuda/test_loss.py")
    assert run.status == 0
    assert sorted({*run.tools}) == ["initcheck", "memcheck", "racecheck", "synccheck"]
    assert files_of(run.calls) == 4 * ["test_kv_write", "test_kv_write", "test_loss", "test_loss"]
    for call in run.calls:
        captures = "-m graph" in call
        assert ("uncached=1" in call) == (not captures) and " -x " not in call


def test_sanitizing_by_one_tool_goes_on_after_what_it_finds(gpu_script):
    run = gpu_script(
        "sanitize", "racecheck", "tests/cuda/test_kv_write.py", "tests/cuda/test_loss.py", FINDS="racecheck"
    )
    assert {*run.tools} == {"racecheck"} and run.status != 0 and len(run.calls) == 4
    assert {*run.files.values()} == {"sanitizer"}


def test_what_captures_graphs_is_marked():
    """So that the mark leaves out every test that captures, has a model sampled, or calls what does."""
    for path in (ROOT / "tests/cuda").glob("test_*.py"):
        module = ast.parse(path.read_text())
        if any(ast.unparse(line) == "pytestmark = pytest.mark.graph" for line in module.body):
            continue
        captures = [r"torch\.cuda\.graph", r"dk\.sample"]
        for function in (node for node in module.body if isinstance(node, ast.FunctionDef)):
            body = "\n".join(map(ast.unparse, function.body))
            if not re.search(rf"\b({'|'.join(captures)})\(", body):
                continue
            if function.name.startswith("test_"):
                marks = {ast.unparse(mark) for mark in function.decorator_list}
                assert "pytest.mark.graph" in marks, f"{path.name}: {function.name}"
            else:
                captures.append(function.name)


def test_what_captures_graphs_is_left_out_without_torch_s_own_memory():
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/cuda/test_kv_write.py"],
        cwd=ROOT, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert "::test_opcheck" in collected.stdout, collected.stdout + collected.stderr
    assert "::test_graph_replay" not in collected.stdout
