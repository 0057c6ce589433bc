"""Losses recorded from dLLM's trainers (tests/data/golden) with the same noise: value and gradients."""

import functools
import json
from pathlib import Path

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels import SpanMask
from dllm_train import Noise, bd3lm_loss, dream_loss, mdlm_loss

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = sorted(p.stem for p in (GOLDEN / "training").glob("*.json") if p.stem != "bd3lm_attention_masks")
SHIFTED_ACROSS_BLOCKS = "bd3lm_a2d_qwen3_tiny_b4_L12_right_shift_bos"

# LLaDA's names, in the order in which they are replaced
LLADA = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks": "model.layers",
    "q_proj": "self_attn.q_proj",
    "attn_norm": "input_layernorm",
    "ff_out": "mlp.down_proj",
}


@functools.cache
def loaded(name):
    model, _ = dk.load(GOLDEN / "models" / name, device="cpu", dtype=torch.float32)
    return model


def recorded_gradients(record):
    """The norms of recorded gradients by the names of stock models."""
    named = {}
    for name, norms in record["grad_norms"].items():
        if "transformer" in name:
            for theirs, stock in LLADA.items():
                name = name.replace(theirs, stock)
        named[name] = norms
    return named


def recorded(case):
    """(record, model, our LossOutput) with the recorded times and masked positions."""
    record = json.loads((GOLDEN / "training" / f"{case}.json").read_text())
    model = loaded(record["model"])
    settings, ids = record["settings"], torch.tensor(record["input_ids"])
    shape = (ids.shape[0], ids.shape[1] + record["bos_prepended"])
    masked = torch.zeros(shape, dtype=torch.bool)
    for row, positions in enumerate(record["masked_positions"]):
        masked[row, positions] = True
    options = dict(
        mask_id=settings["mask_id"],
        noise=Noise(torch.tensor(record["t"])[:, None].expand(shape), masked),
        loss_weight_type=settings["loss_weight_type"].partition("[")[0],
        loss_norm_type=settings["loss_norm_type"],
        shift=settings["right_shift_logits"],
        bos_id=settings["bos_id"],
        weight_eps=1e-6,
    )
    if any(0 in row for row in record["attention_mask"]):
        options["lengths"] = torch.tensor(record["attention_mask"]).sum(1)
    labels = torch.tensor(record["labels"])
    model.zero_grad()
    if "block_size" in settings:
        return record, model, bd3lm_loss(model, ids, labels, block_size=settings["block_size"], **options)
    if case.startswith("dream"):
        kind, _, p = settings["loss_weight_type"].partition("[geo_p:")
        options["cart_p"] = float(p.rstrip("]")) if kind == "cart" else 0.3
        return record, model, dream_loss(model, ids, labels, **options)
    return record, model, mdlm_loss(model, ids, labels, **options)


@pytest.mark.parametrize("case", [c for c in CASES if c != SHIFTED_ACROSS_BLOCKS])
def test_loss_and_gradients_equal_the_recorded_ones(case):
    record, model, output = recorded(case)
    assert float(output.loss.detach()) == pytest.approx(record["loss"], rel=2e-6)
    output.loss.backward()
    for name, norms in recorded_gradients(record).items():
        gradient = model.get_parameter(name).grad
        assert float(gradient.norm()) == pytest.approx(norms["l2"], rel=2e-5), name
        assert float(gradient.abs().max()) == pytest.approx(norms["max_abs"], rel=1e-4), name


def test_shifted_block_starts_read_the_clean_half():
    """dLLM predicts a block's first token from the noisy end of the block before; sampling from the clean."""
    record, _, output = recorded(SHIFTED_ACROSS_BLOCKS)
    starts = sum(i % 4 == 0 for row in record["masked_positions"] for i in row)
    assert starts > 0
    assert float(output.loss.detach()) != pytest.approx(record["loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["L12_b4", "L10_b4", "L13_b4", "L8_b8", "L6_b1"])
def test_the_block_diffusion_mask_equals_the_recorded_one(name):
    rows = json.loads((GOLDEN / "training" / "bd3lm_attention_masks.json").read_text())["masks"][name]
    length, block_size = (int(part[1:]) for part in name.split("_"))
    dense = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(SpanMask.block_diffusion(length, block_size).to_dense()[0], dense)
