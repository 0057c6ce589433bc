"""Tokens are those that the originals returned on the same models, in every case that can be repeated."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.compat import dllm, dream, fast_dllm, llada

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MASK = 299

# Recorded cases that cannot be repeated, and why.
RANDOM = "drawn by another generator of random numbers"
MASKS_LEFT = "the original leaves masks, where every mask is filled here"
REASONS = {
    "remasking_random_seed0": RANDOM,
    "temperature1_seed0": RANDOM,
    "origin_seed0": RANDOM,
    "llada_tiny_random_remasking_seed0": RANDOM,
    "llada_tiny_stochastic_transfer_seed0": RANDOM,
    "mask_in_prompt": "a mask in the prompt is an error here: infill fills gaps",
}


@functools.cache
def loaded(name):
    return dk.load(GOLDEN / "models" / name, device="cpu")[0]


def cases(group: str) -> list:
    """The cases of a group, as parameters."""
    found = []
    for name, case in json.loads((GOLDEN / "sampling" / f"{group}.json").read_text()).items():
        reason = REASONS.get(name)
        if reason is None and case.get("n_masks_left"):
            reason = MASKS_LEFT
        found.append(pytest.param(case, id=name, marks=[pytest.mark.skip(reason)] if reason else []))
    return found


def options(case, *left_out):
    """The settings of a case, without the special tokens and what only describes the recording."""
    described = {"mask_id", "eos_id", "pad_id", "bos_id", "softmax_dtype", "cache", "scheduler", "hook"}
    return {name: value for name, value in case["settings"].items() if name not in described | {*left_out}}


def rolled_by_the_step(step, x, logits):
    return logits.roll(step, -1) * 0.5


def last_token_is_11(step, x, logits):
    if step is None:
        x[:, -1] = 11
    return x


HOOKS = {
    None: {},
    "logits rolled by the step": dict(generation_logits_hook_func=rolled_by_the_step),
    "last token is 11": dict(generation_tokens_hook_func=last_token_is_11),
}


def hooks(case):
    """The hooks that a case was recorded with."""
    return HOOKS[case["settings"].get("hook")]


def assert_as_recorded(found, case):
    """Tokens, and where they were recorded the canvases of every step."""
    history = None
    if not isinstance(found, torch.Tensor):
        history = found.history if isinstance(found, dream.DreamModelOutput) else found.histories
        found = found.sequences
    assert found.tolist() == case["output_ids"]
    if "histories" in case:
        assert [canvas.tolist() for canvas in history] == case["histories"]


@pytest.mark.parametrize("case", cases("llada_generate"))
def test_llada(case):
    model, prompt = loaded(case["model"]), torch.tensor(case["prompt_ids"])
    settings = options(case, "attention_mask")
    mask = case["settings"]["attention_mask"]
    mask = torch.ones_like(prompt) if mask == "ones" else None if mask is None else torch.tensor(mask)
    if case["settings"]["softmax_dtype"] == "float64":
        output = dk.sample(
            model, prompt, max_new_tokens=settings["gen_length"], block_size=settings["block_length"],
            steps=settings["steps"], parity="llada_fp64",
        )  # fmt: skip
        found = output.sequences
    else:
        found = llada.generate(model, prompt, mask, mask_id=MASK, **settings)
    assert found.tolist() == case["output_ids"]


@pytest.mark.parametrize("case", cases("fastdllm_llada"))
def test_fast_dllm(case):
    generate = {
        "none": fast_dllm.generate,
        "prefix": fast_dllm.generate_with_prefix_cache,
        "dual": fast_dllm.generate_with_dual_cache,
    }[case["settings"]["cache"]]
    prompt = torch.tensor(case["prompt_ids"])
    x, nfe = generate(loaded(case["model"]), prompt, mask_id=MASK, **options(case))
    assert x.tolist() == case["output_ids"]
    assert nfe == case["nfe"]


@pytest.mark.parametrize("case", cases("fastdllm_dream"))
def test_fast_dllm_dream(case):
    model, prompt = loaded(case["model"]), torch.tensor(case["prompt_ids"])
    assert fast_dllm.diffusion_generate(model, prompt, **options(case)).tolist() == case["output_ids"]


@pytest.mark.parametrize("case", cases("dream_diffusion_generate"))
def test_dream(case):
    model, prompt = loaded(case["model"]), torch.tensor(case["prompt_ids"])
    settings = options(case, "attention_mask")
    mask = case["settings"].get("attention_mask")
    mask = None if mask is None else torch.tensor(mask)
    found = dream.diffusion_generate(model, prompt, attention_mask=mask, **settings, **hooks(case))
    assert_as_recorded(found, case)


@pytest.mark.parametrize("case", cases("llada2"))
def test_llada2(case):
    """LLaDA2's generate returns the completion alone, up to its first end token."""
    settings, (prompt,) = case["settings"], case["prompt_ids"]
    model = dk.load(GOLDEN / "models" / case["model"], device="cpu", attention="block_causal")[0]
    new_tokens = settings["gen_length"]
    output = dk.sample(
        model, [prompt], parity="llada2", threshold=settings["threshold"], max_new_tokens=new_tokens,
        block_size=settings["block_length"], mask_id=MASK, eos_ids=settings["eos_id"],
        steps_per_block=min(settings["steps"], new_tokens // settings.get("minimal_topk", 1)),
    )  # fmt: skip
    end = len(prompt) + min(int(output.lengths) + 1, new_tokens)
    assert output.sequences[:, len(prompt) : end].tolist() == case["output_ids"]


SAMPLERS = {
    "dllm_mdlm": dllm.MDLMSampler,
    "dllm_infill": dllm.MDLMSampler,
    "dllm_bd3lm": dllm.BD3LMSampler,
    "dllm_dream": dllm.DreamSampler,
    "dllm_fastdllm_llada": dllm.FastdLLMLLaDASampler,
    "dllm_fastdllm_dream": dllm.FastdLLMDreamSampler,
}


@pytest.mark.parametrize(
    ("group", "case"),
    [
        pytest.param(group, *case.values, id=f"{group}-{case.id}", marks=case.marks)
        for group in SAMPLERS
        for case in cases(group)
    ],
)
def test_dllm(group, case):
    special = SimpleNamespace(
        **{f"{token}_token_id": case["settings"][f"{token}_id"] for token in ("mask", "eos", "pad")}
    )
    sampler = SAMPLERS[group](loaded(case["model"]), special, scheduler=case["settings"]["scheduler"])
    fills = group == "dllm_infill" or any(MASK in row for row in case["prompt_ids"])
    generate = sampler.infill if fills else sampler.sample
    assert_as_recorded(generate(case["prompt_ids"], **options(case), **hooks(case)), case)
