import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.ops.reference import unmask as reference

MASK = 99
RULES = [
    dk.Rule.quota(),
    dk.Rule.quota(confidence="margin"),
    dk.Rule.quota(confidence="entropy"),
    dk.Rule.quota(confidence="random"),
    dk.Rule.quota(alg_temp=0.5),
    dk.Rule.threshold(0.5),
    dk.Rule.threshold(0.5, strict=True),
    dk.Rule.threshold(-1.0, confidence="entropy"),
    dk.Rule.factor(1.0),
    dk.Rule.factor(1.5, strict=True),
    dk.Rule.quota_or_threshold(0.75),
    dk.Rule.entropy_bound(1.25),
]


def stats_of(prob, token=None, margin=None, entropy=None, dtype=torch.float32) -> dk.TokenStats:
    prob = torch.as_tensor(prob, dtype=dtype)
    token = torch.zeros(prob.shape, dtype=torch.int64) if token is None else torch.as_tensor(token)
    margin = prob if margin is None else torch.as_tensor(margin, dtype=dtype)
    entropy = 1 - prob if entropy is None else torch.as_tensor(entropy, dtype=dtype)
    return dk.TokenStats(token, prob, margin, entropy, prob)


def accepted_of(prob, rule, quota=None, **options) -> list[int]:
    """Indices that a row of masked candidates with these confidences commits."""
    canvas = torch.full((1, len(prob)), MASK)
    positions = torch.arange(len(prob), dtype=torch.int32)[None]
    accepted = dk.commit_(canvas, positions, stats_of([prob]), rule, mask_id=MASK, quota=quota, **options)
    assert torch.equal(accepted, canvas != MASK)
    return accepted[0].nonzero().flatten().tolist()


# ---- the rules, by their definitions -------------------------------------------------------------


def test_quota_takes_the_surest_and_ties_go_to_the_lower_position():
    assert accepted_of([0.1, 0.5, 0.3, 0.5], dk.Rule.quota(), quota=1) == [1]
    assert accepted_of([0.1, 0.5, 0.3, 0.5], dk.Rule.quota(), quota=3) == [1, 2, 3]
    assert accepted_of([0.1, 0.5], dk.Rule.quota(), quota=9) == [0, 1]
    assert accepted_of([0.1, 0.5], dk.Rule.quota(), quota=0) == []


def test_threshold_takes_all_that_reach_it_and_at_least_the_best():
    assert accepted_of([0.9, 0.5, 0.95], dk.Rule.threshold(0.9)) == [0, 2]
    assert accepted_of([0.5, 0.25, 0.75], dk.Rule.threshold(0.5)) == [0, 2]
    assert accepted_of([0.5, 0.25, 0.75], dk.Rule.threshold(0.5, strict=True)) == [2]
    assert accepted_of([0.1, 0.2, 0.2], dk.Rule.threshold(0.9)) == [1]


def test_factor_stops_at_the_first_failure():
    # bounds of ranks 2, 3, 4 with factor 1: 1 − 1/3, 1 − 1/4, 1 − 1/5
    assert accepted_of([0.1, 0.7, 0.74, 0.9], dk.Rule.factor(1.0)) == [2, 3]
    assert accepted_of([0.78, 0.79, 0.81, 0.9], dk.Rule.factor(1.0)) == [1, 2, 3]
    assert accepted_of([0.1, 0.2], dk.Rule.factor(1.0)) == [1]


def test_quota_or_threshold_takes_the_larger_set():
    rule = dk.Rule.quota_or_threshold(0.5)
    assert accepted_of([0.9, 0.8, 0.7, 0.1], rule, quota=2) == [0, 1, 2]
    assert accepted_of([0.9, 0.5, 0.4, 0.1], rule, quota=2) == [0, 1]


