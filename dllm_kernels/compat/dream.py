"""`diffusion_generate` of Dream, where it is a method of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

import dllm_kernels as dk
from dllm_kernels._arguments import integer
from dllm_kernels.compat.hooks import Hooked, same_logits, same_tokens
from dllm_kernels.compat.tensors import (
    beside_prompt,
    check_tokens,
    confidence_of,
    drawn_seed,
    parity_at_zero,
    prompt_lengths,
    replayed,
)
from dllm_kernels.sampling.api import prompt_rows
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.plan import make_plan, model_with_diffusion
from dllm_kernels.sampling.schedules import dream_quota, dream_schedule


@dataclass
class DreamModelOutput(ModelOutput):
    """sequences: int64 [B, T]; history: sequences after every step, or None."""

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None


def diffusion_generate(
    model, inputs: Tensor | None = None, generation_config=None, **kwargs
) -> DreamModelOutput | Tensor:
    """Return int64 [B, S + new tokens]: `inputs` [B, S] and their completions.

    generation_config, kwargs: max_new_tokens (20) or max_length, steps (512), eps (1e-3), alg ("origin",
    "maskgit_plus", "topk_margin" or "entropy"), alg_temp, temperature (0.0), top_p, top_k, mask_token_id,
    num_return_sequences (1), output_history, return_dict_in_generate; kwargs override. The other special
    tokens may be named and change nothing, as in Dream. attention_mask: int [B, S], 0 where `inputs` is
    padded; with hooks, on the left.

    generation_logits_hook_func(step, x, logits [B, T, V]) returns the logits to use, and
    generation_tokens_hook_func(step, x, logits) the tokens to continue with; it is also called before the
    first step, with None for step and logits. With hooks, which bidirectional models take, every step is a
    forward over whole canvases; without, only steps that commit something are.
    """
    attention_mask = kwargs.pop("attention_mask", None)
    logits_hook = kwargs.pop("generation_logits_hook_func", None)
    tokens_hook = kwargs.pop("generation_tokens_hook_func", None)
    option = read_options(DEFAULTS, generation_config, kwargs)
    inputs, attention_mask = expanded(inputs, attention_mask, option["num_return_sequences"])
    new_tokens = length_of_completion(model, inputs, option, "max_length" in kwargs)
    temperature, mask_id = option["temperature"] or 0.0, option["mask_token_id"]
    settings = dict(
        max_new_tokens=new_tokens, block_size=new_tokens, temperature=temperature, top_p=option["top_p"],
        top_k=option["top_k"], mask_id=mask_id, seed=drawn_seed(_draws(option)),
        **parity_at_zero(temperature, "dream", dict(schedule="dream", cache="none", stop_on_eos=False)),
        **_rule(option),
    )  # fmt: skip
    if logits_hook is not None or tokens_hook is not None:
        plan = make_plan(model, None, None, settings)
        hooked = Hooked(plan, tokens_hook or same_tokens, logits_hook or same_logits, _quotas(plan.config))
        history = _with_hooks(hooked, inputs, attention_mask, new_tokens)
        return returned(history[-1], history[1:], option)
    output = dk.sample(model, inputs, attention_mask=attention_mask, **settings)
    given = prompt_lengths(inputs, attention_mask)
    sequences = beside_prompt(inputs, given, output.sequences, new_tokens)
    unmask_step = beside_prompt(torch.full_like(inputs, -1), given, output.unmask_step, new_tokens)
    quotas = None
    if option["alg"] != "origin":
        quotas = dream_schedule(new_tokens, option["steps"], option["eps"])
    mask_id = model_with_diffusion(model)[1].mask_id if mask_id is None else mask_id
    history = []
    if option["output_history"]:
        history = replayed(
            sequences, unmask_step, mask_id, origin=torch.full_like(given, inputs.shape[1]),
            block_size=new_tokens, quotas=quotas,
        )  # fmt: skip
    return returned(sequences, history[1:], option)


def read_options(defaults: Mapping[str, object], config, kwargs: Mapping[str, object]) -> dict:
    """Return the defaults, overridden by the generation config, overridden by `kwargs`."""
    if unknown := kwargs.keys() - defaults.keys():
        raise TypeError(f"{min(unknown)!r} is not an option; known: {', '.join(defaults)}")
    found = {name: getattr(config, name, None) for name in defaults}
    return {**defaults, **{name: value for name, value in found.items() if value is not None}, **kwargs}


def expanded(inputs: Tensor, attention_mask: Tensor | None, times: int) -> tuple[Tensor, Tensor | None]:
    """Repeat every row `times` times."""
    check_tokens("inputs", inputs)
    times = integer("num_return_sequences", times, 1)
    if attention_mask is not None and attention_mask.shape != inputs.shape:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, inputs is {list(inputs.shape)}")
    if attention_mask is not None:
        attention_mask = attention_mask.repeat_interleave(times, 0)
    return inputs.repeat_interleave(times, 0), attention_mask


def length_of_completion(model, inputs: Tensor, option: Mapping[str, object], said: bool) -> int:
    """Return max_new_tokens, else what max_length leaves; unless `said`, its default counts new tokens."""
    if option["max_new_tokens"] is not None:
        return integer("max_new_tokens", option["max_new_tokens"], 1)
    prompt, longest = inputs.shape[1], integer("max_length", option["max_length"], 1)
    if not said and longest == DEFAULTS["max_length"]:
        most = model_with_diffusion(model)[1].max_positions
        longest += prompt
        longest = longest if most is None else min(longest, most)
    if prompt >= longest:
        raise ValueError(f"inputs has {prompt} tokens, max_length is {longest}; give more, or max_new_tokens")
    return longest - prompt


def returned(sequences: Tensor, history: list[Tensor], option: Mapping[str, object]):
    """Return the result of `diffusion_generate`."""
    if not option["return_dict_in_generate"]:
        return sequences
    return DreamModelOutput(sequences, tuple(history) if option["output_history"] else None)


DEFAULTS = dict(
    max_new_tokens=None, max_length=20, steps=512, eps=1e-3, alg="origin", alg_temp=None, temperature=0.0,
    top_p=None, top_k=None, mask_token_id=None, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    num_return_sequences=1, output_history=False, return_dict_in_generate=False,
)  # fmt: skip


def _draws(option: Mapping[str, object]) -> bool:
    return bool(option["temperature"] or option["alg_temp"]) or option["alg"] == "origin"


def _rule(option: Mapping[str, object]) -> dict:
    alg, steps, eps = option["alg"], option["steps"], option["eps"]
    if alg == "origin":
        return dict(rule="bernoulli", steps=steps, eps=eps)
    return dict(confidence=_confidence(alg), alg_temp=option["alg_temp"] or 0.0, steps=steps, eps=eps)


def _confidence(alg: str) -> str:
    return confidence_of("alg", alg, "maskgit_plus", "topk_margin", "entropy")


def _quotas(config: SampleConfig) -> Callable[[int, Tensor], Tensor]:
    """Return how many of a row's masks each step commits."""

    def quotas(step: int, masks: Tensor) -> Tensor:
        due = [dream_quota(count, step, config.steps, config.eps) for count in masks.tolist()]
        return torch.tensor(due, device=masks.device)

    return quotas


def _with_hooks(
    hooked: Hooked, inputs: Tensor, attention_mask: Tensor | None, new_tokens: int
) -> list[Tensor]:
    """Return the canvases before and after every step."""
    plan = hooked.plan
    rows = prompt_rows(plan, inputs, attention_mask, None)
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError(
            "with hooks attention_mask must pad inputs on the left, and its last column has zeros"
        )
    given = torch.tensor([len(row) for row in rows])
    plan.check_positions(given, given + new_tokens)
    masks = inputs.new_full((len(inputs), new_tokens), plan.mask_id)
    return hooked.fill(torch.cat([inputs, masks], dim=1), given + new_tokens, plan.config.steps)
