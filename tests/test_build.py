"""The build, the package and its report, and the gates for compiled kernels."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from importlib.machinery import PathFinder
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
    needed = {
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "NOTICE",
        "CHANGELOG.md",
        "CITATION.cff",
    }
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
    staged = files_under(source / "staged")
    assert staged == {path for path in expected if "__pycache__" not in path}
    assert {"dllm_kernels/py.typed", "dllm_kernels/__init__.pyi", "dllm_train/py.typed"} <= staged


def test_metadata_names_license_authors_and_source(source):
    result = run(sys.executable, "setup.py", "-q", "dist_info", "--output-dir", source.parent, cwd=source)
    assert result.returncode == 0, result.stderr
    (folder,) = source.parent.glob("*.dist-info")
    metadata = message_from_string((folder / "METADATA").read_text())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The dllm_kernels authors"
    assert {"train", "eval", "docs", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} <= {
        link.split(",")[0] for link in metadata.get_all("Project-URL")
    }
    assert (folder / "licenses" / "NOTICE").read_text() == (ROOT / "NOTICE").read_text()
    text = (folder / "licenses" / "LICENSE").read_text()
    assert text == (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Copyright 2026 The dllm_kernels authors" in text


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
        ("DOCS_NEEDS", project["project"]["optional-dependencies"]["docs"]),
    ):
        (value,) = re.findall(rf"^{name} := (.*)$", variables, re.MULTILINE)
        assert shlex.split(value) == wanted


def test_workflows_and_hooks_run_files_that_exist():
    settings = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / "pyproject.toml"]
    named = {path for file in settings for path in re.findall(r"(?:tools|\.ci)/[\w./]+\w", file.read_text())}
    assert {".ci/run", "tools/wheels.sh", "tools/check_wheel.py"} <= named
    for path in named:
        assert (ROOT / path).is_file(), path


def test_a_wheel_that_lacks_a_file_or_holds_another_is_refused():
    check = runpy.run_path(str(ROOT / "tools" / "check_wheel.py"))
    info = "dllm_kernels-1.dist-info"
    licenses = {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"}
    complete = check["NEEDED"] | licenses | {"dllm_kernels/lib/_host.so", f"{info}/METADATA"}
    failures = check["contents_failures"]
    assert failures(complete) == []
    assert failures(complete - {"dllm_kernels/py.typed"}) == ["dllm_kernels/py.typed is missing"]
    assert failures(complete - licenses) == [f"{name} is missing" for name in sorted(licenses)]
    assert failures(complete | {"tests/conftest.py"}) == ["tests/conftest.py does not belong there"]
    assert failures(complete - {"dllm_kernels/lib/_host.so"}) == ["dllm_kernels/lib/_host.*.so is missing"]


def test_pinned_versions_agree():
    """Hooks before a commit check by the versions of pyproject.toml; the citation names this version."""
    project = (ROOT / "pyproject.toml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool, repository in (("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")):
        (revision,) = re.findall(rf"{repository}\n +rev: v(\S+)", hooks)
        assert set(re.findall(rf'"{tool}==([\d.]+)"', project)) == {revision}
    makefile, cmake = (ROOT / "Makefile").read_text(), (ROOT / "cmake" / "cuda.cmake").read_text()
    (cutlass,) = re.findall(r"^CUTLASS +\?= (\S+)$", makefile, re.MULTILINE)
    for text in (cmake, (ROOT / "tools" / "wheels.sh").read_text(), (ROOT / "README.md").read_text()):
        assert set(re.findall(r"nvidia-cutlass==[\d.]+\d", text)) == {cutlass}
    (version,) = re.findall(r'__version__ = "(.*)"', (ROOT / "dllm_kernels" / "__init__.py").read_text())
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


# ---- the path of the source tree ----------------------------------------------------------------------
def moved(source: Path, folder: Path) -> Path:
    """Copy the inputs of a build to `folder`."""
    for name in ("csrc", "cmake"):
        shutil.copytree(source / name, folder / name)
    (folder / "dllm_kernels").mkdir()
    for name in (
        "setup.py",
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "dllm_kernels/__init__.py",
    ):
        shutil.copy(source / name, folder / name)
    return folder


def build_host(tree: Path) -> subprocess.CompletedProcess:
    """Build the smallest library in place."""
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    return run(*command, cwd=tree, DLLM_TARGET="_host", DLLM_CUDA="OFF")


def test_a_path_may_hold_spaces_quotes_and_letters_of_any_alphabet(source, tmp_path):
    tree = moved(source, tmp_path / "My Projects" / "Größe, 'dllm' (1) & #[2] @100%=+~")
    result = build_host(tree)
    assert result.returncode == 0, result.stderr
    assert [path.name.split(".")[0] for path in (tree / "dllm_kernels" / "lib").iterdir()] == ["_host"]


@pytest.mark.parametrize("character", ['"', "$", ";", "<", ">", "\\", "`", "|", "\n"])
def test_a_path_that_build_files_cannot_hold_is_refused(source, tmp_path, character):
    tree = moved(source, tmp_path / f"one{character}two")
    result = build_host(tree)
    assert result.returncode != 0
    assert f"CMake and Ninja cannot build with {character!r} in a path" in result.stderr
    assert not (tree / "build").exists()


@pytest.mark.parametrize("character", ["'", ","])
def test_a_path_that_nvcc_cannot_read_is_the_reason_to_leave_cuda_out(tmp_path, character):
    result = configure(tmp_path / f"one{character}two", DLLM_CUDA="ON")
    assert result.returncode != 0
    assert "nvcc reads no path with ' or a comma" in " ".join(result.stderr.split())


def test_make_takes_a_python_whose_path_holds_spaces():
    commands = run("make", "-n", "cuda", "lint", "PYTHON=/my tools/python").stdout.splitlines()
    words = [shlex.split(line) for line in commands]
    assert all("/my" not in line and "tools/python" not in line for line in words)
    assert any("/my tools/python" in line for line in words)


@pytest.mark.parametrize("name", ["tests", "benchmarks"])
def test_a_package_of_another_project_does_not_stand_for_ours(name, tmp_path):
    """One of the same name that is installed, and so stands later on the path, would win over a folder."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    found = PathFinder.find_spec(name, [str(ROOT), str(tmp_path)])
    assert found.origin == str(ROOT / name / "__init__.py")


