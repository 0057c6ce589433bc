"""Every family in both directions: from its own config.json and weight names, and back; and it samples."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import dllm_kernels as dk
from dllm_kernels.models.families import FAMILIES, diffusion_of
from tests.models.published_checkpoints import (
    EOS,
    HEADS,
    LLADA_FUSED,
    MASK,
    PAD,
    PUBLISHED,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    Published,
)

ARCHITECTURES = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM,
                 "qwen3": transformers.Qwen3ForCausalLM}  # fmt: skip
IDS = torch.randint(0, PAD, (2, 12), generator=torch.Generator().manual_seed(1))
ENCODER = dict(
    **SPECIAL, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=HEADS, max_position_embeddings=64, mask_token_id=MASK,
)  # fmt: skip
ENCODERS = {
    "bert": transformers.BertConfig(**ENCODER),
    "roberta": transformers.RobertaConfig(**{**ENCODER, "pad_token_id": 1}),
    "modernbert": transformers.ModernBertConfig(
        **ENCODER, local_attention=6, cls_token_id=None, sep_token_id=None, decoder_bias=True
    ),
    "albert": transformers.AlbertConfig(**ENCODER, embedding_size=16),
}


@pytest.fixture(params=PUBLISHED)
def published(request, tmp_path):
    """Name and folder of a family's checkpoint."""
    return request.param, PUBLISHED[request.param].write(tmp_path / "published")


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    """A masked-LM model as transformers makes it, its weights large enough to be sure of some tokens."""
    torch.manual_seed(2)
    model = transformers.AutoModelForMaskedLM.from_config(ENCODERS[request.param]).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def logits(model, ids=IDS) -> torch.Tensor:
    """Under full attention, of the model's own implementation."""
    with torch.no_grad():
        visible = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        return model(ids, attention_mask=visible).logits


def test_every_family_with_a_layout_is_tested_here():
    assert PUBLISHED.keys() | ENCODERS.keys() == {
        name for name, family in FAMILIES.items() if family.layouts or family.masked_lm
    }


def test_a_published_checkpoint_becomes_a_stock_model(published):
    name, folder = published
    model, tokenizer = dk.load(folder, device="cpu")
    family, diffusion = FAMILIES[name], diffusion_of(model)
    assert type(model) is ARCHITECTURES[family.architecture] and tokenizer is None
    assert not model.training and model.dtype == torch.float32
    assert (diffusion.attention, diffusion.shift) == (family.attention[0], name == "Dream")
    assert diffusion.mask_id == (None if name.startswith("a2d") else MASK)
    assert diffusion.block_size == (4 if name == "sdar" else None)
    assert (diffusion.eos_ids, diffusion.pad_id, diffusion.max_positions) == ((EOS,), PAD, 64)
    assert model.config.rope_parameters["rope_theta"] == 50000.0
    assert model.config._attn_implementation == ("dllm" if name == "sdar" else "sdpa")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"llada"}))
def test_weights_under_stock_names_are_the_checkpoints(name, tmp_path):
    model, _ = dk.load(PUBLISHED[name].write(tmp_path), device="cpu")
    expected = PUBLISHED[name].tensors()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == PUBLISHED[name].weights
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llada_with_biases_of_queries_keys_and_values(tmp_path, fused, kv_heads, tied):
    """Grouped queries and tied embeddings as in iLLaDA too."""
    published = llada_with_biases(fused, kv_heads, tied)
    folder = published.write(tmp_path / "a")
    model, _ = dk.load(folder, device="cpu")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert diffusion_of(model).mask_id == 5 and diffusion_of(model).attention == "bidirectional"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    weights = {name.removeprefix("model.transformer."): w for name, w in published.tensors().items()}
    expected = llada_logits(separated(weights) if fused else weights)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    if not fused:
        dk.save(model, None, tmp_path / "own", layout="llada")
        assert config_of(tmp_path / "own")["include_qkv_bias"] is True
        again, _ = dk.load(tmp_path / "own", device="cpu")
        assert torch.equal(logits(again), logits(model))


def test_llada_biases_that_are_not_in_the_file(tmp_path):
    folder = PUBLISHED["llada"].write(tmp_path, include_qkv_bias=True)
    with pytest.raises(ValueError, match=r"missing: model.layers.0.self_attn.k_proj.bias"):
        dk.load(folder, device="cpu")


