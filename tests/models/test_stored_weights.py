"""`dk.load(weights=...)`: linear layers with rounded weights, in models of every published layout."""

import copy

import pytest
import torch
import transformers
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from tests.models.published_checkpoints import PUBLISHED
from tests.sampling.tiny_models import MASK, prompts_of, tiny_model

FP8 = torch.float8_e4m3fn


def layers_of(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, StoredLinear)]


def model_with(kind: str, *options, **more):
    model = copy.deepcopy(tiny_model(*options, **more))
    store_weights(model, kind)
    return model


def rounded(model, kind: str):
    """The stock model with the weights that `kind` stands for."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name != "lm_head" or kind == "int8"):
            weight = module.weight.data
            if kind == "bfloat16":
                module.weight.data = weight.bfloat16().float()
            elif kind == "int8":
                quantized, scales = dk.quantize_weight(weight)
                module.weight.data = quantized * scales
    return model


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_load_with_stored_weights(name, kind, tmp_path):
    folder = PUBLISHED[name].write(tmp_path)
    stock, _ = dk.load(folder, device="cpu")
    model, _ = dk.load(folder, device="cpu", weights=kind)
    assert len(layers_of(model)) >= 4
    head = model.get_output_embeddings()
    tied = stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
    assert (type(head) is StoredLinear) == (kind == "int8" and not tied)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = (one(input_ids=ids).logits for one in (stock, model))
    size = expected.abs().max()
    share = {"float32": 1e-5, "bfloat16": 3e-2, "int8": 1e-1}[kind]
    assert float((got - expected).abs().max()) < share * float(size)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_tokens_are_those_of_the_stock_model_with_these_weights(kind, attention):
    stock = tiny_model(attention=attention)
    model = model_with(kind, attention=attention)
    prompts, options = prompts_of(5, 12, 3), dict(max_new_tokens=16, threshold=0.4)
    expected = dk.sample(rounded(stock, kind), prompts, **options)
    assert dk.sample(model, prompts, **options).sequences.equal(expected.sequences)


def test_int8_layers_are_near_those_with_rounded_weights():
    stock, model = tiny_model(), model_with("int8")
    exact = rounded(stock, "int8")
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    for name, layer in model.named_modules():
        if isinstance(layer, StoredLinear) and layer.in_features == 32:
            with torch.no_grad():
                expected, got = exact.get_submodule(name)(x), layer(x)
            assert float((got - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_has_the_same_tokens_alone_and_in_a_batch(kind):
    model, prompts = model_with(kind), prompts_of(5, 12, 3)
    options = dict(max_new_tokens=16, threshold=0.4, stop_on_eos=False, logprobs=0)
    together = dk.sample(model, prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = dk.sample(model, [prompt], row_ids=[row], **options)
        width = alone.sequences.shape[1]
        assert together.sequences[row, :width].equal(alone.sequences[0])
        torch.testing.assert_close(together.logprobs[row, :width], alone.logprobs[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_compiled_model_writes_the_same(kind):
    model, prompts = model_with(kind), prompts_of(5, 12)
    options = dict(max_new_tokens=16, threshold=0.4)
    plain, compiled = (dk.sample(model, prompts, compile=compile, **options) for compile in (False, True))
    assert plain.sequences.equal(compiled.sequences)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_gradients_pass_through_layers_whose_weights_are_not_trained(kind):
    stock, model = rounded(tiny_model(), kind), model_with(kind)
    assert not any("proj.weight" in name for name, _ in model.named_parameters())
    ids = torch.randint(0, MASK, (1, 8), generator=torch.Generator().manual_seed(0))
    for one in (stock, model):
        one.zero_grad()
        one(input_ids=ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        expected = stock.get_parameter(name).grad
        rounding = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=rounding)


def test_a_bias_is_trained():
    linear, x = nn.Linear(24, 40), torch.randn(5, 24)
    expected = 2 * linear(x).sum(0).detach()
    StoredLinear.rounded(linear, "float32")(x).square().sum().backward()
    torch.testing.assert_close(linear.bias.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_state_dict_holds_the_weights(kind):
    model, other = model_with(kind), model_with(kind)
    for layer in layers_of(other):
        weight, scales = layer.parts()
        layer.stored = StoredLinear.of(torch.zeros_like(weight), scales).stored
    state = model.state_dict()
    name = "model.layers.0.mlp.up_proj."
    assert state[name + "weight"].equal(model.get_submodule(name[:-1]).weight)
    assert (name + "scales" in state) == (kind == "int8")
    other.load_state_dict(state)
    for mine, loaded in zip(layers_of(model), layers_of(other), strict=True):
        assert loaded.stored.data.equal(mine.stored.data)
    with pytest.raises(RuntimeError, match=r"Missing key.*up_proj\.weight"):
        other.load_state_dict({key: value for key, value in state.items() if key != name + "weight"})
    with pytest.raises(RuntimeError, match=r"up_proj.weight is .* \[1, 2\]; expected"):
        other.load_state_dict(state | {name + "weight": state[name + "weight"][:1, :2]})


def test_stored_weights_keep_their_dtype_when_the_model_is_moved():
    model = model_with("int8").bfloat16()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.int8 and layer.parts()[1].dtype == torch.float32


def test_weights_take_the_bytes_that_they_are_stored_in():
    def size(model) -> int:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | StoredLinear)]
        return sum(layer.weight.nbytes for layer in layers if layer is not model.lm_head)

    stock = size(tiny_model())
    assert size(model_with("bfloat16")) * 2 == size(model_with("int8")) * 4 == stock


def test_modules_that_are_more_than_a_linear_layer_stay():
    model = copy.deepcopy(tiny_model())
    layer = model.model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda module, arguments, output: output)
    layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight  # shared
    count = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert store_weights(model, "int8") == count - 3
    assert type(layer.self_attn.q_proj) is type(layer.mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_layers_with_adapters_stay_and_can_be_merged(kind):
    """A merged adapter is added to its layer's weight, which would be a copy of a stored one."""
    peft = pytest.importorskip("peft")
    options = dict(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(tiny_model()), peft.LoraConfig(**options))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    store_weights(model, kind)
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    stored = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    assert stored and not any("q_proj" in name or "o_proj" in name for name in stored)
    ids = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))
    whole = peft.get_peft_model(copy.deepcopy(tiny_model()), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="or with adapters on all layers"):
        store_weights(whole, "float32")


