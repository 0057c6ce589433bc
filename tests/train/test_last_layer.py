"""The last layer leaves out what predicts nothing, and losses and gradients stay those of all outputs."""

import copy
from contextlib import contextmanager

import pytest
import torch

from benchmarks.training_loops import plain_loss
from dllm_train import bd3lm_loss, last_layer, sample_noise
from tests.train.tiny_models import MASK, tiny

BLOCK, LENGTH, ROWS = 4, 14, 3
CUT = ("llama", "qwen2", "qwen3", "mistral", "gemma", "qwen3-moe")
CLEAN_HALF_PREDICTS = [
    dict(shift=True, bos_id=1, noise=None, example_ids=range(ROWS)),
    dict(clean="causal", ar_weight=0.5),
]
WHOLE = ("gemma2", "cohere", "gpt-neox", "olmo3")


def inputs():
    ids = torch.randint(3, MASK, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    return ids, sample_noise(ids, range(ROWS), block_size=BLOCK)


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def tokens_of_each_layer(model):
    """Yields a list that gets the length of the rows that each layer's MLP is given, in turn."""
    lengths = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[-2]))
        for layer in model.base_model.layers
    ]
    yield lengths
    for hook in hooks:
        hook.remove()


def loss_of(model, **options):
    ids, noise = inputs()
    options = {"noise": noise, **options}
    return bd3lm_loss(model, ids, block_size=BLOCK, mask_id=MASK, **options).loss


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", CUT)
def test_half_a_layer_gives_the_gradients_of_the_plain_loss(name, recomputed):
    entries = dict(sliding_window=None) if name == "mistral" else {}
    plain = tiny(name, mask_token_id=MASK, **entries).train()
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("dllm")
    if recomputed:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    with tokens_of_each_layer(ours) as lengths:
        loss = loss_of(ours)
    assert lengths[-2:] == [2 * LENGTH, LENGTH]  # a model of unknown family was probed before
    loss.backward()
    expected = plain_loss(plain, *inputs(), BLOCK)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(ours)[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("options", CLEAN_HALF_PREDICTS)
def test_outputs_of_the_clean_half_that_predict_are_computed(options):
    model = tiny("llama", attention="dllm")
    with tokens_of_each_layer(model) as lengths:
        loss_of(model, **options)
    assert lengths[0] == lengths[1] >= 2 * LENGTH


@pytest.mark.parametrize("name", WHOLE)
def test_layers_of_another_make_stay_whole(name):
    model = tiny(name, attention="dllm")
    layer = model.base_model.layers[-1]
    lengths = []
    layer.register_forward_hook(lambda _, args, output: lengths.append(output[0].shape[-2]))
    loss_of(model)
    assert lengths[-1] == 2 * LENGTH


def test_a_replaced_forward_is_left_alone():
    model = tiny("llama", attention="dllm")
    expected = loss_of(model)
    layer = model.model.layers[-1]
    own, calls = layer.forward, []
    layer.forward = lambda *args, **kwargs: calls.append(kwargs) or own(*args, **kwargs)
    torch.testing.assert_close(loss_of(model), expected)
    assert len(calls) == 1 and not any("outputs" in name for name in calls[0])


def test_layers_that_are_recomputed_by_their_call_stay_whole(monkeypatch):
    monkeypatch.setattr(last_layer, "_CHECKPOINTS_FORWARD", False)  # as in older versions of transformers
    model = tiny("llama", attention="dllm").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with tokens_of_each_layer(model) as lengths:
        loss_of(model)
    assert lengths == [2 * LENGTH, 2 * LENGTH]


def test_steps_of_a_compiled_model_are_compiled_once():
    model, graphs = tiny("llama", attention="dllm").train(), []
    expected = loss_of(model)
    torch.compiler.reset()
    model.base_model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        torch.testing.assert_close(loss, expected)
    assert len(graphs) == 1


def test_layers_are_left_as_they_were():
    model = tiny("llama", attention="dllm")
    loss_of(model)
    assert "forward" not in vars(model.model.layers[-1])
