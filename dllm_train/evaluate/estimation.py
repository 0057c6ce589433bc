"""Run an estimator over many requests: waves of segments, whose rows share forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from dllm_kernels._arguments import integer
from dllm_kernels.models.families import Diffusion, diffusion_of
from dllm_kernels.models.head import refuse_changed_logits
from dllm_kernels.models.inference import inference
from dllm_kernels.models.wrappers import is_transformers_model, unwrapped
from dllm_train.evaluate.decoding_order import reveal
from dllm_train.evaluate.estimators import Plan, back_to_front, front_to_back, monte_carlo
from dllm_train.evaluate.masks import PARITY
from dllm_train.evaluate.noised_rows import RowScorer
from dllm_train.evaluate.segments import Request, Segment, segments_of

ESTIMATORS = ("monte_carlo", "block", "ar_ftb", "ar_btf", "confidence")
SAMPLED = ("monte_carlo", "block")
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # of a forward; on a CPU, what stays in its cache
FORWARDS_PER_WAVE = 8


@dataclass(frozen=True)
class Estimation:
    """A model and the checked options of its likelihood estimates."""

    model: PreTrainedModel
    diffusion: Diffusion
    estimator: str
    samples: int
    seed: int
    batch_tokens: int
    parity: str | None

    @staticmethod
    def of(model: nn.Module, estimator, samples, seed, batch_tokens, parity) -> Estimation:
        """Check the arguments of `log_likelihoods` that are not of a request."""
        inner = unwrapped(model)
        if not is_transformers_model(inner):
            raise TypeError(
                f"model is a {type(model).__name__}; expected a transformers model, as of dk.load"
            )
        diffusion = diffusion_of(inner, head=False)
        refuse_changed_logits(inner)
        if diffusion.mask_id is None:
            raise ValueError(
                f"{type(inner).__name__} has no mask token; set model.config.mask_token_id to the token that "
                "it was trained to fill in"
            )
        estimator = _fitting(estimator, diffusion)
        if parity not in (None, *PARITY):
            raise ValueError(f"parity is {parity!r}; allowed: None, {', '.join(map(repr, PARITY))}")
        if parity is not None and estimator != "monte_carlo":
            raise ValueError(f"parity={parity!r} concerns estimator='monte_carlo'; this one is {estimator!r}")
        if batch_tokens is None:
            batch_tokens = BATCH_TOKENS["cpu" if inner.device.type == "cpu" else "cuda"]
        return Estimation(
            inner,
            diffusion,
            estimator,
            integer("samples", samples, 1),
            integer("seed", seed, 0, 2**64 - 1),
            integer("batch_tokens", batch_tokens, 1),
            parity,
        )

    def check(self, request: Request) -> None:
        """Refuse tokens outside the vocabulary, and the mask token."""
        ids, words, mask_id = request.ids, self.diffusion.vocab_size, self.diffusion.mask_id
        wrong = ids[(ids < 0) | (ids >= words)]
        if len(wrong):
            raise ValueError(f"{request.name} holds token {wrong[0]}; the vocabulary is 0..{words - 1}")
        if (ids == mask_id).any():
            raise ValueError(
                f"{request.name} holds the mask token {mask_id}, which stands for a token to fill in"
            )

    def check_length(self, request: Request) -> None:
        """Refuse a request that is longer than the model."""
        length, limit = len(request.ids), self.diffusion.max_positions
        if limit is not None and length > limit:
            raise ValueError(
                f"{request.name} has {length} tokens ({request.given} of context, {length - request.given} "
                f"of target); the model has {limit} positions. Cut its context from the left"
            )

    def run(
        self,
        requests: Sequence[Request],
        check_greedy: bool,
        progress: Callable[[int, int], None] | None,
    ) -> np.ndarray:
        """Return for each request, float64 [n, 3], its value, the variance of that, and how many of its
        segments greedy decoding would not generate. progress: see `log_likelihoods`."""
        planned = _Pass(self._planned, self._rows, lambda targets: 1)
        revealed = _Pass(self._revealed, lambda targets: 1, lambda targets: targets)
        greedy = _Pass(self._decoded, lambda targets: 1, lambda targets: targets)
        passes = [revealed if self.estimator == "confidence" else planned]
        if check_greedy and self.estimator != "confidence":
            passes.append(greedy)
        block_size = self.diffusion.block_size if self.diffusion.attention == "block_causal" else None
        segments = [segments_of(request, block_size) for request in requests]
        total = sum(one.cost(segment) for one in passes for several in segments for segment in several)
        results, done = np.zeros((len(requests), 3)), 0
        with inference(self.model):
            scorer = RowScorer(self.model, self.diffusion, self.batch_tokens)
            for one in passes:
                for wave in one.waves(segments, FORWARDS_PER_WAVE * self.batch_tokens):
                    in_wave = [segment for index in wave for segment in segments[index]]
                    owner = np.repeat(wave, [len(segments[index]) for index in wave])
                    np.add.at(results, owner, one.compute(scorer, in_wave))
                    done += sum(map(one.cost, in_wave))
                    if progress is not None:
                        progress(done, total)
        for index in np.flatnonzero(~np.isfinite(results[:, 0])):
            raise ValueError(
                f"the model computes log p = {results[index, 0]} for {requests[index].name}: its logits are "
                "NaN or infinite"
            )
        return results

    def _rows(self, targets: int) -> int:
        """Return the most rows that a plan for so many targets has."""
        return min(self.samples, 2**targets - 1) if self.estimator in SAMPLED else targets

    def _plan(self, segment: Segment) -> Plan:
        length = len(segment.targets)
        if self.estimator in SAMPLED:
            return monte_carlo(length, self.samples, self.parity, seed=self.seed, **segment.noise_key)
        return front_to_back(length) if self.estimator == "ar_ftb" else back_to_front(length)

    def _planned(self, scorer: RowScorer, segments: list[Segment]) -> np.ndarray:
        """Return value and variance of each segment, all its rows known beforehand."""
        plans = [self._plan(segment) for segment in segments]
        rows = [
            row
            for segment, plan in zip(segments, plans, strict=True)
            for row in segment.rows(plan.masked, plan.scored, self.diffusion.mask_id)
        ]
        log_p = scorer.log_probabilities(rows)
        ends = np.cumsum([len(row.targets) for row in rows])
        sums = np.add.reduceat(log_p, ends - [len(row.targets) for row in rows])
        results, offset = np.zeros((len(segments), 3)), 0
        for result, plan in zip(results, plans, strict=True):
            result[:2] = plan.value(sums[offset : offset + len(plan.masked)])
            offset += len(plan.masked)
        return results

    def _revealed(self, scorer: RowScorer, segments: list[Segment], only_greedy: bool = False) -> np.ndarray:
        """Return log p of each segment in the order of the sampler, and whether that would write another."""
        log_p, greedy = reveal(scorer, segments, self.diffusion.mask_id, only_greedy=only_greedy)
        return np.stack([log_p, np.zeros_like(log_p), ~greedy], axis=1)

    def _decoded(self, scorer: RowScorer, segments: list[Segment]) -> np.ndarray:
        """Return whether the sampler would write another segment, in the last column."""
        return self._revealed(scorer, segments, only_greedy=True) * [0, 0, 1]


@dataclass(frozen=True)
class _Pass:
    """One pass over all requests.

    compute: from segments to float64 [S, 3], of which the rows of one request add up. rows: most rows that a
    segment of so many targets has at once. steps: how often it has them.
    """

    compute: Callable[[RowScorer, list[Segment]], np.ndarray]
    rows: Callable[[int], int]
    steps: Callable[[int], int]

    def cost(self, segment: Segment) -> int:
        """Return the most tokens that are computed for a segment."""
        return self._at_once(segment) * self.steps(len(segment.targets))

    def waves(self, segments: Sequence[list[Segment]], tokens: int) -> Iterator[list[int]]:
        """Yield requests that together have about so many tokens at once. Longest first: memory that does not
        suffice runs out at once, and requests of equal length, which may have equal rows, stay together."""
        wave, size = [], 0
        for index in sorted(range(len(segments)), key=lambda index: -segments[index][-1].end):
            wave.append(index)
            size += sum(map(self._at_once, segments[index]))
            if size >= tokens:
                yield wave
                wave, size = [], 0
        if wave:
            yield wave

    def _at_once(self, segment: Segment) -> int:
        return self.rows(len(segment.targets)) * (segment.end - segment.start)


def _fitting(estimator: str, diffusion: Diffusion) -> str:
    """Return the name of an estimator that fits the model, "auto" resolved."""
    block_causal = diffusion.attention == "block_causal"
    if estimator == "auto":
        estimator = "block" if block_causal else "monte_carlo"
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; allowed: 'auto', {', '.join(map(repr, ESTIMATORS))}")
    if block_causal and diffusion.block_size is None:
        raise ValueError('the model is block-causal, and its config.diffusion has no "block_size"')
    if estimator == "monte_carlo" and block_causal:
        raise ValueError(
            "estimator='monte_carlo' masks targets in all blocks at once, and this model is block-causal: it "
            "was trained to see clean blocks before a noised one; use estimator='block'"
        )
    if estimator == "block" and not block_causal:
        raise ValueError(
            "estimator='block' needs a block-causal model, and this one is bidirectional; use "
            "estimator='monte_carlo'"
        )
    return estimator
