"""Selective checkpointing recomputes what is cheap, and changes no bit of a gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_train import DiffusionTrainingArguments, bd3lm_loss, mdlm_loss, sample_noise
from dllm_train.selective_checkpointing import checkpoint_selectively
from tests.train.tiny_models import MASK, tiny
from tests.train.trainer_runs import Gradients, trainer

NAMES = ("llama", "qwen2-windows", "qwen3-moe", "gpt2", "phi", "bert", "modernbert")


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name().split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return operator(*args, **(kwargs or {}))


def gradients_and_calls(model, block_size=None):
    ids = torch.randint(3, MASK, (2, 12), generator=torch.Generator().manual_seed(0))
    noise = sample_noise(ids, range(2), block_size=block_size)
    blocks = {} if block_size is None else {"block_size": block_size}
    loss_of = mdlm_loss if block_size is None else bd3lm_loss
    model.zero_grad()
    with Calls() as calls:
        loss_of(model, ids, mask_id=MASK, noise=noise, **blocks).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls.counts


@pytest.mark.parametrize("attention", ["dllm", "sdpa"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_only_the_product_after_attention_is_computed_again(attention, block_size):
    model = tiny("llama", attention=attention).train()
    gradients_and_calls(model, block_size)  # the first call tries the head
    expected, whole = gradients_and_calls(model, block_size)
    checkpoint_selectively(model)
    found, selective = gradients_and_calls(model, block_size)
    layers = model.config.num_hidden_layers
    assert selective["aten::mm"] == whole["aten::mm"] + layers
    assert selective["aten::silu"] == whole["aten::silu"] + layers
    kernel = "dllm_kernels::block_attention" if attention == "dllm" else None
    kernel = kernel or next(name for name in whole if name.startswith("aten::_scaled_dot_product"))
    assert selective[kernel] == whole[kernel] == layers
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("name", NAMES)
def test_trainers_take_the_same_gradients(name, tmp_path):
    kept = Gradients(), Gradients()
    for of_one, selective in zip(kept, (False, True), strict=True):
        model = tiny(name, gain=2.0, attention="dllm")
        trainer(tmp_path, model=model, callbacks=[of_one], selective_checkpointing=selective).train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == selective
    for parameter, gradient in kept[0].steps[0].items():
        assert torch.equal(kept[1].steps[0][parameter], gradient), parameter


def test_it_takes_the_place_of_gradient_checkpointing(tmp_path):
    with pytest.raises(ValueError, match=r"gradient_checkpointing beside selective_checkpointing"):
        DiffusionTrainingArguments(
            str(tmp_path), use_cpu=True, gradient_checkpointing=True, selective_checkpointing=True
        )


def test_a_model_that_cannot_recompute_layers_is_refused(monkeypatch, tmp_path):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot recompute"):
        trainer(tmp_path, model=model, selective_checkpointing=True)
