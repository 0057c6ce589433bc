"""Sampling with hooks: the plain loop over whole canvases, where hooks see ids and logits of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels._arguments import kind
from dllm_kernels.sampling.parity import confidence_of
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.runner import CallableRunner
from dllm_kernels.sampling.step import Statistics, accept_, noise_ids

Hook = Callable[[int | None, Tensor, Tensor | None], Tensor]


def same_tokens(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
    """A tokens hook that changes nothing."""
    return x


def same_logits(step: int, x: Tensor, logits: Tensor) -> Tensor:
    """A logits hook that changes nothing."""
    return logits


@dataclass
class Hooked:
    """A plan with hooks, under bidirectional attention, where each canvas is one block.

    logits(step, x, logits [B, T, V]) returns the logits to use, where position i is predicted by row i, and
    tokens(step, x, logits) the tokens to continue with; it is also called before the first step, with None
    for step and logits. quotas(step, masks int64 [B]) says how many tokens each row commits.
    """

    plan: Plan
    tokens: Hook
    logits: Hook
    quotas: Callable[[int, Tensor], Tensor]

    def fill(self, canvas: Tensor, lengths: Tensor, steps: int) -> list[Tensor]:
        """Return canvases [B, T], padded on the left to `lengths` [B], before and after every step."""
        self._check(lengths)
        width, device = canvas.shape[1], self.plan.device
        canvas, pad = canvas.to(device), (width - lengths).to(device)
        rule = self.plan.config.acceptance(steps)
        position = torch.arange(width, device=device) - pad[:, None]
        hidden = (position >= 0) & (canvas != self.plan.mask_id)
        taken = torch.zeros_like(pad)
        with self.plan.runner.ready():
            canvas = self._continued(None, canvas, None)
            history = [canvas.clone()]
            for step in range(steps):
                predicted = self._predicted(canvas, position, hidden)
                logits = self.logits(step, canvas, predicted)
                _check_result("logits", logits, predicted, _LOGITS)
                taken += self._commit_(canvas, position, logits, rule, step, taken).any(1)
                canvas = self._continued(step, canvas, logits)
                history.append(canvas.clone())
        return history

    def _check(self, lengths: Tensor) -> None:
        """Refuse models whose tokens would see padding, or blocks."""
        runner, name = self.plan.runner, type(self.plan.model).__name__
        if self.plan.block_causal:
            raise ValueError(f"hooks see whole canvases, and {name} is block-causal; leave the hooks out")
        if len(set(lengths.tolist())) == 1:
            return
        if isinstance(runner, CallableRunner):
            reason = "it is not a transformers model"
        elif not runner.traits.local:
            reason = "its tokens see padding besides attention"
        elif len({runner.scaling_of(length) for length in lengths.tolist()}) > 1:
            reason = "its positions are scaled by the length of a row"
        else:
            return
        raise ValueError(f"with hooks {name} takes rows of equal length: {reason}")

    def _continued(self, step: int | None, canvas: Tensor, logits: Tensor | None) -> Tensor:
        after = self.tokens(step, canvas, logits)
        _check_result("tokens", after, canvas, (canvas.dtype,))
        return after

    def _predicted(self, canvas: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        """Return logits [B, T, V], where position i is predicted by row i."""
        logits, scale = self._logits(canvas, position), self.plan.config.cfg_scale
        if scale:
            without = self._logits(canvas.masked_fill(hidden, self.plan.mask_id), position)
            logits = torch.lerp(without, logits, 1 + scale)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.plan.shift else logits

    def _logits(self, canvas: Tensor, position: Tensor) -> Tensor:
        runner, width = self.plan.runner, canvas.shape[1]
        if isinstance(runner, CallableRunner):
            return runner.logits_of(canvas.clone())
        lengths = position[:, -1] + 1
        mask = dk.SpanMask.full(width, lengths=lengths, padding_side="left")
        place = position.clamp(min=0) + runner.first_position
        with runner.traits.rotary.fixed(int(lengths.max())):
            return runner.model(canvas, position_ids=place, dllm_mask=mask, use_cache=False).logits

    def _commit_(
        self, canvas: Tensor, position: Tensor, logits: Tensor, rule: dk.Rule, step: int, taken: Tensor
    ) -> Tensor:
        """Commit one step; return accepted, bool [B, T]. taken: int64 [B], earlier steps that committed.

        Noise and draws know a token by its position in its row, so that padding changes nothing.
        """
        rows, width = canvas.shape
        order = torch.argsort(position % width, dim=1)  # a row's tokens first, its padding behind
        aligned = canvas.gather(1, order)
        place = torch.arange(width, device=canvas.device).expand(rows, -1)
        masked = (aligned == self.plan.mask_id) & (place <= position[:, -1:])
        numbers = torch.arange(rows, device=canvas.device)
        statistics = Statistics(self.plan, rule, rows, width)
        stats = dk.token_stats(
            logits.gather(1, order[:, :, None].expand_as(logits)).flatten(0, 1),
            noise_ids=noise_ids(self.plan, numbers, place, taken),
            **statistics.options, **statistics.filters,
        )  # fmt: skip
        quota = self.quotas(step, masked.sum(1)).int() if rule.needs_quota else None
        if self.plan.parity.ranks_by_topk(rule):
            ranked = torch.full_like(position, -torch.inf, dtype=torch.float32)
            surest = confidence_of(stats, rule).view_as(masked).masked_fill(~masked, -torch.inf)
            masked &= _taken_by_topk(ranked.scatter_(1, order, surest), quota).gather(1, order)
        when = torch.full_like(taken, step) if rule.name == "bernoulli" else taken
        accepted = accept_(
            self.plan, rule, aligned, place.masked_fill(~masked, -1).int(), stats, step=when.int(),
            numbers=numbers.int(), quota=quota,
        )  # fmt: skip
        canvas.scatter_(1, order, aligned)
        return accepted


def _taken_by_topk(ranked: Tensor, quota: Tensor) -> Tensor:
    """Return bool [B, T], the `quota` [B] highest of each row; among equals torch.topk decides."""
    ranked, taken = ranked.cpu(), torch.zeros_like(ranked, dtype=torch.bool, device="cpu")
    for row, most in enumerate(quota.tolist()):
        taken[row, ranked[row].topk(most).indices] = True
    return taken.to(quota.device)


_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


def _check_result(name: str, found: object, given: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what a hook must not give."""
    fits = isinstance(found, Tensor) and found.shape == given.shape and found.dtype in dtypes
    if not fits or found.device != given.device:
        where = f" on {found.device}" if fits else ""
        raise TypeError(
            f"the {name} hook gave a {kind(found)}{where}; it must give a {kind(given)} on {given.device}"
        )
