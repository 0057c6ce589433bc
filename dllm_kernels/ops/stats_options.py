"""The options that `token_stats`, `linear_token_stats` and `unmask_` share: names, types and checks.

Defaults are those of the operators' schema (csrc/torch/token_stats_arguments.h).
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal, TypedDict, get_type_hints

import torch

from dllm_kernels import _library  # noqa: F401  (loads the operators)
from dllm_kernels._arguments import integer, integers, number

_integer64 = partial(integer, high=2**63 - 1)


def _number_or_none(name: str, value: object) -> float | None:
    return None if value is None else number(name, value)


def _integer_or_none(name: str, value: object) -> int | None:
    return None if value is None else _integer64(name, value)


def _precision(name: str, value: object) -> bool:
    """Return whether `value` is "float64"."""
    if value not in ("float32", "float64"):
        raise ValueError(f"{name} is {value!r}; allowed: float32, float64")
    return value == "float64"


class StatsOptions(TypedDict, total=False):
    """What is asked of every row of logits; `token_stats` says what each means.

    The second part of a type checks a value, and makes of it what the operators take.
    """

    temperature: Annotated[float, number]  # 0.0
    seed: Annotated[int, _integer64]  # 0
    suppress_tokens: Annotated[Sequence[int] | None, integers]  # None: no ids
    proposal_exclude: Annotated[Sequence[int] | None, integers]
    confidence_exclude: Annotated[Sequence[int] | None, integers]
    top_p: Annotated[float | None, _number_or_none]  # None: no such filter
    top_k: Annotated[int | None, _integer_or_none]
    confidence_temperature: Annotated[float, number]  # 1.0
    precision: Annotated[Literal["float32", "float64"], _precision]  # "float32"


_CHECKS = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(StatsOptions, include_extras=True).items()
}


def checked_options(function: str, options: StatsOptions) -> dict[str, object]:
    """Return `options` as keyword arguments of the operators; what is wrong raises with its name."""
    if unknown := [name for name in options if name not in _CHECKS]:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
    checked = {name: _CHECKS[name](name, value) for name, value in options.items() if name != "precision"}
    if "precision" in options:
        checked["float64"] = _precision(f"{function}: precision", options["precision"])
    return checked


def with_options(function: Callable) -> Callable:
    """Show every option, with its default, in the signature of a function that takes **options."""
    schema = torch.ops.dllm_kernels.token_stats.default._schema.arguments
    defaults = {argument.name: argument.default_value or None for argument in schema}
    defaults |= dict(temperature=0.0, seed=0, precision="float32")
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
        for name, hint in get_type_hints(StatsOptions).items()
    ]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function
