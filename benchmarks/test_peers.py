"""dk.sample against real checkouts of LLaDA, Fast-dLLM and dLLM: same weights, prompts and tokens.

pytest benchmarks -k peers --peer llada=DIR --peer fast-dllm=DIR --peer dllm=DIR

Every one commits one token per step in blocks of 32, at temperature 0. Completions must be equal before
anything is timed: `parity` makes our sampler follow the particulars of each. A checkout runs in its own
process, with as many threads as ours.
"""

import functools

import pytest
import torch

import dllm_kernels as dk
from benchmarks import test_sampling
from benchmarks.completions import tokens_to_end
from benchmarks.llada_shaped import END_ID, parameters, random_model
from benchmarks.peers.process import PeerProcess
from benchmarks.step_parts import STOCK, with_weights

BLOCK, PROMPT, NEW_TOKENS = 32, 256, 128
CACHES = {"none": "no cache", "prefix": "prefix cache", "dual": "dual cache", "block": "block cache"}
ROUNDS = 3  # a run without a cache takes half a minute

CASES = {  # peer, sampler, attention, our cache, parity, what dk.load(weights=) makes of our model
    "llada, generate": ("llada", "generate", "bidirectional", "none", "llada", STOCK),
    "dllm, MDLMSampler": ("dllm", "MDLMSampler", "bidirectional", "none", "dllm_mdlm", STOCK),
    "fast-dllm, prefix cache": ("fast-dllm", "prefix cache", "bidirectional", "prefix", "fast_dllm", STOCK),
    "fast-dllm, dual cache": ("fast-dllm", "dual cache", "bidirectional", "dual", "fast_dllm", STOCK),
    "dllm, BD3LMSampler": ("dllm", "BD3LMSampler", "block_causal", "block", "dllm_bd3lm", STOCK),
    "fast-dllm, prefix cache, packed": (
        "fast-dllm", "prefix cache", "bidirectional", "prefix", "fast_dllm", "float32",
    ),
    "fast-dllm, dual cache, packed": (
        "fast-dllm", "dual cache", "bidirectional", "dual", "fast_dllm", "float32",
    ),
}  # fmt: skip


@functools.cache
def model_of(attention: str, smoke: bool):
    """A random model of LLaDA's architecture, or a block-causal one of Qwen3's; 60M parameters each."""
    if attention == "block_causal":
        return test_sampling.random_model(attention, smoke)
    return random_model(*((2, 64, 128) if smoke else (8, 512, 32_000)))


@pytest.mark.parametrize("name, sampler, attention, cache, parity, weights", CASES.values(), ids=CASES)
def test_peer(compare, pick, smoke, peer, name, sampler, attention, cache, parity, weights):
    model, checkout = model_of(attention, smoke), peer(name)
    ours = with_weights(model, weights)
    length, new_tokens = pick((PROMPT, NEW_TOKENS), (BLOCK, 2 * BLOCK))
    mask_id = model.config.mask_token_id
    options = dict(max_new_tokens=new_tokens, block_size=BLOCK, steps=new_tokens, cache=cache, parity=parity)
    with PeerProcess(checkout, model, attention) as process:
        compare(
            lambda prompt: dk.sample(ours, [prompt], **options).sequences,
            {f"{checkout.title}, {sampler}": lambda prompt: process.sample(
                sampler, prompt, new_tokens, BLOCK, mask_id
            )},
            inputs=lambda: (torch.randint(2, mask_id, (length,)).tolist(),),
            title=f"{new_tokens} tokens, {parameters(model)} {attention} model, {CACHES[cache]}"
            + (f", weights={weights!r}" if weights != STOCK else ""),
            tolerance={"atol": 0, "rtol": 0},
            tokens=lambda ids: tokens_to_end(ids, length, END_ID),
            rounds=ROUNDS,
        )  # fmt: skip
