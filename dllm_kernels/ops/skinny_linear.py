"""A linear layer for few rows, with float or 8-bit weights that are packed once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_optional_tensors, check_tensors, integer
from ._autograd import register_no_derivative
from ._fake import register_fake

_ops = torch.ops.dllm_kernels
_packed_linear = _ops.packed_linear.default
_row_major_linear = _ops.skinny_linear.default

FEW_ROWS = 64  # that read a weight together on CUDA


class PackedWeight(NamedTuple):
    """A weight [outputs, inputs] in the order in which `skinny_linear` streams it; `pack_weight` makes it.

    data: [panels, units, 16, inputs of a unit], panels of 16 outputs: float32 units of one input, bfloat16
    units of two, or uint8 units of four (int8 + 128). scales: of int8, float32 [groups, 16 * panels], or
    None. Zeros stand for what is missing in the last unit and in the last panel.
    """

    data: Tensor
    scales: Tensor | None
    outputs: int
    inputs: int

    def unpacked(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight [outputs, inputs], scales [outputs, groups] or None), as `pack_weight` took them,
        but float32 for float16."""
        panels, units, width, step = self.data.shape
        rows = self.data.transpose(1, 2).reshape(panels * width, units * step)
        weight = rows[: self.outputs, : self.inputs]
        if self.scales is None:
            return weight.contiguous(), None
        return (weight - 128).view(torch.int8), self.scales[:, : self.outputs].t().contiguous()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `skinny_linear` of this weight, without its checks in Python: a small model calls this a
        hundred times in a step of a millisecond."""
        return _packed_linear(x, self.data, self.outputs, bias, self.scales)

    @property
    def groups(self) -> int | None:
        """Scales of an output; None without scales."""
        return None if self.scales is None else len(self.scales)

    @property
    def ends_in_a_panel(self) -> bool:
        """Whether the outputs fill all panels, so that those of another weight can follow."""
        return self.outputs % self.data.shape[2] == 0

    def followed_by(self, *others: PackedWeight) -> tuple[PackedWeight, list[PackedWeight]]:
        """Return weights of equal kind, each but the last ending in a panel, as one, and as parts of it."""
        weights = (self, *others)
        scales = [weight.scales for weight in weights if weight.scales is not None]
        whole = PackedWeight(
            torch.cat([weight.data for weight in weights]),
            torch.cat(scales, dim=1) if scales else None,
            sum(weight.outputs for weight in weights),
            self.inputs,
        )
        parts = whole.data.split([len(weight.data) for weight in weights])
        return whole, [weight._replace(data=data) for weight, data in zip(weights, parts, strict=True)]


class RowMajorWeight(NamedTuple):
    """A weight [outputs, inputs] as CUDA reads it: dense rows, of int8 and e4m3 with their scales.

    scales: float32 [outputs, groups], or None.
    """

    weight: Tensor
    scales: Tensor | None

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def groups(self) -> int | None:
        """Scales of an output; None without scales."""
        return None if self.scales is None else self.scales.shape[1]

    @property
    def ends_in_a_panel(self) -> bool:
        """True: there are no panels that the outputs would have to fill."""
        return True

    def unpacked(self) -> RowMajorWeight:
        """Return (weight, scales), as PackedWeight does."""
        return self

    def followed_by(self, *others: RowMajorWeight) -> tuple[RowMajorWeight, list[RowMajorWeight]]:
        """Return weights of equal kind as one, and as parts of it, as PackedWeight does."""
        weights = (self, *others)
        scales = [weight.scales for weight in weights if weight.scales is not None]
        whole = RowMajorWeight(
            torch.cat([weight.weight for weight in weights]), torch.cat(scales) if scales else None
        )
        parts = whole.weight.split([weight.outputs for weight in weights])
        return whole, [weight._replace(weight=rows) for weight, rows in zip(weights, parts, strict=True)]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x · weightᵀ + bias by the faster way for as many rows.

        `skinny_linear` reads the weight once for FEW_ROWS rows. More rows of a float weight are the
        library's product, and so are those of float32 with int8, which is dequantized for the moment.
        """
        weight, scales = self
        if x.shape[:-1].numel() > FEW_ROWS:
            if scales is not None and weight.dtype == torch.int8 and x.dtype == torch.float32:
                weight, scales = dequantize_weight(weight, scales), None
            if scales is None:
                return F.linear(x, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
        return _row_major_linear(x, weight, bias, scales)


def pack_weight(weight: Tensor, scales: Tensor | None = None) -> PackedWeight:
    """Return `weight` as `skinny_linear` reads it fastest: pack once, multiply often.

    weight: [outputs, inputs] on the CPU, float32, bfloat16, float16 (packed as float32), or int8 with
    `scales`, float32 [outputs, groups]. There is no derivative. Raises TypeError for arguments that are not
    Tensors, ValueError for other shapes, dtypes and devices.
    """
    check_tensors(weight=weight)
    check_optional_tensors(scales=scales)
    _check_on_cpu("pack_weight", weight=weight)
    if (weight.dtype == torch.int8) != (scales is not None):
        needs = "an int8 weight needs scales" if scales is None else "scales go with an int8 weight"
        raise ValueError(f"pack_weight: {needs}")
    data = _ops.pack_weight(weight)
    outputs, inputs = weight.shape
    if scales is not None:
        if scales.dim() != 2 or len(scales) != outputs or scales.dtype != torch.float32:
            raise ValueError(
                f"pack_weight: scales must be float32 [{outputs}, groups], got {scales.dtype} "
                f"{[*scales.shape]}"
            )
        scales = F.pad(scales.detach().t(), (0, len(data) * 16 - outputs)).contiguous()
    return PackedWeight(data, scales, outputs, inputs)


def skinny_linear(
    x: Tensor,
    weight: Tensor | PackedWeight | RowMajorWeight,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
) -> Tensor:
    """Return x · weightᵀ + bias; the weight is read once, which is what 1 to 64 rows of x wait for.

    x: [..., inputs], float32, bfloat16 or float16; the result [..., outputs] has its dtype.
    weight: a PackedWeight, or [outputs, inputs] in float32, bfloat16, float16, or int8 with `scales`, float32
    [outputs, groups] (see `quantize_weight`), which every call packs. bias: [outputs], of any float type.
    Sums are float32, and a row's result does not depend on the rows beside it. More rows are about as fast as
    a library's product.

    int8: every row of x is quantized symmetrically to its largest magnitude, products and sums of bytes are
    exact (VNNI where the processor has it), and out = s_x Σ_g s_g Σ x_i w_i (W8A8, as LLM.int8() without
    outliers [Dettmers et al. 2022]). A row that is not finite gives NaN.

    On CUDA weights are read as they are, not packed, and int8 is widened, exactly: x is not quantized
    (W8A16, or W8A32 where x is float32). There a weight may also be float8_e4m3fn with scales [outputs, 1]:
    every row of x is divided by a scale, its largest magnitude by 448, and rounded to e4m3, on every GPU and
    in every dtype of x (W8A8); sums of the products are float32. Hopper multiplies by CUTLASS with such a
    weight, and more than 64 rows by int8, where the library has CUTLASS (`dllm info`), x is 16-bit, inputs
    are a multiple of 16, outputs one of 8 and bias has the dtype of x; 64 rows or fewer then may be summed in
    another order than more.

    There is no derivative: a backward pass raises NotImplementedError. Raises TypeError for arguments that
    are not Tensors, ValueError for other shapes, dtypes and devices.
    """
    if isinstance(weight, RowMajorWeight):
        if scales is not None:
            raise ValueError("skinny_linear: scales are those of the RowMajorWeight")
        return weight.linear(x, bias)
    packed = weight if isinstance(weight, PackedWeight) else None
    check_tensors(x=x, weight=packed.data if packed else weight)
    check_optional_tensors(bias=bias, scales=scales)
    if packed is None:
        return _ops.skinny_linear(x, weight, bias, scales)
    _check_on_cpu("skinny_linear", x=x)
    if scales is not None:
        raise ValueError("skinny_linear: scales are those of the packed weight; pass them to pack_weight")
    if x.dim() and x.shape[-1] != packed.inputs:
        raise ValueError(
            f"skinny_linear: weight.shape[1] must be {x.shape[-1]} (the inputs of x), got {packed.inputs}"
        )
    return _ops.packed_linear(x, packed.data, packed.outputs, bias, packed.scales)


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return silu(x · gateᵀ + bias[0]) · (x · upᵀ + bias[1]), for x [..., inputs] -> [..., outputs].

    weight: of `interleaved`. bias: [2, outputs]. Sums and the product are float32, however x is stored.
    """
    bias = None if bias is None else bias.flatten()
    return _ops.packed_gated_linear(x, weight.data, weight.outputs, bias, weight.scales)


def interleaved(gate: PackedWeight, up: PackedWeight) -> PackedWeight:
    """Return two weights of equal kind and shape as `gated_linear` reads them: their panels alternate."""
    data = torch.stack([gate.data, up.data], dim=1).flatten(0, 1)
    scales = None
    if gate.scales is not None and up.scales is not None:
        panels = [scales.unflatten(1, (-1, 16)) for scales in (gate.scales, up.scales)]
        scales = torch.stack(panels, dim=2).flatten(1)
    return PackedWeight(data, scales, gate.outputs, gate.inputs)


def _check_on_cpu(name: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.is_cuda:
            raise ValueError(
                f"{name}: {argument} must be on the CPU, got cuda; use torch.nn.functional.linear there"
            )


# The largest magnitude of the dtypes that weights are quantized to.
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


def quantize_weight(
    weight: Tensor, group_size: int | None = None, *, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Return a weight in 8 bits [outputs, inputs] and its float32 scales [outputs, groups]: w ≈ w8 · scale.

    Symmetric, to nearest: the largest magnitude of a row, or of each `group_size` inputs of it, becomes 127.
    No scale is denormal: it would have too few bits, so that rows near 0 have the smallest normal number.
    weight: [outputs, inputs], any float dtype. group_size: a multiple of 4 that divides the inputs. dtype:
    torch.int8, or torch.float8_e4m3fn, with one scale for each row, whose largest magnitude becomes 448.
    Raises TypeError, or ValueError for other shapes, dtypes and group sizes, and for infinities and NaN.
    """
    check_tensors(weight=weight)
    if dtype not in LARGEST:
        raise ValueError(f"quantize_weight: dtype is {dtype!r}; allowed: {', '.join(map(str, LARGEST))}")
    if dtype != torch.int8 and group_size is not None:
        raise ValueError(f"quantize_weight: group_size has no meaning with dtype={dtype}")
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be a float Tensor, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"quantize_weight: weight must be [outputs, inputs], got shape {list(weight.shape)}")
    inputs = weight.shape[1]
    size = max(inputs, 1) if group_size is None else integer("group_size", group_size, 1)
    if group_size is not None and (size % 4 or inputs % size):
        raise ValueError(
            f"quantize_weight: group_size must be a multiple of 4 that divides the {inputs} inputs, "
            f"got {size}"
        )
    rows = weight.detach().float()
    groups = rows.unflatten(1, (inputs // size, size)) if inputs else rows.new_zeros(len(rows), 1, 1)
    scales = (groups.abs().amax(2) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    if not scales.isfinite().all():  # as the scale of a group that holds either is not
        raise ValueError("quantize_weight: weight holds infinities or NaN")
    steps = groups / scales[..., None]
    steps = (steps.round() if dtype == torch.int8 else steps).clamp(-LARGEST[dtype], LARGEST[dtype])
    return steps.to(dtype).flatten(1)[:, :inputs].contiguous(), scales


def dequantize_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Return int8 or e4m3 [outputs, inputs] times scales [outputs, groups], in float32."""
    numbers = weight if weight.dtype == torch.int8 else weight.float()
    return (numbers.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


@register_fake("skinny_linear")
def _(x, weight, bias=None, scales=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_fake("packed_gated_linear")
@register_fake("packed_linear")
def _(x, weight, outputs, bias=None, scales=None):
    return x.new_empty((*x.shape[:-1], outputs))


@register_fake("pack_weight")
def _(weight):
    dtype = {torch.int8: torch.uint8, torch.bfloat16: torch.bfloat16}.get(weight.dtype, torch.float32)
    inputs = 4 // dtype.itemsize  # of a unit
    panels, units = -(-weight.shape[0] // 16), -(-weight.shape[1] // inputs)
    return weight.new_empty((panels, units, 16, inputs), dtype=dtype)


_REMEDY = "call it under torch.no_grad(), or use torch.nn.functional.linear"
for _name in ("skinny_linear", "packed_linear", "packed_gated_linear", "pack_weight"):
    register_no_derivative(_name, _REMEDY)
