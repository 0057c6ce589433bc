"""dk.sample on a GPU: the tokens of the CPU, from steps in CUDA graphs and from those the host steers."""

import copy

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.models import fused_layers
from dllm_kernels.sampling import graph_loop
from dllm_kernels.sampling.graph_loop import graph_loop_of
from dllm_kernels.sampling.graphs import Launches, NotRecorded
from dllm_kernels.sampling.output import completion_output
from dllm_kernels.sampling.plan import make_plan
from dllm_kernels.sampling.prompts import completions
from dllm_kernels.sampling.slots import forget
from tests.sampling.tiny_models import EOS, prompts_of, tiny_model

pytestmark = pytest.mark.graph

OPTIONS = {
    "threshold": dict(threshold=0.3),
    "steps": dict(steps_per_block=4),
    "noise": dict(threshold=0.3, temperature=0.8, seed=5),
    "ends": dict(threshold=0.2, eos_ids=(EOS, 5, 17, 60)),
}


def both_places(**model):
    on_cpu = copy.deepcopy(tiny_model(**model))
    return on_cpu, copy.deepcopy(on_cpu).cuda()


def assert_same(output: dk.SampleOutput, expected: dk.SampleOutput) -> None:
    """Random models of this size are sure enough that no two scores lie within rounding."""
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.unmask_step, expected.unmask_step)
    assert torch.equal(output.row_forwards, expected.row_forwards)


def sampled_in_graphs(model, prompts, **options) -> dk.SampleOutput:
    plan = make_plan(model, None, None, options)
    canvases = completions(prompts, plan)
    finished = graph_loop_of(plan)(plan, canvases, plan.eos_ids).run()
    return completion_output(canvases, finished, plan.eos_ids, None)


KINDS = {
    "block": ("block_causal", "block"),
    "prefix": ("bidirectional", "prefix"),
    "dual": ("bidirectional", "dual"),
}
MORE_OPTIONS = {
    "schedule": dict(steps_per_block=3, schedule="dllm"),
    "shift and guidance": dict(steps_per_block=4, shift=True, cfg_scale=0.5),
    "filters": dict(threshold=0.3, temperature=0.7, top_p=0.9, top_k=20),
}
CASES = [(kind, OPTIONS[name]) for kind in KINDS for name in OPTIONS]
CASES += [(kind, MORE_OPTIONS[name]) for kind in KINDS for name in MORE_OPTIONS]
NAMES = [f"{kind}-{name}" for options in (OPTIONS, MORE_OPTIONS) for kind in KINDS for name in options]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=NAMES)
def test_every_kernel_of_a_round_together(gpu, kind, options):
    """Here the emulator takes the operators of a whole model, with rows that wait for a slot."""
    attention, cache = KINDS[kind]
    model, prompts = tiny_model(attention=attention), prompts_of(3, 17, 9)
    options = dict(max_new_tokens=9, block_size=8, max_batch=2, cache=cache, **options)
    expected = dk.sample(model, prompts, **options)
    with gpu.kernels():
        placed = copy.deepcopy(model).to(gpu.device)
        assert_same(sampled_in_graphs(placed, prompts, **options), expected)


