"""What is built, packaged and reported, and the gates that judge compiled kernels."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"} | environment
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def python(code: str, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- packages ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree without anything built."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "lib", "__pycache__", "*.egg-info", "runs", "dist")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    result = run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(source.parent)
    return source.parent / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_what_a_build_needs_and_no_tests(source, sdist):
    packed = files_under(sdist)
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml"}
    for folder in ("cmake", "csrc", "dllm_kernels", "dllm_train"):
        needed |= {f"{folder}/{path}" for path in files_under(source / folder)}
    assert needed <= packed, sorted(needed - packed)
    extra = [
        path
        for path in packed
        if path.startswith(("tests/", "benchmarks/", "tools/")) or path.endswith(".so")
    ]
    assert not extra


def test_wheel_holds_every_module_and_data_file(source):
    result = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", "staged", cwd=source)
    assert result.returncode == 0, result.stderr
    packages = {"dllm_kernels", "dllm_train"} & {path.name for path in source.iterdir()}
    expected = {f"{name}/{path}" for name in packages for path in files_under(source / name)}
    assert files_under(source / "staged") == {path for path in expected if "__pycache__" not in path}


@pytest.mark.skipif(not os.environ.get("CI"), reason="compiles everything; CI runs it")
def test_sdist_installs_into_a_fresh_environment(sdist, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = tmp_path / "site"
    result = run(
        *pip, "install", "-q", "--no-build-isolation", "--no-deps", "--target", target, sdist, DLLM_CUDA="OFF"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    result = python(
        "from dllm_kernels import _library; print(_library.FOLDER)", cwd=tmp_path, PYTHONPATH=str(target)
    )
    assert result.stdout.strip() == str(target / "dllm_kernels" / "lib"), result.stderr


def test_makefile_reads_its_requirements_from_pyproject():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    variables = run("make", "-pn", "help").stdout
    for name, wanted in (
        ("BUILD_NEEDS", project["build-system"]["requires"]),
        ("DEV_NEEDS", project["project"]["optional-dependencies"]["dev"]),
    ):
        (value,) = re.findall(rf"^{name} := (.*)$", variables, re.MULTILINE)
        assert shlex.split(value) == wanted


# ---- configuration -----------------------------------------------------------------------------------
def configure(tmp_path, nvcc: bool = True, **options) -> subprocess.CompletedProcess:
    hidden = (
        {str(Path(shutil.which("nvcc")).parent), "/usr/local/cuda/bin"} if shutil.which("nvcc") else set()
    )
    options |= {"DLLM_TORCH_ROOT": Path(importlib.util.find_spec("torch").origin).parent}
    options |= {"Python_EXECUTABLE": sys.executable}
    if not nvcc:
        options["CMAKE_IGNORE_PATH"] = ";".join(sorted(hidden))
    tools = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    define = [f"-D{name}={value}" for name, value in options.items()]
    return run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *define, PATH=tools)


def test_without_nvcc_auto_says_what_it_left_out(tmp_path):
    result = configure(tmp_path, nvcc=False, DLLM_CUDA="AUTO")
    assert result.returncode == 0, result.stderr
    assert "CUDA library left out: nvcc was not found" in result.stdout + result.stderr
    assert "nvcc was not found" in json.loads((tmp_path / "build_info.json").read_text())["cuda_left_out"]


def test_without_nvcc_on_fails(tmp_path):
    result = configure(tmp_path, nvcc=False, DLLM_CUDA="ON")
    assert result.returncode != 0
    assert "DLLM_CUDA=ON, but nvcc was not found" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DLLM_CUDA": "MAYBE"}, "DLLM_CUDA is 'MAYBE'; allowed: AUTO, ON, OFF"),
        ({"DLLM_CUDA": "AUTO", "DLLM_CUDA_ARCHS": "80;sm_90"}, "'sm_90' is not an architecture"),
        ({"DLLM_CUDA": "AUTO", "DLLM_CUDA_ARCHS": "75"}, "'75' is not an architecture"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    if "DLLM_CUDA_ARCHS" in options and not shutil.which("nvcc"):
        pytest.skip("architectures are read only where there is an nvcc")
    result = configure(tmp_path, **options)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


# ---- loading and reporting ---------------------------------------------------------------------------
def test_import_is_light():
    heavy = "{'torch', 'transformers', 'lm_eval', 'rich'} & set(sys.modules)"
    assert python(f"import sys, dllm_kernels; print({heavy})").stdout == "set()\n"
    assert "{'rich'}" in python(f"import sys, dllm_kernels.cli; print({heavy} | {{'rich'}})").stdout


def test_info_reports_versions_and_what_is_missing():
    result = run(sys.executable, "-m", "dllm_kernels.cli", "info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["instruction set picked"] in facts["instruction sets"]
    assert all(" - " not in line and ": " in line for line in facts["missing"])
    plain = run(sys.executable, "-m", "dllm_kernels.cli", "info").stdout
    assert f"torch: {facts['torch']}" in plain
    assert all(line in plain for line in facts["missing"])


def test_unknown_isa_is_an_error():
    result = python("import dllm_kernels._library", DLLM_ISA="sse9")
    assert "DLLM_ISA=sse9 is unknown; allowed: baseline, avx2, avx512" in result.stderr


def test_missing_library_names_the_remedy(source):
    result = python("import dllm_kernels._library", cwd=source, PYTHONPATH=str(source))
    assert "_C.so is missing" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_unloadable_library_names_the_remedy(source):
    broken = source / "dllm_kernels" / "lib" / "_C.so"
    broken.parent.mkdir()
    broken.write_bytes(b"not a library")
    try:
        result = python("import dllm_kernels._library", cwd=source, PYTHONPATH=str(source))
    finally:
        shutil.rmtree(broken.parent)
    assert "does not load with torch" in result.stderr
    assert "Build it anew" in result.stderr


# ---- compile gates -----------------------------------------------------------------------------------
def gates():
    spec = importlib.util.spec_from_file_location("cuda_gates", ROOT / "tools" / "cuda_gates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_gates"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 4096 bytes smem, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 232448 bytes smem
"""
SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized "
    "due to insufficient register resources for the wgmma pipeline in function '_Z6kernelPf'"
)


