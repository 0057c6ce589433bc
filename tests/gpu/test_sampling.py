"""Sampling on a GPU, where every step is a replay of one graph, against the CPU, where the host steers."""

import copy
import threading

import pytest
import torch

import dllm_kernels as dk
from tests.sampling.tiny_models import EOS, prompts_of, tiny_model

OPTIONS = {
    "one token a step": dict(),
    "threshold": dict(threshold=0.3),
    "steps": dict(steps_per_block=3),
    "noise": dict(threshold=0.3, temperature=0.8, seed=5),
    "slots that rows wait for": dict(threshold=0.2, max_batch=2, eos_ids=(EOS, 5, 17, 60)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_tokens_are_those_of_the_cpu(architecture, options):
    model, prompts = tiny_model(architecture), prompts_of(1, 40, 33, 4, 17)
    options = dict(max_new_tokens=19, block_size=8) | options
    expected = dk.sample(model, prompts, **options)
    output = dk.sample(copy.deepcopy(model).cuda(), prompts, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.unmask_step, expected.unmask_step)
    assert torch.equal(output.row_forwards, expected.row_forwards)


def test_a_thread_that_has_launched_nothing():
    """The driver knows no context there when the first kernel is launched."""
    q = torch.randn(1, 2, 130, 64, device="cuda", dtype=torch.bfloat16)
    mask = dk.SpanMask.causal(130).to("cuda")
    results = [dk.block_attention(q, q, q, mask)]
    thread = threading.Thread(target=lambda: results.append(dk.block_attention(q, q, q, mask)))
    thread.start()
    thread.join()
    assert torch.equal(*results)
