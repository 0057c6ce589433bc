"""The tile walks that CPU and CUDA kernels share (csrc/core/span_mask.h), against dense masks."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
KEYS = 150


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("core") / "span_mask.so"
    source = Path(__file__).with_name("span_mask.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library],
        check=True,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.visible_bits.restype = ctypes.c_uint64
    return loaded


@st.composite
def span_rows(draw):
    """int32 [rows, R, 2], sorted and disjoint within a row; some are empty. Half the time all rows agree."""
    rows, count = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    cuts = st.lists(st.integers(0, KEYS), min_size=2 * count, max_size=2 * count).map(sorted)
    drawn = [draw(cuts)] * rows if draw(st.booleans()) else [draw(cuts) for _ in range(rows)]
    return torch.tensor(drawn, dtype=torch.int32).view(rows, count, 2)


def dense(spans):
    key = torch.arange(KEYS)
    return ((spans[..., :1] <= key) & (key < spans[..., 1:])).any(-2)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@given(span_rows(), st.sampled_from([1, 16, 64]))
def test_key_walk_visits_every_visible_key_once_and_knows_what_all_see(core, spans, limit):
    ranges = torch.empty(KEYS, 3, dtype=torch.int32)
    found = core.key_walk(pointer(spans), *spans.shape[:2], limit, pointer(ranges))
    visible, covered = dense(spans), torch.zeros(KEYS, dtype=torch.int32)
    done = 0
    for begin, end, full in ranges[:found].tolist():
        assert done <= begin < end <= begin + limit
        covered[begin:end] += 1
        assert not full or visible[:, begin:end].all()
        done = end
    assert covered[visible.any(0)].eq(1).all()
    if len(set(map(str, spans.tolist()))) == 1 and spans.shape[1] == 1:
        assert ranges[:found, 2].all() and covered.sum() == visible[0].sum()


@given(span_rows(), st.integers(0, KEYS - 1), st.integers(1, 64))
def test_visibility_of_a_tile_of_keys(core, spans, begin, count):
    end = min(begin + count, KEYS)
    seen = ("none", "partial", "full")[core.tile_visibility(pointer(spans), *spans.shape[:2], begin, end)]
    visible = dense(spans)[:, begin:end]
    assert seen != "none" or not visible.any()
    assert seen != "full" or visible.all()
    if len(spans) == 1 and spans.shape[1] == 1:
        exact = "full" if visible.all() else "partial" if visible.any() else "none"
        assert seen == exact


@given(st.integers(0, KEYS), st.integers(0, KEYS), st.integers(0, KEYS))
def test_a_bit_for_every_key_that_is_seen(core, start, end, begin):
    bits = core.visible_bits(start, end, begin)
    assert [bits >> i & 1 for i in range(64)] == [start <= begin + i < end for i in range(64)]
