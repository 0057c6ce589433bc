"""`dllm bench`, and the options and markers of the benchmarks that it runs."""

import json
import subprocess
import sys

import pytest

from dllm_kernels import bench
from tests.pytest_runs import ROOT, environment

BENCHMARKS = ROOT / "benchmarks"


def run(*command, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


def collected(*options):
    listed = run(
        "pytest", "benchmarks/test_loss.py", "benchmarks/gpu/test_loss.py", "--collect-only", "-q", *options
    )
    return listed, [line for line in listed.stdout.splitlines() if "::" in line]


# ---- where it looks --------------------------------------------------------------------------------------
def test_the_benchmarks_are_found_beside_the_package_in_the_current_folder_or_where_they_are_named(
    tmp_path, monkeypatch
):
    assert bench.find(None) == BENCHMARKS
    assert bench.find(BENCHMARKS) == BENCHMARKS
    monkeypatch.setattr(bench, "PACKAGE", tmp_path / "site-packages" / "dllm_kernels")
    for folder in (ROOT, BENCHMARKS):
        monkeypatch.chdir(folder)
        assert bench.find(None) == BENCHMARKS


def test_an_installed_package_says_that_the_benchmarks_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PACKAGE", tmp_path / "site-packages" / "dllm_kernels")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not part of the package.*checkout.*--folder"):
        bench.run([], [])
    with pytest.raises(FileNotFoundError, match=f"--folder {tmp_path}"):
        bench.run([], [], tmp_path)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(bench.NEEDED, "a_module_that_is_missing", "a-package")
    with pytest.raises(ImportError, match=r"a-package missing; .*dllm-kernels\[test\]"):
        bench.run(["loss"], [])


def test_suites_are_named_like_their_files():
    assert bench.paths(BENCHMARKS, ["loss", "gpu/loss"]) == [
        BENCHMARKS / "test_loss.py",
        BENCHMARKS / "gpu" / "test_loss.py",
    ]
    with pytest.raises(ValueError, match=r"no suite 'lose'; there are: .*attention.*sampling"):
        bench.paths(BENCHMARKS, ["lose"])


def test_a_file_as_the_folder_of_results_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "cpu.json"
    file.touch()
    listed, found = collected("--results", str(file))
    assert listed.returncode != 0 and not found
    assert f"--results {file}: a file; expected the folder of the results" in listed.stderr


# ---- a run -----------------------------------------------------------------------------------------------
def test_a_run_prints_its_table_and_writes_what_is_named_and_nothing_else(tmp_path):
    before = {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()}
    ended = run(
        "dllm_kernels", "bench", "loss", "--smoke", "--json", "out/loss.json", "--report", "loss.html",
        "--folder", str(BENCHMARKS), cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "diffusion_cross_entropy, 16 rows of 100" in ended.stdout and "vs torch" in ended.stdout
    (content,) = json.loads((tmp_path / "out/loss.json").read_text()).values()
    assert set(content["suites"]["loss"]) == {"linear_loss", "loss"}
    assert "<h1>Benchmarks on cpu</h1>" in (tmp_path / "loss.html").read_text()
    assert {path: path.read_bytes() for path in (BENCHMARKS / "results").iterdir()} == before


def test_results_are_merged_into_a_folder(tmp_path):
    """A second run of one case keeps the others; all files stand beside each other."""
    options = ("benchmarks/test_loss.py", "-q", "-p", "no:cacheprovider", "--results", str(tmp_path))
    assert run("pytest", *options, "-m", "smoke").returncode == 0
    assert run("pytest", *options, "--smoke", "-k", "linear_loss").returncode == 0
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert set(content["suites"]["loss"]) == {"linear_loss", "loss"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.html", "cpu.json", "cpu.md"]


# ---- markers and options of pytest -----------------------------------------------------------------------
def test_markers_select_the_device():
    _, on_cpu = collected("-m", "cpu")
    _, on_gpu = collected("-m", "gpu")
    _, all_of_them = collected("-m", "smoke")
    assert on_cpu and all(line.startswith("benchmarks/test_loss.py") for line in on_cpu)
    assert on_gpu and all(line.startswith("benchmarks/gpu/") for line in on_gpu)
    assert sorted(all_of_them) == sorted(on_cpu + on_gpu)


@pytest.mark.parametrize(
    "options, message",
    [
        (("-m", "not smoke"), "every benchmark has a smoke run"),
        (("--peer", "unknown=/tmp"), "'unknown' is not known; known: llada"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    listed, _ = collected(*options)
    assert listed.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in listed.stderr
