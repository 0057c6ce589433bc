import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_kernels.sampling.rules import Rule, dllm_schedule, dream_schedule, llada_schedule

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
    assert Rule.quota().needs_quota and not Rule.factor(1.0).needs_quota


def test_a_rule_refuses_nonsense():
    with pytest.raises(ValueError, match="rule is 'best'"):
        Rule("best")
    with pytest.raises(ValueError, match="confidence is 'logit'"):
        Rule.quota(confidence="logit")
    with pytest.raises(ValueError, match="threshold is nan"):
        Rule.threshold(float("nan"))
    with pytest.raises(ValueError, match="alg_temp"):
        Rule("threshold", 0.5, alg_temp=0.1)
    with pytest.raises(ValueError, match="alg_temp is -1"):
        Rule.quota(alg_temp=-1.0)
