"""`generate` of LLaDA's generate.py."""

from __future__ import annotations

from torch import Tensor

import dllm_kernels as dk
from dllm_kernels._arguments import integer
from dllm_kernels.compat.tensors import (
    beside_prompt,
    check_tokens,
    confidence_of,
    drawn_seed,
    parity_at_zero,
    prompt_lengths,
)
from dllm_kernels.models.wrappers import is_transformers_model
from dllm_kernels.sampling.plan import model_with_diffusion

LLADA_EOS_IDS = 126081, 126348  # of a function, which names no tokens: as in the original


def generate(
    model,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
) -> Tensor:
    """Return int64 [B, S + gen_length]: `prompt` [B, S] and its completions, with no stop at the end token.

    logits_eos_inf: the model's first end token is never proposed. confidence_eos_eot_inf: all of them only
    with confidence 0. The end tokens of a function of ids are LLaDA's.
    """
    check_tokens("prompt", prompt)
    check_steps(steps, gen_length, block_length)
    model, diffusion = model_with_diffusion(model)
    eos_ids = diffusion.eos_ids if is_transformers_model(model) else LLADA_EOS_IDS
    output = dk.sample(
        model, prompt, attention_mask=attention_mask, max_new_tokens=gen_length, block_size=block_length,
        steps=steps, temperature=temperature, seed=drawn_seed(temperature or remasking == "random"),
        cfg_scale=cfg_scale, mask_id=mask_id,
        confidence=confidence_of("remasking", remasking, "low_confidence", "random"),
        suppress_tokens=eos_ids[:1] if logits_eos_inf else (),
        begin_suppress_tokens=eos_ids if confidence_eos_eot_inf else (),
        **parity_at_zero(temperature, "llada", dict(cache="none", stop_on_eos=False)),
    )  # fmt: skip
    given = prompt_lengths(prompt, attention_mask)
    return beside_prompt(prompt, given, output.sequences, gen_length)


def check_steps(
    steps: int, gen_length: int, block_length: int, length: str = "gen_length", size: str = "block_length"
) -> None:
    """Refuse blocks and steps that do not divide evenly, as LLaDA does.

    length, size: the names of gen_length and block_length in errors.
    """
    for name, value in (("steps", steps), (length, gen_length), (size, block_length)):
        integer(name, value, 1)
    if gen_length % block_length:
        raise ValueError(f"{length} {gen_length} must be a multiple of {size} {block_length}")
    blocks = gen_length // block_length
    if steps % blocks:
        raise ValueError(f"steps {steps} must be a multiple of the {blocks} blocks")
