"""Trainers with fused_layers take the gradients of the stock layers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dllm_kernels as dk
from dllm_train import bd3lm_loss, sample_noise
from tests.train.tiny_models import MASK, tiny
from tests.train.trainer_runs import Gradients, trainer

FUSED = ("llama", "qwen2-windows", "qwen3", "qwen3-moe", "mistral", "gemma", "granite")


def steps_of(folder, model, objective="mdlm", **options) -> list[dict]:
    """Gradients of the optimizer's steps."""
    kept = Gradients()
    trainer(folder, objective, model=model, callbacks=[kept], **options).train()
    return kept.steps


def assert_same_steps(found, expected):
    assert len(found) == len(expected) > 0
    for step, of_stock in zip(found, expected, strict=True):
        assert step.keys() == of_stock.keys()
        for name, gradient in of_stock.items():
            torch.testing.assert_close(
                step[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name
            )


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm", "dream"])
@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_those_of_the_stock_layers(name, objective, tmp_path):
    steps = [
        steps_of(tmp_path, tiny(name, gain=2.0, attention="dllm"), objective, fused_layers=fused)
        for fused in (False, True)
    ]
    assert_same_steps(steps[1], steps[0])


@pytest.mark.parametrize(
    "options",
    [dict(gradient_checkpointing=True), dict(selective_checkpointing=True)],
    ids=lambda o: next(iter(o)),
)
@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
def test_checkpointing_changes_no_bit(objective, options, tmp_path):
    plain, checkpointed = (
        steps_of(tmp_path, tiny("llama", gain=2.0, attention="dllm"), objective, fused_layers=True, **more)
        for more in ({}, options)
    )
    for step, other in zip(plain, checkpointed, strict=True):
        assert all(torch.equal(other[name], gradient) for name, gradient in step.items())


def test_steps_of_a_compiled_model():
    """In a thread that has called no attention before, like the only one of a training script."""

    def losses(compiled):
        torch.compiler.reset()
        model = tiny("qwen3", attention="dllm").train()
        dk.fuse_layers(model)
        if compiled:
            model.base_model.compile(dynamic=False, backend="aot_eager")
        for seed in range(3):
            ids = torch.randint(0, MASK, (2, 16), generator=torch.Generator().manual_seed(seed))
            loss = bd3lm_loss(model, ids, block_size=4, mask_id=MASK, seed=seed).loss
            loss.backward()
            yield float(loss.detach())

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(lambda: list(losses(compiled=True))).result()
    assert found == pytest.approx([*losses(compiled=False)], rel=1e-5)


def test_bfloat16_over_float32_weights(tmp_path):
    steps = [
        steps_of(tmp_path, tiny("qwen3", attention="dllm"), fused_layers=fused, bf16=True)
        for fused in (False, True)
    ]
    for name, gradient in steps[0][0].items():
        assert (steps[1][0][name] - gradient).norm() <= 0.1 * gradient.norm(), name


def adapted():
    model = tiny("llama", attention="dllm")
    model.config.diffusion = {"attention": ["bidirectional"]}
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_adapters(tmp_path):
    assert_same_steps(*(steps_of(tmp_path, adapted(), fused_layers=fused) for fused in (True, False)))


def test_the_last_layer_is_still_cut():
    """BD3LM's last layer computes its MLP for the noised half alone."""
    rows = []
    model = tiny("llama", attention="dllm").train()
    dk.fuse_layers(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    ids = torch.randint(3, MASK, (2, 12))
    bd3lm_loss(model, ids, mask_id=MASK, noise=sample_noise(ids, range(2), block_size=4), block_size=4)
    assert rows == [24, 12]


def test_a_model_without_such_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fused_layers=True: no layer of this GPT2LMHeadModel can be fused"):
        trainer(tmp_path, model=tiny("gpt2"), fused_layers=True)
