"""skinny_linear on the GPU against products in float64: by the kernels for tensor cores of Ampere and Hopper,
and by the one for any types."""

import pytest
import torch

import dllm_kernels as dk

FP8 = torch.float8_e4m3fn
HALVES = [torch.bfloat16, torch.float16]
hopper, hardware = pytest.mark.hopper, pytest.mark.hardware
GENERATIONS = [pytest.param("Hopper", marks=hopper), "Ampere"]
generations = pytest.mark.parametrize("generation", GENERATIONS)


def arguments(seed, rows, inputs, outputs, dtype=torch.bfloat16, bias_dtype=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g).to(dtype)
    weight = torch.randn(outputs, inputs, generator=g).to(dtype)
    return x, weight, bias_dtype and torch.randn(outputs, generator=g).to(bias_dtype)


def assert_is_the_product(gpu, x, weight, bias=None, scales=None):
    """Within the error of float32 sums that may truncate, and of rounding to the dtype of x."""
    got = gpu(dk.skinny_linear, x, weight, bias, scales=scales)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], len(weight))
    wide = weight.double()
    if scales is not None:
        wide = (wide.unflatten(1, (scales.shape[1], -1)) * scales[..., None].double()).flatten(1)
    added = 0 if bias is None else bias.double()
    expected = x.double() @ wide.T + added
    magnitude = x.double().abs() @ wide.abs().T + abs(added)
    error = magnitude * (2e-7 * (x.shape[-1] / 16 + 16)) + expected.abs() * torch.finfo(x.dtype).eps
    assert bool(((got.double() - expected).abs() <= error + 1e-12).all())


@generations
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("outputs", [1, 17, 63, 64, 65, 127, 128, 129, 300])
def test_outputs_around_tile_borders(gpu, generation, outputs, dtype):
    assert_is_the_product(gpu, *arguments(outputs, 3, 64, outputs, dtype))


@generations
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 130])
def test_any_number_of_rows(gpu, generation, rows):
    assert_is_the_product(gpu, *arguments(rows, rows, 72, 140, bias_dtype=torch.bfloat16))


@generations
@pytest.mark.parametrize("inputs", [8, 56, 64, 120, 248, 256, 1000, pytest.param(12_288, marks=hardware)])
def test_any_number_of_inputs_that_the_copies_can_read(gpu, generation, inputs):
    assert_is_the_product(gpu, *arguments(inputs, 5, inputs, 70, torch.float16))


@generations
@pytest.mark.parametrize(
    "inputs, outputs",
    [(512, 256), (1096, 130), (4096, 40), pytest.param(4096, 4096, marks=hardware)],
)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_inputs_in_several_splits(gpu, generation, inputs, outputs, bias_dtype):
    assert_is_the_product(gpu, *arguments(1, 9, inputs, outputs, bias_dtype=bias_dtype))


@hopper
@pytest.mark.parametrize("rows, group", [(20, None), (200, None), (20, 64)])
def test_more_items_than_multiprocessors(gpu, rows, group):
    """The ring of buffers goes on from item to item; several CTAs share the rows. group: of bytes."""
    x, weight, bias = arguments(2, rows, 320, 1500, bias_dtype=torch.float16)
    weight, scales = dk.quantize_weight(weight, group) if group else (weight, None)
    assert_is_the_product(gpu, x, weight, bias, scales)


@generations
@pytest.mark.parametrize("bias_dtype", [torch.float32, *HALVES])
def test_bias_of_any_type(gpu, generation, bias_dtype):
    assert_is_the_product(gpu, *arguments(3, 4, 64, 100, bias_dtype=bias_dtype))


