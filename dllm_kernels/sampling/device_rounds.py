"""Block-causal rounds that stay on the device: the host only hands out rows, and collects them late.

`Rounds` asks after every step how far each row is. Here `advance_` moves the rows, so that every step is the
same sequence of launches on tensors that keep their place: on CUDA one graph is recorded and replayed
(cuda_graph.py). A block's first step also computes the block finished before it and leaves its keys and
values in the pages; rows that have finished, or have no work yet, pass through a step unchanged.

The tokens are those of `Rounds` with cache="block".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_kernels.models.attention import within_window
from dllm_kernels.ops.advance import BlockRows, advance_
from dllm_kernels.ops.attention import cached_block_attention
from dllm_kernels.ops.kv_cache import kv_write_
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.sampling.acceptance import rule_of
from dllm_kernels.sampling.canvases import Canvases
from dllm_kernels.sampling.cuda_graph import Step
from dllm_kernels.sampling.denoiser import ModelDenoiser
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.row_pages import RowPages
from dllm_kernels.sampling.views import SCHEMES, Rows, view_of

BLOCKS_AT_ONCE = 2  # in a row's forward: the active block, and the one before it


def serves(job: Job) -> bool:
    """Whether these rounds do what `job` asks: the exact block cache, and nothing that the host must see."""
    config = job.config
    rule = config.acceptance(1)
    return (
        isinstance(job.denoiser, ModelDenoiser)
        and job.scheme is SCHEMES["block"]
        and job.streams == 1
        and not (job.shift or config.history or config.parity)
        and rule.name not in ("bernoulli", "confident_stable", "edit")
        and (config.schedule == "llada" or not rule.needs_quota)
        and config.top_p is None
        and config.top_k is None
    )


class DeviceRounds:
    """All rows of one job, `slots` of them at a time.

    Of the slots: canvas int64 [slots, T]; unmask_step int64 [slots, T + 1], the last column a place for what
    is no candidate; rows: where they are; table int32 [slots, P]: their pages; sequence int32 [slots]: which
    row of the job is in it.
    """

    def __init__(self, job: Job, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        job.check_length(canvases)
        self.job, self.canvases, self.stop_ids = job, canvases, stop_ids
        self.device, self.size = job.device, job.config.block_size
        self.unmask_step = torch.full_like(canvases.ids, -1)
        self.row_forwards = torch.zeros(len(canvases.ids), dtype=torch.int64)
        self.forwards = 0
        self.blocks_of = [self._count_blocks(row) for row in range(len(canvases.ids))]
        self.rule = rule_of(job.config, self.blocks_of)
        slots = min(job.config.max_batch or len(canvases.ids), len(canvases.ids))
        shape = slots, canvases.ids.shape[1]
        self.canvas = torch.full(shape, canvases.fill, device=self.device)
        self.steps_of = torch.full((slots, shape[1] + 1), -1, device=self.device)
        self.sequence = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.rows = BlockRows.empty(slots, self.size, BLOCKS_AT_ONCE * self.size, self.device)
        self.done = torch.ones(slots, dtype=torch.bool, device=self.device)
        self.holds: list[int | None] = [None] * slots
        self.since = [0] * slots

    def run(self) -> None:
        """Every row to its end."""
        waiting = deque(range(len(self.canvases.ids)))
        with self.prepared() as step:
            while waiting or any(row is not None for row in self.holds):
                self.admit(waiting, step.launched)
                step.launch()
                self.collect(step.look())
                if step.launched > max(self.since) + self.most_steps():
                    raise RuntimeError("rows of the device do not come to an end")  # cannot happen

    @contextmanager
    def prepared(self) -> Iterator[Step]:
        """The step that every round launches. Afterwards pages have come back and the model is as it was
        found, whatever happened."""
        with self.job.denoiser.ready():
            cache = self.job.cache_for(self.canvases)
            self.shareable = self.job.shareable(self.canvases)
            self.pages = RowPages(cache, 1, self.canvases.ids.clone(), self.shareable, self.size)
            width = -(-int(self.canvases.end.max()) // cache.page_size)
            self.table = torch.zeros(len(self.holds), width, dtype=torch.int32, device=self.device)
            self.view = DeviceView(self.rows, self.table, cache)
            try:
                yield Step(self.step, self.done)
            finally:
                self.pages.release_all()

    def step(self) -> None:
        """One forward of every slot, one commit, and every row to its next step."""
        rows, job = self.rows, self.job
        self.view.begin()
        tokens = self.canvas.gather(1, rows.query_positions.long())
        queries = tokens.shape[1]
        place = (rows.candidates - rows.cached[:, None]).clamp(0, queries - 1)
        place = place + queries * torch.arange(len(place), device=place.device)[:, None]
        outputs, _ = job.denoiser.outputs(tokens, self.view, place.flatten())
        noise_ids = None
        if job.config.temperature > 0:
            fields = self.sequence[:, None], rows.candidates, rows.step[:, None]
            noise_ids = torch.stack(torch.broadcast_tensors(*fields), dim=-1)
        stats = job.denoiser.statistics(
            outputs, noise_ids=noise_ids, temperature=job.config.temperature, seed=job.config.seed,
            suppress_tokens=(job.mask_id, *job.config.suppress_tokens),
            confidence_exclude=job.config.begin_suppress_tokens,
        )  # fmt: skip
        accepted = commit_(
            self.canvas, rows.candidates, stats, self.rule, mask_id=job.mask_id, seed=job.config.seed,
            quota=rows.quota if self.rule.needs_quota else None, step=rows.step, sequence_ids=self.sequence,
        )  # fmt: skip
        nowhere = self.canvas.shape[1]
        at = rows.candidates.masked_fill(~accepted, nowhere).long()
        self.steps_of.scatter_(1, at, rows.step[:, None].expand_as(at).long())
        self.advance()
        self.done.copy_(rows.finished)

    def advance(self) -> None:
        """Every row to its next step."""
        whole_block = self.size if self.rule.name == "quota_or_threshold" else None
        advance_(
            self.canvas, self.rows, mask_id=self.job.mask_id, quota_total=whole_block, stop_ids=self.stop_ids
        )

    def admit(self, waiting: deque[int], launched: int) -> None:
        """Waiting rows into free slots; the launch after the next is the first that works on them."""
        for slot, row in enumerate(self.holds):
            if row is None and waiting:
                self.place(waiting.popleft(), slot, launched)

    def place(self, row: int, slot: int, launched: int) -> None:
        """Hand a slot to a row; what of its prompt is in nobody's pages yet is computed."""
        given, end, whole = (int(t[row]) for t in (self.canvases.given, self.canvases.end, self.shareable))
        cached = self.pages.admit(row, end, self.shareable)
        self.holds[slot], self.since[slot] = row, launched
        self.canvas[slot] = self.canvases.ids[row].to(self.device)
        self.steps_of[slot] = -1
        self.sequence[slot] = row
        self.table[slot] = 0
        pages = self.pages.table([row])
        self.table[slot, : pages.shape[1]] = pages[0]
        if whole > cached:
            self._compute_prompt(slot, cached, whole)
        self.rows.admit_(
            slot, given=given, stop=int(self.canvases.stop[row]), canvas_end=end,
            steps=self.job.config.steps_of_block(max(self.blocks_of[row], 1)) or 0, cached=whole,
        )  # fmt: skip

    def collect(self, looked: tuple[int, Tensor] | None) -> None:
        """Take over the rows that had finished when launch number `looked[0]` was done."""
        if looked is None:
            return
        number, done = looked
        self.forwards += 1
        for slot, finished in enumerate(done.tolist()):
            row = self.holds[slot]
            # A launch from before the row came, or the one that finds its first block, says nothing of it.
            if row is None or not finished or number < self.since[slot]:
                continue
            self.canvases.ids[row] = self.canvas[slot].cpu()
            self.unmask_step[row] = self.steps_of[slot, :-1].cpu()
            self.row_forwards[row] = int(self.rows.step[slot])
            self._fill_after_end(row)
            self.pages.release(row)
            self.holds[slot] = None

    def most_steps(self) -> int:
        """More than any row takes: one for each mask, each block to catch up with, and those in flight."""
        return 2 * self.canvas.shape[1] + 8

    def measured(self) -> dict:
        """What the output reports of the run."""
        return dict(forwards=self.forwards, row_forwards=self.row_forwards, exact=True, history=None)

    def _compute_prompt(self, slot: int, first: int, last: int) -> None:
        """Keys and values of the prompt's positions [first, last) into the row's pages."""
        bound = torch.tensor([[first], [last]], device=self.device)
        none = torch.zeros_like(bound[0])
        state = Rows(bound[1], bound[1], bound[1], bound[0], none.bool(), none)
        view = view_of(SCHEMES["block"], state, self.size, self.view.cache, self.table[slot : slot + 1])
        ids = self.canvas[slot, view.packing.position]
        self.job.denoiser.outputs(ids[None], view, none[:0])
        self.forwards += 1

    def _fill_after_end(self, row: int) -> None:
        """What stands after an end token with no mask before it was not worth computing."""
        ids, given, stop = self.canvases.ids[row], self.canvases.given[row], self.canvases.stop[row]
        position = torch.arange(len(ids))
        ends = torch.isin(ids, torch.tensor(self.stop_ids, dtype=ids.dtype)) & (position >= given)
        if not ends.any():
            return
        first = int(ends.int().argmax())
        if first < stop and not (ids[given:first] == self.job.mask_id).any():
            ids[first + 1 :] = self.canvases.fill
            self.unmask_step[row, first + 1 :] = -1

    def _count_blocks(self, row: int) -> int:
        """Blocks of a row that hold masks."""
        ids = self.canvases.ids[row, : int(self.canvases.end[row])]
        return len(((ids == self.job.mask_id).nonzero()[:, 0] // self.size).unique())


@dataclass(eq=False)
class DeviceView:
    """What a step sees, by `rows`: to a model a view as StepView is, of B rows with Q queries each.

    layers: those that have attended.
    """

    rows: BlockRows
    table: Tensor
    cache: object
    layers: set[int] = field(default_factory=set)
    _spans: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self) -> None:
        """A new step, in which the rows are elsewhere."""
        self._spans.clear()

    @property
    def position_ids(self) -> Tensor:
        """int32 [B, Q]"""
        return self.rows.query_positions

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of one layer: query [B, Hq, Q, D], key and value [B, Hkv, Q, D] -> like query."""
        self.layers.add(layer)
        rows, pages = self.rows, (self.cache.keys(layer), self.cache.values(layer))
        if window not in self._spans:
            self._spans[window] = self._seen(window)
        cache_spans, fresh_spans = self._spans[window]
        output = cached_block_attention(
            query, key, value, *pages, self.table, cache_spans, fresh_spans=fresh_spans,
            q_lengths=rows.q_lengths, scale=scale,
        )  # fmt: skip
        kv_write_(*pages, key, value, self.table, rows.write_positions)
        return output

    def _seen(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Cached and fresh spans, cut to a layer's sliding window."""
        rows = self.rows
        if window is None:
            return rows.cache_spans, rows.fresh_spans
        query = rows.query_positions
        key = torch.arange(self.table.shape[1] * self.cache.page_size, device=query.device)[None]
        cached = within_window(rows.cache_spans.expand(-1, query.shape[1], -1, -1), query, key, window)
        return cached, within_window(rows.fresh_spans, query, query, window)
