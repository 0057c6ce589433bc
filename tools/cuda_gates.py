"""Compile gates: what the CUDA compiler said about every kernel, judged without a GPU.

    python tools/cuda_gates.py BUILD_FOLDER

A kernel fails when it spills registers or has a stack frame, when its static and dynamic shared memory are
more than a CTA can have, or when ptxas gave up on asynchronous wgmma. Every kernel in a folder named sm90
must contain HGMMA, and every one of CUTLASS that or QGMMA, its 8-bit form: kernels without matrix products
belong to the sources compiled for all architectures. The dynamic shared memory of the kernels of CUTLASS,
which CUTLASS decides on, is checked where they are compiled (csrc/cuda/skinny_linear/cutlass/gemm.cuh).
The library may link neither the driver nor the CUDA libraries of torch.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Static and dynamic shared memory that a CTA can have. Code for 8.0 runs on every GPU of 8.x and 12.x.
SHARED_BYTES = {"sm_87": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_103": 227 * 1024}
SMALLEST_SHARED_BYTES = 99 * 1024
FORBIDDEN_LIBRARIES = (
    "libcuda.so",
    "libcudart.so",
    "libtorch_cuda.so",
    "libc10_cuda.so",
    "libtorch_python.so",
)
WARNINGS = re.compile(
    r"^.*(?:C75\d\d|wgmma\S* .*serializ|setmaxnreg.*ignored).*$", re.MULTILINE | re.IGNORECASE
)


@dataclass
class Function:
    """One kernel (or function that was not inlined) on one architecture, as ptxas reported it."""

    name: str
    arch: str
    stack_bytes: int
    spill_bytes: int
    registers: int = 0
    shared_bytes: int = 0
    dynamic_bytes: int = 0

    @property
    def plan(self) -> str:
        """Its name among the plans of shared memory."""
        match = re.search(r"4cuda(?:4(fp32|sm80|sm90))?\d+([a-z][a-z0-9_]*_kernel)", self.name)
        numbers = ",".join(re.findall(r"L[ib](\d+)E", self.name))
        space = f"{match[1]}::" if match and match[1] else ""
        return space + (match[2] if match else self.name) + (f"<{numbers}>" if numbers else "")

    def failures(self) -> list[str]:
        limits = {
            "bytes of stack": (self.stack_bytes, 0),
            "bytes spilled": (self.spill_bytes, 0),
            "bytes of shared memory": (self.shared_bytes + self.dynamic_bytes, shared_limit(self.arch)),
        }
        return [
            f"{self.name} on {self.arch}: {used} {what}, allowed {allowed}"
            for what, (used, allowed) in limits.items()
            if used > allowed
        ]


def shared_limit(arch: str) -> int:
    """Bytes that a CTA of code for `arch`, e.g. sm_90a, can have."""
    return SHARED_BYTES.get(arch.rstrip("af"), SMALLEST_SHARED_BYTES)


# plans(limit): dynamic shared memory by kernel, on a GPU that gives a CTA `limit` bytes.
Plans = Callable[[int], dict[str, int]]


def no_plans(limit: int) -> dict[str, int]:
    return {}


def shared_plans() -> Plans:
    """Return the plans from csrc's constants."""
    program = Path(tempfile.mkdtemp()) / "shared_memory_plans"
    source = ROOT / "tools" / "shared_memory_plans.cpp"
    output_of(
        os.environ.get("CXX", "c++"), "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)
    )

    @functools.cache
    def plans(limit: int) -> dict[str, int]:
        lines = output_of(str(program), str(limit)).splitlines()
        return {name: int(size) for name, size in (line.split() for line in lines)}

    return plans


