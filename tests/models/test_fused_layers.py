"""`dk.fuse_layers`: recognised modules compute what they did, and others are left alone."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.activations import ACT2FN

import dllm_kernels as dk
from dllm_kernels.models import fused_layers
from dllm_kernels.models.attention import NAME
from dllm_kernels.models.merged_projections import MergedLinear, merge_projections
from dllm_kernels.models.stored_weights import StoredLinear, store_weights
from tests.sampling.tiny_models import prompts_of, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 1, 4, 1, 5, 9, 2, 6, 5]])
SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
# Fused modules of a model of two layers: attention, decoder layer, MLP, norms.
COUNTS = {
    "Llama": 2 * 5 + 1,
    "Qwen2": 2 * 5 + 1,
    "Qwen3": 2 * 7 + 1,  # norms of queries and keys
    "Mistral": 2 * 5 + 1,
    "SmolLM3": 2 * 5 + 1,
    "Granite": 2 * 4 + 1,  # residuals with a factor
    "Gemma": 2,  # norms by 1 + weight, GELU: attention alone
    "Starcoder2": 2,  # LayerNorm, no gate
    "StableLm": 2 * 2,  # LayerNorm; rotates a part of each head
    "Olmo2": 2,  # norms that round elsewhere, and float32 angles: the MLP alone
    "Cohere": 2,  # interleaved rotation
    "GPT2": 0,
}


@functools.cache
def random_model(name: str, dtype=torch.float32, **options):
    sizes = SIZES | ({"head_dim": 8} if name == "StableLm" else {})  # which knows no other
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    torch.manual_seed(0)
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    for parameter in model.parameters():  # norms too
        parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype)
    return model.to(dtype)


def pair(name: str = "Qwen3", dtype=torch.float32, **options):
    """A stock model and a fused copy."""
    stock = copy.deepcopy(random_model(name, dtype, **options))
    fused = copy.deepcopy(stock)
    dk.fuse_layers(fused)
    return stock, fused


def fused_modules(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, fused_layers._Fused)]


def run(model, **options):
    """Return logits, and the gradients of all parameters."""
    model.zero_grad()
    logits = model(IDS, **options).logits
    F.cross_entropy(logits.flatten(0, 1).float(), IDS.flatten()).backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_equal_runs(stock, fused, tolerance=2e-5, **options):
    logits, grads = run(stock, **options)
    got, got_grads = run(fused, **options)
    torch.testing.assert_close(got, logits, rtol=tolerance, atol=tolerance)
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        error = (got_grads[name] - grad).float().norm()
        assert error <= tolerance * (grad.float().norm() + 1e-3), name


# ---- what is computed --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COUNTS)
def test_models_compute_what_they_did(name):
    stock, fused = pair(name)
    assert dk.fuse_layers(fused) == COUNTS[name] == len(fused_modules(fused))
    assert_equal_runs(stock, fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_round_alike(dtype):
    stock, fused = pair("Qwen3", dtype)
    with torch.no_grad():
        expected, got = stock(IDS).logits.float(), fused(IDS).logits.float()
        exact = copy.deepcopy(stock).float()(IDS).logits
    assert (got - expected).norm() < 0.5 * (expected - exact).norm()


def test_the_operators_run():
    model = pair()[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model)
    counts = {event.key: event.count for event in profile.key_averages()}
    layers = 2
    assert counts["dllm_kernels::rms_norm"] == 3 * layers + 1
    assert counts["dllm_kernels::add_rms_norm"] == counts["dllm_kernels::rotate_half"] == layers
    assert counts["dllm_kernels::silu_mul"] == 2 * layers  # once more in the backward pass
    assert "aten::silu" not in counts and "aten::rsqrt" not in counts


def test_dtypes_without_kernels_are_computed_as_before():
    stock, fused = (model.double() for model in pair())
    (logits, grads), (got, got_grads) = run(stock), run(fused)
    assert torch.equal(got, logits) and all(torch.equal(got_grads[n], g) for n, g in grads.items())


def test_autocast():
    """Norms of float32 in float32, products of bfloat16; mixed dtypes take the stock path."""
    stock, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_runs(stock, fused, tolerance=2e-2)


def test_weights_of_another_dtype_than_activations():
    stock, fused = pair("Llama", torch.bfloat16)
    for model in (stock, fused):
        model.model.norm.float()
        model.lm_head.float()
    assert torch.equal(
        fused.model.norm(torch.ones(1, 32).bfloat16()), stock.model.norm(torch.ones(1, 32).bfloat16())
    )
    assert_equal_runs(stock, fused, tolerance=5e-2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", NAME])
def test_attention_implementations_and_masks(implementation):
    stock, fused = pair()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    for model in (stock, fused):
        model.set_attn_implementation(implementation)
    assert_equal_runs(stock, fused, attention_mask=mask)


def test_generation_with_a_cache():
    stock, fused = pair("Llama")
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(fused.generate(IDS, **options), stock.generate(IDS, **options))


def test_recorded_outputs():
    stock, fused = pair()
    for model in (stock, fused):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected, got = (m(IDS, output_hidden_states=True, output_attentions=True) for m in (stock, fused))
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for name in ("hidden_states", "attentions"):
        for a, b in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_deprecated_names_of_arguments_still_work():
    """The decorators of transformers stay around the forward."""
    stock, fused = pair("Llama")
    rotary = stock.model.rotary_emb(torch.zeros(1, 9, 32), torch.arange(9)[None])
    x = torch.randn(1, 9, 32)
    for path in ("", ".self_attn"):
        caches = [transformers.DynamicCache(), transformers.DynamicCache()]
        results = []
        for model, cache in zip((stock, fused), caches, strict=True):
            layer = model.get_submodule(f"model.layers.0{path}")
            with pytest.warns(FutureWarning, match="past_key_values"):
                out = layer(x, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
            results.append(out[0] if isinstance(out, tuple) else out)
        torch.testing.assert_close(*results)
        assert caches[1].get_seq_length() == 9


# ---- memory ------------------------------------------------------------------------------------------------
def kept_bytes(model) -> int:
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=torch.ones(2, 64, 32, requires_grad=True))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(count for address, (count, _) in kept.items() if address not in weights)


def test_less_is_kept_for_the_backward_pass():
    stock, fused = (model.model for model in pair())
    assert kept_bytes(fused) < 0.7 * kept_bytes(stock)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    stock, fused = pair()
    for model in (stock, fused):
        model.train()
    plain = run(fused)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = run(fused)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(grad, again[1][name]) for name, grad in plain[1].items())


# ---- look-alikes -------------------------------------------------------------------------------------------
class OtherNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 1


class OtherMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class OtherLayer(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return 2 * super().forward(hidden_states, **kwargs)


@pytest.mark.parametrize("kind", [OtherNorm, OtherMLP, OtherLayer])
def test_a_subclass_with_another_forward_is_left_alone(kind):
    stock, _ = pair("Llama")
    for module in stock.modules():
        if type(module) is kind.__base__:
            module.__class__ = kind
    fused = copy.deepcopy(stock)
    dk.fuse_layers(fused)
    assert not any(isinstance(module, kind) for module in fused_modules(fused))
    assert_equal_runs(stock, fused)


def test_a_subclass_with_the_same_forward_is_fused():
    class Named(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        pass

    norm = Named(8)
    assert dk.fuse_layers(norm) == 1 and isinstance(norm, Named) and type(norm).__name__ == "Named"


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_are_left_alone(activation):
    stock, fused = pair("Llama", hidden_act=activation)
    assert not isinstance(fused.model.layers[0].mlp, fused_layers._Fused)
    assert_equal_runs(stock, fused)


def test_an_activation_that_is_replaced_afterwards():
    stock, fused = pair("Llama")
    for model in (stock, fused):
        model.model.layers[0].mlp.act_fn = ACT2FN["gelu"]
    assert_equal_runs(stock, fused)


@pytest.mark.parametrize("before", [True, False])
def test_a_forward_on_the_instance_is_kept(before):
    """As accelerate's hooks replace it, before or after."""
    paths = ["model.norm", "model.layers.0.mlp", "model.layers.0.post_attention_layernorm", "model.layers.1"]
    stock, fused = copy.deepcopy(random_model("Llama")), copy.deepcopy(random_model("Llama"))
    if not before:
        dk.fuse_layers(fused)
    for model in (stock, fused):
        for path in paths:
            module = model.get_submodule(path)
            module.forward = types.MethodType(
                lambda self, *args, old=module.forward, **kwargs: 0.5 * old(*args, **kwargs), module
            )
    dk.fuse_layers(fused)
    assert_equal_runs(stock, fused)