def test_entropy_bound_adds_up_the_entropies_before():
    # entropies 1 − prob: 0.25, 0.5, 0.75
    assert accepted_of([0.25, 0.75, 0.5], dk.Rule.entropy_bound(0.25)) == [1, 2]
    assert accepted_of([0.25, 0.75, 0.5], dk.Rule.entropy_bound(0.2)) == [1]
    assert accepted_of([0.25, 0.75, 0.5], dk.Rule.entropy_bound(0.75)) == [0, 1, 2]


def test_comparisons_are_made_in_the_type_of_the_statistics():
    """float32(0.9) < 0.9, and reaches a threshold of 0.9 as it does in torch."""
    assert accepted_of([0.9, 0.95], dk.Rule.threshold(0.9)) == [0, 1]
    assert accepted_of([0.9, 0.95], dk.Rule.threshold(0.9, strict=True)) == [1]


def test_random_confidence_and_alg_temp_draw_from_seed_step_sequence_and_position():
    for rule in (dk.Rule.quota(confidence="random"), dk.Rule.quota(alg_temp=100.0)):
        prob = [0.5] * 64
        base = accepted_of(prob, rule, quota=8)
        assert base == accepted_of(prob, rule, quota=8)
        others = [{"seed": 1}, {"step": 1}, {"sequence_ids": torch.ones(1, dtype=torch.int32)}]
        assert all(accepted_of(prob, rule, quota=8, **other) != base for other in others)


def test_alg_temp_draws_without_replacement_from_the_softmax():
    """First draws over 4,000 steps against softmax(conf / alg_temp): chi-square with a fixed seed."""
    prob, n = torch.tensor([0.1, 0.2, 0.4, 0.8]), 4000
    canvas = torch.full((n, 4), MASK)
    positions = torch.arange(4, dtype=torch.int32).repeat(n, 1)
    accepted = dk.commit_(
        canvas, positions, stats_of(prob.repeat(n, 1)), dk.Rule.quota(alg_temp=0.4), mask_id=MASK, quota=1
    )
    expected = (prob / 0.4).softmax(0) * n
    assert float(((accepted.sum(0) - expected) ** 2 / expected).sum()) < 16.3  # 99.9%, 3 degrees


# ---- agreement with the reference ----------------------------------------------------------------


@given(
    batch=st.integers(0, 4),
    candidates=st.integers(0, 40),
    rule=st.sampled_from([rule for rule in RULES if not rule.alg_temp]),
    ids=st.sampled_from([torch.int64, torch.int32]),
    reals=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
    levels=st.sampled_from([2, 8, 1024]),
)
def test_agrees_with_the_reference(batch, candidates, rule, ids, reals, seed, levels):
    """Confidences are fractions of a power of two: ties abound and every sum is exact."""
    assert_agrees(batch, candidates, rule, ids, reals, seed, levels)


@pytest.mark.parametrize("seed", range(20))
def test_draws_agree_with_the_reference(seed):
    assert_agrees(3, 30, dk.Rule.quota(alg_temp=0.5), torch.int64, torch.float32, seed, 8)


