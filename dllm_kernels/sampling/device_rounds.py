"""Rounds that stay on the device: what those of block-causal and of bidirectional models have in common.

A step gathers the ids of its positions, runs the model, takes the statistics of the candidates and commits
what the rule accepts. Here it is a sequence of launches on tensors that keep their place (device_slots.py),
recorded once as CUDA graphs (cuda_graph.py) that serve later calls too (kept_slots.py). `BlockRounds` and
`RefreshedRounds` say which positions a step computes and how rows go on. Tokens, the steps that wrote them
and the forwards that a row takes part in are those of `Rounds`; how many the model makes in all may differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from dllm_kernels.ops.advance import BlockRows
from dllm_kernels.ops.unmask import commit_
from dllm_kernels.sampling.acceptance import rule_of
from dllm_kernels.sampling.canvases import Canvases
from dllm_kernels.sampling.denoiser import ModelDenoiser
from dllm_kernels.sampling.device_slots import DeviceSlots, length_bucket
from dllm_kernels.sampling.device_view import DeviceView
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.kept_slots import recorded_with, slots_of
from dllm_kernels.sampling.row_pages import RowPages
from dllm_kernels.sampling.statistics import Statistics
from dllm_kernels.sampling.steered_rows import SteeredRows


class DeviceRounds(ABC):
    """All rows of one job, some of them in slots. width, columns: the most positions of a row and of a block.
    holds: for each slot the row in it."""

    def __init__(self, job: Job, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        job.check_length(canvases)
        self.job, self.canvases, self.stop_ids = job, canvases, stop_ids
        self.size, self.device = job.config.block_size, job.device
        self.width = length_bucket(int(canvases.end.max()))
        self.columns = min(self.size, self.width)
        self.ids, self.unmask_step = canvases.ids.clone(), torch.full_like(canvases.ids, -1)
        self.row_forwards = torch.zeros(len(self.ids), dtype=torch.int64, device="cpu")
        self.forwards = 0
        self.masks_of = [self._masks_by_block(row) for row in range(len(self.ids))]
        self.rule = rule_of(job.config, [len(blocks) for blocks in self.masks_of])
        self.holds: list[int | None] = [None] * min(job.config.max_batch or len(self.ids), len(self.ids))
        self.statistics = Statistics(job, self.rule, len(self.holds), self.columns)
        kept = torch.tensor(job.config.cfg_keep_tokens, dtype=torch.int64, device="cpu")
        self.hidden = (self.ids != job.mask_id) & ~torch.isin(self.ids, kept)

    @staticmethod
    def serves(job: Job) -> bool:
        """Whether nothing that `job` asks for must be seen or done by the host in every round."""
        return (
            isinstance(job.denoiser, ModelDenoiser)
            and not (job.config.history or job.config.parity)
            and job.config.acceptance(1).name not in ("bernoulli", "confident_stable", "edit")
        )

    @abstractmethod
    def rows_for(self, slots: int) -> BlockRows | SteeredRows:
        """Rows that have nothing to do."""

    @abstractmethod
    def record(self) -> None:
        """Record what every round launches; no slot holds a row."""

    @abstractmethod
    def round(self, waiting: deque[int]) -> None:
        """Waiting rows into free slots, one step of all rows, and those at their end out of their slots."""

    def run(self) -> None:
        """Every row with masks to its end. `canvases` changes only then."""
        waiting = deque(row for row, blocks in enumerate(self.masks_of) if blocks)
        with self.prepared():
            while waiting or any(row is not None for row in self.holds):
                self.round(waiting)
        self.canvases.ids = self.ids

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Slots, pages and launches are there. Afterwards pages have come back and the model is as it was
        found, whatever happened."""
        job, ends = self.job, self.canvases.end
        buckets = [length_bucket(end) for end in ends.tolist()]
        pages = job.pages_for(torch.tensor(buckets, device="cpu"))

        def make() -> DeviceSlots:
            rows, cache = self.rows_for(len(self.holds)), job.cache_of(pages)
            return DeviceSlots(rows, self.width, cache, job.streams, self.stop_ids, self.device)

        with ExitStack() as stack:
            stack.enter_context(job.denoiser.ready())
            key = recorded_with(job, self.rule, self.stop_ids, len(self.holds), self.width)
            self.slots = stack.enter_context(slots_of(job, key, pages, make))
            shareable = job.shareable(self.canvases)
            self.pages = RowPages(self.slots.cache, job.streams, self.ids.clone(), shareable, self.size)
            self.record()
            try:
                yield
            finally:
                self.pages.release_all()

    def place(self, row: int, slot: int, cached: Tensor) -> int:
        """Hand a slot to a row; returns how many leading positions are in its pages. cached: as of
        `RowPages.admit`."""
        shared = self.pages.admit(row, int(self.canvases.end[row]), cached)
        self.holds[slot] = row
        self.slots.place(slot, row, self.ids[row], self.hidden[row], self.pages.table([row]))
        return shared

    def take(self, slot: int, forwards: int) -> None:
        """Take over a row that has finished, after so many forwards of its own, and free its slot."""
        row = self.holds[slot]
        self.ids[row], self.unmask_step[row] = self.slots.taken(slot, self.ids.shape[1])
        self.row_forwards[row] = forwards
        self._fill_after_end(row)
        self.pages.release(row)
        self.holds[slot] = None

    def measured(self) -> dict:
        """What the output reports of the run."""
        return dict(
            forwards=self.forwards, row_forwards=self.row_forwards, exact=not self.job.config.approximate,
            history=None,
        )  # fmt: skip

    # ---- what is recorded ------------------------------------------------------------------------------
    def outputs(
        self, view: DeviceView, slots: Tensor | slice, first: Tensor, start: Tensor, candidates: Tensor
    ) -> Tensor:
        """Output rows [B·C, H] that predict the candidates, of one forward over `view`.

        slots: which of them its B rows are. first, start: int32 [B], the first position that is computed, and
        of the active block. candidates: int32 [B, C].
        """
        job, position = self.job, view.position_ids.long()
        count, queries = position.shape
        tokens = self.slots.canvas[slots].gather(1, position)
        source = candidates
        if job.shift:
            source = torch.cat([(candidates - 1).clamp(min=0), start[:, None] - 1], dim=1)
        place = (source - first[:, None]).clamp(0, queries - 1)
        place = (place + queries * torch.arange(count, device=place.device)[:, None]).flatten()
        if job.streams == 2:
            hidden = self.slots.hidden[slots].gather(1, position)
            tokens = torch.cat([tokens, tokens.masked_fill(hidden, job.mask_id)])
            place, view = torch.cat([place, place + count * queries]), view.twice()
        output, _ = job.denoiser.outputs(tokens, view, place)
        if job.streams == 2:
            conditional, unconditional = output.chunk(2)
            output = torch.lerp(unconditional, conditional, 1 + job.config.cfg_scale)
        if not job.shift:
            return output
        output = output.view(count, -1, output.shape[-1])
        output, edge = output[:, :-1], output[:, -1]
        if self.slots.before is None:
            self.slots.before = output.new_zeros(len(self.slots), output.shape[-1])
        # Of forwards over what stands before a block, the last one reaches it.
        before = torch.where((first < start)[:, None], edge, self.slots.before[slots])
        self.slots.before[slots] = before
        earlier = source[:, :-1] < first[:, None]
        return torch.where(earlier[..., None], before[:, None], output).flatten(0, 1)

    def commit(self, outputs: Tensor) -> None:
        """Commit what the rule accepts of the candidates, whose output rows [slots · C, H] these are."""
        slots, rows, job = self.slots, self.slots.rows, self.job
        noise_ids = None
        if job.config.temperature > 0:
            fields = slots.sequence[:, None], rows.candidates, rows.step[:, None]
            noise_ids = torch.stack(torch.broadcast_tensors(*fields), dim=-1).flatten(0, 1)
        accepted = commit_(
            slots.canvas, rows.candidates, self.statistics.of(outputs, noise_ids), self.rule,
            mask_id=job.mask_id, quota=rows.quota if self.rule.needs_quota else None, step=rows.step,
            sequence_ids=slots.sequence, seed=job.config.seed,
        )  # fmt: skip
        at = rows.candidates.masked_fill(~accepted, slots.width).long()
        slots.unmask_step.scatter_(1, at, rows.step[:, None].expand_as(at).long())

    # ---- rows on the host ------------------------------------------------------------------------------
    def _masks_by_block(self, row: int) -> list[list[int]]:
        """The masked positions of each block of a row that has any."""
        blocks: dict[int, list[int]] = {}
        ids = self.ids[row, : int(self.canvases.end[row])]
        for position in (ids == self.job.mask_id).nonzero()[:, 0].tolist():
            blocks.setdefault((position - int(self.canvases.origin[row])) // self.size, []).append(position)
        return list(blocks.values())

    def _fill_after_end(self, row: int) -> None:
        """What stands after an end token with no mask before it was not worth computing."""
        ids, given, stop = self.ids[row], self.canvases.given[row], self.canvases.stop[row]
        position = torch.arange(len(ids), device="cpu")
        stops = torch.tensor(self.stop_ids, dtype=ids.dtype, device="cpu")
        ends = torch.isin(ids, stops) & (position >= given)
        if not ends.any():
            return
        first = int(ends.int().argmax())
        if first < stop and not (ids[given:first] == self.job.mask_id).any():
            ids[first + 1 :] = self.canvases.fill
            self.unmask_step[row, first + 1 :] = -1
