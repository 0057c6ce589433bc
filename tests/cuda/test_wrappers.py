"""Wrappers of PTX and intrinsics do what their documentation says: on a GPU, for which nvcc compiles the
kernels of simt/wrappers.cu, and on the emulator, which every other emulated test relies on."""

import numpy as np
import pytest
import torch

from simt.wrapper_kernels import run_wrapper

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def random(*shape, seed=0) -> np.random.Generator:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)


# ---- matrices -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("half", HALVES)
def test_a_product_of_matrices(wrapper, half):
    """Small integers: every sum is exact."""
    a, b = torch.randint(-8, 9, (16, 16)), torch.randint(-8, 9, (16, 8))
    flat = torch.cat([a.flatten(), b.flatten()]).to(HALVES[half]).view(torch.int16).numpy()
    got = wrapper(f"matrix_product_{half}", flat, (16, 8), np.float32)
    assert (got == (1 + a @ b).numpy()).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(wrapper, transposed):
    x = np.arange(256, dtype=np.int16)
    got = wrapper("matrix_load" + "_transposed" * transposed, x, (32, 4, 2), np.int16)
    matrices = x.reshape(4, 8, 8).transpose(0, 2, 1) if transposed else x.reshape(4, 8, 8)
    assert (got == matrices.reshape(4, 32, 2).transpose(1, 0, 2)).all()


def test_asynchronous_copies(wrapper):
    x = random(64, 4)
    got = wrapper("asynchronous_copy", x, (64, 4), np.int32)
    first, second = x[:32].copy(), x[32:].copy()
    first[0::3], second[1::3] = 0, 0
    assert (got == np.concatenate([first[::-1], np.roll(second, -1, axis=0)])).all()


# ---- warps --------------------------------------------------------------------------------------------
def test_shuffles(wrapper):
    x, lane = random(32) // 4, np.arange(32)
    expected = []
    for width in (32, 16, 4):
        first = lane // width * width
        expected.append(x[first + (lane * 7 + 3) % width])
        expected.append(np.where(lane - 3 >= first, x[np.maximum(lane - 3, 0)], x))
        expected.append(np.where(lane + 3 < first + width, x[np.minimum(lane + 3, 31)], x))
        expected.append(np.where((lane ^ 5) < first + width, x[lane ^ 5], x))
    expected.append(x[lane ^ 1] * 2 + 1)
    assert (wrapper("shuffles", x, (13, 32), np.int32) == np.stack(expected)).all()


def test_votes_and_reductions(wrapper):
    x, lane = random(32, seed=1), np.arange(32)
    x[[3, 9, 30]] = x[5]
    bits = x.view(np.uint32)
    weights = np.uint64(1) << lane.astype(np.uint64)

    def lanes(chosen):
        return int(weights[chosen].sum())

    remainder = np.fmod(x, 3)
    rows = [
        int(x.astype(np.int64).sum()),
        int(x.min()),
        int(x.max()),
        int(bits.astype(np.uint64).sum()),
        int(bits.min()),
        int(bits.max()),
        int(np.bitwise_and.reduce(bits)),
        int(np.bitwise_or.reduce(bits)),
        int(np.bitwise_xor.reduce(bits)),
        lanes(x > 0),
        1,
        0,
        [lanes(remainder == r) for r in remainder],
        0,
        0,
        2**32 - 1,
        1,
        np.where(lane < 20, int(x[:20].max()), lanes((x > 0) & (lane >= 20))),
    ]
    got = wrapper("votes_and_reductions", x, (18, 32), np.uint32)
    for row, values in zip(got, rows, strict=True):
        assert (row == np.broadcast_to(np.array(values, np.int64) % 2**32, 32)).all()


# ---- CTAs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [0, 2**31 - 1, -(2**31)])
def test_barriers(wrapper, shift):
    x = np.clip(random(128).astype(np.int64) + shift, -(2**31), 2**31 - 4).astype(np.int32)
    got = wrapper("barriers", x, (6, 128), np.int32)
    assert (got[0] == (x > 0).sum()).all() and (got[1] == (x > 0).all()).all()
    assert (got[2] == (x > 0).any()).all()
    for turn in range(3):
        assert (got[3 + turn, 64:] == x[:64][::-1] + turn).all()


def test_atomics(wrapper):
    x = random(128) // 256
    reduced = np.bitwise_or.reduce(x), np.bitwise_xor.reduce(x)
    expected = [x.sum(), min(x.min(), 0), max(x.max(), 0), *reduced, -x.sum(), 128]
    got = wrapper("atomics", x, (128,), np.int32)
    assert got[:7].tolist() == [int(e) for e in expected] and got[8] == x.sum()


# ---- arithmetic ---------------------------------------------------------------------------------------
def floats() -> np.ndarray:
    """Of every size and sign, ties of both half formats, and the odd ones."""
    x = random(1024).view(np.float32).copy()
    x[:256] = (np.random.default_rng(1).standard_normal(256) * 100).astype(np.float32)
    ties = (np.arange(64, dtype=np.int64) * 0x8000 + 0x3F800000).astype(np.int32).view(np.float32)
    x[256:320], x[320:384] = ties, 1 + np.arange(64, dtype=np.float32) * 2.0**-11
    x[384:448] = np.arange(64, dtype=np.float32) * 2.0**-26
    x[448:458] = [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 3.4e38, -1e-45]
    return x