def parse_report(text: str, plans: Plans = no_plans) -> list[Function]:
    """The functions in what `ptxas -v` printed for one source file."""
    functions: list[Function] = []
    arch = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '\S+' for '(\w+)'", line):
            arch = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            functions.append(Function(match[1], arch, 0, 0))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            functions[-1].stack_bytes = int(match[1])
            functions[-1].spill_bytes = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            functions[-1].registers = int(match[1])
            functions[-1].shared_bytes = int(shared[1]) if shared else 0
    for function in functions:
        function.dynamic_bytes = plans(shared_limit(function.arch)).get(function.plan, 0)
    return functions


def report_failures(text: str, archs: list[str], plans: Plans = no_plans) -> list[str]:
    """Return the faults in the report of one source file that should be compiled for `archs`."""
    functions = parse_report(text, plans)
    failures = [failure for function in functions for failure in function.failures()]
    failures += [f"ptxas: {warning.strip()}" for warning in WARNINGS.findall(text)]
    missing = {f"sm_{arch}" for arch in archs} - {function.arch for function in functions}
    return failures + [f"no kernel was compiled for {arch}" for arch in sorted(missing)]


def sass_failures(sass: str, *products: str) -> list[str]:
    """Kernels without any of `products` in what `cuobjdump --dump-sass` printed for a source file."""
    kernels = re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]
    if not kernels:
        return ["no SASS found"]
    lacking = [kernel for kernel in kernels if not any(product in kernel for product in products)]
    return [f"{kernel.split()[0]}: no {' or '.join(products)} in its SASS" for kernel in lacking]


def link_failures(dynamic: str) -> list[str]:
    """Forbidden libraries in what `readelf -d` printed for the CUDA library."""
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic)
    return [f"links {name}" for name in needed if name.startswith(FORBIDDEN_LIBRARIES)]


def output_of(*command: str) -> str:
    """Return the output of `command`; CUDA tools are also searched among the Python packages."""
    packaged = [str(folder) for folder in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = os.pathsep.join([os.environ["PATH"], *packaged])
    if shutil.which(command[0], path=path) is None:
        raise SystemExit(f"{command[0]} is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


# Groups of sources: the architectures they are compiled for, and the products that all their kernels hold.
GROUPS = {
    "cuda_sm80": (["80", "90a"], ()),
    "cuda_sm90": (["90a"], ("HGMMA",)),
    "cuda_cutlass": (["90a"], ("HGMMA", "QGMMA")),
}


def main(build: Path) -> int:
    library = build / "lib" / "_C_cuda.so"
    failures = [
        f"{library.name}: {failure}" for failure in link_failures(output_of("readelf", "-d", str(library)))
    ]
    if left_out := json.loads((build / "build_info.json").read_text())["cutlass_left_out"]:
        failures.append(f"the kernels of CUTLASS were left out: {left_out}")
    plans, rows = shared_plans(), []
    for group, (archs, products) in GROUPS.items():
        for path in map(Path, (build / f"{group}.objects").read_text().splitlines()):
            source = str(path).split(f"{group}.dir/")[1].removeprefix("./").removesuffix(".o")
            report = Path(f"{path}.ptxas")
            if not report.exists():
                failures.append(f"{source}: no compiler report, rebuild it")
                continue
            found = report_failures(report.read_text(), archs, plans)
            if products:
                found += sass_failures(output_of("cuobjdump", "--dump-sass", str(path)), *products)
            failures += [f"{source}: {failure}" for failure in found]
            rows += [(source, f) for f in parse_report(report.read_text(), plans)]
    compiled = {function.plan for _, function in rows}
    failures += [
        f"{name} has a plan and was not compiled"
        for name in plans(SMALLEST_SHARED_BYTES)
        if name not in compiled
    ]
    for source, function in rows:
        shared = f"{function.shared_bytes:6} + {function.dynamic_bytes:6} B shared"
        numbers = f"{function.registers:4} registers  {shared}"
        print(f"{function.arch:7} {numbers}  {source}  {function.name[:80]}")
    print(f"{len(rows)} kernels checked, {len(failures)} failures")
    for failure in failures:
        print(f"FAILED {failure}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
