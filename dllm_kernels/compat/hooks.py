"""Sampling with hooks: the plain loop over whole canvases, where hooks see ids and logits of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.models.families import diffusion_of
from dllm_kernels.models.inference import inference
from dllm_kernels.models.probe import traits_of
from dllm_kernels.models.wrappers import is_transformers_model
from dllm_kernels.sampling.runner import CallableRunner

Hook = Callable[[int | None, Tensor, Tensor | None], Tensor]


def same_tokens(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
    """A tokens hook that changes nothing."""
    return x


def same_logits(step: int, x: Tensor, logits: Tensor) -> Tensor:
    """A logits hook that changes nothing."""
    return logits


@dataclass
class Hooked:
    """A transformers model or a function of ids with hooks, and one step of the loop.

    logits(step, x, logits [B, T, V]) returns the logits to use, where position i is predicted by row i, and
    tokens(step, x, logits) the tokens to continue with; it is also called before the first step, with None
    for step and logits. quotas(step, masks int64 [B]) says how many tokens each row commits. statistics:
    options of `dk.token_stats`. hidden: bool [B, T], the tokens that guidance hides.
    """

    model: object
    tokens: Hook
    logits: Hook
    quotas: Callable[[int, Tensor], Tensor]
    rule: dk.Rule
    mask_id: int
    shift: bool
    statistics: dict = field(default_factory=dict)
    cfg_scale: float = 0.0
    hidden: Tensor | None = None

    def fill(self, canvas: Tensor, lengths: Tensor, steps: int) -> list[Tensor]:
        """Return canvases [B, T], padded on the left to `lengths` [B], before and after every step."""
        self._check_padding(canvas, lengths)
        with inference(self.model) if is_transformers_model(self.model) else torch.no_grad():
            canvas = self.tokens(None, canvas, None)
            history = [canvas.clone()]
            for step in range(steps):
                canvas = self.step(step, canvas, lengths)
                history.append(canvas.clone())
        return history

    def step(self, step: int, canvas: Tensor, lengths: Tensor) -> Tensor:
        """Run one forward and one commit."""
        rows, width = canvas.shape
        logits = self.logits(step, canvas, self._predicted(canvas, lengths))
        column = torch.arange(width, device=canvas.device).expand(rows, -1)
        masked = (canvas == self.mask_id) & (column >= width - lengths[:, None])
        row = torch.arange(rows, device=canvas.device)[:, None].expand(-1, width)
        noise_ids = torch.stack([row, column, torch.full_like(row, step)], dim=-1).int()
        stats = dk.token_stats(
            logits.flatten(0, 1), noise_ids=noise_ids.flatten(0, 1), proposal_exclude=(self.mask_id,),
            **self.statistics,
        )  # fmt: skip
        dk.commit_(
            canvas, column.masked_fill(~masked, -1).int(), stats, self.rule, mask_id=self.mask_id,
            quota=self.quotas(step, masked.sum(1)).int(), step=step, seed=self.statistics.get("seed", 0),
        )  # fmt: skip
        return self.tokens(step, canvas, logits)

    def _predicted(self, canvas: Tensor, lengths: Tensor) -> Tensor:
        """Return logits [B, T, V], where position i is predicted by row i."""
        logits = self._logits(canvas, lengths)
        if self.cfg_scale:
            without = self._logits(canvas.masked_fill(self.hidden, self.mask_id), lengths)
            logits = without + (self.cfg_scale + 1) * (logits - without)
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if self.shift else logits

    def _check_padding(self, canvas: Tensor, lengths: Tensor) -> None:
        """Refuse padding that the model would see."""
        if not bool((lengths < canvas.shape[1]).any()):
            return
        model, name = self.model, type(self.model).__name__
        if not is_transformers_model(model):
            raise ValueError(
                f"with hooks a {name} that is not a transformers model takes rows of equal length"
            )
        if not traits_of(model, diffusion_of(model)).local:
            raise ValueError(
                f"with hooks {name} takes rows of equal length: its tokens see padding besides attention"
            )

    def _logits(self, canvas: Tensor, lengths: Tensor) -> Tensor:
        if not is_transformers_model(self.model):
            return CallableRunner(self.model, lambda vocabulary: None).logits_of(canvas.clone())
        width = canvas.shape[1]
        position = (torch.arange(width, device=canvas.device) - (width - lengths)[:, None]).clamp(min=0)
        mask = dk.SpanMask.full(width, lengths=lengths, padding_side="left")
        first = diffusion_of(self.model).first_position
        return self.model(canvas, position_ids=position + first, dllm_mask=mask, use_cache=False).logits
