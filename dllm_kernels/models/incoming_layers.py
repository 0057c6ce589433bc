"""Linear layers of a model that is being read, stored as soon as their tensors are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dllm_kernels.models.quantization_config import SCALE
from dllm_kernels.models.stored_weights import KINDS, StoredLinear, linear_layers, round_weight
from dllm_kernels.ops.skinny_linear import dequantize_weight

_CPU = torch.device("cpu")


class Storing(NamedTuple):
    """How to read a linear layer: kind, of `KINDS` or None, a stock layer; quantized: its 8-bit kind in the
    file, or None."""

    kind: str | None
    quantized: str | None


def layers_to_store(
    skeleton: nn.Module, quantized: Mapping[str, int | None], weights: str | None, file_kind: str = "int8"
) -> dict[str, Storing]:
    """Return the layers that are not read as the file has them, or not into an nn.Linear, by name.

    skeleton: the stock model on the meta device. quantized: its layers that are file_kind, "int8" or "fp8",
    in the file. weights: that of `dk.load`; None stores such layers as they are, and "stock" makes stock
    layers of them.
    """
    stored = weights in KINDS
    plain = linear_layers(skeleton, weights or file_kind) if stored or quantized else {}
    kind = file_kind if weights is None else weights if stored else None
    found = {name: Storing(kind if name in plain else None, file_kind) for name in quantized}
    if stored:
        found |= {name: Storing(kind, None) for name in plain if name not in quantized}
    return found


def receivers(
    model: nn.Module, layers: Mapping[str, Storing], dtype: torch.dtype, device: torch.device = _CPU
) -> dict[str, Callable[[Tensor], None]]:
    """Return what takes the tensors of `layers` in place of the model's weights, by name of the tensor.

    dtype, device: of the model; weights that are not quantized are cast to dtype before they are rounded, on
    the device.
    """
    found: dict[str, Callable[[Tensor], None]] = {}
    scratch = _Scratch(device)
    for name, how in layers.items():
        layer = _IncomingLayer(model, name, how, dtype, scratch)
        for part in ("weight", SCALE) if how.quantized else ("weight",):
            found[f"{name}.{part}"] = layer.receiver(part)
    return found


class _Scratch:
    """One tensor at a time, in the same memory: one for each layer would leave holes between what stays."""

    def __init__(self, device: torch.device):
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a tensor without values, in place of the one before."""
        size = shape.numel() * dtype.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._memory[:size].view(dtype).view(shape)


class _IncomingLayer:
    """Collects the weight of a layer, and its scales where there are any."""

    def __init__(self, model: nn.Module, name: str, how: Storing, dtype: torch.dtype, scratch: _Scratch):
        self.model, self.name, self.how, self.dtype, self.scratch = model, name, how, dtype, scratch
        self.parts: dict[str, Tensor] = {}

    def receiver(self, part: str) -> Callable[[Tensor], None]:
        def receive(tensor: Tensor) -> None:
            self.parts[part] = tensor.to(self.scratch.device)
            if len(self.parts) == 1 + (self.how.quantized is not None):
                self._finish()

        return receive

    def _finish(self) -> None:
        weight, scales = self.parts.pop("weight"), self.parts.pop(SCALE, None)
        linear = self.model.get_submodule(self.name)
        if scales is not None:
            scales = scales.float()
            if not scales.isfinite().all():
                raise ValueError(f"{self.name}.{SCALE} holds infinities or NaN")
            if weight.dtype != torch.int8 and not weight.float().isfinite().all():
                raise ValueError(f"{self.name}.weight holds NaN")
        if self.how.kind is None:
            linear.weight.detach().copy_(dequantize_weight(weight, scales))
            return
        try:
            weight, scales = round_weight(weight, self.how.kind, self.dtype, scales, self.scratch.empty)
        except ValueError:
            raise ValueError(
                f"{self.name}.weight holds infinities or NaN, which {self.how.kind} has not"
            ) from None
        self.model.set_submodule(self.name, StoredLinear.of(weight, scales, linear.bias))
