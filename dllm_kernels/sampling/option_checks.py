"""One check per option of SampleConfig: (name, value) -> the value to keep, or TypeError, or ValueError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from dllm_kernels._arguments import integer
from dllm_kernels.sampling.parity import PARITY
from dllm_kernels.sampling.rule_options import RULES
from dllm_kernels.sampling.rules import CONFIDENCES, Rule

CACHES = ("auto", "none", "prefix", "dual", "block")
_MOST_STEPS = 10**6  # a schedule goes through every one
_LARGEST, _SMALLEST = 1e38, 1e-37  # of numbers that enter products in float32, and divide there
SCHEDULES = ("llada", "dllm", "dllm_cosine", "dream")


def _integer(low: int, high: int = 2**31 - 1):
    return lambda name, value: integer(name, value, low, high)


def _number(low: float, high: float = math.inf):
    def check(name, value):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; it must be a number")
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f" >= {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
            raise ValueError(f"{name} is {value}; it must be a finite number{bounds}")
        return float(value)

    return check


def _temperature(name, value):
    value = _number(0.0, _LARGEST)(name, value)
    if 0 < value < _SMALLEST:
        raise ValueError(f"{name} is {value}; it must be 0, or at least {_SMALLEST:g}")
    return value


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
        return _one_of(*RULES)(name, value)
    if not isinstance(value, Rule):
        raise TypeError(f"{name} is {value!r}; it must be a dk.Rule, or one of {', '.join(RULES)}")
    return value


def _optional(check):
    return lambda name, value: None if value is None else check(name, value)


CHECKS = {
    "max_new_tokens": _integer(1),
    "block_size": _integer(1),
    "steps": _optional(_integer(1, _MOST_STEPS)),
    "steps_per_block": _optional(_integer(1, _MOST_STEPS)),
    "temperature": _temperature,
    "seed": _integer(0, 2**63 - 1),
    "rule": _optional(_rule),
    "threshold": _optional(_number(-math.inf)),
    "factor": _optional(_number(0.0)),
    "entropy_bound": _optional(_number(0.0)),
    "strict": _flag,
    "confidence": _one_of(*CONFIDENCES),
    "schedule": _one_of(*SCHEDULES),
    "eps": _number(0.0),
    "stochastic": _flag,
    "alg_temp": _temperature,
    "top_p": _optional(_number(0.0, 1.0)),
    "top_k": _optional(_integer(1)),
    "edit_threshold": _optional(_number(-math.inf)),
    "max_post_steps": _integer(0, _MOST_STEPS),
    "kl_threshold": _optional(_number(0.0)),
    "stable_steps": _optional(_integer(1)),
    "cache": _one_of(*CACHES),
    "refresh_every": _optional(_integer(1)),
    "suffix_window": _optional(_integer(0)),
    "cfg_scale": _number(0.0, _LARGEST),
    "cfg_keep_tokens": _ids,
    "shift": _optional(_flag),
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "mask_id": _optional(_integer(0)),
    "eos_ids": _optional(_ids),
    "stop_on_eos": _flag,
    "chat": _flag,
    "max_batch": _optional(_integer(1)),
    "compile": _flag,
    "history": _flag,
    "parity": _optional(_one_of(*PARITY)),
}
