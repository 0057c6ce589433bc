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
    dk.Rule.bernoulli(4),
    dk.Rule.bernoulli(1, eps=0.5),
]
STEPWISE = [  # they need more than a block's masked logits of one step
    dk.Rule.confident_stable(0.5, 0.25, 2),
    dk.Rule.confident_stable(0.25, 0.5, 1, strict=False, confidence="margin"),
    dk.Rule.edit(0.5, 0.75),
    dk.Rule.edit(0.75, 0.25, strict=False),
]


def stats_of(prob, token=None, margin=None, entropy=None, dtype=torch.float32) -> dk.TokenStats:
    prob = torch.as_tensor(prob, dtype=dtype)
    token = torch.zeros(prob.shape, dtype=torch.int64) if token is None else torch.as_tensor(token)
    margin = prob if margin is None else torch.as_tensor(margin, dtype=dtype)
    entropy = 1 - prob if entropy is None else torch.as_tensor(entropy, dtype=dtype)
    return dk.TokenStats(token, prob, margin, entropy, prob)


def accepted_of(prob, rule, quota=None, divergence=None, **options) -> list[int]:
    """Indices that a row of masked candidates with these confidences commits."""
    canvas = torch.full((1, len(prob)), MASK)
    positions = torch.arange(len(prob), dtype=torch.int32)[None]
    stats = stats_of([prob])
    if divergence is not None:
        stats = stats._replace(divergence=torch.tensor([divergence]))
    accepted = dk.commit_(canvas, positions, stats, rule, mask_id=MASK, quota=quota, **options)
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


def test_bernoulli_takes_each_with_probability_1_minus_s_over_t_and_all_in_the_last_step():
    """Masks left after step j of 5 against linspace(1, eps, 6): within 4 standard deviations."""
    steps, eps, n = 5, 0.1, 20_000
    canvas, positions = torch.full((2, n), MASK), torch.arange(n, dtype=torch.int32).repeat(2, 1)
    for step in range(steps):
        masks = (canvas == MASK).sum(1)
        rule = dk.Rule.bernoulli(steps, eps=eps)
        dk.commit_(canvas, positions, stats_of(torch.zeros(2, n)), rule, mask_id=MASK, step=step, seed=3)
        t, s = (1 + (eps - 1) * j / steps for j in (step, step + 1))
        left, keep = (canvas == MASK).sum(1), s / t
        if step == steps - 1:
            assert left.tolist() == [0, 0]
        else:
            assert bool(((left - masks * keep).abs() < 4 * (masks * keep * (1 - keep)).sqrt()).all())


def test_bernoulli_draws_from_seed_step_sequence_and_position_and_nothing_else():
    rule, prob = dk.Rule.bernoulli(4), [0.5] * 64
    base = accepted_of(prob, rule, step=1)
    assert base == accepted_of([0.1] * 64, rule, step=1) and 5 < len(base) < 40
    others = [{"step": 1, "seed": 1}, {"step": 1, "sequence_ids": torch.ones(1, dtype=torch.int32)}]
    assert all(accepted_of(prob, rule, **other) != base for other in (*others, {"step": 2}))
    canvas, listed = torch.full((3, 80), MASK), torch.arange(64, dtype=torch.int32).flip(0).repeat(3, 1)
    ids = torch.tensor([5, 0, 7], dtype=torch.int32)
    dk.commit_(canvas, listed, stats_of(torch.rand(3, 64)), rule, mask_id=MASK, step=1, sequence_ids=ids)
    assert (canvas[1] != MASK).nonzero().flatten().tolist() == base


def test_confident_stable_takes_the_sure_ones_that_stayed_put():
    rule, state = dk.Rule.confident_stable(0.5, 0.25, 2), torch.tensor([[1, 1, 0, 7, 1]], dtype=torch.int32)
    prob, divergence = [0.75, 0.5, 0.75, 1.0, 0.875], [0.125, 0.0, 0.0, 0.25, math.nan]
    # 0.5 is not above 0.5; the third is stable for one step; the divergence of the fourth is not below 0.25.
    assert accepted_of(prob, rule, divergence=divergence, state=state) == [0]
    assert state.tolist() == [[2, 2, 1, 0, 0]]


def test_confident_stable_takes_the_surest_when_none_stayed_put():
    state = torch.zeros(1, 3, dtype=torch.int32)
    options = {"divergence": [math.nan, math.inf, 0.0], "state": state}
    assert accepted_of([0.25, 0.5, 0.5], dk.Rule.confident_stable(), **options) == [1]
    assert accepted_of([math.inf, 0.5, 1.0], dk.Rule.confident_stable(0.5, 1.0, 1), **options) == [2]


