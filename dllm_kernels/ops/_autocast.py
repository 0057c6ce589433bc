"""Autocast rules of operators whose tensors must agree in dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to `dtype` as autocast does; float64 and integers stay and are refused by name."""
    return tensor.to(dtype) if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor


def register_autocast(operator: torch._ops.OpOverload, convert: Callable[..., tuple]) -> None:
    """Under autocast, call `operator` with the arguments that `convert(*arguments)` returns."""

    def register(key: str) -> None:
        without_autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast_and_call(*arguments):
            arguments = convert(*arguments)
            with torch._C._ExcludeDispatchKeyGuard(without_autocast):
                return operator(*arguments)

        torch.library.impl(operator.name(), key)(cast_and_call)

    for key in ("AutocastCPU", "AutocastCUDA"):
        register(key)
