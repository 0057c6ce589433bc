"""`dllm info`: versions, what was built, what was picked, and what is missing and why."""

import platform
from importlib.metadata import PackageNotFoundError, version

from . import __version__


def collect() -> dict:
    """Return facts by name, and `missing`: one line with reason and remedy per missing part."""
    facts: dict = {"dllm_kernels": __version__, "python": platform.python_version()}
    facts |= {name: _version(name) for name in ("torch", "transformers")}
    facts["missing"] = []
    try:
        from dllm_kernels import _library
    except ImportError as error:
        facts["missing"].append(f"compiled libraries: {error}")
        return facts
    import torch

    built = _library.build_info()
    facts["instruction sets"] = torch.ops.dllm_kernels.isas_built().split(",")
    facts["instruction set picked"] = torch.ops.dllm_kernels.isa_active()
    facts["CUDA architectures"] = built.get("cuda_archs", [])
    facts["compilers"] = [
        name for name in (built.get("compiler"), built.get("nvcc") and f"nvcc {built['nvcc']}") if name
    ]
    facts["CUTLASS"] = built.get("cutlass") or "not built in"
    facts["GPUs"] = [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    if reason := _library.cuda_unavailable():
        facts["missing"].append(f"CUDA: {reason}")
    if built.get("cuda_left_out") and not torch.version.cuda:
        facts["missing"].append(f"CUDA library: left out of this build, {built['cuda_left_out']}")
    if "90a" in built.get("cuda_archs", []) and built.get("cutlass_left_out"):
        facts["missing"].append(f"CUTLASS kernels: left out of this build, {built['cutlass_left_out']}")
    try:
        _library.host()
    except ImportError as error:
        facts["missing"].append(f"host module: {error}")
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(torch, index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} (sm_{properties.major}{properties.minor})"
