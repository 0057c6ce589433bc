"""SampleConfig: every option of `dk.sample` and `dk.infill`, checked once, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

from dllm_kernels._arguments import integer
from dllm_kernels.sampling.rules import CONFIDENCES, Rule, dllm_schedule, dream_schedule, llada_schedule

CACHES = ("auto", "none", "block")
SCHEDULES = {"llada": llada_schedule, "dllm": dllm_schedule, "dream": dream_schedule}


@dataclass(frozen=True)
class SampleConfig:
    """How to sample. Contradictions and options that are not available yet raise ValueError.

    max_new_tokens: completion tokens of each row (`sample` only). block_size: tokens denoised together.
    steps: denoising steps in all, ceil(steps / blocks) for each block; steps_per_block: that, said directly;
    neither: one token per step. Rules without a quota ignore both and take as many steps as they need.

    rule: a `dk.Rule` or its name. Without it threshold, factor or entropy_bound name the rule, and without
    any of them it is "quota".
    confidence: "prob" | "margin" | "entropy" | "random"; schedule: how a quota is spread over the steps.
    temperature, seed: Gumbel noise on the logits, a function of seed, row, position and step alone.
    cache: "none" | "block" | "auto" (block for block-causal models, else none); both are exact.
    suppress_tokens: ids that are never proposed. mask_id, eos_ids: in place of the checkpoint's.
    stop_on_eos: end a row at its first end token. max_batch: rows in flight; the others wait.
    history: keep the canvas after every round.
    """

    max_new_tokens: int = 128
    block_size: int = 32
    steps: int | None = None
    steps_per_block: int | None = None
    temperature: float = 0.0
    seed: int = 0
    rule: Rule | str | None = None
    threshold: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    strict: bool = False
    confidence: str = "prob"
    schedule: str = "llada"
    stochastic: bool = False
    alg_temp: float = 0.0
    eps: float = 1e-3
    top_p: float | None = None
    top_k: int | None = None
    edit_threshold: float | None = None
    max_post_steps: int = 16
    kl_threshold: float | None = None
    stable_steps: int | None = None
    cache: str = "auto"
    refresh_every: int | None = None
    suffix_window: int | None = None
    cfg_scale: float = 0.0
    cfg_keep_tokens: tuple[int, ...] = ()
    shift: bool | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    mask_id: int | None = None
    eos_ids: tuple[int, ...] | None = None
    stop_on_eos: bool = True
    chat: bool = False
    max_batch: int | None = None
    history: bool = False
    parity: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _NOT_YET and value != field.default:
                raise ValueError(f"{field.name}={value!r} is not available yet; leave it {field.default!r}")
            if check := _CHECKS.get(field.name):
                object.__setattr__(self, field.name, check(field.name, value))
        _refuse_contradictions(self)

    @classmethod
    def preset(cls, name: str) -> SampleConfig:
        """The settings a system publishes: one of "llada", "bd3lm"; others are not available yet."""
        if name in _PRESETS_NOT_YET:
            raise ValueError(f"preset {name!r} is not available yet: {_PRESETS_NOT_YET[name]}")
        if name not in _PRESETS:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    def acceptance(self) -> Rule:
        """The rule that these options name."""
        return self.rule if isinstance(self.rule, Rule) else _RULES[_rule_name(self)].make(self)

    def quotas(self, masks: int, blocks: int) -> list[int]:
        """Tokens to commit in each step of a block with `masks` masks, for a row of `blocks` blocks."""
        if self.acceptance().name == "quota_or_threshold":
            masks = self.block_size
        steps = self.steps_per_block or (masks if self.steps is None else math.ceil(self.steps / blocks))
        more = (self.eps,) if self.schedule == "dream" else ()
        return [quota for quota in SCHEDULES[self.schedule](masks, steps, *more) if quota]


@dataclass(frozen=True)
class _NamedRule:
    """How options make a rule: which one holds its number, and whether strict and confidence apply."""

    number: str | None
    make: Callable[[SampleConfig], Rule]
    strict: bool = False
    confidence: bool = True


_RULES = {
    "quota": _NamedRule(None, lambda c: Rule.quota(confidence=c.confidence)),
    "threshold": _NamedRule(
        "threshold",
        lambda c: Rule.threshold(c.threshold, strict=c.strict, confidence=c.confidence),
        strict=True,
    ),
    "factor": _NamedRule(
        "factor",
        lambda c: Rule.factor(c.factor, strict=c.strict, confidence=c.confidence),
        strict=True,
    ),
    "quota_or_threshold": _NamedRule(
        "threshold",
        lambda c: Rule.quota_or_threshold(c.threshold, confidence=c.confidence),
    ),
    "entropy_bound": _NamedRule(
        "entropy_bound",
        lambda c: Rule.entropy_bound(c.entropy_bound),
        confidence=False,
    ),
}
_NUMBERS = ("threshold", "factor", "entropy_bound")


def _rule_name(config: SampleConfig) -> str:
    return config.rule or next((name for name in _NUMBERS if getattr(config, name) is not None), "quota")


_NOT_YET = {
    "stochastic", "alg_temp", "top_p", "top_k", "edit_threshold", "max_post_steps", "kl_threshold",
    "stable_steps", "refresh_every", "suffix_window", "cfg_scale", "cfg_keep_tokens", "begin_suppress_tokens",
    "chat", "parity",
}  # fmt: skip

_PRESETS = {
    "llada": dict(max_new_tokens=128, block_size=128, steps=128, cache="none"),
    "bd3lm": dict(max_new_tokens=128, block_size=32, steps=128, cache="block", schedule="dllm"),
}
_PRESETS_NOT_YET = {
    "fast_dllm": 'it needs cache="dual"',
    "dream": "it needs top_p and alg_temp",
    "llada2": "it needs its own schedule",
}


def _refuse_contradictions(config: SampleConfig) -> None:
    given = {name for name in _NUMBERS if getattr(config, name) is not None}
    if isinstance(config.rule, Rule):
        name, rule = f"rule={config.rule}", _NamedRule(None, lambda c: c.rule, confidence=False)
    else:
        name = _rule_name(config)
        rule = _RULES[name]
        if rule.number and rule.number not in given:
            raise ValueError(f"rule {name!r} needs {rule.number}")
    if surplus := sorted(given - {rule.number}):
        raise ValueError(f"{surplus[0]}={getattr(config, surplus[0])} contradicts {name}: one rule at a time")
    if config.strict and not rule.strict:
        raise ValueError(f"strict has no meaning with {name}")
    if config.confidence != "prob" and not rule.confidence:
        raise ValueError(f"confidence={config.confidence!r} has no meaning with {name}")
    if config.steps is not None and config.steps_per_block is not None:
        raise ValueError("steps and steps_per_block both say how many steps a block gets; give one")
    if config.schedule == "dream" and not 0 < config.eps < 1:
        raise ValueError(f"eps is {config.eps}; it must lie between 0 and 1")


# ---- one check per option: (name, value) -> the value to keep -----------------------------------
def _integer(low: int, high: int = 2**31 - 1):
    return lambda name, value: integer(name, value, low, high)


def _number(low: float):
    def check(name, value):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; it must be a number")
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name} is {value}; it must be a finite number >= {low}")
        return float(value)

    return check


def _flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")
    return value


def _one_of(*allowed):
    def check(name, value):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        return value

    return check


def _ids(name, value):
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be a sequence of token ids")
    return tuple(integer(name, token, 0) for token in value)


def _rule(name, value):
    if isinstance(value, str):
        return _one_of(*_RULES)(name, value)
    if not isinstance(value, Rule):
        raise TypeError(f"{name} is {value!r}; it must be a dk.Rule, or one of {', '.join(_RULES)}")
    if value.name not in _RULES:
        raise ValueError(f"{name}={value} is not available in sampling yet; allowed: {', '.join(_RULES)}")
    return value


def _cache(name, value):
    if value in ("prefix", "dual"):
        raise ValueError(f"cache={value!r} is not available yet; allowed: {', '.join(CACHES)}")
    return _one_of(*CACHES)(name, value)


def _optional(check):
    return lambda name, value: None if value is None else check(name, value)


_CHECKS = {
    "max_new_tokens": _integer(1),
    "block_size": _integer(1),
    "steps": _optional(_integer(1)),
    "steps_per_block": _optional(_integer(1)),
    "temperature": _number(0.0),
    "seed": _integer(0, 2**63 - 1),
    "rule": _optional(_rule),
    "threshold": _optional(_number(-math.inf)),
    "factor": _optional(_number(0.0)),
    "entropy_bound": _optional(_number(0.0)),
    "strict": _flag,
    "confidence": _one_of(*CONFIDENCES),
    "schedule": _one_of(*SCHEDULES),
    "eps": _number(0.0),
    "cache": _cache,
    "shift": _optional(_flag),
    "suppress_tokens": _ids,
    "mask_id": _optional(_integer(0)),
    "eos_ids": _optional(_ids),
    "stop_on_eos": _flag,
    "max_batch": _optional(_integer(1)),
    "history": _flag,
}
