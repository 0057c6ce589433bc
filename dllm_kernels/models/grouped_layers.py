"""Stored linear layers of one input as one product: queries, keys and values; gate and up.

`group_layers` does for StoredLinear what merged_projections does for nn.Linear. The weights of a group lie
one after the other in memory, and every layer keeps its place, its name and its weight, which become a part
of that memory. The first layer of a group multiplies for all, and x is quantized once. A layer multiplies by
itself where a gradient is recorded, in compiled code, when x was changed in between, and when the weight of
one of them was replaced; inference mode does not notice changes of x, since torch does not count them there.
On another device the layers are a group no more, until `group_layers` is called again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dllm_kernels.models.merged_projections import GROUPS, attach_parts, own_part, runs_as_its_class
from dllm_kernels.models.stored_weights import StoredLinear
from dllm_kernels.ops.skinny_linear import PackedWeight, RowMajorWeight, skinny_linear

Weight = PackedWeight | RowMajorWeight


def group_layers(model: nn.Module) -> int:
    """Compute each group of stored layers in `model` as one product from now on; return how many there are.

    Groups are found by name (merged_projections.GROUPS). A group is formed of plain StoredLinear without
    hooks, with the same inputs, dtype, device, groups of scales and presence of a bias, if the outputs of
    each fill its panels where weights are packed. Memory: one group besides the model.
    """
    grouped = 0
    for parent in model.modules():
        for names in GROUPS:
            layers = tuple(parent._modules.get(name) for name in names)
            if getattr(parent, "gated_pair", None) is not None and "gate_proj" in names:
                continue
            if all(type(layer) is StoredLinear for layer in layers) and _fit_together(layers):
                _lay_together(layers)
                grouped += 1
    return grouped


class GroupedLinear(StoredLinear):
    """One of a group of stored layers that are called with the same input.

    others: of the first one, those that follow it; of these, (). whole: of the first one, the weights of all
    as they were when they were laid together, and these as one weight.
    """

    others: tuple[GroupedLinear, ...] = ()
    whole: tuple[tuple[Weight, ...], Weight] | None = None

    def _apply(self, fn, recurse=True):
        before = self.stored
        super()._apply(fn, recurse)
        if self.stored is not before:
            self.__class__, self.others, self.whole = StoredLinear, (), None
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] -> [..., out], by a part of the group's product if there is one."""
        output = None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            output = self._first_part(x) if self.others else own_part(x, self)
        return super().forward(x) if output is None else output

    def _first_part(self, x: Tensor) -> Tensor | None:
        group, (weights, whole) = (self, *self.others), self.whole
        biases = [layer.bias for layer in group if layer.bias is not None]
        as_grouped = all(layer.stored is weight for layer, weight in zip(group, weights, strict=True))
        if not as_grouped or len(biases) not in (0, len(group)):
            return None
        return attach_parts(x, group, skinny_linear(x, whole, torch.cat(biases) if biases else None))


def _fit_together(layers: tuple[StoredLinear, ...]) -> bool:
    kinds = {
        (
            layer.in_features, layer.stored_dtype, layer.bias is None,
            type(layer.stored), layer.stored.groups, layer.stored[0].device,
        )
        for layer in layers
    }  # fmt: skip
    return len(kinds) == 1 and all(
        layer.stored.ends_in_a_panel and runs_as_its_class(layer) for layer in layers
    )


def _lay_together(layers: tuple[StoredLinear, ...]) -> None:
    first, *others = (layer.stored for layer in layers)
    whole, parts = first.followed_by(*others)
    for layer, part in zip(layers, parts, strict=True):
        layer.__class__ = GroupedLinear
        layer.stored = part
    layers[0].others = layers[1:]
    layers[0].whole = tuple(parts), whole
