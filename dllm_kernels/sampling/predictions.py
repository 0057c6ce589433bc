"""What the model predicts for each candidate: guidance and shift.

One forward over a view gives output rows; this module says which rows a candidate needs, statistics.py how
they become its statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.sampling.job import Job
from dllm_kernels.sampling.rules import Rule
from dllm_kernels.sampling.statistics import Statistics
from dllm_kernels.sampling.views import StepView


class Predictions:
    """Statistics of candidates, and what they need from one step to the next.

    before: [rows, H], with a cache and a shift the output row at start − 1 of each row's active block: it
    predicts position `start`, and later steps of the block do not compute it. width: the most positions that
    a block has.
    """

    def __init__(self, job: Job, rule: Rule, rows: int, slots: int, width: int):
        self.job, self.rows, self.width = job, rows, width
        self.statistics = Statistics(job, rule, slots, width)
        self.before: Tensor | None = None

    def begin_block(self, slot: int) -> None:
        """A row in `slot` starts a block."""
        self.statistics.begin_block(slot)

    def of(
        self,
        canvas: Tensor,
        view: StepView,
        rows: Tensor,
        start: Tensor,
        candidate: tuple[Tensor, Tensor],
        noise_ids: Tensor | None,
        slot: Tensor,
    ) -> tuple[TokenStats, int]:
        """Statistics of M candidates, forwards made.

        canvas: int64 [B, T], or with guidance [2B, T], those without their prompts behind the others.
        rows, start: int64 [B], the rows' numbers and active blocks. candidate: row (0..B-1) and position,
        int64 [M] each. noise_ids: int32 [M, 3]. slot: int64 [B], of each row.
        """
        row, position = candidate
        first = view.packing.first[: len(rows)]
        source = position
        if self.job.shift:
            source = (position - 1).clamp(min=0)
            if self.job.parity.shift_in_window:
                source = torch.maximum(source, first[row])
        kept = source < first[row]  # start − 1, computed by an earlier forward of this block
        edge = row.new_zeros(0)
        if self.job.shift and view.pages is not None:
            edge = (first < start).nonzero()[:, 0]
        row_of, source_of = torch.cat([row[~kept], edge]), torch.cat([source[~kept], start[edge] - 1])
        output, forwards = self._outputs(canvas, view, row_of, source_of, len(rows))
        if len(edge):
            if self.before is None:
                self.before = output.new_zeros(self.rows, output.shape[1])
            output, self.before[rows[edge]] = output[: -len(edge)], output[-len(edge) :]
        if len(output) < len(row):
            computed, output = output, self.before[rows[row]]
            output[~kept] = computed
        place = slot[row] * self.width + position - start[row]
        return self.statistics.of(output, noise_ids, place), forwards

    def _outputs(self, canvas, view, row, position, count) -> tuple[Tensor, int]:
        """Output rows of these positions; with guidance (1 + s)·conditional − s·unconditional."""
        packing, scale = view.packing, self.job.config.cfg_scale
        ids, places = canvas[packing.row, packing.position][None], packing.place(row, position)
        if not scale:
            return self.job.denoiser.outputs(ids, view, places)
        places = torch.cat([places, packing.place(row + count, position)])
        output, forwards = self.job.denoiser.outputs(ids, view, places)
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, 1 + scale), forwards
