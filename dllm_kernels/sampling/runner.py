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

from dllm_kernels._arguments import kind
from dllm_kernels.models.attention import AS_A_FUNCTION, attention_by_view, view_not_handed_on
from dllm_kernels.models.compiled import compiled, current
from dllm_kernels.models.inference import inference
from dllm_kernels.models.late_rotation import late_rotation
from dllm_kernels.models.merged_projections import is_plain_linear, runs_as_its_class
from dllm_kernels.models.probe import Traits
from dllm_kernels.models.stored_weights import StoredLinear
from dllm_kernels.ops.token_stats import TokenStats, linear_token_stats, token_stats
from dllm_kernels.sampling.views import StepView


@dataclass
class ModelRunner:
    """A transformers model on our attention, its body compiled if `compile` says so.

    length: of the canvases of the rows in a forward, for models whose positions depend on it; None: it does
    not matter.
    """

    model: torch.nn.Module
    head: tuple[Callable[[Tensor], Tensor], ...]
    traits: Traits
    first_position: int = 0
    compile: bool = False
    length: int | None = None

    def outputs(self, ids: Tensor, view: StepView, places: Tensor) -> tuple[Tensor, int]:
        """ids [B, N] of the view's tokens, places [M] among all B·N -> output rows [M, H], forwards made."""
        views = [(slice(None), view)] if self.traits.local else view.rows()
        fixed = nullcontext() if self.length is None else self.traits.rotary.fixed(self.length)
        with fixed:
            hidden = [self.hidden(ids[:, tokens], row) for tokens, row in views]
        output = (hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)).flatten(0, 1)[places]
        for function in self.head[:-1]:
            output = function(output)
        return output, len(hidden)

    def hidden(self, ids: Tensor, view: StepView) -> Tensor:
        """Return the last hidden states [B, N, H] of one forward over ids [B, N]."""
        view.layers.clear()
        step = current(view) if self.compile else nullcontext(view)
        late = nullcontext() if self.compile else late_rotation()
        # Without the bookkeeping that no_grad still does for each of a model's thousand small operators.
        with torch.inference_mode(), attention_by_view(), late, step as handed_on:
            hidden = self.model.base_model(
                input_ids=ids,
                position_ids=view.position_ids + self.first_position,
                attention_mask=self.traits.mask,
                use_cache=False,
                dllm_view=handed_on,
            )[0]
        if len(view.layers) != self.traits.calls:
            raise ValueError(f"{view_not_handed_on(type(self.model).__name__)}. {AS_A_FUNCTION}")
        return hidden

    def scaling_of(self, length: int) -> object:
        """Rows whose canvases have equal scaling may share a forward."""
        return self.traits.rotary.scaling_of(length)

    def logits(self, outputs: Tensor) -> Tensor:
        """Output rows [M, H] -> logits [M, V]."""
        return self.head[-1](outputs)

    def statistics(self, outputs: Tensor, **options) -> TokenStats:
        """Output rows [M, H] -> their statistics; options: those of `linear_token_stats`."""
        projection = self.head[-1]
        if is_plain_linear(projection):
            return linear_token_stats(outputs, projection.weight, projection.bias, **options)
        if type(projection) is StoredLinear and runs_as_its_class(projection):
            return linear_token_stats(outputs, projection.stored, projection.bias, **options)
        return token_stats(projection(outputs), **options)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Turn off gradients and dropout and put in our attention; restore everything afterwards."""
        if self.compile and torch.is_autocast_enabled(self.model.device.type):
            raise ValueError("compile=True under torch.autocast: convert the model instead, model.bfloat16()")
        body = compiled(self.model) if self.compile else nullcontext()
        with inference(self.model), body:
            yield


@dataclass
class CallableRunner:
    """Any function from ids [B, T] to logits [B, T, V], or to an object with `.logits`.

    Rows of equal length go through it together: it never sees padding. check_vocabulary: called with V,
    which nobody knows before the first logits.
    """

    function: Callable[[Tensor], Tensor]
    check_vocabulary: Callable[[int], None]
    vocab_size: int | None = None
    length: int | None = None

    def outputs(self, ids: Tensor, view: StepView, places: Tensor) -> tuple[Tensor, int]:
        """Do as ModelRunner.outputs, with one forward for each length among the rows."""
        packing, rows, forwards = view.packing, None, 0
        row, position = packing.row[places], packing.position[places]
        for length in packing.length.unique().tolist():
            group = (packing.length == length).nonzero()[:, 0]
            canvas = ids[0, packing.offset[group, None] + torch.arange(length, device=ids.device)]
            logits = self.logits_of(canvas)
            here = torch.isin(row, group)
            place = torch.searchsorted(group, row[here])
            rows = logits.new_empty(len(places), logits.shape[2]) if rows is None else rows
            rows[here] = logits[place, position[here]]
            forwards += 1
        return rows, forwards

    def logits_of(self, canvas: Tensor) -> Tensor:
        """Return the checked logits of the function for ids [B, T]."""
        shape = canvas.shape  # the function may do with its argument what it likes
        logits = self.function(canvas)
        logits = getattr(logits, "logits", logits)
        fits = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == shape
        if not fits or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"model gave a {kind(logits)} for ids {list(shape)}; it must give logits [B, T, V] in "
                "float32, bfloat16 or float16"
            )
        if logits.is_meta or logits.layout != torch.strided:
            raise ValueError(f"model gave logits without data: {logits.layout} on {logits.device}")
        if self.vocab_size is None:
            self.check_vocabulary(logits.shape[2])
            self.vocab_size = logits.shape[2]
        elif self.vocab_size != logits.shape[2]:
            raise ValueError(f"model gave logits of {logits.shape[2]} ids after {self.vocab_size}")
        return logits

    def scaling_of(self, length: int) -> object:
        """Return the same for every length: any rows may share a forward."""
        return ()

    def logits(self, outputs: Tensor) -> Tensor:
        """They are the logits."""
        return outputs

    def statistics(self, outputs: Tensor, **options) -> TokenStats:
        """Return the statistics of logits [M, V]."""
        return token_stats(outputs, **options)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Turn off gradients."""
        with torch.no_grad():
            yield
