"""advance_ on CUDA against its plain Python reference, from admission to the end."""

from dataclasses import replace

import pytest
import torch

from dllm_kernels import BlockRows, advance_
from dllm_kernels.ops import reference
from dllm_kernels.ops.advance import row_shapes

MASK, END = 9, 8


def random_rows(size, queries, length, batch=4, dtype=torch.int64):
    """Canvases with prompts of any length and gaps, and their rows, just admitted."""
    canvas = torch.where(torch.rand(batch, length) < 0.6, MASK, 1).to(dtype)
    rows = BlockRows.empty(batch, size, queries, "cpu")
    for row in range(batch):
        given, stop = sorted(torch.randint(0, length + 1, (2,)).tolist())
        canvas[row, :given] = 1
        rows.admit_(row, given=given, stop=stop, canvas_end=length, steps=row)
    return canvas, rows


def copied(rows):
    return replace(rows, buffer=rows.buffer.clone())


def advance_on(gpu, canvas, rows, **options):
    gpu(lambda canvas, buffer: advance_(canvas, replace(rows, buffer=buffer), **options), canvas, rows.buffer)


def assert_same(rows, expected):
    for name in row_shapes(rows.block_size, rows.queries):
        assert torch.equal(getattr(rows, name), getattr(expected, name)), name


def commit_quotas(canvas, rows):
    for b, positions in enumerate(rows.candidates.tolist()):
        masked = [p for p in positions if p >= 0 and canvas[b, p] == MASK]
        for p in masked[: max(1, int(rows.quota[b]))]:
            canvas[b, p] = END if torch.rand(()) < 0.05 else 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    "size, queries, length", [(1, 1, 4), (4, 8, 20), (5, 7, 23), (32, 64, 96), (160, 400, 480)]
)
def test_equals_the_reference_from_admission_to_the_end(gpu, size, queries, length, dtype):
    canvas, rows = random_rows(size, queries, length, dtype=dtype)
    options = dict(mask_id=MASK, stop_ids=[END], quota_total=size if size == 4 else None)
    for _ in range(12):
        expected = copied(rows)
        advance_on(gpu, canvas, rows, **options)
        reference.advance_(canvas, expected, **options)
        assert_same(rows, expected)
        commit_quotas(canvas, rows)


def test_no_rows(gpu):
    canvas, rows = random_rows(4, 8, 12, batch=0)
    expected = copied(rows)
    advance_on(gpu, canvas, rows, mask_id=MASK)
    assert_same(rows, expected)
    assert rows.finished.tolist() == []


def test_what_rows_hold_is_cut_to_the_canvas(gpu):
    canvas, rows = random_rows(4, 8, 12, batch=1)
    for name in ("canvas_end", "stop", "block_start", "cached", "q_lengths"):
        for value in (-5, 2**31 - 1):
            bad = copied(rows)
            getattr(bad, name)[0] = value
            advance_on(gpu, canvas, bad, mask_id=MASK)
            assert 0 <= int(bad.block_start) <= 12 and (bad.query_positions < 12).all()


# ---- on a GPU only ------------------------------------------------------------------------------------
@pytest.mark.graph
def test_a_whole_decoding_in_replays_of_one_graph():
    canvas, rows = random_rows(4, 8, 24)
    expected_canvas, expected = canvas.clone(), copied(rows)
    canvas = canvas.cuda()
    rows = replace(rows, buffer=rows.buffer.cuda())
    options = dict(mask_id=MASK, stop_ids=[END])
    warm_up = copied(rows)
    advance_(canvas, warm_up, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance_(canvas, rows, **options)
    for _ in range(20):
        graph.replay()
        reference.advance_(expected_canvas, expected, **options)
        assert_same(replace(rows, buffer=rows.buffer.cpu()), expected)
        commit_quotas(expected_canvas, expected)
        canvas.copy_(expected_canvas)


def test_opcheck():
    canvas, rows = random_rows(4, 8, 12)
    arguments = canvas.cuda(), rows.buffer.cuda(), 4, 8, MASK, 0, [END]
    torch.library.opcheck(torch.ops.dllm_kernels.advance_.default, arguments)
