"""The probe of a model: the calls of its attention, and whether tokens interact elsewhere."""

import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

import dllm_kernels as dk
from dllm_kernels.models.families import diffusion_of
from dllm_kernels.models.probe import traits_of
from tests.models.test_attention_hook import MODELS, untrained
from tests.models.tiny_types import tiny_model as tiny_type

MASK = 63


def marked(model, attention="bidirectional"):
    model.config.mask_token_id = MASK
    model.config.diffusion = {"attention": [attention], "block_size": 4}
    return model.eval()


def traits(model):
    return traits_of(model, diffusion_of(model))


@pytest.fixture
def qwen():
    torch.manual_seed(0)
    return marked(untrained("qwen3"))


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_tokens_meet_in_attention_alone(name):
    model = marked(untrained(name))
    config, found = model.config, traits(model)
    heads, layers = getattr(config, "num_key_value_heads", None) or 4, len(found.kv_heads)
    assert found.local and layers == config.num_hidden_layers
    assert set(found.kv_heads) == {heads} and set(found.head_dims) == {getattr(config, "head_dim", None) or 8}


SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, n_routed_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
# Configs whose attention is given other keys than they say: heads and widths of each call.
HEADS = {
    "keys repeated for each expert of a token": (
        transformers.JetMoeConfig(
            **{**SIZES, "num_attention_heads": None}, num_key_value_heads=2, kv_channels=16,
            num_local_experts=4, num_experts_per_tok=2,
        ),
        (4,) * 2, (16,) * 2,
    ),
    "two calls in a layer": (
        transformers.DiffLlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16), (2,) * 4, (16,) * 4,
    ),
    "values narrower than keys": (
        transformers.DeepseekV2Config(**SIZES, **EXPERTS, **LATENT, num_key_value_heads=4),
        (4,) * 2, (16,) * 2,
    ),
    "layers of two widths": (
        transformers.Gemma4TextConfig(
            **{**SIZES, "bos_token_id": 2}, num_key_value_heads=2, head_dim=16, global_head_dim=32,
            layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
        ),
        None, (16, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "kv_heads", "head_dims"), HEADS.values(), ids=HEADS)
def test_heads_that_no_config_tells(config, kv_heads, head_dims):
    torch.manual_seed(0)
    model = marked(transformers.AutoModelForCausalLM.from_config(config), "block_causal")
    for weight in model.parameters():
        weight.data.mul_(2 if weight.dim() > 1 else 1)
    found = traits(model)
    assert found.local and found.head_dims == head_dims and kv_heads in (None, found.kv_heads)
    prompts, options = [[5, 6, 7], [8] * 9], dict(max_new_tokens=9, threshold=0.02)
    none, block = (dk.sample(model, prompts, cache=cache, **options).sequences for cache in ("none", "block"))
    assert torch.equal(none, block)


class Shifted(nn.Module):
    """A layer's part that also sees the token `by` places before, as token-shift convolutions do."""

    def __init__(self, part, by):
        super().__init__()
        self.part, self.by = part, by

    def forward(self, x):
        return self.part(x + x.roll(self.by, dims=1))


class Bigrams(nn.Embedding):
    """An embedding of pairs of ids."""

    def forward(self, ids):
        return super().forward(ids) + super().forward((ids + 3 * ids.roll(1, dims=1)) % self.num_embeddings)


def shift(model, by):
    layer = model.model.layers[1]
    layer.mlp = Shifted(layer.mlp, by)


