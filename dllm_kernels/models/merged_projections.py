"""Projections of one input as one product: queries, keys and values; gate and up.

`merge_projections` lays the weights of such a group one after the other in memory. Every module keeps its
place, its name and its Parameters, which become row slices of one storage: state_dict, checkpoints and
optimizers see the stock model. The first module of a group multiplies its input by the rows of all. It
attaches the others' parts to the input tensor, where they find them when called with that very tensor; unused
parts are freed with the input.

A module computes separately, as nn.Linear does, unless the result is certain to be the same: with gradients
enabled or under autocast, for another input or one that was changed in between, and if weights have moved or
are no longer plain Parameters. Compiled code and inference mode do not notice changes of an input in between,
since torch does not count them there.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Modules of one parent that are called with the same input, in the order of their calls.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral and most others
    ("query", "key", "value"),  # BERT, RoBERTa
    ("gate_proj", "up_proj"),
)

_PARTS = "_dllm_parts"  # attribute of an input: parts that its projections have yet to fetch


def merge_projections(model: nn.Module) -> int:
    """Compute each group of projections in `model` as one product from now on; return how many there are.

    Groups are found by name (`GROUPS`). A group is merged if all its modules are plain nn.Linear without
    hooks, with the same input size, dtype, device and presence of a bias, and weights that no other module
    uses. A model without such groups (with fused projections, say) does not change. Copying a model, or
    moving it to
    another dtype or device, moves its weights: its modules then compute separately until this is called
    again.
    Memory: one group besides the model.
    """
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    merged = 0
    for parent in model.modules():
        for names in GROUPS:
            group = tuple(parent._modules.get(name) for name in names)
            if not _is_merged(group):
                if not _can_merge(group, owners):
                    continue
                for module in group:
                    module.__class__, module.others = MergedLinear, ()
                group[0].others = group[1:]
            _lay_together(group)
            merged += 1
    return merged


def is_plain_linear(module: object) -> bool:
    """Return whether `module` computes x · weightᵀ + bias alone: no adapter, quantization or hook."""
    return type(module) is nn.Linear and runs_as_its_class(module)


def runs_as_its_class(module: nn.Module) -> bool:
    """Return whether a call of `module` runs the forward of its class alone, without hooks."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module)  # where accelerate puts its own


class MergedLinear(nn.Linear):
    """One of a group of nn.Linear that are called with the same input.

    others: of the first one, those that follow it; of these, ().
    """

    others: tuple[MergedLinear, ...]

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] -> [..., out], by a slice of the group's product if there is one."""
        output = None
        if not torch.is_grad_enabled():
            output = _first_part(x, (self, *self.others)) if self.others else own_part(x, self)
        return F.linear(x, self.weight, self.bias) if output is None else output


# ---- the product and its parts -----------------------------------------------------------------------------
def _first_part(x: Tensor, group: tuple[MergedLinear, ...]) -> Tensor | None:
    """Return the part of the group's first module, and attach the others' to `x`."""
    weights, biases = _parameters(group)
    as_merged = len(biases) in (0, len(group)) and _are_plain(weights + biases)
    if not as_merged or _under_autocast(x):
        return None
    if torch.compiler.is_compiling():
        product = torch.ops.dllm_kernels.merged_linear(x, weights, biases)
    else:
        product = _merged_product(x, weights, biases)
    if product is None:
        return None
    return attach_parts(x, group, product)


def attach_parts(x: Tensor, group: tuple[nn.Module, ...], product: Tensor) -> Tensor:
    """Return the part of a product [..., sum of out_i] that is the first module's, and attach the others'
    to its input x, for `own_part`."""
    first, *others = torch.split_with_sizes(product, [module.out_features for module in group], dim=-1)
    parts = getattr(x, _PARTS, None)
    if parts is None:
        parts = {}
        setattr(x, _PARTS, parts)
    version = _version(x)
    for module, part in zip(group[1:], others, strict=True):
        parts[module] = version, part
    return first


def own_part(x: Tensor, module: nn.Module) -> Tensor | None:
    """Return the part attached to `x`, if `x` has not changed since."""
    parts = getattr(x, _PARTS, None)
    if parts is None or module not in parts:
        return None
    version, part = parts.pop(module)
    return part if version == _version(x) else None


def _version(x: Tensor) -> int | None:
    """Return a count of in-place changes; None if changes are not counted."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _merged_product(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor | None:
    """Multiply x [..., in] by weights [out_i, in], add biases [out_i] if any -> [..., sum of out_i].

    None if the weights are not contiguous in one storage.
    """
    weight, bias = _joined(weights), _joined(biases) if biases else None
    if weight is None or (biases and bias is None):
        return None
    return F.linear(x, weight, bias)


# For compiled code, which must not depend on where the weights lay when it was compiled.
_library = torch.library.Library("dllm_kernels", "FRAGMENT")
_library.define("merged_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor")


@torch.library.impl(_library, "merged_linear", "CompositeExplicitAutograd")
def _merged_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    product = _merged_product(x, weights, biases)
    return _separate_products(x, weights, biases) if product is None else product


@torch.library.register_fake("dllm_kernels::merged_linear", lib=_library)
def _separate_products(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    biases = biases or [None] * len(weights)
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)


# ---- weights in memory -------------------------------------------------------------------------------------
def _parameters(group: tuple[nn.Linear, ...]) -> tuple[list[Tensor | None], list[Tensor]]:
    """Return weights (None: computed from others) and biases, if any."""
    weights = [module._parameters.get("weight") for module in group]
    biases = [module._parameters.get("bias") for module in group]
    return weights, [bias for bias in biases if bias is not None]


def _are_plain(parameters: list[Tensor | None]) -> bool:
    return all(type(parameter) is nn.Parameter for parameter in parameters)


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Return the tensor whose rows are those of `parts`, if they are contiguous in one storage."""
    first, rows = parts[0], 0
    address, stride, dtype = first.data_ptr(), first.stride(), first.dtype
    for part in parts:
        if part.data_ptr() != address or part.stride() != stride or part.dtype != dtype:
            return None
        address += part.nbytes
        rows += part.shape[0]
    storage = first.untyped_storage()
    if address > storage.data_ptr() + storage.nbytes() or not first.is_contiguous():
        return None
    return first.as_strided((rows, *first.shape[1:]), stride)


def _lay_together(group: tuple[nn.Linear, ...]) -> None:
    """Lay weights one after the other, and biases, unless they lie so already or differ in kind."""
    for parts in filter(None, _parameters(group)):
        if not _are_plain(parts) or len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
            continue
        if _joined(parts) is not None:
            continue
        whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
        if whole.is_cuda:
            torch.cuda.empty_cache()  # the freed pieces are too small for the next group


# ---- which groups ------------------------------------------------------------------------------------------
def _is_merged(group: tuple[nn.Module | None, ...]) -> bool:
    return all(type(module) is MergedLinear for module in group) and group[0].others == group[1:]


def _can_merge(group: tuple[nn.Module | None, ...], owners: Counter) -> bool:
    """Return whether a group can be merged. owners: number of modules per id of a Parameter."""
    if not all(is_plain_linear(module) for module in group):
        return False
    weights, biases = _parameters(group)
    return (
        len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) == 1
        and len(biases) in (0, len(group))
        and _are_plain(weights + biases)
        and all(owners[id(parameter)] == 1 for parameter in weights + biases)
    )
