"""skinny_linear beside products in float64: float weights, and bytes by their definition; packed weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_kernels as dk
from tests.ops.instruction_set_helpers import results_of_each

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 16, 63, 64, 65, 130, 257, 512, 1030]


def arguments(seed, rows, inputs, outputs, dtype=torch.float32, x_dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).to(x_dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    return x, weight, torch.randn(outputs, generator=generator).to(dtype) if bias else None


def tolerance(x, weight, bias, dtype) -> torch.Tensor:
    """Rounding of a float32 sum, and of the result to `dtype`."""
    magnitude = x.double().abs() @ weight.double().abs().T + 1 + (0 if bias is None else bias.double().abs())
    return magnitude * (1e-6 + torch.finfo(dtype).eps)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 70),
    inputs=st.sampled_from(SIZES),
    outputs=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_float_weights_give_the_product(rows, inputs, outputs, dtype, x_dtype, bias, seed):
    x, weight, added = arguments(seed, rows, inputs, outputs, dtype, x_dtype, bias)
    got = dk.skinny_linear(x, weight, added)
    assert got.dtype == x_dtype and got.shape == (rows, outputs)
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    assert bool(((got.double() - expected).abs() <= tolerance(x, weight, added, x_dtype)).all())


def quantized_product(x, weight, scales, bias=None) -> torch.Tensor:
    """out = s_x Σ_g s_g Σ x_i w_i, of x in bytes, in float64."""
    size = x.shape[1] // scales.shape[1]
    x_scale = x.float().abs().amax(1, keepdim=True) / 127
    steps = (x.float() * torch.where(x_scale > 0, 1 / x_scale, 0)).round().clamp(-127, 127).double()
    groups = torch.einsum(
        "rgi,ogi->rog", steps.unflatten(1, (-1, size)), weight.double().unflatten(1, (-1, size))
    )
    total = (groups * scales.double()).sum(2) * x_scale.double()
    return total + (0 if bias is None else bias.double())


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.sampled_from(SIZES),
    outputs=st.integers(1, 140),
    groups=st.booleans(),
    x_dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_byte_weights_give_the_product_of_bytes(rows, inputs, outputs, groups, x_dtype, bias, seed):
    inputs = 64 * (inputs % 7 + 1) if groups else inputs
    x, weight, added = arguments(seed, rows, inputs, outputs, x_dtype=x_dtype, bias=bias)
    quantized, scales = dk.quantize_weight(weight, 64 if groups else None)
    got = dk.skinny_linear(x, quantized, added, scales=scales)
    expected = quantized_product(x, quantized, scales, added)
    near = tolerance(x, weight, added, x_dtype) + 2e-5 * expected.abs().amax()
    assert bool(((got.double() - expected).abs() <= near).all())


def test_extreme_bytes_do_not_saturate():
    """127 · 127 many times, of both signs: pairs of products overflow 16 bits where x is made unsigned."""
    x = torch.full((3, 4096), 1.0)
    x[1], x[2, ::2] = -1.0, -1.0
    weight = torch.full((5, 4096), 127, dtype=torch.int8)
    weight[1], weight[2, ::2] = -127, -127
    weight[3] = -128
    scales = torch.ones(5, 1)
    got = dk.skinny_linear(x, weight, scales=scales)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("byte", [-128, 127])
def test_the_most_inputs_of_a_scale_do_not_overflow(byte):
    x, weight = torch.ones(1, 2**16), torch.full((1, 2**16), byte, dtype=torch.int8)
    got = dk.skinny_linear(x, weight, scales=torch.ones(1, 1))
    torch.testing.assert_close(got, torch.tensor([[byte * 2.0**16]]), rtol=1e-6, atol=0)


def test_no_inputs_give_the_bias():
    bias = torch.randn(5)
    for weight, scales in ((torch.zeros(5, 0), None), dk.quantize_weight(torch.zeros(5, 0))):
        got = dk.skinny_linear(torch.zeros(3, 0), weight, bias, scales=scales)
        assert torch.equal(got, bias.expand(3, 5))


def test_quantized_weights_are_near_the_weights():
    _, weight, _ = arguments(0, 1, 256, 40)
    weight[3], weight[4, 64:128] = 0, 1e-30
    for size in (None, 4, 64, 128):
        quantized, scales = dk.quantize_weight(weight, size)
        assert quantized.dtype == torch.int8 and scales.shape == (40, 256 // (size or 256))
        back = quantized.float() * scales.repeat_interleave(size or 256, 1)
        assert bool(((back - weight).abs() <= scales.repeat_interleave(size or 256, 1) * 0.5001).all())
        assert int(quantized.abs().max()) == 127 and not quantized[3].any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("largest", [0.0, 1e-45, 3e-41, 1e-38, 1e-36, 3e38])
def test_scales_at_the_ends_of_float32_are_right(dtype, largest):
    """A denormal scale has fewer than 24 bits, and no inverse in float32."""
    weight = largest * torch.linspace(-1, 1, 33)[None]
    quantized, scales = dk.quantize_weight(weight, dtype=dtype)
    back = quantized.double() * scales.double()
    near = 2**-4 * weight.double().abs() if dtype != torch.int8 else 0
    assert bool(((back - weight.double()).abs() <= near + 0.5001 * scales.double()).all())
    assert float(scales) <= max(largest / 127 * 1.001, torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 3e-41, 1e-38, 1e-36, 3e38])
def test_rows_at_the_ends_of_float32_are_right(largest):
    x = largest * torch.linspace(-1, 1, 33)[None]
    got = dk.skinny_linear(x, torch.eye(33, dtype=torch.int8), scales=torch.ones(33, 1))
    step = max(largest / 127, torch.finfo(torch.float32).tiny)
    assert bool(((got.double() - x.double()).abs() <= 0.501 * step).all())


def test_weights_in_e4m3_are_near_the_weights():
    """Three bits of mantissa follow the first one; the smallest step is 2^-9."""
    _, weight, _ = arguments(0, 1, 256, 40)
    weight[3], weight[4] = 0, 1e-30
    quantized, scales = dk.quantize_weight(weight, dtype=torch.float8_e4m3fn)
    assert quantized.dtype == torch.float8_e4m3fn and scales.shape == (40, 1)
    back = quantized.float() * scales
    assert bool(((back - weight).abs() <= weight.abs() * 2**-4 + scales * 2**-10).all())
    largest = quantized.float().abs().amax(1)
    assert largest[3] == 0 and bool((largest[torch.arange(40) != 3] == 448).all())


def test_rows_do_not_depend_on_the_rows_beside_them():
    for dtype in DTYPES:
        x, weight, bias = arguments(1, 70, 515, 70, dtype, bias=True)
        together = dk.skinny_linear(x, weight, bias)
        for rows in (1, 2, 5, 32, 64):
            assert torch.equal(dk.skinny_linear(x[:rows], weight, bias), together[:rows])
    quantized, scales = dk.quantize_weight(weight.float())
    together = dk.skinny_linear(x, quantized, scales=scales)
    assert torch.equal(dk.skinny_linear(x[3:4], quantized, scales=scales), together[3:4])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    x, weight, _ = arguments(2, 33, 1024, 700)
    before = torch.get_num_threads()
    expected = dk.skinny_linear(x, weight)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(dk.skinny_linear(x, weight), expected)
    finally:
        torch.set_num_threads(before)


def test_any_strides_and_leading_dimensions():
    x, weight, bias = arguments(3, 12, 130, 50, bias=True)
    expected = dk.skinny_linear(x, weight, bias)
    assert torch.equal(dk.skinny_linear(x.view(3, 4, 130), weight, bias), expected.view(3, 4, 50))
    assert torch.equal(dk.skinny_linear(x.T.contiguous().T, weight, bias), expected)
    assert torch.equal(dk.skinny_linear(x, weight.T.contiguous().T, bias), expected)
    wide = torch.zeros(50, 200)
    wide[:, 20:150] = weight
    assert torch.equal(dk.skinny_linear(x, wide[:, 20:150], bias), expected)
    assert torch.equal(dk.skinny_linear(x[5], weight, bias), expected[5])
    quantized, scales = dk.quantize_weight(weight)
    expected = dk.skinny_linear(x, quantized, scales=scales)
    assert torch.equal(dk.skinny_linear(x, quantized.T.contiguous().T, scales=scales), expected)


def test_infinities_and_nan_stay_in_their_rows():
    x, weight, _ = arguments(4, 3, 100, 9)
    x[1, 5] = torch.inf
    x[2, 7] = torch.nan
    quantized, scales = dk.quantize_weight(weight)
    got = dk.skinny_linear(x, quantized, scales=scales)
    assert got[0].isfinite().all() and got[1].isnan().all() and got[2].isnan().all()
    got = dk.skinny_linear(x, weight)
    assert torch.equal(got.isfinite().all(1), torch.tensor([True, False, False]))
    zeros = dk.skinny_linear(torch.zeros(2, 100), quantized, scales=scales)
    assert not zeros.any()


def test_rows_of_tiny_and_huge_numbers_are_quantized_by_their_own_scale():
    x, weight, _ = arguments(5, 2, 128, 9)
    quantized, scales = dk.quantize_weight(weight)
    scaled = x * torch.tensor([[2.0**-100], [2.0**100]])
    got = dk.skinny_linear(scaled, quantized, scales=scales)
    expected = dk.skinny_linear(x, quantized, scales=scales) * torch.tensor([[2.0**-100], [2.0**100]])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


ON_EACH = """
import dllm_kernels as dk
generator = torch.Generator().manual_seed(7)
results = []
for inputs in (64, 70, 1029):
    x, weight = (torch.randn(rows, inputs, generator=generator) for rows in (33, 70))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        results.append(dk.skinny_linear(x, weight.to(dtype)))
    quantized, scales = dk.quantize_weight(weight, 32 if inputs == 64 else None)
    results.append(dk.skinny_linear(x, quantized, scales=scales))
