"""The oracle of sampling: the plain loop, one row at a time, dense masks, logits of whole canvases.

It shares nothing with loop.py but the options: no views, no pages, no batch, none of our compiled
operators. Approximate caches are transformers' own, cut by hand. Tests compare tokens with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

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
    size, cached = config.block_size, config.cache in ("prefix", "dual")
    starts = [s for s in range(origin, len(canvas), size) if mask_id in canvas[s : s + size]]
    rule = config.acceptance(config.steps_of_block(len(starts) or 1))
    opened = [token == mask_id for token in canvas]
    hidden = [not o and t not in config.cfg_keep_tokens for o, t in zip(opened, canvas, strict=True)]
    conditional, unconditional = PlainModel(model, config), PlainModel(model, config)
    shift = diffusion_of(model).shift if config.shift is None else config.shift
    unmask_step, step, near_ties = [-1] * len(canvas), 0, 0
    for start in starts:
        block = range(start, min(start + size, len(canvas)))
        quotas = config.quotas(sum(canvas[p] == mask_id for p in block), len(starts), (sequence, start))
        taken, index, post, before, state = 0, -1, 0, {}, [0] * len(canvas)
        while True:
            masked = [p for p in block if canvas[p] == mask_id]
            listed = masked
            if rule.name == "edit":
                listed = [p for p in block if opened[p]]
            elif not masked:
                break
            index += 1
            if rule.name == "bernoulli" and not _draws(rule, masked, index, sequence, config.seed):
                continue
            refresh = taken == 0 or (config.refresh_every and taken % config.refresh_every == 0)
            logits = conditional.logits(canvas, block, not cached or refresh)
            if config.cfg_scale:
                bare = [mask_id if h else t for h, t in zip(hidden, canvas, strict=True)]
                without = unconditional.logits(bare, block, not cached or refresh)
                logits = without + (1 + config.cfg_scale) * (logits - without)
            logits = logits[[max(p - 1, 0) if shift else p for p in listed]]
            stats, ties = _statistics(logits, listed, step, sequence, mask_id, config)
            near_ties += ties
            divergence = None
            if rule.needs_state:
                divergence = _divergence(logits, listed, before, mask_id, config)
                before = dict(zip(listed, logits, strict=True))
            quota = quotas.pop(0) if rule.needs_quota else None
            (after,), (accepted,), _ = unmask.commit(
                [canvas], [listed], stats, rule, mask_id=mask_id, quota=[quota], sequence_ids=[sequence],
                step=[index if rule.name == "bernoulli" else step], seed=config.seed,
                divergence=divergence, state=[state],
            )  # fmt: skip
            near_ties += _near_ties_of_acceptance(rule, stats, accepted)
            for position, changed in zip(listed, accepted, strict=True):
                if changed:
                    unmask_step[position] = step
            canvas, step, taken = after, step + 1, taken + 1
            post += not masked
            quiet = not masked and not any(accepted)
            left = any(canvas[p] == mask_id for p in block)
            if rule.name == "edit" and not left and (quiet or post >= config.max_post_steps):
                break
        ends = [p for p in block if p >= given and canvas[p] in stop_ids]
        if ends:
            rest = len(canvas) - ends[0] - 1
            canvas[ends[0] + 1 :] = [stop_ids[0]] * rest
            unmask_step[ends[0] + 1 :] = [-1] * rest
            break
    return ReferenceRow(canvas, unmask_step, step, near_ties)


class PlainModel:
    """A model on one canvas. outputs: float32 [T, V], of each position from the last forward over it."""

    def __init__(self, model, config: SampleConfig):
        self.model, self.config, self.causal = (
            model,
            config,
            diffusion_of(model).attention == "block_causal",
        )
        self.outputs: Tensor | None = None
        self.layers: list[tuple[Tensor, Tensor]] = []

    def logits(self, canvas: list[int], block: range, refresh: bool) -> Tensor:
        """Outputs [T, V] after a step over `block`: a refresh computes everything in reach; a step with a
        prefix cache what is in reach from the block on, with a dual cache the block, beside cached K/V."""
        config, end = self.config, len(canvas)
        if config.suffix_window is not None:
            end = min(end, block.stop + config.suffix_window)
        computed = range(end)
        if not refresh:
            computed = block if config.cache == "dual" else range(block.start, end)
        cache = DynamicCache()
        if not refresh:
            seen = [p for p in range(end) if p not in computed]
            for layer, (key, value) in enumerate(self.layers):
                cache.update(key[:, :, seen], value[:, :, seen], layer)
        position = torch.tensor([*computed])
        visible = torch.ones(len(computed), end, dtype=torch.bool)
        if self.causal:
            visible = position[:, None] // config.block_size >= position // config.block_size
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        with torch.no_grad():
            found = self.model(
                input_ids=torch.tensor([canvas])[:, position], attention_mask=mask[None, None],
                position_ids=position[None], past_key_values=cache, use_cache=True,
            )  # fmt: skip
        if refresh:
            self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        if self.outputs is None:
            self.outputs = torch.full((len(canvas), found.logits.shape[-1]), torch.nan)
        self.outputs[position] = found.logits[0].float()
        return self.outputs.clone()


def _draws(rule, masked: list[int], index: int, sequence: int, seed: int) -> bool:
    """Return whether rule `bernoulli` draws any of the masked positions in this step."""
    nothing = tuple(torch.zeros(len(masked)) for _ in range(4))
    (accepted,) = unmask.commit(
        [[-1] * (max(masked) + 1)], [masked], nothing, rule, mask_id=-1, step=[index],
        sequence_ids=[sequence], seed=seed,
    )[1]  # fmt: skip
    return any(accepted)


def _statistics(logits, listed, step, sequence, mask_id, config) -> tuple[tuple[Tensor, ...], int]:
    """Token, prob, margin, entropy of every candidate, in float64, and how many proposals are near-ties."""
    logits, temperature = logits.double(), _temperature(config)
    logits[:, [mask_id, *config.suppress_tokens]] = -torch.inf
    dropped = ~unmask.kept(logits / temperature, config.top_p, config.top_k)
    scores = logits.clone()
    if config.temperature:
        for row, position in enumerate(listed):
            noise = unmask.token_noise(logits.shape[1], config.seed, sequence, position, step)
            scores[row] += config.temperature * torch.from_numpy(noise)
    scores[dropped] = -torch.inf
    best, second = scores.topk(2).values.unbind(-1)
    token = scores.argmax(-1)
    clean = (logits / temperature).masked_fill(dropped, -torch.inf)
    clean[:, list(config.begin_suppress_tokens)] = -torch.inf
    nothing = (clean == -torch.inf).all(-1)  # all that the filters keep has no confidence
    probability = clean.softmax(-1).masked_fill(nothing[:, None], 0.0)
    top = probability.topk(2).values
    entropy = torch.special.entr(probability).sum(-1).masked_fill(nothing, math.log(logits.shape[1]))
    counted = ~torch.isin(token, torch.tensor(config.begin_suppress_tokens, dtype=torch.int64))
    stats = (
        token,
        probability.gather(1, token[:, None])[:, 0] * counted,
        (top[:, 0] - top[:, 1]) * counted,
        entropy,
    )
    return stats, int((best - second < (1e-4 if config.temperature else 1e-5)).sum())


def _temperature(config) -> float:
    """Temperature of the softmax behind confidences: that of the noise, where filters cut the proposals."""
    filtered = config.top_p is not None or config.top_k is not None
    return config.temperature if filtered and config.temperature else 1.0


def _divergence(logits, listed, before: dict[int, Tensor], mask_id, config) -> Tensor:
    """KL(p ‖ p of the step before) of every candidate; infinite at its first step."""
    barred = [mask_id, *config.suppress_tokens, *config.begin_suppress_tokens]
    result = []
    for position, row in zip(listed, logits, strict=True):
        if position not in before:
            result.append(torch.inf)
            continue
        both = torch.stack([row, before[position]]).double() / _temperature(config)
        both[:, barred] = -torch.inf
        log_p, log_q = both.log_softmax(-1)
        result.append(float(torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum()))
    return torch.tensor(result, dtype=torch.float64)


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
