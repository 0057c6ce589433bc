"""llama.cpp's diffusion tool, run as a program on a GGUF file."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.peers import Peer
from benchmarks.peers.gguf_file import text_of

TIME = re.compile(r"time per step: ([\d.]+)ms")
TOKEN = re.compile(r"<(\d+)>")
ATTEMPTS = 10  # a thread writes its log, and short runs end without waiting for its last lines


@dataclasses.dataclass(frozen=True)
class Run:
    """seconds: of one step, forward over the whole canvas and choice of tokens; tokens: the completion."""

    seconds: float
    tokens: list[int]


def run(peer: Peer, model: Path, prompt: list[int], canvas: int, steps: int) -> Run:
    """Fill a canvas of `canvas` tokens that begins with `prompt` in `steps` steps, each token the likeliest.

    Raises RuntimeError with its last lines of output if it fails, or prints no time or no completion.
    """
    threads = str(torch.get_num_threads())
    command = [
        str(peer.path), "-m", str(model), "-p", text_of(prompt), "-c", str(canvas), "-b", str(canvas),
        "-ub", str(canvas), "--diffusion-steps", str(steps), "--diffusion-eps", "0.001", "--temp", "0",
        "--top-k", "1", "-t", threads, "-tb", threads, "-ngl", "0",
    ]  # fmt: skip
    for _ in range(ATTEMPTS):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        time = TIME.search(done.stdout)
        tokens = TOKEN.findall(done.stdout[time.end() :]) if time else []
        if done.returncode or tokens:
            break
    if done.returncode or not tokens:
        last = "\n".join(done.stdout.splitlines()[-20:])
        what = (
            f"status {done.returncode}" if done.returncode else "it printed no time per step and completion"
        )
        raise RuntimeError(f"llama.cpp ({peer.path}): {what}\n{last}")
    return Run(float(time[1]) / 1e3, [int(token) for token in tokens])