def equal(got, expected) -> bool:
    return bool(((got == expected) | (np.isnan(got) & np.isnan(expected))).all())


def test_powers_of_two(wrapper):
    x = np.linspace(-150, 130, 1024, dtype=np.float32)
    x[:4] = [-np.inf, 0, -126, 127]
    expected = np.exp2(x.astype(np.float64))
    expected[expected < 2.0**-126] = 0
    got = wrapper("powers_of_two", x, (1024,), np.float32)
    assert got[:4].tolist() == [0, 1, 2.0**-126, 2.0**127]
    finite = expected < 2.0**128
    assert np.isinf(got[~finite]).all()
    np.testing.assert_allclose(got[finite], expected[finite], rtol=3e-7, atol=2.0**-126)


def test_half_floats(wrapper):
    x = floats()
    got = wrapper("half_floats", x, (6, 1024), np.uint32)
    for row, dtype in enumerate(HALVES.values()):
        half = torch.from_numpy(x).to(dtype)
        wide = half.float().numpy()
        low = torch.from_numpy((got[row] & 0xFFFF).astype(np.int32)).short().view(dtype).float().numpy()
        high = torch.from_numpy((got[row] >> 16).astype(np.int32)).short().view(dtype).float().numpy()
        assert equal(low, wide) and equal(high, wide[::-1])
        assert equal(got[2 + row].view(np.float32), wide if row == 0 else wide[::-1])
        assert equal(got[4 + row].view(np.float32), wide)


def test_bit_operations(wrapper):
    x = random(1024)
    x[:4] = [0, 1, -1, -(2**31)]
    bits, other = (a.view(np.uint32).astype(np.uint64).tolist() for a in (x, x[::-1]))

    def bytes_of(a, b, selector):
        pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        return int.from_bytes(bytes((pool[c & 7] >> 7) * 255 if c & 8 else pool[c] for c in chosen), "little")

    wide = [b << 32 | a for a, b in zip(bits, other, strict=True)]
    rows = [
        [b.bit_count() for b in bits],
        [32 - b.bit_length() for b in bits],
        [(b & -b).bit_length() for b in bits],
        [int(f"{b:032b}"[::-1], 2) for b in bits],
        [a * b >> 32 for a, b in zip(bits, other, strict=True)],
        [(int(a) * int(b) >> 32) % 2**32 for a, b in zip(x, x[::-1], strict=True)],
        [bytes_of(a, b, 0x1053) for a, b in zip(bits, other, strict=True)],
        [bytes_of(a, b, 0x4F8E) for a, b in zip(bits, other, strict=True)],
        [(w << (i % 40 & 31)) >> 32 & 0xFFFFFFFF for i, w in enumerate(wide)],
        [w >> (i % 40 & 31) & 0xFFFFFFFF for i, w in enumerate(wide)],
    ]
    assert wrapper("bit_operations", x, (10, 1024), np.uint32).tolist() == rows


def test_extremes_and_roundings(wrapper):
    x = floats()
    y = x[::-1]
    got = wrapper("extremes_and_roundings", x, (11, 1024), np.float32)
    with np.errstate(all="ignore"):
        exact = x.astype(np.float64)
        small = np.where(np.abs(x) < 1e6, x, np.float32(0))
        expected = [
            np.fmax(x, y),
            np.fmin(x, y),
            np.fmax(x, y),
            np.fmin(x, y),
            x * y,
            x + y,
            None,
            np.where(x > 0, np.minimum(x, 1), 0),
            np.rint(small),
            np.floor(small),
            np.trunc(small),
        ]
        fused = (exact * y + exact).astype(np.float32)
    for row, values in enumerate(expected):
        assert values is None or equal(got[row], values), row
    normal = np.abs(fused) > 2.0**-120
    np.testing.assert_allclose(got[6][normal], fused[normal], rtol=2e-7)


# ---- the emulator against the hardware ----------------------------------------------------------------
WRAPPERS = {
    "matrix_product_bfloat16": ((16, 8), np.float32),
    "matrix_product_float16": ((16, 8), np.float32),
    "matrix_load": ((256,), np.int16),
    "matrix_load_transposed": ((256,), np.int16),
    "asynchronous_copy": ((256,), np.int32),
    "shuffles": ((13, 32), np.int32),
    "votes_and_reductions": ((18, 32), np.int32),
    "barriers": ((6, 128), np.int32),
    "atomics": ((128,), np.int32),
    "powers_of_two": ((1024,), np.float32),
    "half_floats": ((6, 1024), np.uint32),
    "bit_operations": ((10, 1024), np.uint32),
    "extremes_and_roundings": ((11, 1024), np.float32),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_emulator_gives_what_the_hardware_gives(name):
    """Random bits, but finite halves, and floats that are no NaN: its bits mean nothing. Products and powers
    may differ by roundings."""
    x = random(1024, seed=2) & (0x3FFF3FFF if name.startswith("matrix_product") else ~0x00800000)
    if name == "powers_of_two":
        x = np.linspace(-130, 127, 1024, dtype=np.float32)
    hardware, emulated = (run_wrapper(backend, name, x, *WRAPPERS[name]) for backend in ("cuda", "simt"))
    if hardware.dtype == np.float32:
        np.testing.assert_allclose(emulated, hardware, rtol=3e-6, atol=2.0**-126)
    else:
        assert (emulated == hardware).all()
