"""The samplers of dLLM: MDLM, BD3LM, Dream and its port of Fast-dLLM, with their configs and outputs.

A sampler is made of a model and a tokenizer (anything with mask_token_id, eos_token_id, pad_token_id);
`scheduler` is None, "linear", "cosine", or an object whose class is named so. Options given to `sample` and
`infill` come before those of the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType, SimpleNamespace

import torch
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.compat.canvases import confidence_of, stacked
from dllm_kernels.models.families import diffusion_of


@dataclass
class BaseSamplerConfig:
    return_dict: bool = False


@dataclass
class BaseSamplerOutput:
    """sequences: int64 [B, T]; histories: the canvas at the start and after every round, or None."""

    sequences: Tensor
    histories: list[Tensor] | None = None


@dataclass
class MDLMSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 128
    max_length: int | None = None
    block_size: int | None = 128
    steps: int = 128
    temperature: float = 0.0
    remasking: str = "low_confidence"
    stochastic_transfer: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list[int] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    right_shift_logits: bool = False


@dataclass
class BD3LMSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 128
    max_length: int | None = None
    block_size: int = 32
    steps: int = 128
    steps_per_block: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    stochastic_transfer: bool = False
    cfg_scale: float = 0.0
    cfg_keep_tokens: list[int] | None = None
    right_shift_logits: bool = False


@dataclass
class DreamSamplerConfig(BaseSamplerConfig):
    max_new_tokens: int | None = 20
    max_length: int | None = None
    steps: int = 512
    eps: float = 1e-3
    alg: str = "origin"
    alg_temp: float = 0.0
    temperature: float = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 50
    stochastic_transfer: bool = False
    right_shift_logits: bool = True
    cfg_scale: float = 0.0


@dataclass
class FastdLLMLLaDASamplerConfig(MDLMSamplerConfig):
    use_cache: str | None = None
    threshold: float | None = None
    factor: float | None = None


@dataclass
class _Sampler:
    """model, tokenizer, scheduler as there. _attention: what the models are sampled with; _side,
    _filled_with: where and with which of the tokenizer's tokens rows of a batch are filled up."""

    model: object
    tokenizer: object = None
    scheduler: object = None

    _config = BaseSamplerConfig
    _attention = "bidirectional"
    _side = "right"
    _filled_with = "eos_token_id"
    _parity = "dllm_mdlm"
    _without_parity = MappingProxyType(dict(stop_on_eos=False))

    def sample(self, inputs: list[Tensor | list[int]], config=None, **kwargs) -> BaseSamplerOutput | Tensor:
        """Prompts and their completions, int64 [B, T], filled up with the end token."""
        option, prompts = self._settled(config, kwargs), _lists(inputs)
        if option.right_shift_logits:
            first = getattr(self.tokenizer, "bos_token_id", None)
            prompts = [prompt or ([] if first is None else [first]) for prompt in prompts]
        longest = max(map(len, prompts))
        new_tokens = option.max_new_tokens or option.max_length - longest
        settings = self._settings(option, new_tokens)
        with _attending(self.model, self._attention):
            output = dk.sample(
                self.model, prompts, max_new_tokens=new_tokens, history=option.return_dict, **settings
            )
        lengths = [len(prompt) + new_tokens for prompt in prompts]
        start = self._aligned(longest, settings["block_size"])
        result = self._returned(output, lengths, start + new_tokens, option.return_dict)
        return self._cut(result, start, settings["block_size"])

    def infill(self, inputs: list[Tensor | list[int]], config=None, **kwargs) -> BaseSamplerOutput | Tensor:
        """Canvases with their masks filled, int64 [B, T]."""
        option, canvases = self._settled(config, kwargs), _lists(inputs)
        lengths = [len(canvas) for canvas in canvases]
        settings = self._settings(option, max(lengths))
        with _attending(self.model, self._attention):
            output = dk.infill(self.model, canvases, history=option.return_dict, **settings)
        return self._returned(output, lengths, max(lengths), option.return_dict)

    @property
    def _end_token(self) -> int:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return diffusion_of(self.model).eos_ids[0] if eos is None else eos

    def _settled(self, config, kwargs: dict) -> SimpleNamespace:
        config = self._config() if config is None else config
        known = {field.name for field in fields(self._config)}
        if unknown := kwargs.keys() - known:
            raise TypeError(f"{min(unknown)!r} is not an option of {self._config.__name__}")
        return SimpleNamespace(**{**asdict(self._config()), **asdict(config), **kwargs})

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        """Options of `dk.sample` for completions, or canvases, of `length`."""
        exact, size = option.temperature == 0, getattr(option, "block_size", None) or length
        return dict(
            temperature=option.temperature, stochastic=option.stochastic_transfer,
            shift=option.right_shift_logits, block_size=size,
            steps_per_block=math.ceil(option.steps / math.ceil(length / size)),
            schedule="dllm_cosine" if _is_cosine(self.scheduler) else "dllm",
            seed=0 if exact and not option.stochastic_transfer else int(torch.randint(2**62, ())),
            mask_id=getattr(self.tokenizer, "mask_token_id", None),
            eos_ids=getattr(self.tokenizer, "eos_token_id", None),
            **(dict(parity=self._parity) if exact else self._without_parity),
        )  # fmt: skip

    def _aligned(self, prompt: int, block_size: int) -> int:
        """Columns that the longest prompt takes."""
        return prompt

    def _cut(self, result: BaseSamplerOutput | Tensor, start: int, block_size: int):
        """What is left of completions that begin in column `start`."""
        return result

    def _returned(self, output, lengths: list[int], width: int, as_object: bool):
        fill = getattr(self.tokenizer, self._filled_with, None)
        fill = self._end_token if fill is None else fill

        def shaped(ids: Tensor) -> Tensor:
            rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
            return stacked(rows, width, fill, self._side)

        sequences = shaped(output.sequences)
        if not as_object:
            return sequences
        return BaseSamplerOutput(sequences, [shaped(canvas) for canvas in output.history])


