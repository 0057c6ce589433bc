"""`Session`: completions one after another, whose common beginning is computed once.

A call of `dk.sample` frees its keys and values when it returns. A conversation sends its text again with each
turn, a little longer; where the model is block-causal, the keys and values of finished blocks depend on
nothing behind them, so that a session keeps them and computes only what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from dllm_kernels.kv_cache import BlockKVCache
from dllm_kernels.sampling.api import prompt_rows, run
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.loop import HostLoop, Loop, Round
from dllm_kernels.sampling.output import SampleOutput, completion_output
from dllm_kernels.sampling.plan import Plan, make_plan
from dllm_kernels.sampling.prompts import Canvases, completions
from dllm_kernels.sampling.slots import RowPages


class Session:
    """Do as `dk.sample` for one text after another. Tokens are those of `dk.sample`.

    reused: positions of the last prompt whose keys and values were there already; 0 where nothing can be
    kept: bidirectional attention, another cache than "auto" or "block", guidance. The model must not change
    between calls. `close` frees what is kept.
    """

    def __init__(self, model, *, tokenizer=None):
        self.model, self.tokenizer, self.reused = model, tokenizer, 0
        self._kept: _Kept | None = None

    def sample(
        self,
        prompt,
        *,
        config: SampleConfig | None = None,
        on_round: Callable[[Round], None] | None = None,
        **overrides,
    ) -> SampleOutput:
        """Complete one prompt; all arguments are those of `dk.sample`. After an error or an interrupt the
        session goes on with what was finished."""
        plan = make_plan(self.model, self.tokenizer, config, overrides)
        rows = prompt_rows(plan, prompt, None, self.tokenizer)
        if len(rows) != 1:
            raise ValueError(f"prompt holds {len(rows)} prompts; a session continues one text")
        canvases = completions(rows, plan)
        self.reused = 0
        if plan.scheme.keeps is None or not plan.block_causal or plan.streams > 1:
            self.close()
            finished = run(plan, canvases, on_round, plan.stop_ids)
        else:
            finished = _SessionLoop(self, plan, canvases, on_round, plan.stop_ids).run()
        return completion_output(canvases, finished, plan.eos_ids, self.tokenizer)

    def close(self) -> None:
        """Free the keys and values."""
        self._kept = None


@dataclass(frozen=True)
class _Kept:
    """Final keys and values. key: all that they depend on beside the model and the tokens. ids: int64 [T],
    the tokens, on the CPU; sequence: their pages in cache."""

    key: tuple
    cache: BlockKVCache
    sequence: int
    ids: Tensor

    def copy_to(self, cache: BlockKVCache, sequence: int, tokens: int) -> None:
        """Copy the keys and values of the first `tokens` positions to a sequence of another cache."""
        pages = -(-tokens // cache.page_size)
        source, target = self.cache.page_table([self.sequence])[0], cache.page_table([sequence])[0]
        source, target = source[:pages].long(), target[:pages].long()
        for layer in range(cache.layers):
            cache.keys(layer)[target] = self.cache.keys(layer)[source]
            cache.values(layer)[target] = self.cache.values(layer)[source]


class _SessionLoop(HostLoop):
    """The loop of one row, which begins with the pages of a session and leaves its own there."""

    def __init__(self, session: Session, plan: Plan, canvases: Canvases, on_round, stop_ids):
        super().__init__(plan, canvases, on_round, stop_ids)
        self.session = session
        config = plan.config
        self.key = config.block_size, config.parity, plan.shift, plan.mask_id, self.scaling[0]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        plan = self.plan
        with Loop.prepared(self):
            cache, shareable = plan.cache_of(plan.pages_for(self.canvases.end)), plan.shareable(self.canvases)
            self.pages = _SessionPages(cache, self.ids.clone(), shareable, plan.config.block_size, self)
            try:
                yield
            finally:
                self.pages.hand_over()


class _SessionPages(RowPages):
    """Pages of one row that outlive it."""

    def __init__(self, cache: BlockKVCache, ids: Tensor, shareable: Tensor, whole: int, loop: _SessionLoop):
        super().__init__(cache, 1, ids, shareable, whole)
        self.loop = loop
        self.sequence: int | None = None

    def admit(self, row: int, tokens: int, cached: Tensor) -> int:
        """Take pages, and what the session has of the row's beginning."""
        super().admit(row, tokens, cached)
        (self.sequence,) = self.sequences[row]
        session = self.loop.session
        kept, session._kept = session._kept, None
        if kept is None or kept.key != self.loop.key or kept.cache.dtype != self.cache.dtype:
            return 0
        length = min(self.shareable[row], len(kept.ids))
        same = (self.ids[row, :length].cpu() == kept.ids[:length]).int().cumprod(0).sum()
        shared = int(same) // self.whole * self.whole
        if shared:
            kept.copy_to(self.cache, self.sequence, shared)
        session.reused = shared
        return shared

    def release(self, row: int) -> None:
        """Keep them."""

    def hand_over(self) -> None:
        """Leave to the session what is final."""
        if self.sequence is None:
            return
        ids = self.loop.ids[0, : self.loop.cached[0]].cpu()
        self.loop.session._kept = _Kept(self.loop.key, self.cache, self.sequence, ids)
