"""Masks of rows without padding are made once: for all layers, and for all steps of a run."""

import pytest
import torch

import dllm_kernels as dk
from dllm_train import attention_masks, bd3lm_loss, mdlm_loss
from tests.train.tiny_models import MASK, tiny

IDS = torch.randint(3, MASK, (2, 12), generator=torch.Generator().manual_seed(0))


def masks_of(model, loss, monkeypatch):
    """The masks that each layer is given in one loss of `model`."""
    seen = []
    from dllm_kernels.models import attention

    def recorded(q, k, v, mask, **options):
        if mask.kv_len > 4:  # what asks a model whether it heeds masks
            seen.append(mask)
        return dk.block_attention(q, k, v, mask, **options)

    monkeypatch.setattr(attention, "block_attention", recorded)
    loss(model)
    return seen


def mdlm(model, **options):
    return mdlm_loss(model, IDS, mask_id=MASK, **options).loss


def bd3lm(model, **options):
    return bd3lm_loss(model, IDS, mask_id=MASK, block_size=4, **options).loss


@pytest.mark.parametrize("loss", [mdlm, bd3lm])
@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("mistral", 1), ("gemma3", 2), ("modernbert", 2)])
def test_layers_and_steps_share_one_mask(name, kinds, loss, monkeypatch):
    model = tiny(name, attention="dllm").train()
    first, second = (masks_of(model, loss, monkeypatch) for _ in range(2))
    assert len(first) == 2
    assert len(set(map(id, first + second))) == kinds
    with torch.inference_mode():
        assert set(map(id, masks_of(model, loss, monkeypatch))) == set(map(id, first))


def test_a_mask_made_for_evaluation_serves_training():
    """Tensors of inference mode cannot be saved for a backward pass."""
    attention_masks._kept_pattern.cache_clear()
    model = tiny("gemma3", attention="dllm").train()
    with torch.inference_mode():
        expected = bd3lm(model)
    loss = bd3lm(model)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_flex_attention_is_given_one_block_mask(name):
    model, length = tiny(name), 12
    model.config._attn_implementation_internal = "flex_attention"
    made = [
        attention_masks.base_arguments(model, IDS, kind="block_causal", block_size=4)["attention_mask"]
        for _ in range(2)
    ]
    if name == "gemma3":
        assert made[0].keys() == made[1].keys() == {"sliding_attention", "full_attention"}
        made = [list(masks.values()) for masks in made]
        assert all(first is second for first, second in zip(*made, strict=True))
    else:
        assert made[0] is made[1]
        assert made[0].seq_lengths == (length, length)


def test_other_options_make_other_masks():
    options = [
        dict(kind="full"),
        dict(kind="causal"),
        dict(kind="causal", reach=2),
        dict(kind="block_causal", block_size=4),
        dict(kind="block_causal", block_size=3),
        dict(kind="block_diffusion", block_size=3),
        dict(kind="block_diffusion", block_size=3, clean="causal"),
        dict(kind="full", lengths=torch.tensor([9, 12])),
        dict(kind="full", document_lengths=torch.tensor([[4, 8], [12, 0]])),
    ]
    model = tiny("llama", attention="dllm")
    masks = [
        attention_masks.base_arguments(model, IDS, **pattern)["dllm_mask"].to_dense() for pattern in options
    ]
    for i, mask in enumerate(masks):
        assert not any(mask.shape == other.shape and torch.equal(mask, other) for other in masks[:i])
