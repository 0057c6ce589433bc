"""Argument checks shared by the modules; every message names the argument and what is allowed."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor


def integer(name: str, value: object, low: int | None = None, high: int = 2**31 - 1) -> int:
    """Return `value` as an int in low..high (low=None: -high..high)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = value if isinstance(value, int) else operator.index(value)  # keeps traced sizes symbolic
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {kind(value)}") from None
    if number > high or (low is not None and number < low):
        raise ValueError(f"{name} must lie in {-high if low is None else low}..{high}, got {number}")
    return number


def number(name: str, value: object) -> float:
    """Return `value` as a float; the operators check its range."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {kind(value)}") from None


def integers(name: str, values: object) -> list[int]:
    """Return `values`, None for none, as a list of ints; the operators check their range."""
    if values is None:
        return []
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {kind(values)}")
    return [integer(name, value, high=2**63 - 1) for value in values]


def kind(value: object) -> str:
    """Describe `value` for an error message."""
    return f"{value.dtype} Tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {kind(value)}")


def check_optional_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {kind(value)}")


def check_batch_vector(name: str, value: Tensor, low: int | None = None, high: int | None = None) -> None:
    """Check that `value` is int32 or int64 [B] with entries in low..high (low=None: any)."""
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int or an int32 or int64 Tensor [B], got {kind(value)}")
    if value.dim() != 1:
        raise ValueError(f"{name} must be an int or a Tensor [B], got {kind(value)}")
    if low is None or torch.compiler.is_compiling():
        return
    wrong = ((value < low) | (value > high)).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(f"{name} must lie in {low}..{high}, got {int(value[at])} at index {at}")
