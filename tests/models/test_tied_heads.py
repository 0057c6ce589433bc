"""8-bit vocabulary projections of models with tied embeddings: copies beside the embedding, in no file."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models import stored_weights
from dllm_kernels.models.saved_weights import saved_state
from dllm_kernels.models.stored_weights import StoredLinear, store_tied_head, store_weights
from tests.models.published_checkpoints import PUBLISHED
from tests.sampling.tiny_models import prompts_of, tiny_model

IDS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
OPTIONS = dict(max_new_tokens=16, threshold=0.4)


def tied():
    return copy.deepcopy(tiny_model(tie_word_embeddings=True))


def stored(kind: str = "int8"):
    model = tied()
    store_weights(model, kind)
    assert store_tied_head(model, kind)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    dk.save(tied(), None, folder)
    return folder


def untied(model):
    """The stock model with a head of its own, of the same weight."""
    model = copy.deepcopy(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def dequantized(head) -> torch.Tensor:
    """The weight that a head stands for, in float64."""
    weight, scales = head.parts()
    return weight.double() * scales.double()


def same_parts(one, other) -> bool:
    (weight, scales), (other_weight, other_scales) = one.parts(), other.parts()
    return weight.view(torch.uint8).equal(other_weight.view(torch.uint8)) and scales.equal(other_scales)


# ---- what it computes --------------------------------------------------------------------------------------
def test_a_tied_head_is_a_copy_and_the_embedding_stays(folder):
    model, _ = dk.load(folder, device="cpu", weights="int8")
    embedding = model.get_input_embeddings().weight
    assert type(model.lm_head) is StoredLinear and model.lm_head.copies_embedding
    assert isinstance(embedding, nn.Parameter) and embedding.equal(tied().lm_head.weight)
    weight, scales = dk.quantize_weight(embedding)
    assert model.lm_head.parts()[0].equal(weight) and model.lm_head.parts()[1].equal(scales)
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("kind", [None, "float32", "bfloat16"])
def test_other_kinds_leave_the_head_tied(folder, kind):
    model, _ = dk.load(folder, device="cpu", weights=kind)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_logits_are_those_of_the_dequantized_head(folder):
    model, _ = dk.load(folder, device="cpu", weights="int8")
    weight = dequantized(model.lm_head)
    output = model(input_ids=IDS, output_hidden_states=True)  # with gradients states are not rounded
    expected = output.hidden_states[-1].double() @ weight.T
    torch.testing.assert_close(output.logits.double(), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        output = model(input_ids=IDS, output_hidden_states=True)
    states = output.hidden_states[-1]
    steps = states.abs().amax(-1, keepdim=True) / 127
    expected = ((states / steps).round() * steps).double() @ weight.T
    assert float((output.logits - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_are_those_of_an_untied_int8_model(folder, compiled):
    model, _ = dk.load(folder, device="cpu", weights="int8", fused=False)
    expected = untied(tied())
    store_weights(expected, "int8")
    prompts = prompts_of(5, 12)
    found = dk.sample(model, prompts, compile=compiled, **OPTIONS).sequences
    assert found.equal(dk.sample(expected, prompts, compile=compiled, **OPTIONS).sequences)


def test_gradients_are_those_of_the_dequantized_head():
    model, expected = tied(), untied(tied())
    store_tied_head(model, "int8")
    expected.lm_head.weight.data = dequantized(model.lm_head).float()
    for one in (model, expected):
        one(input_ids=IDS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        gradient = expected.get_parameter(name).grad
        rounding = 1e-6 * float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=rounding)


def test_encoders_keep_the_bias_of_their_head(tmp_path):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    stock = transformers.BertForMaskedLM(config).eval()
    stock.config.diffusion, stock.config.mask_token_id = {"attention": ["bidirectional"]}, 59
    nn.init.normal_(stock.cls.predictions.bias)
    model = copy.deepcopy(stock)
    assert store_tied_head(model, "int8")
    decoder = model.cls.predictions.decoder
    assert decoder.copies_embedding and decoder.bias is model.cls.predictions.bias
    with torch.no_grad():
        expected, got = stock(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert float((got - expected).norm() / expected.norm()) < 0.02
    dk.save(model, None, tmp_path)
    again, _ = dk.load(tmp_path, device="cpu", weights="int8")
    assert same_parts(again.cls.predictions.decoder, decoder)
    assert again.cls.predictions.decoder.bias.equal(decoder.bias)


# ---- checkpoints -------------------------------------------------------------------------------------------
def test_a_checkpoint_holds_the_embedding_once(folder, tmp_path):
    model, _ = dk.load(folder, device="cpu", weights="int8")
    dk.save(model, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("lm_head") for name in tensors)
    assert tensors["model.embed_tokens.weight"].equal(tied().lm_head.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["quantization_config"]["ignore"] == ["lm_head"]

    again, _ = dk.load(tmp_path, device="cpu", weights="int8")
    assert again.lm_head.copies_embedding and same_parts(again.lm_head, model.lm_head)
    assert again(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)
    prompts = prompts_of(5, 12)
    expected = dk.sample(model, prompts, **OPTIONS).sequences
    assert dk.sample(again, prompts, **OPTIONS).sequences.equal(expected)

    plain, _ = dk.load(tmp_path, device="cpu")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    assert isinstance(plain.model.layers[0].mlp.up_proj, StoredLinear)
    ours, theirs = saved_state(model), saved_state(plain)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_model_whose_head_alone_is_8_bit_is_an_ordinary_checkpoint(tmp_path):
    model = tied()
    assert store_tied_head(model, "int8")
    dk.save(model, None, tmp_path, max_shard_size="20KB")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert theirs.lm_head.weight.equal(tied().lm_head.weight)


def test_compressed_tensors_reads_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    dk.save(stored(), None, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and theirs.lm_head.weight.equal(tied().lm_head.weight)


def test_a_tied_model_is_written_in_the_layout_of_a_family(tmp_path):
    weights = PUBLISHED["llada"].tensors()
    del weights["model.transformer.ff_out.weight"]
    PUBLISHED["llada"].write(tmp_path / "source", weight_tying=True)
    save_file(weights, tmp_path / "source" / "model.safetensors")
    model, _ = dk.load(tmp_path / "source", device="cpu", weights="int8")
    dk.save(model, None, tmp_path / "own", layout="llada")
    names = load_file(tmp_path / "own" / "model.safetensors").keys()
    assert {name for name in names if not name.endswith("_scale")} == weights.keys()
    again, _ = dk.load(tmp_path / "own", device="cpu", weights="int8")
    assert again.lm_head.copies_embedding and same_parts(again.lm_head, model.lm_head)


def test_fp8_comes_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(stored_weights.KINDS_ON, "cpu", ("fp8",))
    model = stored("fp8")
    expected = dk.quantize_weight(model.model.embed_tokens.weight, dtype=torch.float8_e4m3fn)
    assert model.lm_head.weight.view(torch.uint8).equal(expected[0].view(torch.uint8))
    dk.save(model, None, tmp_path)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "model.safetensors"))
    again, _ = dk.load(tmp_path, device="cpu", weights="fp8")
    assert again.lm_head.copies_embedding and same_parts(again.lm_head, model.lm_head)


def test_an_adapter_of_a_tied_base_is_merged_first(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base, _ = dk.load(folder, device="cpu")
    options = dict(r=2, target_modules=["up_proj"], init_lora_weights=False)
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(tmp_path)
    model, _ = dk.load(tmp_path, device="cpu", base=folder, weights="int8")
    plain, _ = dk.load(tmp_path, device="cpu", base=folder)
    assert model.lm_head.copies_embedding
    up = "model.layers.0.mlp.up_proj"
    assert model.get_submodule(up).weight.equal(dk.quantize_weight(plain.get_submodule(up).weight)[0])
    with torch.no_grad():
        expected, got = plain(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert float((got - expected).norm() / expected.norm()) < 0.1


# ---- a live model ------------------------------------------------------------------------------------------
def test_copies_of_a_model_compute_the_same():
    model = stored()
    state = model.state_dict()
    other = stored()
    zeros = torch.zeros_like(state["lm_head.weight"])
    other.lm_head.stored = StoredLinear.of(zeros, torch.ones(len(zeros), 1)).stored
    other.load_state_dict(state)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert one.lm_head.copies_embedding and same_parts(one.lm_head, model.lm_head)
        assert one(input_ids=IDS).logits.equal(model(input_ids=IDS).logits)


def test_a_model_that_is_cast_keeps_its_copy(tmp_path):
    model, half = stored(), stored().bfloat16()
    assert same_parts(half.lm_head, model.lm_head)
    assert half(input_ids=IDS).logits.dtype == torch.bfloat16
    dk.save(half, None, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_changed_embedding_is_not_saved_before_it_is_copied_again(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(stored_weights.KINDS_ON, "cpu", ("int8", "fp8"))
    model = stored(kind)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1.1
    with pytest.raises(ValueError, match=r"lm_head of .* is an 8-bit copy of model\.embed_tokens, which has"):
        dk.save(model, None, tmp_path)
    assert not any(tmp_path.iterdir())
    model.tie_weights()
    expected = tied()
    expected.model.embed_tokens.weight.data[7] *= 1.1
    store_tied_head(expected, kind)
    assert same_parts(model.lm_head, expected.lm_head) and model.lm_head.copies_embedding
    dk.save(model, None, tmp_path)


def test_a_new_copy_empties_the_prefix_cache():
    model, cache, (prompt,) = stored(), dk.PrefixCache(tokens=512), prompts_of(40)
    for _ in range(2):
        dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    reused = cache.reused_tokens
    model.tie_weights()
    dk.sample(model, [prompt], prefix_cache=cache, **OPTIONS)
    assert cache.reused_tokens == reused > 0


def test_another_size_of_vocabulary_is_refused():
    model = stored()
    with pytest.raises(TypeError, match=r"Old language model head is of type .*StoredLinear"):
        model.resize_token_embeddings(130)
    model = stored()
    model.resize_token_embeddings(120)
    assert same_parts(model.lm_head, stored().lm_head)


# ---- heads that have no copy -------------------------------------------------------------------------------
def test_a_head_that_is_more_than_tied_stays():
    hooked, shared, own = tied(), tied(), untied(tied())
    hooked.lm_head.register_forward_hook(lambda module, arguments, output: output)
    shared.register_parameter("third", shared.lm_head.weight)
    for model in (hooked, shared, own):
        assert not store_tied_head(model, "int8")
        assert type(model.lm_head) is nn.Linear
    assert not store_tied_head(stored(), "int8")


def test_what_has_no_8_bit_copy_is_refused(folder, tmp_path):
    model = tied()
    with pytest.raises(ValueError, match="kind is 'bfloat16'; the copy of a tied weight is in 8 bits: "):
        store_tied_head(model, "bfloat16")
    with pytest.raises(ValueError, match="weights='fp8' is for models on CUDA"):
        store_tied_head(model, "fp8")
    model.model.embed_tokens.weight.data[3, 1] = torch.nan
    with pytest.raises(ValueError, match="weights='int8': the weight of lm_head holds infinities or NaN"):
        store_tied_head(model, "int8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    dk.save(model, None, tmp_path)
    with pytest.raises(ValueError, match=r"the weight of lm_head holds infinities or NaN") as raised:
        dk.load(tmp_path, device="cpu", weights="int8")
    assert str(tmp_path) in str(raised.value)
