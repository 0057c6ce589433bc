"""The loops whose steps are CUDA graphs: recorded once, replayed, kept for later calls.

Here a step (step.py) is a sequence of launches on tensors that keep their place (`DeviceSlots`). Tokens, the
steps that wrote them and the forwards that a row takes part in are those of `HostLoop`; how many forwards the
model makes in all may differ. On a CPU, where the tests run these loops, a launch is a plain call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dllm_kernels.ops.advance import BlockRows, advance_
from dllm_kernels.sampling.graphs import Flags, upload_
from dllm_kernels.sampling.loop import NO_TOKEN, Loop
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.prompts import Canvases
from dllm_kernels.sampling.runner import ModelRunner
from dllm_kernels.sampling.slots import (
    DeviceSlots,
    RowPages,
    SteeredRows,
    length_bucket,
    recorded_with,
    slots_of,
)
from dllm_kernels.sampling.step import LiveRow, Predictions, Statistics, accept_, block_flags, noise_ids
from dllm_kernels.sampling.views import SCHEMES, DeviceView, Rows, view_of


def graph_loop_of(plan: Plan) -> type[GraphLoop] | None:
    """Return the loop that does all that `plan` asks; None where the host must act in every step."""
    return next((kind for kind in (BlockLoop, RefreshLoop) if kind.serves(plan)), None)


class GraphLoop(Loop):
    """The common part of the loops with and without refreshes.

    ids: on the CPU, those of rows that have left. width, columns: the most positions of a row and of a block.
    hidden: bool [B, T], prompt tokens that guidance hides from its second stream.
    """

    def __init__(self, plan: Plan, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(plan, canvases, stop_ids)
        self.size, self.device = plan.config.block_size, plan.device
        self.width = length_bucket(max(self.end))
        self.columns = min(self.size, self.width)
        self.predictions = Predictions(plan, self.slot_count)
        self.statistics = Statistics(plan, self.rule, self.slot_count, self.columns)
        kept = torch.tensor(plan.config.cfg_keep_tokens, dtype=torch.int64, device="cpu")
        self.hidden = (self.ids != plan.mask_id) & ~torch.isin(self.ids, kept)

    @staticmethod
    def serves(plan: Plan) -> bool:
        """Return whether nothing that `plan` asks for must be seen or done by the host in every step."""
        return (
            isinstance(plan.runner, ModelRunner)
            and not (plan.config.history or plan.config.parity)
            and plan.config.logprobs is None
            and plan.config.acceptance(1).name not in ("bernoulli", "confident_stable", "edit")
        )

    @abstractmethod
    def rows_for(self, slots: int) -> BlockRows | SteeredRows:
        """Return rows that have nothing to do."""

    @abstractmethod
    def record(self) -> None:
        """Record what every step launches; no slot holds a row."""

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Enter `Loop.prepared`, then provide slots, pages and launches."""
        plan, count = self.plan, self.slot_count
        pages = plan.pages_for(torch.tensor([length_bucket(end) for end in self.end], device="cpu"))

        def make() -> DeviceSlots:
            rows, cache = self.rows_for(count), plan.cache_of(pages)
            return DeviceSlots(rows, self.width, cache, plan.streams, self.stop_ids, self.device)

        with super().prepared():
            key = recorded_with(plan, self.rule, self.stop_ids, count, self.width)
            with slots_of(plan, key, pages, make) as self.slots:
                self.predictions.before = self.slots.before
                shareable = plan.shareable(self.canvases)
                self.pages = RowPages(self.slots.cache, plan.streams, self.ids.clone(), shareable, self.size)
                try:
                    self.record()
                    self.slots.before = self.predictions.before
                    yield
                finally:
                    self.pages.release_all()

    def hand_over(self, slot: int, row: int, cached: Tensor) -> int:
        """Put a row into a slot of the device; return how many leading positions are in its pages. cached: as
        of `RowPages.admit`."""
        shared = self.pages.admit(row, self.end[row], cached)
        self.live[slot] = LiveRow(row)
        self.slots.place(slot, self.numbers[row], self.ids[row], self.hidden[row], self.pages.table([row]))
        return shared

    def leave(self, slot: int) -> None:
        row = self.live[slot].row
        self.ids[row], self.unmask_step[row] = self.slots.taken(slot, self.ids.shape[1])
        super().leave(slot)

    # ---- what is recorded ------------------------------------------------------------------------------
    def outputs(
        self, view: DeviceView, slots: Tensor | slice, first: Tensor, start: Tensor, candidates: Tensor
    ) -> Tensor:
        """Return output rows [B·C, H] that predict the candidates, of one forward over `view`.

        slots: which of them its B rows are. first, start: int32 [B], the first position that is computed, and
        the first of the active block. candidates: int32 [B, C].
        """
        canvas, hidden = self.slots.canvas[slots], self.slots.hidden[slots]
        view = view.twice() if self.plan.streams == 2 else view
        return self.predictions.of(canvas, hidden, view, first, start, candidates, slots)[0]

    def commit(self, outputs: Tensor) -> None:
        """Commit what the rule accepts of the candidates, whose output rows [slots · C, H] these are."""
        slots, rows = self.slots, self.slots.rows
        stats = self.statistics.of(outputs, noise_ids(self.plan, slots.sequence, rows.candidates, rows.step))
        accepted = accept_(
            self.plan, self.rule, slots.canvas, rows.candidates, stats, step=rows.step,
            numbers=slots.sequence, quota=rows.quota if self.needs_quota else None,
        )  # fmt: skip
        at = rows.candidates.masked_fill(~accepted, slots.width).long()
        slots.unmask_step.scatter_(1, at, rows.step[:, None].expand_as(at).long())


