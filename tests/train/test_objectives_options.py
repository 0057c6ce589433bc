"""Single options of the losses: what is drawn, weighed, counted and refused."""

import math

import pytest
import torch

from dllm_train import Noise, Schedule, bd3lm_loss, dream_loss, loss_normalizer, mdlm_loss, sample_noise
from dllm_train.documents import places
from dllm_train.loss_weights import cart_weights
from tests.train.tiny_models import MASK, tiny

IDS = torch.randint(3, MASK, (3, 12), generator=torch.Generator().manual_seed(0))
BOS = 1


# ---- noise ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("block_size", [None, 4])
def test_padding_changes_no_noise(block_size, stratified):
    options = dict(block_size=block_size, stratified=stratified, seed=2)
    short = sample_noise(torch.zeros(2, 9, dtype=torch.int64), torch.tensor([5, 6]), **options)
    long = sample_noise(torch.zeros(2, 31, dtype=torch.int64), [5, 6], **options)
    assert torch.equal(short.t, long.t[:, :9])
    assert torch.equal(short.masked, long.masked[:, :9])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_complement_is_the_time_of_the_inverted_mask(name):
    schedule, t = Schedule(name), torch.linspace(0.01, 0.95, 50, dtype=torch.float64)
    torch.testing.assert_close(1 - schedule.alpha(schedule.complement(t)), schedule.alpha(t))
    torch.testing.assert_close(schedule.complement(schedule.complement(t)), t)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_both_times_of_complementary_masks_are_at_least_eps(name):
    labels = torch.zeros(3000, 1, dtype=torch.int64)
    noise = sample_noise(labels, range(3000), eps=0.01, schedule=name, complementary=True)
    other = Schedule(name).complement(noise.t)
    assert 0.01 <= float(noise.t.min()) < 0.012
    assert 0.0099 <= float(other.min()) < 0.015


def test_blocks_of_an_example_have_evenly_spread_times():
    t = sample_noise(torch.zeros(1, 200, dtype=torch.int64), [41], block_size=2).t[0, ::2].sort().values
    assert float(torch.diff(t).max()) < 3 / 100


def test_stratified_is_passed_on():
    model = tiny("llama")
    drawn = [mdlm_loss(model, IDS, mask_id=MASK, stratified=s).loss for s in (True, False)]
    labels = IDS.clone()
    noise = [sample_noise(labels, range(3), stratified=s) for s in (True, False)]
    for loss, given in zip(drawn, noise, strict=True):
        assert torch.equal(loss, mdlm_loss(model, IDS, mask_id=MASK, noise=given).loss)
    assert not torch.equal(*drawn)


# ---- weights and counts ---------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [0.05, 0.3, 1.0])
def test_cart_weights_are_the_published_sum(p):
    documents = torch.tensor([[13, 1, 7], [20, 0, 0]])
    where = places(22, documents)
    visible = (torch.arange(44).view(2, 22) * 7 % 5 < 2) & where.inside
    found = cart_weights(visible, where, p)
    for r in range(2):
        for i in range(22):
            same = [j for j in range(22) if where.document[r, j] == where.document[r, i] and j != i]
            expected = sum(0.5 * p * (1 - p) ** (abs(i - j) - 1) for j in same if visible[r, j])
            assert float(found[r, i]) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_positions_without_context_count_in_the_sums(p):
    """Where all is masked CART weighs nothing, and NLL and cross entropy are still those of all positions."""
    noise = Noise(torch.full(IDS.shape, 0.5), torch.ones_like(IDS, dtype=torch.bool))
    options = dict(mask_id=MASK, noise=noise, shift=False)
    weighted = dream_loss(tiny("llama"), IDS, cart_p=p, **options)
    plain = mdlm_loss(tiny("llama"), IDS, **options)
    assert float(weighted.loss.detach()) == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close((weighted.ce_sum, weighted.nll_sum), (plain.ce_sum, plain.nll_sum))


def test_rows_with_and_without_bos_share_a_batch():
    """Whether a row gets BOS depends on its own first label: its loss is that of a batch of its own."""
    labels = IDS.clone()
    labels[1, :3] = -100
    model = tiny("llama", pad_token_id=None)
    for loss, options in ((mdlm_loss, {"shift": True}), (bd3lm_loss, {"shift": True, "block_size": 4})):
        options = options | dict(mask_id=MASK, bos_id=BOS, seed=4, eps=0.3)
        whole = loss(model, IDS, labels, example_ids=torch.arange(3), **options)
        parts = [
            loss(
                model, IDS[r : r + 1], labels[r : r + 1], example_ids=[r], normalizer=whole.tokens, **options
            )
            for r in range(3)
        ]
        torch.testing.assert_close(whole.loss, sum(part.loss for part in parts))
        assert whole.masked == sum(part.masked for part in parts)


def test_complementary_masks_cover_every_label_once():
    labels = IDS.clone()
    labels[0, 2:5] = -100
    output = mdlm_loss(
        tiny("llama"), IDS, labels, mask_id=MASK, complementary=True, loss_weight_type="uniform"
    )
    assert output.masked == loss_normalizer(labels) == 33
    assert output.tokens == 66
    torch.testing.assert_close(output.loss, output.ce_sum / 66)


def test_a_normalizer_may_be_a_tensor():
    found = mdlm_loss(tiny("llama"), IDS, mask_id=MASK, normalizer=torch.tensor(36.0)).loss
    torch.testing.assert_close(found, mdlm_loss(tiny("llama"), IDS, mask_id=MASK, normalizer=36).loss)


