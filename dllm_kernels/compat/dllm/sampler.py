"""The base of dLLM's samplers: translates their options and tokenizers to `dk.sample`, and results back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType, SimpleNamespace

import torch
from torch import Tensor

from dllm_kernels._arguments import integer
from dllm_kernels.compat.dllm.configs import BaseSamplerConfig, BaseSamplerOutput
from dllm_kernels.compat.tensors import drawn_seed, replayed, stacked
from dllm_kernels.sampling.api import prompt_rows, run
from dllm_kernels.sampling.output import completion_output, infill_output
from dllm_kernels.sampling.plan import Plan, make_plan, model_with_diffusion
from dllm_kernels.sampling.prompts import Canvases, check_ids, completions, gaps, token_lists


@dataclass
class Sampler:
    """model, tokenizer, scheduler: as in dLLM. _attention: the kind that models are sampled with.
    _side, _filled_with: where and with which of the tokenizer's tokens rows of a batch are padded."""

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
        """Return prompts and completions, int64 [B, T], padded with the end token."""
        option = self._settled(config, kwargs)
        prompts = self._begun(inputs, option)
        longest = max(map(len, prompts))
        new_tokens = self._new_tokens(option, longest)
        settings = self._settings(option, new_tokens)
        plan = self._plan(settings | dict(max_new_tokens=new_tokens))
        rows = completions(prompt_rows(plan, prompts, None, None), plan)
        output = completion_output(rows, run(plan, rows, stop_ids=plan.stop_ids), plan.eos_ids, None)
        given = [len(prompt) for prompt in prompts]
        return self._returned(output, given, new_tokens, settings["block_size"], option)

    def infill(self, inputs: list[Tensor | list[int]], config=None, **kwargs) -> BaseSamplerOutput | Tensor:
        """Return canvases with their masks filled, int64 [B, T]."""
        option = self._settled(config, kwargs)
        canvases = self._begun(inputs, option)
        length = max(1, *map(len, canvases))
        settings = self._settings(option, length)
        plan = self._plan(settings)
        rows = given_canvases(plan, canvases)
        output = infill_output(rows, rows.ids == plan.mask_id, run(plan, rows), None, [])
        lengths = [len(canvas) for canvas in canvases]
        return self._filled(output, [0] * len(lengths), lengths, length, settings["block_size"], option)

    def _plan(self, settings: dict) -> Plan:
        """Return the plan under this sampler's kind of attention; the model's config stays as it is."""
        return make_plan(self.model, None, None, settings, attention=self._attention)

    @property
    def _end_token(self) -> int:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if eos is None:
            eos = next(iter(model_with_diffusion(self.model)[1].eos_ids), None)
        if eos is None:
            raise ValueError(
                "the end token is not known: neither the tokenizer nor the model's config names one"
            )
        return eos

    @property
    def _mask_id(self) -> int:
        mask_id = getattr(self.tokenizer, "mask_token_id", None)
        return model_with_diffusion(self.model)[1].mask_id if mask_id is None else mask_id

    def _settled(self, config, kwargs: dict) -> SimpleNamespace:
        config = self._config() if config is None else config
        known = {field.name for field in fields(self._config)}
        if unknown := kwargs.keys() - known:
            raise TypeError(f"{min(unknown)!r} is not an option of {self._config.__name__}")
        return SimpleNamespace(**{**asdict(self._config()), **asdict(config), **kwargs})

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        """Return options of `dk.sample` for completions, or canvases, of `length`."""
        exact, size = option.temperature == 0, getattr(option, "block_size", None)
        size = length if size is None else integer("block_size", size, 1)
        steps = integer("steps", option.steps, 1)
        return dict(
            temperature=option.temperature, stochastic=option.stochastic_transfer,
            shift=option.right_shift_logits, block_size=size,
            steps_per_block=math.ceil(steps / math.ceil(length / size)),
            schedule="dllm_cosine" if _is_cosine(self.scheduler) else "dllm",
            seed=drawn_seed(not exact or option.stochastic_transfer or _draws_positions(option)),
            mask_id=self._mask_id,
            eos_ids=getattr(self.tokenizer, "eos_token_id", None),
            **(dict(parity=self._parity) if exact else self._without_parity),
        )  # fmt: skip

    def _begun(self, inputs, option: SimpleNamespace) -> list[list[int]]:
        """Return rows of ids. If predictions are shifted, an empty list gets the beginning-of-text token."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        begin = [first] if option.right_shift_logits and first is not None else []
        return [row.tolist() if isinstance(row, Tensor) else list(row) or begin for row in inputs]

    def _new_tokens(self, option: SimpleNamespace, longest: int) -> int:
        """Return max_new_tokens, or what max_length leaves the longest prompt."""
        new_tokens = option.max_new_tokens and integer("max_new_tokens", option.max_new_tokens, 1)
        if not new_tokens and option.max_length is None:
            raise ValueError("max_new_tokens and max_length are None; give one of them")
        return new_tokens or left_of(option.max_length, longest)

    def _returned(self, output, given: list[int], new_tokens: int, block_size: int, option: SimpleNamespace):
        """Return the result of `sample`. given: lengths of the prompts."""
        lengths = [length + new_tokens for length in given]
        return self._filled(output, given, lengths, max(lengths), block_size, option)

    def _filled(self, output, origin, lengths, width, block_size, option, **steps):
        """Return sequences [B, width] and, on request, the canvases of a loop over blocks from `origin`."""
        fill = getattr(self.tokenizer, self._filled_with, None)
        fill = self._end_token if fill is None else fill

        def shaped(ids: Tensor, fill: int) -> Tensor:
            rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
            return stacked(rows, width, fill, self._side)

        sequences = shaped(output.sequences, fill)
        if not option.return_dict:
            return sequences
        start = torch.tensor(origin)
        if self._side == "left":
            start += width - torch.tensor(lengths)
        histories = replayed(
            sequences, shaped(output.unmask_step, -1), self._mask_id, origin=start, block_size=block_size,
            **steps,
        )  # fmt: skip
        return BaseSamplerOutput(sequences, histories)


def given_canvases(plan: Plan, canvases: list[list[int]]) -> Canvases:
    """Return canvases that hold their masks already, checked."""
    rows = token_lists("canvases", canvases, None, None)
    check_ids("canvases", rows, plan.diffusion.vocab_size)
    filled = gaps(rows, plan.fill)
    plan.check_length(filled)
    return filled


def left_of(max_length: int, longest: int) -> int:
    """Return the new tokens that the longest prompt leaves."""
    if integer("max_length", max_length) <= longest:
        raise ValueError(f"max_length is {max_length}; the longest prompt has {longest} tokens already")
    return max_length - longest


def _draws_positions(option: SimpleNamespace) -> bool:
    return getattr(option, "remasking", None) == "random" or bool(getattr(option, "alg_temp", None))


def _is_cosine(scheduler) -> bool:
    name = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
    if scheduler is not None and not name.lower().startswith(("linear", "cosine")):
        raise NotImplementedError(f"scheduler is {name}; allowed: a linear or a cosine one")
    return name.lower().startswith("cosine")
