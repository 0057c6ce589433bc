"""Bidirectional rounds on the device, with cache="prefix" or "dual".

Whether a row's next step is a refresh, and where its next block is, follows from what its last step left: the
host waits for two small flags of every row after each round, then writes the rows' next step and uploads it
(steered_rows.py). A round launches up to three kinds of graphs: a forward of the rows that use their cache; a
refresh of each row that renews it, by itself, in a bucket of its length; and one commit of them all. A row
that takes no part in a forward has no queries there. So a round makes more forwards than one of `Rounds`,
where some rows renew their cache in the same forward in which others use it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch

from dllm_kernels.sampling.block_steps import BlockSteps
from dllm_kernels.sampling.canvases import Canvases
from dllm_kernels.sampling.cuda_graph import Flags
from dllm_kernels.sampling.device_rounds import DeviceRounds
from dllm_kernels.sampling.device_slots import length_bucket
from dllm_kernels.sampling.device_view import DeviceView
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rounds import NO_TOKEN
from dllm_kernels.sampling.steered_rows import SteeredRows
from dllm_kernels.sampling.views import Rows

COMMIT, FORWARD, REFRESH = "commit", "forward", "refresh"


@dataclass
class SlotRow:
    """A row in a slot. blocks: the masks of those that are to come; taken: its steps so far. Of its active
    block, steps: how it goes on; left: masks; queries: tokens of a forward that uses the cache."""

    row: int
    blocks: deque[list[int]]
    taken: int = 0
    steps: BlockSteps = field(default_factory=BlockSteps)
    left: int = 0
    queries: int = 0


class RefreshedRounds(DeviceRounds):
    """live: the rows in slots, by slot. around: whether what stands behind the block is cached as well."""

    def __init__(self, job: Job, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(job, canvases, stop_ids)
        self.live: dict[int, SlotRow] = {}
        self.around = job.scheme.keeps == "around"
        self.nothing_cached = torch.zeros(len(self.ids), dtype=torch.int64, device="cpu")

    @staticmethod
    def serves(job: Job) -> bool:
        """As DeviceRounds.serves, of the schemes whose cache is renewed."""
        return DeviceRounds.serves(job) and job.scheme.keeps is not None and not job.scheme.exact

    def rows_for(self, slots: int) -> SteeredRows:
        return SteeredRows(slots, self.columns, 1 + self.around, self.device)

    def record(self) -> None:
        """Forwards and refreshes are recorded when their length first occurs: repeating them changes nothing.
        A commit is not repeated, so that it is recorded while there is nothing to commit."""
        slots = self.slots
        self.flags = Flags(slots.flags, in_flight=1)
        if slots.outputs is None:
            self.forward(self.columns)
        slots.launches.record(COMMIT, self.commit_all)

    def round(self, waiting: deque[int]) -> None:
        self.admit(waiting)
        every = self.job.config.refresh_every
        stale = [slot for slot, row in self.live.items() if row.steps.stale(every)]
        for slot, row in self.live.items():
            self.write(slot, row, slot in stale)
        self.slots.rows.upload()
        if len(stale) < len(self.live):
            longest = int(self.slots.rows.host["q_lengths"].max())
            queries = self.columns if longest <= self.columns else length_bucket(longest)
            self.launch((FORWARD, queries), partial(self.forward, queries))
        for slot in stale:
            length = length_bucket(int(self.slots.rows.host["reach"][slot]))
            self.slots.chosen.fill_(slot)
            self.launch((REFRESH, length), partial(self.refresh, length))
        self.slots.launches.launch(COMMIT)
        self.flags.note()
        _, flags = self.flags.look()
        self.settle(flags.tolist())

    def launch(self, name: tuple[str, int], run) -> None:
        """One forward through the model."""
        self.slots.launches.record(name, run)
        self.slots.launches.launch(name)
        self.forwards += 1

    def admit(self, waiting: deque[int]) -> None:
        """Waiting rows into free slots."""
        for slot, row in enumerate(self.holds):
            if row is None and waiting:
                row = waiting.popleft()
                self.place(row, slot, self.nothing_cached)
                self.live[slot] = SlotRow(row, deque(self.masks_of[row]))
                self.begin_block(slot)

    def begin_block(self, slot: int) -> None:
        """Move a row to the next of its blocks."""
        config, row = self.job.config, self.live[slot]
        origin, stop = int(self.canvases.origin[row.row]), int(self.canvases.end[row.row])
        masks = row.blocks.popleft()
        start = origin + (masks[0] - origin) // self.size * self.size
        end = min(start + self.size, stop)
        reach = stop if config.suffix_window is None else min(stop, end + config.suffix_window)
        state = (torch.tensor([bound], device="cpu") for bound in (start, end, reach, 0, False, origin))
        computed = tuple(int(bound) for bound in self.job.scheme.computed(Rows(*state)))
        self.slots.rows.place(slot, start, end, reach, masks, computed=computed)
        row.steps, row.left, row.queries = BlockSteps(), len(masks), computed[1] - computed[0]
        if self.rule.needs_quota:
            blocks = len(self.masks_of[row.row])
            row.steps.quotas = deque(config.quotas(len(masks), blocks, (row.row, start)))

    def write(self, slot: int, row: SlotRow, stale: bool) -> None:
        """The row's next step, for the device."""
        host = self.slots.rows.host
        host["q_lengths"][slot] = 0 if stale else row.queries
        host["step"][slot] = row.taken
        if self.rule.needs_quota:
            host["quota"][slot] = row.steps.next_quota(self.columns)

    def settle(self, flags: list[list[int]]) -> None:
        """Rows whose block is complete move on, rows that are done leave."""
        for slot, row in list(self.live.items()):
            left, ended = flags[slot]
            if left == row.left:
                raise ValueError(NO_TOKEN)
            row.left = left
            row.taken, row.steps.taken = row.taken + 1, row.steps.taken + 1
            if not ended and left:
                continue
            if row.blocks and not ended:
                self.begin_block(slot)
            else:
                self.slots.rows.clear(slot)
                self.take(slot, row.taken)
                del self.live[slot]

    # ---- what is recorded ------------------------------------------------------------------------------
    def forward(self, queries: int) -> None:
        """Output rows of all rows with q_lengths > 0, from a forward over so many positions of each."""
        slots, rows = self.slots, self.slots.rows
        column = torch.arange(queries, dtype=torch.int32, device=self.device)
        last = (rows.start + rows.q_lengths - 1).clamp(min=0)
        position = torch.minimum(rows.start[:, None] + column, last[:, None])
        view = DeviceView(position, rows.q_lengths, rows.cache_spans, None, None, slots.table, slots.cache)
        output = self.outputs(view, slice(None), rows.start, rows.start, rows.candidates)
        if slots.outputs is None:
            slots.outputs = torch.zeros_like(output)
        slots.outputs.copy_(output)

    def refresh(self, length: int) -> None:
        """Output rows of the chosen slot, from a forward over all that its row sees, which leaves keys and
        values outside the active block in the pages."""
        slots, chosen, rows = self.slots, self.slots.chosen, self.slots.rows
        start, end, reach, candidates = (
            values[chosen] for values in (rows.start, rows.end, rows.reach, rows.candidates)
        )
        column = torch.arange(length, dtype=torch.int32, device=self.device)[None]
        kept = column < start[:, None]
        if self.around:
            kept |= (column >= end[:, None]) & (column < reach[:, None])
        position = torch.minimum(column, reach[:, None] - 1)
        table = slots.table.view(self.job.streams, len(slots), -1)[:, chosen].flatten(0, 1)
        view = DeviceView(position, reach, None, None, column.masked_fill(~kept, -1), table, slots.cache)
        output = self.outputs(view, chosen, torch.zeros_like(start), start, candidates)
        slots.outputs.view(len(slots), self.columns, -1)[chosen] = output[None]

    def commit_all(self) -> None:
        """Commit for all rows. flags of each: masks left in its block, whether a stop token ends it."""
        slots, candidates = self.slots, self.slots.rows.candidates
        self.commit(slots.outputs)
        listed = candidates >= 0
        tokens = slots.canvas.gather(1, candidates.clamp(min=0).long())
        masks = listed & (tokens == self.job.mask_id)
        ends = listed & (tokens[..., None] == slots.stop_ids).any(-1) & (masks.cumsum(1) == 0)
        slots.flags.copy_(torch.stack([masks.sum(1), ends.any(1)], dim=1))