class Rotating(nn.Module):
    """A forward that uses transformers' name for another rotation."""

    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def apply_rotary_pos_emb(q, k, cos, sin):
    return q * cos - q.flip(-1) * sin, k * cos


def test_a_rotation_with_another_default_is_left_alone():
    stock = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    other = types.FunctionType(stock.__code__, stock.__globals__, stock.__name__, (2,))
    assert fused_layers._is_stock_rotation(stock) and not fused_layers._is_stock_rotation(other)


def test_another_rotation_of_that_name_is_left_alone():
    assert dk.fuse_layers(Rotating()) == 0


def test_shapes_that_the_rotation_does_not_have():
    """Broadcast angles, another dimension of heads, a part of the dimensions."""
    rotation = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    heads, angles = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8)
    for q, k, cos, sin, dim in (
        (heads, heads, angles[:, :1], angles[:, :1], 1),
        (heads.transpose(1, 2), heads.transpose(1, 2), angles, angles, 2),
        (heads, heads.half(), angles, angles, 1),
        (heads.double(), heads.double(), angles, angles, 1),
    ):
        got, expected = fused_layers._rotate(q, k, cos, sin, dim), rotation(q, k, cos, sin, dim)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---- hooks, adapters, other wrappers -----------------------------------------------------------------------
