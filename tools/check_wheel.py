"""Check a wheel: its contents, and that it samples in an empty environment.

    python tools/check_wheel.py dist/dllm_kernels-*.whl --torch "torch==2.13.0"
    python tools/check_wheel.py dist/dllm_kernels-*.whl --contents     only look into it

The environment is a temporary folder, made by the running Python, with the wheel, torch and what both need.
"""

import argparse
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

NEEDED = {
    "dllm_kernels/__init__.pyi",
    "dllm_kernels/assets/tiny-python/model.safetensors",
    "dllm_kernels/assets/tiny-python/tokenizer.json",
    "dllm_kernels/lib/_C.so",
    "dllm_kernels/lib/build_info.json",
    "dllm_kernels/py.typed",
    "dllm_kernels/viewer/replay.html",
    "dllm_train/configs/cpu.yaml",
    "dllm_train/evaluate/tasks/python_arithmetic.yaml",
    "dllm_train/py.typed",
}
PACKAGES = ("dllm_kernels/", "dllm_train/")
PROGRAM = """
import dllm_kernels as dk, torch
assert ".venv" in dk.__file__, dk.__file__
model, tokenizer = dk.load("tiny-python", device="cpu")
output = dk.sample(model, "assert 37 + 85 ==", tokenizer=tokenizer, max_new_tokens=5, threshold=0.9)
assert output.texts[0].startswith(" 122"), output.texts
print(f"dllm_kernels {dk.__version__} samples beside torch {torch.__version__}:", output.texts[0].strip())
"""


def contents_failures(names: set[str]) -> list[str]:
    """Return what is wrong with the files of a wheel."""
    info = {name.split("/")[0] for name in names if ".dist-info/" in name}
    licenses = {f"{folder}/licenses/{file}" for folder in info for file in ("LICENSE", "NOTICE")}
    failures = [f"{name} is missing" for name in sorted((NEEDED | licenses) - names)]
    if not any(name.startswith("dllm_kernels/lib/_host.") for name in names):
        failures.append("dllm_kernels/lib/_host.*.so is missing")
    strange = [
        n for n in names if not n.startswith(PACKAGES) and ".dist-info/" not in n and ".libs/" not in n
    ]
    strange += [name for name in names if name.endswith((".pyc", ".cpp", ".cu", ".h")) or "/tests/" in name]
    return failures + [f"{name} does not belong there" for name in sorted(strange)]


def install_and_sample(wheel: Path, torch: str) -> None:
    """Run PROGRAM in a new environment with `wheel` and `torch`, a requirement of pip."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / ".venv"
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, torch, wheel.resolve()], check=True)
        subprocess.run([python, "-c", PROGRAM], cwd=folder, env={"PATH": "/usr/bin:/bin"}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", help="a requirement such as torch==2.13.0")
    parser.add_argument("--contents", action="store_true", help="install nothing")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as archive:
        failures = contents_failures(set(archive.namelist()))
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"{options.wheel.name}: contents are complete")
    if not options.contents:
        install_and_sample(options.wheel, options.torch)


if __name__ == "__main__":
    main()
