"""Builds the compiled libraries by calling CMake; everything else is in pyproject.toml.

Environment variables:
  DLLM_CUDA         AUTO, ON or OFF
  DLLM_CUDA_ARCHS   e.g. "80;90a" (default: the local GPU, else both of these)
  DLLM_CUTLASS_DIR  the folder that holds cutlass/cutlass.h (default: that of the wheel nvidia-cutlass)
  DLLM_SANITIZE     e.g. "address,undefined"
  DLLM_TARGET       build this library only, e.g. _host
  DLLM_BUILD_DIR    where CMake works (default: build)
  DLLM_LIB_DIR      where an in-place build puts the libraries (default: dllm_kernels/lib)
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / os.environ.get("DLLM_BUILD_DIR", "build")
UNREADABLE = frozenset('"$;<>\\`|') | set(map(chr, range(32)))  # separators of CMake, Ninja and the shell


def torch_root() -> Path:
    """Folder of the installed torch package, found without importing it. Only its headers and libraries
    are used, so the one of the target environment will do in an isolated build, which hides it."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for root in (Path(folder) / "torch" for folder in folders):
        if (root / "version.py").exists():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", (root / "version.py").read_text())
            if version and tuple(map(int, version.groups())) < (2, 11):
                raise SystemExit(
                    f"dllm-kernels needs torch 2.11 or newer; {root} is {'.'.join(version.groups())}"
                )
            return root
    raise SystemExit(
        "torch is not installed here: pip install torch, then pip install --no-build-isolation ."
    )


def cutlass_root() -> str:
    """Folder of the headers of CUTLASS: as asked for, or of the installed wheel; empty without either."""
    if asked := os.environ.get("DLLM_CUTLASS_DIR"):
        return str(Path(asked).expanduser().resolve())
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    headers = (Path(folder) / "cutlass_library" / "source" / "include" for folder in folders)
    return next((str(path) for path in headers if (path / "cutlass" / "version.h").exists()), "")


def tool(name: str) -> str:
    """Path of cmake or ninja: of this Python environment, else of the machine."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is missing: pip install {name}, then pip install --no-build-isolation .")
    return path


def check_paths(*paths: Path | str) -> None:
    """Raise SystemExit if a path that goes into build files holds a character that they cannot quote."""
    for path in map(str, paths):
        if found := sorted(UNREADABLE.intersection(path)):
            characters = " ".join(repr(character) for character in found)
            raise SystemExit(f"CMake and Ninja cannot build with {characters} in a path; rename {path!r}")


def run(*command: str) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit("the compiled libraries could not be built; the reason is above")


class CheckTorchFirst(dist_info):
    """Says that torch is missing before pip fetches every other dependency."""

    def run(self) -> None:
        torch_root()
        super().run()


class FreshBuild(build_py):
    """Empties the staging folder first, or a wheel would carry files that the source tree no longer has."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds with CMake, then copies the libraries into dllm_kernels/lib of the source tree or the wheel."""

    def run(self) -> None:
        paths = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "DLLM_TORCH_ROOT": torch_root(),
            "Python_EXECUTABLE": sys.executable,
            "DLLM_CUTLASS_DIR": cutlass_root(),
        }
        check_paths(ROOT, BUILD, tool("cmake"), *paths.values())
        options = {
            **paths,
            "DLLM_CUDA": os.environ.get("DLLM_CUDA", "AUTO"),
            "DLLM_CUDA_ARCHS": os.environ.get("DLLM_CUDA_ARCHS", ""),
            "DLLM_SANITIZE": os.environ.get("DLLM_SANITIZE", ""),
        }
        target = os.environ.get("DLLM_TARGET")
        define = [f"-D{name}={value}" for name, value in options.items()]
        command = [tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "--log-level=NOTICE"]
        run(*command, *define)
        run(tool("cmake"), "--build", str(BUILD), *(["--target", target] if target else []))
        names = (BUILD / "libraries.txt").read_text().splitlines()
        built = [BUILD / "lib" / name for name in names if target in (None, name.split(".")[0])]
        self.install(built, partial=bool(target))

    def install(self, built: list[Path], partial: bool) -> None:
        folder = Path(self.build_lib) / "dllm_kernels" / "lib"
        if self.inplace:
            folder = ROOT / os.environ.get("DLLM_LIB_DIR", "dllm_kernels/lib")
        folder.mkdir(parents=True, exist_ok=True)
        if not partial:
            built = [*built, self.build_info()]
            for stale in {path.name for path in folder.glob("_C*.so")} - {path.name for path in built}:
                (folder / stale).unlink()
        for path in built:  # renamed into place: a process that has the old one mapped keeps it
            shutil.copy2(path, folder / f"{path.name}.new")
            os.replace(folder / f"{path.name}.new", folder / path.name)

    def build_info(self) -> Path:
        """What CMake wrote, with the hash of the sources."""
        hashing, path = runpy.run_path(str(ROOT / "cmake" / "source_hash.py")), BUILD / "build_info.json"
        info = json.loads(path.read_text()) | {hashing["NAME"]: hashing["source_hash"]()}
        path.write_text(json.dumps(info, indent=2) + "\n")
        return path

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "dllm_kernels" / "lib").glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("dllm_kernels.lib._C", sources=[])],  # marks the wheel as compiled
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuild, "dist_info": CheckTorchFirst},
)