def test_clean_report_passes():
    assert gates().report_failures(CLEAN, ["80", "90a"]) == []
    first, second = gates().parse_report(CLEAN)
    assert (first.arch, first.registers, first.shared_bytes) == ("sm_80", 30, 4096)
    assert (second.arch, second.registers, second.shared_bytes) == ("sm_90a", 168, 232448)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0 bytes stack frame", "48 bytes stack frame", "48 bytes of stack"),
        ("0 bytes spill stores", "8 bytes spill stores", "8 bytes spilled"),
        ("0 bytes spill loads", "12 bytes spill loads", "12 bytes spilled"),
        ("232448 bytes smem", "232449 bytes smem", "232449 bytes of shared memory"),
        ("for 'sm_90a'", "for 'sm_90'", "no kernel was compiled for sm_90a"),
        ("ptxas info    : 0 bytes gmem", SERIALISED, "C7510"),
        ("ptxas info    : 0 bytes gmem", "ptxas warning : (C7508) setmaxnreg ignored", "C7508"),
    ],
)
def test_each_gate_can_fail(old, new, message):
    failures = gates().report_failures(CLEAN.replace(old, new), ["80", "90a"])
    assert failures
    assert any(message in failure for failure in failures)


def test_sm90_kernels_must_use_hgmma():
    matrix = "\tcode for sm_90a\n\t\tFunction : _Z1aPf\n  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;\n"
    plain = "\t\tFunction : _Z1bPf\n  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;\n"
    assert gates().sass_failures(matrix) == []
    assert gates().sass_failures(matrix + plain) == ["_Z1bPf: no HGMMA in its SASS"]
    assert gates().sass_failures("") == ["no SASS found"]


def test_forbidden_links_are_found():
    line = " 0x0000000000000001 (NEEDED)             Shared library: [{}]\n"
    allowed = line.format("libtorch.so") + line.format("libtorch_cpu.so") + line.format("libc.so.6")
    assert gates().link_failures(allowed) == []
    assert gates().link_failures(allowed + line.format("libcuda.so.1")) == ["links libcuda.so.1"]
