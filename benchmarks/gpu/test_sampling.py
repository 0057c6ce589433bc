"""A step of sampling on a GPU, and whole runs, on a random model in the shape of LLaDA-8B."""

import functools
from collections import deque

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dllm_kernels as dk
from benchmarks import loops
from dllm_kernels.models.merged_projections import merge_projections
from dllm_kernels.sampling.graph_loop import BlockLoop, RefreshLoop
from dllm_kernels.sampling.plan import make_plan
from dllm_kernels.sampling.prompts import completions

BLOCK = 32
LAYERS = {  # merged projections, fused layers, compiled
    "stock": (False, False, False),
    "compiled": (False, False, True),
    "merged-compiled": (True, False, True),
    "merged-fused": (True, True, False),
}
NAMES = {
    "stock": "stock layers",
    "compiled": "stock layers, torch.compile",
    "merged-compiled": "merged projections, torch.compile",
    "merged-fused": "merged projections, fused layers",
}
CACHES = {"block": "block_causal", "dual": "bidirectional"}
LLADA_8B = dict(hidden=4096, intermediate=12_288, layers=32, heads=32, vocabulary=126_464)
TINY = dict(hidden=32, intermediate=64, layers=2, heads=2, vocabulary=120)


@functools.lru_cache(maxsize=1)  # one of them fills a good part of a GPU
def random_model(
    device: str, smoke: bool, attention: str, merged: bool = False, fused: bool = False
) -> LlamaForCausalLM:
    """bfloat16 (a smoke run: tiny, float32)."""
    shape = TINY if smoke else LLADA_8B
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        mask_token_id=shape["vocabulary"] - 1,
        diffusion={"attention": [attention], "block_size": BLOCK},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model = loops.see_both_ways(model.to(torch.float32 if smoke else torch.bfloat16).eval())
    if merged:
        merge_projections(model)
    if fused:
        dk.fuse_layers(model)
    return model


def random_prompt(model, length: int) -> list[int]:
    return torch.randint(1, model.config.vocab_size - 1, (length,)).tolist()


def parameter_bytes(model) -> int:
    """Read in every step: all weights but the embedding."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


@pytest.mark.parametrize("layers", LAYERS)
def test_step(compare, pick, smoke, device, layers):
    """One denoising step of one row with `length` tokens before its block: ours is one launch."""
    *changed, compile = LAYERS[layers]
    model, length = random_model(device, smoke, "block_causal", *changed), pick(1184, 2 * BLOCK)
    plan = make_plan(model, None, None, dict(max_new_tokens=BLOCK, steps_per_block=10**6, compile=compile))
    prompt = random_prompt(model, length)
    canvas = torch.tensor([prompt + [plan.mask_id] * BLOCK], device=device)
    loop = BlockLoop(plan, completions([prompt], plan))
    with loop.prepared():
        loop.admit(deque([0]))
        for _ in range(BLOCK + 1):  # with so many steps, those after the first few commit nothing
            loop.launch()
            loop.slots.canvas[:, : canvas.shape[1]].copy_(canvas)
        compare(
            loop.launch,
            {"eager block, cache copied": loops.block_step(model, canvas, BLOCK, plan.mask_id)},
            title=f"one step, block cache, {length} tokens before, {NAMES[layers]}",
            bytes=parameter_bytes(model),
        )


@pytest.mark.parametrize("layers", LAYERS)
def test_dual_step(compare, pick, smoke, device, layers):
    """The same with a dual cache: two launches, and two flags that the host waits for."""
    *changed, compile = LAYERS[layers]
    model, length = random_model(device, smoke, "bidirectional", *changed), pick(1184, 2 * BLOCK)
    plan = make_plan(
        model, None, None, dict(max_new_tokens=BLOCK, cache="dual", threshold=1.0, compile=compile)
    )
    prompt = random_prompt(model, length)
    canvas = torch.tensor([prompt + [plan.mask_id] * BLOCK], device=device)
    loop = RefreshLoop(plan, completions([prompt], plan))

    def step() -> None:
        loop.step()
        loop.slots.canvas[:, : canvas.shape[1]].copy_(canvas)
        loop.live[0].masks = BLOCK

    with loop.prepared():
        loop.admit(deque([0]))
        loop.step()
        compare(
            step,
            {"eager block, cache copied": loops.block_step(model, canvas, BLOCK, plan.mask_id)},
            title=f"one step, dual cache, {length} tokens before, {NAMES[layers]}",
            bytes=parameter_bytes(model),
        )


@pytest.mark.parametrize("threshold", [0.9])
@pytest.mark.parametrize("cache", CACHES)
def test_sampling(compare, pick, smoke, device, cache, threshold):
    """Whole runs of a random model: it is never sure, so every step commits one token in either loop."""
    model, length, new_tokens = random_model(device, smoke, CACHES[cache]), *pick((512, 128), (BLOCK, BLOCK))
    prompt, mask_id = random_prompt(model, length), model.config.mask_token_id
    compare(
        lambda: dk.sample(model, [prompt], max_new_tokens=new_tokens, threshold=threshold, cache=cache),
        {"plain loop": lambda: loops.plain_loop(model, prompt, new_tokens, BLOCK, mask_id)},
        title=f"{new_tokens} tokens after {length}, {cache} cache",
        rounds=3,
    )
