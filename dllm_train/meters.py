"""Running sums of a loss and its parts, kept on the model's device and read when something is logged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from dllm_train.noise import Schedule
from dllm_train.objectives import LossOutput

LEVELS = 10


class LossMeter:
    """Sums of losses since the last reading; the host waits for the device only in `read`.

    The bound is Σ w(t) CE / Σ maskable tokens, in nats. Cross entropies of masked tokens are kept by the
    tenth of t, their level: level i holds t in [i / 10, (i + 1) / 10).
    """

    def __init__(self, device: torch.device):
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(
            2 + LEVELS, dtype=self._dtype, device=device
        )  # loss, bound, CE of each level
        self._counts = torch.zeros(
            1 + LEVELS, dtype=torch.int64
        )  # maskable tokens, masked ones of each level

    def add(self, output: LossOutput) -> None:
        """Add the loss and the bound of a batch, and the CE of its masked tokens by their own t."""
        level = (output.t.cpu() * LEVELS).long().clamp_(max=LEVELS - 1)
        self._counts[0] += output.tokens
        self._counts[1:] += torch.bincount(level, minlength=LEVELS)
        self._sums[0] += output.loss.detach()
        self._sums[1] += output.nll_sum
        level = level.to(self._sums.device, non_blocking=True)
        self._sums[2:].index_add_(0, level, output.ce.to(self._dtype))

    def add_bound(self, output: LossOutput) -> None:
        """Add the bound of a batch alone."""
        self._counts[0] += output.tokens
        self._sums[1] += output.nll_sum

    def add_level(self, t: float, output: LossOutput) -> None:
        """Add the CE of a batch whose tokens were all masked with probability t."""
        level = level_of(t)
        self._counts[1 + level] += output.masked
        self._sums[2 + level] += output.ce_sum

    def read(self) -> tuple[float, dict[str, float]]:
        """Return the sum of losses, and nll, ppl and ce_t0.1 … ce_t1.0, all over all ranks; start anew.

        A level at which no token was masked is left out.
        """
        totals = torch.cat([self._sums, self._counts.to(self._sums)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)
        loss, bound, *rest = totals.tolist()
        sums, tokens, masked = rest[:LEVELS], rest[LEVELS], rest[LEVELS + 1 :]
        self._sums.zero_()
        self._counts.zero_()
        figures = {}
        if tokens:
            figures["nll"] = bound / tokens
            figures["ppl"] = perplexity(bound / tokens)
        for level in range(LEVELS):
            if masked[level]:
                figures[f"ce_t{(level + 1) / LEVELS:.1f}"] = sums[level] / masked[level]
        return loss, figures

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's sums, for a checkpoint."""
        return {"sums": self._sums.cpu(), "counts": self._counts.clone()}

    def load_state_dict(self, *states: dict[str, Tensor]) -> None:
        """Continue from the sums of `state_dict`, or from those of several ranks together."""
        self._sums.copy_(torch.stack([state["sums"] for state in states]).sum(0))
        self._counts.copy_(torch.stack([state["counts"] for state in states]).sum(0))


@dataclass
class LoggedLosses:
    """Losses that were logged: their sum over all optimizer steps up to `step`."""

    step: int = 0
    loss_sum: float = 0.0

    def add(self, loss_sum: float, step: int) -> float:
        """Add the losses of the steps up to `step`, and return their mean."""
        steps, self.step = step - self.step, step
        self.loss_sum += loss_sum
        return loss_sum / max(steps, 1)

    @property
    def mean_loss(self) -> float:
        """Return the mean loss of all steps; 0 without steps."""
        return self.loss_sum / max(self.step, 1)


class FixedLevel(Schedule):
    """Mask every maskable token with probability `level`, whatever time is drawn."""

    def __init__(self, level: float):
        super().__init__("linear")
        object.__setattr__(self, "level", level)

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - level."""
        return torch.full_like(t, 1 - self.level)

    def weight(self, t: Tensor, eps: float = 0.0) -> Tensor:
        """Return 1: sums are those of the plain cross entropy."""
        return torch.ones_like(t)


def level_of(t: float) -> int:
    """Return the index of the tenth that ends with t; ValueError for other t."""
    level = round(t * LEVELS) - 1
    if not 0 <= level < LEVELS or abs(t * LEVELS - level - 1) > 1e-6:
        raise ValueError(f"noise level is {t}; allowed: 0.1, 0.2, … 1.0")
    return level


def perplexity(nll: float) -> float:
    """Return exp(nll); infinity if that is no float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
