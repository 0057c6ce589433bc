"""SpanMask: an attention pattern as a few contiguous key ranges per query, O(S) memory.

A row of `spans` lists the keys that one query sees as half-open ranges `[start, end)`, sorted and
disjoint (neighbours may touch); unused ranges are `(0, 0)` at the row's end.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dllm_kernels._arguments import check_batch_vector, integer, kind

_INNER_NEEDS_BLOCK_SIZE = {"full": False, "causal": False, "block_causal": True, "block_diffusion": True}


@dataclass(frozen=True, eq=False, repr=False)
class SpanMask:
    """The keys that each query sees.

    spans: int32 [B or 1, Sq, R, 2]; a leading 1 serves every row of a batch. kv_len: number of keys.
    A query whose spans are all empty sees nothing: attention gives output 0 and lse -inf there.
    The contents are checked here (on CUDA this waits for the device); inside torch.compile, and while a CUDA
    graph is recorded, they are not.

    Constructors below take `lengths`, the number of real tokens: int, or integer Tensor [B], which also
    sets the batch size and the device. Padding is on `padding_side` ("right" or "left"), is seen by no
    query and sees nothing. Position 0 is the first real token on either side.
    """

    spans: Tensor
    kv_len: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_len", integer("kv_len", self.kv_len, 0))
        _check_form(self.spans)
        recorded = self.spans.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (torch.compiler.is_compiling() or recorded):
            _check_contents(self.spans, self.kv_len)

    @classmethod
    def full(cls, q_len, kv_len=None, lengths=None, padding_side="right") -> SpanMask:
        """Every query sees every key.

        kv_len=None: queries and keys are the same tokens, and `lengths` counts both. With kv_len, `lengths`
        counts keys and every query is real.
        """
        q_len = integer("q_len", q_len, 0)
        if kv_len is None:
            return _mask(_Rows.of(q_len, lengths, padding_side), "full")
        kv_len = integer("kv_len", kv_len, 0)
        keys = _Rows.of(kv_len, lengths, padding_side)
        first_key = torch.zeros(1, q_len, dtype=torch.int64, device=keys.start.device)
        return _mask(_Rows(first_key, keys.start, keys.length, kv_len), "full")

    @classmethod
    def causal(cls, seq_len, lengths=None, padding_side="right", reach=0) -> SpanMask:
        """Query q sees keys 0..q + reach."""
        return _mask(_Rows.of(seq_len, lengths, padding_side), "causal", reach=integer("reach", reach, 0))

    @classmethod
    def sliding_window(cls, seq_len, window, lengths=None, padding_side="right") -> SpanMask:
        """Query q sees keys k with |q - k| <= window (bidirectional)."""
        window = integer("window", window, 0)
        rows = _Rows.of(seq_len, lengths, padding_side)
        return trusted_mask(
            rows.span(rows.position - window, rows.position + window + 1)[:, :, None], seq_len
        )

    @classmethod
    def block_causal(cls, seq_len, block_size, lengths=None, offset=0, padding_side="right") -> SpanMask:
        """A query sees its own block and all before it; the block of position p is
        (p + offset) // block_size, rounded down. offset: int, or integer Tensor [B]."""
        rows = _Rows.of(seq_len, lengths, padding_side)
        if isinstance(offset, Tensor):
            check_batch_vector("offset", offset)
            if isinstance(lengths, Tensor) and (lengths.shape, lengths.device) != (
                offset.shape,
                offset.device,
            ):
                raise ValueError(
                    f"offset must match lengths, {list(lengths.shape)} on {lengths.device}; "
                    f"got {list(offset.shape)} on {offset.device}"
                )
            rows, offset = rows.to(offset.device), offset.to(torch.int64)[:, None]
        else:
            offset = integer("offset", offset)
        return _mask(rows, "block_causal", integer("block_size", block_size, 1), offset)

    @classmethod
    def block_diffusion(
        cls, seq_len, block_size, lengths=None, padding_side="right", clean="block_causal"
    ) -> SpanMask:
        """BD3LM training mask over x_t followed by x_0: 2 * seq_len tokens, `lengths` real ones in each half.

        An x_t query sees its own noisy block and the x_0 blocks strictly before it. An x_0 query sees the x_0
        blocks up to and including its own or, with clean="causal", the x_0 tokens up to and including itself.
        """
        rows = _Rows.of(seq_len, lengths, padding_side)
        return _mask(rows, "block_diffusion", integer("block_size", block_size, 1), clean=_clean(clean))

    @classmethod
    def packed(
        cls, document_lengths, inner="full", block_size=None, padding_side="right", *,
        seq_len=None, reach=0, clean="block_causal",
    ) -> SpanMask:  # fmt: skip
        """Documents lie end to end; none sees another, `inner` holds within each, from its own position 0.

        document_lengths: one row [N] (ints or Tensor), or one per batch entry [B, N] (lists may be ragged, a
        tensor is filled with 0). seq_len: the sequence length S; None: the largest sum of a row. Shorter rows
        are padded. inner: "full", "causal", "block_causal", or "block_diffusion", which has 2 * S tokens: x_t
        of all documents, then x_0 of all documents. block_size: for the two block kinds and only for them.
        reach, clean: as in `causal` and `block_diffusion`, for these kinds only.
        """
        if inner not in _INNER_NEEDS_BLOCK_SIZE:
            raise ValueError(f"inner must be one of {', '.join(_INNER_NEEDS_BLOCK_SIZE)}; got {inner!r}")
        if _INNER_NEEDS_BLOCK_SIZE[inner]:
            block_size = integer("block_size", block_size, 1)
        elif block_size is not None:
            raise ValueError(f"block_size has no meaning with inner={inner!r}; got {block_size!r}")
        reach, clean = integer("reach", reach, 0), _clean(clean)
        if reach and inner != "causal":
            raise ValueError(f"reach has no meaning with inner={inner!r}; got {reach}")
        if clean != "block_causal" and inner != "block_diffusion":
            raise ValueError(f"clean has no meaning with inner={inner!r}; got {clean!r}")
        rows = _Rows.of_documents(_document_table(document_lengths), padding_side, seq_len)
        return _mask(rows, inner, block_size, reach=reach, clean=clean)

    @classmethod
    def from_dense(cls, mask: Tensor) -> SpanMask:
        """Convert a boolean mask [Sq, Sk] or [B, Sq, Sk], True = visible. R is the most ranges in any row."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool Tensor, got {kind(mask)}")
        if mask.dim() not in (2, 3):
            raise ValueError(f"mask must be [Sq, Sk] or [B, Sq, Sk], got {list(mask.shape)}")
        batch, q_len, kv_len = mask.shape if mask.dim() == 3 else (1, *mask.shape)
        edges = pad(mask.reshape(batch * q_len, kv_len), (1, 1))
        row, start = (edges[:, 1:] & ~edges[:, :-1]).nonzero(as_tuple=True)
        end = (edges[:, :-1] & ~edges[:, 1:]).nonzero(as_tuple=True)[1]
        counts = torch.bincount(row, minlength=batch * q_len)
        rank = torch.arange(row.numel(), device=mask.device) - (counts.cumsum(0) - counts)[row]
        ranges = max(int(counts.max()), 1) if counts.numel() else 1
        spans = torch.zeros(batch * q_len, ranges, 2, dtype=torch.int32, device=mask.device)
        spans[row, rank] = torch.stack([start, end], dim=-1).to(torch.int32)
        return trusted_mask(spans.view(batch, q_len, ranges, 2), kv_len)

    def to_dense(self) -> Tensor:
        """Return bool [B or 1, Sq, kv_len], True = visible."""
        key = torch.arange(self.kv_len, dtype=torch.int32, device=self.spans.device)
        dense = torch.zeros(*self.spans.shape[:2], self.kv_len, dtype=torch.bool, device=self.spans.device)
        for start, end in (span.split(1, dim=-1) for span in self.spans.unbind(2)):
            dense |= (start <= key) & (key < end)
        return dense

    def to_block_mask(self, block_size: int = 128):
        """Return the mask as a torch `BlockMask` for flex_attention, in tiles of block_size x block_size."""
        return _flex_block_mask(self.spans, self.kv_len, integer("block_size", block_size, 1))

    def density(self) -> float:
        """Return visible (query, key) pairs divided by all pairs; 0.0 if there are no pairs."""
        pairs = self.spans.shape[0] * self.spans.shape[1] * self.kv_len
        return int((self.spans[..., 1] - self.spans[..., 0]).sum()) / pairs if pairs else 0.0

    def to(self, device: torch.device | str) -> SpanMask:
        """Return the same mask on another device; itself if it is there already."""
        spans = self.spans.to(device)
        return self if spans is self.spans else trusted_mask(spans, self.kv_len)

    def __repr__(self) -> str:
        return f"SpanMask(spans=int32 {list(self.spans.shape)} on {self.spans.device}, kv_len={self.kv_len})"


@dataclass(frozen=True)
class _Rows:
    """For each query its position in its document, that document's first index and its length: int64,
    broadcastable to [B, S]. A position outside 0..length-1 is padding. seq_len: number of keys."""

    position: Tensor
    start: Tensor
    length: Tensor
    seq_len: int

    @staticmethod
    def of(seq_len: int, lengths: int | Tensor | None, padding_side: str) -> _Rows:
        """Return rows of one document of `lengths` tokens each."""
        seq_len = integer("seq_len", seq_len, 0)
        if isinstance(lengths, Tensor):
            check_batch_vector("lengths", lengths, 0, seq_len)
            length = lengths.to(torch.int64)[:, None]
        else:
            lengths = seq_len if lengths is None else integer("lengths", lengths, 0, seq_len)
            length = torch.full((1, 1), lengths, dtype=torch.int64)
        start = (seq_len - length) * _pads_left(padding_side)
        return _Rows(torch.arange(seq_len, device=length.device) - start, start, length, seq_len)

    @staticmethod
    def of_documents(table: Tensor, padding_side: str, seq_len: int | None = None) -> _Rows:
        """Return documents of lengths [B, N] end to end, padded to `seq_len`; None: to the longest row."""
        ends = table.cumsum(1)
        totals = table.sum(1, keepdim=True)
        longest = int(totals.max()) if totals.numel() else 0
        seq_len = longest if seq_len is None else integer("seq_len", seq_len, longest)
        shift = (seq_len - totals) * _pads_left(padding_side)
        place = torch.arange(seq_len, device=table.device) - shift
        document = torch.searchsorted(ends, place, right=True)  # N for the padding behind the last one
        first = pad(ends, (1, 0)).gather(1, document)
        return _Rows(place - first, first + shift, pad(table, (0, 1)).gather(1, document), seq_len)

    def span(self, start: Tensor | int, end: Tensor | int, shift: int = 0) -> Tensor:
        """Return int32 [B, S, 2]: [start, end) cut to the document, as key indices moved by `shift`."""
        bounds = (torch.as_tensor(bound, device=self.start.device) for bound in (start, end))
        first, last = torch.broadcast_tensors(*bounds, self.position)[:2]
        first, last = first.clamp(min=0), torch.minimum(last, self.length)
        visible = (first < last) & (self.position >= 0) & (self.position < self.length)
        span = torch.stack([first, last], dim=-1) + (self.start + shift)[..., None]
        return torch.where(visible[..., None], span, 0).to(torch.int32)

    def to(self, device: torch.device) -> _Rows:
        return _Rows(self.position.to(device), self.start.to(device), self.length.to(device), self.seq_len)


def _mask(
    rows: _Rows,
    inner: str,
    block_size: int | None = None,
    offset: int | Tensor = 0,
    reach: int = 0,
    clean: str = "block_causal",
) -> SpanMask:
    """Return the mask of a pattern; every pattern but the window is defined here."""
    position, seq_len = rows.position, rows.seq_len
    if inner == "full":
        return trusted_mask(rows.span(0, rows.length)[:, :, None], seq_len)
    if inner == "causal":
        return trusted_mask(rows.span(0, position + 1 + reach)[:, :, None], seq_len)
    assert block_size is not None, inner
    block_start = (position + offset) // block_size * block_size - offset
    block_end = block_start + block_size
    if inner == "block_causal":
        return trusted_mask(rows.span(0, block_end)[:, :, None], seq_len)
    clean_end = position + 1 if clean == "causal" else block_end
    of_clean = rows.span(0, clean_end, shift=seq_len)
    noisy = [rows.span(block_start, block_end), rows.span(0, block_start, shift=seq_len)]
    halves = [torch.stack(noisy, dim=2), torch.stack([of_clean, torch.zeros_like(of_clean)], dim=2)]
    return trusted_mask(torch.cat(halves, dim=1), 2 * seq_len)


def trusted_mask(spans: Tensor, kv_len: int) -> SpanMask:
    """Return a SpanMask of spans that are valid by construction, without checking them."""
    mask = object.__new__(SpanMask)
    object.__setattr__(mask, "spans", spans)
    object.__setattr__(mask, "kv_len", kv_len)
    return mask


def _flex_block_mask(spans: Tensor, kv_len: int, block_size: int):
    from torch.nn.attention.flex_attention import BlockMask

    q_len = spans.shape[1]
    q_tiles, kv_tiles = -(-q_len // block_size), -(-kv_len // block_size)
    edge = torch.arange(kv_tiles, device=spans.device) * block_size
    start, end = spans[..., 0, None], spans[..., 1, None]
    overlap = (torch.minimum(end, edge + block_size) - torch.maximum(start, edge)).clamp(min=0).sum(2)
    tiles = pad(overlap, (0, 0, 0, q_tiles * block_size - q_len)).unflatten(1, (q_tiles, block_size)).sum(2)
    full = tiles == block_size * block_size

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    # Inductor takes captured tensors only if they are contiguous.
    bounds = [(span[..., 0].contiguous(), span[..., 1].contiguous()) for span in spans.unbind(2)]

    def mask_mod(b, h, q, k):
        row = b if spans.shape[0] > 1 else torch.zeros_like(b)
        visible = [(start[row, q] <= k) & (k < end[row, q]) for start, end in bounds]
        return functools.reduce(operator.or_, visible)

    return BlockMask.from_kv_blocks(
        *listed((tiles > 0) & ~full), *listed(full), block_size, mask_mod, seq_lengths=(q_len, kv_len)
    )


def _clean(clean: str) -> str:
    if clean not in ("block_causal", "causal"):
        raise ValueError(f'clean must be "block_causal" or "causal", got {clean!r}')
    return clean


def _pads_left(padding_side: str) -> bool:
    if padding_side not in ("right", "left"):
        raise ValueError(f'padding_side must be "right" or "left", got {padding_side!r}')
    return padding_side == "left"


def _document_table(document_lengths: Any) -> Tensor:
    """Return int64 [B, N], shorter rows padded with 0."""
    allowed = "must be ints [N], lists of ints [B][N], or an int32 or int64 Tensor [N] or [B, N]"
    if isinstance(document_lengths, Tensor):
        if document_lengths.dtype not in (torch.int32, torch.int64) or document_lengths.dim() not in (1, 2):
            raise TypeError(f"document_lengths {allowed}, got {kind(document_lengths)}")
        table = torch.atleast_2d(document_lengths).to(torch.int64)
    else:
        if not _is_list(document_lengths):
            raise TypeError(f"document_lengths {allowed}, got {kind(document_lengths)}")
        rows = document_lengths if any(map(_is_list, document_lengths)) else [document_lengths]
        if not all(map(_is_list, rows)):
            raise TypeError(f"document_lengths {allowed}, got ints and lists in one list")
        rows = [[integer("each of document_lengths", n, 0) for n in row] for row in rows]
        widest = max(map(len, rows))
        table = torch.tensor([row + [0] * (widest - len(row)) for row in rows], dtype=torch.int64)
    if bool((table < 0).any()):
        raise ValueError(f"document_lengths must not be negative, got {int(table.min())}")
    if table.numel() and int(table.sum(1).max()) > 2**30:
        raise ValueError(
            f"document_lengths must sum to at most {2**30} in a row, got {int(table.sum(1).max())}"
        )
    return table


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_form(spans: object) -> None:
    if not isinstance(spans, Tensor) or spans.dtype != torch.int32:
        raise TypeError(f"spans must be an int32 Tensor [B or 1, Sq, R, 2], got {kind(spans)}")
    if spans.dim() != 4 or spans.shape[2] < 1 or spans.shape[3] != 2:
        raise ValueError(f"spans must be [B or 1, Sq, R, 2] with R >= 1, got {list(spans.shape)}")


def _check_contents(spans: Tensor, kv_len: int) -> None:
    start, end = spans.unbind(-1)
    empty = (start == 0) & (end == 0)
    _refuse(~empty & ((start < 0) | (end > kv_len)), spans, f"lie in 0..{kv_len} (kv_len)")
    _refuse(~empty & (start >= end), spans, "have start < end, or be (0, 0) if empty")
    if spans.shape[2] > 1:
        late = empty[:, :, :-1] & ~empty[:, :, 1:]
        _refuse(pad(late, (1, 0)), spans, "stand before the empty ones of their row")
        overlap = ~empty[:, :, 1:] & (start[:, :, 1:] < end[:, :, :-1])
        _refuse(pad(overlap, (1, 0)), spans, "be sorted and disjoint within a row")


def _refuse(wrong: Tensor, spans: Tensor, rule: str) -> None:
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"spans must {rule}; spans{at} is {spans[tuple(at)].tolist()}")
