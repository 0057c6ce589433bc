"""Unmasking: statistics of logits, and the commit of accepted proposals into the canvas.

`token_stats` reads each row of logits once and yields the proposal and every kind of confidence;
`commit_` ranks the masked candidates, accepts by a `Rule` and writes in place; `unmask_` is both.
Bad arguments raise ValueError, from these functions and from torch.ops.dllm_kernels alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dllm_kernels import _library  # noqa: F401
from dllm_kernels._arguments import check_optional_tensors, check_tensors, integer, kind, number
from dllm_kernels.ops._fake import register_fake
from dllm_kernels.sampling.rules import Rule

_ops = torch.ops.dllm_kernels


class TokenStats(NamedTuple):
    """What a row of logits says; every field has the logits' leading shape.

    token       int64, the proposal
    prob        p(token) under softmax(logits / confidence_temperature)
    margin      p1 − p2, the two highest probabilities
    entropy     −Σ p ln p in nats; as a confidence it counts negated, so that larger is surer
    logsumexp   of logits / confidence_temperature
    """

    token: Tensor
    prob: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor


def token_stats(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    noise_ids: Tensor | None = None,
    suppress_tokens: Sequence[int] | None = None,
    proposal_exclude: Sequence[int] | None = None,
    confidence_exclude: Sequence[int] | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    confidence_temperature: float = 1.0,
    previous: Tensor | None = None,
    precision: str = "float32",
) -> TokenStats:
    """Proposal and confidence of every row of logits, in one pass over them.

    logits: [..., V] float32, bfloat16 or float16. The proposal is the argmax (ties to the lowest id) of
    logits + temperature · g, with Gumbel noise g = −ln(−ln(1 − w)) from Philox4x32-10 [Salmon et al.
    2011] keyed by `seed` and counted by (token id, noise_ids): the draw depends on nothing else.
    LLaDA's `exp(l) / (−ln u)^T` has the same distribution.

    noise_ids: int32 [N, 3] or [..., 3], (sequence, position, step) of each row; None: (0, row, 0).
    suppress_tokens: ids that are −inf for proposal and softmax. proposal_exclude: ids that are only
    barred from the proposal. confidence_exclude: ids left out of the softmax after the proposal was
    made; a proposal among them has prob and margin 0 [LLaDA's confidence_eos_eot_inf].
    precision: "float32", or "float64" for a softmax in double (statistics are then float64).

    NaN counts as −inf, +inf as the largest float. A row without a finite logit yields the lowest
    allowed id with prob 0, margin 0, entropy ln V and logsumexp −inf.
    """
    for name, value in (("top_p", top_p), ("top_k", top_k), ("previous", previous)):
        if value is not None:
            raise ValueError(f"token_stats: {name} is not available yet; leave it None")
    if precision not in ("float32", "float64"):
        raise ValueError(f"token_stats: precision is {precision!r}; allowed: float32, float64")
    return TokenStats(
        *_ops.token_stats(
            logits,
            float(temperature),
            seed,
            noise_ids,
            list(suppress_tokens or ()),
            list(proposal_exclude or ()),
            list(confidence_exclude or ()),
            float(confidence_temperature),
            precision == "float64",
        )
    )


def commit_(
    canvas: Tensor,
    positions: Tensor,
    stats: TokenStats,
    rule: Rule,
    *,
    mask_id: int,
    quota: Tensor | int | None = None,
    step: Tensor | int | None = None,
    sequence_ids: Tensor | None = None,
    seed: int = 0,
    state: Tensor | None = None,
    progress: Tensor | None = None,
) -> Tensor:
    """Write the proposals that `rule` accepts into `canvas`; returns accepted, bool [B, C].

    canvas: int64 or int32 [B, T], changed in place. positions: int32 [B, C], distinct in a row, −1 for
    none. The statistics of (b, c) are entry b·C + c of each field of `stats`. Candidates are listed
    positions that hold `mask_id` and whose proposal is another token; other listed positions stay as
    they are, except with `Rule.edit` (so never list the prompt). Ties go to the lower position.

    quota: int32 [B] (or an int for all), for rules that need one. step, sequence_ids: int32 [B],
    what the draws of `random` confidence, alg_temp and `Rule.bernoulli` are keyed by beside `seed` and the
    position; None: step 0, sequence = row. progress: int32 [B, 2], written: masks left among the listed
    positions, tokens changed. state: int32 [B, T] for `Rule.confident_stable`, zeros at first and then kept
    from step to step: for each masked position the number of steps in a row with a small
    `stats.divergence`.
    """
    check_tensors(canvas=canvas, positions=positions)
    if not all(isinstance(getattr(stats, name, None), Tensor) for name in TokenStats._fields[:4]):
        raise TypeError(f"stats must be the TokenStats of token_stats, got {kind(stats)}")
    check_optional_tensors(sequence_ids=sequence_ids, state=state, progress=progress)
    flat_rule = _flat(rule)
    divergence = getattr(stats, "divergence", None) if rule.needs_state else None
    return _ops.commit_(
        canvas,
        positions,
        stats.token,
        stats.prob,
        stats.margin,
        stats.entropy,
        *flat_rule,
        integer("mask_id", mask_id, high=_INT64),
        _per_row("quota", quota, canvas),
        _per_row("step", step, canvas),
        sequence_ids,
        integer("seed", seed, high=_INT64),
        progress,
        divergence,
        state,
    )


def unmask_(
    canvas: Tensor,
    logits: Tensor,
    rule: Rule,
    *,
    mask_id: int,
    block_start: Tensor | int,
    block_size: int,
    quota: Tensor | int | None = None,
    step: Tensor | int | None = None,
    sequence_ids: Tensor | None = None,
    seed: int = 0,
    progress: Tensor | None = None,
    temperature: float = 0.0,
    suppress_tokens: Sequence[int] | None = None,
    proposal_exclude: Sequence[int] | None = None,
    confidence_exclude: Sequence[int] | None = None,
    confidence_temperature: float = 1.0,
    precision: str = "float32",
) -> Tensor:
    """One denoising step of a block: `token_stats` of its masked positions, then `commit_`.

    logits: [B, block_size, V], row i of b predicts canvas position block_start[b] + i; block_start: int
    or int32 [B]. `mask_id` is barred from proposal and softmax; listed in `proposal_exclude` it stays
    in the softmax (as in references that leave it there). Noise is keyed by (sequence, position, step).
    Returns accepted, bool [B, block_size]. Everything else as in `token_stats` and `commit_`, which
    `Rule.confident_stable` and `Rule.edit` need separately.
    """
    check_tensors(canvas=canvas, logits=logits)
    check_optional_tensors(sequence_ids=sequence_ids, progress=progress)
    if precision not in ("float32", "float64"):
        raise ValueError(f"unmask_: precision is {precision!r}; allowed: float32, float64")
    if logits.dim() == 3 and logits.shape[1] != block_size:
        raise ValueError(f"unmask_: logits have {logits.shape[1]} rows a block, block_size is {block_size}")
    return _ops.unmask_(
        canvas,
        logits,
        _per_row("block_start", block_start, canvas),
        *_flat(rule),
        integer("mask_id", mask_id, high=_INT64),
        _per_row("quota", quota, canvas),
        _per_row("step", step, canvas),
        sequence_ids,
        integer("seed", seed, high=_INT64),
        progress,
        number("temperature", temperature),
        list(suppress_tokens or ()),
        list(proposal_exclude or ()),
        list(confidence_exclude or ()),
        number("confidence_temperature", confidence_temperature),
        precision == "float64",
    )


_INT64 = 2**63 - 1


def _flat(rule: Rule) -> tuple[str, list[float], bool, str, float]:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a dk.Rule, got {kind(rule)}")
    parameters = [float(parameter) for parameter in rule.parameters]
    return rule.name, parameters, rule.strict, rule.confidence, float(rule.alg_temp)


def _per_row(name: str, value: Tensor | int | None, canvas: Tensor) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    rows = canvas.shape[0] if canvas.dim() else 0  # a canvas without rows is refused by the operator
    return torch.full((rows,), integer(name, value), dtype=torch.int32, device=canvas.device)


@torch.library.register_fake("dllm_kernels::token_stats")
def _(
    logits,
    temperature=0.0,
    seed=0,
    noise_ids=None,
    suppress_tokens=(),
    proposal_exclude=(),
    confidence_exclude=(),
    confidence_temperature=1.0,
    float64=False,
):
    shape = logits.shape[:-1]
    reals = [logits.new_empty(shape, dtype=torch.float64 if float64 else torch.float32) for _ in range(4)]
    return (logits.new_empty(shape, dtype=torch.int64), *reals)


@register_fake("commit_")
def _(canvas, positions, *args, **kwargs):
    return canvas.new_empty(positions.shape, dtype=torch.bool)


@register_fake("unmask_")
def _(canvas, logits, *args, **kwargs):
    return canvas.new_empty(logits.shape[:2], dtype=torch.bool)


# Statistics carry no gradient: a loss over logits has its own operators.
torch.library.register_autograd(
    "dllm_kernels::token_stats",
    lambda ctx, *grads: (None,) * 9,
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(*output),
)