# ---- weights in bytes
@pytest.mark.parametrize(
    "generation, rows, dtype",
    [
        pytest.param("Hopper", 1, torch.float16, marks=hopper),
        pytest.param("Hopper", 9, torch.bfloat16, marks=hopper),
        pytest.param("Hopper", 20, torch.float16, marks=hopper),
        pytest.param("Hopper", 70, torch.bfloat16, marks=hopper),
        ("Ampere", 1, torch.bfloat16),
        ("Ampere", 40, torch.float16),
        ("Ampere", 70, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("inputs, group", [(16, None), (208, None), (192, 64), (384, 192), (2176, 128)])
def test_bytes_are_widened_exactly(gpu, generation, rows, dtype, inputs, group):
    x, weight, bias = arguments(inputs, rows, inputs, 133, dtype, torch.float32)
    quantized, scales = dk.quantize_weight(weight, group)
    assert_is_the_product(gpu, x, quantized, bias, scales)


@generations
def test_every_byte(gpu, generation):
    """By 1, so that a result is the byte itself."""
    weight = torch.zeros(256, 16, dtype=torch.int8)
    weight[:, 5] = torch.arange(-128, 128)
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    x[1, 5] = 1
    got = gpu(dk.skinny_linear, x, weight, scales=torch.ones(256, 1))
    assert got[1].tolist() == list(range(-128, 128)) and not got[0].any()


@generations
def test_each_input_meets_its_own_weight(gpu, generation):
    """Inputs are summed in another order than they are stored in."""
    x = torch.eye(64, dtype=torch.float16)
    weight = torch.randint(-128, 128, (40, 64), dtype=torch.int8)
    got = gpu(dk.skinny_linear, x, weight, scales=torch.ones(40, 1))
    assert torch.equal(got, weight.T.half())


@generations
@pytest.mark.parametrize("rows", [65, 130, pytest.param(1000, marks=hardware)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("inputs, outputs", [(64, 128), (208, 136), pytest.param(4096, 4096, marks=hardware)])
def test_many_rows_of_bytes(gpu, generation, rows, dtype, inputs, outputs):
    """Sizes that CUTLASS takes on Hopper."""
    x, weight, bias = arguments(rows, rows, inputs, outputs, dtype, dtype)
    assert_is_the_product(gpu, x, *quantized_after(weight, bias))
    assert_is_the_product(gpu, x, *quantized_after(weight, None))


def quantized_after(weight, bias):
    weight, scales = dk.quantize_weight(weight)
    return weight, bias, scales


# ---- weights in e4m3
def assert_is_the_product_in_e4m3(gpu, x, weight, bias=None, scales=None):
    """x is rounded too: every row to e4m3, divided so that its largest magnitude is 448."""
    x_scales = x.float().abs().amax(-1, keepdim=True) / 448
    rounded = (x.float() / torch.where(x_scales > 0, x_scales, 1)).to(FP8).double()
    got = gpu(dk.skinny_linear, x, weight, bias, scales=scales)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], len(weight))
    added = 0 if bias is None else bias.double()
    factor = x_scales.double() * scales.double().T
    expected = factor * (rounded @ weight.double().T) + added
    magnitude = factor * (rounded.abs() @ weight.double().abs().T) + abs(added)
    # Hopper's tensor cores keep some 14 bits of sums of up to 128 products; elsewhere sums are float32.
    rounding = 2e-7 * (x.shape[-1] / 16 + 16) if gpu.emulated else 1e-3
    error = magnitude * rounding + expected.abs() * torch.finfo(x.dtype).eps
    assert bool(((got.double() - expected).abs() <= error + 1e-12).all())


@pytest.mark.parametrize(
    "generation, rows, dtype",
    [
        pytest.param("Hopper", 1, torch.float16, marks=hopper),
        pytest.param("Hopper", 20, torch.bfloat16, marks=hopper),
        pytest.param("Hopper", 64, torch.float16, marks=hopper),
        pytest.param("Hopper", 70, torch.bfloat16, marks=hopper),
        ("Ampere", 1, torch.bfloat16),
        ("Ampere", 40, torch.float16),
        ("Ampere", 70, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    "inputs, outputs",
    [(16, 8), (64, 128), (208, 133), (1040, 264), pytest.param(4096, 4096, marks=hardware)],
)
def test_both_operands_in_e4m3(gpu, generation, rows, dtype, inputs, outputs):
    x, weight, bias = arguments(inputs, rows, inputs, outputs, dtype, dtype)
    weight, scales = dk.quantize_weight(weight, dtype=FP8)
    assert_is_the_product_in_e4m3(gpu, x, weight, bias, scales)
    assert_is_the_product_in_e4m3(gpu, x, weight, None, scales)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 1, 1), (9, 63, 10), (17, 130, 5)])
def test_e4m3_of_any_size(gpu, dtype, rows, inputs, outputs):
    x, weight, bias = arguments(12, rows, inputs, outputs, dtype, torch.float32)
    weight, scales = dk.quantize_weight(weight, dtype=FP8)
    assert_is_the_product_in_e4m3(gpu, x, weight, bias, scales)


@generations
@pytest.mark.parametrize("outputs", [256, 255])
def test_every_e4m3(gpu, generation, outputs):
    """By 1, so that a result is the number itself; 255 outputs are not CUTLASS's."""
    codes = torch.arange(outputs).to(torch.uint8)
    weight = torch.zeros(outputs, 16, dtype=torch.uint8)
    weight[:, 5] = codes
    x = torch.zeros(2, 16, dtype=torch.float16)
    x[1, 5] = 1
    got = gpu(dk.skinny_linear, x, weight.view(FP8), scales=torch.ones(outputs, 1))
    expected = codes.view(FP8).half()
    torch.testing.assert_close(got[1], expected, rtol=1e-3, atol=0, equal_nan=True)
    assert not got[0][expected.isfinite()].any()


@generations
def test_x_is_rounded_to_the_nearest_e4m3(gpu, generation):
    """448 makes the scale of a row 1, and the identity shows the numbers."""
    x = torch.randint(0, 2**15, (40, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    x = x.to(torch.int16).view(torch.float16)
    x = torch.where(x <= 448, x, 448 / 128)
    x[:, 0] = 448
    got = gpu(dk.skinny_linear, x, torch.eye(64).to(FP8), scales=torch.ones(64, 1))
    assert torch.equal(got, x.to(FP8).half())


@generations
def test_rows_that_have_no_scale(gpu, generation):
    x, weight, bias = arguments(13, 4, 64, 24, bias_dtype=torch.bfloat16)
    weight, scales = dk.quantize_weight(weight, dtype=FP8)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    got = gpu(dk.skinny_linear, x, weight, bias, scales=scales)
    assert torch.equal(got[0], bias) and got[1:3].isnan().all() and got[3].isfinite().all()


@generations
def test_weights_in_e4m3_may_be_strided(gpu, generation):
    x, weight, _ = arguments(14, 20, 64, 48)
    weight, scales = dk.quantize_weight(weight, dtype=FP8)
    wide = torch.cat([weight, weight], 1)
    plain = gpu(dk.skinny_linear, x, weight, scales=scales)
    assert torch.equal(gpu(dk.skinny_linear, x, wide[:, 64:], scales=scales), plain)
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    assert torch.equal(gpu(dk.skinny_linear, shifted, weight, scales=scales), plain)


# ---- any types
@pytest.mark.parametrize("x_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("weight_dtype", [torch.float32, *HALVES, torch.int8])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 1, 1), (9, 63, 10), (17, 130, 5)])
def test_any_types_and_sizes(gpu, x_dtype, weight_dtype, rows, inputs, outputs):
    x, weight, bias = arguments(4, rows, inputs, outputs, x_dtype, torch.float32)
    if weight_dtype == torch.int8:
        weight, scales = dk.quantize_weight(weight)
        assert_is_the_product(gpu, x, weight, bias, scales)
    else:
        assert_is_the_product(gpu, x, weight.to(weight_dtype), bias)


@pytest.mark.parametrize("dtype, group", [(torch.float32, 64), (torch.bfloat16, 4), (torch.float16, 32)])
def test_groups_of_any_size(gpu, dtype, group):
    x, weight, _ = arguments(5, 3, 256, 12, dtype)
    quantized, scales = dk.quantize_weight(weight, group)
    assert_is_the_product(gpu, x, quantized, None, scales)


@generations
def test_no_inputs_give_the_bias(gpu, generation):
    x, weight, bias = arguments(6, 3, 0, 5, bias_dtype=torch.bfloat16)
    assert torch.equal(gpu(dk.skinny_linear, x, weight, bias), bias.expand(3, 5))


# ---- what holds for all of them
@generations
@pytest.mark.parametrize("kind", ["halves", "bytes", "e4m3", "floats"])
def test_a_row_is_the_same_alone_and_in_any_batch(gpu, generation, kind):
    """199 outputs are not CUTLASS's, which adds up many rows of bytes otherwise than few."""
    x, weight, _ = arguments(7, 70, 512, 199, torch.float32 if kind == "floats" else torch.float16)
    scales = None
    if kind in ("bytes", "e4m3"):
        weight, scales = dk.quantize_weight(weight, dtype=FP8 if kind == "e4m3" else torch.int8)
    together = gpu(dk.skinny_linear, x, weight, scales=scales)
    for some in (slice(0, 1), slice(5, 14), slice(10, 40), slice(3, 63), slice(69, 70)):
        assert torch.equal(gpu(dk.skinny_linear, x[some], weight, scales=scales), together[some])


@generations
def test_strides_and_leading_shapes(gpu, generation):
    x, weight, bias = arguments(8, 30, 64, 100, bias_dtype=torch.float32)
    plain = gpu(dk.skinny_linear, x[::2], weight, bias)
    wide = torch.cat([weight, weight], 1)
    strided = gpu(
        dk.skinny_linear, x.reshape(3, 10, 64)[:, ::2], wide[:, 64:], torch.stack([bias, bias], 1)[:, 1]
    )
    assert strided.shape == (3, 5, 100) and torch.equal(strided.flatten(0, 1), plain)
    assert torch.equal(gpu(dk.skinny_linear, x, weight.t().contiguous().t(), bias)[::2], plain)
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)  # not at a multiple of 16 bytes
    assert torch.equal(gpu(dk.skinny_linear, shifted, weight, bias)[::2], plain)


@generations
def test_infinities_and_nan_stay_in_their_rows(gpu, generation):
    x, weight, _ = arguments(9, 4, 64, 20)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    got = gpu(dk.skinny_linear, x, weight)
    assert got[1].isnan().all() and got[2].isinf().all() and got[[0, 3]].isfinite().all()


@hopper
@pytest.mark.parametrize("dtype, few", [(torch.int8, False), (FP8, True), (FP8, False)])
def test_a_row_is_the_same_among_few_and_among_many(gpu, dtype, few):
    """Few rows, or many, whichever CUTLASS takes."""
    x, weight, _ = arguments(15, 64 if few else 140, 512, 200, torch.float16)
    weight, scales = dk.quantize_weight(weight, dtype=dtype)
    together = gpu(dk.skinny_linear, x, weight, scales=scales)
    for some in (slice(0, 1), slice(5, 40)) if few else (slice(0, 70), slice(30, 110)):
        assert torch.equal(gpu(dk.skinny_linear, x[some], weight, scales=scales), together[some])


def assert_replayed(layers, x):
    """A CUDA graph of layers(x) gives the same in every replay as a call without one."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = layers(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layers(x)
    for _ in range(20):
        graph.replay()
        assert torch.equal(output, expected)


@pytest.mark.graph
@pytest.mark.parametrize("dtype, rows", [(torch.int8, 32), (torch.int8, 200), (FP8, 32), (FP8, 200)])
def test_a_graph_of_layers_in_8_bits(dtype, rows):
    x, weight, bias = (t.cuda() for t in arguments(10, rows, 4096, 4096, bias_dtype=torch.bfloat16))
    weight, scales = dk.quantize_weight(weight / 64, dtype=dtype)

    def layers(x):
        for _ in range(4):
            x = dk.skinny_linear(x, weight, bias, scales=scales)
        return x

    assert_replayed(layers, x)


@pytest.mark.graph
def test_a_graph_of_layers_that_overlap():
    """Each launch may begin while the one before runs: what it reads is there all the same."""
    x, weight, bias = (t.cuda() for t in arguments(10, 32, 4096, 4096, bias_dtype=torch.float32))
    weight /= 64

    def layers(x):
        for _ in range(8):
            x = dk.skinny_linear(x, weight, bias)
        return x

    assert_replayed(layers, x)


@generations
def test_bad_input_is_named(gpu, generation):
    x, weight, _ = arguments(11, 2, 64, 10)
    with pytest.raises(ValueError, match=r"weight.shape\[1\] must be 32"):
        gpu(dk.skinny_linear, x[:, :32], weight)
    with pytest.raises(ValueError, match="an int8 weight needs scales"):
        gpu(dk.skinny_linear, x, weight.to(torch.int8))
    with pytest.raises(ValueError, match="a float8_e4m3fn weight needs scales"):
        gpu(dk.skinny_linear, x, weight.to(FP8))
    with pytest.raises(ValueError, match=r"scales of a float8_e4m3fn weight must be \[outputs, 1\]"):
        gpu(dk.skinny_linear, x, weight.to(FP8), scales=torch.ones(10, 2))
    with pytest.raises(ValueError, match="scales go with an int8 or float8_e4m3fn weight"):
        gpu(dk.skinny_linear, x, weight, scales=torch.ones(10, 1))
    with pytest.raises(ValueError, match="equal and multiples of 4"):
        gpu(dk.skinny_linear, x, weight.to(torch.int8), scales=torch.ones(10, 32))
