"""The samplers of dLLM: MDLM, BD3LM, Dream and its ports of Fast-dLLM, with their configs and outputs.

A sampler has a model and a tokenizer (anything with mask_token_id, eos_token_id, pad_token_id); `scheduler`
is None, "linear", "cosine", or an object whose class is named so. Options given to `sample` and `infill`
override those of the config.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

from dllm_kernels.compat.dllm.configs import (
    BaseSamplerConfig,
    BaseSamplerOutput,
    BD3LMSamplerConfig,
    DreamSamplerConfig,
    FastdLLMDreamSamplerConfig,
    FastdLLMLLaDASamplerConfig,
    MDLMSamplerConfig,
)
from dllm_kernels.compat.dllm.sampler import Sampler, given_canvases, left_of
from dllm_kernels.compat.hooks import Hook, Hooked, same_logits, same_tokens
from dllm_kernels.compat.llada import check_steps
from dllm_kernels.compat.tensors import confidence_of, stacked
from dllm_kernels.sampling.api import prompt_rows
from dllm_kernels.sampling.plan import Plan
from dllm_kernels.sampling.prompts import Canvases, completions
from dllm_kernels.sampling.schedules import dream_schedule

__all__ = [
    "BD3LMSampler",
    "BD3LMSamplerConfig",
    "BaseSamplerConfig",
    "BaseSamplerOutput",
    "DreamSampler",
    "DreamSamplerConfig",
    "FastdLLMDreamSampler",
    "FastdLLMDreamSamplerConfig",
    "FastdLLMLLaDASampler",
    "FastdLLMLLaDASamplerConfig",
    "MDLMSampler",
    "MDLMSamplerConfig",
]


class MDLMSampler(Sampler):
    """[MDLM, LLaDA] Blocks of masks after each prompt, under bidirectional attention."""

    _config = MDLMSamplerConfig

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        return super()._settings(option, length) | dict(
            confidence=confidence_of("remasking", option.remasking, "low_confidence", "random"),
            suppress_tokens=option.suppress_tokens or (),
            begin_suppress_tokens=option.begin_suppress_tokens or (),
            cfg_scale=option.cfg_scale,
            cfg_keep_tokens=(option.cfg_keep_tokens or ()) if option.cfg_scale else (),
        )


class BD3LMSampler(Sampler):
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

    def _returned(self, output, given: list[int], new_tokens: int, block_size: int, option: SimpleNamespace):
        """Return canvases in which prompts fill whole blocks and nothing follows the block in which the last
        row ends: a row that ends earlier continues until then. Histories end with the active block."""
        lengths = [length + new_tokens for length in given]
        start = -(-max(given) // block_size) * block_size
        result = self._filled(output, given, lengths, start + new_tokens, block_size, option)
        sequences = result.sequences if option.return_dict else result
        ends = sequences[:, start:] == self._end_token
        width = sequences.shape[1]
        if self._ends and bool(ends.any(1).all()):
            width = min(width, start + (int(ends.int().argmax(1).max()) // block_size + 1) * block_size)
        if not option.return_dict:
            return sequences[:, :width]
        histories = [result.histories[0][:, :start]]
        for before, after in pairwise(result.histories):
            block = int((before[:, start:] == self._mask_id).any(0).int().argmax()) // block_size
            end = start + min((block + 1) * block_size, new_tokens)
            if end <= width:
                histories.append(after[:, :end])
        return BaseSamplerOutput(sequences[:, :width], histories)

    @property
    def _ends(self) -> bool:
        """Return whether an end token stops a row; a tokenizer without one stops none."""
        return self.tokenizer is None or getattr(self.tokenizer, "eos_token_id", None) is not None


class DreamSampler(Sampler):
    """[Dream] The whole completion as one block, predictions shifted by one, rows filled up on the left."""

    _config = DreamSamplerConfig
    _side = "left"
    _parity = "dllm_dream"

    def sample(
        self,
        inputs: list[Tensor | list[int]],
        config=None,
        generation_tokens_hook_func: Hook = same_tokens,
        generation_logits_hook_func: Hook = same_logits,
        **kwargs,
    ) -> BaseSamplerOutput | Tensor:
        """Return prompts and completions, int64 [B, T]; hooks as in `compat.dream.diffusion_generate`."""
        if (generation_tokens_hook_func, generation_logits_hook_func) == (same_tokens, same_logits):
            return super().sample(inputs, config, **kwargs)
        option = self._settled(config, kwargs)
        prompts = self._begun(inputs, option)
        new_tokens = self._new_tokens(option, max(map(len, prompts)))
        plan = self._plan(self._settings(option, new_tokens) | dict(max_new_tokens=new_tokens))
        rows = completions(prompt_rows(plan, prompts, None, None), plan)
        return self._hooked(plan, rows, option, generation_tokens_hook_func, generation_logits_hook_func)

    def infill(
        self,
        inputs: list[Tensor | list[int]],
        config=None,
        generation_tokens_hook_func: Hook = same_tokens,
        generation_logits_hook_func: Hook = same_logits,
        **kwargs,
    ) -> BaseSamplerOutput | Tensor:
        """Return canvases with their masks filled, int64 [B, T]; hooks as in `sample`."""
        if (generation_tokens_hook_func, generation_logits_hook_func) == (same_tokens, same_logits):
            return super().infill(inputs, config, **kwargs)
        option = self._settled(config, kwargs)
        canvases = self._begun(inputs, option)
        plan = self._plan(self._settings(option, max(1, *map(len, canvases))))
        rows = given_canvases(plan, canvases)
        return self._hooked(plan, rows, option, generation_tokens_hook_func, generation_logits_hook_func)

    def _begun(self, inputs, option: SimpleNamespace) -> list[list[int]]:
        return [row.tolist() if isinstance(row, Tensor) else list(row) for row in inputs]

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        return super()._settings(option, length) | dict(
            top_p=option.top_p, top_k=option.top_k, alg_temp=option.alg_temp or 0.0,
            confidence=confidence_of("alg", option.alg, "maskgit_plus", "topk_margin", "entropy"),
            cfg_scale=getattr(option, "cfg_scale", 0.0),
        )  # fmt: skip

    def _hooked(self, plan: Plan, rows: Canvases, option: SimpleNamespace, tokens: Hook, logits: Hook):
        ids = [row[:end] for row, end in zip(rows.ids.tolist(), rows.end.tolist(), strict=True)]
        canvas = stacked(ids, int(rows.end.max()), self._end_token, "left")
        masks, starts = (row.count(plan.mask_id) for row in ids), rows.origin.tolist()
        quotas = [
            plan.config.quotas(count, 1, (row, start))
            for row, (count, start) in enumerate(zip(masks, starts, strict=True))
        ]
        steps = max(map(len, quotas))
        due = torch.tensor([row + [0] * (steps - len(row)) for row in quotas], device=plan.device)
        hooked = Hooked(plan, tokens, logits, lambda step, masks: due[:, step])
        histories = hooked.fill(canvas, rows.end, steps)
        return BaseSamplerOutput(histories[-1], histories) if option.return_dict else histories[-1]


class FastdLLMLLaDASampler(MDLMSampler):
    """[Fast-dLLM] MDLM with a cache and a threshold or a factor, which comes first; begin_suppress_tokens are
    never proposed. Without a cache the end tokens that fill up shorter rows are attended to, as there."""

    _config = FastdLLMLLaDASamplerConfig
    _parity = "dllm_fast_dllm"

    def infill(self, inputs, config=None, **kwargs):
        raise NotImplementedError("FastdLLMLLaDASampler has no infill; MDLMSampler has")

    def _begun(self, inputs, option: SimpleNamespace) -> list[list[int]]:
        inputs = [inputs] if isinstance(inputs, Tensor) and inputs.dim() == 1 else inputs
        rows = [row.tolist() if isinstance(row, Tensor) else row for row in inputs]
        return super()._begun(rows, option)

    def _new_tokens(self, option: SimpleNamespace, longest: int) -> int:
        """Return the new tokens that max_length leaves the longest prompt, or max_new_tokens."""
        if option.max_length is not None:
            return left_of(option.max_length, longest)
        return super()._new_tokens(option, longest)

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        never = {*(option.suppress_tokens or ()), *(option.begin_suppress_tokens or ())}
        return super()._settings(option, length) | dict(
            cache=_cache(option), factor=option.factor,
            threshold=None if option.factor is not None else option.threshold,
            suppress_tokens=tuple(never), begin_suppress_tokens=(), cfg_scale=0.0, cfg_keep_tokens=(),
        )  # fmt: skip


class FastdLLMDreamSampler(DreamSampler):
    """[Fast-dLLM] Dream with a cache, blocks and a threshold, which without a cache accepts at most what the
    schedule has due by then. A refresh commits the first token of its block."""

    _config = FastdLLMDreamSamplerConfig
    _parity = "dllm_fast_dllm_dream"

    def infill(self, inputs, config=None, **kwargs):
        raise NotImplementedError("FastdLLMDreamSampler has no infill; DreamSampler has")

    def _settings(self, option: SimpleNamespace, length: int) -> dict:
        cache, by_threshold = _cache(option), option.alg == "confidence_threshold"
        if by_threshold and option.threshold is None:
            raise ValueError('alg "confidence_threshold" needs threshold')
        alg = "maskgit_plus" if by_threshold else option.alg
        block_size = None if cache == "none" else option.block_size
        plain = SimpleNamespace(**{**vars(option), "alg": alg, "block_size": block_size})
        settings = super()._settings(plain, length) | dict(cache=cache)
        if by_threshold:
            settings |= dict(threshold=option.threshold, alg_temp=0.0)
        if cache != "none":
            check_steps(option.steps, length, settings["block_size"], "max_new_tokens", "block_size")
            settings |= dict(schedule="dream", eps=option.eps, stochastic=False)
        return settings

    def _hooked(self, plan: Plan, rows: Canvases, option: SimpleNamespace, tokens: Hook, logits: Hook):
        if _cache(option) != "none" or option.alg == "confidence_threshold":
            raise NotImplementedError("hooks need use_cache=None, and another alg than a threshold")
        return super()._hooked(plan, rows, option, tokens, logits)

    def _returned(self, output, given: list[int], new_tokens: int, block_size: int, option: SimpleNamespace):
        lengths, steps = [length + new_tokens for length in given], {}
        if _cache(option) != "none":
            steps = dict(least=2)
            if option.alg != "confidence_threshold":
                of_block = option.steps * block_size // new_tokens
                steps |= dict(quotas=[1, *dream_schedule(block_size - 1, of_block, option.eps, 1)])
        width = max(*lengths, option.max_length or 0)
        return self._filled(output, given, lengths, width, block_size, option, **steps)


def _cache(option: SimpleNamespace) -> str:
    if option.use_cache not in (None, "none", "prefix", "dual"):
        raise ValueError(f"use_cache is {option.use_cache!r}; allowed: None, 'none', 'prefix', 'dual'")
    return option.use_cache or "none"
