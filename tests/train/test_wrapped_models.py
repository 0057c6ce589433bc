"""Losses of wrapped, adapted and patched models: those of the model's own logits, or a refusal by name."""

import threading
from functools import partial
from types import MethodType

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import dllm_kernels as dk
from dllm_train import Noise, bd3lm_loss, mdlm_loss, vocabulary_head
from tests.train.tiny_models import MASK, tiny

IDS = torch.randint(3, MASK, (2, 12), generator=torch.Generator().manual_seed(0))
NOISE = Noise(torch.full((2, 12), 0.5), torch.arange(24).view(2, 12) % 3 > 0)


def loss_of(model, **options):
    return mdlm_loss(model, IDS, mask_id=MASK, noise=NOISE, **options).loss


def block_loss_of(model):
    options = dict(block_size=4, clean="causal", ar_weight=0.2, complementary=True)
    return bd3lm_loss(model, IDS, mask_id=MASK, seed=1, **options).loss


def forced_loss_of(model):
    return mdlm_loss(model, IDS, mask_id=MASK, seed=1, reach=3, certainty_weight=0.5).loss


def from_own_logits(model):
    """Return the same loss from the logits of a call of `model`."""
    visible = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    logits = model(input_ids=IDS.masked_fill(NOISE.masked, MASK), attention_mask=visible).logits
    return F.cross_entropy(logits[NOISE.masked].float(), IDS[NOISE.masked], reduction="sum") / 0.5 / 24


def assert_same_as_own(model, called=None):
    """Loss and gradients of `called` (None: the model) are those of the logits of `model`."""
    expected = from_own_logits(model)
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    loss = loss_of(model if called is None else called)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def adapted(name="llama", **options):
    model = tiny(name, pad_token_id=None)
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
    return made.eval()


ADAPTERS = {
    "attention": dict(target_modules=["q_proj"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embeddings": dict(target_modules=["embed_tokens"]),
    "whole-head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "causal-lm": dict(target_modules=["lm_head"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("inside", [False, True], ids=["PeftModel", "get_base_model"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_adapters_take_part_and_frozen_weights_do_not(adapters, inside):
    model = adapted(**ADAPTERS[adapters])
    assert_same_as_own(model, model.get_base_model() if inside else None)


def test_adapters_of_a_heads_transform():
    model = adapted("bert", target_modules=["query", "cls.predictions.transform.dense"])
    assert_same_as_own(model)
    trained = [n for n, p in model.named_parameters() if "transform" in n and p.grad is not None]
    assert len(trained) == 2


def test_other_kinds_of_adapters():
    config = peft.IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[])
    assert_same_as_own(peft.get_peft_model(tiny("llama", pad_token_id=None), config).eval())


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
)
def test_learned_prompts_are_refused(config):
    model = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM that learns a prompt.*LoRA"):
        loss_of(nn.DataParallel(model))


def test_a_head_in_chunks_equals_the_whole(monkeypatch):
    def loss_and_gradients():
        model = tiny("gemma2", attention="eager")
        loss = loss_of(model)
        loss.backward()
        return loss, [p.grad for p in model.parameters()]

    whole = loss_and_gradients()
    monkeypatch.setattr(vocabulary_head, "ROWS_AT_ONCE", 3)
    torch.testing.assert_close(loss_and_gradients(), whole)


def test_without_masks_every_head_gives_zero():
    noise = Noise(NOISE.t, torch.zeros_like(NOISE.masked))
    for name in ("llama", "gemma2", "bert"):
        model = tiny(name, attention="eager")
        loss = mdlm_loss(model, IDS, mask_id=MASK, noise=noise).loss
        loss.backward()
        assert loss == 0
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "cohere", "granite", "opt"])
def test_losses_of_inference_mode(name):
    model = tiny(name, attention="eager")
    with torch.inference_mode():
        found = loss_of(model)
    assert torch.equal(found, loss_of(model).detach())