# ---- block-causal rows ------------------------------------------------------------------------------------
# The host only hands out rows, and collects them late: `advance_` moves them, so that every step is one and
# the same graph. A block's first step also computes the block finished before it and leaves its keys and
# values in the pages; rows that have finished, or have no work yet, pass through a step unchanged.
#
# With many rows a graph over two blocks of each would compute twice the tokens in all steps but the first of
# a block. Then there is a second graph, over the active blocks alone, which writes nothing to the pages. The
# host waits for every step to know whether a row needs the larger one: short against a step of so many
# tokens.

BLOCKS_AT_ONCE = 2  # in a row's forward: the active block, and the one before it
IN_FLIGHT = 2  # steps of the same graph: the GPU always has the next one to go on with
FEW_TOKENS = 128  # of all rows: computing so many takes no longer than reading the weights
MOST_STOP_IDS = 16  # that `advance_` takes
STEP = "step"


class BlockLoop(GraphLoop):
    """The loop with cache="block".

    since: for each slot the number of launches before its row came. widths: the queries of a row in each
    graph; queries: those of the next step.
    """

    def __init__(self, plan: Plan, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(plan, canvases, stop_ids)
        self.shareable = plan.shareable(canvases)
        self.since = [0] * self.slot_count
        widest = BLOCKS_AT_ONCE * self.size
        few = plan.streams * self.slot_count * widest <= FEW_TOKENS
        self.widths = (widest,) if few else (self.size, widest)
        self.queries = self.widths[0]  # nothing to compute before a step has found the rows' first blocks

    @staticmethod
    def serves(plan: Plan) -> bool:
        """Return `GraphLoop.serves` for cache="block". Where a step may commit more than its quota, the next
        quota is that of a step of the block, which `advance_` knows for one schedule."""
        more_than_quota = plan.config.acceptance(1).name == "quota_or_threshold"
        return (
            GraphLoop.serves(plan)
            and plan.scheme is SCHEMES["block"]
            and (plan.config.schedule == "llada" or not more_than_quota)
            and len(plan.eos_ids) <= MOST_STOP_IDS
        )

    def rows_for(self, slots: int) -> BlockRows:
        return BlockRows.empty(slots, self.size, BLOCKS_AT_ONCE * self.size, self.device)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        with super().prepared():
            rows, in_flight = self.slots.rows, IN_FLIGHT if len(self.widths) == 1 else 1
            self.flags, self.lengths = (Flags(of, in_flight) for of in (rows.block_start, rows.q_lengths))
            yield

    def record(self) -> None:
        if self.plan.shift and self.predictions.before is None:
            self.run_step(self.queries)
        for queries in self.widths:
            self.slots.launches.record((STEP, queries), partial(self.run_step, queries))

    def run_step(self, queries: int) -> None:
        """One forward of every slot, one commit, and every row to its next step. No row has more queries."""
        slots, rows = self.slots, self.slots.rows
        beyond_the_block = queries > self.size  # else no row has final tokens to write
        view = DeviceView(
            rows.query_positions[:, :queries].contiguous(), rows.q_lengths, rows.cache_spans,
            rows.fresh_spans[:, :queries].contiguous(), rows.write_positions if beyond_the_block else None,
            slots.table, slots.cache,
        )  # fmt: skip
        self.commit(self.outputs(view, slice(None), rows.cached, rows.block_start, rows.candidates))
        whole_block = self.size if self.rule.name == "quota_or_threshold" else None
        advance_(
            slots.canvas, rows, mask_id=self.plan.mask_id, quota_total=whole_block, stop_ids=self.stop_ids
        )
        if self.rule.name == "quota":
            step = rows.step.clamp(max=slots.width - 1).long()
            rows.quota.copy_(slots.quotas.gather(1, step[:, None])[:, 0])

    def step(self) -> None:
        self.launch()
        self.collect()
        if self.flags.launched > max(self.since) + self.most_steps():
            raise ValueError(NO_TOKEN)

    def launch(self) -> None:
        """Start one step."""
        self.slots.launches.launch((STEP, self.queries))
        self.flags.note()
        if len(self.widths) > 1:
            self.lengths.note()

    def place(self, slot: int, row: int) -> bool:
        """Put a row into a free slot; the launch after the next is the first that works on it."""
        cached, whole = self.hand_over(slot, row, self.shareable), int(self.shareable[row])
        self.since[slot] = self.flags.launched
        blocks = self._masks_by_block(row)
        if self.rule.name == "quota":
            quotas = torch.tensor(self._quotas(row, blocks), dtype=torch.int32, device="cpu")
            upload_(self.slots.quotas[slot, : len(quotas)], quotas)
        if whole > cached:
            self._compute_prompt(slot, cached, whole)
        steps = self.plan.config.steps_of_block(max(len(blocks), 1)) or 0
        self.slots.rows.admit_(
            slot,
            given=self.given[row],
            stop=self.stop[row],
            canvas_end=self.end[row],
            steps=steps,
            cached=whole,
        )
        return True

    def begun(self, slot: int, masks: list[int]) -> None:
        raise AssertionError("advance_ moves these rows")

    def collect(self) -> None:
        """Take over the rows that had finished when the launch looked at was done, and choose the graph of
        the next step: the smallest that computes all that a row asks for."""
        looked = self.flags.look()
        if looked is None:
            return
        number, block_start = looked
        if len(self.widths) > 1:
            longest = int(self.lengths.look()[1].max())
            self.queries = next(queries for queries in self.widths if queries >= longest)
        self.forwards += 1
        block_start = block_start.tolist()
        for slot, live in list(self.live.items()):
            # A launch from before the row came, or the one that finds its first block, says nothing of it.
            if number >= self.since[slot] and block_start[slot] >= self.end[live.row]:
                live.step = int(self.slots.rows.step[slot])
                self.leave(slot)

    def most_steps(self) -> int:
        """Return more than any row takes: one for each mask, each block to catch up with, and those in
        flight."""
        return 2 * self.slots.width + 8

    def _masks_by_block(self, row: int) -> dict[int, int]:
        """Return how many masks each block has that has any, by the block's start."""
        blocks: dict[int, int] = {}
        for position in self.masks(row):
            start = position - position % self.size
            blocks[start] = blocks.get(start, 0) + 1
        return blocks

    def _quotas(self, row: int, blocks: dict[int, int]) -> list[int]:
        """Return those of all steps of a row, each of which commits its quota: block after block."""
        return [
            quota
            for start, masks in blocks.items()
            for quota in self.plan.config.quotas(masks, len(blocks), (self.numbers[row], start))
        ]

    def _compute_prompt(self, slot: int, first: int, last: int) -> None:
        """Keys and values of the prompt's positions [first, last) into the row's pages."""
        bound = torch.tensor([[first], [last]], device=self.device)
        none, slots = torch.zeros_like(bound[0]), self.slots
        state = Rows(bound[1], bound[1], bound[1], bound[0], none.bool(), none)
        ids = slots.canvas[slot : slot + 1]
        if self.plan.streams == 2:
            state, ids = (
                state.twice(),
                torch.cat([ids, ids.masked_fill(slots.hidden[slot], self.plan.mask_id)]),
            )
        view = view_of(SCHEMES["block"], state, self.size, slots.cache, slots.table[slot :: len(slots)])
        self.plan.runner.outputs(view.tokens_of(ids), view, none[:0])
        self.forwards += 1


# ---- bidirectional rows with a cache ----------------------------------------------------------------------
# With cache="prefix" or "dual" it follows from what a row's last step left whether its next one is a
# refresh, and where its next block is: the host waits for two small flags of every row after each step,
# then writes the rows' next step and uploads it (`SteeredRows`). A step launches up to three kinds of
# graphs: a forward of the rows that use their cache; a refresh of each row that renews it, by itself, in a
# bucket of its length; and one commit of them all. A row that takes no part in a forward has no queries
# there. So a step makes more forwards than one of `HostLoop`, where rows renew their cache in the forward
# in which others use theirs.

COMMIT, FORWARD, REFRESH = "commit", "forward", "refresh"


class RefreshLoop(GraphLoop):
    """The loop with a cache that is renewed. around: whether what stands behind the block is cached as well;
    queries: for each slot the tokens of a forward that uses the cache."""

    def __init__(self, plan: Plan, canvases: Canvases, stop_ids: tuple[int, ...] = ()):
        super().__init__(plan, canvases, stop_ids)
        self.around = plan.scheme.keeps == "around"
        self.queries = [0] * self.slot_count
        self.nothing_cached = torch.zeros(len(self.ids), dtype=torch.int64, device="cpu")

    @staticmethod
    def serves(plan: Plan) -> bool:
        """Return `GraphLoop.serves` for the schemes whose cache is renewed."""
        return GraphLoop.serves(plan) and plan.scheme.keeps is not None and not plan.scheme.exact

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

    def place(self, slot: int, row: int) -> bool:
        self.hand_over(slot, row, self.nothing_cached)
        if not self.begin_block(slot):
            self.leave(slot)
        return True

    def begun(self, slot: int, masks: list[int]) -> None:
        live = self.live[slot]
        state = live.start, live.end, live.reach, 0, False, self.origin[live.row]
        rows = Rows(*(torch.tensor([value], device="cpu") for value in state))
        computed = tuple(int(bound) for bound in self.plan.scheme.computed(rows))
        self.slots.rows.place(slot, live.start, live.end, live.reach, masks, computed=computed)
        self.queries[slot] = computed[1] - computed[0]

    def step(self) -> None:
        every = self.plan.config.refresh_every
        stale = [slot for slot, row in self.live.items() if row.stale(every)]
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
        flags = self.flags.look()[1].tolist()
        for slot, row in self.live.items():
            if flags[slot][0] == row.masks:
                raise ValueError(NO_TOKEN)
        self.move([flags[slot] for slot in self.live])

    def launch(self, name: tuple[str, int], run) -> None:
        """One forward through the model."""
        self.slots.launches.record(name, run)
        self.slots.launches.launch(name)
        self.forwards += 1

    def write(self, slot: int, row: LiveRow, stale: bool) -> None:
        """Write the row's next step, for the device."""
        host = self.slots.rows.host
        host["q_lengths"][slot] = 0 if stale else self.queries[slot]
        host["step"][slot] = row.step
        if self.needs_quota:
            host["quota"][slot] = row.next_quota(self.columns)

    def leave(self, slot: int) -> None:
        self.slots.rows.clear(slot)
        super().leave(slot)

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
        table = slots.table.view(self.plan.streams, len(slots), -1)[:, chosen].flatten(0, 1)
        view = DeviceView(position, reach, None, None, column.masked_fill(~kept, -1), table, slots.cache)
        output = self.outputs(view, chosen, torch.zeros_like(start), start, candidates)
        slots.outputs.view(len(slots), self.columns, -1)[chosen] = output[None]

    def commit_all(self) -> None:
        """Commit for all rows, and tell the host how their blocks stand."""
        slots, candidates = self.slots, self.slots.rows.candidates
        self.commit(slots.outputs)
        listed = candidates >= 0
        tokens = slots.canvas.gather(1, candidates.clamp(min=0).long())
        ends = listed & (tokens[..., None] == slots.stop_ids).any(-1)
        slots.flags.copy_(block_flags(listed & (tokens == self.plan.mask_id), listed, ends))