def test_libraries_know_the_sources_they_were_built_from(tmp_path):
    hashing = runpy.run_path(str(ROOT / "cmake" / "source_hash.py"))
    for name in ("csrc", "cmake"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)

    def up_to_date() -> bool:
        return run(sys.executable, tmp_path / "cmake/source_hash.py", tmp_path).returncode == 0

    assert not up_to_date()
    (tmp_path / "build_info.json").write_text(json.dumps({hashing["NAME"]: hashing["source_hash"]()}))
    assert up_to_date()
    for change in ("CMakeLists.txt", "csrc/cuda/launch_kernel.h", "cmake/cuda.cmake"):
        before = (tmp_path / change).read_text()
        (tmp_path / change).write_text(before + "\n")
        assert not up_to_date(), change
        (tmp_path / change).write_text(before)
    (tmp_path / "csrc/cuda/launch_kernel.h").rename(tmp_path / "csrc/cuda/launch.h")
    assert not up_to_date()


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
        (
            {"DLLM_CUDA": "AUTO", "DLLM_CUDA_ARCHS": "90a", "DLLM_CUTLASS_DIR": "/nowhere"},
            "DLLM_CUTLASS_DIR is '/nowhere', which does not hold cutlass/version.h",
        ),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    if "DLLM_CUDA_ARCHS" in options and not shutil.which("nvcc"):
        pytest.skip("architectures are read only where there is an nvcc")
    result = configure(tmp_path, **options)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ("", "its headers were not found (pip install --no-deps nvidia-cutlass"),
        ("4.2.1", ""),
        ("3.9.0", "is version 3.9.0, 4.2 to 4.x is needed"),
    ],
)
@pytest.mark.skipif(not shutil.which("nvcc"), reason="CUTLASS is looked for only where there is an nvcc")
def test_without_cutlass_the_rest_is_built_and_one_line_says_so(tmp_path, headers, reason):
    options = {"DLLM_CUDA": "AUTO", "DLLM_CUDA_ARCHS": "80;90a"}
    if headers:
        folder = tmp_path / "headers"
        (folder / "cutlass").mkdir(parents=True)
        parts = zip(("MAJOR", "MINOR", "PATCH"), headers.split("."), strict=True)
        (folder / "cutlass" / "version.h").write_text(
            "".join(f"#define CUTLASS_{name} {number}\n" for name, number in parts)
        )
        options["DLLM_CUTLASS_DIR"] = folder
    result = configure(tmp_path / "build", **options)
    assert result.returncode == 0, result.stderr
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "CUTLASS" in line]
    assert len(lines) == bool(reason) and all("CUTLASS kernels left out: " in line for line in lines)
    info = json.loads((tmp_path / "build" / "build_info.json").read_text())
    assert reason in info["cutlass_left_out"] and bool(info["cutlass"]) == (not reason)


