"""A2D checkpoints in their own key names and config give the logits their reference gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dllm_kernels as dk

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "models"
NOISE = 1e-4  # between two float32 implementations


@pytest.fixture(scope="module", params=["a2d_llama_tiny", "a2d_qwen3_tiny"])
def golden(request):
    model, tokenizer = dk.load(GOLDEN / request.param)
    assert tokenizer is None
    return model, load_file(GOLDEN / request.param / "forward.safetensors")


def logits(model, ids, **inputs) -> torch.Tensor:
    with torch.no_grad(), dk.enable_attention(model):
        return model(ids.long(), **inputs).logits


def test_unpadded(golden):
    model, data = golden
    found = logits(model, data["unpadded.input_ids"], dllm_mask=dk.SpanMask.full(24))
    torch.testing.assert_close(found, data["unpadded.logits"], atol=NOISE, rtol=0)


def test_right_padded(golden):
    model, data = golden
    real = data["right_pad.attention_mask"].bool()
    mask = dk.SpanMask.full(24, lengths=real.sum(1))
    found = logits(model, data["right_pad.input_ids"], dllm_mask=mask)
    torch.testing.assert_close(found[real], data["right_pad.logits"][real], atol=NOISE, rtol=0)


def test_block_causal_left_padded(golden):
    """Blocks of 8 counted from the left edge, padding unseen."""
    model, data = golden
    dense = data["block_causal.attention_mask_4d"]
    found = logits(
        model,
        data["block_causal.input_ids"],
        position_ids=data["block_causal.position_ids"].long(),
        dllm_mask=dk.SpanMask.from_dense(dense[:, 0]),
    )
    real = dense[:, 0].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found[real], data["block_causal.logits"][real], atol=NOISE, rtol=0)