def test_two_graphs_of_a_block(gpu, monkeypatch):
    monkeypatch.setattr(graph_loop, "FEW_TOKENS", 0)
    model, prompts = tiny_model(), prompts_of(3, 17, 9)
    options = dict(max_new_tokens=9, block_size=8, max_batch=2, threshold=0.3)
    expected = dk.sample(model, prompts, **options)
    with gpu.kernels():
        placed = copy.deepcopy(model).to(gpu.device)
        assert_same(sampled_in_graphs(placed, prompts, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_in_one_kernel_and_in_several(gpu, kind, monkeypatch):
    """Rotation, attention and the writes of bfloat16 layers: the same bits."""
    attention, cache = KINDS[kind]
    model = copy.deepcopy(tiny_model("llama", attention=attention)).bfloat16()
    assert dk.fuse_layers(model) > 0
    options = dict(max_new_tokens=9, block_size=8, max_batch=2, cache=cache, threshold=0.3)
    with gpu.kernels():
        together = sampled_in_graphs(copy.deepcopy(model).to(gpu.device), prompts_of(3, 17), **options)
        monkeypatch.setattr(fused_layers, "leave_rotation", lambda *_: False)
        apart = sampled_in_graphs(copy.deepcopy(model).to(gpu.device), prompts_of(3, 17), **options)
    assert_same(together, apart)


def test_sliding_windows_and_a_narrow_suffix(gpu):
    sliding = dict(sliding_window=11, use_sliding_window=True, max_window_layers=1)
    model, prompts = tiny_model(attention="bidirectional", **sliding), prompts_of(25, 7)
    options = dict(max_new_tokens=13, block_size=8, cache="dual", threshold=0.4)
    options |= dict(refresh_every=2, suffix_window=3)
    expected = dk.sample(model, prompts, **options)
    with gpu.kernels():
        placed = copy.deepcopy(model).to(gpu.device)
        assert_same(sampled_in_graphs(placed, prompts, **options), expected)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize(("kind", "options"), CASES, ids=NAMES)
def test_replayed_steps(kind, options, slots):
    attention, cache = KINDS[kind]
    on_cpu, on_gpu = both_places(attention=attention)
    prompts = prompts_of(1, 40, 33, 4, 17, 8, 16, 3, seed=2)
    options = dict(max_new_tokens=19, block_size=8, max_batch=slots, cache=cache, **options)
    assert_same(dk.sample(on_gpu, prompts, **options), dk.sample(on_cpu, prompts, **options))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_replayed_steps_of_two_graphs(slots, monkeypatch):
    """As with many rows: one over the active blocks, one over those before them too."""
    monkeypatch.setattr(graph_loop, "FEW_TOKENS", 0)
    on_cpu, on_gpu = both_places()
    prompts = prompts_of(1, 40, 33, 4, 17, 8, 16, 3, seed=2)
    options = dict(max_new_tokens=19, block_size=8, max_batch=slots, threshold=0.3)
    assert_same(dk.sample(on_gpu, prompts, **options), dk.sample(on_cpu, prompts, **options))


@pytest.fixture
def recorded(monkeypatch) -> list[torch.cuda.CUDAGraph]:
    graphs, record = [], Launches._graph_of
    monkeypatch.setattr(
        Launches, "_graph_of", lambda self, run: (graphs.append(record(self, run)), graphs[-1])[1]
    )
    return graphs


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_are_recorded_once_for_all_calls(recorded, monkeypatch, kind):
    attention, cache = KINDS[kind]
    on_cpu, on_gpu = both_places(attention=attention)
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replayed.append(1), replay(self))[1])
    options = dict(max_new_tokens=24, block_size=8, cache=cache)
    for seed in range(3):
        prompts = prompts_of(9, 12, seed=seed)
        output = dk.sample(on_gpu, prompts, **options)
        assert_same(output, dk.sample(on_cpu, prompts, **options))
        assert len(recorded) == {"block": 1, "prefix": 4, "dual": 3}[kind]
    assert len(replayed) >= 3 * int(output.row_forwards.max())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_moved_are_recorded_anew(recorded, kind):
    attention, cache = KINDS[kind]
    on_cpu, on_gpu = both_places(attention=attention)
    options, prompts = dict(max_new_tokens=16, block_size=8, cache=cache), prompts_of(9, 12)
    dk.sample(on_gpu, prompts, **options)
    before = len(recorded)
    for model in (on_cpu, on_gpu):
        model.lm_head.weight.data = model.lm_head.weight.data.roll(1, 0)
    assert_same(dk.sample(on_gpu, prompts, **options), dk.sample(on_cpu, prompts, **options))
    assert len(recorded) == 2 * before


def test_what_is_forgotten_is_freed():
    _, on_gpu = both_places(attention="bidirectional")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    dk.sample(on_gpu, prompts_of(9, 12), max_new_tokens=200, block_size=8, cache="dual", threshold=0.0)
    kept = torch.cuda.memory_allocated()
    forget(on_gpu)
    assert torch.cuda.memory_allocated() < kept and kept > before


def test_a_model_that_waits_for_the_device_is_left_to_the_host():
    def halved_by_the_host(module, inputs, output):
        return output * (0.5 if bool(output.isfinite().all()) else 1.0)

    on_cpu, on_gpu = both_places()
    for model in (on_cpu, on_gpu):
        model.model.norm.register_forward_hook(halved_by_the_host)
    options, prompts = dict(max_new_tokens=16, block_size=8), prompts_of(9, 12)
    with pytest.warns(UserWarning, match="Qwen3ForCausalLM cannot be recorded as a CUDA graph"):
        output = dk.sample(on_gpu, prompts, **options)
    assert_same(output, dk.sample(on_cpu, prompts, **options))
    assert_same(dk.sample(on_gpu, prompts, **options), output)


def test_a_recording_that_fails_keeps_no_memory():
    """Neither what it allocated, nor what other streams free later, as if the device were still capturing."""

    def allocates_and_waits():
        bool(torch.ones(1 << 26, dtype=torch.uint8, device="cuda")[0])

    reserved, side = [], torch.cuda.Stream()
    for _ in range(3):
        with pytest.raises(NotRecorded):
            Launches(torch.device("cuda", 0)).record("step", allocates_and_waits)
        torch.empty(1 << 26, dtype=torch.uint8, device="cuda").record_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[0]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block"])
def test_rounds_steered_by_the_host(cache):
    on_cpu, on_gpu = both_places(attention="block_causal" if cache == "block" else "bidirectional")
    options = dict(max_new_tokens=19, block_size=8, threshold=0.3, cache=cache, history=True)
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
