"""Forward noise of masked diffusion: schedules, loss weights, and times and masks keyed by example.

A token of a row at time t is masked with probability 1 - alpha(t). Every random number comes from
Philox4x32-10 with key = seed and counter = (position // 4, epoch, example id, stream), lane = position % 4
(Salmon et al. 2011), so a draw does not depend on batch size, accumulation or ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from dllm_train.documents import places

MASK_STREAM, TIME_STREAM, SHIFT_STREAM = 0, 1, 2
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Schedule:
    """Noise schedule alpha(t) on [0, 1]: `linear` 1 - t, or `cosine` 1 - cos(pi/2 (1 - t))."""

    name: str = "linear"

    def __post_init__(self):
        if self.name not in ("linear", "cosine"):
            raise ValueError(f"schedule is {self.name!r}; allowed: 'linear', 'cosine'")

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Return the probability that a token is still visible at time t."""
        return 1 - t if self.name == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))

    def weight(self, t: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
        """Return w(t) = -alpha'(t) / (1 - alpha(t) + eps); eps = 0 makes the loss a bound on -log p."""
        if self.name == "linear":
            return 1 / (t + eps)
        angle = math.pi / 2 * t  # sines of it, not cosines of 1 - t: small times keep their digits
        return math.pi / 2 * torch.cos(angle) / (torch.sin(angle) + eps)

    def complement(self, t: torch.Tensor) -> torch.Tensor:
        """Return the time t' of the inverted mask: 1 - alpha(t') = alpha(t)."""
        if self.name == "linear":
            return 1 - t
        return (2 / math.pi * torch.asin(1 - torch.sin(math.pi / 2 * t.double()))).to(t.dtype)


@dataclass(frozen=True)
class Noise:
    """The noise of a batch.

    t: float32 [B, L], the time of every position (constant within its document or block), in (0, 1).
    masked: bool [B, L], the positions that the mask token replaces.
    """

    t: torch.Tensor
    masked: torch.Tensor


def sample_noise(
    labels: torch.Tensor,
    example_ids: Sequence[int] | torch.Tensor,
    *,
    seed: int = 0,
    epoch: int = 0,
    schedule: Schedule | str = "linear",
    eps: float = 1e-3,
    block_size: int | None = None,
    stratified: bool = True,
    document_lengths: torch.Tensor | None = None,
    complementary: bool = False,
) -> Noise:
    """Return times and masks for `labels` int64 [B, L]; positions whose label is -100 are never masked.

    Every document of a row has its own time, or every block of `block_size` positions of a document.
    document_lengths: int64 [B, D], zero-filled; None: a row is one document.
    t = eps + (1 - eps) u lies in [eps, 1); with `complementary` it ends where the time of the inverted mask
    (`Schedule.complement`) is eps. u is iid, or, when `stratified`,
    u = frac(u_0 + n (sqrt(5) - 1) / 2 + k (sqrt(2) - 1)) for the k-th document or block of example n: uniform
    for each of them, and evenly spread (antithetic) over consecutive examples and within each, however they
    are cut into batches and padded.
    """
    if labels.ndim != 2:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected [B, L]")
    if isinstance(example_ids, torch.Tensor):
        example_ids = example_ids.tolist()
    if len(example_ids) != labels.shape[0]:
        raise ValueError(f"example_ids has {len(example_ids)} entries for {labels.shape[0]} rows of labels")
    if not 0 < eps < 1:
        raise ValueError(f"eps is {eps}; expected 0 < eps < 1")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected a positive integer or None")
    schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
    length = labels.shape[1]
    last = 1.0
    if complementary:
        last = float(schedule.complement(torch.tensor(eps, dtype=torch.float64, device="cpu")))
        if last <= eps:
            raise ValueError(f"eps is {eps}; complementary masks have times of at most {last}, so take less")
    ids = np.asarray(example_ids, dtype=np.int64)
    unit = _units(length, block_size, document_lengths).expand(len(ids), -1)
    units = int(unit.max()) + 1 if unit.numel() else 1
    if stratified:
        start = _random_bits(1, np.zeros(1, dtype=np.int64), seed, epoch, SHIFT_STREAM).astype(np.uint64)
        n, k = ids.astype(np.uint64)[:, None], np.arange(units, dtype=np.uint64)
        bits = ((start + n * _GOLDEN + k * _SILVER) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    else:
        bits = _random_bits(units, ids, seed, epoch, TIME_STREAM)
    t = torch.from_numpy(eps + (last - eps) * _uniform(bits)).to(labels.device, torch.float32)
    t = t.gather(1, unit.to(labels.device))
    uniform = _uniform(_random_bits(length, ids, seed, epoch, MASK_STREAM))
    uniform = torch.from_numpy(uniform).to(labels.device, torch.float32)
    return Noise(t, (uniform < 1 - schedule.alpha(t)) & (labels != IGNORED_LABEL))


def _units(length: int, block_size: int | None, document_lengths: torch.Tensor | None) -> torch.Tensor:
    """Return the number, within its row, of each position's document or block, int64 [B or 1, L]."""
    where = places(length, document_lengths)
    if block_size is None:
        unit = where.document
    elif document_lengths is None:
        unit = where.position // block_size
    else:
        before = pad((-(-document_lengths // block_size)).cumsum(1), (1, 0))
        unit = before.gather(1, where.document) + where.position // block_size
    return unit.masked_fill(~where.inside, 0)


# 2**32 times the fractional parts above, whose multiples are spread most evenly.
_GOLDEN, _SILVER = np.uint64(2654435769), np.uint64(1779033704)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Compute Philox4x32-10: uint32 counters [..., 4] -> uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = p1 & low, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def _random_bits(length: int, example_ids: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return uint32 [B, length]; the draw of a position depends on its own key only."""
    groups = -(-length // 4)
    counter = np.zeros((len(example_ids), groups, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(groups, dtype=np.uint32)
    counter[..., 1] = epoch
    counter[..., 2] = (example_ids & 0xFFFFFFFF).astype(np.uint32)[:, None]
    counter[..., 3] = stream
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return bits.reshape(len(example_ids), groups * 4)[:, :length]


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Return numbers in (0, 1) from the upper 24 bits, exact in float32."""
    return ((bits >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
