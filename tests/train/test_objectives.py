"""mdlm_loss and bd3lm_loss against their formulas written out: dense masks, float64, one term at a time."""

import math
from functools import partial

import pytest
import torch

from dllm_train import Noise, bd3lm_loss, mdlm_loss, sample_noise
from tests.train.tiny_models import tiny

MASK, BOS = 39, 38


def log_probability(model, ids, visible, positions, row, position, target):
    """log p(target | output at `position`), from one full forward of one row."""
    logits = model(
        input_ids=ids[row : row + 1],
        attention_mask=visible[None, None],
        position_ids=positions[None],
        use_cache=False,
    ).logits[0, position]
    return float(logits[target] - torch.logsumexp(logits, dim=0))


def expected_loss(model, ids, labels, noise, *, block_size, schedule, weighting, norm, shift, lengths):
    """Σ w(t) CE with explicit loops; the two kinds differ in what a position sees and where its output is."""
    batch, length = ids.shape
    total = 0.0
    maskable_total = sum(int(labels[r, i]) != -100 for r in range(batch) for i in range(length))
    for r in range(batch):
        row_total, row_maskable = 0.0, 0
        size = length if block_size is None else 2 * length
        visible = torch.zeros(size, size, dtype=torch.bool)
        for q in range(size):
            for k in range(size):
                if q % length >= lengths[r] or k % length >= lengths[r]:
                    visible[q, k] = q == k
                elif block_size is None:
                    visible[q, k] = True
                else:
                    block_q, block_k = q % length // block_size, k % length // block_size
                    noisy_q, noisy_k = q < length, k < length
                    visible[q, k] = (
                        (noisy_q and noisy_k and block_q == block_k)
                        or (noisy_q and not noisy_k and block_k < block_q)
                        or (not noisy_q and not noisy_k and block_k <= block_q)
                    )
        noised = ids.clone()
        for i in range(length):
            if noise.masked[r, i] and int(labels[r, i]) != -100:
                noised[r, i] = MASK
        inputs = noised if block_size is None else torch.cat([noised, ids], dim=1)
        positions = torch.arange(length).repeat(1 if block_size is None else 2)
        for i in range(length):
            if int(labels[r, i]) == -100:
                continue
            row_maskable += 1
            if not noise.masked[r, i]:
                continue
            source = i
            if shift:
                source = i - 1 if block_size is None or i % block_size else length + i - 1
            t = float(noise.t[r, i])
            if weighting == "uniform":
                weight = 1.0
            elif schedule == "linear":
                weight = 1 / t
            else:
                weight = math.pi / 2 * math.sin(math.pi / 2 * (1 - t)) / math.cos(math.pi / 2 * (1 - t))
            row_total -= weight * log_probability(
                model, inputs, visible, positions, r, source, int(labels[r, i])
            )
        if norm == "sequence":
            total += row_total / max(row_maskable, 1) / batch
        elif norm == "batch":
            total += row_total / batch
        else:
            total += row_total / maskable_total
    return total


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(
    ("schedule", "weighting", "norm", "shift"),
    [
        ("linear", "scheduler", "token", False),
        ("cosine", "scheduler", "sequence", False),
        ("linear", "uniform", "batch", False),
        ("linear", "scheduler", "token", True),
        ("cosine", "uniform", "sequence", True),
    ],
)
def test_loss_equals_the_formula(tiny_model, block_size, schedule, weighting, norm, shift):
    ids = torch.randint(0, 38, (3, 10))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[:, 0] = -100
    labels[2, 5] = -100
    lengths = torch.tensor([10, 7, 9])
    for r, n in enumerate(lengths):
        labels[r, n:] = -100
    noise = sample_noise(labels, [4, 9, 2], seed=3, schedule=schedule, eps=0.1, block_size=block_size)
    assert noise.masked.sum() > 4
    loss = mdlm_loss if block_size is None else bd3lm_loss
    output = loss(
        tiny_model,
        ids,
        labels,
        mask_id=MASK,
        noise=noise,
        lengths=lengths,
        schedule=schedule,
        loss_weight_type=weighting,
        loss_norm_type=norm,
        shift=shift,
        **({} if block_size is None else {"block_size": block_size}),
    )
    with torch.no_grad():
        expected = expected_loss(
            tiny_model,
            ids,
            labels,
            noise,
            block_size=block_size,
            schedule=schedule,
            weighting=weighting,
            norm=norm,
            shift=shift,
            lengths=lengths.tolist(),
        )
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("block_size", [None, 3])
def test_shift_puts_bos_before_rows_whose_first_token_has_a_label(tiny_model, block_size):
    ids = torch.randint(0, 38, (2, 7))
    longer = torch.cat([torch.full((2, 1), BOS), ids], dim=1)
    labels = longer.clone()
    labels[:, 0] = -100
    noise = sample_noise(labels, [0, 1], eps=0.3)
    loss = mdlm_loss if block_size is None else bd3lm_loss
    options = {"mask_id": MASK, "noise": noise, "shift": True}
    if block_size is not None:
        options["block_size"] = block_size
    prepended = loss(tiny_model, ids, bos_id=BOS, **options)
    explicit = loss(tiny_model, longer, labels, **options)
    assert torch.equal(prepended.loss, explicit.loss)
    with pytest.raises(ValueError, match="bos_id"):
        loss(tiny_model, ids, **options)