@pytest.mark.parametrize(
    ("name", "normalizer"), [("token", None), ("token", 0), ("token", torch.tensor(0)), ("sequence", None)]
)
def test_a_batch_without_labels_has_loss_zero(name, normalizer):
    labels = torch.full_like(IDS, -100)
    options = dict(mask_id=MASK, loss_norm_type=name, normalizer=normalizer, certainty_weight=1.0)
    output = mdlm_loss(tiny("llama"), IDS, labels, **options)
    assert float(output.loss.detach()) == 0.0
    output.loss.backward()


def test_certainty_counts_right_positions_alone():
    """A model that is always right, and one that never is."""
    model = tiny("llama", pad_token_id=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ids = torch.zeros_like(IDS)  # the argmax of equal logits is token 0
    noise = Noise(torch.full(IDS.shape, 0.5), torch.ones_like(IDS, dtype=torch.bool))
    options = dict(mask_id=MASK, noise=noise, certainty_weight=2.0, certainty_temperature=0.5)
    right = mdlm_loss(model, ids, **options)
    assert int(right.right) == 36
    assert float(right.entropy_sum) == pytest.approx(36 * math.log(48))
    assert float(right.loss.detach()) == pytest.approx((2 + 2) * math.log(48))
    wrong = mdlm_loss(model, ids + 1, **options)
    assert (int(wrong.right), float(wrong.entropy_sum)) == (0, 0.0)
    assert float(wrong.loss.detach()) == pytest.approx(2 * math.log(48))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "granite"])
def test_forced_losses_never_make_all_logits(name, monkeypatch):
    """Chunks of rows give the loss and gradients of all at once, under any head."""
    from dllm_train import vocabulary_head

    results, most = [], []
    own = vocabulary_head.own_logits
    monkeypatch.setattr(vocabulary_head, "own_logits", lambda *a: most.append(len(a[2])) or own(*a))
    for rows in (512, 5):
        most.clear()
        monkeypatch.setattr(vocabulary_head, "ROWS_AT_ONCE", rows)
        model = tiny(name, attention="eager")
        output = mdlm_loss(model, IDS, mask_id=MASK, seed=3, certainty_weight=1.0, eps=0.5)
        output.loss.backward()
        assert output.masked > 15
        assert max(most) == min(rows, output.masked)
        results.append((output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("loss", [mdlm_loss, dream_loss])
def test_a_reach_of_the_whole_row_is_full_attention(loss):
    model = tiny("llama", attention="dllm")
    options = dict(mask_id=MASK, bos_id=BOS)
    full = loss(model, IDS, **options).loss
    torch.testing.assert_close(loss(model, IDS, reach=11 + (loss is dream_loss), **options).loss, full)
    assert not torch.equal(loss(model, IDS, reach=0, **options).loss, full)


# ---- precision ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "dllm"])
@pytest.mark.parametrize("certainty_weight", [0.0, 0.5])
def test_autocast_is_close_to_float32(attention, certainty_weight):
    model = tiny("qwen3", attention=attention, gain=1.5).train()
    options = dict(mask_id=MASK, block_size=4, seed=1, certainty_weight=certainty_weight)
    exact = bd3lm_loss(model, IDS, **options)
    with torch.autocast("cpu", torch.bfloat16):
        output = bd3lm_loss(model, IDS, **options)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert float(output.ce_sum) == pytest.approx(float(exact.ce_sum), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- refusals -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "text", "options"),
    [
        (mdlm_loss, r"labels\[1, 4\] is 9, where input_ids has \d+; expected", {"labels": "changed"}),
        (mdlm_loss, "reach must lie in 0", {"reach": -1}),
        (mdlm_loss, "reach must be an integer", {"reach": 1.5}),
        (mdlm_loss, "loss_weight_type is 'cart'; allowed: 'scheduler'", {"loss_weight_type": "cart"}),
        (mdlm_loss, "certainty_weight is -1", {"certainty_weight": -1}),
        (mdlm_loss, "certainty_temperature is 0", {"certainty_temperature": 0}),
        (mdlm_loss, "normalizer is a torch.float32 Tensor", {"normalizer": torch.ones(2)}),
        (mdlm_loss, "eps is 0.6; complementary masks have times of", {"eps": 0.6, "complementary": True}),
        (dream_loss, "cart_p is 0", {"cart_p": 0}),
        (dream_loss, "bos_id is None", {}),
        (bd3lm_loss, "clean is 'full'", {"block_size": 4, "clean": "full"}),
        (bd3lm_loss, "ar_weight is 0.2, and clean is 'block_causal'", {"block_size": 4, "ar_weight": 0.2}),
        (
            bd3lm_loss, "ar_normalizer is None, and normalizer is given",
            {"block_size": 4, "ar_weight": 0.2, "clean": "causal", "normalizer": 7},
        ),
        (bd3lm_loss, "block_size is 13, and rows have 12 tokens", {"block_size": 13}),
    ],
)  # fmt: skip
def test_bad_options_are_named(loss, text, options):
    if "labels" in options:
        options["labels"] = IDS.clone()
        options["labels"][1, 4] = 9
        assert IDS[1, 4] != 9
    with pytest.raises((TypeError, ValueError), match=text):
        loss(tiny("llama"), IDS, mask_id=MASK, **options)


@pytest.mark.parametrize("name", ["mean", "rows"])
def test_unknown_norms_are_named(name):
    with pytest.raises(ValueError, match=f"loss_norm_type is '{name}'"):
        loss_normalizer(IDS, name)