class MDLMSampler(_Sampler):
    """[MDLM, LLaDA] Blocks of masks behind each prompt, under bidirectional attention."""

    _config = MDLMSamplerConfig

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        return super()._settings(option, length) | dict(
            confidence=confidence_of("remasking", option.remasking, "low_confidence", "random"),
            suppress_tokens=option.suppress_tokens or (),
            begin_suppress_tokens=option.begin_suppress_tokens or (),
            cfg_scale=option.cfg_scale,
            cfg_keep_tokens=(option.cfg_keep_tokens or ()) if option.cfg_scale else (),
        )


class BD3LMSampler(_Sampler):
    """[BD3LM] Block after block under block-causal attention; a batch is filled up on the left, to whole
    blocks, and cut where its last row ends."""

    _config = BD3LMSamplerConfig
    _attention = "block_causal"
    _side = "left"
    _filled_with = "pad_token_id"
    _parity = "dllm_bd3lm"

    def infill(self, inputs, config=None, **kwargs):
        raise NotImplementedError("BD3LMSampler has no infill; MDLMSampler has")

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        steps = {}
        if option.steps_per_block is not None:
            steps = dict(steps_per_block=option.steps_per_block)
        return super()._settings(option, length) | dict(
            confidence=confidence_of("remasking", option.remasking, "low_confidence", "random"),
            cfg_scale=option.cfg_scale,
            cfg_keep_tokens=(option.cfg_keep_tokens or ()) if option.cfg_scale else (),
            **steps,
        )

    def _cut(self, result, start: int, block_size: int):
        """Nothing behind the block in which the last row ends; a row that ends earlier goes on till then."""
        sequences = result.sequences if isinstance(result, BaseSamplerOutput) else result
        ends = sequences[:, start:] == self._end_token
        if not bool(ends.any(1).all()):
            return result
        blocks = int(ends.int().argmax(1).max()) // block_size + 1
        width = start + blocks * block_size
        if isinstance(result, Tensor):
            return result[:, :width]
        histories = [canvas[:, :width] for canvas in result.histories]
        return BaseSamplerOutput(result.sequences[:, :width], histories)

    def _aligned(self, prompt: int, block_size: int) -> int:
        return -(-prompt // block_size) * block_size


class DreamSampler(_Sampler):
    """[Dream] The whole completion as one block, predictions shifted by one, rows filled up on the left."""

    _config = DreamSamplerConfig
    _side = "left"

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        return super()._settings(option, length) | dict(
            top_p=option.top_p, top_k=option.top_k, alg_temp=option.alg_temp,
            confidence=confidence_of("alg", option.alg, "maskgit_plus", "topk_margin", "entropy"),
            cfg_scale=option.cfg_scale,
        )  # fmt: skip


class FastdLLMLLaDASampler(MDLMSampler):
    """[Fast-dLLM] MDLM with a cache and a threshold or a factor; begin_suppress_tokens are never proposed."""

    _config = FastdLLMLLaDASamplerConfig

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        if option.threshold is not None and option.factor is not None:
            raise ValueError("threshold and factor are two rules; give one")
        never = {*(option.suppress_tokens or ()), *(option.begin_suppress_tokens or ())}
        return super()._settings(option, length) | dict(
            cache=option.use_cache or "none", threshold=option.threshold, factor=option.factor,
            suppress_tokens=tuple(never), begin_suppress_tokens=(), cfg_scale=0.0, cfg_keep_tokens=(),
        )  # fmt: skip


def _lists(inputs) -> list[list[int]]:
    return [row.tolist() if isinstance(row, Tensor) else list(row) for row in inputs]


def _is_cosine(scheduler) -> bool:
    name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    if scheduler is not None and not name.lower().startswith(("linear", "cosine")):
        raise NotImplementedError(f"scheduler is {name}; allowed: a linear or a cosine one")
    return name.lower().startswith("cosine")


@contextmanager
def _attending(model, kind: str) -> Iterator[None]:
    """Within this context `model` is sampled with this kind of attention."""
    config = model.config
    before = getattr(config, "diffusion", None)
    config.diffusion = {**(before or {}), "attention": [kind]}
    try:
        yield
    finally:
        if before is None:
            del config.diffusion
        else:
            config.diffusion = before
