"""Losses and gradients of all options combined, against the objectives written out (dense_objectives.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_train import Noise, bd3lm_loss, dream_loss, loss_normalizer, mdlm_loss
from tests.train.dense_objectives import dense_loss
from tests.train.tiny_models import MASK, tiny

BOS = 1
LOSSES = {"mdlm": mdlm_loss, "bd3lm": bd3lm_loss, "dream": dream_loss}
MODEL = tiny("llama", pad_token_id=None, num_hidden_layers=1, gain=2.0).double()


@st.composite
def cases(draw):
    """(objective, ids, labels, noise, options) of a small batch."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(4, 8))
    objective = draw(st.sampled_from(sorted(LOSSES)))
    ids = torch.randint(2, MASK, (rows, length), generator=seed)
    labels = ids.masked_fill(torch.rand(rows, length, generator=seed) < 0.2, -100)
    options = {
        "mask_id": MASK,
        "schedule": draw(st.sampled_from(["linear", "cosine"])),
        "loss_weight_type": draw(
            st.sampled_from(["scheduler", "uniform"] + ["cart"] * (objective == "dream"))
        ),
        "loss_norm_type": draw(st.sampled_from(["token", "sequence", "batch"])),
        "shift": draw(st.booleans()),
        "bos_id": BOS,
        "bar_mask_token": draw(st.booleans()),
        "complementary": draw(st.booleans()),
        "certainty_weight": draw(st.sampled_from([0.0, 0.5])),
        "certainty_temperature": draw(st.sampled_from([0.5, 1.0])),
    }
    rows_are = draw(st.sampled_from(["full", "padded", "packed"]))
    if rows_are == "padded":
        options["lengths"] = torch.randint(1, length + 1, (rows,), generator=seed)
    if rows_are == "packed":
        cut = torch.randint(1, length // 2 + 1, (rows, 2), generator=seed)
        options["document_lengths"] = torch.cat([cut[:, :1], torch.zeros_like(cut[:, :1]), cut[:, 1:]], dim=1)
    if objective == "bd3lm":
        options["block_size"] = draw(st.integers(1, 4))
        options["clean"] = draw(st.sampled_from(["block_causal", "causal"]))
        if options["clean"] == "causal":
            options["ar_weight"] = draw(st.sampled_from([0.0, 0.3]))
    else:
        options["reach"] = draw(st.sampled_from([None, 0, 2, 100]))
    if objective == "dream":
        options["cart_p"] = draw(st.sampled_from([0.1, 0.3, 1.0]))
    if not options.get("ar_weight"):
        options["normalizer"] = draw(st.sampled_from([None, 12, 7.5]))
    columns = length
    if options["shift"] and rows_are != "packed":
        inside = labels[:, 0] != -100
        columns += bool(inside.any())
    noise = Noise(
        (0.1 + 0.8 * torch.rand(rows, columns, generator=seed)),
        torch.rand(rows, columns, generator=seed) < 0.6,
    )
    return objective, ids, labels, noise, options


def gradients_of(loss):
    parameters = [p for p in MODEL.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@given(cases())
@settings(max_examples=80, deadline=None)
def test_loss_sums_and_gradients_equal_the_written_out_ones(case):
    objective, ids, labels, noise, options = case
    output = LOSSES[objective](MODEL, ids, labels, noise=noise, **options)
    loss, sums = dense_loss(MODEL, ids, labels, noise, objective=objective, **options)
    torch.testing.assert_close(output.loss, loss, rtol=2e-6, atol=1e-8)
    assert (output.tokens, output.masked) == (sums["tokens"], sums["masked"])
    assert float(output.ce_sum) == pytest.approx(sums["ce_sum"], rel=1e-9)
    assert float(output.nll_sum) == pytest.approx(sums["nll_sum"], rel=2e-6)
    if output.loss.requires_grad:
        for ours, theirs in zip(gradients_of(output.loss), gradients_of(loss), strict=True):
            ours = torch.zeros_like(theirs) if ours is None else ours
            largest = float(theirs.abs().max())  # entries in which terms cancel keep the rounding of these
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7 + 1e-5 * largest)


@given(cases())
@settings(max_examples=25, deadline=None)
def test_the_normalizer_is_what_the_loss_divides_by(case):
    """Loss of a batch alone = loss with the count that loss_normalizer gives for it."""
    objective, ids, labels, noise, options = case
    options = options | {"normalizer": None}
    kinds = {name: options[name] for name in ("shift", "lengths", "document_lengths") if name in options}
    count = loss_normalizer(labels, options["loss_norm_type"], **kinds)
    alone = LOSSES[objective](MODEL, ids, labels, noise=noise, **options).loss
    options["normalizer"] = torch.tensor(count)
    if options.get("ar_weight"):
        options["ar_normalizer"] = torch.tensor(
            loss_normalizer(labels, "next_token", **kinds), dtype=torch.float64
        )
    assert torch.allclose(
        alone, LOSSES[objective](MODEL, ids, labels, noise=noise, **options).loss, rtol=1e-6
    )
