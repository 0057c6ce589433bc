"""Shared-memory layouts, work order and choice of the Hopper kernels, without a GPU."""

import ctypes
import itertools
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
DEPTH = 16
COLUMNS = 64  # of a panel


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("core") / "hopper_layouts.so"
    source = Path(__file__).with_name("hopper_layouts.cpp")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.hopper_serves.restype = ctypes.c_bool
    loaded.hopper_serves.argtypes = [ctypes.c_int] * 5 + [ctypes.c_long] * 2
    loaded.linear_serves.restype = ctypes.c_bool
    loaded.kernel_of_linear.argtypes = [
        *[ctypes.c_int] * 3,
        ctypes.c_bool,
        *[ctypes.c_int] * 2,
        *[ctypes.c_long] * 3,
        ctypes.c_bool,
        ctypes.c_long,
        *[ctypes.c_int] * 2,
        ctypes.c_bool,
    ]
    loaded.linear_serves.argtypes = [
        *[ctypes.c_int] * 3,
        ctypes.c_bool,
        ctypes.c_int,
        *[ctypes.c_long] * 3,
    ]
    loaded.stream_rows.argtypes = [ctypes.c_long]
    return loaded


# ---- panels and descriptors --------------------------------------------------------------------------
def test_pieces_of_a_panel_row_are_permuted_within_it(hopper):
    """Piece c of row r, 16 bytes, lies where piece c xor (r mod 8) would."""
    for row in range(24):
        for byte in range(128):
            piece = byte // 16 ^ row % 8
            assert hopper.offset_in_panel(row, byte) == row * 128 + piece * 16 + byte % 16


def operand(hopper, mn_major, panels, rows, step, size):
    addresses = (ctypes.c_int * (size * DEPTH))()
    hopper.operand_addresses(mn_major, panels, rows, step, size, addresses)
    return addresses


@pytest.mark.parametrize("first_row", [0, 64])
@pytest.mark.parametrize("step", range(8))
def test_descriptors_of_sums_along_rows_name_the_elements_that_the_copy_put_there(hopper, first_row, step):
    rows, panels = 128, 2048
    addresses = operand(hopper, False, panels + first_row * 128, rows, step, 64)
    for i in range(64):
        for k in range(DEPTH):
            panel, column = divmod(step * DEPTH + k, COLUMNS)
            expected = panels + panel * rows * 128 + hopper.offset_in_panel(first_row + i, column * 2)
            assert addresses[i * DEPTH + k] == expected


@pytest.mark.parametrize("step", range(8))
def test_descriptors_of_sums_across_rows_name_the_elements_that_the_copy_put_there(hopper, step):
    rows, panels = 128, 3072
    addresses = operand(hopper, True, panels, rows, step, 128)
    for i in range(128):
        for k in range(DEPTH):
            panel, column = divmod(i, COLUMNS)
            expected = panels + panel * rows * 128 + hopper.offset_in_panel(step * DEPTH + k, column * 2)
            assert addresses[i * DEPTH + k] == expected


# ---- work order --------------------------------------------------------------------------------------
def items_in_order(hopper, tiles, q_heads, pairs, together):
    item = (ctypes.c_int * 3)()
    for index in range(hopper.work_items(tiles, q_heads, pairs, together)):
        hopper.work_item(tiles, q_heads, pairs, together, index, item)
        yield tuple(item)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12))
def test_every_tile_of_every_head_is_taken_once(hopper, tiles, q_heads, batch, together):
    pairs = q_heads * batch
    items = list(items_in_order(hopper, tiles, q_heads, pairs, min(together, pairs)))
    every = {(b, h, tile) for b in range(batch) for h in range(q_heads) for tile in range(tiles)}
    assert len(items) == len(every) and set(items) == every


def test_late_tiles_come_first_and_heads_that_share_the_cache_together(hopper):
    items = list(items_in_order(hopper, tiles=2, q_heads=4, pairs=4, together=2))
    expected = [(0, head, tile) for heads in ((0, 1), (2, 3)) for tile in (1, 0) for head in heads]
    assert items == expected


