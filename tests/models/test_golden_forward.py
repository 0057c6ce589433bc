"""Checkpoints in their families' own key names and config give the logits their references gave."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dllm_kernels as dk

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "models"
NOISE = 1e-4  # between two float32 implementations
CASES = [
    *((name, "unpadded") for name in ("a2d_llama_tiny", "a2d_qwen3_tiny", "dream_tiny", "llada_tiny")),
    *((name, "right_pad") for name in ("a2d_llama_tiny", "a2d_qwen3_tiny", "dream_tiny", "llada_tiny")),
    *((name, "block_causal") for name in ("a2d_llama_tiny", "a2d_qwen3_tiny")),
    ("dream_tiny", "left_pad_pos"),
    ("llada_tiny", "left_pad"),
]


@functools.cache
def loaded(name):
    model, tokenizer = dk.load(GOLDEN / name, device="cpu")
    assert tokenizer is None
    return model, load_file(GOLDEN / name / "forward.safetensors")


@pytest.mark.parametrize(("name", "case"), CASES, ids=map("-".join, CASES))
def test_logits_are_the_references(name, case):
    """Block-causal: blocks of 8 counted from the left edge, padding unseen."""
    model, data = loaded(name)
    ids = data[f"{case}.input_ids"].long()
    if case == "block_causal":
        dense = data[f"{case}.attention_mask_4d"][:, 0]
        mask, real = dk.SpanMask.from_dense(dense), dense.diagonal(dim1=1, dim2=2)
    else:
        real = data.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
        side = "left" if "left" in case else "right"
        mask = dk.SpanMask.full(ids.shape[1], lengths=real.sum(1), padding_side=side)
    positions = data.get(f"{case}.position_ids")
    with torch.no_grad(), dk.enable_attention(model):
        found = model(
            ids, dllm_mask=mask, position_ids=None if positions is None else positions.long()
        ).logits
    torch.testing.assert_close(found[real], data[f"{case}.logits"][real], atol=NOISE, rtol=0)