class Scaled(nn.Module):
    """A head that is linear and a scale that may be learned."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.scale = linear, nn.Parameter(torch.ones(()))

    def forward(self, states):
        return self.linear(states) * self.scale


def test_heads_that_users_replace():
    model = tiny("llama", pad_token_id=None)
    model.lm_head = Scaled(model.lm_head)
    assert_same_as_own(model)
    assert model.lm_head.scale.grad is not None
    hooked = tiny("llama", pad_token_id=None)
    hooked.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_same_as_own(hooked)


def test_a_soft_cap_is_seen_through_small_weights():
    """tanh(x) is x where the logits are small, as at the start of training."""
    for gain in (0.0, 1e-4):
        model = tiny("gemma2", attention="eager", gain=gain)
        assert not vocabulary_head._is_plain(model, (model.lm_head,), model.model(IDS))


def all_layers_see_all(name, **entries):
    return tiny(name, layer_types=["full_attention"] * 2, attention="dllm", pad_token_id=None, **entries)


def cap(model):
    model.config.final_logit_softcapping = 2.0


def uncap(model):
    model.config.final_logit_softcapping = None


def rescale(model):
    model.logit_scale = 3.0


def replace(model):
    model.lm_head = nn.Linear(16, 48)


def hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_outside_the_base(model):
    vocabulary_head.outside_base(model)[0].register_forward_hook(lambda *_: None)


def hook_outside_the_head(model):
    model.cls.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (partial(all_layers_see_all, "gemma2", final_logit_softcapping=None), [cap, uncap]),
        (partial(all_layers_see_all, "gemma2"), [uncap, cap]),
        (partial(tiny, "cohere", pad_token_id=None), [rescale]),
        (partial(tiny, "llama", pad_token_id=None), [hook, replace]),
        (partial(tiny, "bert", pad_token_id=None), [hook_outside_the_head]),
    ],
)
def test_heads_that_change_between_losses(make, changes):
    model = make()
    assert_same_as_own(model)
    for change in changes:
        change(model)
        model.zero_grad()
        assert_same_as_own(model)


@pytest.mark.parametrize("name", ["qwen3", "bert", "granite"])
def test_a_head_is_tried_once_for_each_state(name, monkeypatch):
    tried = []
    gives, apart = vocabulary_head._gives_own_logits, vocabulary_head._rows_are_apart
    monkeypatch.setattr(vocabulary_head, "_gives_own_logits", lambda *a: tried.append(1) or gives(*a))
    monkeypatch.setattr(vocabulary_head, "_rows_are_apart", lambda *a: tried.append(2) or apart(*a))
    model = tiny(name)
    loss_of(model)
    first = len(tried)
    assert first > 0
    loss_of(model).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    loss_of(model)
    assert len(tried) == first
    model.lm_head.register_forward_hook(lambda *_: None) if name == "qwen3" else hook_outside_the_base(model)
    loss_of(model)
    assert len(tried) > first


def test_a_head_of_zeros_is_tried_again():
    """It says nothing about what other weights would do."""
    model = tiny("llama", pad_token_id=None)
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
        loss_of(model)
        model.lm_head.weight.copy_(kept)
    assert vocabulary_head._is_plain(model, (model.lm_head,), model.model(IDS))


def test_adapters_that_come_and_go():
    model = tiny("llama", pad_token_id=None)
    loss_of(model)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"])
    with_adapters = peft.get_peft_model(model, config).eval()
    assert_same_as_own(with_adapters)
    assert_same_as_own(with_adapters.merge_and_unload().requires_grad_())


@pytest.mark.parametrize("loss", [mdlm_loss, bd3lm_loss])
def test_compiled_models(loss):
    model = tiny("llama")
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    options = dict(mask_id=MASK, noise=NOISE) | ({"block_size": 4} if loss is bd3lm_loss else {})
    torch.testing.assert_close(loss(compiled, IDS, **options).loss, loss(model, IDS, **options).loss)


def test_autocast_of_a_prepared_model():
    """accelerate puts autocast into the forward of the instance."""
    prepared = tiny("llama")
    prepared.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(type(prepared).forward), prepared)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(tiny("llama"))
    forward = prepared.forward
    assert torch.equal(loss_of(prepared), expected)
    assert not torch.equal(expected, loss_of(tiny("llama")))
    assert prepared.forward is forward


def test_other_forwards_are_refused():
    model = tiny("llama")
    model.forward = lambda **arguments: None
    with pytest.raises(ValueError, match=r"forward of this LlamaForCausalLM was replaced by .*del model"):
        loss_of(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), lambda ids: ids])
def test_models_of_other_kinds_are_named(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}; expected a transformers model"):
        loss_of(model)


def test_encoder_decoder_models_are_refused():
    sizes = dict(
        vocab_size=MASK + 1, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2
    )
    config = transformers.BartConfig(
        **sizes, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16
    )
    with pytest.raises(ValueError, match="BartForConditionalGeneration, an encoder-decoder model"):
        loss_of(transformers.BartForConditionalGeneration(config))


def test_a_whole_model_that_is_recomputed_is_refused():
    with pytest.raises(ValueError, match=r"CheckpointWrapper around a whole model.*wrap its layers"):
        loss_of(checkpoint_wrapper(tiny("llama")))


def test_a_model_without_head_is_named():
    with pytest.raises(ValueError, match=r"LlamaModel, without a head.*AutoModelForCausalLM"):
        loss_of(tiny("llama").model)


@pytest.mark.parametrize("training", [False, True])
def test_models_that_do_not_heed_masks_are_refused(training):
    refusal = "CohereForCausalLM cannot be trained with this attention: outputs "

    def recur(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.cumsum(1)

    def stay_causal(module, inputs, arguments):
        mask = arguments["attention_mask"].tril()
        return inputs, arguments | {"attention_mask": mask}

    recurrent = tiny("cohere").train(training)
    recurrent.model.register_forward_hook(recur)
    with pytest.raises(ValueError, match=refusal + "depend on tokens that the mask hides"):
        loss_of(recurrent)
    causal = tiny("cohere").train(training)
    causal.model.register_forward_pre_hook(stay_causal, with_kwargs=True)
    with pytest.raises(ValueError, match=refusal + "do not depend on later tokens"):
        loss_of(causal)


def test_layers_of_other_kinds_are_refused():
    model = tiny("qwen2-windows")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"Qwen2Model has layers of kind linear_attention"):
        loss_of(model)


def test_unknown_attention_is_named():
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*'flash_attention_2'.*enable_attention"):
        loss_of(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "dllm"),
        ("qwen3", "sdpa"),
        ("gpt2", "dllm"),
        ("bert", "dllm"),
        ("roberta", "sdpa"),
        ("gemma2", "eager"),
        ("gemma2", "dllm"),
        ("modernbert", "sdpa"),
        ("modernbert", "dllm"),
    ],
)
@pytest.mark.parametrize("loss", [loss_of, block_loss_of, forced_loss_of])
def test_recomputed_layers_give_the_same_loss_and_gradients(name, attention, reentrant, loss):
    model = tiny(name, attention=attention).train()
    expected_loss = loss(model)
    expected_loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    recomputed = loss(model)
    torch.testing.assert_close(recomputed, expected_loss)
    recomputed.backward()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(parameter).grad, gradient, rtol=1e-4, atol=1e-6)


def test_layers_are_not_recomputed_with_other_attention():
    model = tiny("qwen3").train()
    model.gradient_checkpointing_enable()
    with dk.enable_attention(model):
        loss = loss_of(model)
    with pytest.raises(ValueError, match=r"'dllm' attention.*enable_attention"):
        loss.backward()


def test_the_model_is_left_as_it_was():
    model = tiny("llama")
    padding, names = model.model.embed_tokens.padding_idx, set(vars(model))
    assert padding == 0
    loss_of(model)
    assert (model.model.embed_tokens.padding_idx, set(vars(model))) == (padding, names)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        loss_of(model)
    assert (model.model.embed_tokens.padding_idx, set(vars(model))) == (padding, names)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_the_padding_tokens_row_is_trained(name):
    model = tiny(name, pad_token_id=5, tie_word_embeddings=False)
    ids = torch.full((1, 8), 5)
    noise = Noise(torch.full((1, 8), 0.5), torch.arange(8)[None] > 3)
    mdlm_loss(model, ids, mask_id=MASK, noise=noise).loss.backward()
    assert model.get_input_embeddings().weight.grad[5].any()


def test_threads_share_a_model():
    model, seen, errors = tiny("llama"), [], []
    with torch.no_grad():
        wanted_loss, wanted_logits = loss_of(model), model(IDS).logits

    def work(index):
        try:
            with torch.no_grad():
                for _ in range(10):
                    if index % 2:
                        seen.append(torch.equal(loss_of(model), wanted_loss))
                    else:
                        seen.append(torch.equal(model(IDS).logits, wanted_logits))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(seen) == 40
    assert all(seen)