def test_hooks_are_called_as_before():
    stock, fused = pair("Llama")
    calls = {}
    for which, model in (("stock", stock), ("fused", fused)):
        calls[which] = []
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda m, i, o, n=name, w=which: calls[w].append(n))
                module.register_full_backward_hook(lambda m, i, o, n=name, w=which: calls[w].append("<" + n))
    assert_equal_runs(stock, fused)
    assert sorted(calls["fused"]) == sorted(calls["stock"])


def test_hooks_that_change_results():
    stock, fused = pair("Llama")
    for model in (stock, fused):
        layer = model.model.layers[0]
        layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, output: 2 * output)
        layer.mlp.act_fn.register_forward_hook(lambda module, inputs, output: output + 1)
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    assert_equal_runs(stock, fused)


def test_adapters_on_top():
    from peft import LoraConfig, get_peft_model

    models = pair()
    config = LoraConfig(target_modules="all-linear", modules_to_save=["post_attention_layernorm"], r=2)
    wrapped = []
    for model in models:
        torch.manual_seed(1)
        wrapped.append(get_peft_model(model, copy.deepcopy(config)))
        for name, parameter in wrapped[-1].named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    assert len(fused_modules(wrapped[1])) > 10
    assert_equal_runs(*wrapped)
    merged = [model.merge_and_unload() for model in wrapped]
    assert_equal_runs(*merged)


