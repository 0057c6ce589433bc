"""A checkout in a process of its own: what it is asked for, and what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import dllm_kernels as dk
from benchmarks.peers import Peer

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 10  # seconds: an idle one ends at once, one that we no longer listen to may be at work for long
# Who writes weights in which layout for which checkout; None: a stock checkpoint.
LAYOUTS = {
    ("llada", "bidirectional"): None,
    ("fast-dllm", "bidirectional"): "llada",
    ("dllm", "bidirectional"): "llada",
    ("dllm", "block_causal"): "a2d-qwen3",
}


class PeerProcess:
    """A checkout's interpreter with a model of ours loaded; a context that ends it.

    Errors of the checkout raise RuntimeError with its name and its last lines of output.
    """

    def __init__(self, peer: Peer, model, attention: str):
        """Start it and hand over the weights of `model`; attention: "bidirectional" or "block_causal"."""
        self.peer = peer
        self._folder = tempfile.TemporaryDirectory(prefix="dllm-peer-")
        self._errors = open(Path(self._folder.name) / "stderr", "w+")  # noqa: SIM115 - closed in close()
        checkpoint = Path(self._folder.name) / "checkpoint"
        dk.save(model, None, checkpoint, layout=LAYOUTS[peer.name, attention], max_shard_size="1TB")
        self._process = subprocess.Popen(
            [peer.python, str(WORKER), peer.name, str(peer.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=self._folder.name,
            env=_environment(),
        )
        try:
            self._ask(
                "load", checkpoint=str(checkpoint), attention=attention, threads=torch.get_num_threads()
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process, in the middle of its work if need be."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()

    def sample(
        self, sampler: str, prompt: list[int], new_tokens: int, block_size: int, mask_id: int
    ) -> Tensor:
        """Return int64 [1, S + new_tokens]: one token is committed per step."""
        options = dict(prompt=prompt, new_tokens=new_tokens, block_size=block_size, mask_id=mask_id)
        return torch.tensor([self._ask("sample", sampler=sampler, **options)])

    def prepare_training(self, rows: Tensor, block_size: int | None, arguments: dict) -> None:
        """Make its trainer of `rows` int64 [N, L]; arguments: of transformers' TrainingArguments."""
        self._ask("prepare_training", rows=rows.tolist(), block_size=block_size, arguments=arguments)

    def train(self) -> None:
        """Train one epoch."""
        self._ask("train")

    def _ask(self, what: str, **arguments):
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"it ended with status {self._process.wait()}"}
        if "error" in answer:
            self._errors.flush()
            lines = Path(self._errors.name).read_text().splitlines()[-20:]
            raise RuntimeError(
                f"{self.peer.title} ({self.peer.path}, {self.peer.python}): {what}: {answer['error']}\n"
                + "\n".join(lines)
            )
        return answer["result"]


def _environment() -> dict[str, str]:
    """Ours, but with its own modules only, and threads that sleep while it is our turn."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
