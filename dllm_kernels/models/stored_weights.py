"""Linear layers whose weights are laid out for `skinny_linear`, and stored in fewer bytes.

A step of a cached sampler computes a block of some 32 rows: the time of its linear layers is that of reading
their weights. Activations stay in the model's dtype.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_kernels.models.merged_projections import is_plain_linear
from dllm_kernels.ops.skinny_linear import (
    PackedWeight,
    RowMajorWeight,
    dequantize_weight,
    pack_weight,
    quantize_weight,
)

# How weights are stored; 8-bit kinds have scales. KINDS_ON: by the type of device.
KINDS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
SCALED = {kind: dtype for kind, dtype in KINDS.items() if dtype.itemsize == 1}
KINDS_ON = {"cpu": ("float32", "bfloat16", "int8"), "cuda": tuple(KINDS)}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_PACKINGS = itertools.count()  # weights that layers have had
_ROUNDED_AT_ONCE = 2**17  # numbers, so that they stay in the cache of a core
_ROUNDED_AT_ONCE_ON_CUDA = 2**25


def store_weights(model: nn.Module, kind: str) -> int:
    """Store the weights of linear layers in `model` as `kind` from now on; return the number of layers.

    "float32": as they are, "bfloat16", "int8", "fp8": rounded, the last two with one scale for each output,
    and the vocabulary projection too; fp8 is e4m3, on CUDA. Embeddings, shared weights (for a tied
    vocabulary projection: `store_tied_head`), biases, norms, layers that are not plain nn.Linear and those
    with an adapter of peft, which is merged into a Parameter, stay as they are. Stored weights are no
    Parameters any more: they cannot be trained, but gradients pass through their layers. Memory: one layer
    besides the model.

    Raises ValueError for another kind, a model that is neither on the CPU nor on a CUDA device, one without
    such layers, and for infinities and NaN in int8 and fp8; the model is then as it was.
    """
    check_stored(kind, next(model.parameters()).device)
    found = linear_layers(model, kind)
    for name, module in found.items() if kind in SCALED else ():
        if not module.weight.isfinite().all():
            raise ValueError(f"weights={kind!r}: the weight of {name} holds infinities or NaN")
    for name, module in found.items():
        model.set_submodule(name, StoredLinear.rounded(module, kind))
    return len(found)


def store_tied_head(model: nn.Module, kind: str) -> bool:
    """Give a tied vocabulary projection an 8-bit copy of the embedding; return whether `model` has one now.

    That is a StoredLinear with copies_embedding, in the place of a plain nn.Linear that shares its weight
    with the embedding alone; models without such a projection stay as they are.

    The embedding stays as it is. Its later changes do not reach the copy before `model.tie_weights()`, which
    copies it again. Memory: one byte a weight, and during the call one more.

    kind: "int8" or "fp8". Raises ValueError for another kind, on a device that does not have it, and for
    infinities and NaN; the model is then as it was.
    """
    if kind not in SCALED:
        raise ValueError(f"kind is {kind!r}; the copy of a tied weight is in 8 bits: {', '.join(SCALED)}")
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings() if is_plain_linear(head) else None
    if not isinstance(embedding, nn.Embedding) or head.weight is not embedding.weight:
        return False
    check_stored(kind, head.weight.device)
    owners, places = _uses(model)
    if owners[id(head.weight)] != 2 or places[id(head)] != 1:
        return False
    name = next(name for name, module in model.named_modules() if module is head)
    try:
        copy = StoredLinear.rounded(head, kind)
    except ValueError:
        raise ValueError(f"weights={kind!r}: the weight of {name} holds infinities or NaN") from None
    copy.copies_embedding = True
    model.set_submodule(name, copy)
    return True


def check_stored(kind: str, device: torch.device) -> None:
    """Raise ValueError unless weights can be stored as `kind` on `device`."""
    if kind not in KINDS:
        raise ValueError(f"weights is {kind!r}; allowed: {', '.join(KINDS)}")
    if device.type not in KINDS_ON:
        raise ValueError(f"weights={kind!r} is for models on the CPU or on CUDA, and this one is on {device}")
    if kind not in KINDS_ON[device.type]:
        allowed = ", ".join(KINDS_ON[device.type])
        raise ValueError(
            f"weights={kind!r} is for models on CUDA, and this one is on {device}; allowed there: {allowed}"
        )


def linear_layers(model: nn.Module, kind: str) -> dict[str, nn.Linear]:
    """Return the layers of `model` whose weights can be stored as `kind`, by name; ValueError if none."""
    owners, places = _uses(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapters = (module for module in model.modules() if _ADAPTED & module._modules.keys())
    adapted = {part for adapter in adapters for part in adapter.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if is_plain_linear(module)
        and owners[id(module.weight)] == places[id(module)] == 1
        and (kind in SCALED or module is not head)
        and module not in adapted
    }
    if all(module is head for module in found.values()):
        raise ValueError(
            f"weights={kind!r}: this {type(model).__name__} has no plain nn.Linear beside its vocabulary "
            "projection, such as models with merged projections or with adapters on all layers"
        )
    return found


_ADAPTED = {"base_layer", "original_module"}  # what peft's layers call the one that they stand for


def laid_out(weight: Tensor, scales: Tensor | None) -> PackedWeight | RowMajorWeight:
    """Return a copy of a weight as `skinny_linear` reads it where it is: packed on the CPU, else in rows.

    fp8 is in rows on the CPU too, to be saved and moved.
    """
    weight = weight.detach()
    if weight.device.type == "cpu" and weight.dtype != torch.float8_e4m3fn:
        return pack_weight(weight, scales)
    return RowMajorWeight(weight.clone(memory_format=torch.contiguous_format), _copy_of(scales))


class StoredLinear(nn.Module):
    """A linear layer whose weight is laid out for `skinny_linear`: float32, 16 bits, or 8 with scales.

    The weight is no Parameter and keeps its dtype when the module is moved; another device lays it out anew.
    `state_dict` has it as "weight", and "scales". The bias stays a Parameter. copies_embedding: of a
    vocabulary projection, whether the weight is a rounded copy of the embedding's (`store_tied_head`), which
    checkpoints hold once.
    """

    copies_embedding = False

    def __init__(self, stored: PackedWeight | RowMajorWeight, dtype: torch.dtype, bias: nn.Parameter | None):
        super().__init__()
        self.stored, self.stored_dtype = stored, dtype
        self.out_features, self.in_features = stored.outputs, stored.inputs
        self.bias = bias

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight" and self.copies_embedding:  # transformers' tie_weights
            kind = next(kind for kind, dtype in SCALED.items() if dtype == self.stored_dtype)
            self.stored = laid_out(*round_weight(value.detach(), kind, value.dtype))
            self.out_features, self.in_features = self.stored.outputs, self.stored.inputs
            return
        if name == "stored":  # what is kept for a model compares this number: addresses come again
            super().__setattr__("packing", next(_PACKINGS))
        super().__setattr__(name, value)

    @classmethod
    def of(
        cls, weight: Tensor, scales: Tensor | None = None, bias: nn.Parameter | None = None
    ) -> StoredLinear:
        """Return a layer that stores a copy of `weight`, in eval mode.

        weight: float32, bfloat16 or float16 [out, in], or int8 [out, in] with scales: float32 [out, groups],
        one for each in / groups inputs, or float8_e4m3fn with one for each output, which multiplies on CUDA
        alone. bias: [out]. Raises ValueError for other dtypes and shapes.
        """
        quantized = weight.dtype in SCALED.values()
        if weight.dim() != 2 or not (quantized or weight.dtype in FLOATS):
            raise ValueError(
                f"weight is {weight.dtype} {[*weight.shape]}; it must be float32, bfloat16, float16, int8 "
                "or float8_e4m3fn [out, in]"
            )
        if quantized != (scales is not None):
            raise ValueError(f"a weight in {weight.dtype} comes {'with' if quantized else 'without'} scales")
        if quantized:
            _check_scales(weight, scales)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {[*bias.shape]}; it must be {[*weight.shape[:1]]}")
        return cls(laid_out(weight, scales), weight.dtype, bias).eval()

    @classmethod
    def rounded(cls, linear: nn.Linear, kind: str) -> StoredLinear:
        """Return `linear` with its weight rounded to `kind`; 8-bit kinds have one scale per output."""
        weight = linear.weight.detach()
        return cls.of(*round_weight(weight, kind, weight.dtype), linear.bias).train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] as it is stored. On the CPU it is a new tensor, and what is written there is
        lost: `load_state_dict` changes a weight."""
        return self.parts()[0]

    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight [out, in], scales [out, groups] or None), as `of` takes them."""
        weight, scales = self.stored.unpacked()
        return weight.to(self.stored_dtype), scales

    def stands_for(self, weight: Tensor) -> bool:
        """Return whether the 8-bit weight is `weight` [out, in], rounded: each number within half a step.

        `weight` may have been cast to 16 bits since.
        """
        stored, scales = self.parts()
        if weight.shape != stored.shape:
            return False
        for some in _row_ranges(weight):
            found, whole = dequantize_weight(stored[some], scales[some]), weight[some].detach().float()
            if self.stored_dtype == torch.int8:
                half_step = scales[some] / 2
            else:  # 3 bits after the point, and the smallest numbers are multiples of 2^-9
                half_step = torch.maximum(found.abs() / 16, scales[some] * 2.0**-10)
            if not ((found - whole).abs() <= 1.001 * half_step + whole.abs() * 2.0**-8).all():
                return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., in] -> [..., out]. Where a gradient is recorded, x is not quantized."""
        trained = self.bias is not None and self.bias.requires_grad
        if torch.is_grad_enabled() and (x.requires_grad or trained):
            weight, scales = self.parts()
            if scales is not None:
                weight = dequantize_weight(weight, scales)
            return F.linear(x, weight.to(x.dtype), self.bias)
        return self.stored.linear(x, self.bias)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        here = self.stored[0].device
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        if there != here:
            weight, scales = self.parts()
            self.stored = laid_out(weight.to(there), None if scales is None else scales.to(there))
        return self

    def extra_repr(self) -> str:
        kind = str(self.stored_dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kind}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight, scales = self.parts()
        destination[prefix + "weight"] = weight
        if scales is not None:
            destination[prefix + "scales"] = scales

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        rest = dict(state_dict)
        names = ("weight", "scales") if self.stored_dtype in SCALED.values() else ("weight",)
        given = [rest.pop(prefix + name, None) for name in names]
        missing += [prefix + name for name, part in zip(names, given, strict=True) if part is None and strict]
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if any(part is None for part in given):
            return
        if given[0].shape != (self.out_features, self.in_features) or given[0].dtype != self.stored_dtype:
            errors.append(
                f"{prefix}weight is {given[0].dtype} {[*given[0].shape]}; expected {self.stored_dtype} "
                f"{[self.out_features, self.in_features]}"
            )
            return
        here = self.stored[0].device
        self.stored = type(self).of(*(part.to(here) for part in given)).stored


