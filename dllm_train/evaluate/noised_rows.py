"""Score noised rows with a model, as many in one forward as a budget of tokens allows.

Rows that are equal are computed once. Only outputs that predict scored targets reach the vocabulary head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dllm_kernels.models.attention import AS_A_FUNCTION, attention_by_view, view_not_handed_on
from dllm_kernels.models.families import Diffusion
from dllm_kernels.models.probe import traits_of
from dllm_train.evaluate.packed_rows import PackedRows, Part
from dllm_train.vocabulary_head import head_losses, head_statistics

ROWS_PER_CLEAN = 8  # a forward may hold this many times as many noised tokens as clean ones of a request


@dataclass(frozen=True, eq=False)
class NoisedRow:
    """A row and its scored targets.

    ids: int64 [W], noised, at positions start .. start + W - 1. clean: int64, the clean blocks of its
    request, of which it sees those before `start`. length: positions of the whole request.
    places: int64 [n], indices of the scored targets in `ids`. targets: int64 [n].
    """

    ids: np.ndarray
    start: int
    clean: np.ndarray
    length: int
    places: np.ndarray
    targets: np.ndarray


@dataclass(eq=False)
class _SharedClean:
    """Distinct rows over the same clean blocks.

    scaling: how a model whose positions depend on the length of a request rotates them. rows: by content, the
    indices of all rows equal to it.
    """

    clean: np.ndarray
    scaling: object
    rows: dict[tuple[int, bytes], list[int]] = field(default_factory=dict)


class RowScorer:
    """Score noised rows of one model, within `inference(model)`.

    batch_tokens: of one forward; over long clean prefixes it may hold more.
    Raises ValueError for a model that our attention cannot run in, and for block-causal ones whose tokens
    depend on each other through more than attention.
    """

    def __init__(self, model: PreTrainedModel, diffusion: Diffusion, batch_tokens: int):
        self.model, self.diffusion, self.batch_tokens = model, diffusion, batch_tokens
        self.traits = traits_of(model, diffusion)
        if diffusion.attention == "block_causal" and not self.traits.local:
            raise ValueError(
                f"{type(model).__name__} is block-causal, and its tokens depend on each other through more "
                "than attention (a state, a convolution): its blocks cannot be scored beside their prefix"
            )

    def log_probabilities(self, rows: Sequence[NoisedRow]) -> np.ndarray:
        """Return log p of the scored targets, float64 [sum of n], in the order of `rows`."""
        return self._scored(rows, lambda *states: (self._log_p(*states),))[0].astype(np.float64)

    def proposals(self, rows: Sequence[NoisedRow], mask_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return log p of the scored targets, float64, the sampler's proposals there, int64, and their
        confidences, float32. As in sampling, the mask token is no candidate."""

        def score(output, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            stats = head_statistics(self.model, output, states, suppress_tokens=(mask_id,))
            return self._log_p(output, states, targets), stats.token, stats.prob

        log_p, token, confidence = self._scored(rows, score)
        return log_p.astype(np.float64), token, confidence

    def _log_p(self, output, states: Tensor, targets: Tensor) -> Tensor:
        weights = torch.ones(len(targets), device=targets.device)
        return -head_losses(self.model, output, states, targets, weights, None).ce

    def _scored(
        self, rows: Sequence[NoisedRow], score: Callable[..., tuple[Tensor, ...]]
    ) -> list[np.ndarray]:
        """Return `score` of (output of the base model, states [n, H], targets [n])."""
        ends = np.cumsum([len(row.targets) for row in rows])
        results, order = [], []
        for parts, equal_rows in self._batches(rows):
            block_size = None if self.diffusion.attention == "bidirectional" else self.diffusion.block_size
            packed = PackedRows.of(parts, block_size, self.model.device)
            sources, targets = [], []
            for offset, before, equal in zip(packed.row_offset, packed.before, equal_rows, strict=True):
                for index in equal:
                    row = rows[index]
                    source = row.places + offset
                    if self.diffusion.shift:
                        source = np.where(row.places > 0, source - 1, before)
                    sources.append(source)
                    targets.append(row.targets)
                    order.append(np.arange(ends[index] - len(row.targets), ends[index]))
            output = self._forward(packed, rows[equal_rows[0][0]].length)
            states = output.last_hidden_state
            sources, targets = (
                torch.from_numpy(np.concatenate(part)).to(states.device) for part in (sources, targets)
            )
            results.append(score(output, states[0, sources], targets))
        place = np.concatenate(order)
        columns = (torch.cat(column).cpu().numpy() for column in zip(*results, strict=True))
        scored = []
        for column in columns:
            scored.append(np.empty_like(column))
            scored[-1][place] = column
        return scored

    def _forward(self, packed: PackedRows, length: int):
        """Return the output of the base model. length: of the requests, for models that rotate by it."""
        with torch.inference_mode(), attention_by_view(), self.traits.rotary.fixed(length):
            output = self.model.base_model(
                input_ids=packed.ids,
                position_ids=packed.position_ids + self.diffusion.first_position,
                attention_mask=self.traits.mask,
                use_cache=False,
                dllm_view=packed,
            )
        if len(packed.layers) != self.traits.calls:
            raise ValueError(f"{view_not_handed_on(type(self.model).__name__)}. {AS_A_FUNCTION}")
        return output

    def _batches(self, rows: Sequence[NoisedRow]) -> Iterator[tuple[list[Part], list[list[int]]]]:
        """Yield the parts of each forward, and for each of its rows the indices of those equal to it."""
        parts, equal, tokens, scaling = [], [], 0, None
        for shared in self._grouped(rows):
            for part, indices in self._parts(shared):
                size = len(part.clean) + sum(len(ids) for ids, _ in part.rows)
                full = tokens + size > self.batch_tokens or not self.traits.local
                if parts and (full or scaling != shared.scaling):
                    yield parts, equal
                    parts, equal, tokens = [], [], 0
                parts.append(part)
                equal.extend(indices)
                tokens, scaling = tokens + size, shared.scaling
        if parts:
            yield parts, equal

    def _parts(self, shared: _SharedClean) -> Iterator[tuple[Part, list[list[int]]]]:
        """Yield the rows over one prefix, as many at once as a forward may hold; without one, each alone."""
        clean = shared.clean[: max(start for start, _ in shared.rows)]
        limit = max(self.batch_tokens - len(clean), ROWS_PER_CLEAN * len(clean)) if len(clean) else 0
        part, equal, tokens = Part(clean, []), [], 0
        for (start, content), indices in shared.rows.items():
            ids = np.frombuffer(content, dtype=np.int64)
            if part.rows and tokens + len(ids) > limit:
                yield part, equal
                part, equal, tokens = Part(clean, []), [], 0
            part.rows.append((ids, start))
            equal.append(indices)
            tokens += len(ids)
        yield part, equal

    def _grouped(self, rows: Sequence[NoisedRow]) -> list[_SharedClean]:
        """Group rows by their clean blocks and merge equal ones."""
        groups: dict[tuple[object, bytes], _SharedClean] = {}
        names: dict[int, tuple[object, bytes]] = {}  # rows of one request share one array
        for index, row in enumerate(rows):
            name = names.get(id(row.clean))
            if name is None:
                name = names[id(row.clean)] = (self.traits.rotary.scaling_of(row.length), row.clean.tobytes())
            group = groups.setdefault(name, _SharedClean(row.clean, name[0]))
            group.rows.setdefault((row.start, row.ids.tobytes()), []).append(index)
        return list(groups.values())
