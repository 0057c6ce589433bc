"""Which candidates a denoising step commits: `Rule`, and the schedules that give a quota to each step.

A `Rule` only names a rule of csrc/core/acceptance.h and its numbers; what the rule does is written
there, once, for CPU and CUDA. A schedule spreads the masks of a block over its steps.
"""

import math
from dataclasses import dataclass

import torch

CONFIDENCES = ("prob", "margin", "entropy", "random")


@dataclass(frozen=True)
class Rule:
    """An acceptance rule over the masked candidates of a row, surest first, ties to the lower position.

    Use the constructors below. `confidence` says what "sure" means: `prob` p(x0) [low_confidence of
    LLaDA, maskgit_plus of Dream], `margin` p1 − p2 [topk_margin], `entropy` Σ p·ln p, minus the entropy
    in nats, so that larger is surer, `random` a uniform draw. `strict` turns ≥ into >.
    """

    name: str
    parameter: float = 0.0
    strict: bool = False
    confidence: str = "prob"
    alg_temp: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _PARAMETERS:
            raise ValueError(f"rule is {self.name!r}; allowed: {', '.join(_PARAMETERS)}")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence is {self.confidence!r}; allowed: {', '.join(CONFIDENCES)}")
        parameter = _PARAMETERS[self.name]
        if parameter and not math.isfinite(self.parameter):
            raise ValueError(f"{parameter} is {self.parameter}; it must be a finite number")
        if not (math.isfinite(self.alg_temp) and self.alg_temp >= 0):
            raise ValueError(f"alg_temp is {self.alg_temp}; it must be a finite number >= 0")
        if self.alg_temp > 0 and self.name != "quota":
            raise ValueError(f"alg_temp draws the positions of a quota; rule {self.name!r} has none")

    @property
    def needs_quota(self) -> bool:
        """Whether each step must say how many tokens it commits."""
        return self.name in ("quota", "quota_or_threshold")

    @classmethod
    def quota(cls, *, confidence: str = "prob", alg_temp: float = 0.0) -> "Rule":
        """The n_i surest [LLaDA]; with `alg_temp` > 0 drawn from softmax(conf/alg_temp) [Dream]."""
        return cls("quota", confidence=confidence, alg_temp=alg_temp)

    @classmethod
    def threshold(cls, threshold: float, *, strict: bool = False, confidence: str = "prob") -> "Rule":
        """Every candidate with conf ≥ threshold, at least the surest one [Fast-dLLM]."""
        return cls("threshold", threshold, strict, confidence)

    @classmethod
    def factor(cls, factor: float, *, strict: bool = False, confidence: str = "prob") -> "Rule":
        """The surest; then rank r ≥ 2 while conf_r ≥ 1 − factor/(r+1) [Fast-dLLM as in dLLM]."""
        return cls("factor", factor, strict, confidence)

    @classmethod
    def quota_or_threshold(cls, threshold: float, *, strict: bool = True, confidence: str = "prob") -> "Rule":
        """All with conf > threshold if at least n_i of them, else the n_i surest [LLaDA2]."""
        return cls("quota_or_threshold", threshold, strict, confidence)

    @classmethod
    def entropy_bound(cls, bound: float) -> "Rule":
        """In ascending entropy while the entropies before this one sum to ≤ bound [EB-Sampler]."""
        return cls("entropy_bound", bound, confidence="entropy")


# What the number of each rule is called; None: the rule has no number.
_PARAMETERS = {
    "quota": None,
    "threshold": "threshold",
    "factor": "factor",
    "quota_or_threshold": "threshold",
    "entropy_bound": "entropy_bound",
}


def llada_schedule(masks: int, steps: int) -> list[int]:
    """Quota of each of `steps` steps: masks // steps, one more in the first masks mod steps [LLaDA]."""
    _check(masks, steps)
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def dllm_schedule(masks: int, steps: int) -> list[int]:
    """Quotas of dLLM's linear schedule, without its empty steps (so the list may be shorter than `steps`).

    With t = (S−j)/S and s = (S−j−1)/S: n = round-half-even(remaining·(1 − s/t)), the ratio in float32
    and the product in float64, as in dLLM (exact arithmetic gives other schedules).
    """
    _check(masks, steps)
    quotas, remaining = [], masks
    for j in range(steps):
        t, s = (torch.tensor((steps - j - k) / steps, dtype=torch.float32) for k in (0, 1))
        alpha_t, alpha_s = 1 - t, 1 - s
        accepted = 1 - (1 - alpha_s) / (1 - alpha_t)
        quota = min(round(remaining * float(accepted)), remaining)
        remaining -= quota
        quotas.append(quota)
    return [quota for quota in quotas if quota]


def dream_schedule(masks: int, steps: int, eps: float = 1e-3) -> list[int]:
    """Quotas of Dream: int(remaining·(1 − s/t)), t = linspace(1, eps, S+1); the last step takes all.

    Counted for each row by itself (the original takes the mean of the batch). Quotas may be 0.
    """
    _check(masks, steps)
    if not 0 < eps < 1:
        raise ValueError(f"eps is {eps}; it must lie between 0 and 1")
    t = torch.linspace(1, eps, steps + 1)
    quotas, remaining = [], masks
    for j in range(steps):
        quota = int(remaining * float(1 - t[j + 1] / t[j])) if j < steps - 1 else remaining
        remaining -= quota
        quotas.append(quota)
    return quotas


def _check(masks: int, steps: int) -> None:
    if masks < 0:
        raise ValueError(f"masks is {masks}; it must be >= 0")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be >= 1")
