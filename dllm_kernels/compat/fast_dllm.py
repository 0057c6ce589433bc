"""The `generate` functions of NVlabs Fast-dLLM: for LLaDA `(x, nfe)`, for Dream `diffusion_generate`."""

from __future__ import annotations

from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.compat import dream
from dllm_kernels.compat.llada import check_steps
from dllm_kernels.compat.tensors import (
    beside_prompt,
    check_tokens,
    confidence_of,
    drawn_seed,
    parity_at_zero,
    prompt_lengths,
)


def generate(
    model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Complete `prompt` [B, S] without a cache; return [B, S + gen_length] and the number of forwards."""
    return _generate(
        "none", model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold,
        factor,
    )  # fmt: skip


def generate_with_prefix_cache(
    model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Complete as `generate` does, caching K/V of the tokens before the block."""
    return _generate(
        "prefix", model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold,
        factor,
    )  # fmt: skip


def generate_with_dual_cache(
    model,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Complete as `generate` does, caching K/V of the tokens before and after the block."""
    return _generate(
        "dual", model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold,
        factor,
    )  # fmt: skip


def diffusion_generate(model, inputs: Tensor | None = None, generation_config=None, **kwargs):
    """Complete `inputs` int64 [B, S] for Dream, with more options than `compat.dream.diffusion_generate`.

    use_cache (True), dual_cache (False): which of the caches. block_length (32): None is one block. alg may
    also be "confidence_threshold", with threshold (0.9). With a cache every other alg ranks by entropy, as in
    Fast-dLLM; without one the completion is one block, and a threshold accepts at most what an even schedule
    has due by then. Hooks: without a cache, and not with a threshold.
    """
    option = dream.read_options(
        _DREAM_DEFAULTS, generation_config, {k: v for k, v in kwargs.items() if k not in _NOT_OPTIONS}
    )
    by_threshold = option["alg"] == "confidence_threshold"
    if not (option["use_cache"] or by_threshold):
        more = {name: value for name, value in kwargs.items() if name not in _DREAM_ONLY}
        return dream.diffusion_generate(model, inputs, generation_config, **more)
    if hooks := sorted(kwargs.keys() & _HOOKS):
        raise NotImplementedError(f"{hooks[0]} needs use_cache=False, and another alg than a threshold")
    inputs, attention_mask = dream.expanded(
        inputs, kwargs.get("attention_mask"), option["num_return_sequences"]
    )
    new_tokens = dream.length_of_completion(model, inputs, option, "max_length" in kwargs)
    block_length = option["block_length"] if option["use_cache"] else None
    block_length = new_tokens if block_length is None else block_length
    check_steps(option["steps"], new_tokens, block_length, length="max_new_tokens")
    rule = dict(confidence="entropy", alg_temp=option["alg_temp"] or 0.0)
    if by_threshold:
        rule = dict(threshold=option["threshold"])
    temperature, cache = option["temperature"] or 0.0, "dual" if option["dual_cache"] else "prefix"
    output = dk.sample(
        model, inputs, attention_mask=attention_mask, max_new_tokens=new_tokens, block_size=block_length,
        steps=option["steps"], schedule="dream", eps=option["eps"], temperature=temperature,
        top_p=option["top_p"], top_k=option["top_k"], cache=cache if option["use_cache"] else "none",
        mask_id=option["mask_token_id"], history=option["output_history"],
        seed=drawn_seed(temperature or option["alg_temp"]), **rule,
        **parity_at_zero(temperature, "fast_dllm_dream", dict(stop_on_eos=False)),
    )  # fmt: skip
    given = prompt_lengths(inputs, attention_mask)
    history = [beside_prompt(inputs, given, canvas, new_tokens) for canvas in output.history or ()]
    return dream.returned(beside_prompt(inputs, given, output.sequences, new_tokens), history[1:], option)


_DREAM_ONLY = dict(threshold=0.9, block_length=32, dual_cache=False, use_cache=True)
_DREAM_DEFAULTS = {**dream.DEFAULTS, **_DREAM_ONLY}
_HOOKS = {"generation_tokens_hook_func", "generation_logits_hook_func"}
_NOT_OPTIONS = {"attention_mask", *_HOOKS}


def _generate(
    cache, model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor
):
    check_tokens("prompt", prompt)
    check_steps(steps, gen_length, block_length)
    output = dk.sample(
        model, prompt, max_new_tokens=gen_length, block_size=block_length, steps=steps, cache=cache,
        temperature=temperature, seed=drawn_seed(temperature or remasking == "random"), mask_id=mask_id,
        factor=factor,
        threshold=None if factor is not None else threshold,
        confidence=confidence_of("remasking", remasking, "low_confidence", "random"),
        **parity_at_zero(temperature, "fast_dllm", dict(stop_on_eos=False)),
    )  # fmt: skip
    nfe = output.forwards
    if cache != "none":
        nfe += _complete_after_refresh(output, prompt.shape[1], gen_length, block_length)
    given = prompt_lengths(prompt, None)
    return beside_prompt(prompt, given, output.sequences, gen_length), nfe


def _complete_after_refresh(output, start: int, gen_length: int, block_length: int) -> int:
    """Return the blocks filled by their refresh: the original makes one more forward before it looks."""
    steps = output.unmask_step[:, start : start + gen_length].unflatten(1, (-1, block_length))
    return int((steps.amin(2) == steps.amax(2)).all(0).sum())
