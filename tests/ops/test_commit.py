"""commit_ against the reference, and what it leaves alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.ops.reference import unmask as reference
from tests.ops.commit_helpers import MASK, RULES, STEPWISE, stats_of

# ---- agreement with the reference ----------------------------------------------------------------


@given(
    batch=st.integers(0, 4),
    candidates=st.integers(0, 40),
    rule=st.sampled_from([rule for rule in RULES + STEPWISE if not rule.alg_temp]),
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
    divergence, state, expected_state = real(), None, None
    divergence[torch.rand(batch, candidates, generator=g) < 0.1] = math.nan
    if rule.needs_state:
        state = torch.randint(0, 3, (batch, length), generator=g, dtype=torch.int32)
        expected_state = state.tolist()

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
        divergence=divergence,
        state=expected_state,
    )
    filled = canvas.to(ids)
    accepted = dk.commit_(
        filled,
        positions,
        stats._replace(divergence=divergence),
        rule,
        mask_id=MASK,
        quota=quota,
        step=per_row[1],
        sequence_ids=per_row[2],
        seed=seed,
        progress=progress,
        state=state,
    )
    assert filled.tolist() == expected
    assert expected_state is None or state.tolist() == expected_state
    assert accepted.tolist() == expected_accepted
    assert progress.tolist() == expected_progress


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


# ---- torch.compile, opcheck, bad input -----------------------------------------------------------

# The numbers of rules through torch.ops.
RULES = {line.split()[0]: place for place, line in enumerate(torch.ops.dllm_kernels.rules().splitlines())}
FLAT = (*dk.Rule.threshold(0.5).code, MASK)
KLASS = (*dk.Rule.confident_stable(0.5, 0.5, 2).code, MASK)
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
            (torch.full((2, 6), MASK), POSITIONS, *fields(), *dk.Rule.quota(confidence="random").code, MASK),
            {"quota": ROW, "step": ROW, "sequence_ids": ROW, "seed": 3},
        ),
        (
            (torch.full((2, 6), MASK), POSITIONS, *fields(), *dk.Rule.bernoulli(4, eps=0.1).code, MASK),
            {"step": ROW},
        ),
        (
            (torch.full((2, 6), 1), POSITIONS, *fields(), *dk.Rule.edit(0.5, 0.5).code, MASK),
            {},
        ),
        (
            (torch.full((2, 6), MASK), POSITIONS, *fields(), *KLASS),
            {"divergence": torch.rand(2, 4), "state": torch.zeros(2, 6, dtype=torch.int32)},
        ),
        (
            (
                torch.full((2, 6), MASK),
                POSITIONS,
                *[field.t().contiguous().t() for field in fields()],
                *KLASS,
            ),
            {"divergence": torch.rand(4, 2).t(), "state": torch.zeros(4, 7, dtype=torch.int32)[::2, 1:]},
        ),
    ],
)
def test_opcheck_of_commit(args, kwargs):
    torch.library.opcheck(torch.ops.dllm_kernels.commit_, args, kwargs)


@pytest.mark.parametrize("rule", STEPWISE, ids=str)
def test_a_step_of_token_stats_and_commit_compiles(rule):
    def step(canvas, logits, previous, state):
        stats = dk.token_stats(logits, suppress_tokens=[9], previous=previous)
        positions = torch.arange(logits.shape[1], dtype=torch.int32).expand(len(canvas), -1)
        return dk.commit_(canvas, positions, stats, rule, mask_id=9, state=state)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        canvas = torch.tensor([9, 9, 3, 9, 4]).repeat(batch, 1)
        inputs = torch.randn(2, batch, 5, 10) * 3
        state = torch.ones(batch, 5, dtype=torch.int32) if rule.needs_state else None
        eager, eager_state = canvas.clone(), None if state is None else state.clone()
        assert torch.equal(compiled(canvas, *inputs, state), step(eager, *inputs, eager_state))
        assert torch.equal(canvas, eager) and (state is None or torch.equal(state, eager_state))


PLAIN = stats_of(torch.rand(2, 4))
DIVERGING = PLAIN._replace(divergence=torch.rand(2, 4))
STATE = torch.zeros(2, 6, dtype=torch.int32)
STABLE = {"rule": dk.Rule.confident_stable(), "stats": DIVERGING, "state": STATE}
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
    ({"rule": dk.Rule.bernoulli(4)}, "rule 'bernoulli' needs step, int32"),
    ({"state": STATE}, "rule 'threshold' keeps no state; leave state None"),
    ({**STABLE, "state": None}, r"rule 'confident_stable' needs state, int32 \[batch, length\]"),
    ({**STABLE, "state": STATE.long()}, "state must be int32, got int64"),
    ({**STABLE, "state": STATE[:, :5]}, r"state must have the shape of canvas \(\[2, 6\]\), got \[2, 5\]"),
    ({**STABLE, "state": STATE[:1].expand(2, 6)}, "state is written and must not overlap itself"),
    ({**STABLE, "stats": stats_of(torch.rand(2, 4))}, "rule 'confident_stable' needs stats.divergence"),
    (
        {**STABLE, "stats": PLAIN._replace(divergence=torch.rand(2, 3))},
        "stats.divergence must have one entry for each of the 8 positions",
    ),
    (
        {**STABLE, "stats": PLAIN._replace(divergence=torch.rand(2, 4).double())},
        r"stats.divergence must have the dtype of stats.prob \(float32\), got float64",
    ),
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
            **dict(zip(("rule", "parameters", "strict", "confidence", "alg_temp"), rule.code, strict=True)),
            divergence=stats.divergence,
        )


@pytest.mark.parametrize(
    "flat, message",
    [
        ((99, []), r"rule is 99; allowed: 0 \(quota\), 1 \(threshold\), 2 \(factor\)"),
        ((-1, []), "rule is -1; allowed: 0"),
        ((RULES["quota"], [0.5]), "rule 'quota' takes 0 numbers, got 1"),
        ((RULES["edit"], [0.5]), r"rule 'edit' takes 2 numbers \(threshold, edit_threshold\), got 1"),
        ((RULES["edit"], [0.5, math.nan]), "edit_threshold is nan; it must be a finite number"),
        ((RULES["bernoulli"], [0, 0.5]), "steps is 0; it must be an integer from 1 to 2"),
        ((RULES["bernoulli"], [1.5, 0.5]), "steps is 1.5; it must be an integer from 1 to 2"),
        ((RULES["bernoulli"], [4, 1.5]), "eps is 1.5; it must be from 0 to 1"),
        ((RULES["confident_stable"], [0.9, 0.1, 0]), "stable_steps is 0; it must be an integer from 1 to 2"),
    ],
)
def test_bad_numbers_of_a_rule_are_named(flat, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.dllm_kernels.commit_(
            torch.full((2, 6), MASK), POSITIONS, *fields(), *flat, False, 0, 0.0, MASK
        )


def test_a_refused_commit_leaves_the_canvas_alone():
    canvas = torch.full((2, 6), MASK)
    with pytest.raises(ValueError):
        dk.commit_(canvas, POSITIONS + 3, stats_of(torch.rand(2, 4)), dk.Rule.threshold(0.0), mask_id=MASK)
    assert bool((canvas == MASK).all())