def assert_agrees(batch, candidates, rule, ids, reals, seed, levels):
    g = torch.Generator().manual_seed(seed)
    length = candidates + 5
    canvas = torch.randint(0, 3, (batch, length), generator=g)
    canvas[torch.rand(batch, length, generator=g) < 0.7] = MASK
    positions = torch.stack(
        [torch.randperm(length, generator=g)[:candidates] for _ in range(batch)]
        or [torch.zeros(candidates, dtype=torch.int64)]
    )[:batch].int()
    positions[torch.rand(batch, candidates, generator=g) < 0.1] = -1
    token = torch.randint(0, 7, (batch, candidates), generator=g)
    token[token == 6] = MASK
    real = lambda: torch.randint(0, levels + 1, (batch, candidates), generator=g).to(reals) / levels  # noqa: E731
    stats = dk.TokenStats(token, real(), real(), real(), real())
    per_row = torch.randint(0, 6, (3, batch), generator=g, dtype=torch.int32)
    quota = per_row[0] if rule.needs_quota else None
    progress = torch.full((batch, 2), -7, dtype=torch.int32)

    expected, expected_accepted, expected_progress = reference.commit(
        canvas.tolist(),
        positions.tolist(),
        stats,
        rule,
        mask_id=MASK,
        quota=per_row[0].tolist(),
        step=per_row[1].tolist(),
        sequence_ids=per_row[2].tolist(),
        seed=seed,
    )
    filled = canvas.to(ids)
    accepted = dk.commit_(
        filled,
        positions,
        stats,
        rule,
        mask_id=MASK,
        quota=quota,
        step=per_row[1],
        sequence_ids=per_row[2],
        seed=seed,
        progress=progress,
    )
    assert filled.tolist() == expected
    assert accepted.tolist() == expected_accepted
    assert progress.tolist() == expected_progress


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan, -math.inf, math.inf])
def test_every_rule_finishes(rule, confidence):
    canvas = torch.full((2, 12), MASK)
    positions = torch.arange(12, dtype=torch.int32).repeat(2, 1)
    stats = stats_of(torch.full((2, 12), confidence))
    for _ in range(12):
        dk.commit_(canvas, positions, stats, rule, mask_id=MASK, quota=1 if rule.needs_quota else None)
    assert bool((canvas == 0).all())


def test_the_mask_token_is_never_accepted():
    canvas = torch.full((1, 3), MASK)
    stats = stats_of([[0.9, 0.8, 0.7]], token=[[MASK, 4, MASK]])
    positions = torch.arange(3, dtype=torch.int32)[None]
    assert dk.commit_(canvas, positions, stats, dk.Rule.quota(), mask_id=MASK, quota=3).tolist() == [
        [False, True, False]
    ]


def test_other_positions_stay_as_they_are():
    canvas = torch.tensor([[1, MASK, 2, MASK, MASK]])
    stats = stats_of([[0.9, 0.9, 0.9]], token=[[5, 6, 7]])
    dk.commit_(
        canvas, torch.tensor([[0, 3, -1]], dtype=torch.int32), stats, dk.Rule.threshold(0.0), mask_id=MASK
    )
    assert canvas.tolist() == [[1, MASK, 2, 6, MASK]]


def test_rows_of_a_larger_canvas_are_written_in_place():
    whole = torch.full((4, 10), MASK)
    part = whole[::2, 3:6]
    positions = torch.arange(3, dtype=torch.int32).repeat(2, 1)
    dk.commit_(part, positions, stats_of(torch.ones(2, 3)), dk.Rule.quota(), mask_id=MASK, quota=3)
    assert (whole != MASK).nonzero().tolist() == [[r, c] for r in (0, 2) for c in (3, 4, 5)]


# ---- unmask_ -------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    block=st.integers(1, 9),
    vocabulary=st.integers(3, 200),
    rule=st.sampled_from(RULES),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 2**32),
)
def test_unmask_is_token_stats_then_commit(batch, block, vocabulary, rule, temperature, seed):
    g = torch.Generator().manual_seed(seed)
    mask = vocabulary - 1
    logits = torch.randn(batch, block, vocabulary, generator=g)
    canvas = torch.randint(0, mask, (batch, block + 6), generator=g)
    canvas[torch.rand(canvas.shape, generator=g) < 0.6] = mask
    start = torch.randint(0, 7, (batch,), generator=g, dtype=torch.int32)
    step, sequence = torch.randint(0, 50, (2, batch), generator=g, dtype=torch.int32)
    positions = start[:, None] + torch.arange(block, dtype=torch.int32)
    noise_ids = torch.stack(
        [sequence[:, None].expand(-1, block), positions, step[:, None].expand(-1, block)], -1
    ).contiguous()
    quota = 2 if rule.needs_quota else None
    keyed = {"quota": quota, "step": step, "sequence_ids": sequence, "seed": seed, "mask_id": mask}

    expected = canvas.clone()
    stats = dk.token_stats(
        logits, temperature=temperature, seed=seed, noise_ids=noise_ids, suppress_tokens=[mask]
    )
    expected_accepted = dk.commit_(expected, positions, stats, rule, **keyed)
    accepted = dk.unmask_(
        canvas, logits, rule, block_start=start, block_size=block, temperature=temperature, **keyed
    )
    assert torch.equal(canvas, expected) and torch.equal(accepted, expected_accepted)