def round_weight(
    weight: Tensor,
    kind: str,
    dtype: torch.dtype,
    scales: Tensor | None = None,
    empty: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (weight, scales) as `StoredLinear.of` takes them, of a weight [out, in].

    weight: float, cast to `dtype` first, or in 8 bits with its scales. kind: one of KINDS; a float weight has
    one scale per output in 8 bits. empty: makes the weight that is returned, on its device. Memory: a few
    rows besides the result. ValueError for infinities and NaN in 8 bits.
    """
    kept = KINDS[kind]
    if weight.dtype == kept and (scales is not None or torch.promote_types(kept, dtype) == dtype):
        return weight, scales  # no cast changes anything
    stored = (empty or weight.new_empty)(weight.shape, dtype=kept)
    made = torch.empty(len(weight), 1, device=weight.device) if kind in SCALED else None
    for some in _row_ranges(weight):
        part = weight[some].to(dtype) if scales is None else dequantize_weight(weight[some], scales[some])
        if made is None:
            stored[some] = part
        else:
            stored[some], made[some] = quantize_weight(part, dtype=kept)
    return stored, made


def _row_ranges(weight: Tensor) -> Iterator[slice]:
    """Yield ranges of rows of a weight [out, in] that are worked on at once."""
    at_once = _ROUNDED_AT_ONCE if weight.device.type == "cpu" else _ROUNDED_AT_ONCE_ON_CUDA
    rows = max(1, at_once // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def _uses(model: nn.Module) -> tuple[Counter, Counter]:
    """Return (in how many modules each parameter is, in how many places each module is), by id."""
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    return owners, places


def _copy_of(scales: Tensor | None) -> Tensor | None:
    return None if scales is None else scales.detach().clone(memory_format=torch.contiguous_format)


def _check_scales(weight: Tensor, scales: Tensor) -> None:
    rows, inputs = weight.shape
    fits = scales.dim() == 2 and len(scales) == rows and scales.shape[1] and not inputs % scales.shape[1]
    if scales.dtype != torch.float32 or not fits:
        raise ValueError(
            f"scales is {scales.dtype} {[*scales.shape]}; it must be float32 [{rows}, groups], and groups "
            f"must divide the {inputs} inputs"
        )
    if weight.dtype == torch.float8_e4m3fn and scales.shape[1] != 1:
        raise ValueError(f"scales is {[*scales.shape]}; of float8_e4m3fn it must be [{rows}, 1]")