@pytest.mark.parametrize("loss", [mdlm_loss, bd3lm_loss])
def test_padding_changes_nothing(tiny_model, loss):
    options = {"mask_id": MASK} | ({"block_size": 4} if loss is bd3lm_loss else {})
    ids = torch.randint(0, 38, (2, 8))
    noise = sample_noise(ids, [0, 1], eps=0.3)
    padded = torch.cat([ids, torch.randint(0, 38, (2, 5))], dim=1)
    longer = Noise(*(torch.cat([x, x[:, :5]], dim=1) for x in (noise.t, noise.masked)))
    short = loss(tiny_model, ids, noise=noise, **options)
    long = loss(tiny_model, padded, noise=longer, lengths=torch.tensor([8, 8]), **options)
    torch.testing.assert_close(short.loss, long.loss, rtol=1e-12, atol=0)
    assert short.tokens == long.tokens == 16


@pytest.mark.parametrize("loss", [mdlm_loss, bd3lm_loss])
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_parts_of_a_batch_add_up_with_the_global_normalizer(tiny_model, loss, norm):
    options = {"mask_id": MASK, "loss_norm_type": norm} | ({"block_size": 4} if loss is bd3lm_loss else {})
    ids = torch.randint(0, 38, (4, 9))
    labels = ids.clone()
    labels[1, :6] = -100
    whole = loss(tiny_model, ids, labels, example_ids=range(4), **options).loss
    total = int((labels != -100).sum()) if norm == "token" else 4
    parts = [
        loss(tiny_model, ids[s], labels[s], example_ids=range(4)[s], normalizer=total, **options).loss
        for s in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=0)


