"""dk.sample on a GPU: the tokens of the CPU, from rounds in a CUDA graph and from those the host steers."""

import copy

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling import device_rounds
from dllm_kernels.sampling.canvases import completions
from dllm_kernels.sampling.job import prepare
from dllm_kernels.sampling.output import completion_output
from tests.sampling.tiny_models import EOS, prompts_of, tiny_model

OPTIONS = {
    "threshold": dict(threshold=0.3),
    "steps": dict(steps_per_block=4),
    "noise": dict(threshold=0.3, temperature=0.8, seed=5),
    "ends": dict(threshold=0.2, eos_ids=(EOS, 5, 17, 60)),
}


def both_places(**model):
    on_cpu = tiny_model(**model)
    return on_cpu, copy.deepcopy(on_cpu).cuda()


def assert_same(output: dk.SampleOutput, expected: dk.SampleOutput) -> None:
    """Random models of this size are sure enough that no two scores lie within rounding."""
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.unmask_step, expected.unmask_step)
    assert torch.equal(output.row_forwards, expected.row_forwards)


def rounds_on_the_device(model, prompts, **options) -> dk.SampleOutput:
    job = prepare(model, None, None, options)
    canvases = completions(prompts, job)
    rounds = device_rounds.DeviceRounds(job, canvases, job.eos_ids)
    rounds.run()
    return completion_output(canvases, rounds.unmask_step, job.eos_ids, None, **rounds.measured())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kernel_of_a_round_together(gpu, options):
    """Here the emulator takes the operators of a whole model, with rows that wait for a slot."""
    model, prompts = tiny_model(), prompts_of(3, 17, 9)
    options = dict(max_new_tokens=9, block_size=8, max_batch=2, **options)
    expected = dk.sample(model, prompts, **options)
    with gpu.kernels():
        placed = copy.deepcopy(model).to(gpu.device)
        assert_same(rounds_on_the_device(placed, prompts, **options), expected)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replayed_rounds(options, slots):
    on_cpu, on_gpu = both_places()
    prompts = prompts_of(1, 40, 33, 4, 17, 8, 16, 3, seed=2)
    options = dict(max_new_tokens=19, block_size=8, max_batch=slots, **options)
    assert_same(dk.sample(on_gpu, prompts, **options), dk.sample(on_cpu, prompts, **options))


def test_rounds_are_recorded_once_and_replayed(monkeypatch):
    _, on_gpu = both_places()
    recorded, replayed = [], []
    run = device_rounds.DeviceRounds.step
    monkeypatch.setattr(device_rounds.DeviceRounds, "step", lambda self: (recorded.append(1), run(self))[1])
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replayed.append(1), replay(self))[1])
    output = dk.sample(on_gpu, prompts_of(9, 12), max_new_tokens=24, block_size=8)
    assert len(recorded) <= 4 and len(replayed) >= int(output.row_forwards.max())


CACHES = [("bidirectional", "none"), ("bidirectional", "dual"), ("block_causal", "none")]


@pytest.mark.parametrize("attention, cache", CACHES)
def test_rounds_steered_by_the_host(attention, cache):
    on_cpu, on_gpu = both_places(attention=attention)
    options = dict(max_new_tokens=19, block_size=8, threshold=0.3, cache=cache)
    prompts = prompts_of(1, 30, 12)
    assert_same(dk.sample(on_gpu, prompts, **options), dk.sample(on_cpu, prompts, **options))


def test_a_callback_sees_every_round():
    _, on_gpu = both_places()
    seen = []
    watch = dict(on_round=lambda event: seen.append(event.forwards))
    output = dk.sample(on_gpu, prompts_of(9), max_new_tokens=8, block_size=8, **watch)
    assert seen == list(range(1, output.forwards + 1))


def test_bfloat16():
    on_gpu = both_places(head_dim=64)[1].to(torch.bfloat16)
    output = dk.sample(on_gpu, prompts_of(30, 7), max_new_tokens=20, block_size=8, threshold=0.5)
    assert not (output.sequences == 119).any()
