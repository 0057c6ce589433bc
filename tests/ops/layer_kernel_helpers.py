"""Small kernels of a layer in float64, and comparisons of outputs and gradients with them.

`run(function, *inputs, grads=)` returns outputs and gradients as `gradients` does, wherever the kernels are.
"""

import torch

import dllm_kernels as dk

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(generator, shape, width, dtype, layout="dense") -> torch.Tensor:
    """Random numbers [*shape, width]: dense, a part of wider rows as of a merged projection, with strides in
    the last dimension, or with the leading dimensions stored in another order."""
    wide = {"part": width + 5, "every_other": 2 * width}.get(layout, width)
    order = shape[::-1] if layout == "swapped" else shape
    x = (torch.randn(*order, wide, generator=generator) * 2).to(dtype)
    if layout == "swapped":
        return x.permute(*range(len(shape))[::-1], len(shape))
    return x[..., 2 : 2 + width] if layout == "part" else x[..., : 2 * width : 2] if width < wide else x


def gradients(function, *inputs, grads):
    """Return outputs, and gradients of `inputs` for the gradients `grads` of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, torch.autograd.grad(outputs, leaves, grads)


# ---- the oracles -------------------------------------------------------------------------------------------
def normed(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def gated(gate, up):
    return gate / (1 + (-gate).exp()) * up


def rotated(query, key, cos, sin):
    half = cos.shape[-1] // 2
    turned = [torch.cat((-x[..., half:], x[..., :half]), -1) for x in (query, key)]
    cos, sin = cos[:, None], sin[:, None]
    return query * cos + turned[0] * sin, key * cos + turned[1] * sin


def of_oracle(function, *inputs, grads):
    """Return outputs and gradients in float64."""
    outputs, of = gradients(function, *(x.double() for x in inputs), grads=[grad.double() for grad in grads])
    return [output.detach() for output in outputs], of


# ---- comparisons -------------------------------------------------------------------------------------------
def check(got, expected, dtype, terms=1.0):
    """Compare with a float64 oracle: two roundings to `dtype`, float32 sums of numbers of size `terms`."""
    assert got.dtype == dtype and got.shape == expected.shape
    eps = torch.finfo(dtype).eps
    near = 2 * eps * expected.abs() + 2e-6 * (expected.abs() + terms)
    if dtype != torch.float32:
        near += 2 * eps * terms
    assert bool(((got.double() - expected).abs() <= near).all())


def check_rms_norm(run, x, residual, weight, grad, grad_sum):
    """Compare rms_norm, alone and of a sum with `residual`."""
    dtype = x.dtype
    (out,), of = run(lambda x, w: dk.rms_norm(x, w, EPS), x, weight, grads=[grad])
    (expected,), of_expected = of_oracle(normed, x, weight, grads=[grad])
    check(out, expected, dtype)
    check_norm_gradients(of, of_expected, x, weight, grad)

    (out, total), of = run(
        lambda x, r, w: dk.rms_norm(x, w, EPS, r), x, residual, weight, grads=[grad, grad_sum]
    )
    total = total.detach()
    assert torch.equal(total, x + residual)
    (expected,), of_expected = of_oracle(normed, total, weight, grads=[grad])
    check(out, expected, dtype)
    assert torch.equal(of[0], of[1])
    with_sum = of_expected[0] + grad_sum.double(), of_expected[1]
    check_norm_gradients(of[1:], with_sum, total, weight, grad)


def check_norm_gradients(got, expected, x, weight, grad):
    """Compare the gradients of x and weight."""
    if not x.numel():
        assert not got[1].any() and got[0].shape == x.shape
        return
    x, weight = x.detach(), weight.detach()
    scale = float((1 / (x.double().square().mean(-1) + EPS).sqrt()).max())
    size = float(grad.double().abs().max()) * (1 + float(weight.double().abs().max())) * (scale + 1)
    check(got[0], expected[0], x.dtype, terms=4 * size)
    total = float((grad.double().abs() * x.double().abs() * scale).reshape(-1, x.shape[-1]).sum(0).max())
    check(got[1], expected[1], x.dtype, terms=2 * total)


def check_silu_mul(run, gate, up, grad):
    (out,), of = run(dk.silu_mul, gate, up, grads=[grad])
    (expected,), of_expected = of_oracle(gated, gate, up, grads=[grad])
    check(out, expected, gate.dtype)
    size = float(grad.double().abs().max() * up.double().abs().max()) if grad.numel() else 0
    for got, oracle in zip(of, of_expected, strict=True):
        check(got, oracle, gate.dtype, terms=size)


def check_rotate_half(run, query, key, cos, sin, grads):
    got, of = run(dk.rotate_half, query, key, cos, sin, grads=grads)
    expected, of_expected = of_oracle(rotated, query, key, cos, sin, grads=grads)
    for out, oracle in zip((*got, *of), (*expected, *of_expected), strict=True):
        check(out, oracle, query.dtype, terms=30 * (query.shape[1] + key.shape[1] + 1))
    assert got[0].transpose(1, 2).is_contiguous() and got[1].transpose(1, 2).is_contiguous()
