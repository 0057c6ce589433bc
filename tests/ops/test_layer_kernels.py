"""rms_norm, silu_mul and rotate_half beside float64, and beside the modules of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama import modeling_llama

import dllm_kernels as dk
from dllm_kernels.ops import reference
from tests.ops.instruction_set_helpers import results_of_each
from tests.ops.layer_kernel_helpers import (
    DTYPES,
    EPS,
    check_rms_norm,
    check_rotate_half,
    check_silu_mul,
    gradients,
    normed,
    rows,
)

LOADED = dk.rms_norm, dk.silu_mul, dk.rotate_half  # whose modules register fake kernels
OPS = torch.ops.dllm_kernels
WIDTHS = [0, 1, 3, 31, 32, 33, 64, 129, 511, 512, 513, 1100]
given_rows = given(
    shape=st.lists(st.integers(0, 4), max_size=3), width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["dense", "part", "every_other", "swapped"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given_rows
def test_rms_norm(shape, width, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad, grad_sum = (rows(generator, shape, width, dtype, layout) for _ in range(4))
    weight = rows(generator, [], width, dtype)
    check_rms_norm(gradients, x, residual, weight, grad, grad_sum)


@settings(max_examples=60, deadline=None)
@given_rows
def test_silu_mul(shape, width, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up, grad = (rows(generator, shape, width, dtype, layout) for _ in range(3))
    check_silu_mul(gradients, gate, up, grad)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3), heads=st.integers(0, 4), kv_heads=st.integers(0, 2), length=st.integers(0, 5),
    half=st.sampled_from([0, 1, 3, 8, 17, 64]), dtype=st.sampled_from(DTYPES), shared=st.booleans(),
    layout=st.sampled_from(["dense", "by_position", "part", "every_other"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_rotate_half(batch, heads, kv_heads, length, half, dtype, shared, layout, seed):
    generator = torch.Generator().manual_seed(seed)

    def head_rows(count, dim=2 * half):
        if layout == "dense":
            return rows(generator, [batch, count, length], dim, dtype)
        merged = rows(generator, [batch, length, count], dim, dtype, layout)
        return merged.transpose(1, 2)

    query, key, grad_query, grad_key = (head_rows(n) for n in (heads, kv_heads, heads, kv_heads))
    cos, sin = (rows(generator, [1 if shared else batch, length], 2 * half, dtype) for _ in range(2))
    check_rotate_half(gradients, query, key, cos, sin, [grad_query, grad_key])


# ---- beside transformers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_modules_of_transformers_round_alike(dtype):
    """In 16 bits nearly all results are the very same; sums may differ in the last bit of float32."""
    generator = torch.Generator().manual_seed(0)
    norm = modeling_llama.LlamaRMSNorm(512, EPS).to(dtype)
    norm.weight.data = torch.randn(512, generator=generator).to(dtype)
    x = rows(generator, [40], 512, dtype)
    gate, up = rows(generator, [40], 512, dtype), rows(generator, [40], 512, dtype)
    query, key = rows(generator, [2, 4, 8], 64, dtype), rows(generator, [2, 2, 8], 64, dtype)
    cos, sin = rows(generator, [1, 8], 64, dtype), rows(generator, [1, 8], 64, dtype)
    pairs = [
        (dk.rms_norm(x, norm.weight, EPS), norm(x)),
        (dk.silu_mul(gate, up), torch.nn.functional.silu(gate) * up),
        *zip(
            dk.rotate_half(query, key, cos, sin),
            modeling_llama.apply_rotary_pos_emb(query, key, cos, sin),
            strict=True,
        ),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        if dtype != torch.float32:
            assert (got != expected).float().mean() < 0.01


def test_infinities_nan_and_large_numbers():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 90, -90, 1e30, -1e30, 3e-39])
    one = torch.ones_like(x)
    expected = torch.nn.functional.silu(x)
    torch.testing.assert_close(dk.silu_mul(x, one), expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    finite = x.isfinite()
    (_,), (of_gate, of_up) = gradients(dk.silu_mul, x, one, grads=[one])
    torch.testing.assert_close(of_up[finite], expected[finite], rtol=1e-6, atol=1e-36)
    slope = torch.tensor([0.5, 0.5, 1, 0, 1, 0, 0.5])
    torch.testing.assert_close(of_gate[finite], slope, rtol=1e-6, atol=1e-20)

    for value, expected in ((torch.inf, torch.nan), (torch.nan, torch.nan), (1e18, None), (1e-17, None)):
        x = torch.ones(3, 64) if expected else torch.full((3, 64), value)
        x[1, 5] = value
        got = dk.rms_norm(x, torch.ones(64), 1e-38)
        if expected is None:
            torch.testing.assert_close(got, torch.ones(3, 64), rtol=1e-4, atol=0)
        else:
            assert got[1].isnan().any() and torch.equal(got[0], torch.ones(64))


def test_unused_outputs_of_a_sum():
    """The gradient of each output alone."""
    generator = torch.Generator().manual_seed(1)
    x, residual = rows(generator, [5], 70, torch.float32), rows(generator, [5], 70, torch.float32)
    weight = torch.randn(70, generator=generator)
    for used in (0, 1):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        dk.rms_norm(leaves[0], leaves[2], EPS, leaves[1])[used].pow(2).sum().backward()
        others = [t.clone().requires_grad_() for t in (x, residual, weight)]
        total = others[0] + others[1]
        (total if used else normed(total, others[2])).pow(2).sum().backward()
        for leaf, other in zip(leaves, others, strict=True):
            if other.grad is None:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8)
    dk.rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is None and x.grad is not None
    x, weight = x.detach(), weight.requires_grad_()
    dk.rms_norm(x, weight, EPS).sum().backward()
    torch.testing.assert_close(weight.grad, normed(x, torch.ones(8)).sum(0))


def test_the_backward_pass_keeps_inputs_only():
    kept = []
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    gate, up = torch.randn(2, 30, 8, requires_grad=True)
    cos, sin = torch.randn(2, 1, 30, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dk.rms_norm(x, weight, EPS)
        dk.silu_mul(gate, up)
        dk.rotate_half(gate[None, None], up[None, None], cos, sin)
    addresses = {t.data_ptr() for t in (x, weight, gate, up, cos, sin)}
    assert {t.data_ptr() for t in kept} == addresses


# ---- the same bits everywhere ------------------------------------------------------------------------------
CALLS = """
import dllm_kernels as dk
generator = torch.Generator().manual_seed(7)
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for rows, width in ((700, 515), (33, 1024)):
        x, y, g = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(3))
        weight = torch.randn(width, generator=generator).to(dtype)
        results += [*dk.rms_norm(x, weight, 1e-5, y), dk.silu_mul(x, y)]
        results += torch.ops.dllm_kernels.rms_norm_backward(g, x, weight, 1e-5, y, True)
        results += torch.ops.dllm_kernels.silu_mul_backward(g, x, y)
    q, k = torch.randn(2, 4, 90, 64, generator=generator), torch.randn(2, 2, 90, 64, generator=generator)
    angles = torch.randn(2, 1, 90, 64, generator=generator).to(dtype)
    results += dk.rotate_half(q.to(dtype), k.to(dtype), *angles)
    results += torch.ops.dllm_kernels.rotate_half_backward(q.to(dtype), k.to(dtype), *angles)
