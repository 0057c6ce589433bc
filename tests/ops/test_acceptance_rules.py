"""The acceptance rules, each by its definition in the paper or implementation it comes from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_kernels as dk
from tests.ops.commit_helpers import MASK, RULES, STEPWISE, accepted_of, stats_of


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
