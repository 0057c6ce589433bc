"""Block-causal rounds on the device: the host only hands out rows, and collects them late.

`Rounds` asks after every step how far each row is. Here `advance_` moves the rows, so that every step is one
and the same graph. A block's first step also computes the block finished before it and leaves its keys and
values in the pages; rows that have finished, or have no work yet, pass through a step unchanged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dllm_kernels.ops.advance import BlockRows, advance_
from dllm_kernels.sampling.canvases import Canvases
from dllm_kernels.sampling.cuda_graph import Flags, upload_
from dllm_kernels.sampling.device_rounds import DeviceRounds
from dllm_kernels.sampling.device_view import DeviceView
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rounds import NO_TOKEN
from dllm_kernels.sampling.views import SCHEMES, Rows, view_of

BLOCKS_AT_ONCE = 2  # in a row's forward: the active block, and the one before it
IN_FLIGHT = 2  # steps: the GPU always has the next one to go on with
MOST_STOP_IDS = 16  # that `advance_` takes
STEP = "step"


class BlockRounds(DeviceRounds):
    """Rounds with cache="block". since: for each slot the number of launches before its row came."""

    def __init__(self, job: Job, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(job, canvases, stop_ids)
        self.shareable = job.shareable(canvases)
        self.since = [0] * len(self.holds)

    @staticmethod
    def serves(job: Job) -> bool:
        """As DeviceRounds.serves. Where a step may commit more than its quota, the next one is that of a step
        of the block, which `advance_` knows for one schedule."""
        more_than_quota = job.config.acceptance(1).name == "quota_or_threshold"
        return (
            DeviceRounds.serves(job)
            and job.scheme is SCHEMES["block"]
            and (job.config.schedule == "llada" or not more_than_quota)
            and len(job.eos_ids) <= MOST_STOP_IDS
        )

    def rows_for(self, slots: int) -> BlockRows:
        return BlockRows.empty(slots, self.size, BLOCKS_AT_ONCE * self.size, self.device)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        with super().prepared():
            self.flags = Flags(self.slots.rows.block_start, IN_FLIGHT)
            yield

    def record(self) -> None:
        if self.job.shift and self.slots.before is None:
            self.step()
        self.slots.launches.record(STEP, self.step)

    def step(self) -> None:
        """One forward of every slot, one commit, and every row to its next step."""
        slots, rows = self.slots, self.slots.rows
        view = DeviceView(
            rows.query_positions, rows.q_lengths, rows.cache_spans, rows.fresh_spans, rows.write_positions,
            slots.table, slots.cache,
        )  # fmt: skip
        self.commit(self.outputs(view, slice(None), rows.cached, rows.block_start, rows.candidates))
        whole_block = self.size if self.rule.name == "quota_or_threshold" else None
        advance_(
            slots.canvas, rows, mask_id=self.job.mask_id, quota_total=whole_block, stop_ids=self.stop_ids
        )
        if self.rule.name == "quota":
            step = rows.step.clamp(max=slots.width - 1).long()
            rows.quota.copy_(slots.quotas.gather(1, step[:, None])[:, 0])

    def round(self, waiting: deque[int]) -> None:
        self.admit(waiting)
        self.launch()
        self.collect()
        if self.flags.launched > max(self.since) + self.most_steps():
            raise ValueError(NO_TOKEN)

    def launch(self) -> None:
        """Start one step."""
        self.slots.launches.launch(STEP)
        self.flags.note()

    def admit(self, waiting: deque[int]) -> None:
        """Waiting rows into free slots; the launch after the next is the first that works on them."""
        for slot, row in enumerate(self.holds):
            if row is not None or not waiting:
                continue
            row = waiting.popleft()
            cached, whole = self.place(row, slot, self.shareable), int(self.shareable[row])
            self.since[slot] = self.flags.launched
            if self.rule.name == "quota":
                quotas = torch.tensor(self.quotas_of(row), dtype=torch.int32, device="cpu")
                upload_(self.slots.quotas[slot, : len(quotas)], quotas)
            if whole > cached:
                self._compute_prompt(slot, cached, whole)
            given, stop, end = (
                int(bound[row]) for bound in (self.canvases.given, self.canvases.stop, self.canvases.end)
            )
            steps = self.job.config.steps_of_block(max(len(self.masks_of[row]), 1)) or 0
            self.slots.rows.admit_(slot, given=given, stop=stop, canvas_end=end, steps=steps, cached=whole)

    def collect(self) -> None:
        """Take over the rows that had finished when the launch looked at was done."""
        looked = self.flags.look()
        if looked is None:
            return
        number, block_start = looked
        self.forwards += 1
        for slot, (row, start) in enumerate(zip(self.holds, block_start.tolist(), strict=True)):
            # A launch from before the row came, or the one that finds its first block, says nothing of it.
            if row is not None and number >= self.since[slot] and start >= self.canvases.end[row]:
                self.take(slot, int(self.slots.rows.step[slot]))

    def quotas_of(self, row: int) -> list[int]:
        """Of all steps of a row, each of which commits its quota: block after block."""
        config, blocks = self.job.config, self.masks_of[row]
        starts = [masks[0] // self.size * self.size for masks in blocks]
        return [
            quota
            for start, masks in zip(starts, blocks, strict=True)
            for quota in config.quotas(len(masks), len(blocks), (row, start))
        ]

    def most_steps(self) -> int:
        """More than any row takes: one for each mask, each block to catch up with, and those in flight."""
        return 2 * self.slots.width + 8

    def _compute_prompt(self, slot: int, first: int, last: int) -> None:
        """Keys and values of the prompt's positions [first, last) into the row's pages."""
        bound = torch.tensor([[first], [last]], device=self.device)
        none, slots = torch.zeros_like(bound[0]), self.slots
        state = Rows(bound[1], bound[1], bound[1], bound[0], none.bool(), none)
        ids = slots.canvas[slot : slot + 1]
        if self.job.streams == 2:
            hidden = ids.masked_fill(slots.hidden[slot], self.job.mask_id)
            state, ids = state.twice(), torch.cat([ids, hidden])
        view = view_of(SCHEMES["block"], state, self.size, slots.cache, slots.table[slot :: len(slots)])
        ids = ids[view.packing.row, view.packing.position]
        self.job.denoiser.outputs(ids[None], view, none[:0])
        self.forwards += 1
