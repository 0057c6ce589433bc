"""skinny_linear against the library's linear layer in float32, on the layers of a 308M model."""

import pytest
import torch

import dllm_kernels as dk

LAYERS = {"square": (1024, 1024), "up": (1024, 2816), "down": (2816, 1024)}  # inputs, outputs


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize("layer", LAYERS)
def test_skinny_linear(compare, pick, layer, rows, kind):
    inputs, outputs = pick(LAYERS[layer], (64, 96))
    wide = torch.randn(outputs, inputs) / inputs**0.5
    weight, scales, tolerance = wide, None, 1e-4
    if kind == "bfloat16":
        weight, tolerance = wide.bfloat16(), 2e-2
    elif kind == "int8":
        (weight, scales), tolerance = dk.quantize_weight(wide), 1e-1
    packed = dk.pack_weight(weight, scales)
    compare(
        lambda x: dk.skinny_linear(x, packed),
        {"float32 linear": lambda x: torch.nn.functional.linear(x, wide)},
        inputs=lambda: (torch.randn(rows, inputs),),
        title=f"skinny_linear, {rows} rows, {inputs} → {outputs}, {kind} weight",
        flops=2 * rows * inputs * outputs,
        bytes=weight.element_size() * inputs * outputs,
        tolerance={"atol": tolerance, "rtol": tolerance},
    )
