"""dk.sample and dk.infill: tokens against the plain loop, and options that are refused by name."""

from __future__ import annotations

import math
from dataclasses import fields

import torch

import dllm_kernels as dk
from dllm_kernels.sampling import plain_loop
from fuzzing.draw import Draw, Finding
from fuzzing.spoiling import check_refusal
from tests.sampling.tiny_models import EOS, MASK, PAD, tiny_model

ATTENTIONS = {"bidirectional": ("none", "prefix", "dual"), "block_causal": ("none", "block")}
ACCEPTANCE = (
    {}, {"steps_per_block": 3}, {"threshold": 0.3},
    {"threshold": 0.2, "confidence": "margin", "strict": True},
    {"factor": 1.2}, {"entropy_bound": 1.0}, {"rule": "bernoulli", "steps_per_block": 5},
    {"steps_per_block": 4, "confidence": "random"}, {"threshold": 0.2, "kl_threshold": 0.5},
    {"threshold": 0.3, "edit_threshold": 0.3},
    {"rule": "quota_or_threshold", "threshold": 0.5, "steps_per_block": 3},
    {"steps_per_block": 3, "schedule": "dllm", "stochastic": True},
    {"steps_per_block": 3, "schedule": "dream"},
)  # fmt: skip
WRONG = (
    -1, 0, 2**31, 2**63, -0.5, math.nan, math.inf, 1e300, "text", "", None, [], [-1], [2**40], ["a"], (),
    {}, True, object(), torch.zeros(2), b"x",
)  # fmt: skip


def _options(draw: Draw, cache: str) -> dict:
    options = {"seed": draw.integer(0, 2**40), "cache": cache, "block_size": draw.integer(1, 9)}
    options |= draw.choice(ACCEPTANCE)
    if draw.chance(0.3):
        options["temperature"] = draw.choice([0.5, 1.0])
    if draw.chance(0.2):
        options["top_k"] = draw.integer(1, 40)
    if draw.chance(0.2):
        options["cfg_scale"] = 0.7
    if draw.chance(0.2):
        options["shift"] = True
    if draw.chance(0.2):
        options["suppress_tokens"] = tuple(range(0, 110, 2))
    if draw.chance(0.3):
        options["max_batch"] = draw.integer(1, 3)
    if cache in ("prefix", "dual") and draw.chance(0.5):
        options["refresh_every"] = draw.integer(1, 3)
    return options


def _prompts(draw: Draw) -> list[list[int]]:
    return [[draw.integer(0, PAD - 1) for _ in range(draw.integer(1, 20))] for _ in range(draw.integer(1, 4))]


def valid(draw: Draw) -> None:
    attention = draw.choice([*ATTENTIONS])
    model = tiny_model(draw.choice(["qwen3", "llama"]), attention)
    options = _options(draw, draw.choice(ATTENTIONS[attention]))
    prompts, infilled = _prompts(draw), draw.chance(0.3)
    if infilled:
        prompts = [[MASK if draw.chance(0.4) else token for token in prompt] for prompt in prompts]
        config = dk.SampleConfig(**options)
        rows = [plain_loop.infill_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
        output = dk.infill(model, prompts, config=config)
    else:
        eos_ids = draw.choice([(EOS,), (EOS, *range(20, 34))])
        config = dk.SampleConfig(max_new_tokens=draw.integer(1, 16), eos_ids=eos_ids, **options)
        rows = [plain_loop.sample_row(model, p, config, sequence=i) for i, p in enumerate(prompts)]
        output = dk.sample(model, prompts, config=config)
    for index, row in enumerate(rows):
        found = output.sequences[index, : len(row.ids)].tolist()
        if found != row.ids and not row.near_ties:
            raise Finding(f"row {index} of {config} is {found}, that of the plain loop {row.ids}")


def invalid(draw: Draw) -> None:
    attention = draw.choice([*ATTENTIONS])
    model, names = tiny_model(attention=attention), [field.name for field in fields(dk.SampleConfig)]
    options = {"max_new_tokens": 4, **_options(draw, draw.choice(ATTENTIONS[attention]))}
    for name in draw.some([name for name in names if name != "compile"], 2):
        options[name] = draw.choice(WRONG)
    wrong = ([], [[]], "text", None, 3, [[-1]], [[2**40]], [[0.5]], torch.zeros(2), [None], [["a"]])
    prompts = draw.choice([_prompts(draw), draw.choice(wrong)])
    try:
        dk.sample(model, prompts, **options)
    except Exception as error:
        check_refusal(error, [*names, "prompts", "prompt", "tokenizer", "row"], "sample")
