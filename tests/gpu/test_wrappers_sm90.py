"""Wrappers of Hopper's PTX, as test_wrappers.py: products from every layout, bulk copies, their barriers."""

import numpy as np
import pytest
import torch
from wrapper_kernels import run_wrapper

pytestmark = pytest.mark.hopper

PRODUCTS = {
    "product_k_k_128": torch.bfloat16,
    "product_k_k_8": torch.bfloat16,
    "product_mn_k_64": torch.bfloat16,
    "product_k_mn_128": torch.bfloat16,
    "product_mn_mn_64": torch.float16,
    "product_registers_mn_128": torch.bfloat16,
    "product_registers_k_64": torch.float16,
}


def operands(name: str) -> tuple[np.ndarray, torch.Tensor]:
    """What the kernel reads, and A·B: small integers, so that every sum is exact."""
    a_layout, b_layout, columns = name.split("_")[1:]
    columns = int(columns)
    a = torch.randint(-8, 9, (64, 64))
    b = torch.randint(-8, 9, (64, columns) if b_layout == "mn" else (columns, 64))
    bits = torch.cat([a.flatten(), b.flatten()]).to(PRODUCTS[name]).view(torch.int16).numpy()
    return bits, (a.T if a_layout == "mn" else a) @ (b if b_layout == "mn" else b.T)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_a_warpgroup(wrapper, name):
    bits, expected = operands(name)
    assert (wrapper(name, bits, expected.shape, np.float32) == expected.numpy()).all()


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