@pytest.mark.parametrize("first", ["merge", "fuse"])
def test_merged_projections(first):
    stock = random_model("Llama")
    model = copy.deepcopy(stock)
    for step in (merge_projections, dk.fuse_layers)[:: 1 if first == "merge" else -1]:
        step(model)
    assert len(fused_modules(model)) == COUNTS["Llama"]
    assert sum(isinstance(module, MergedLinear) for module in model.modules()) == 10
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_stored_weights(kind):
    stored = copy.deepcopy(random_model("Llama"))
    store_weights(stored, kind)
    fused = copy.deepcopy(stored)
    assert dk.fuse_layers(fused) == COUNTS["Llama"]
    with torch.no_grad():
        expected, got = stored(IDS).logits, fused(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-2 if kind == "int8" else 1e-4, atol=2e-2)


def test_frozen_weights():
    stock, fused = pair()
    for model in (stock, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "up_proj" in name)
    assert_equal_runs(stock, fused)


# ---- the model stays a stock model -------------------------------------------------------------------------
def test_parameters_names_and_classes_stay():
    model = copy.deepcopy(random_model("Llama"))
    before = dict(model.named_parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = [*model.state_dict()]
    assert dk.fuse_layers(model) == dk.fuse_layers(model) == COUNTS["Llama"]
    after = dict(model.named_parameters())
    assert [*after] == [*before] and all(after[name] is before[name] for name in after)
    assert [*model.state_dict()] == keys
    for name, module in model.named_modules():
        assert isinstance(module, classes[name]) and type(module).__name__ == classes[name].__name__


def test_the_classes_of_transformers_are_untouched():
    stock, _ = pair("Llama")
    assert type(stock.model.layers[0]) is transformers.models.llama.modeling_llama.LlamaDecoderLayer
    assert not fused_modules(stock) and not fused_modules(random_model("Llama"))


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copies_and_pickles():
    fused = pair()[1]
    expected = run(fused)
    for other in copies(fused):
        assert len(fused_modules(other)) == COUNTS["Qwen3"]
        got = run(other)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(got[1][name], grad) for name, grad in expected[1].items())


def test_saving(tmp_path):
    model = copy.deepcopy(tiny_model())
    dk.fuse_layers(model)
    dk.save(model, None, tmp_path / "mine")
    again, _ = dk.load(tmp_path / "mine", device="cpu")
    assert not fused_modules(again)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options, fused", [({}, False), ({"fused": True}, True), ({"weights": "float32"}, True),
                       ({"weights": "int8", "fused": False}, False)],
)  # fmt: skip
def test_load(options, fused):
    model, _ = dk.load("tiny-python", device="cpu", **options)
    assert bool(fused_modules(model)) is fused
    assert any(isinstance(m, StoredLinear) for m in model.modules()) is ("weights" in options)


# ---- sampling ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", ["none", "dual", "block"])
@pytest.mark.parametrize("compile", [False, True])
def test_sampled_tokens_are_the_same(cache, compile):
    attention = "block_causal" if cache == "block" else "bidirectional"
    stock = tiny_model(attention=attention)
    fused = copy.deepcopy(stock)
    dk.fuse_layers(fused)
    options = dict(max_new_tokens=16, threshold=0.4, cache=cache)
    expected = dk.sample(stock, prompts_of(5, 12, 3), **options)
    got = dk.sample(fused, prompts_of(5, 12, 3), compile=compile, **options)
    assert got.sequences.equal(expected.sequences)


def test_fusing_between_compiled_calls():
    model = copy.deepcopy(tiny_model())
    options = dict(max_new_tokens=8, compile=True)
    before = dk.sample(model, prompts_of(5), **options).sequences
    dk.fuse_layers(model)
    assert dk.sample(model, prompts_of(5), **options).sequences.equal(before)


def test_a_function_is_no_model():
    with pytest.raises(TypeError, match=r"^model is a function; expected a torch\.nn\.Module"):
        dk.fuse_layers(lambda ids: ids)


def test_training_under_torch_compile():
    stock, fused = pair()
    fused.model.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    assert_equal_runs(stock, fused)