def test_encoders_have_stored_weights_too():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        assert store_weights(model, "int8") == 2 * 6 + 1
        got = model(ids).logits
    assert float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_compiled_code_may_look_at_the_weight(kind):
    """Models of transformers ask for its dtype."""
    layer = model_with(kind).model.layers[0].mlp.up_proj

    def sums(x):
        return layer(x) + layer.weight.float().sum() if layer.weight.dtype != torch.float16 else x

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(compiled(x), sums(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sums(x))
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(48, 32))


def test_a_layer_says_what_it_is():
    layer = model_with("int8").model.layers[0].mlp.up_proj
    assert repr(layer) == "StoredLinear(in_features=32, out_features=48, weight=int8)"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_is_made_of_its_parts_and_gives_them_back(groups):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-127, 128, (6, 128), generator=generator, dtype=torch.int8)
    scales = torch.rand(6, groups, generator=generator)
    bias = nn.Parameter(torch.randn(6, generator=generator))
    layer = StoredLinear.of(weight, scales, bias)
    assert all(part.equal(given) for part, given in zip(layer.parts(), (weight, scales), strict=True))
    assert (layer.in_features, layer.out_features, layer.training) == (128, 6, False)
    x = torch.randint(-127, 128, (3, 128), generator=generator).float()
    x[:, 0] = 127  # so that rounding to 8 bits is exact
    whole = weight.double() * scales.double().repeat_interleave(128 // groups, dim=1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), (x.double() @ whole.T + bias).float())
    half = StoredLinear.of(weight.half())
    assert half.parts()[0].dtype == torch.float16 and half.parts()[1] is None


def test_parts_that_make_no_layer_are_refused():
    weight = torch.zeros(4, 8, dtype=torch.int8)
    for of, message in (
        ((weight,), "a weight in torch.int8 comes with scales"),
        ((weight.bfloat16(), torch.ones(4, 1)), "a weight in torch.bfloat16 comes without scales"),
        ((weight.double(),), r"weight is torch.float64 \[4, 8\]; it must be float32, bfloat16, float16"),
        ((weight.to(FP8),), "a weight in torch.float8_e4m3fn comes with scales"),
        ((weight.to(FP8), torch.ones(4, 2)), r"scales is \[4, 2\]; of float8_e4m3fn it must be \[4, 1\]"),
        ((weight, torch.ones(4)), r"scales is torch.float32 \[4\]; it must be float32 \[4, groups\]"),
        ((weight, torch.ones(4, 3)), "groups must divide the 8 inputs"),
        ((weight, torch.ones(4, 1).half()), "scales is torch.float16"),
        ((weight, torch.ones(4, 1), nn.Parameter(torch.ones(3))), r"bias is \[3\]; it must be \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            StoredLinear.of(*of)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="weights is 'int4'; allowed: float32, bfloat16, int8, fp8"):
        dk.load("tiny-python", weights="int4")
    on_cpu = (
        "weights='fp8' is for models on CUDA, and this one is on cpu; allowed there: float32, bfloat16, int8"
    )
    with pytest.raises(ValueError, match=on_cpu):
        dk.load("tiny-python", device="cpu", weights="fp8")
    with pytest.raises(ValueError, match="merge_projections has no meaning with weights='int8'"):
        dk.load("tiny-python", weights="int8", merge_projections=True)
    with pytest.raises(ValueError, match="is for models on the CPU or on CUDA, and this one is on meta"):
        store_weights(copy.deepcopy(tiny_model()).to("meta"), "int8")
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="this GPT2LMHeadModel has no plain nn"):
        store_weights(transformers.GPT2LMHeadModel(config), "int8")
    broken = copy.deepcopy(tiny_model())
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.up_proj holds infinities"):
        store_weights(broken, "int8")
    assert not layers_of(broken)
