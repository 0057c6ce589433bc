"""Checkers and editors see the types of public names: mypy accepts right programs and names what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("mypy", reason="pip install -e '.[dev]'")

RIGHT = """
import torch

import dllm_kernels as dk

model, tokenizer = dk.load("tiny-python", dtype=torch.float32)
config = dk.SampleConfig(max_new_tokens=16, threshold=0.9, confidence="margin")
output: dk.SampleOutput = dk.sample(model, ["x = "], tokenizer=tokenizer, config=config, cache="block")
reveal_type(output.sequences)
reveal_type(output.texts)

mask = dk.SpanMask.block_causal(64, block_size=16)
q = torch.randn(1, 2, 64, 64)
attended = dk.block_attention(q, q, q, mask)
reveal_type(attended)
out, lse = dk.block_attention(q, q, q, mask, return_lse=True)
stats = dk.token_stats(torch.randn(4, 100), temperature=0.5, top_k=10)
accepted = dk.commit_(
    torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.int32), stats, dk.Rule.threshold(0.5), mask_id=99
)
reveal_type(accepted)
"""
WRONG = """
import dllm_kernels as dk

dk.SampleConfig(threshold="high")
dk.Rule.threshold()
dk.sampel
dk.SpanMask.full(8).densities()
"""


@pytest.fixture
def mypy(tmp_path):
    def check(program: str) -> subprocess.CompletedProcess:
        (tmp_path / "program.py").write_text(program)
        return subprocess.run(
            [sys.executable, "-m", "mypy", str(tmp_path / "program.py")],
            cwd=ROOT, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip

    return check


def test_a_right_program_checks(mypy):
    checked = mypy(RIGHT)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    revealed = [line.split('"')[1] for line in checked.stdout.splitlines() if "Revealed type" in line]
    tensor = "torch._tensor.Tensor"
    assert revealed == [tensor, "list[str] | None", tensor, tensor]


def test_every_mistake_is_found(mypy):
    checked = mypy(WRONG)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    lines = {int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line}
    assert lines == {4, 5, 6, 7}, checked.stdout
