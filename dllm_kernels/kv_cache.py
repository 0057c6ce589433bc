"""BlockKVCache: keys and values of many sequences in pages, shared where sequences have a common prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from dllm_kernels._arguments import integer, kind
from dllm_kernels._library import host
from dllm_kernels.ops.kv_write import kv_write_

PagesExhausted = host().PagesExhausted


class BlockKVCache:
    """Paged K/V of every layer; a BlockPool on the host records which sequence owns which pages.

    A sequence reserves its full capacity when it is admitted, so that it never runs out of pages halfway.
    Sequence ids are ints and never reused. `with cache:` ends every sequence on exit, also after an error.
    A call that raises changes nothing.

    layers, kv_heads, head_dim: of the model; the latter two may be given for each layer. pages: number per
    layer, of page_size tokens each. dtype: float32, bfloat16 or float16. Pages start as zeros and are not
    cleared when they change owner.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        *,
        pages: int,
        page_size: int = 32,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.layers = integer("layers", layers, 1)
        self.kv_heads = _of_layers("kv_heads", kv_heads, self.layers)
        self.head_dim = _of_layers("head_dim", head_dim, self.layers)
        self.pages = integer("pages", pages, 1)
        self.page_size = integer("page_size", page_size, 1)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        shapes = [*zip(self._per_layer(self.kv_heads), self._per_layer(self.head_dim), strict=True)]
        # Layers of one shape share a tensor, so that an operation on all of them is one launch.
        self._storage = {
            shape: torch.zeros(
                (2, shapes.count(shape), self.pages, self.page_size, *shape), dtype=dtype, device=device
            )
            for shape in dict.fromkeys(shapes)
        }
        self._place = [(shape, shapes[:layer].count(shape)) for layer, shape in enumerate(shapes)]
        self._pool = host().BlockPool(self.pages)

    # ---- sequences -----------------------------------------------------------------------------
    def admit(self, tokens: int) -> int:
        """Return the id of a new sequence for `tokens`. Raises PagesExhausted (a RuntimeError)."""
        return self._pool.allocate(self._pages_for(integer("tokens", tokens, 1)))

    def fork(self, sequence: int, prefix_tokens: int, tokens: int) -> int:
        """Return the id of a new sequence for `tokens` that begins with `prefix_tokens` of `sequence`.

        Whole pages of the prefix are shared, and written by neither while both live; the remainder, less
        than a page, is copied. Raises PagesExhausted (a RuntimeError).
        """
        sequence = integer("sequence", sequence)
        prefix_tokens = integer("prefix_tokens", prefix_tokens, 0, self.room(sequence))
        tokens = integer("tokens", tokens, max(prefix_tokens, 1))
        shared, copied = divmod(prefix_tokens, self.page_size)
        child = self._pool.fork(sequence, shared, self._pages_for(tokens) - shared)
        if copied:
            source, target = (self._pool.pages_of(each)[shared] for each in (sequence, child))
            for storage in self._storage.values():
                storage[:, :, target, :copied] = storage[:, :, source, :copied]
        return child

    def extend(self, sequence: int, tokens: int) -> None:
        """Grow the capacity of `sequence` to at least `tokens`. Raises PagesExhausted (a RuntimeError)."""
        sequence = integer("sequence", sequence)
        missing = self._pages_for(integer("tokens", tokens, 1)) - len(self._pool.pages_of(sequence))
        self._pool.append(sequence, max(missing, 0))

    def free(self, sequence: int) -> None:
        """End `sequence`. Pages that no other sequence holds become free; the id is never valid again."""
        self._pool.free(integer("sequence", sequence))

    def reset(self) -> None:
        """End every sequence."""
        self._pool.reset()

    def __enter__(self) -> BlockKVCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.reset()

    # ---- what a sequence has -------------------------------------------------------------------
    @property
    def pages_free(self) -> int:
        return self._pool.pages_free

    @property
    def pages_used(self) -> int:
        return self.pages - self._pool.pages_free

    def room(self, sequence: int) -> int:
        """Return the capacity of `sequence` in tokens."""
        return len(self._pool.pages_of(integer("sequence", sequence))) * self.page_size

    def shared_tokens(self, sequence: int) -> int:
        """Return the number of leading positions on shared pages, which must not be written."""
        return self._pool.shared_pages(integer("sequence", sequence)) * self.page_size

    def page_table(self, sequences: Sequence[int]) -> Tensor:
        """Return int32 [B, P] on the cache's device: each sequence's pages, P the most of any, then 0."""
        table = self._pool.page_table([integer("each of sequences", sequence) for sequence in sequences])
        return torch.from_numpy(table).to(self.device)

    # ---- contents ------------------------------------------------------------------------------
    def keys(self, layer: int) -> Tensor:
        """Return [pages, page_size, kv_heads, head_dim], a view."""
        storage, index = self._of(layer)
        return storage[0, index]

    def values(self, layer: int) -> Tensor:
        """Return [pages, page_size, kv_heads, head_dim], a view."""
        storage, index = self._of(layer)
        return storage[1, index]

    def write_(self, layer: int, k: Tensor, v: Tensor, sequences: Sequence[int], positions: Tensor) -> None:
        """Store k, v [B, kv_heads, T, head_dim] at `positions` int32 [B, T] of `sequences`, -1 = skip.

        A position beyond the capacity, or on a shared page, is a ValueError. This reads `positions` on the
        host; a loop that knows its positions calls `kv_write_` with a page table made once.
        """
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences must be distinct, got {list(sequences)}")
        self._check_writable(sequences, positions)
        kv_write_(self.keys(layer), self.values(layer), k, v, self.page_table(sequences), positions)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        raise TypeError(
            "a BlockKVCache is not copied or pickled: ids of sequences and pages are its own; make another "
            "one and write to it what keys() and values() hold"
        )

    def __repr__(self) -> str:
        return (
            f"BlockKVCache(layers={self.layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"pages={self.pages}, page_size={self.page_size}, dtype={self.dtype}, "
            f"device={self.device}, pages_used={self.pages_used})"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._of(0)[0].dtype

    @property
    def device(self) -> torch.device:
        return self._of(0)[0].device

    def _per_layer(self, size: int | tuple[int, ...]) -> tuple[int, ...]:
        return size if isinstance(size, tuple) else (size,) * self.layers

    def _of(self, layer: int) -> tuple[Tensor, int]:
        """Return the tensor [2, n, pages, page_size, kv_heads, head_dim] of a layer, and its index in n."""
        shape, index = self._place[integer("layer", layer, 0, self.layers - 1)]
        return self._storage[shape], index

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _check_writable(self, sequences: Sequence[int], positions: Tensor) -> None:
        if not isinstance(positions, Tensor) or positions.dtype != torch.int32:
            raise TypeError(f"positions must be an int32 Tensor [B, T], got {kind(positions)}")
        if positions.dim() != 2 or len(positions) != len(sequences):
            raise ValueError(f"positions must be [{len(sequences)}, T], got {list(positions.shape)}")
        for row, sequence in zip(positions.tolist(), sequences, strict=True):
            first, end = self.shared_tokens(sequence), self.room(sequence)
            for position in row:
                if position != -1 and not first <= position < end:
                    raise ValueError(
                        f"positions of sequence {sequence} must be -1 or lie in {first}..{end - 1} "
                        f"({first} are shared, there is room for {end}), got {position}"
                    )


def _of_layers(name: str, sizes: int | Sequence[int], layers: int) -> int | tuple[int, ...]:
    """Return one size for all layers, or one per layer if they differ."""
    if not isinstance(sizes, Sequence):
        return integer(name, sizes, 1)
    if len(sizes) != layers:
        raise ValueError(f"{name} must be an integer or one for each of {layers} layers, got {len(sizes)}")
    checked = tuple(integer(f"each of {name}", size, 1) for size in sizes)
    return checked if len(set(checked)) > 1 else checked[0]
