"""rms_norm, silu_mul and rotate_half on the GPU beside float64, forward and backward."""

from functools import partial

import pytest
import torch

import dllm_kernels as dk
from tests.ops.layer_kernel_helpers import (
    DTYPES,
    EPS,
    check_norm_gradients,
    check_rms_norm,
    check_rotate_half,
    check_silu_mul,
    gradients,
    normed,
    of_oracle,
    rows,
)

hopper, hardware = pytest.mark.hopper, pytest.mark.hardware
# On Hopper launches overlap; the kernels are the same.
GENERATIONS = [pytest.param("Hopper", marks=hopper), "Ampere"]
# Widths of one value or 16 bytes to an access, of less than a pass of a CTA and more; the layouts of `rows`.
WIDTHS = [1, 7, 64, 100, 520, 2304, pytest.param(12_288, marks=hardware)]
LAYOUTS = ["dense", "part", "every_other", "swapped"]


def on(gpu, function, *inputs, grads):
    """`gradients` where the CUDA kernels are."""

    def both(*inputs_and_grads):
        return gradients(function, *inputs_and_grads[: len(inputs)], grads=inputs_and_grads[len(inputs) :])

    return gpu(both, *inputs, *grads)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(gpu, generation, width, dtype):
    generator = torch.Generator().manual_seed(width)
    layout = LAYOUTS[width % 4]
    x, residual, grad, grad_sum = (rows(generator, [3, 5], width, dtype, layout) for _ in range(4))
    weight = rows(generator, [], width, dtype)
    check_rms_norm(partial(on, gpu), x, residual, weight, grad, grad_sum)


def test_the_gradient_of_weight_over_many_rows(gpu):
    """Several sums of several rows, the last of fewer."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (rows(generator, [150], 512, torch.float32) for _ in range(2))
    weight = rows(generator, [], 512, torch.float32)
    _, of = on(gpu, lambda x, w: dk.rms_norm(x, w, EPS), x, weight, grads=[grad])
    check_norm_gradients(of, of_oracle(normed, x, weight, grads=[grad])[1], x, weight, grad)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(gpu, generation, width, dtype):
    generator = torch.Generator().manual_seed(width)
    layout = LAYOUTS[(width + 1) % 4]
    gate, up, grad = (rows(generator, [2, 3], width, dtype, layout) for _ in range(3))
    gate[0, 0, 0], gate[1, 0, 0] = 80, -80
    check_silu_mul(partial(on, gpu), gate, up, grad)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [1, 3, 8, 12, 64])
@pytest.mark.parametrize("merged", [False, True])
def test_rotate_half(gpu, generation, half, dtype, merged):
    generator = torch.Generator().manual_seed(half)
    batch, length, counts = 2, 5, (3, 1)

    def heads(count):
        stored = rows(generator, [batch, length, count], 2 * half, dtype, "part" if merged else "dense")
        return stored.transpose(1, 2)

    query, key, grad_query, grad_key = (heads(n) for n in (*counts, *counts))
    cos, sin = (rows(generator, [1 if merged else batch, length], 2 * half, dtype) for _ in range(2))
    check_rotate_half(partial(on, gpu), query, key, cos, sin, [grad_query, grad_key])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_rows_and_no_width(gpu, generation):
    for shape in ((0, 64), (3, 0)):
        x, weight = torch.zeros(shape), torch.ones(shape[1])
        (out,), (grad_x, grad_weight) = on(gpu, dk.rms_norm, x, weight, grads=[x])
        assert out.shape == grad_x.shape == shape and not grad_weight.any() and len(grad_weight) == shape[1]
        (out,), grads = on(gpu, dk.silu_mul, x, x, grads=[x])
        assert all(t.shape == shape for t in (out, *grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_in_any_batch(gpu, dtype):
    generator = torch.Generator().manual_seed(1)
    x, weight = rows(generator, [9], 520, dtype), rows(generator, [], 520, dtype)
    together = gpu(dk.rms_norm, x, weight)
    for some in (slice(0, 1), slice(3, 7), slice(8, 9)):
        assert torch.equal(gpu(dk.rms_norm, x[some], weight), together[some])


def test_bad_input_is_named(gpu):
    with pytest.raises(ValueError, match=r"weight.shape\[0\] must be 8"):
        gpu(dk.rms_norm, torch.zeros(2, 8), torch.zeros(7))
    with pytest.raises(ValueError, match="up must have the shape of gate"):
        gpu(dk.silu_mul, torch.zeros(2, 8), torch.zeros(2, 7))
    heads, angles = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match=r"cos.shape\[1\] must be 3"):
        gpu(dk.rotate_half, heads, heads, angles[:, :2], angles)
