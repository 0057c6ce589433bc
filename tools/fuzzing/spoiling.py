"""Calls with something wrong in them: they work all the same, or an error names what is wrong."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from fuzzing.draw import Draw, Finding

ERRORS = (TypeError, ValueError, RuntimeError, NotImplementedError)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.uint8,
    torch.complex64,
)  # fmt: skip
EXTREMES = (-(2**63), -(2**31), -(2**31) + 1, -2, -1, 0, 1, 3, 100, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300, 0.5)
MARGIN = 64  # bytes before and behind a tensor that nothing may write to


# ---- one argument ------------------------------------------------------------------------------------------
def _other_shape(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.dim() == 0 or draw.chance(0.3):
        return draw.choice([tensor[None], tensor.flatten(), tensor.sum()])
    dim = draw.integer(0, tensor.dim() - 1)
    if tensor.shape[dim] and draw.chance(0.5):
        return tensor.narrow(dim, 0, tensor.shape[dim] - 1)
    return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)


def _extreme(draw: Draw, tensor: Tensor) -> Tensor:
    """Some entries as large or as small as can be; of floats NaN or infinite."""
    if tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor
    changed = tensor.contiguous().clone()
    for _ in range(draw.integer(1, 3)):
        at = draw.integer(0, changed.numel() - 1)
        if changed.is_floating_point():
            changed.view(-1)[at] = torch.tensor(draw.choice(NUMBERS), dtype=torch.float64)
        else:
            limits = torch.iinfo(changed.dtype)
            changed.view(-1)[at] = min(max(draw.choice(EXTREMES), limits.min), limits.max)
    return changed


def _expanded(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor
    dim = draw.integer(0, tensor.dim() - 1)
    return tensor.narrow(dim, 0, 1).expand(tensor.shape)


def _reordered(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.flip(-1).flip(-1).mT.contiguous().mT if tensor.dim() >= 2 else tensor


TENSORS = (
    lambda draw, t: t.to(draw.choice(DTYPES)),
    _other_shape,
    _extreme,
    _extreme,
    _expanded,
    _reordered,
    lambda draw, t: t.to("meta"),
    lambda draw, t: torch._neg_view(t) if t.dtype not in (torch.bool, torch.uint8) else t,
    lambda draw, t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    lambda draw, t: t[:0] if t.dim() else t,
    lambda draw, t: draw.choice([None, t.tolist(), 3, "text"]),
)


def _spoiled(draw: Draw, value: object) -> object:
    if isinstance(value, Tensor):
        return draw.choice(TENSORS)(draw, value)
    if isinstance(value, bool):
        return draw.choice([not value, None, 2])
    if isinstance(value, int):
        return draw.choice([*EXTREMES, 0.5, None, "1"])
    if isinstance(value, float):
        return draw.choice([*NUMBERS, None, "1"])
    if isinstance(value, list):
        return draw.choice([[draw.choice(EXTREMES)], [*value, *value], None, 3, ["a"], [0.5], []])
    return draw.choice([None, 3, torch.zeros(2), torch.zeros(1, dtype=torch.int32)])


def _shared(draw: Draw, call: dict) -> dict:
    """Two tensors of the call in one memory, where they overlap or lie side by side."""
    tensors = [n for n, v in call.items() if isinstance(v, Tensor) and v.numel() and v.device.type == "cpu"]
    if len(tensors) < 2:
        return {}
    at = draw.integer(1, len(tensors) - 1)
    first = draw.integer(0, len(tensors) - 1)
    first, second = tensors[first], tensors[(first + at) % len(tensors)]
    sizes = {name: call[name].numel() * call[name].element_size() for name in (first, second)}
    store = torch.zeros(sum(sizes.values()) + 16, dtype=torch.uint8)
    offset = draw.integer(0, sizes[first]) // 8 * 8
    places = {first: 0, second: offset}
    result = {}
    for name in (first, second):
        memory = store[places[name] : places[name] + sizes[name]]
        result[name] = memory.view(call[name].dtype).view(call[name].shape).copy_(call[name])
    return result


def spoiled(draw: Draw, call: dict) -> dict:
    """The call with one to three arguments changed."""
    changed = dict(call)
    for name in draw.some([*call], 3) or [draw.choice([*call])]:
        changed[name] = _spoiled(draw, call[name])
    if draw.chance(0.2):
        changed |= _shared(draw, call)
    return changed


# ---- what must hold ---------------------------------------------------------------------------------------
class Guard:
    """Tensors between margins that stay as they are, and what the tensors held."""

    def __init__(self, call: dict):
        self.call, self._stores = dict(call), {}
        for name, value in call.items():
            plain = isinstance(value, Tensor) and value.device.type == "cpu" and value.is_contiguous()
            if plain and not value.is_neg() and not value.requires_grad and value._base is None:
                size = value.numel() * value.element_size()
                store = torch.full((size + 2 * MARGIN,), 0xA5, dtype=torch.uint8)
                inside = store[MARGIN : MARGIN + size].view(value.dtype).view(value.shape)
                self.call[name], self._stores[name] = inside.copy_(value), store
        self._before = {name: store.clone() for name, store in self._stores.items()}

    def check(self, refused: bool) -> None:
        for name, store in self._stores.items():
            before = self._before[name]
            outside = torch.ones_like(store, dtype=torch.bool)
            outside[MARGIN:-MARGIN] = False
            if not torch.equal(store[outside], before[outside]):
                raise Finding(f"memory beside {name} was written")
            if refused and not torch.equal(store, before):
                raise Finding(f"the call was refused, but {name} was written")


def check_refusal(error: Exception, names: list[str], operator: str) -> None:
    """An error is of a kind that callers expect, and says what it is about."""
    if not isinstance(error, ERRORS):
        raise Finding(f"{type(error).__name__} instead of TypeError or ValueError: {error}")
    if not any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in [*names, operator]):
        raise Finding(f"{type(error).__name__} names no argument: {error}")
    if "INTERNAL ASSERT" in str(error):
        raise Finding(f"an assertion failed: {error}")


def run(draw: Draw, operator: str, call: dict) -> None:
    guard = Guard(spoiled(draw, call))
    refused = False
    try:
        getattr(torch.ops.dllm_kernels, operator)(**guard.call)
    except Exception as error:
        refused = True
        check_refusal(error, [*call], operator)
    guard.check(refused)
