"""The `generate` functions of NVlabs Fast-dLLM: for LLaDA `(x, nfe)`, for Dream `diffusion_generate`."""

from __future__ import annotations

from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.compat import dream
from dllm_kernels.compat.canvases import beside_prompt, confidence_of, parity_at_zero, prompt_lengths
from dllm_kernels.compat.llada import check_steps


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
    """Without a cache: `prompt` [B, S] and its completions [B, S + gen_length], and forwards made."""
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
    """As `generate`, keeping K/V of what stands before the block."""
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
    """As `generate`, keeping K/V of what stands before and behind the block."""
    return _generate(
        "dual", model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold,
        factor,
    )  # fmt: skip


def diffusion_generate(
    model,
    inputs: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int = 20,
    steps: int = 512,
    eps: float = 1e-3,
    alg: str = "origin",
    alg_temp: float | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    threshold: float | None = 0.9,
    block_length: int | None = 32,
    dual_cache: bool = False,
    use_cache: bool = True,
    mask_token_id: int | None = None,
    return_dict_in_generate: bool = False,
    output_history: bool = False,
):
    """Dream. With a cache every alg but "confidence_threshold" ranks by entropy, as there; without one the
    completion is one block, and a threshold accepts at most what an even schedule has due by then.

    inputs: int64 [B, S]; returns as `dllm_kernels.compat.dream.diffusion_generate`.
    """
    by_threshold = alg == "confidence_threshold"
    if not (use_cache or by_threshold):
        return dream.diffusion_generate(
            model, inputs, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
            max_length=max_length, steps=steps, eps=eps, alg=alg, alg_temp=alg_temp, temperature=temperature,
            top_p=top_p, top_k=top_k, mask_token_id=mask_token_id,
            return_dict_in_generate=return_dict_in_generate, output_history=output_history,
        )  # fmt: skip
    new_tokens = max_new_tokens or max_length - inputs.shape[1]
    block_length = block_length if use_cache and block_length else new_tokens
    check_steps(steps, new_tokens, block_length)
    rule = dict(threshold=threshold) if by_threshold else dict(confidence="entropy", alg_temp=alg_temp or 0.0)
    output = dk.sample(
        model, inputs, attention_mask=attention_mask, max_new_tokens=new_tokens, block_size=block_length,
        steps=steps, schedule="dream", eps=eps, temperature=temperature, top_p=top_p, top_k=top_k,
        cache="none" if not use_cache else "dual" if dual_cache else "prefix", mask_id=mask_token_id,
        history=output_history, **rule,
        **parity_at_zero(temperature, "fast_dllm_dream", dict(stop_on_eos=False)),
    )  # fmt: skip
    return dream.returned(inputs, attention_mask, output, new_tokens, return_dict_in_generate)


def _generate(
    cache, model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor
):
    check_steps(steps, gen_length, block_length)
    output = dk.sample(
        model, prompt, max_new_tokens=gen_length, block_size=block_length, steps=steps, cache=cache,
        temperature=temperature, mask_id=mask_id, factor=factor,
        threshold=None if factor is not None else threshold,
        confidence=confidence_of("remasking", remasking, "low_confidence", "random"),
        **parity_at_zero(temperature, "fast_dllm", dict(stop_on_eos=False)),
    )  # fmt: skip
    nfe = output.forwards
    if cache == "dual":
        nfe += _complete_after_refresh(output, prompt.shape[1], gen_length, block_length)
    given = prompt_lengths(prompt, None)
    return beside_prompt(prompt, given, output.sequences, gen_length), nfe


def _complete_after_refresh(output, start: int, gen_length: int, block_length: int) -> int:
    """Blocks whose refresh filled them: the original makes one more forward before it looks."""
    steps = output.unmask_step[:, start : start + gen_length].unflatten(1, (-1, block_length))
    return int((steps.amin(2) == steps.amax(2)).all(0).sum())
