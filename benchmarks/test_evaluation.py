"""Evaluation of tiny-python against the ways that it replaces: requests one at a time."""

import functools
import random

import pytest
import torch
from lm_eval.api.instance import Instance

import dllm_kernels as dk
from benchmarks.likelihood_loop import one_request_at_a_time
from dllm_train.evaluate import DiffusionLM
from dllm_train.evaluate.likelihood import log_likelihoods
from dllm_train.recipes.tiny_python import data

ATTENTION = ("bidirectional", "block_causal")
CONTEXTS = (8, 32)
# The length of targets decides how many samples are equal: k targets have 2**k - 1 masks. By name: questions,
# answers to each, and the fewest and most tokens of an answer.
QUESTIONS = {"short answers": (125, 4, 1, 8), "long answers": (8, 4, 9, 32)}
SAMPLES = 128  # LLaDA's
# Of generation: how many, characters of a prompt, and tokens of an answer.
PROMPTS, CHARACTERS, NEW_TOKENS = 200, (20, 1200), (8, 64)


@functools.cache
def tiny_python(attention: str, implementation: str):
    """The embedded model on one implementation of attention."""
    model, _ = dk.load("tiny-python", attention=attention, dtype=torch.float32)
    model.set_attn_implementation(implementation)
    return model


def multiple_choice(
    questions: int, answers: int, fewest: int, most: int
) -> list[tuple[list[int], list[int]]]:
    """Random contexts with random answers, of all lengths alike."""
    draw = random.Random(0)
    requests = []
    for _ in range(questions):
        context = [draw.randrange(4000) for _ in range(draw.randint(*CONTEXTS))]
        for _ in range(answers):
            requests.append((context, [draw.randrange(4000) for _ in range(draw.randint(fewest, most))]))
    return requests


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("kind", QUESTIONS, ids=lambda kind: kind.replace(" ", "_"))
def test_likelihood(compare, smoke, kind, attention):
    questions, answers, fewest, most = QUESTIONS[kind]
    requests = multiple_choice(2 if smoke else questions, answers, fewest, most)
    samples = 4 if smoke else SAMPLES
    ours, plain = tiny_python(attention, "dllm"), tiny_python(attention, "sdpa")
    options = dict(
        mask_id=plain.config.mask_token_id,
        samples=samples,
        block_size=plain.config.diffusion["block_size"] if attention == "block_causal" else None,
    )

    def estimates():
        found = log_likelihoods(ours, requests, samples=samples)
        return torch.tensor([estimate.log_likelihood for estimate in found], dtype=torch.float64)

    compare(
        estimates,
        {"one request at a time": lambda: one_request_at_a_time(plain, requests, **options)},
        tolerance=dict(atol=1e-4, rtol=1e-5),
        title=f"{len(requests)} likelihoods, {kind} ({fewest} to {most} tokens), {attention}",
        rounds=1,
    )


def completions(count: int) -> list[Instance]:
    """Pieces of held-out Python files to go on from, up to an empty line."""
    draw, files = random.Random(0), data.split(data.collect_sources())[1]
    requests = []
    for index in range(count):
        text, length = draw.choice(files).text, draw.randint(*CHARACTERS)
        start = draw.randrange(max(1, len(text) - length))
        options = dict(until=["\n\n"], max_gen_toks=draw.randint(*NEW_TOKENS))
        arguments = (text[start : start + length], options)
        requests.append(Instance("generate_until", {}, arguments, 0, ("completions", index, 1)))
    return requests


def test_generation(compare, smoke):
    requests = completions(4 if smoke else PROMPTS)
    batched, alone = (DiffusionLM("tiny-python", threshold=0.9, batch_size=size) for size in ("auto", 1))

    def answers(lm: DiffusionLM) -> torch.Tensor:
        """The texts as bytes, one after the other."""
        return torch.tensor([*"\0".join(lm.generate_until(requests)).encode()])

    compare(
        lambda: answers(batched),
        {"one request at a time": lambda: answers(alone)},
        tolerance=dict(atol=0, rtol=0),
        title=f"{len(requests)} answers of {NEW_TOKENS[0]} to {NEW_TOKENS[1]} tokens, block_causal",
        rounds=1,
    )
