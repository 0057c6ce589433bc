"""advance_ on the CPU: against its plain Python reference, and the course of whole decodings."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dllm_kernels import BlockRows, advance_
from dllm_kernels.ops import reference
from dllm_kernels.ops.advance import row_shapes
from dllm_kernels.sampling.schedules import llada_schedule

MASK, END = 9, 8


def canvas_of(*rows, dtype=torch.int64):
    """Rows of text: "?" is a mask, "." the end token, every other character token 1."""
    tokens = [[{"?": MASK, ".": END}.get(c, 1) for c in row] for row in rows]
    longest = max(map(len, tokens), default=0)
    return torch.tensor([row + [1] * (longest - len(row)) for row in tokens], dtype=dtype)


def rows_of(canvas, size, queries, *, given=0, stop=None, steps=0, cached=0):
    """All rows just admitted, to the length of the canvas."""
    rows = BlockRows.empty(len(canvas), size, queries, canvas.device)
    for row in range(len(canvas)):
        rows.admit_(
            row,
            given=given,
            stop=stop or canvas.shape[1],
            canvas_end=canvas.shape[1],
            steps=steps,
            cached=cached,
        )
    return rows


def copied(rows):
    return replace(rows, buffer=rows.buffer.clone())


def assert_same(rows, expected):
    for name in row_shapes(rows.block_size, rows.queries):
        assert torch.equal(getattr(rows, name), getattr(expected, name)), name


def commit_some(canvas, rows, draw_count):
    """Unmask the first few candidates of every row, as a commit would."""
    for b, positions in enumerate(rows.candidates.tolist()):
        masked = [p for p in positions if p >= 0 and canvas[b, p] == MASK]
        for p in masked[: draw_count(b, len(masked))]:
            canvas[b, p] = END if torch.rand(()) < 0.1 else 1


@given(st.data())
@settings(max_examples=40)
def test_equals_the_reference_from_admission_to_the_end(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    size, batch = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    queries = draw(st.integers(size, 3 * size))
    length = draw(st.integers(1, 5)) * size
    canvas = torch.where(torch.rand(batch, length) < 0.5, MASK, 1).to(
        draw(st.sampled_from([torch.int32, torch.int64]))
    )
    rows = BlockRows.empty(batch, size, queries, "cpu")
    for row in range(batch):
        prompt = draw(st.integers(0, length))
        canvas[row, :prompt] = 1
        rows.admit_(
            row,
            given=prompt,
            stop=draw(st.integers(prompt, length)),
            canvas_end=length,
            steps=draw(st.integers(0, 4)),
        )
    options = dict(mask_id=MASK, stop_ids=[END, 7], quota_total=draw(st.sampled_from([None, size])))
    for _ in range(4 * length):
        expected = copied(rows)
        advance_(canvas, rows, **options)
        reference.advance_(canvas, expected, **options)
        assert_same(rows, expected)
        if rows.finished.all():
            break
        commit_some(canvas, rows, lambda b, masks: max(1, min(int(rows.quota[b]), masks)))
    assert rows.finished.all()


def test_a_block_is_decoded_to_its_end_and_written_with_the_first_step_of_the_next():
    canvas = canvas_of("aaaaa???????")
    rows = rows_of(canvas, 4, 8, given=5, steps=2)
    advance_(canvas, rows, mask_id=MASK)  # finds the block at 4, in one forward with the prompt's first block
    assert rows.block_start.tolist() == [4] and rows.q_lengths.tolist() == [8] and rows.quota.tolist() == [2]
    assert rows.candidates.tolist() == [[-1, 5, 6, 7]]
    assert rows.write_positions.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1]]
    assert rows.fresh_spans[0, :, 0].tolist() == [[0, 4]] * 4 + [[0, 8]] * 4

    canvas[0, 5:7] = 1
    advance_(canvas, rows, mask_id=MASK)  # second step of the block: its four tokens over four cached ones
    assert rows.cached.tolist() == [4] and rows.cache_spans.tolist() == [[[[0, 4]]]]
    assert rows.query_positions.tolist() == [[4, 5, 6, 7, 0, 0, 0, 0]] and rows.q_lengths.tolist() == [4]
    assert rows.quota.tolist() == [1] and (rows.write_positions == -1).all()

    canvas[0, 7] = 1
    advance_(canvas, rows, mask_id=MASK)  # the next block, together with the finished one, which is written
    assert rows.block_start.tolist() == [8] and rows.cached.tolist() == [4] and rows.q_lengths.tolist() == [8]
    assert rows.candidates.tolist() == [[8, 9, 10, 11]] and rows.quota.tolist() == [2]
    assert rows.write_positions.tolist() == [[4, 5, 6, 7, -1, -1, -1, -1]]
    assert (rows.step.tolist(), rows.block_step.tolist()) == ([2], [0])

    canvas[0, 8:] = 1
    advance_(canvas, rows, mask_id=MASK)
    assert rows.finished.all() and rows.q_lengths.tolist() == [0] and (rows.candidates == -1).all()
    before = copied(rows)
    advance_(canvas, rows, mask_id=MASK)
    assert_same(rows, before)


def test_a_long_prompt_is_caught_up_with_before_anything_is_committed():
    canvas = canvas_of("a" * 22 + "??")
    rows = rows_of(canvas, 4, 8, given=22)
    seen = []
    for _ in range(3):
        advance_(canvas, rows, mask_id=MASK)
        seen.append(
            (int(rows.cached), int(rows.q_lengths), int(rows.quota), rows.write_positions[0].tolist())
        )
    assert seen == [
        (0, 8, 0, list(range(8))),
        (8, 8, 0, list(range(8, 16))),
        (16, 8, 1, [16, 17, 18, 19, -1, -1, -1, -1]),
    ]
    assert rows.step.tolist() == [0]  # catching up is no step: noise is keyed as without it


def test_without_room_for_two_blocks_a_finished_one_gets_a_forward_of_its_own():
    canvas = canvas_of("????????")
    rows = rows_of(canvas, 4, 4)
    advance_(canvas, rows, mask_id=MASK)
    canvas[0, :4] = 1
    advance_(canvas, rows, mask_id=MASK)
    assert rows.block_start.tolist() == [4] and (rows.candidates == -1).all()
    assert rows.write_positions.tolist() == [[0, 1, 2, 3]]
    advance_(canvas, rows, mask_id=MASK)
    assert rows.candidates.tolist() == [[4, 5, 6, 7]] and rows.cached.tolist() == [4]


def test_an_end_token_ends_the_row_when_no_mask_stands_before_it():
    canvas = canvas_of("a.????.?", "a.?.????", "a...????")
    rows = rows_of(canvas, 4, 8, given=2)
    advance_(canvas, rows, mask_id=MASK, stop_ids=[END])
    assert rows.finished.tolist() == [False, False, True]  # an end token of the prompt ends nothing
    canvas[:2, 2] = 1
    advance_(canvas, rows, mask_id=MASK, stop_ids=[END])
    assert rows.finished.tolist() == [False, True, True]


def test_masks_beyond_the_stop_are_candidates_but_end_nothing():
    canvas = canvas_of("aa??????")
    rows = rows_of(canvas, 8, 8, given=2, stop=5)
    advance_(canvas, rows, mask_id=MASK)
    assert rows.candidates.tolist() == [[-1, -1, 2, 3, 4, 5, 6, 7]] and rows.block_masks.tolist() == [6]
    canvas[0, 2:5] = 1
    advance_(canvas, rows, mask_id=MASK)
    assert rows.finished.all()


def test_blocks_without_masks_are_skipped():
    canvas = canvas_of("?aaaaaaaaaa?")
    rows = rows_of(canvas, 3, 12)
    advance_(canvas, rows, mask_id=MASK)
    canvas[0, 0] = 1
    advance_(canvas, rows, mask_id=MASK)
    assert rows.block_start.tolist() == [9] and rows.q_lengths.tolist() == [12]


@pytest.mark.parametrize("masks, steps", [(32, 32), (32, 5), (7, 3), (5, 8), (1, 1)])
def test_quotas_are_those_of_the_llada_schedule(masks, steps):
    canvas = torch.full((1, masks), MASK)
    rows, quotas = rows_of(canvas, masks, masks, steps=steps), []
    for _ in range(steps):
        advance_(canvas, rows, mask_id=MASK)
        quotas.append(int(rows.quota))
    assert quotas == llada_schedule(masks, steps)
    advance_(canvas, rows, mask_id=MASK)
    assert rows.quota.tolist() == [masks]  # a step too many leaves no mask


def test_opcheck():
    canvas = canvas_of("aa??????", "a???????")
    rows = rows_of(canvas, 4, 8, given=1)
    opcheck(torch.ops.dllm_kernels.advance_.default, (canvas, rows.buffer, 4, 8, MASK, 0, [END]))


def test_rows_are_views_of_one_buffer_that_they_fill():
    rows = BlockRows.empty(3, 4, 8, "cpu")
    shapes = row_shapes(4, 8)
    for number, (name, shape) in enumerate(shapes.items()):
        assert getattr(rows, name).shape == (3, *shape) and getattr(rows, name).is_contiguous()
        getattr(rows, name).fill_(number)
    counts = torch.tensor([getattr(rows, name).numel() for name in shapes])
    assert torch.equal(rows.buffer, torch.arange(len(shapes)).repeat_interleave(counts).int())


def test_python_knows_every_field_of_the_layout():
    assert [field.name for field in fields(BlockRows) if not field.init] == [*row_shapes(4, 8)]


@pytest.mark.parametrize(
    "rows, size, queries, text",
    [
        (torch.zeros(97).int(), 4, 8, r"rows must be contiguous \[49\], 49 for each .*, got shape \[97\]"),
        (torch.zeros(49), 4, 8, "rows must be int32, got float32"),
        (torch.zeros(49).int(), 0, 8, "block_size must be at least 1, got 0"),
        (torch.zeros(49).int(), 9, 8, r"queries must be from 9 \(block_size\) to"),
        (torch.zeros(1, 49).int(), 4, 8, r"rows must be contiguous \[49\]"),
        (torch.zeros(98).int()[::2], 4, 8, r"rows must be contiguous \[49\], .*, not contiguous"),
    ],
)
def test_a_bad_buffer_is_refused(rows, size, queries, text):
    with pytest.raises(ValueError, match=text):
        torch.ops.dllm_kernels.advance_(canvas_of("aa??????"), rows, size, queries, MASK)


@pytest.mark.parametrize(
    "buffer", [torch.zeros(50).int(), torch.zeros(49), torch.zeros(1, 49).int(), torch.zeros(98).int()[::2]]
)
def test_rows_refuse_a_buffer_that_does_not_hold_them(buffer):
    with pytest.raises(ValueError, match=r"buffer must be contiguous int32 \[B \* 49\], got"):
        BlockRows(buffer, 4, 8)


def test_rows_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"rows must be contiguous \[49\], .*, got shape \[98\]"):
        advance_(canvas_of("aa??????"), BlockRows.empty(2, 4, 8, "cpu"), mask_id=MASK)


def test_bad_options_are_refused_by_name():
    canvas = canvas_of("aa??????")
    rows = rows_of(canvas, 4, 8)
    with pytest.raises(TypeError, match="rows must be a BlockRows, got int"):
        advance_(canvas, 3, mask_id=MASK)
    with pytest.raises(ValueError, match="canvas must be int64 or int32, got float32"):
        advance_(canvas.float(), rows, mask_id=MASK)
    with pytest.raises(ValueError, match="stop_ids may list at most 16 ids, got 17"):
        advance_(canvas, rows, mask_id=MASK, stop_ids=range(17))
    with pytest.raises(ValueError, match="quota_total must lie in 1"):
        advance_(canvas, rows, mask_id=MASK, quota_total=0)
    with pytest.raises(ValueError, match="queries must lie in 4"):
        BlockRows.empty(1, 4, 3, "cpu")


@pytest.mark.parametrize("name", ["given", "canvas_end", "stop", "block_start", "cached", "q_lengths"])
def test_positions_outside_the_canvas_are_refused(name):
    canvas = canvas_of("aa??????")
    for value in (-5, 9):
        rows = rows_of(canvas, 4, 8)
        getattr(rows, name)[0] = value
        with pytest.raises(ValueError, match=rf"{name}\[0\] must be from 0 to 8 .*, got {value}"):
            advance_(canvas, rows, mask_id=MASK)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(stop=1), "stop must lie in 2"),
        (dict(canvas_end=5), "canvas_end must lie in 6"),
        (dict(cached=12), r"cached must lie in 0..8, got 12"),
        (dict(cached=3), "cached must be whole blocks of 4, got 3"),
        (dict(steps=-1), "steps must lie in 0"),
    ],
)
def test_what_is_asked_of_a_row_must_make_sense(change, text):
    rows = BlockRows.empty(1, 4, 8, "cpu")
    with pytest.raises(ValueError, match=text):
        rows.admit_(0, **{**dict(given=2, stop=6, canvas_end=8), **change})
    assert rows.finished.all()


@pytest.mark.parametrize("name", ["steps", "block_masks", "step", "block_step"])
def test_negative_counts_are_refused(name):
    canvas = canvas_of("aa??????")
    for value in (-1, -5, -(2**31)):
        rows = rows_of(canvas, 4, 8)
        getattr(rows, name)[0] = value
        before = copied(rows)
        with pytest.raises(ValueError, match=rf"{name}\[0\] must be >= 0, got {value}"):
            advance_(canvas, rows, mask_id=MASK)
        assert_same(rows, before)


def test_what_is_cached_ends_where_the_active_block_begins():
    canvas = canvas_of("aaaaaaaaaaaa", "aaaa????????")
    rows = rows_of(canvas, 4, 8, cached=8)
    before = copied(rows)
    with pytest.raises(ValueError, match=r"cached\[1\] must be from 0 to 4 .*active block begins\), got 8"):
        advance_(canvas, rows, mask_id=MASK)
    assert_same(rows, before)  # the row that was good is where it was


def test_steps_are_counted_to_the_largest_number():
    canvas = canvas_of("????????")
    rows = rows_of(canvas, 4, 8)
    advance_(canvas, rows, mask_id=MASK)
    rows.step[0] = rows.block_step[0] = 2**31 - 1
    advance_(canvas, rows, mask_id=MASK)
    assert rows.step.tolist() == rows.block_step.tolist() == [2**31 - 1]
    assert rows.quota.tolist() == [4]  # a step too many leaves no mask


@given(st.data())
@settings(max_examples=60)
def test_rows_that_hold_anything_are_refused_or_stay_inside_the_canvas(data):
    """Whatever the tensors hold: no position outside the canvas, no negative length or quota."""
    length, extremes = 12, [-(2**31), -1, 0, 1, 4, 5, 8, 12, 13, 2**31 - 1]
    canvas = canvas_of("aaaa?a??????", "????????????", "aaaaaaaaaaaa")
    rows = rows_of(canvas, 4, data.draw(st.sampled_from([4, 6, 8])))
    for name in row_shapes(rows.block_size, rows.queries):
        values = getattr(rows, name)
        if values.dim() == 1 and data.draw(st.booleans()):
            drawn = [data.draw(st.sampled_from(extremes)) for _ in range(len(values))]
            values.copy_(torch.tensor(drawn))
    before = copied(rows)
    try:
        advance_(canvas, rows, mask_id=MASK, quota_total=data.draw(st.sampled_from([None, 3])))
    except ValueError:
        assert_same(rows, before)
        return
    for positions in (rows.candidates, rows.query_positions, rows.write_positions, rows.block_start):
        assert positions.min() >= -1 and positions.max() <= length
    for lengths in (rows.q_lengths, rows.cached, rows.quota, rows.cache_spans, rows.fresh_spans):
        assert lengths.min() >= 0
    assert rows.q_lengths.max() <= rows.query_positions.shape[1]
