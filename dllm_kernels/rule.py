"""`Rule`: the acceptance rule that selects the candidates a denoising step commits.

A `Rule` only names a rule of csrc/core/acceptance.h and its numbers; its meaning is implemented there,
once, for CPU and CUDA.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch

from dllm_kernels import _library  # noqa: F401  (loads the operators)
from dllm_kernels._arguments import integer

CONFIDENCES = tuple(torch.ops.dllm_kernels.confidences().split())


@dataclass(frozen=True)
class Rule:
    """An acceptance rule over the masked candidates of a row, surest first, ties to the lower position.

    Use the constructors below; `parameters` are their numbers, in that order. `confidence` says what "sure"
    means: `prob` p(x0) [low_confidence of LLaDA, maskgit_plus of Dream], `margin` p1 − p2 [topk_margin],
    `entropy` Σ p·ln p, minus the entropy in nats, so that larger is surer, `random` a uniform draw.
    `strict` turns ≥ into >. A threshold is at least 0, and above 1 only the
    surest token is taken; of `entropy` it is at most 0.
    """

    name: str
    parameters: tuple[float, ...] = ()
    strict: bool = False
    confidence: str = "prob"
    alg_temp: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _PARAMETERS:
            raise ValueError(f"rule is {self.name!r}; allowed: {', '.join(_PARAMETERS)}")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence is {self.confidence!r}; allowed: {', '.join(CONFIDENCES)}")
        names = _PARAMETERS[self.name]
        if not isinstance(self.parameters, tuple):
            raise TypeError(f"parameters is {self.parameters!r}; it must be a tuple of numbers")
        if len(self.parameters) != len(names):
            raise ValueError(f"rule {self.name!r} takes {len(names)} numbers, got {len(self.parameters)}")
        for name, value in zip(names, self.parameters, strict=True):
            if name == "threshold":
                _check_threshold(value, self.confidence)
            else:
                _CHECKS[name](name, value)
        _check_number("alg_temp", self.alg_temp)
        if self.alg_temp > 0 and self.name != "quota":
            raise ValueError(f"alg_temp draws the positions of a quota; rule {self.name!r} has none")

    @property
    def code(self) -> tuple[int, list[float], bool, int, float]:
        """Return the number by which torch.ops.dllm_kernels.commit_ and unmask_ know the rule."""
        name, confidence = [*_PARAMETERS].index(self.name), CONFIDENCES.index(self.confidence)
        return name, [float(p) for p in self.parameters], self.strict, confidence, float(self.alg_temp)

    @property
    def needs_quota(self) -> bool:
        """Return whether each step must say how many tokens it commits."""
        return self.name in ("quota", "quota_or_threshold")

    @property
    def needs_state(self) -> bool:
        """Return whether `commit_` needs `TokenStats.divergence` and counters that persist between steps."""
        return self.name == "confident_stable"

    @classmethod
    def quota(cls, *, confidence: str = "prob", alg_temp: float = 0.0) -> "Rule":
        """Accept the n_i surest [LLaDA]; with `alg_temp` > 0 drawn from softmax(conf/alg_temp) [Dream]."""
        return cls("quota", confidence=confidence, alg_temp=alg_temp)

    @classmethod
    def threshold(cls, threshold: float, *, strict: bool = False, confidence: str = "prob") -> "Rule":
        """Accept every candidate with conf ≥ threshold, at least the surest one [Fast-dLLM]."""
        return cls("threshold", (threshold,), strict, confidence)

    @classmethod
    def factor(cls, factor: float, *, strict: bool = False, confidence: str = "prob") -> "Rule":
        """Accept the surest; then rank r ≥ 2 while conf_r ≥ 1 − factor/(r+1) [Fast-dLLM as in dLLM]."""
        return cls("factor", (factor,), strict, confidence)

    @classmethod
    def quota_or_threshold(cls, threshold: float, *, strict: bool = True, confidence: str = "prob") -> "Rule":
        """Accept all with conf > threshold if there are at least n_i, else the n_i surest [LLaDA2]."""
        return cls("quota_or_threshold", (threshold,), strict, confidence)

    @classmethod
    def entropy_bound(cls, bound: float) -> "Rule":
        """Accept in ascending entropy while the preceding entropies sum to ≤ bound [EB-Sampler]."""
        return cls("entropy_bound", (bound,), confidence="entropy")

    @classmethod
    def bernoulli(cls, steps: int, *, eps: float = 1e-3) -> "Rule":
        """Accept each with probability 1 − s/t, all in the last step [MDLM; origin of Dream].

        In step j of `steps`, t and s are entries j and j + 1 of linspace(1, eps, steps + 1). j is the `step`
        of `commit_`; a step may draw nothing.
        """
        return cls("bernoulli", (steps, eps))

    @classmethod
    def confident_stable(
        cls,
        threshold: float = 0.9,
        kl_threshold: float = 0.01,
        stable_steps: int = 2,
        *,
        strict: bool = True,
        confidence: str = "prob",
    ) -> "Rule":
        """Accept all with conf > threshold whose KL(p_t ‖ p_t−1) was < kl_threshold in each of the last
        `stable_steps` steps; if there are none, the surest one [KLASS, arXiv 2511.05664].

        A position's first step has nothing to compare with and is not stable.
        """
        return cls("confident_stable", (threshold, kl_threshold, stable_steps), strict, confidence)

    @classmethod
    def edit(
        cls, threshold: float, edit_threshold: float, *, strict: bool = True, confidence: str = "prob"
    ) -> "Rule":
        """Accept masked candidates as in `threshold`, and replace a listed token that differs from its
        proposal if the proposal's p > edit_threshold [LLaDA2.1].

        A block is done when a step leaves no masks and changes nothing. A model may oscillate, so the
        caller limits the steps without masks (LLaDA2.1: to 16).
        """
        return cls("edit", (threshold, edit_threshold), strict, confidence)


def _check_number(name: str, value: object, low: float = 0.0, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not (math.isfinite(value) and low <= float(value) <= high):
        bounds = f" <= {high:g}" if low == -math.inf else f" from {low:g} to {high:g}"
        bounds = f" >= {low:g}" if high == math.inf else bounds
        raise ValueError(f"{name} is {value}; it must be a finite number{bounds}")


def _check_threshold(value: object, confidence: str) -> None:
    """Refuse a threshold that says nothing: every confidence reaches it, or no entropy can."""
    if confidence == "entropy":  # negated
        _check_number("threshold of confidence='entropy'", value, -math.inf, 0.0)
    else:
        _check_number("threshold", value)


# The parameters of each rule; rules and confidences are in the order of csrc/core/acceptance.h.
_PARAMETERS = {
    name: tuple(numbers) for name, *numbers in map(str.split, torch.ops.dllm_kernels.rules().splitlines())
}
_CHECKS: dict[str, Callable[[str, object], object]] = {
    "factor": _check_number,
    "entropy_bound": _check_number,
    "steps": lambda name, value: integer(name, value, 1),
    "eps": lambda name, value: _check_number(name, value, 0.0, 1.0),
    "kl_threshold": _check_number,
    "stable_steps": lambda name, value: integer(name, value, 1),
    "edit_threshold": _check_number,
}
