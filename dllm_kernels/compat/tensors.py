"""Conversions between rectangular tensors of third-party functions and rows of unequal length."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(name: str, tokens: Tensor) -> None:
    """Refuse a value that is not a batch of ids, by the caller's name for it."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} is a {type(tokens).__name__}; it must be an int64 Tensor [B, S]")
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.dim() != 2:
        raise TypeError(f"{name} must be an int64 Tensor [B, S], got {tokens.dtype} {list(tokens.shape)}")


def beside_prompt(prompt: Tensor, given: Tensor, sequences: Tensor, new_tokens: int) -> Tensor:
    """Return [B, S + new_tokens]: `prompt` unchanged, padding included, followed by the completions.

    given: int64 [B], where each completion starts in its row of `sequences`.
    """
    place = given[:, None] + torch.arange(new_tokens)
    return torch.cat([prompt, sequences.gather(1, place).to(prompt.device, prompt.dtype)], dim=1)


def prompt_lengths(prompt: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return int64 [B], real tokens of each row."""
    if attention_mask is None:
        return torch.full((len(prompt),), prompt.shape[1])
    return attention_mask.bool().sum(1).cpu()


def stacked(rows: list[list[int]], width: int, fill: int, side: str = "right") -> Tensor:
    """Return int64 [B, width], rows padded on one side."""
    result = torch.full((len(rows), width), fill)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        result[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return result


def replayed(
    sequences: Tensor,
    unmask_step: Tensor,
    mask_id: int,
    *,
    origin: Tensor,
    block_size: int,
    quotas: list[int] | None = None,
    least: int = 1,
) -> list[Tensor]:
    """Return canvases [B, T] before and after every step of a loop that moves all rows block by block.

    sequences: int64 [B, T], finished; unmask_step: each row's own forward that wrote a token, −1: given.
    origin: int64 [B], where blocks count from. quotas: tokens that each step of a block commits, possibly 0;
    None: every step commits something. least: fewest steps of a block.
    """
    filled = unmask_step >= 0
    block = (torch.arange(sequences.shape[1]) - origin[:, None]).div(block_size, rounding_mode="floor")
    committing = torch.arange(int(unmask_step.max()) + 1)
    if quotas is not None:
        committing = torch.tensor(quotas).nonzero()[:, 0]
    time, past = torch.full_like(unmask_step, -1), 0
    for index in block[filled].unique().tolist():
        here = filled & (block == index)
        first = torch.where(here, unmask_step, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        step = committing[(unmask_step - first)[here]]
        time[here] = past + step
        past += max(int(step.max()) + 1, least)
    return [sequences.masked_fill(time >= now, mask_id) for now in range(past + 1)]


def parity_at_zero(temperature: float, parity: str, otherwise: dict) -> dict:
    """Return the parity mode at temperature 0; above it the options that the mode would fix."""
    return dict(parity=parity) if temperature == 0 else otherwise


def drawn_seed(draws: object) -> int:
    """Return a seed from torch's generator, as the originals draw from it, if anything is drawn."""
    return int(torch.randint(2**62, ())) if draws else 0


CONFIDENCE = {
    "low_confidence": "prob",
    "random": "random",
    "maskgit_plus": "prob",
    "topk_margin": "margin",
    "entropy": "entropy",
}


def confidence_of(name: str, value: str, *allowed: str) -> str:
    """Translate a third-party name of a confidence to ours."""
    if value not in allowed:
        raise NotImplementedError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return CONFIDENCE[value]
