"""Between the rectangular tensors that others take and return and rows of unequal length."""

from __future__ import annotations

import torch
from torch import Tensor


def beside_prompt(prompt: Tensor, given: Tensor, sequences: Tensor, new_tokens: int) -> Tensor:
    """[B, S + new_tokens]: `prompt` as it was, padding included, and the completions behind it.

    given: int64 [B], where each completion starts in its row of `sequences`.
    """
    place = given[:, None] + torch.arange(new_tokens)
    return torch.cat([prompt, sequences.gather(1, place).to(prompt.device, prompt.dtype)], dim=1)


def prompt_lengths(prompt: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int64 [B], real tokens of each row."""
    if attention_mask is None:
        return torch.full((len(prompt),), prompt.shape[1])
    return attention_mask.bool().sum(1).cpu()


def stacked(rows: list[list[int]], width: int, fill: int, side: str = "right") -> Tensor:
    """int64 [B, width], rows filled up at one side."""
    result = torch.full((len(rows), width), fill)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        result[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return result


def parity_at_zero(temperature: float, parity: str, otherwise: dict) -> dict:
    """The parity mode at temperature 0; above it the options that the mode would fix."""
    return dict(parity=parity) if temperature == 0 else otherwise


CONFIDENCE = {
    "low_confidence": "prob",
    "random": "random",
    "maskgit_plus": "prob",
    "topk_margin": "margin",
    "entropy": "entropy",
}


def confidence_of(name: str, value: str, *allowed: str) -> str:
    """What others call a confidence, in our words."""
    if value not in allowed:
        raise NotImplementedError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    return CONFIDENCE[value]