def test_bound_of_a_uniform_model_is_the_log_of_the_vocabulary(tiny_model):
    """E[1/t Σ_masked CE] = L log V for constant CE: the weights make the estimate unbiased."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.zero_()
        ids = torch.randint(0, 38, (2000, 16))
        output = bd3lm_loss(tiny_model, ids, mask_id=MASK, block_size=8, eps=1e-3)
    assert output.nll == pytest.approx(math.log(40), rel=0.03)


def test_a_barred_mask_token_leaves_the_softmax(tiny_model):
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.zero_()
        output = mdlm_loss(tiny_model, torch.randint(0, 38, (4, 16)), mask_id=MASK, bar_mask_token=True)
    assert float(output.ce_sum) / output.masked == pytest.approx(math.log(39))


def test_gradients_reach_every_parameter(tiny_model):
    bd3lm_loss(tiny_model, torch.randint(0, 38, (4, 16)), mask_id=MASK, block_size=4).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tiny_model.parameters())


def test_a_batch_without_masks_has_loss_zero(tiny_model):
    ids = torch.randint(0, 38, (2, 6))
    noise = Noise(torch.full((2, 6), 0.5), torch.zeros(2, 6, dtype=torch.bool))
    output = mdlm_loss(tiny_model, ids, mask_id=MASK, noise=noise)
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss_weight_type", {"loss_weight_type": "cart"}),
        ("loss_norm_type", {"loss_norm_type": "mean"}),
        ("schedule", {"schedule": "quadratic"}),
        ("labels", {"labels": torch.zeros(2, 5, dtype=torch.int64)}),
        ("noise", {"noise": Noise(torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool))}),
        ("block_size", {"block_size": 0}),
        ("time_per", {"time_per": "token"}),
        ("block_size", {"block_size": 2.0}),
        ("block_size", {"block_size": None}),
        ("block_size is 7, and rows have 6 tokens", {"block_size": 7}),
        ("mask_id", {"mask_id": 40}),
        ("mask_id", {"mask_id": -1}),
        ("mask_id", {"mask_id": 3.5}),
        ("bos_id", {"bos_id": 40, "shift": True}),
        ("bos_id", {"bos_id": -1, "shift": True}),
        ("labels", {"labels": torch.zeros(2, 6)}),
        ("lengths", {"lengths": [6, 6]}),
        ("lengths", {"lengths": torch.tensor([6.0, 6.0])}),
        ("lengths", {"lengths": torch.tensor([7, 6])}),
        ("noise", {"noise": (torch.ones(2, 6), torch.ones(2, 6))}),
        ("noise.masked", {"noise": Noise(torch.ones(2, 6), torch.ones(2, 6))}),
        ("normalizer", {"normalizer": float("nan")}),
        ("weight_eps", {"weight_eps": -1.0}),
    ],
)
def test_bad_arguments_are_named(tiny_model, name, options):
    with pytest.raises((TypeError, ValueError), match=name):
        bd3lm_loss(
            tiny_model, torch.zeros(2, 6, dtype=torch.int64), **(dict(block_size=2, mask_id=MASK) | options)
        )


@pytest.mark.parametrize("ids", [torch.zeros(2, 0), torch.zeros(0, 6), torch.full((2, 6), 40)])
def test_bad_ids_are_named(tiny_model, ids):
    with pytest.raises(ValueError, match="input_ids"):
        mdlm_loss(tiny_model, ids.long(), mask_id=MASK)
    with pytest.raises(TypeError, match=r"input_ids .*int32.*int64"):
        mdlm_loss(tiny_model, ids.int(), mask_id=MASK)


@pytest.mark.parametrize(
    ("name", "positions"), [("gpt2", 80), ("opt", 80), ("bert", 80), ("roberta", 79), ("llama", None)]
)
@pytest.mark.parametrize("loss", [mdlm_loss, partial(bd3lm_loss, block_size=4)])
def test_rows_beyond_the_learned_positions_are_refused(name, positions, loss):
    """RoBERTa counts from padding token + 1; rotary models have any number."""
    model, ids = tiny(name), torch.full((1, (positions or 80) + 1), 5)
    assert loss(model, ids[:, 1:], mask_id=MASK).loss.isfinite()
    if positions is None:
        assert loss(model, ids, mask_id=MASK).loss.isfinite()
    else:
        with pytest.raises(ValueError, match=f"{positions + 1} tokens.* has {positions} positions"):
            loss(model, ids, mask_id=MASK)


def test_one_block_of_a_whole_row_is_full_attention(tiny_model):
    ids = torch.randint(0, 39, (2, 6))
    noise = Noise(torch.full((2, 6), 0.5), torch.rand(2, 6) < 0.6)
    found = bd3lm_loss(tiny_model, ids, mask_id=MASK, noise=noise, block_size=6).loss
    torch.testing.assert_close(found, mdlm_loss(tiny_model, ids, mask_id=MASK, noise=noise).loss)