@given(
    steps=st.integers(1, 8),
    stable_steps=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_confident_stable_counts_as_klass(steps, stable_steps, seed):
    """KLASS keeps the last divergences of every position; all of them must lie below the threshold."""
    g, length = torch.Generator().manual_seed(seed), 8
    canvas, held = torch.full((1, length), MASK), [MASK] * length
    state, history = torch.zeros(1, length, dtype=torch.int32), [[] for _ in range(length)]
    positions = torch.arange(length, dtype=torch.int32)[None]
    for _ in range(steps):
        conf = (torch.randint(0, 9, (length,), generator=g) / 8).tolist()
        divergence = (torch.randint(0, 3, (length,), generator=g) / 8).tolist()
        masked = [i for i in range(length) if held[i] == MASK]
        for i in masked:
            history[i] = [*history[i], divergence[i]][-stable_steps:]
        ready = [
            i
            for i in masked
            if conf[i] > 0.25 and len(history[i]) == stable_steps and all(kl < 0.25 for kl in history[i])
        ]
        for i in ready or sorted(masked, key=lambda i: (-conf[i], i))[:1]:
            held[i] = 0
        dk.commit_(
            canvas,
            positions,
            stats_of([conf])._replace(divergence=torch.tensor([divergence])),
            dk.Rule.confident_stable(0.25, 0.25, stable_steps),
            mask_id=MASK,
            state=state,
        )
        assert canvas.tolist() == [held]


def test_counters_are_those_of_listed_masks():
    canvas, state = torch.tensor([[MASK, 1, MASK, MASK]]), torch.full((1, 4), 5, dtype=torch.int32)
    listed = torch.tensor([[1, 2, 3, -1]], dtype=torch.int32)
    stats = stats_of([[1.0, 1.0, 1.0, 1.0]], token=[[0, 0, MASK, 0]])
    rule = dk.Rule.confident_stable(0.5, 0.25, 9)
    divergence = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    dk.commit_(canvas, listed, stats._replace(divergence=divergence), rule, mask_id=MASK, state=state)
    assert state.tolist() == [[5, 5, 6, 6]]
    state.fill_(2**31 - 1)
    canvas.fill_(MASK)
    dk.commit_(canvas, listed, stats._replace(divergence=divergence), rule, mask_id=MASK, state=state)
    assert state.tolist() == [[2**31 - 1] * 4]


def edit_step(canvas, token, prob, positions=None, rule=None):
    """accepted and progress of one row."""
    count = len(token)
    positions = list(range(count)) if positions is None else positions
    progress = torch.zeros(1, 2, dtype=torch.int32)
    accepted = dk.commit_(
        canvas,
        torch.tensor([positions], dtype=torch.int32),
        stats_of([prob], token=[token]),
        rule or dk.Rule.edit(0.5, 0.75),
        mask_id=MASK,
        progress=progress,
    )
    return accepted[0].tolist(), progress[0].tolist()


def test_edit_changes_listed_tokens_that_the_model_now_sees_otherwise():
    canvas = torch.tensor([[1, 2, 3, 4, MASK, MASK, 7]])
    # Same token; another one, surely enough; another one, not above 0.75; two masks, one above 0.5.
    token, prob = [1, 8, 8, 8, 5, 6], [1.0, 0.875, 0.75, math.nan, 0.625, 0.25]
    assert edit_step(canvas, token, prob) == ([False, True, False, False, True, False], [1, 2])
    assert canvas.tolist() == [[1, 8, 3, 4, 5, MASK, 7]]


def test_edit_leaves_alone_what_is_not_listed_and_never_writes_the_mask():
    canvas = torch.tensor([[1, 2, 3, MASK]])
    assert edit_step(canvas, [9, MASK, MASK], [1.0, 1.0, 1.0], [-1, 1, 3]) == ([False] * 3, [1, 0])
    assert canvas.tolist() == [[1, 2, 3, MASK]]


def test_edit_takes_at_least_one_mask_and_no_token_for_want_of_masks():
    canvas = torch.tensor([[1, MASK, MASK]])
    assert edit_step(canvas, [9, 8, 7], [0.5, 0.125, 0.25]) == ([False, False, True], [1, 1])
    full = torch.tensor([[1, 2]])
    assert edit_step(full, [9, 9], [0.5, 0.75]) == ([False, False], [0, 0])
    loose = dk.Rule.edit(0.5, 0.75, strict=False)
    assert edit_step(full, [9, 9], [0.5, 0.75], rule=loose) == ([False, True], [0, 1])


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


# ---- every rule finishes -------------------------------------------------------------------------

ODD = st.sampled_from([0.0, 1.0, 0.5, math.nan, math.inf, -math.inf])


class Fixed:
    """A model that answers every step alike: commits by `rule` and counts the steps."""

    def __init__(self, rule, token, prob, entropy, divergence):
        self.rule, self.steps = rule, 0
        stats = stats_of([prob], token=[token], margin=[prob], entropy=[entropy])
        self.stats = stats._replace(divergence=torch.tensor([divergence]))
        self.canvas = torch.full((1, len(token)), MASK)
        self.positions = torch.arange(len(token), dtype=torch.int32)[None]
        self.state = torch.zeros(1, len(token), dtype=torch.int32) if rule.needs_state else None

    def step(self) -> tuple[int, int]:
        """Masks left, tokens changed."""
        progress = torch.zeros(1, 2, dtype=torch.int32)
        dk.commit_(
            self.canvas,
            self.positions,
            self.stats,
            self.rule,
            mask_id=MASK,
            quota=1 if self.rule.needs_quota else None,
            step=self.steps,
            state=self.state,
            progress=progress,
        )
        self.steps += 1
        return tuple(progress[0].tolist())


@pytest.mark.parametrize("rule", RULES + STEPWISE, ids=str)
@given(
    rows=st.lists(st.tuples(st.sampled_from([0, 1, MASK]), ODD, ODD, ODD), min_size=1, max_size=12),
)
def test_every_rule_finishes(rule, rows):
    """What is not proposed as the mask is written: one a step at least, with bernoulli by its last step."""
    model = Fixed(rule, *zip(*rows, strict=True))
    stuck = sum(token == MASK for token, *_ in rows)
    masks = len(rows)
    for _ in range(rule.parameters[0] if rule.name == "bernoulli" else masks - stuck):
        left, changed = model.step()
        assert left == masks - changed
        assert changed >= 1 or rule.name == "bernoulli" or left == stuck
        masks = left
    assert model.canvas.tolist() == [[token for token, *_ in rows]]
    assert model.step() == (stuck, 0)


def test_an_edited_row_may_go_back_and_forth():
    """Then it changes in every step, and the caller's limit on steps without masks ends it."""
    canvas = torch.tensor([[3]])
    for step in range(32):
        assert edit_step(canvas, [4 if step % 2 == 0 else 3], [0.875]) == ([True], [0, 1])


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

FLAT = ("threshold", [0.5], False, "prob", 0.0, MASK)
KLASS = ("confident_stable", [0.5, 0.5, 2], True, "prob", 0.0, MASK)
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
            (torch.full((2, 6), MASK), POSITIONS, *fields(), "quota", [], False, "random", 0.0, MASK),
            {"quota": ROW, "step": ROW, "sequence_ids": ROW, "seed": 3},
        ),
        (
            (torch.full((2, 6), MASK), POSITIONS, *fields(), "bernoulli", [4, 0.1], False, "prob", 0.0, MASK),
            {"step": ROW},
        ),
        (
            (torch.full((2, 6), 1), POSITIONS, *fields(), "edit", [0.5, 0.5], True, "prob", 0.0, MASK),
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
    ({**STABLE, "state": STATE[:1].expand(2, 6)}, "rows of state must not overlap"),
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
            rule=rule.name,
            parameters=[float(number) for number in rule.parameters],
            strict=rule.strict,
            confidence=rule.confidence,
            alg_temp=rule.alg_temp,
            divergence=stats.divergence,
        )