def llada_with_biases(fused: bool, kv_heads: int, tied: bool) -> Published:
    base = LLADA_FUSED if fused else PUBLISHED["llada"]
    rows = WIDTH // HEADS * kv_heads
    weights = {
        name: shape for name, shape in base.weights.items() if not (tied and "transformer.ff_out" in name)
    }
    for layer in range(2):
        block = f"model.transformer.blocks.{layer}."
        sizes = {"att": WIDTH + 2 * rows} if fused else {"q": WIDTH, "k": rows, "v": rows}
        for name, size in sizes.items():
            weights[f"{block}{name}_proj.weight"] = (size, WIDTH)
            weights[f"{block}{name}_proj.bias"] = (size,)
    config = dict(include_qkv_bias=True, n_kv_heads=kv_heads, weight_tying=tied, mask_token_id=5)
    return Published({**base.config, **config}, weights)


def separated(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused projections as q, k and v; gate and linear half."""
    weights = dict(weights)
    for layer in range(2):
        block = f"blocks.{layer}."
        for kind in ("weight", "bias"):
            fused = weights.pop(f"{block}att_proj.{kind}", None)
            if fused is not None:
                rows = (len(fused) - WIDTH) // 2
                for name, part in zip("qkv", fused.split([WIDTH, rows, rows]), strict=True):
                    weights[f"{block}{name}_proj.{kind}"] = part
        weights[f"{block}up_proj.weight"], weights[f"{block}ff_proj.weight"] = weights[
            f"{block}ff_proj.weight"
        ].chunk(2)
    return weights


def test_llada_computes_what_its_blocks_say(tmp_path):
    """Its forward pass written out: RMS norms, rotary halves, full attention, silu(ff_proj) * up_proj."""
    model, _ = dk.load(PUBLISHED["llada"].write(tmp_path), device="cpu")
    weights = {name.removeprefix("model.transformer."): w for name, w in PUBLISHED["llada"].tensors().items()}
    torch.testing.assert_close(logits(model), llada_logits(weights), atol=1e-4, rtol=1e-4)


def test_fused_llada_blocks_compute_the_same(tmp_path):
    """att_proj is q, k and v; ff_proj is the linear half, then the gate."""
    fused = LLADA_FUSED.tensors()
    weights = {name.removeprefix("model.transformer."): w for name, w in fused.items()}
    model, _ = dk.load(LLADA_FUSED.write(tmp_path), device="cpu")
    torch.testing.assert_close(logits(model), llada_logits(separated(weights)), atol=1e-4, rtol=1e-4)


def llada_logits(weights: dict[str, torch.Tensor], ids=IDS) -> torch.Tensor:
    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[f"{name}.weight"]

    def projected(x, name):
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def heads(x):
        return x.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)

    def rotate(x):
        size = x.shape[-1]
        angle = torch.arange(x.shape[2])[:, None] / 50000.0 ** (torch.arange(0, size, 2) / size)
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
        )

    x = weights["wte.weight"][ids]
    for layer in range(2):
        block = f"blocks.{layer}."
        h = norm(x, f"{block}attn_norm")
        q, k, v = (heads(projected(h, f"{block}{name}_proj")) for name in "qkv")
        k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / q.shape[-1] ** 0.5
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ weights[f"{block}attn_out.weight"].T
        h = norm(x, f"{block}ff_norm")
        gate = torch.nn.functional.silu(h @ weights[f"{block}ff_proj.weight"].T)
        x = x + (gate * (h @ weights[f"{block}up_proj.weight"].T)) @ weights[f"{block}ff_out.weight"].T
    return norm(x, "ln_f") @ weights.get("ff_out.weight", weights["wte.weight"]).T


# ---- and back ---------------------------------------------------------------------------------------------
def test_saved_in_its_own_layout_it_is_what_was_published(published, tmp_path):
    name, folder = published
    model, _ = dk.load(folder, device="cpu")
    dk.save(model, None, tmp_path / "own", layout=name)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "own"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    written = config_of(tmp_path / "own")
    irrelevant = {  # how its own code initialises and runs it
        "alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "init_cutoff_factor",
        "init_device", "init_fn", "mlp_ratio", "multi_query_attention", "precision", "rope_full_precision",
        "attn_implementation",
    }  # fmt: skip
    published_config = config_of(folder)
    for key in published_config.keys() - irrelevant:
        assert written.get(key) == published_config[key], key


def test_saved_as_a_stock_checkpoint_it_keeps_its_training(published, tmp_path):
    name, folder = published
    model, _ = dk.load(folder, device="cpu")
    dk.save(model, None, tmp_path / "stock")
    assert config_of(tmp_path / "stock")["model_type"] == FAMILIES[name].architecture
    again, _ = dk.load(tmp_path / "stock", device="cpu")
    stock = ARCHITECTURES[FAMILIES[name].architecture].from_pretrained(tmp_path / "stock")
    for other in (again, stock):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    described, expected = diffusion_of(again), diffusion_of(model)
    for field in ("attention", "block_size", "shift", "mask_id", "eos_ids", "pad_id", "chat"):
        assert getattr(described, field) == getattr(expected, field), field
    torch.testing.assert_close(logits(stock), logits(model))


def test_what_a_layout_cannot_say_is_refused(tmp_path):
    model, _ = dk.load(PUBLISHED["a2d-llama"].write(tmp_path / "llama"), device="cpu")
    with pytest.raises(ValueError, match="layout 'llada' cannot express head_dim=16"):
        dk.save(model, None, tmp_path / "out", layout="llada")
    with pytest.raises(ValueError, match="a llama model can be written as llada, a2d-llama, llama"):
        dk.save(model, None, tmp_path / "out", layout="Dream")
    with pytest.raises(ValueError, match="layout is 'gpt'"):
        dk.save(model, None, tmp_path / "out", layout="gpt")
    dream, _ = dk.load(PUBLISHED["Dream"].write(tmp_path / "dream"), device="cpu")
    with pytest.raises(ValueError, match=r"'a2d-qwen2' means .*shift=False; this model has .*shift=True"):
        dk.save(dream, None, tmp_path / "out", layout="a2d-qwen2")
    sdar, _ = dk.load(PUBLISHED["sdar"].write(tmp_path / "sdar"), device="cpu")
    sdar.config.diffusion["attention"] = ["bidirectional"]
    with pytest.raises(ValueError, match="'sdar' means attention block_causal"):
        dk.save(sdar, None, tmp_path / "out", layout="sdar")
    assert not (tmp_path / "out").exists()


LLADA_VARIANTS = {
    "no heads of keys": dict(n_kv_heads=None, multi_query_attention=False),
    "width by ratio": dict(mlp_hidden_size=None, mlp_ratio=2),
    "no embedding size": dict(embedding_size=None),
}


@pytest.mark.parametrize("changes", LLADA_VARIANTS.values(), ids=LLADA_VARIANTS)
def test_llada_sizes_that_its_config_leaves_open(tmp_path, changes):
    model, _ = dk.load(PUBLISHED["llada"].write(tmp_path / "a", **changes), device="cpu")
    plain, _ = dk.load(PUBLISHED["llada"].write(tmp_path / "b"), device="cpu")
    assert model.config.to_dict() == plain.config.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        dict(alibi=True),
        dict(rope=False),
        dict(layer_norm_type="default"),
        dict(include_bias=True),
        dict(bias_for_layer_norm=True),
        dict(attention_layer_norm=True),
        dict(scale_logits=True),
        dict(block_type="parallel"),
    ],
    ids=str,
)
def test_llada_settings_that_llama_cannot_run(tmp_path, changes):
    (key,) = changes
    with pytest.raises(ValueError, match=rf"llama does not run this config.json: {key} is"):
        dk.load(PUBLISHED["llada"].write(tmp_path, **changes), device="cpu")


def test_llada_entries_that_are_not_there(tmp_path):
    folder = PUBLISHED["llada"].write(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "llada"}))
    with pytest.raises(ValueError, match="d_model is absent; n_layers is absent; n_heads is absent"):
        dk.load(folder)


# ---- masked-LM models ---------------------------------------------------------------------------------
def test_a_masked_lm_model_samples_as_a_function_of_its_ids_does(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    model, _ = dk.load(tmp_path, device="cpu")
    assert type(model) is type(encoder)
    ids = IDS.masked_fill(IDS == 1, 2)
    torch.testing.assert_close(model(ids).logits, encoder(ids).logits)
    options = dict(max_new_tokens=10, block_size=5, threshold=0.6, eos_ids=EOS, stop_on_eos=False)
    options |= dict(suppress_tokens=(1,))  # RoBERTa's padding, which moves positions
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = dk.sample(model, prompts, **options)
    expected = dk.sample(lambda ids: encoder(ids).logits, prompts, mask_id=MASK, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.unmask_step, expected.unmask_step)


def test_a_masked_lm_model_is_saved_and_loaded(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "a")
    model, _ = dk.load(tmp_path / "a", device="cpu")
    dk.save(model, None, tmp_path / "b")
    again, _ = dk.load(tmp_path / "b", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    assert diffusion_of(again).attention == "bidirectional"


def test_the_last_function_of_every_head_is_linear(encoder):
    head = diffusion_of(encoder).head
    assert isinstance(head[-1], torch.nn.Linear) and head[-1] is encoder.get_output_embeddings()


def test_roberta_has_fewer_positions_than_its_table(tmp_path):
    transformers.RobertaForMaskedLM(ENCODERS["roberta"]).save_pretrained(tmp_path)
    model, _ = dk.load(tmp_path, device="cpu")
    assert dk.sample(model, [[5, 6]], max_new_tokens=60, threshold=0.0).sequences.shape == (1, 62)
    with pytest.raises(ValueError, match="the model has 62"):
        dk.sample(model, [[5, 6]], max_new_tokens=61)


def test_bert_under_the_names_of_its_first_release(tmp_path):
    """LayerNorm.gamma and beta, tied weights once, and the heads of its other task."""
    torch.manual_seed(0)
    pretraining = transformers.BertForPreTraining(ENCODERS["bert"]).eval()
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    weights = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in pretraining.state_dict().items()
        if name not in tied
    }
    assert any(name.startswith("bert.pooler") for name in weights)
    tmp_path.joinpath("config.json").write_text(json.dumps({**ENCODERS["bert"].to_dict()}))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = dk.load(tmp_path, device="cpu")
    expected = pretraining(IDS).prediction_logits
    torch.testing.assert_close(model(IDS).logits, expected)
    dk.save(model, None, tmp_path / "own", layout="bert")
    other_heads = {name for name in weights if "pooler" in name or "seq_relationship" in name}
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == weights.keys() - other_heads
    with pytest.raises(ValueError, match="BertModel, without a head; load it with AutoModelForMaskedLM"):
        dk.sample(model.bert, [[1]])


@pytest.mark.parametrize("name", ["XLMRoberta", "Camembert", "Ernie", "MPNet", "MegatronBert", "Electra"])
def test_parts_of_encoders_that_masked_lms_do_not_have(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**{**ENCODER, "pad_token_id": 1})
    config.diffusion = {"attention": ["bidirectional"]}
    expected = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    expected.save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", expected.base_model_prefix
    more = {
        f"{prefix}.pooler.dense.weight": torch.zeros(WIDTH, WIDTH),
        f"{prefix}.pooler.dense.bias": torch.zeros(WIDTH),
        f"{prefix}.embeddings.position_ids": torch.arange(64)[None],
        "cls.seq_relationship.weight": torch.zeros(2, WIDTH),
    }
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    model, _ = dk.load(tmp_path, device="cpu")
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    save_file({**load_file(file), f"{prefix}.more": torch.zeros(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"unexpected: {prefix}\.more"):
        dk.load(tmp_path, device="cpu")


# ---- causal LMs without a row ---------------------------------------------------------------------------
TINY = dict(SPECIAL, vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
            max_position_embeddings=64)  # fmt: skip


def marked(config, path: Path) -> Path:
    """A random model of `config` whose checkpoint says that it was trained for diffusion."""
    torch.manual_seed(0)
    config.diffusion, config.mask_token_id = {"attention": ["bidirectional"]}, MASK
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_any_causal_lm_marked_bidirectional(tmp_path):
    model, _ = dk.load(marked(transformers.Olmo2Config(**TINY, intermediate_size=48), tmp_path), device="cpu")
    options = dict(max_new_tokens=8, threshold=0.02, eos_ids=EOS)
    found = dk.sample(model, [[5, 6, 7]], **options)
    expected = dk.sample(lambda ids: logits(model, ids), [[5, 6, 7]], mask_id=MASK, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.unmask_step, expected.unmask_step)


def test_a_causal_lm_that_scales_its_logits_is_refused(tmp_path):
    config = transformers.GraniteConfig(**TINY, intermediate_size=48, logits_scaling=8.0)
    model, _ = dk.load(marked(config, tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"logits of GraniteForCausalLM are more than .*cache=\"none\""):
        dk.sample(model, [[5]])
    assert not (model._forward_hooks or model.model._forward_hooks or model.lm_head._forward_hooks)


def test_a_model_whose_attention_cannot_be_hooked_says_so_and_what_to_do(tmp_path):
    sizes = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
    config = transformers.BloomConfig(**SPECIAL, **sizes)
    model, _ = dk.load(marked(config, tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r'attention of Bloom\w+ cannot be hooked.*cache="none"'):
        dk.sample(model, [[5]], max_new_tokens=4)
    output = dk.sample(lambda ids: model(ids).logits, [[5]], max_new_tokens=4, mask_id=MASK, cache="none")
    assert output.lengths.tolist() == [4]


def test_a_checkpoint_without_a_mask_token(tmp_path):
    model, _ = dk.load(PUBLISHED["a2d-qwen3"].write(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="mask_id is not known: give it"):
        dk.sample(model, [[5]], max_new_tokens=4)
    assert dk.sample(model, [[5]], max_new_tokens=4, mask_id=MASK).lengths.tolist() == [4]


def test_a_block_causal_family_samples_with_its_block_cache(tmp_path):
    model, _ = dk.load(PUBLISHED["sdar"].write(tmp_path), device="cpu")
    outputs = [dk.sample(model, [[5, 6, 7]], max_new_tokens=9, cache=cache) for cache in ("none", "block")]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    with pytest.raises(ValueError, match="trained for block_causal"):
        dk.load(tmp_path, attention="bidirectional")
