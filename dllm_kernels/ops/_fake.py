"""Fake kernels: the shapes and dtypes that torch.compile and meta tensors see of an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Register a fake kernel of dllm_kernels::`name` that also requires all tensors on one device.

    Compiled kernels check that themselves, but a call with one meta tensor among others comes here. The
    fake gets its arguments by name; those left at the schema's default may be missing.
    """
    arguments = _arguments(name)

    def register(fake: Callable) -> Callable:
        @functools.wraps(fake)
        def checked(*args, **kwargs):
            named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
            _check_given(name, named)
            (first, like), *others = ((n, value) for n, value in named.items() if isinstance(value, Tensor))
            for other, value in others:
                if value.device != like.device:
                    wanted = f"{other} must be on the device of {first} ({like.device})"
                    raise ValueError(f"{name}: {wanted}, got {value.device}")
            return fake(**named)

        torch.library.register_fake(f"dllm_kernels::{name}")(checked)
        return checked

    return register


def register_elsewhere(name: str, function: Callable) -> None:
    """Register what computes dllm_kernels::`name` on devices without a kernel."""
    arguments = _arguments(name)

    @functools.wraps(function)
    def checked(*args):
        _check_given(name, {argument.name: value for argument, value in zip(arguments, args, strict=False)})
        return function(*args)

    torch.library.impl(f"dllm_kernels::{name}", "CompositeExplicitAutograd")(checked)


def _arguments(name: str):
    return getattr(torch.ops.dllm_kernels, name).default._schema.arguments


def _check_given(name: str, named: dict[str, object]) -> None:
    """Refuse None for a Tensor, which torch takes for a tensor without anything."""
    for argument in _arguments(name):
        if str(argument.type) == "Tensor" and named.get(argument.name) is None:
            raise ValueError(f"{name}: {argument.name} must be a Tensor, got None")
