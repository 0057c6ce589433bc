"""Linear layers of few rows on a GPU beside those of torch; a decoder layer, its projections merged and as
transformers has it."""

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import dllm_kernels as dk
from dllm_kernels.models.merged_projections import merge_projections

WARM_UP = 3
LLADA_8B = dict(hidden_size=4096, intermediate_size=12_288, num_attention_heads=32)
TINY = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)


def as_one_launch(run, device):
    """`run` as sampling launches it: replayed from a CUDA graph; on a CPU by itself."""
    if device == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay():
        graph.replay()
        return output

    return replay


@pytest.mark.parametrize("rows", [32, 256])
@torch.no_grad()
def test_merged_projections(compare, pick, device, rows):
    """All of the layer but its place in a model: `rows` tokens that attend to each other."""
    rows, dtype = pick(rows, 4), pick(torch.bfloat16, torch.float32)
    config = LlamaConfig(**pick(LLADA_8B, TINY), attn_implementation="sdpa")
    with torch.device(device):
        stock = LlamaDecoderLayer(config, layer_idx=0).to(dtype).eval()
        angles = LlamaRotaryEmbedding(config)(torch.empty((), dtype=dtype), torch.arange(rows)[None])
        x = torch.randn(1, rows, config.hidden_size, dtype=dtype)
    merged = copy.deepcopy(stock)
    assert merge_projections(merged) == 2

    def launch(layer):
        return as_one_launch(lambda: layer(x, position_embeddings=angles), device)

    compare(
        launch(merged),
        {"seven products": launch(stock)},
        title=f"decoder layer, merged projections, {rows} rows",
        flops=2 * rows * sum(p.numel() for p in stock.parameters() if p.dim() == 2),
        bytes=sum(p.nbytes for p in stock.parameters()),
        tolerance={"atol": 5e-2, "rtol": 5e-2},
    )


LAYERS = {"qkv": (4096, 12_288), "o": (4096, 4096), "gate and up": (4096, 24_576), "down": (12_288, 4096)}


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "fp8"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rows", [32, 64, 1200])
def test_skinny_linear(compare, pick, device, rows, layer, weights):
    """The layers of LLaDA-8B for a block, two and a canvas; bytes also against the bfloat16 weight that they
    stand for. fp8 rounds x too, and is multiplied on CUDA alone."""
    if weights == "fp8" and device == "cpu":
        pytest.skip("fp8 is multiplied on CUDA")
    rows, (inputs, outputs) = pick(rows, 4), pick(LAYERS[layer], (128, 96))

    def problem():
        x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
        if weights == "bfloat16":
            return x, weight, None, weight
        dtype = torch.int8 if weights == "int8" else torch.float8_e4m3fn
        weight8, scales = dk.quantize_weight(weight, dtype=dtype)
        return x, weight8, scales, (weight8.float() * scales).bfloat16()

    compare(
        lambda x, weight, scales, _: dk.skinny_linear(x, weight, scales=scales),
        {"F.linear, bfloat16": lambda x, weight, scales, wide: torch.nn.functional.linear(x, wide)},
        inputs=problem,
        title=f"skinny_linear, {rows} rows, {layer}, {weights}",
        flops=2 * rows * inputs * outputs,
        bytes=inputs * outputs * (2 if weights == "bfloat16" else 1),
        tolerance={"atol": 2e-1 if weights == "fp8" else 5e-2, "rtol": 5e-2},
    )