@pytest.mark.parametrize("change", ["shift", "bigrams"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_meet_elsewhere_are_found(qwen, change, dtype):
    qwen.to(dtype)
    assert traits(qwen).local
    if change == "shift":
        shift(qwen, 1)
    else:
        qwen.model.embed_tokens.__class__ = Bigrams
    found = traits(qwen)
    assert not found.local


def test_their_rows_are_computed_one_by_one(qwen):
    """As a function of whole canvases, one row at a time, would."""
    shift(qwen, 1)
    rows, options = [[5, 6, 7], [8] * 9, [9] * 5], dict(max_new_tokens=9, block_size=4, threshold=0.02)
    together = dk.sample(qwen, rows, **options)

    def logits(ids):
        return qwen(ids, attention_mask=torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)).logits

    for row, tokens in zip(rows, together.sequences, strict=True):
        expected = dk.sample(logits, [row], mask_id=MASK, **options).sequences[0]
        assert torch.equal(tokens[: len(expected)], expected)
    assert together.exact


def test_what_they_cannot_have_is_refused(qwen):
    shift(qwen, 1)
    with pytest.raises(
        ValueError, match=r'cache="dual" keeps keys and values, and in Qwen3ForCausalLM tokens'
    ):
        dk.sample(qwen, [[5]], cache="dual")
    marked(qwen, "block_causal")
    with pytest.raises(ValueError, match=r'cache="block" keeps'):
        dk.sample(qwen, [[5]], cache="block")
    layer = qwen.model.layers[1]
    layer.mlp = Shifted(layer.mlp.part, -1)
    with pytest.raises(
        ValueError, match="Qwen3ForCausalLM is marked block_causal, but its tokens depend on later"
    ):
        dk.sample(qwen, [[5]])


REFUSED = {
    "mamba": "MambaForCausalLM cannot be sampled with our attention: it has no attention",
    "doge": "DogeForCausalLM cannot be sampled with our attention",
    "gpt_oss": "GptOssForCausalLM cannot be sampled with our attention: GptOssAttention uses s_aux",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_sampled_is_named(model_type):
    with pytest.raises(ValueError, match=rf'{REFUSED[model_type]}.*dk.sample\(lambda ids: .*cache="none"'):
        dk.sample(marked(tiny_type(model_type)), [[5, 6]], max_new_tokens=4)


def test_asking_leaves_the_model_as_it_was(qwen):
    calls = []
    qwen.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    qwen.train()
    state, random = {name: value.clone() for name, value in qwen.state_dict().items()}, torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in qwen.modules()]
    assert traits(qwen).local
    assert not calls and all(module.training for module in qwen.modules())
    assert hooks == [len(module._forward_hooks) for module in qwen.modules()]
    assert all(torch.equal(value, state[name]) for name, value in qwen.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and qwen.config._attn_implementation == "sdpa"


def test_a_model_is_asked_once_and_forgotten_with_it(qwen):
    found = traits(qwen)
    assert traits(qwen) is found
    qwen.bfloat16()
    assert traits(qwen) is not found
    known = weakref.ref(qwen.model)
    qwen.model = None
    gc.collect()
    assert known() is None


def test_weights_that_are_not_numbers_are_no_verdict(qwen):
    """NaN in every token says nothing of whether tokens meet; mended weights are asked anew."""
    weight = qwen.model.layers[0].mlp.up_proj.weight.data
    before, weight[0, 0] = weight[0, 0].item(), torch.nan
    with pytest.raises(
        ValueError, match="Qwen3ForCausalLM cannot be sampled with our attention: it computes NaN"
    ):
        dk.sample(qwen, [[5]], max_new_tokens=4)
    weight[0, 0] = before
    assert traits(qwen).local


def test_asking_for_the_head_is_not_seen_by_hooks_nor_in_random_numbers():
    """Of a type without a row, whose logits are compared with those of its output embeddings. Only a hook on
    the model itself, which may change them, sees the one forward that this takes."""
    model, calls = marked(tiny_type("olmo2")).train(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(type(module)))
    random = torch.get_rng_state()
    assert diffusion_of(model).head == diffusion_of(model).head == (model.lm_head,)
    assert calls == [type(model)] and torch.equal(torch.get_rng_state(), random)


def test_few_ids_are_enough(qwen):
    """Tokens that look ahead are found in a vocabulary of three."""
    qwen.set_input_embeddings(nn.Embedding(3, 32))
    qwen.config.vocab_size = 3
    shift(qwen, -1)
    found = traits(qwen)
    assert not found.local and not found.causal
