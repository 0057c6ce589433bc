"""The pages of live rows: reserved on admission, shared where prompts begin alike, freed at a row's end."""

from __future__ import annotations

from torch import Tensor

from dllm_kernels.block_cache import BlockKVCache


class RowPages:
    """Cached sequences of rows: one for each stream of a row (with guidance, two).

    ids: int64 [B, T], whose first shareable[b] tokens are compared; whole: prefixes are shared in multiples
    of so many tokens.
    """

    def __init__(self, cache: BlockKVCache, streams: int, ids: Tensor, shareable: Tensor, whole: int):
        self.cache, self.streams, self.ids, self.whole = cache, streams, ids, whole
        self.shareable = shareable.tolist()
        self.sequences: dict[int, list[int]] = {}

    def admit(self, row: int, tokens: int, cached: Tensor) -> int | None:
        """Pages for `tokens` of a row; returns how many leading ones are in them already.

        cached: int64 [rows], leading positions in pages of each live row. None: a live row is about to
        compute a prefix of this one; nothing was reserved, ask again after the next round.
        """
        leader, shared = max(
            ((other, self._common(row, other)) for other in self.sequences),
            key=lambda pair: pair[1],
            default=(None, 0),
        )
        if not shared:
            self.sequences[row] = []
            for _ in range(self.streams):
                self.sequences[row].append(self.cache.admit(tokens))
            return 0
        if cached[leader] < shared:
            return None
        parents, self.sequences[row] = self.sequences[leader], []
        for parent in parents:
            self.sequences[row].append(self.cache.fork(parent, shared, tokens))
        return shared

    def table(self, live: list[int]) -> Tensor:
        """int32 [streams · B, P]: the page tables of the live rows, stream by stream."""
        return self.cache.page_table(
            [self.sequences[row][stream] for stream in range(self.streams) for row in live]
        )

    def release(self, row: int) -> None:
        """Free what a row holds."""
        for sequence in self.sequences.pop(row, ()):
            self.cache.free(sequence)

    def release_all(self) -> None:
        for row in list(self.sequences):
            self.release(row)

    def _common(self, row: int, other: int) -> int:
        """Shareable tokens that two rows have in common at the start."""
        length = min(self.shareable[row], self.shareable[other])
        if not length:
            return 0
        same = (self.ids[row, :length] == self.ids[other, :length]).int().cumprod(0).sum()
        return int(same) // self.whole * self.whole
