"""Merged projections under the CUDA kernels, which read queries, keys and values as slices of one product."""

import copy

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.models.merged_projections import merge_projections
from tests.sampling.tiny_models import prompts_of, tiny_model

pytestmark = pytest.mark.graph

OPTIONS = dict(max_new_tokens=9, block_size=8, threshold=0.3)
CACHES = [("block_causal", "block"), ("bidirectional", "none"), ("bidirectional", "dual")]


def merged_copy(model, device):
    model = copy.deepcopy(model).to(device)
    assert merge_projections(model) == 2 * len(model.model.layers)
    return model


@pytest.mark.parametrize("attention, cache", CACHES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_sampling(gpu, architecture, attention, cache):
    model, prompts = tiny_model(architecture, attention), prompts_of(3, 17, 9)
    expected = dk.sample(model, prompts, cache=cache, **OPTIONS)
    with gpu.kernels():
        found = dk.sample(merged_copy(model, gpu.device), prompts, cache=cache, **OPTIONS)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.unmask_step, expected.unmask_step)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_of_a_merged_layer(compiled):
    """Recording forbids every wait for the device; the replay reads what lies in the weights then."""
    stock = copy.deepcopy(tiny_model("llama")).cuda()
    merged = merged_copy(stock, "cuda")
    x = torch.randn(2, 12, 32, device="cuda")
    angles = stock.model.rotary_emb(x, torch.arange(12, device="cuda")[None])

    def run(layer):
        with torch.no_grad():
            return layer(x, position_embeddings=angles)

    layer = torch.compile(merged.model.layers[0], fullgraph=True) if compiled else merged.model.layers[0]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(layer)
    for model in (stock, merged):
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(output, run(stock.model.layers[0]), atol=1e-3, rtol=1e-3)