# ---- loading and reporting ---------------------------------------------------------------------------
def test_import_is_light():
    heavy = "{'torch', 'transformers', 'lm_eval', 'rich'} & set(sys.modules)"
    assert python(f"import sys, dllm_kernels; print({heavy})").stdout == "set()\n"
    assert "{'rich'}" in python(f"import sys, dllm_kernels.cli; print({heavy} | {{'rich'}})").stdout


def test_info_reports_versions_and_what_is_missing():
    result = run(sys.executable, "-m", "dllm_kernels", "info", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["instruction set picked"] in facts["instruction sets"]
    assert all(" - " not in line and ": " in line for line in facts["missing"])
    plain = run(sys.executable, "-m", "dllm_kernels", "info").stdout
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
    assert "Rebuild it" in result.stderr


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


PLANS = {"cached_tiles_kernel<128,1>": 64 * 1024, "sm90::forward_kernel<64>": 200 * 1024}


@pytest.mark.parametrize(
    ("name", "arch", "dynamic", "limit"),
    [
        ("_ZN4dllm4cuda19cached_tiles_kernelI6__halfLi128ELb1EEEvNS0_11SplitParamsE", "sm_80", 64, 99),
        ("_ZN4dllm4cuda19cached_tiles_kernelI6__halfLi128ELb1EEEvNS0_11SplitParamsE", "sm_90a", 64, 227),
        ("_ZN4dllm4cuda4sm9014forward_kernelI6__halfLi64EEEvNS1_13ForwardParamsE", "sm_90a", 200, 227),
        ("_ZN4dllm4cuda19cached_tiles_kernelI6__halfLi128ELb0EEEvNS0_11SplitParamsE", "sm_80", 0, 99),
    ],
)
def test_static_and_dynamic_shared_memory_fit_a_cta_together(name, arch, dynamic, limit):
    def failures(statics: int) -> list[str]:
        report = (
            CLEAN.replace("_Z6kernelPf", name)
            .replace("sm_80", arch)
            .replace("4096 bytes", f"{statics} bytes")
        )
        return gates().report_failures(report, [], lambda limit: PLANS)

    most = 1024 * (limit - dynamic)
    assert not any(f"on {arch}: {1024 * limit} bytes" in failure for failure in failures(most))
    assert any(f"{1024 * limit + 1} bytes of shared memory" in failure for failure in failures(most + 1))


def test_every_plan_of_shared_memory_is_of_a_kernel():
    plans = gates().shared_plans()
    kernels = {name.split("<")[0].split("::")[-1] for name in plans(227 * 1024)}
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").rglob("*.cu*"))
    assert kernels <= {*re.findall(r"(\w+_kernel)\(", sources)}
    assert (
        plans(227 * 1024)["cross_entropy_in_place_kernel"] > plans(99 * 1024)["cross_entropy_in_place_kernel"]
    )


def test_sm90_kernels_must_use_hgmma():
    matrix = "\tcode for sm_90a\n\t\tFunction : _Z1aPf\n  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT ;\n"
    plain = "\t\tFunction : _Z1bPf\n  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;\n"
    assert gates().sass_failures(matrix, "HGMMA") == []
    assert gates().sass_failures(matrix + plain, "HGMMA") == ["_Z1bPf: no HGMMA in its SASS"]
    assert gates().sass_failures("", "HGMMA") == ["no SASS found"]
    bytes_alone = matrix.replace("HGMMA", "QGMMA")
    assert gates().sass_failures(matrix + bytes_alone, "HGMMA", "QGMMA") == []
    assert gates().sass_failures(bytes_alone, "HGMMA") == ["_Z1aPf: no HGMMA in its SASS"]


def test_forbidden_links_are_found():
    line = " 0x0000000000000001 (NEEDED)             Shared library: [{}]\n"
    allowed = line.format("libtorch.so") + line.format("libtorch_cpu.so") + line.format("libc.so.6")
    assert gates().link_failures(allowed) == []
    assert gates().link_failures(allowed + line.format("libcuda.so.1")) == ["links libcuda.so.1"]
