"""Runs functions where the CUDA kernels are, for arguments and results on the CPU."""

import contextlib
import dataclasses

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import simt
from dllm_kernels import SpanMask


class OnCuda:
    """On a GPU."""

    device = "cuda"
    emulated = False

    def kernels(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def __call__(self, function, *arguments, **keywords):
        with self.kernels():
            copies = _Copies(self.device)
            arguments, keywords = copies.of(arguments), copies.of(keywords)
            results = function(*arguments, **keywords)
            copies.bring_back()
            return tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, results)


class OnEmulator(OnCuda):
    """On the emulator; order and capability are those of `simt.in_place_of_cpu`."""

    device = "cpu"
    emulated = True

    def __init__(self, order: int, capability: int = 8):
        self.order, self.capability = order, capability

    def kernels(self) -> contextlib.AbstractContextManager:
        return simt.in_place_of_cpu(self.order, self.capability)


class _Copies:
    """Tensors on another device: the same strides, offsets and shared storages."""

    def __init__(self, device: str):
        self.device = device
        self.storages: dict[int, tuple[Tensor, Tensor]] = {}  # bytes here, bytes there

    def of(self, tree):
        return tree_map(self._leaf, tree)

    def _leaf(self, x):
        if isinstance(x, SpanMask):
            return dataclasses.replace(x, spans=self._leaf(x.spans))
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        if storage._cdata not in self.storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[storage._cdata] = here, here.to(self.device, copy=True)
        _, there = self.storages[storage._cdata]
        copy = torch.empty(0, dtype=x.dtype, device=self.device)
        copy.set_(there.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        return copy.requires_grad_(x.requires_grad)

    def bring_back(self) -> None:
        for here, there in self.storages.values():
            here.copy_(there)
