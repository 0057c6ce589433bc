"""Requests of likelihoods: adapters, long documents, and those refused by name."""

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config

from dllm_train.evaluate.likelihood import log_likelihoods, rolling_log_likelihood
from tests.evaluate.plain_likelihood import MASK, PlainModel
from tests.evaluate.test_likelihood import requests_of, values
from tests.evaluate.tiny_diffusion import marked, with_plain

CONTEXT, TARGET = [3, 4, 5], [6, 7]


def test_an_adapter_counts_on_the_head_too():
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        marked("llama"),
        peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False),
    )
    found = log_likelihoods(adapted, [(CONTEXT, TARGET)], estimator="ar_ftb", check_greedy=True)
    plain = PlainModel(adapted.merge_and_unload())
    assert values(found) == pytest.approx([plain.chain(CONTEXT, TARGET)], rel=1e-4)


def test_tensors_and_arrays_are_token_ids_too():
    model = marked()
    lists, tensors = (
        log_likelihoods(model, [(kind(CONTEXT), kind(TARGET))]) for kind in (list, torch.tensor)
    )
    assert lists == tensors


def test_no_requests_have_no_estimates():
    assert log_likelihoods(marked(), []) == [] and rolling_log_likelihood(marked(), []) == []


def test_the_model_is_left_as_it_was():
    model = marked().train()
    log_likelihoods(model, [(CONTEXT, TARGET)])
    assert model.training and model.config._attn_implementation == "eager"


# ---- documents ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_windows_are_disjoint_and_have_one_token_of_context(attention):
    model, plain = with_plain(attention=attention)
    (start, document), (_, short) = requests_of([(2, 11), (0, 3)])
    found = rolling_log_likelihood(model, [document, short], context=start, window=6, estimator="ar_ftb")
    windows = [(start, document[:4]), (document[3:4], document[4:9]), (document[8:9], document[9:])]
    expected = [sum(plain.chain(*window) for window in windows), plain.chain(start, short)]
    assert values(found) == pytest.approx(expected, rel=1e-4)


def test_a_document_that_fits_is_scored_as_a_whole():
    model, plain = with_plain(attention="block_causal")
    document = requests_of([(0, 21)])[0][1]
    found = rolling_log_likelihood(model, [document], estimator="ar_ftb")
    assert values(found) == pytest.approx([plain.chain([], document)], rel=1e-4)


def test_windows_have_noise_of_their_own():
    """The variance of two equal windows is twice that of one; with the same noise it would be four times."""
    model, window = marked(), requests_of([(0, 4)])[0][1]
    options = dict(context=window[-1:], window=5, samples=1)
    one = values(rolling_log_likelihood(model, [window] * 600, **options))
    two = values(rolling_log_likelihood(model, [window * 2] * 600, **options))
    assert np.var(two) == pytest.approx(2 * np.var(one), rel=0.25)


# ---- refusals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "request_, error, message",
    [
        ((CONTEXT, []), ValueError, r"requests\[0\] has an empty target"),
        ((CONTEXT, [48]), ValueError, r"requests\[0\] holds token 48; the vocabulary is 0..47"),
        (([-1], TARGET), ValueError, r"requests\[0\] holds token -1"),
        ((CONTEXT, [MASK]), ValueError, r"requests\[0\] holds the mask token 47"),
        ((CONTEXT * 30, TARGET), ValueError, r"requests\[0\] has 92 tokens \(90 of context, 2 of target\)"),
        ((CONTEXT, [1.5]), TypeError, r"the target of requests\[0\]"),
        (("text", TARGET), TypeError, r"the context of requests\[0\]"),
        ((CONTEXT,), TypeError, r"requests\[0\] is a tuple; expected a pair"),
        ("ab", TypeError, r"requests\[0\] is a str; expected a pair"),
    ],
)
def test_requests_are_refused_by_name(request_, error, message):
    with pytest.raises(error, match=message):
        log_likelihoods(marked(), [request_])


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(estimator="elbo"), ValueError, "estimator is 'elbo'; allowed: 'auto', 'monte_carlo'"),
        (dict(estimator="block"), ValueError, "needs a block-causal model, and this one is bidirectional"),
        (dict(samples=0), ValueError, "samples must lie in 1.."),
        (dict(samples=1.5), TypeError, "samples must be an integer"),
        (dict(seed=-1), ValueError, "seed must lie in 0.."),
        (dict(batch_tokens=0), ValueError, "batch_tokens must lie in 1.."),
        (dict(request_ids=[1, 2]), ValueError, "request_ids has 2 entries for 1 requests"),
        (dict(request_ids=[2**32]), ValueError, r"request_ids\[0\] must lie in 0..4294967295"),
    ],
)
def test_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        log_likelihoods(marked(), [(CONTEXT, TARGET)], **options)


def test_a_masked_bound_of_a_block_causal_model_is_refused():
    with pytest.raises(ValueError, match="use estimator='block'"):
        log_likelihoods(marked(attention="block_causal"), [(CONTEXT, TARGET)], estimator="monte_carlo")


def test_windows_fit_the_model():
    with pytest.raises(ValueError, match="window is 81; the model has 80 positions"):
        rolling_log_likelihood(marked(), [TARGET], window=81)
    with pytest.raises(ValueError, match="context has 3 tokens, so windows of 3 have no room"):
        rolling_log_likelihood(marked(), [TARGET], context=CONTEXT, window=3)
    with pytest.raises(ValueError, match=r"documents\[0\] has an empty target"):
        rolling_log_likelihood(marked(), [[]])


def test_models_are_refused_by_name():
    model = marked()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no mask token; set model"):
        log_likelihoods(model, [(CONTEXT, TARGET)])
    with pytest.raises(TypeError, match="model is a function; expected a transformers model"):
        log_likelihoods(lambda ids: ids, [(CONTEXT, TARGET)])
    model = marked(attention="block_causal")
    model.config.diffusion["block_size"] = None
    with pytest.raises(ValueError, match='has no "block_size"'):
        log_likelihoods(model, [(CONTEXT, TARGET)])


def test_a_model_that_computes_nan_is_refused():
    model = marked("llama")
    log_likelihoods(model, [(CONTEXT, TARGET)])
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(ValueError, match=r"log p = nan for requests\[0\]: its logits are NaN"):
        log_likelihoods(model, [(CONTEXT, TARGET)])


def hybrid(attention):
    """A model with a convolution over tokens, and its requests."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"], attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.mask_token_id = MASK
    model.config.diffusion = {"attention": [attention], "block_size": 4}
    return model, requests_of([(0, 3), (5, 2), (9, 4)])


def test_rows_of_a_hybrid_model_do_not_run_into_each_other():
    model, requests = hybrid("bidirectional")
    plain = PlainModel(model)
    found = log_likelihoods(model, requests, estimator="ar_ftb")
    assert values(found) == pytest.approx([plain.chain(*request) for request in requests], rel=1e-4)


def test_blocks_of_a_hybrid_model_are_refused():
    model, requests = hybrid("block_causal")
    with pytest.raises(ValueError, match="depend on each other through more than attention"):
        log_likelihoods(model, requests)