@given(st.integers(1, 9), st.integers(1, 40))
def test_rounds_of_all_ctas_cover_every_index_once(hopper, ctas, items):
    rounds = -(-items // ctas)
    taken = [hopper.work_index(r, cta, ctas) for r in range(rounds) for cta in range(ctas)]
    assert sorted(taken) == list(range(rounds * ctas))
    for cta in range(ctas):  # a CTA may stop at the first index beyond the end
        mine = [hopper.work_index(r, cta, ctas) for r in range(rounds)]
        assert mine == sorted(mine)


# ---- choice ------------------------------------------------------------------------------------------
FITTING = {
    "capability": 90,
    "dtype": 1,
    "head_dim": 128,
    "q_len": 5,
    "kv_len": 7,
    "address": 1 << 20,
    "batch_stride": 4096,
}


@pytest.mark.parametrize("change", [{}, {"dtype": 2}, {"head_dim": 64}, {"q_len": 1}])
def test_hopper_kernels_serve_what_they_are_made_for(hopper, change):
    assert hopper.hopper_serves(*(FITTING | change).values())


@pytest.mark.parametrize(
    "change",
    [
        {"capability": 80},
        {"capability": 100},
        {"capability": 120},
        {"dtype": 0},
        {"head_dim": 96},
        {"head_dim": 256},
        {"q_len": 0},
        {"kv_len": 0},
        {"address": (1 << 20) + 8},
        {"batch_stride": 0},
        {"batch_stride": 4100},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)
def test_other_problems_are_left_to_the_kernels_for_every_gpu(hopper, change):
    assert not hopper.hopper_serves(*(FITTING | change).values())


# ---- linear_token_stats -------------------------------------------------------------------------------
@given(st.integers(1, 2**30))
def test_ranges_of_whole_units_cover_the_vocabulary(hopper, vocabulary):
    ids, count = ctypes.c_int(), ctypes.c_int()
    hopper.vocabulary_ranges(vocabulary, ctypes.byref(ids), ctypes.byref(count))
    ids, count = ids.value, count.value
    assert ids % 64 == 0 and 1 <= count <= 132
    assert (count - 1) * ids < vocabulary <= count * ids


def test_rows_of_a_cta_are_as_few_as_the_product_allows(hopper):
    rows = {n: hopper.stream_rows(n) for n in (1, 8, 9, 16, 17, 32, 33, 64, 65, 10**9)}
    assert list(rows.values()) == [8, 8, 16, 16, 32, 32, 64, 64, 64, 64]


LINEAR = {
    "capability": 90,
    "hidden_type": 1,
    "weight_type": 1,
    "float64": False,
    "hidden_size": 72,
    "weight_stride": 80,
    "hidden": 1 << 20,
    "weight": 1 << 20,
}


@pytest.mark.parametrize("change", [{}, {"hidden_type": 2, "weight_type": 2}, {"hidden_size": 8}])
def test_the_hopper_kernel_serves_16_bit_projections(hopper, change):
    assert hopper.linear_serves(*(LINEAR | change).values())


@pytest.mark.parametrize(
    "change",
    [
        {"capability": 80},
        {"capability": 100},
        {"hidden_type": 0},
        {"weight_type": 2},
        {"hidden_type": 0, "weight_type": 0},
        {"float64": True},
        {"hidden_size": 60},
        {"weight_stride": 84},
        {"weight_stride": 0},
        {"weight": (1 << 20) + 8},
        {"hidden": (1 << 20) + 8},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)
def test_other_projections_are_left_to_the_library(hopper, change):
    assert not hopper.linear_serves(*(LINEAR | change).values())


# ---- skinny_linear -------------------------------------------------------------------------------------
@given(st.integers(1, 2**31 - 200), st.integers(1, 2**31 - 200), st.sampled_from([1, 2]))
def test_splits_cover_the_inputs_and_have_enough_of_them(hopper, outputs, inputs, element_bytes):
    sizes, begins = (ctypes.c_int * 3)(), (ctypes.c_int * 17)()
    hopper.splits_of_linear(outputs, inputs, element_bytes, sizes, begins)
    tiles, steps, splits = sizes
    assert (tiles - 1) * 128 < outputs <= tiles * 128
    assert (steps - 1) * 128 < inputs * element_bytes <= steps * 128
    borders = list(begins)[: splits + 1]
    assert borders[0] == 0 and borders[-1] == steps and 1 <= splits <= 16
    assert splits == 1 or min(b - a for a, b in itertools.pairwise(borders)) >= 4
    assert splits == 1 or tiles * (splits - 1) < 96


ANY_TYPES, SM80, SM90, CUTLASS = range(4)
SKINNY = {
    "capability": 90,
    "x_type": 1,
    "weight_type": 1,
    "bytes": False,
    "inputs": 4096,
    "groups": 1,
    "weight_stride": 4096,
    "x": 256,
    "weight": 512,
    "e4m3": False,
    "rows": 32,
    "outputs": 4096,
    "bias_type": -1,
    "has_cutlass": True,
}
INT8 = {"bytes": True, "weight_type": 0, "rows": 65}
E4M3 = {"bytes": True, "weight_type": 0, "e4m3": True}


@pytest.mark.parametrize(
    "change, kernel",
    [
        ({}, SM90),
        ({"x_type": 2, "weight_type": 2}, SM90),
        ({"inputs": 8, "weight_stride": 8}, SM90),
        ({"weight_stride": 8192}, SM90),
        ({"capability": 80}, SM80),
        ({"capability": 100}, SM80),
        ({"weight_stride": 0}, SM80),
        ({"bytes": True, "weight_type": 0}, SM90),
        ({"bytes": True, "weight_type": 0, "groups": 64}, SM90),
        ({"bytes": True, "weight_type": 0, "capability": 80}, SM80),
        ({"bytes": True, "weight_type": 0, "groups": 128}, ANY_TYPES),
        ({"bytes": True, "weight_type": 0, "inputs": 4088}, ANY_TYPES),
        ({"bytes": True, "weight_type": 0, "weight_stride": 4104}, ANY_TYPES),
        ({"x_type": 0, "weight_type": 0}, ANY_TYPES),
        ({"x_type": 2}, ANY_TYPES),
        ({"inputs": 0}, ANY_TYPES),
        ({"inputs": 4092}, ANY_TYPES),
        ({"weight_stride": 4100}, ANY_TYPES),
        ({"x": 258}, ANY_TYPES),
        ({"weight": 520}, ANY_TYPES),
        ({"rows": 500}, SM90),
        (INT8, CUTLASS),
        (INT8 | {"x_type": 2, "bias_type": 2}, CUTLASS),
        (INT8 | {"rows": 64}, SM90),
        (INT8 | {"has_cutlass": False}, SM90),
        (INT8 | {"groups": 2}, SM90),
        (INT8 | {"outputs": 4100}, SM90),
        (INT8 | {"bias_type": 0}, SM90),
        (INT8 | {"weight_stride": 4080}, SM80),
        (INT8 | {"weight_stride": 4100}, ANY_TYPES),
        (INT8 | {"capability": 80}, SM80),
        (INT8 | {"capability": 100}, SM80),
        (INT8 | {"x_type": 0}, ANY_TYPES),
        (E4M3, CUTLASS),
        (E4M3 | {"rows": 1}, CUTLASS),
        (E4M3 | {"rows": 500}, CUTLASS),
        (E4M3 | {"has_cutlass": False}, SM80),
        (E4M3 | {"outputs": 4100}, SM80),
        (E4M3 | {"bias_type": 0}, SM80),
        (E4M3 | {"capability": 80}, SM80),
        (E4M3 | {"inputs": 4088}, ANY_TYPES),
        (E4M3 | {"weight": 520}, ANY_TYPES),
        (E4M3 | {"x_type": 0}, ANY_TYPES),
    ],
)
def test_a_linear_layer_goes_to_the_kernel_that_can_read_it(hopper, change, kernel):
    assert hopper.kernel_of_linear(*(SKINNY | change).values()) == kernel
