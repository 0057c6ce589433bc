"""PrefixCache: keys and values of finished blocks, kept from one call of `dk.sample` to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_kernels._arguments import integer
from dllm_kernels.kv_cache import PagesExhausted
from dllm_kernels.models.stored_weights import StoredLinear
from dllm_kernels.sampling.plan import PAGE_SIZE, Plan
from dllm_kernels.sampling.prompts import Canvases
from dllm_kernels.sampling.slots import RowPages, state_of


@dataclass(eq=False)
class _Kept:
    """A sequence of pages, and the ids [n] whose keys and values are in it. scaling: of its positions."""

    sequence: int
    ids: Tensor
    scaling: object


class PrefixCache:
    """Keys and values that calls of `dk.sample` leave for each other.

        cache = dk.PrefixCache(tokens=8192)
        dk.sample(model, first, prefix_cache=cache)
        dk.sample(model, first + reply + second, prefix_cache=cache)  # computes what is new

    For block-causal models, where finished blocks depend on nothing after them: results are exact. A prompt
    reuses the longest prefix of whole blocks that an earlier prompt or completion began with. The sequences
    used least recently make room for new ones. Other weights, modules, hooks, block sizes or dtypes empty the
    cache; after a change through `weight.data`, which leaves no trace, call `clear()`.

    tokens: capacity, of rows in flight and kept ones together; the memory is
    2 · tokens · layers · kv_heads · head_dim values, taken with the first call.
    """

    def __init__(self, tokens: int = 8192):
        self.tokens = integer("tokens", tokens, PAGE_SIZE)
        self.reused_tokens = 0
        self._pages: Any = None  # a BlockKVCache from the first call on
        self._key: tuple | None = None
        self._kept: list[_Kept] = []
        self._lock = threading.Lock()

    @property
    def kept_tokens(self) -> int:
        """Return the number of tokens whose keys and values are kept; shared prefixes count once for each."""
        return sum(len(kept.ids) for kept in self._kept)

    def clear(self) -> None:
        """Free everything."""
        self._kept, self._key, self._pages = [], None, None

    def __repr__(self) -> str:
        return (
            f"PrefixCache(tokens={self.tokens}, kept_tokens={self.kept_tokens}, "
            f"reused_tokens={self.reused_tokens})"
        )

    @contextmanager
    def rows_of(self, plan: Plan, canvases: Canvases, ids: Tensor, scaling: list) -> Iterator[RowPages]:
        """Provide the pages of the rows of one call. Raise ValueError for calls that cannot use a cache."""
        if (refusal := self._refusal(plan)) is not None:
            raise ValueError(f"prefix_cache {refusal}")
        needed, there = plan.pages_for(canvases.end), -(-self.tokens // PAGE_SIZE)
        if needed > there:
            raise ValueError(
                f"prefix_cache has room for {there * PAGE_SIZE} tokens, and the rows in flight need "
                f"{needed * PAGE_SIZE}; make one with more tokens, or give a smaller max_batch"
            )
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("prefix_cache is in use by another call; give each thread its own")
        try:
            key = _key_of(plan)
            if key != self._key:
                self.clear()
                self._key, self._pages = key, plan.cache_of(there)
            yield _RowsOfCall(self, plan, ids, plan.shareable(canvases), scaling)
        finally:
            self._lock.release()

    @classmethod
    def serves(cls, plan: Plan) -> bool:
        """Return whether a call by `plan` can use a prefix cache."""
        return cls._refusal(plan) is None

    @staticmethod
    def _refusal(plan: Plan) -> str | None:
        """Return why a call cannot use a prefix cache, or None."""
        if plan.scheme.keeps != "before" or not plan.scheme.exact:
            return 'keeps finished blocks, which needs a block-causal model sampled with cache="block"'
        if plan.config.parity is not None:
            return f"has no meaning with parity={plan.config.parity!r}"
        if plan.streams > 1:
            return "has no meaning with cfg_scale, half of which hides the prompt"
        return None

    def longest(self, ids: Tensor, scaling: object) -> tuple[_Kept | None, int]:
        """Return the kept sequence that has most leading tokens in common with ids [n], and how many."""
        best, most = None, 0
        for kept in self._kept:
            if kept.scaling != scaling:
                continue
            length = min(len(kept.ids), len(ids))
            common = int((kept.ids[:length] == ids[:length]).int().cumprod(0).sum())
            if common > most:
                best, most = kept, common
        return best, most

    def touch(self, kept: _Kept) -> None:
        """Make a sequence the one used last."""
        self._kept.remove(kept)
        self._kept.append(kept)

    def add(self, sequence: int, ids: Tensor, scaling: object) -> None:
        """Keep the pages of a sequence that hold `ids`, in place of those whose ids it begins with."""
        self.make_room(PAGE_SIZE)  # for a copy of the last page, which the sequence may hold more of
        try:
            trimmed = self._pages.fork(sequence, len(ids), len(ids))
        except PagesExhausted:
            return
        for other in list(self._kept):
            length = len(other.ids)
            if other.scaling == scaling and length <= len(ids) and other.ids.equal(ids[:length]):
                self._drop(other)
        self._kept.append(_Kept(trimmed, ids.clone(), scaling))

    def make_room(self, tokens: int, but: _Kept | None = None) -> None:
        """Free the sequences used least recently until `tokens` fit, as far as there are others."""
        pages = -(-tokens // PAGE_SIZE)
        for kept in list(self._kept):
            if self._pages.pages_free >= pages:
                return
            if kept is not but:
                self._drop(kept)

    def _drop(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self._pages.free(kept.sequence)


class _RowsOfCall(RowPages):
    """The pages of one call's rows in a PrefixCache."""

    def __init__(self, owner: PrefixCache, plan: Plan, ids: Tensor, shareable: Tensor, scaling: list):
        super().__init__(owner._pages, 1, ids, shareable, plan.config.block_size)
        self.owner, self.scaling = owner, scaling

    def admit(self, row: int, tokens: int, cached: Tensor) -> int | None:
        kept, common = self.owner.longest(self.ids[row, : self.shareable[row]], self.scaling[row])
        common = common // self.whole * self.whole
        _, shared = self.leader(row)
        if kept is None or common <= shared:
            self.owner.make_room(tokens)
            return super().admit(row, tokens, cached)
        # What is shared needs no pages of its own, but a copy of the last one where it is cut.
        fresh = tokens - common // PAGE_SIZE * PAGE_SIZE
        self.owner.make_room(fresh, but=kept)
        try:
            self.sequences[row] = [self.cache.fork(kept.sequence, common, tokens)]
        except PagesExhausted:
            self.owner.make_room(tokens)
            return super().admit(row, tokens, cached)
        self.owner.touch(kept)
        self.owner.reused_tokens += common
        return common

    def keep(self, row: int, ids: Tensor) -> None:
        if len(ids):
            self.owner.add(self.sequences[row][0], ids, self.scaling[row])


def _key_of(plan: Plan) -> tuple:
    """Return all that keys and values depend on beside ids; equal tuples mean equal values."""
    # Torch does not count changes of inference tensors: a model of such weights finds nothing again.
    versions = [object() if weight.is_inference() else weight._version for weight in plan.model.parameters()]
    versions += [0 if buffer.is_inference() else buffer._version for buffer in plan.model.buffers()]
    layers = [module for module in plan.model.modules() if isinstance(module, StoredLinear)]
    packed = [tensor for layer in layers for tensor in layer.stored[:2] if tensor is not None]
    versions += [object() if tensor.is_inference() else tensor._version for tensor in packed]
    kind = plan.device.type
    return (
        *(weakref.ref(plan.model), plan.config.block_size, plan.config.compile, *versions),
        *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        *map(state_of, plan.model.modules()),
    )