weight, scales = torch.full((5, 4096), -128, dtype=torch.int8), torch.ones(5, 1)
results.append(dk.skinny_linear(torch.ones(2, 4096), weight, scales=scales))
"""


def test_every_instruction_set_agrees(tmp_path):
    """With DLLM_ISA given, AVX-512 does without VNNI; the last one here has it where the processor does."""
    results = list(results_of_each(ON_EACH, tmp_path).values())
    namespace = {"torch": torch}
    exec(ON_EACH, namespace)
    for other in [*results[1:], namespace["results"]]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-4)


def test_opcheck_and_compile():
    x, weight, bias = arguments(6, 5, 70, 20, bias=True)
    quantized, scales = dk.quantize_weight(weight)
    for call in ((x, weight, bias), (x, quantized, None, scales)):
        torch.library.opcheck(torch.ops.dllm_kernels.skinny_linear, call)
    compiled = torch.compile(lambda x: dk.skinny_linear(x, weight, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), dk.skinny_linear(x, weight, bias))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 8, 9, 32, 70, 300]),
    inputs=st.integers(0, 140),
    outputs=st.integers(0, 140),
    kind=st.sampled_from([*DTYPES, torch.int8]),
    x_dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([4, 32, 64]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packed_weights_give_the_same_and_can_be_unpacked(
    rows, inputs, outputs, kind, x_dtype, group, bias, seed
):
    x, weight, added = arguments(seed, rows, inputs, outputs, x_dtype=x_dtype, bias=bias)
    scales = None
    if kind == torch.int8:
        weight, scales = dk.quantize_weight(weight, group if inputs and inputs % group == 0 else None)
    else:
        weight = weight.to(kind)
    packed = dk.pack_weight(weight, scales)
    got = dk.skinny_linear(x, packed, added)
    assert torch.equal(got, dk.skinny_linear(x, weight, added, scales=scales))
    again, same_scales = packed.unpacked()
    assert torch.equal(again.to(kind), weight)
    assert same_scales is None if scales is None else torch.equal(same_scales, scales)
    if min(rows, inputs, outputs) and kind == torch.int8:
        expected = quantized_product(x, weight, scales, added)
        size = quantized_product(x.abs(), weight.abs(), scales) + (0 if added is None else added.abs())
        rounding = 1e-5 + torch.finfo(x_dtype).eps + 2.0 / 127 * (x_dtype != torch.float32)
        assert bool(((got.double() - expected).abs() <= rounding * size.double() + 1e-30).all())


@pytest.mark.parametrize("inputs", [4096, 4097, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_read_in_parts(inputs, dtype):
    x, weight, _ = arguments(9, 11, inputs, 50, dtype)
    got = dk.skinny_linear(x, dk.pack_weight(weight))
    expected = x.double() @ weight.double().T
    assert bool(((got.double() - expected).abs() <= tolerance(x, weight, None, torch.float32)).all())


def test_packing_needs_no_gradient_but_has_none():
    weight = torch.nn.Parameter(torch.randn(5, 6))
    with torch.no_grad():
        packed = dk.pack_weight(weight)
    with pytest.raises(NotImplementedError, match="pack_weight"):
        dk.pack_weight(weight).data.sum().backward()
    with pytest.raises(NotImplementedError, match="packed_linear"):
        dk.skinny_linear(torch.randn(2, 6, requires_grad=True), packed).sum().backward()


def test_opcheck_and_compile_of_packed_weights():
    x, weight, bias = arguments(6, 5, 70, 20, bias=True)
    for plain, scales in ((weight, None), (weight.bfloat16(), None), dk.quantize_weight(weight)):
        torch.library.opcheck(torch.ops.dllm_kernels.pack_weight, (plain,))
        packed = dk.pack_weight(plain, scales)
        torch.library.opcheck(torch.ops.dllm_kernels.packed_linear, (x, packed.data, 20, bias, packed.scales))
        compiled = torch.compile(
            lambda x, packed=packed: dk.skinny_linear(x, packed, bias), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x), dk.skinny_linear(x, packed, bias))


def test_a_gradient_is_refused():
    x, weight, _ = arguments(7, 3, 16, 4)
    with pytest.raises(NotImplementedError, match=r"skinny_linear.*torch\.nn\.functional\.linear"):
        dk.skinny_linear(x.requires_grad_(), weight).sum().backward()


X, WEIGHT, _ = arguments(8, 3, 128, 4)
BYTES, SCALES = dk.quantize_weight(WEIGHT, 64)


@pytest.mark.parametrize(
    "given, error, says",
    [
        (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
        (dict(x=X.double()), ValueError, "x must be float32 or bfloat16 or float16, got float64"),
        (dict(x=X[:, :100]), ValueError, r"weight.shape\[1\] must be 100"),
        (dict(weight=WEIGHT[0]), ValueError, r"weight must be \[outputs, inputs\], got shape \[128\]"),
        (
            dict(weight=WEIGHT.double()),
            ValueError,
            "weight must be float32 or bfloat16 or float16 or int8, got float64",
        ),
        (
            dict(
                x=torch.zeros(1, 2**18), weight=torch.zeros(4, 2**18, dtype=torch.int8), scales=SCALES[:, :1]
            ),
            ValueError,
            "may cover at most 65536 inputs, got 262144",
        ),
        (dict(weight=BYTES), ValueError, "an int8 weight needs scales"),
        (dict(scales=SCALES), ValueError, "scales go with an int8 weight"),
        (dict(weight=BYTES, scales=SCALES[:2]), ValueError, r"scales.shape\[0\] must be 4"),
        (dict(weight=BYTES, scales=SCALES[0]), ValueError, r"scales must be \[outputs, groups\]"),
        (dict(weight=BYTES, scales=SCALES[:, :1].repeat(1, 64)), ValueError, "equal and multiples of 4"),
        (dict(weight=BYTES, scales=SCALES.double()), ValueError, "scales must be float32"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias.shape\[0\] must be 4"),
        (dict(bias=torch.zeros(4, dtype=torch.int32)), ValueError, "bias must be float32"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        dk.skinny_linear(**{"x": X, "weight": WEIGHT, **given})


@pytest.mark.parametrize(
    "given, error, says",
    [
        (dict(weight=1.0), TypeError, "weight must be a Tensor"),
        (dict(weight=BYTES), TypeError, "weight must be a float Tensor, got torch.int8"),
        (dict(weight=WEIGHT[0]), ValueError, r"weight must be \[outputs, inputs\]"),
        (dict(weight=WEIGHT / 0), ValueError, "weight holds infinities or NaN"),
        (dict(weight=WEIGHT, group_size=42), ValueError, "group_size must be a multiple of 4"),
        (dict(weight=WEIGHT, group_size=256), ValueError, "divides the 128 inputs, got 256"),
        (dict(weight=WEIGHT, group_size=0), ValueError, "group_size must lie in 1"),
        (
            dict(weight=WEIGHT, dtype=torch.float16),
            ValueError,
            "dtype is torch.float16; allowed: torch.int8, t",
        ),
        (
            dict(weight=WEIGHT, dtype=torch.float8_e4m3fn, group_size=64),
            ValueError,
            "group_size has no meaning with dtype=torch.float8_e4m3fn",
        ),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        dk.quantize_weight(**given)


PACKED = dk.pack_weight(BYTES, SCALES)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: dk.pack_weight(WEIGHT[0]), ValueError, r"weight must be \[outputs, inputs\]"),
        (lambda: dk.pack_weight("w"), TypeError, "weight must be a Tensor, got str"),
        (lambda: dk.pack_weight(WEIGHT.double()), ValueError, "float16 or int8, got float64"),
        (lambda: dk.pack_weight(BYTES), ValueError, "an int8 weight needs scales"),
        (lambda: dk.pack_weight(WEIGHT, SCALES), ValueError, "scales go with an int8 weight"),
        (lambda: dk.pack_weight(BYTES, SCALES[:2]), ValueError, r"scales must be float32 \[4, groups\]"),
        (lambda: dk.skinny_linear(X, PACKED, scales=SCALES), ValueError, "pass them to pack_weight"),
        (lambda: dk.skinny_linear(X[:, :64], PACKED), ValueError, r"weight.shape\[1\] must be 64"),
        (lambda: dk.skinny_linear(X, PACKED._replace(outputs=40)), ValueError, r"packed from \[40, 128\]"),
        (lambda: dk.skinny_linear(X, PACKED._replace(outputs=-9)), ValueError, r"packed from \[-9, 128\]"),
        (lambda: dk.skinny_linear(X, PACKED._replace(scales=None)), ValueError, "needs scales"),
        (
            lambda: dk.skinny_linear(X, PACKED._replace(scales=PACKED.scales[:, :5])),
            ValueError,
            r"scales.shape\[1\] must be 16",
        ),
        (
            lambda: dk.skinny_linear(X, PACKED._replace(scales=torch.ones(3, 16))),
            ValueError,
            "equal and multiples of 4, or of one group; got 3 groups",
        ),
    ],
)
def test_packed_weights_that_make_no_sense_are_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
