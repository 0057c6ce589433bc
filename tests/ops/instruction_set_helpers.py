"""The same computation on every instruction set that this machine runs."""

import os
import subprocess
import sys
from pathlib import Path

import torch

SAVE = "\ntorch.save(results, sys.argv[1])"


def results_of_each(code: str, folder: Path) -> dict[str, list]:
    """Return the `results` of `code` by instruction set, the baseline first, each in its own process.

    `folder`: for the files in which the results come back.
    """
    built = torch.ops.dllm_kernels.isas_built().split(",")
    runnable = built[: built.index(torch.ops.dllm_kernels.isa_active()) + 1]
    results = {}
    for isa in runnable:
        command = [sys.executable, "-c", "import sys, torch\n" + code + SAVE, str(folder / isa)]
        run = subprocess.run(command, env={**os.environ, "DLLM_ISA": isa}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results[isa] = torch.load(folder / isa)
    return results
