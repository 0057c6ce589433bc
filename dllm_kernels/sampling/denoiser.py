"""The model as sampling sees it: ids and a view in, an output row for each position asked for out.

An output row is what the vocabulary projection is applied to (of a callable: the logits themselves). Only the
rows of positions that need them are projected, and where the statistics are all that is wanted the projection
reads its weight once and stores no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels.models.attention import VIEW_ONLY, enable_attention, view_not_handed_on
from dllm_kernels.models.compiled import compiled, current
from dllm_kernels.ops.token_stats import TokenStats, linear_token_stats, token_stats
from dllm_kernels.sampling.views import StepView


@dataclass
class ModelDenoiser:
    """A transformers model on our attention, its body compiled if `compile` says so."""

    model: torch.nn.Module
    head: tuple[Callable[[Tensor], Tensor], ...]
    first_position: int = 0
    compile: bool = False

    def outputs(self, ids: Tensor, view: StepView, places: Tensor) -> tuple[Tensor, int]:
        """ids [B, N] of the view's tokens, places [M] among all B·N -> output rows [M, H], forwards made."""
        view.layers.clear()
        # Without the bookkeeping that no_grad still does for each of a model's thousand small operators.
        with torch.inference_mode(), current(view) if self.compile else nullcontext(view) as handed_on:
            hidden = self.model.base_model(
                input_ids=ids,
                position_ids=view.position_ids + self.first_position,
                attention_mask=VIEW_ONLY,
                use_cache=False,
                dllm_view=handed_on,
            )[0]
        if len(view.layers) != self.model.config.num_hidden_layers:
            raise ValueError(view_not_handed_on(type(self.model).__name__))
        output = hidden.flatten(0, 1)[places]
        for function in self.head[:-1]:
            output = function(output)
        return output, 1

    def logits(self, outputs: Tensor) -> Tensor:
        """Output rows [M, H] -> logits [M, V]."""
        return self.head[-1](outputs)

    def statistics(self, outputs: Tensor, **options) -> TokenStats:
        """Output rows [M, H] -> their statistics; options: those of `linear_token_stats`."""
        projection = self.head[-1]
        if _is_plain_linear(projection):
            return linear_token_stats(outputs, projection.weight, projection.bias, **options)
        return token_stats(projection(outputs), **options)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """No gradients, no dropout, our attention; afterwards everything as it was."""
        training = [module for module in self.model.modules() if module.training]
        body = compiled(self.model) if self.compile else nullcontext()
        with enable_attention(self.model), torch.no_grad(), body:
            try:
                self.model.eval()
                yield
            finally:
                for module in training:
                    module.training = True


@dataclass
class CallableDenoiser:
    """Any function from ids [B, T] to logits [B, T, V], or to an object with `.logits`.

    Rows of equal length go through it together: it never sees padding.
    """

    function: Callable[[Tensor], Tensor]

    def outputs(self, ids: Tensor, view: StepView, places: Tensor) -> tuple[Tensor, int]:
        """As ModelDenoiser.outputs, with one forward for each length among the rows."""
        packing, rows, forwards = view.packing, None, 0
        row, position = packing.row[places], packing.position[places]
        for length in packing.length.unique().tolist():
            group = (packing.length == length).nonzero()[:, 0]
            canvas = ids[0, packing.offset[group, None] + torch.arange(length, device=ids.device)]
            logits = self.function(canvas)
            logits = getattr(logits, "logits", logits)
            if not isinstance(logits, Tensor) or logits.shape[:2] != canvas.shape or logits.dim() != 3:
                found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(
                    f"model gave {found} for ids {list(canvas.shape)}; it must give logits [B, T, V]"
                )
            here = torch.isin(row, group)
            place = torch.searchsorted(group, row[here])
            rows = logits.new_empty(len(places), logits.shape[2]) if rows is None else rows
            rows[here] = logits[place, position[here]]
            forwards += 1
        return rows, forwards

    def logits(self, outputs: Tensor) -> Tensor:
        """They are the logits."""
        return outputs

    def statistics(self, outputs: Tensor, **options) -> TokenStats:
        """As ModelDenoiser.statistics."""
        return token_stats(outputs, **options)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """No gradients."""
        with torch.no_grad():
            yield


def _is_plain_linear(projection: Callable[[Tensor], Tensor]) -> bool:
    """Whether calling it is x · weightᵀ + bias and nothing else: no adapter, quantization or hook."""
    return (
        type(projection) is torch.nn.Linear
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and "forward" not in vars(projection)  # where accelerate puts its own
    )