def test_a_model_that_predicts_only_the_mask_still_finishes():
    logits = torch.zeros(1, 4, 10)
    logits[..., 9] = 50.0
    canvas = torch.full((1, 4), 9)
    for _ in range(4):
        dk.unmask_(canvas, logits, dk.Rule.threshold(0.9), mask_id=9, block_start=0, block_size=4)
    assert canvas.tolist() == [[0, 0, 0, 0]]


def test_the_mask_may_stay_in_the_softmax():
    logits = torch.tensor([[[0.0, 3.0, 1.0]]])
    options = {"mask_id": 1, "block_start": 0, "block_size": 1}
    rule = dk.Rule.quota_or_threshold(0.5)
    for exclude, accepted in (([], True), ([1], False)):
        canvas = torch.tensor([[1]])
        got = dk.unmask_(canvas, logits, rule, quota=0, proposal_exclude=exclude, **options)
        assert got.item() is accepted


# ---- torch.compile, opcheck, bad input -----------------------------------------------------------

FLAT = ("threshold", 0.5, False, "prob", 0.0, MASK)
POSITIONS = torch.arange(4, dtype=torch.int32).repeat(2, 1)
ROW = torch.ones(2, dtype=torch.int32)


def fields(batch=2, candidates=4):
    return [torch.zeros(batch, candidates, dtype=torch.int64), *torch.rand(3, batch, candidates)]


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((torch.full((2, 6), MASK), POSITIONS, *fields(), *FLAT), {}),
        (
            (torch.full((2, 6), MASK), POSITIONS, *fields(), *FLAT),
            {"progress": torch.zeros(2, 2, dtype=torch.int32)},
        ),
        ((torch.full((0, 6), MASK), POSITIONS[:0], *fields(0), *FLAT), {}),
        (
            (torch.full((2, 6), MASK), POSITIONS, *fields(), "quota", 0.0, False, "random", 0.0, MASK),
            {"quota": ROW, "step": ROW, "sequence_ids": ROW, "seed": 3},
        ),
    ],
)
def test_opcheck_of_commit(args, kwargs):
    torch.library.opcheck(torch.ops.dllm_kernels.commit_, args, kwargs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"progress": torch.zeros(2, 2, dtype=torch.int32), "temperature": 1.0}]
)
def test_opcheck_of_unmask(kwargs):
    args = (torch.full((2, 6), MASK), torch.randn(2, 4, 100), ROW, *FLAT)
    torch.library.opcheck(torch.ops.dllm_kernels.unmask_, args, kwargs)


def test_compiles_without_graph_breaks():
    def step(canvas, logits):
        accepted = dk.unmask_(
            canvas, logits * 2, dk.Rule.threshold(0.2), mask_id=9, block_start=1, block_size=3
        )
        return accepted.sum() + canvas.sum()

    for batch in (2, 3):
        canvas, logits = torch.full((batch, 5), 9), torch.randn(batch, 3, 10)
        eager = canvas.clone()
        expected = step(eager, logits)
        assert torch.equal(
            torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")(canvas, logits), expected
        )
        assert torch.equal(canvas, eager)


