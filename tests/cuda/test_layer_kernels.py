"""rms_norm, silu_mul and rotate_half on the GPU beside float64, forward and backward."""

import pytest
import torch

import dllm_kernels as dk
from tests.ops.test_layer_kernels import EPS, check, compare_gradients, gradients, normed, rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
hopper, hardware = pytest.mark.hopper, pytest.mark.hardware
# On Hopper launches overlap; the kernels are the same.
GENERATIONS = [pytest.param("Hopper", marks=hopper), "Ampere"]
# Widths of one value or 16 bytes to an access, of less than a pass of a CTA and more; the layouts of `rows`.
WIDTHS = [1, 7, 64, 100, 520, 2304, pytest.param(12_288, marks=hardware)]
LAYOUTS = ["dense", "part", "every_other", "swapped"]


def on(gpu, function):
    """`function` and its gradients where the CUDA kernels are."""

    def both(*inputs_and_grads, inputs):
        return gradients(function, *inputs_and_grads[:inputs], grads=inputs_and_grads[inputs:])

    return lambda *inputs, grads: gpu(both, *inputs, *grads, inputs=len(inputs))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(gpu, generation, width, dtype):
    generator = torch.Generator().manual_seed(width)
    layout = LAYOUTS[width % 4]
    x, residual, grad, grad_sum = (rows(generator, [3, 5], width, dtype, layout) for _ in range(4))
    weight = rows(generator, [], width, dtype)
    wide = [t.double() for t in (x, weight)]
    (out,), of = on(gpu, lambda x, w: dk.rms_norm(x, w, EPS))(x, weight, grads=[grad])
    (expected,), of_expected = gradients(normed, *wide, grads=[grad.double()])
    check(out, expected.detach(), dtype)
    compare_gradients(of, of_expected, x, weight, grad, dtype)

    (out, total), of = on(gpu, lambda x, r, w: dk.rms_norm(x, w, EPS, r))(
        x, residual, weight, grads=[grad, grad_sum]
    )
    assert torch.equal(total, x + residual)
    (expected,), of_expected = gradients(normed, total.double(), wide[1], grads=[grad.double()])
    check(out, expected.detach(), dtype)
    assert torch.equal(of[0], of[1])
    with_sum = of_expected[0] + grad_sum.double(), of_expected[1]
    compare_gradients(of[1:], with_sum, total, weight, grad, dtype)


def test_the_gradient_of_weight_over_many_rows(gpu):
    """Several sums of several rows, the last of fewer."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (rows(generator, [150], 512, torch.float32) for _ in range(2))
    weight = rows(generator, [], 512, torch.float32)
    _, of = on(gpu, lambda x, w: dk.rms_norm(x, w, EPS))(x, weight, grads=[grad])
    _, of_expected = gradients(normed, x.double(), weight.double(), grads=[grad.double()])
    compare_gradients(of, of_expected, x, weight, grad, torch.float32)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(gpu, generation, width, dtype):
    generator = torch.Generator().manual_seed(width)
    layout = LAYOUTS[(width + 1) % 4]
    gate, up, grad = (rows(generator, [2, 3], width, dtype, layout) for _ in range(3))
    gate[0, 0, 0], gate[1, 0, 0] = 80, -80
    (out,), of = on(gpu, dk.silu_mul)(gate, up, grads=[grad])
    (expected,), of_expected = gradients(
        lambda g, u: g / (1 + (-g).exp()) * u, gate.double(), up.double(), grads=[grad.double()]
    )
    check(out, expected.detach(), dtype)
    size = float(grad.double().abs().max() * up.double().abs().max())
    for got, oracle in zip(of, of_expected, strict=True):
        check(got, oracle, dtype, terms=size)


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
    got, of = on(gpu, dk.rotate_half)(query, key, cos, sin, grads=[grad_query, grad_key])

    def rotated(q, k, cos, sin):
        turned = [torch.cat((-x[..., half:], x[..., :half]), -1) for x in (q, k)]
        cos, sin = cos[:, None], sin[:, None]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    wide = [t.double() for t in (query, key, cos, sin)]
    expected, of_expected = gradients(rotated, *wide, grads=[grad_query.double(), grad_key.double()])
    for out, oracle in zip((*got, *of), (*expected, *of_expected), strict=True):
        check(out, oracle.detach(), dtype, terms=30 * sum(counts))
    assert got[0].transpose(1, 2).is_contiguous() and got[1].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_rows_and_no_width(gpu, generation):
    for shape in ((0, 64), (3, 0)):
        x, weight = torch.zeros(shape), torch.ones(shape[1])
        (out,), (grad_x, grad_weight) = on(gpu, dk.rms_norm)(x, weight, grads=[x])
        assert out.shape == grad_x.shape == shape and not grad_weight.any() and len(grad_weight) == shape[1]
        (out,), grads = on(gpu, dk.silu_mul)(x, x, grads=[x])
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