"""


def results_here() -> list[torch.Tensor]:
    namespace = {"torch": torch}
    exec(CALLS, namespace)
    return namespace["results"]


def test_threads_change_nothing():
    before, expected = torch.get_num_threads(), results_here()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for got, other in zip(results_here(), expected, strict=True):
                assert torch.equal(got, other)
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set_agrees(tmp_path):
    first, *others = results_of_each(CALLS, tmp_path).values()
    for other in others:
        for expected, got in zip(first, other, strict=True):
            loose = 4 * torch.finfo(expected.dtype).eps
            torch.testing.assert_close(got, expected, rtol=loose, atol=loose * float(expected.abs().max()))


def test_rows_do_not_depend_on_the_rows_beside_them():
    x, y = torch.randn(2, 90, 300)
    weight = torch.randn(300)
    together, sums = dk.rms_norm(x, weight, EPS, y)
    alone, sum_alone = dk.rms_norm(x[7], weight, EPS, y[7])
    assert torch.equal(alone, together[7]) and torch.equal(sum_alone, sums[7])
    assert torch.equal(dk.silu_mul(x[7], y[7]), dk.silu_mul(x, y)[7])


# ---- torch's rules for operators ---------------------------------------------------------------------------
def calls(dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(2)
    x, y = (rows(generator, [2, 3], 24, dtype).requires_grad_(grad) for _ in range(2))
    weight = torch.randn(24, generator=generator).to(dtype).requires_grad_(grad)
    query, key = (rows(generator, [2, n, 3], 8, dtype).requires_grad_(grad) for n in (4, 2))
    cos, sin = (rows(generator, [1, 3], 8, dtype).requires_grad_(grad) for _ in range(2))
    return {
        "rms_norm": (x, weight, EPS),
        "add_rms_norm": (x, y, weight, EPS),
        "silu_mul": (x, y),
        "rotate_half": (query, key, cos, sin),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", calls())
def test_opcheck(operator, dtype):
    torch.library.opcheck(getattr(OPS, operator), calls(dtype)[operator])
    frozen = calls(dtype, grad=False)[operator]
    torch.library.opcheck(getattr(OPS, operator), frozen)


def test_opcheck_of_the_gradients():
    x, y, g = torch.randn(3, 2, 3, 24)
    weight = torch.randn(24)
    for more, needed in ((None, True), (y, False)):
        torch.library.opcheck(OPS.rms_norm_backward, (g, x, weight, EPS, more, needed))
    torch.library.opcheck(OPS.silu_mul_backward, (g, x, y))
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    torch.library.opcheck(OPS.rotate_half_backward, (query, key, *torch.randn(2, 1, 3, 8)))


@pytest.mark.parametrize("operator", calls())
def test_gradients_under_torch_compile(operator):
    arguments = calls()[operator]

    def function(*arguments):
        outputs = getattr(OPS, operator)(*arguments)
        return sum(out.pow(2).sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

    leaves = [a for a in arguments if isinstance(a, torch.Tensor)]
    expected = torch.autograd.grad(function(*arguments), leaves)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, other in zip(torch.autograd.grad(compiled(*arguments), leaves), expected, strict=True):
        torch.testing.assert_close(got, other)


def test_dynamic_shapes_compile_once():
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(x, y, weight):
        a, b = dk.rms_norm(x, weight, EPS, residual=y)
        return dk.silu_mul(a, b)

    weight = torch.randn(24)
    for count in (3, 5, 9):
        x, y = torch.randn(2, count, 24)
        a, b = dk.rms_norm(x, weight, EPS, residual=y)
        assert torch.equal(function(x, y, weight), dk.silu_mul(a, b))
    assert len(compiles) == 1


@pytest.mark.parametrize("operator", calls())
def test_the_stand_in_of_other_devices_agrees(operator):
    """Devices without kernels use the reference, whose results have the same strides."""
    arguments = calls(grad=False)[operator]
    got, other = (getattr(where, operator)(*arguments) for where in (OPS, reference))
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert a.stride() == b.stride()


# ---- refusals ----------------------------------------------------------------------------------------------
X, WEIGHT = torch.randn(2, 8), torch.randn(8)
HEADS, ANGLES = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)


@pytest.mark.parametrize(
    "function, arguments, error, says",
    [
        (dk.rms_norm, (1.0, WEIGHT), TypeError, "x must be a Tensor"),
        (dk.rms_norm, (X, WEIGHT, "a"), TypeError, "eps must be a number, got str"),
        (dk.rms_norm, (X, WEIGHT, -1.0), ValueError, "eps must be a finite number, 0 or more, got -1"),
        (dk.rms_norm, (X.double(), WEIGHT), ValueError, "x must be float32 or bfloat16 or float16"),
        (dk.rms_norm, (X, WEIGHT.half()), ValueError, r"weight must have the dtype of x \(float32\)"),
        (dk.rms_norm, (X, WEIGHT[:4]), ValueError, r"weight.shape\[0\] must be 8 \(the width of x\)"),
        (dk.rms_norm, (X, X), ValueError, r"weight must be \[width\], got shape \[2, 8\]"),
        (dk.rms_norm, (torch.tensor(1.0), WEIGHT), ValueError, r"x must be \[..., width\], got shape \[\]"),
        (dk.rms_norm, (X, WEIGHT, 1e-5, X[0]), ValueError, r"residual must have the shape of x \[2, 8\]"),
        (dk.rms_norm, (X, WEIGHT, 1e-5, 1), TypeError, "residual must be a Tensor or None, got int"),
        (dk.silu_mul, (X, X[:1]), ValueError, r"up must have the shape of gate \[2, 8\], got shape \[1, 8\]"),
        (dk.silu_mul, (X, X.half()), ValueError, "up must have the dtype of gate"),
        (dk.silu_mul, (X, None), TypeError, "up must be a Tensor, got NoneType"),
        (dk.rotate_half, (HEADS[0], HEADS, ANGLES, ANGLES), ValueError, "query must be .batch, heads"),
        (dk.rotate_half, (HEADS, HEADS[..., :4], ANGLES, ANGLES), ValueError, r"key.shape\[3\] must be 8"),
        (dk.rotate_half, (HEADS, HEADS, ANGLES[:, :2], ANGLES), ValueError, r"cos.shape\[1\] must be 3"),
        (dk.rotate_half, (HEADS, HEADS, ANGLES, ANGLES[..., :4]), ValueError, r"sin.shape\[2\] must be 8"),
        (
            dk.rotate_half, (HEADS, HEADS, ANGLES.expand(2, -1, -1), ANGLES), ValueError,
            r"cos.shape\[0\] must be 1 or 1",
        ),
        (
            dk.rotate_half, (HEADS[..., :7], HEADS[..., :7], ANGLES[..., :7], ANGLES[..., :7]), ValueError,
            "head_dim must be even, got 7",
        ),
        (dk.rotate_half, (HEADS, HEADS, ANGLES.half(), ANGLES), ValueError, "cos must have the dtype of que"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(function, arguments, error, says):
    with pytest.raises(error, match=says):
        function(*arguments)


def test_a_missing_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match="rms_norm: x must be a Tensor, got None"):
        torch.ops.dllm_kernels.rms_norm(None, None, 1e-5)
    meta = torch.zeros(2, 4, device="meta")
    with pytest.raises(ValueError, match="silu_mul: gate must be a Tensor, got None"):
        torch.ops.dllm_kernels.silu_mul(None, meta)