@pytest.mark.parametrize(
    "flat, message",
    [
        (("best", []), "rule is 'best'; allowed: quota, threshold, factor"),
        (("quota", [0.5]), "rule 'quota' takes 0 numbers, got 1"),
        (("edit", [0.5]), r"rule 'edit' takes 2 numbers \(threshold, edit_threshold\), got 1"),
        (("edit", [0.5, math.nan]), "edit_threshold is nan; it must be a finite number"),
        (("bernoulli", [0, 0.5]), "steps is 0; it must be an integer from 1 to 2"),
        (("bernoulli", [1.5, 0.5]), "steps is 1.5; it must be an integer from 1 to 2"),
        (("bernoulli", [4, 1.5]), "eps is 1.5; it must be from 0 to 1"),
        (("confident_stable", [0.9, 0.1, 0]), "stable_steps is 0; it must be an integer from 1 to 2"),
    ],
)
def test_bad_numbers_of_a_rule_are_named(flat, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.dllm_kernels.commit_(
            torch.full((2, 6), MASK), POSITIONS, *fields(), *flat, False, "prob", 0.0, MASK
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
        ({"rule": dk.Rule.edit(0.5, 0.9)}, "rule 'edit' must not list the prompt"),
        ({"rule": dk.Rule.confident_stable()}, r"use token_stats\(previous=...\) and commit_"),
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
