"""Unmasking: the commit of accepted proposals into the canvas.

`commit_` ranks the masked candidates by the statistics of `token_stats`, accepts by a `Rule` and writes
in place; `unmask_` is both. Bad arguments raise ValueError, from these functions and from
torch.ops.dllm_kernels alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_kernels import _library  # noqa: F401
from dllm_kernels._arguments import (
    check_optional_tensors,
    check_tensors,
    integer,
    kind,
)
from dllm_kernels.ops._autograd import register_in_place
from dllm_kernels.ops._fake import register_fake
from dllm_kernels.ops.stats_options import StatsOptions, checked_options, with_options
from dllm_kernels.ops.token_stats import TokenStats
from dllm_kernels.rule import Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ops = torch.ops.dllm_kernels


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
    """Write the proposals that `rule` accepts into `canvas`; return accepted, bool [B, C].

    canvas: int64 or int32 [B, T], changed in place. positions: int32 [B, C], distinct in a row, −1 for
    none. The statistics of (b, c) are entry b·C + c of each field of `stats`. Candidates are listed
    positions that hold `mask_id` and whose proposal is another token; other listed positions stay as
    they are, except with `Rule.edit` (so never list the prompt). Ties go to the lower position.

    quota: int32 [B] (or an int for all), for rules that need one. step, sequence_ids: int32 [B], key the
    draws of `random` confidence, alg_temp and `Rule.bernoulli`, together with `seed` and the position; None:
    step 0, sequence = row. progress: int32 [B, 2], written: masks left among the listed positions, tokens
    changed.
    state: int32 [B, T] for `Rule.confident_stable`, zeros at first and then kept
    from step to step: for each masked position the number of steps in a row with a small
    `stats.divergence`.
    """
    check_tensors(canvas=canvas, positions=positions)
    if not isinstance(stats, TokenStats):
        raise TypeError(f"stats must be the TokenStats of token_stats, got {kind(stats)}")
    check_tensors(**{f"stats.{name}": value for name, value in stats._asdict().items() if value is not None})
    check_optional_tensors(sequence_ids=sequence_ids, state=state, progress=progress)
    _check_rule(rule)
    return _ops.commit_(
        canvas,
        positions,
        stats.token,
        stats.prob,
        stats.margin,
        stats.entropy,
        *rule.code,
        integer("mask_id", mask_id, high=_INT64),
        quota=_per_row("quota", quota, canvas),
        step=_per_row("step", step, canvas),
        sequence_ids=sequence_ids,
        progress=progress,
        seed=integer("seed", seed, high=_INT64),
        divergence=stats.divergence if rule.needs_state else None,
        state=state,
    )


@with_options
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
    progress: Tensor | None = None,
    **options: Unpack[StatsOptions],
) -> Tensor:
    """Run one denoising step of a block: `token_stats` of its masked positions, then `commit_`.

    logits: [B, block_size, V], row i of b predicts canvas position block_start[b] + i; block_start: int
    or int32 [B]. `mask_id` is barred from proposal and softmax; listed in `proposal_exclude` it stays
    in the softmax (as in references that leave it there). Noise is keyed by (sequence, position, step).
    Returns accepted, bool [B, block_size]. The other options are those of `token_stats`, whose `seed` keys
    the draws of both, and of `commit_`; `Rule.confident_stable` and `Rule.edit` need the two separately.
    """
    check_tensors(canvas=canvas, logits=logits)
    check_optional_tensors(sequence_ids=sequence_ids, progress=progress)
    _check_rule(rule)
    if logits.dim() == 3 and logits.shape[1] != block_size:
        raise ValueError(f"unmask_: logits have {logits.shape[1]} rows a block, block_size is {block_size}")
    return _ops.unmask_(
        canvas,
        logits,
        _per_row("block_start", block_start, canvas),
        *rule.code,
        integer("mask_id", mask_id, high=_INT64),
        quota=_per_row("quota", quota, canvas),
        step=_per_row("step", step, canvas),
        sequence_ids=sequence_ids,
        progress=progress,
        **checked_options("unmask_", options),
    )


_INT64 = 2**63 - 1


def _check_rule(rule: Rule) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a dk.Rule, got {kind(rule)}")


def _per_row(name: str, value: Tensor | int | None, canvas: Tensor) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    rows = canvas.shape[0] if canvas.dim() else 0  # a canvas without rows is refused by the operator
    return torch.full((rows,), integer(name, value), dtype=torch.int32, device=canvas.device)


@register_fake("commit_")
def _(canvas, positions, *args, **kwargs):
    return canvas.new_empty(positions.shape, dtype=torch.bool)


@register_fake("unmask_")
def _(canvas, logits, *args, **kwargs):
    return canvas.new_empty(logits.shape[:2], dtype=torch.bool)


for _name in ("commit_", "unmask_"):
    register_in_place(_name)
