"""A model whose own forward makes other logits than its head gives is refused by name."""

import pytest
import torch
import transformers

import dllm_kernels as dk
from dllm_train.evaluate.likelihood import log_likelihoods
from tests.models.test_attention_hook import untrained
from tests.models.test_families import ENCODERS
from tests.models.tiny_types import tiny_model as tiny_type

MASK = 63
REFUSED = r"logits of \w+ are more than .*: they are scaled or capped.*cache=\"none\""


def negated(output):
    output.logits = -output.logits
    return output


class Negated(transformers.Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        return negated(super().forward(*args, **kwargs))


class Counted(transformers.Qwen3ForCausalLM):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


class Shifted(transformers.Qwen3ForCausalLM):
    def forward(self, input_ids, **kwargs):
        return super().forward((input_ids + 1) % self.config.vocab_size, **kwargs)


def marked(model):
    model.config.mask_token_id, model.config.diffusion = MASK, {"attention": ["bidirectional"]}
    return model.eval()


@pytest.fixture
def qwen():
    torch.manual_seed(0)
    return marked(untrained("qwen3"))


def sampled(model):
    return dk.sample(model, [[5, 6, 7]], max_new_tokens=4, block_size=4, eos_ids=2)


def replace(model):
    stock = model.forward
    model.forward = lambda *args, **kwargs: negated(stock(*args, **kwargs))


def hook(model):
    model.register_forward_hook(lambda module, given, output: negated(output))


@pytest.mark.parametrize("change", [replace, hook])
def test_what_changes_the_logits_of_an_object_is_refused(qwen, change):
    sampled(qwen)
    change(qwen)
    with pytest.raises(ValueError, match=REFUSED):
        sampled(qwen)
    with pytest.raises(ValueError, match=REFUSED):
        dk.choose(qwen, [5, 6], [[7], [8]])
    with pytest.raises(ValueError, match="change the logits of its class"):
        log_likelihoods(qwen, [([5, 6], [7, 8])], samples=2)


def test_a_subclass_with_other_logits_is_refused(qwen):
    qwen.__class__ = Negated
    with pytest.raises(ValueError, match=REFUSED):
        sampled(qwen)


def test_a_subclass_with_other_ids_is_refused(qwen):
    qwen.__class__ = Shifted
    with pytest.raises(ValueError, match="its base model is given other ids"):
        sampled(qwen)


def test_a_subclass_with_the_logits_of_its_head_is_run_once(qwen):
    expected = sampled(qwen).sequences
    qwen.__class__ = Counted
    for _ in range(3):
        assert torch.equal(sampled(qwen).sequences, expected)
    qwen.register_forward_hook(lambda *_: None)
    assert torch.equal(sampled(qwen).sequences, expected)


@pytest.mark.parametrize(("name", "holder"), [("bert", "cls"), ("roberta", "lm_head")])
def test_a_hook_on_a_module_that_holds_the_head_is_refused(name, holder):
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(ENCODERS[name]).eval()
    sampled(model)
    model.get_submodule(holder).register_forward_hook(lambda module, given, output: -output)
    with pytest.raises(ValueError, match=REFUSED):
        sampled(model)


def test_a_cap_set_after_the_first_call_is_seen():
    model = marked(tiny_type("gemma2"))
    model.config.final_logit_softcapping = model.config.attn_logit_softcapping = None
    model = marked(type(model)(model.config))
    sampled(model)
    model.config.final_logit_softcapping = 0.001
    with pytest.raises(ValueError, match=REFUSED):
        sampled(model)
