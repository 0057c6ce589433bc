"""The oracle of sampling: the plain loop, one row at a time, a dense mask and a full forward each step.

It shares nothing with rounds.py but the options: no views, no cache, no batch, none of our compiled
operators. Tests compare tokens with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels.models.families import diffusion_of
from dllm_kernels.ops.reference import unmask
from dllm_kernels.sampling.config import SampleConfig


@dataclass
class ReferenceRow:
    """ids: prompt and completion, or the filled canvas. unmask_step: the forward that wrote each; -1: given.
    near_ties: decisions where competing scores lie within 1e-5 (1e-4 with noise), left to rounding."""

    ids: list[int]
    unmask_step: list[int]
    forwards: int
    near_ties: int


def sample_row(model, prompt: list[int], config: SampleConfig, *, sequence: int = 0) -> ReferenceRow:
    """Complete one prompt with a transformers model; `sequence` is the row's number in its batch."""
    diffusion, size = diffusion_of(model), config.block_size
    mask_id = diffusion.mask_id if config.mask_id is None else config.mask_id
    eos_ids = diffusion.eos_ids if config.eos_ids is None else config.eos_ids
    stop = len(prompt) + config.max_new_tokens
    origin, end = len(prompt), stop
    if diffusion.attention == "block_causal":
        origin, end = 0, (stop + size - 1) // size * size
    canvas = prompt + [mask_id] * (end - len(prompt))
    stop_ids = eos_ids if config.stop_on_eos else ()
    row = _denoise(model, canvas, origin, len(prompt), config, mask_id, stop_ids, sequence)
    row.ids, row.unmask_step = row.ids[:stop], row.unmask_step[:stop]
    return row


def infill_row(model, canvas: list[int], config: SampleConfig, *, sequence: int = 0) -> ReferenceRow:
    """Fill the masks of one canvas."""
    mask_id = diffusion_of(model).mask_id if config.mask_id is None else config.mask_id
    return _denoise(model, list(canvas), 0, 0, config, mask_id, (), sequence)


def _denoise(model, canvas, origin, given, config, mask_id, stop_ids, sequence) -> ReferenceRow:
    size, rule = config.block_size, config.acceptance()
    starts = [s for s in range(origin, len(canvas), size) if mask_id in canvas[s : s + size]]
    unmask_step, step, near_ties = [-1] * len(canvas), 0, 0
    for start in starts:
        block = range(start, min(start + size, len(canvas)))
        quotas = config.quotas(sum(canvas[p] == mask_id for p in block), len(starts))
        while masked := [p for p in block if canvas[p] == mask_id]:
            quota = quotas.pop(0) if rule.needs_quota else None
            logits = _logits(model, canvas, size)[masked]
            stats, ties = _statistics(logits, masked, step, sequence, mask_id, config)
            near_ties += ties
            (after,), (accepted,), _ = unmask.commit(
                [canvas], [masked], stats, rule, mask_id=mask_id, quota=[quota], step=[step],
                sequence_ids=[sequence], seed=config.seed,
            )  # fmt: skip
            near_ties += _near_ties_of_acceptance(rule, stats, accepted)
            for position in (p for p in masked if after[p] != mask_id):
                unmask_step[position] = step
            canvas, step = after, step + 1
        ends = [p for p in block if p >= given and canvas[p] in stop_ids]
        if ends:
            rest = len(canvas) - ends[0] - 1
            canvas[ends[0] + 1 :] = [stop_ids[0]] * rest
            unmask_step[ends[0] + 1 :] = [-1] * rest
            break
    return ReferenceRow(canvas, unmask_step, step, near_ties)


def _logits(model, canvas: list[int], block_size: int) -> Tensor:
    """float32 [T, V] of a forward over the whole canvas, under a dense mask."""
    position = torch.arange(len(canvas))
    visible = torch.ones(len(canvas), len(canvas), dtype=torch.bool)
    if diffusion_of(model).attention == "block_causal":
        visible = position[:, None] // block_size >= position // block_size
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([canvas]), attention_mask=mask[None, None], use_cache=False)
    return output.logits[0].float()


def _statistics(logits, masked, step, sequence, mask_id, config) -> tuple[tuple[Tensor, ...], int]:
    """Token, prob, margin, entropy of every candidate, in float64, and how many proposals are near-ties."""
    logits = logits.double()
    logits[:, [mask_id, *config.suppress_tokens]] = -torch.inf
    scores = logits.clone()
    if config.temperature:
        for row, position in enumerate(masked):
            noise = unmask.token_noise(logits.shape[1], config.seed, sequence, position, step)
            scores[row] += config.temperature * torch.from_numpy(noise)
    best, second = scores.topk(2).values.unbind(-1)
    token, probability = scores.argmax(-1), logits.softmax(-1)
    top = probability.topk(2).values
    entropy = torch.special.entr(probability).sum(-1)
    stats = token, probability.gather(1, token[:, None])[:, 0], top[:, 0] - top[:, 1], entropy
    return stats, int((best - second < (1e-4 if config.temperature else 1e-5)).sum())


def _near_ties_of_acceptance(rule, stats, accepted: list[bool]) -> int:
    """Accepted and rejected candidates, or a candidate and the rule's bound, within 1e-5 of each other."""
    _, prob, margin, entropy = stats
    kinds = {"prob": prob, "margin": margin, "entropy": -entropy}
    if rule.confidence not in kinds:
        return 0
    confidence, accepted = kinds[rule.confidence], torch.tensor(accepted)
    gaps = (confidence[accepted][:, None] - confidence[~accepted]).abs()
    count = int((gaps < 1e-5).sum())
    bounds = {
        "threshold": lambda threshold: torch.full_like(confidence, threshold),
        "quota_or_threshold": lambda threshold: torch.full_like(confidence, threshold),
        "factor": lambda factor: 1 - factor / torch.arange(2, len(confidence) + 2),
    }
    if rule.name in bounds:
        ranked = confidence.sort(descending=True).values
        count += int(((ranked - bounds[rule.name](*rule.parameters)).abs() < 1e-5).sum())
    return count
