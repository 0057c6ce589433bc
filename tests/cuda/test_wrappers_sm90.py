"""Wrappers of Hopper's PTX, as test_wrappers.py: products from every layout, bulk copies, their barriers."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from simt.wrapper_kernels import run_wrapper

pytestmark = pytest.mark.hopper


class Product(NamedTuple):
    """A [64, depth] · B [depth, columns]. a, b: which index runs along the rows in memory, "k" that of the
    sum; "registers": A is held there."""

    a: str
    b: str
    columns: int
    dtype: torch.dtype = torch.bfloat16
    depth: int = 64


PRODUCTS = {
    "product_k_k_128": Product("k", "k", 128),
    "product_k_k_32": Product("k", "k", 32),
    "product_k_k_32_float16": Product("k", "k", 32, torch.float16),
    "product_k_k_16": Product("k", "k", 16),
    "product_k_k_16_float16": Product("k", "k", 16, torch.float16),
    "product_k_k_8": Product("k", "k", 8),
    "product_mn_k_64": Product("mn", "k", 64),
    "product_k_mn_128": Product("k", "mn", 128),
    "product_mn_mn_64": Product("mn", "mn", 64, torch.float16),
    "product_registers_mn_128": Product("registers", "mn", 128),
    "product_registers_k_8": Product("registers", "k", 8),
    "product_registers_k_16": Product("registers", "k", 16, torch.float16),
    "product_registers_k_32": Product("registers", "k", 32),
    "product_registers_k_64": Product("registers", "k", 64, torch.float16),
    "product_two_panels_k_k_128": Product("k", "k", 128, depth=128),
    "product_two_panels_k_mn_64": Product("k", "mn", 64, torch.float16, depth=128),
    "product_two_panels_mn_k_32": Product("mn", "k", 32, depth=128),
    "product_two_panels_registers_mn_128": Product("registers", "mn", 128, depth=128),
}


def operands(name: str) -> tuple[np.ndarray, torch.Tensor]:
    """What the kernel reads, and A·B: small integers, so that every sum is exact."""
    a_layout, b_layout, columns, dtype, depth = PRODUCTS[name]
    a, b = torch.randint(-8, 9, (64, depth)), torch.randint(-8, 9, (depth, columns))
    a_bits, b_bits = (a.T if a_layout == "mn" else a), (b if b_layout == "mn" else b.T)
    bits = torch.cat([a_bits.flatten(), b_bits.flatten()]).to(dtype).view(torch.int16).numpy()
    return bits, a @ b


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_warpgroup(wrapper, name):
    bits, expected = operands(name)
    assert (wrapper(name, bits, expected.shape, np.float32) == expected.numpy()).all()


def test_a_group_is_there_while_the_next_is_pending(wrapper):
    a, b = torch.randint(-8, 9, (64, 64)), torch.randint(-8, 9, (128, 64))
    bits = torch.cat([a, b]).to(torch.bfloat16).view(torch.int16).numpy()
    got = wrapper("pending_group", bits, (2, 64, 64), np.float32)
    assert (got == torch.stack([a @ b[:64].T, a @ b[64:].T]).numpy()).all()


@pytest.mark.parametrize("division", ["56_224", "72_216"])
def test_warpgroups_divide_their_registers(wrapper, division):
    """As the attention kernels do, which the values that a thread holds survive."""
    values = np.random.default_rng(0).integers(-8, 9, 128 * 64).astype(np.float32)
    thread, turn, held = np.ogrid[:256, :4, :160]
    expected = (values[(thread + 256 * turn + 7 * held) % values.size] * (1 + held % 3)).sum((1, 2))
    got = wrapper(f"divided_registers_{division}", values, (256,), np.float32)
    assert (got == expected).all()


def test_boxes_are_swizzled_and_zero_outside_the_tensor(wrapper):
    x = np.arange(1, 2 * 3 * 10 * 72 + 1, dtype=np.int16).reshape(2, 3, 10, 72)
    panels = wrapper("boxes", x, (3, 8, 8, 8), np.int16)  # [box][row][piece of 16 bytes][element]
    padded = np.zeros((2, 3, 30, 200), np.int16)
    padded[:, :, 10:20, 64:136] = x
    for panel, (batch, head, y, column) in zip(
        panels, [(1, 2, 1, 0), (0, 0, 5, 16), (1, 1, -3, -8)], strict=True
    ):
        box = padded[batch, head, 10 + y : 18 + y, 64 + column : 128 + column].reshape(8, 8, 8)
        for row in range(8):
            assert (panel[row] == box[row, np.arange(8) ^ row]).all()


def test_a_ring_of_buffers(wrapper):
    x = torch.randint(-8, 9, (64, 64))
    got = wrapper("ring", x.to(torch.bfloat16).view(torch.int16).numpy(), (64,), np.float32)
    assert (got == x.sum(0).numpy()).all()


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_emulator_gives_what_the_hardware_gives(name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels of Hopper need compute capability 9.0")
    bits, expected = operands(name)
    bits = (bits ^ np.random.default_rng(0).integers(0, 0x3FFF, bits.shape)).astype(np.int16) & 0x3FFF
    shape = expected.shape
    hardware, emulated = (
        run_wrapper(b, name, bits, shape, np.float32, family="_sm90") for b in ("cuda", "simt")
    )
    np.testing.assert_allclose(emulated, hardware, rtol=1e-4, atol=1e-4)
