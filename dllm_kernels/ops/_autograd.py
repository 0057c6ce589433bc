"""Derivatives of operators, and an error in place of every derivative that does not exist.

Without a kernel for the key Autograd, torch lets a gradient, a gradient of a gradient or a tangent of forward
mode vanish: the result is 0 or None. Every operator registers one of the kernels below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import _library as _operators  # noqa: F401  (loads the operators)

_library = torch.library.Library("dllm_kernels", "IMPL")


def register_derivative(name: str, backward: Callable, setup_context: Callable) -> None:
    """Make dllm_kernels::`name` differentiable once, in reverse mode.

    setup_context(ctx, inputs, output) and backward(ctx, *grads) are those of torch.library.register_autograd.
    `backward` must compute by operators, so that a gradient of its results meets `register_no_derivative`.
    """
    operator = _operator(name)

    class Derivative(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments_and_keyset):
            *arguments, keyset = arguments_and_keyset
            # Gradients are off in here, but the levels of torch.func below this one record too.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                outputs = _below_autograd(operator, keyset, *arguments)
            setup_context(ctx, [_savable(argument) for argument in arguments], outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    def kernel(keyset, *arguments):
        _refuse_tangents(operator, arguments)
        if torch.is_grad_enabled() and any(_requires_grad(argument) for argument in arguments):
            with enable_single_level_autograd_function():
                return Derivative.apply(*arguments, keyset)
        return _below_autograd(operator, keyset, *arguments)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def register_no_derivative(name: str, remedy: str) -> None:
    """Raise NotImplementedError, with a `remedy`, if a gradient reaches dllm_kernels::`name`."""
    text = f"{name}: no derivative is implemented; {remedy}"

    def backward(ctx, *grads):
        raise NotImplementedError(text)

    register_derivative(name, backward, lambda ctx, inputs, output: None)


def register_in_place(name: str) -> None:
    """Refuse arguments whose gradient dllm_kernels::`name` would lose by writing in place, and tell autograd
    what was written: a backward pass that has saved it raises torch's error."""
    operator = _operator(name)

    def kernel(keyset, *arguments):
        _refuse_tangents(operator, arguments)
        written = _written(operator, arguments)
        if torch.is_grad_enabled() and any(tensor.is_floating_point() for tensor in written.values()):
            for argument, value in _named(operator, arguments):
                if _requires_grad(value):
                    raise ValueError(
                        f"{name}: {argument} requires grad, and what is written in place has no derivative; "
                        f"call {name} under torch.no_grad(), or detach {argument}"
                    )
        result = _below_autograd(operator, keyset, *arguments)
        for tensor in written.values():
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return result

    def negative(*arguments):
        for argument, tensor in _written(operator, arguments).items():
            if tensor.is_neg():
                raise ValueError(
                    f"{name}: {argument} is written and must not be a negative view; resolve_neg() copies it"
                )
        return operator(*(a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments))

    _library.impl(name, kernel, "Autograd", with_keyset=True)
    _library.impl(name, negative, "Negative")


def _operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.dllm_kernels, name).default


def _below_autograd(operator: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _named(operator: torch._ops.OpOverload, arguments: tuple) -> Iterator[tuple[str, object]]:
    for argument, value in zip(operator._schema.arguments, arguments, strict=False):
        yield argument.name, value


def _written(operator: torch._ops.OpOverload, arguments: tuple) -> dict[str, Tensor]:
    schema = zip(operator._schema.arguments, arguments, strict=False)
    return {a.name: v for a, v in schema if isinstance(v, Tensor) and a.alias_info and a.alias_info.is_write}


def _savable(value: object) -> object:
    """Return a copy of a tensor of inference mode, which autograd does not save: a mask, say, that serves
    evaluation and training."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _requires_grad(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _refuse_tangents(operator: torch._ops.OpOverload, arguments: tuple) -> None:
    for argument, value in _named(operator, arguments):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{operator._opname}: {argument} has a tangent, but derivatives in forward mode "
                "(torch.func.jvp, jacfwd, hessian) are not implemented; use reverse mode"
            )
