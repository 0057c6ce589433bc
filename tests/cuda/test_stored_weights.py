"""Models whose linear layers store their weights on the device: sampled by the CUDA kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models.grouped_layers import group_layers
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from dllm_kernels.ops.skinny_linear import RowMajorWeight, dequantize_weight
from tests.sampling.tiny_models import prompts_of, tiny_model

pytestmark = pytest.mark.graph

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
OPTIONS = dict(max_new_tokens=9, block_size=8, threshold=0.3)
CACHES = [("block_causal", "block"), ("bidirectional", "dual")]


class RoundedLinear(nn.Linear):
    """What a stored layer of some kind stands for: fp8 rounds x too."""

    def forward(self, x):
        if self.kind == "fp8":
            scales = x.abs().amax(-1, keepdim=True) / 448
            x = (x / scales).to(torch.float8_e4m3fn).to(x.dtype) * scales
        return F.linear(x, self.weight, self.bias)


def rounded(model, kind: str):
    """The stock model with the weights and products that `kind` stands for, on the CPU."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name != "lm_head" or kind in ("int8", "fp8")):
            weight = module.weight.data
            if kind in ("int8", "fp8"):
                weight = dequantize_weight(*dk.quantize_weight(weight, dtype=KINDS[kind]))
            module.weight.data = weight.to(KINDS[kind]).float() if kind == "bfloat16" else weight
            module.__class__, module.kind = RoundedLinear, kind
    return model


def stored_on(gpu, model, kind: str):
    """A copy of `model` on the GPU with stored weights, in rows; on the emulator, on the CPU."""
    model = copy.deepcopy(model).to(gpu.device)
    if not gpu.emulated:
        store_weights(model, kind)
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (name != "lm_head" or kind in ("int8", "fp8")):
            weight, scales = module.weight.data, None
            if kind in ("int8", "fp8"):
                weight, scales = dk.quantize_weight(weight, dtype=KINDS[kind])
            rows = RowMajorWeight(weight.to(KINDS[kind]), scales)
            model.set_submodule(name, StoredLinear(rows, KINDS[kind], module.bias).eval())
    return model


@pytest.mark.parametrize("attention, cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_rounded_model(gpu, kind, attention, cache):
    model, prompts = tiny_model(attention=attention), prompts_of(3, 17, 9)
    expected = dk.sample(rounded(model, kind), prompts, cache=cache, **OPTIONS)
    with gpu.kernels():
        found = dk.sample(stored_on(gpu, model, kind), prompts, cache=cache, **OPTIONS)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_groups_write_the_same(gpu, kind):
    model, prompts = tiny_model(attention="bidirectional"), prompts_of(3, 17, 9)
    expected = dk.sample(rounded(model, kind), prompts, cache="dual", **OPTIONS)
    grouped = stored_on(gpu, model, kind)
    assert group_layers(grouped) == 2 * len(grouped.model.layers)
    with gpu.kernels():
        assert torch.equal(dk.sample(grouped, prompts, cache="dual", **OPTIONS).sequences, expected.sequences)


# ---- on a GPU alone ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_are_loaded_on_the_gpu(kind, tmp_path):
    dk.save(tiny_model(), None, tmp_path / "float")
    model, _ = dk.load(tmp_path / "float", device="cuda", weights=kind)
    layers = [module for module in model.modules() if isinstance(module, StoredLinear)]
    assert len(layers) >= 7 and all(layer.weight.is_cuda for layer in layers)
    dk.save(model, None, tmp_path / "stored")
    again, _ = dk.load(tmp_path / "stored", device="cuda", weights=kind)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), again.state_dict()[name].view(torch.uint8))
    prompts = prompts_of(3, 17)
    plain = dk.sample(model, prompts, **OPTIONS).sequences
    assert torch.equal(dk.sample(again, prompts, **OPTIONS).sequences, plain)
    compiled = dk.sample(model, prompts, compile=True, **OPTIONS).sequences
    assert compiled.shape == plain.shape


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_model_may_move_to_the_gpu_and_back(kind):
    model = copy.deepcopy(tiny_model())
    store_weights(model, kind)
    group_layers(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.cuda()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.is_cuda and type(layer) is StoredLinear
    with torch.no_grad():
        assert layer(torch.randn(3, 32, device="cuda")).is_cuda
    model.cpu()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
