"""Gated MLPs with stored weights: gate, up and what joins them as one operator.

`gate_layers` lets the panels of both weights alternate in memory. The MLPs of fused_layers then compute
silu(x · gateᵀ) · (x · upᵀ) in one pass over them, and the two products never exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_kernels.models.fused_layers import is_gated_mlp
from dllm_kernels.models.merged_projections import runs_as_its_class
from dllm_kernels.models.stored_weights import StoredLinear
from dllm_kernels.ops.skinny_linear import PackedWeight, gated_linear, interleaved


def gate_layers(model: nn.Module) -> int:
    """Compute gate and up of each MLP as one operator from now on; return in how many MLPs.

    These are the MLPs of `fuse_layers` whose gate_proj and up_proj are plain StoredLinear of equal kind and
    shape, on the CPU. Each layer keeps its place, its name and its weight, which becomes a part of the pair's
    memory. Memory: one pair besides the model.
    """
    gated = 0
    for mlp in model.modules():
        if is_gated_mlp(mlp) and _fit_together(mlp.gate_proj, mlp.up_proj):
            mlp.gated_pair = GatedPair(mlp.gate_proj, mlp.up_proj)
            gated += 1
    return gated


class GatedPair:
    """The weights of two layers, laid together; the layers' own become views of them."""

    def __init__(self, gate: StoredLinear, up: StoredLinear):
        whole = interleaved(gate.stored, up.stored)
        pairs = whole.data.unflatten(0, (-1, 2))
        gate.stored = gate.stored._replace(data=pairs[:, 0])
        up.stored = up.stored._replace(data=pairs[:, 1])
        self.parts: tuple[object, ...] = gate.stored, up.stored
        self.whole: PackedWeight | None = whole

    def product(self, gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor | None:
        """Return silu(gate(x)) · up(x), or None where the layers have to compute by themselves: a gradient is
        recorded, or a layer, its weight or its forward was replaced."""
        if torch.is_grad_enabled() or not (_is_plain(gate) and _is_plain(up)):
            return None
        if self.whole is None:
            return None
        if gate.stored is not self.parts[0] or up.stored is not self.parts[1]:
            self.whole, self.parts = None, ()  # a model that was moved keeps no second copy
            return None
        biases = [layer.bias for layer in (gate, up) if layer.bias is not None]
        if len(biases) == 1:
            return None
        return gated_linear(x, self.whole, torch.stack(biases) if biases else None)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is StoredLinear and runs_as_its_class(layer)


def _fit_together(gate: nn.Module, up: nn.Module) -> bool:
    if not (_is_plain(gate) and _is_plain(up)):
        return False
    first, second = gate.stored, up.stored
    if not (isinstance(first, PackedWeight) and isinstance(second, PackedWeight)):
        return False
    scales = [None if packed.scales is None else packed.scales.shape for packed in (first, second)]
    return (
        first.data.dtype == second.data.dtype
        and first.data.shape == second.data.shape
        and first[2:] == second[2:]
        and scales[0] == scales[1]
    )
