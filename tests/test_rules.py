import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.rule import Rule
from dllm_kernels.sampling.schedules import dllm_schedule, dream_schedule, llada_schedule

SCHEDULES = [llada_schedule, dllm_schedule, dream_schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(masks=st.integers(0, 300), steps=st.integers(1, 300))
def test_a_schedule_commits_every_mask_within_its_steps(schedule, masks, steps):
    quotas = schedule(masks, steps)
    assert sum(quotas) == masks
    assert len(quotas) <= steps
    assert min(quotas, default=0) >= 0


def test_llada_gives_the_remainder_to_the_first_steps():
    assert llada_schedule(10, 4) == [3, 3, 2, 2]
    assert llada_schedule(2, 4) == [1, 1, 0, 0]


def test_dllm_rounds_in_float32_and_drops_empty_steps():
    assert dllm_schedule(4, 3) == [1, 1, 2]
    assert dllm_schedule(1, 8) == [1]


def test_dream_takes_everything_in_the_last_step():
    assert dream_schedule(8, 1) == [8]
    assert dream_schedule(8, 4) == [1, 2, 2, 3]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_refuses_nonsense(schedule):
    with pytest.raises(ValueError, match="masks is -1"):
        schedule(-1, 2)
    with pytest.raises(ValueError, match="steps is 0"):
        schedule(3, 0)


def test_a_rule_is_a_value():
    assert Rule.threshold(0.9) == Rule.threshold(0.9)
    assert Rule.threshold(0.9) != Rule.threshold(0.9, strict=True)
    assert len({Rule.edit(0.7, 0.9), Rule.edit(0.7, 0.9), Rule.edit(0.9, 0.7)}) == 2


def test_a_rule_says_what_it_needs():
    assert [rule.name for rule in EVERY_RULE if rule.needs_quota] == ["quota", "quota_or_threshold"]
    assert [rule.name for rule in EVERY_RULE if rule.needs_state] == ["confident_stable"]


def test_comparisons_are_strict_where_the_source_is():
    assert [rule.name for rule in EVERY_RULE if rule.strict] == [
        "quota_or_threshold",
        "confident_stable",
        "edit",
    ]


EVERY_RULE = [
    Rule.quota(),
    Rule.threshold(0.9),
    Rule.factor(1.0),
    Rule.quota_or_threshold(0.9),
    Rule.entropy_bound(0.5),
    Rule.bernoulli(8),
    Rule.confident_stable(),
    Rule.edit(0.7, 0.9),
]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: Rule("best"),
            ValueError,
            "rule is 'best'; allowed: quota, .*, bernoulli, confident_stable, edit",
        ),
        (lambda: Rule("threshold"), ValueError, "rule 'threshold' takes 1 numbers, got 0"),
        (lambda: Rule.quota(confidence="logit"), ValueError, "confidence is 'logit'"),
        (lambda: Rule.threshold(math.nan), ValueError, "threshold is nan; it must be a finite number"),
        (lambda: Rule.threshold("0.9"), TypeError, "threshold is '0.9'; it must be a number"),
        (lambda: Rule.threshold(True), TypeError, "threshold is True; it must be a number"),
        (
            lambda: Rule("threshold", (0.5,), alg_temp=0.1),
            ValueError,
            "alg_temp draws the positions of a quota",
        ),
        (lambda: Rule.quota(alg_temp=-1.0), ValueError, "alg_temp is -1.0; it must be a finite number >= 0"),
        (lambda: Rule.threshold(-0.1, confidence="margin"), ValueError, "threshold is -0.1; .* >= 0"),
        (lambda: Rule.edit(-0.1, 0.5), ValueError, "threshold is -0.1; .* >= 0"),
        (lambda: Rule.edit(0.5, -0.1), ValueError, "edit_threshold is -0.1; .* >= 0"),
        (lambda: Rule.quota_or_threshold(math.inf), ValueError, "threshold is inf; .* >= 0"),
        (
            lambda: Rule.threshold(0.9, confidence="entropy"),
            ValueError,
            "threshold of confidence='entropy' is 0.9; it must be a finite number <= 0",
        ),
        (lambda: Rule.factor(-1.0), ValueError, "factor is -1.0; it must be a finite number >= 0"),
        (lambda: Rule.entropy_bound(-0.5), ValueError, "entropy_bound is -0.5; .* >= 0"),
        (lambda: Rule.bernoulli(0), ValueError, "steps must lie in 1..2147483647, got 0"),
        (lambda: Rule.bernoulli(2.5), TypeError, "steps must be an integer, got float"),
        (
            lambda: Rule.bernoulli(2, eps=1.5),
            ValueError,
            "eps is 1.5; it must be a finite number from 0 to 1",
        ),
        (lambda: Rule.confident_stable(stable_steps=0), ValueError, "stable_steps must lie in 1"),
        (lambda: Rule.confident_stable(0.9, math.inf), ValueError, "kl_threshold is inf"),
        (lambda: Rule.confident_stable(0.9, -0.1), ValueError, "kl_threshold is -0.1; .* >= 0"),
        (lambda: Rule.confident_stable(-2.0), ValueError, "threshold is -2.0; .* >= 0"),
        (lambda: Rule.edit(0.7, None), TypeError, "edit_threshold is None; it must be a number"),
    ],
)
def test_a_rule_refuses_nonsense(make, error, message):
    with pytest.raises(error, match=message):
        make()