BAD = [
    ({"canvas": torch.zeros(2, 6)}, "canvas must be int64 or int32, got float32"),
    ({"canvas": torch.full((6,), MASK)}, r"canvas must be \[batch, length\]"),
    ({"canvas": torch.full((6, 2), MASK).t()}, "canvas must be contiguous along its length"),
    ({"positions": POSITIONS.long()}, "positions must be int32, got int64"),
    ({"positions": POSITIONS[:1]}, r"positions.shape\[0\] must be 2"),
    ({"positions": POSITIONS + 3}, r"positions\[0, 3\] must lie between -1 and 5, got 6"),
    ({"positions": POSITIONS - 2}, r"positions\[0, 0\] must lie between -1 and 5, got -2"),
    ({"positions": POSITIONS * 0}, r"positions\[0\] lists 0 twice"),
    ({"stats": stats_of(torch.rand(2, 3))}, "stats.token must have one entry for each of the 8 positions"),
    (
        {"stats": stats_of(torch.rand(2, 4), token=torch.zeros(2, 4, dtype=torch.int32))},
        "stats.token must be int64",
    ),
    (
        {"stats": stats_of(torch.rand(2, 4), token=torch.full((2, 4), -1))},
        "stats.token must be a token id, got -1",
    ),
    ({"mask_id": -1}, "mask_id must be between 0"),
    ({"quota": ROW}, "rule 'threshold' takes no quota"),
    ({"rule": dk.Rule.quota()}, "rule 'quota' needs quota"),
    ({"rule": dk.Rule.quota(), "quota": -ROW}, r"quota\[0\] must be >= 0, got -1"),
    ({"rule": dk.Rule.quota(), "quota": ROW[:1]}, r"quota must be \[2\]"),
    ({"step": ROW.long()}, "step must be int32, got int64"),
    ({"progress": torch.zeros(2, 3, dtype=torch.int32)}, r"progress must be contiguous \[2, 2\]"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_named(change, message):
    arguments = {
        "canvas": torch.full((2, 6), MASK),
        "positions": POSITIONS,
        "stats": stats_of(torch.rand(2, 4)),
        "rule": dk.Rule.threshold(0.5),
        "mask_id": MASK,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        dk.commit_(**arguments)
    stats, rule = arguments.pop("stats"), arguments.pop("rule")
    with pytest.raises(ValueError, match=message):
        torch.ops.dllm_kernels.commit_(
            **arguments,
            token=stats.token,
            prob=stats.prob,
            margin=stats.margin,
            entropy=stats.entropy,
            rule=rule.name,
            parameter=rule.parameter,
            strict=rule.strict,
            confidence=rule.confidence,
            alg_temp=rule.alg_temp,
        )


def test_a_refused_commit_leaves_the_canvas_alone():
    canvas = torch.full((2, 6), MASK)
    with pytest.raises(ValueError):
        dk.commit_(canvas, POSITIONS + 3, stats_of(torch.rand(2, 4)), dk.Rule.threshold(0.0), mask_id=MASK)
    assert bool((canvas == MASK).all())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_start": 4}, r"block_start\[0\] must lie between 0 and 3, got 4"),
        ({"block_start": -1}, r"block_start\[0\] must lie between 0 and 3, got -1"),
        ({"block_size": 4}, "logits have 3 rows a block, block_size is 4"),
        ({"mask_id": 10}, "mask_id must lie between 0 and 9, got 10"),
        ({"suppress_tokens": range(10)}, "leave no token to propose"),
        ({"logits": torch.zeros(3, 10)}, r"logits must be \[batch, block_size, vocabulary\]"),
        ({"logits": torch.zeros(1, 3, 10)}, r"logits.shape\[0\] must be 2"),
        ({"state": ROW}, "keeps no state"),
        ({"precision": "float16"}, "precision is 'float16'"),
    ],
)
def test_bad_input_of_unmask_is_named(change, message):
    arguments = {
        "canvas": torch.full((2, 6), 9),
        "logits": torch.zeros(2, 3, 10),
        "rule": dk.Rule.threshold(0.5),
        "mask_id": 9,
        "block_start": 0,
        "block_size": 3,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        dk.unmask_(**arguments)
