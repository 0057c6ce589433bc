"""The 8-bit float of weights="fp8" (csrc/core/e4m3.h) against torch.float8_e4m3fn."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("core") / "e4m3.so"
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).with_name("e4m3.cpp")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def nearest(core, x: torch.Tensor) -> torch.Tensor:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    core.nearest(ctypes.c_void_p(x.data_ptr()), x.numel(), ctypes.c_void_p(codes.data_ptr()))
    return codes


def test_every_code_has_its_value(core):
    codes = torch.arange(256).to(torch.uint8)
    values = torch.empty(256)
    core.value(ctypes.c_void_p(codes.data_ptr()), 256, ctypes.c_void_p(values.data_ptr()))
    torch.testing.assert_close(
        values, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
    )


def test_every_half_is_rounded_to_nearest(core):
    x = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(torch.float16).float()
    x = x[x.abs() <= 448]
    assert nearest(core, x).equal(x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_ties_and_their_neighbours(core):
    values = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).double()
    middles = ((values[1:] + values[:-1]) / 2).float()
    below, above = (torch.nextafter(middles, torch.tensor(end)) for end in (0.0, torch.inf))
    x = torch.cat([middles, below, above])
    x = torch.cat([x, -x])
    assert nearest(core, x).equal(x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_beyond_the_largest_number(core):
    x = torch.tensor([449.0, 1e30, -500.0, torch.inf, -torch.inf, torch.nan])
    assert nearest(core, x).tolist()[:5] == [0x7E, 0x7E, 0xFE, 0x7F, 0xFF]
    assert nearest(core, x)[5] & 0x7F == 0x7F
