"""A loaded model that is called like any transformers model sees what it was trained to see."""

import threading

import numpy as np
import pytest
import torch
import transformers

import dllm_kernels as dk
from tests.models.published_checkpoints import PUBLISHED

BLOCK, LENGTH = 4, 14
IDS = torch.randint(0, 110, (2, LENGTH), generator=torch.Generator().manual_seed(0))
SIZES = dict(
    vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2)
CONFIGS = {
    "mistral with windows": transformers.MistralConfig(**SIZES, **GROUPED, sliding_window=5),
    "qwen2 with windows": transformers.Qwen2Config(
        **SIZES, **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**{**SIZES, "eos_token_id": 2, "bos_token_id": 1}),
    "falcon": transformers.FalconConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False,
        bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip
CAPPED_OR_WITH_SINKS = {
    "gemma2": transformers.Gemma2Config(
        **SIZES, **GROUPED, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, **GROUPED, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    ),
}
KINDS = ("bidirectional", "block_causal")
PADDING = {"none": (0, 0), "right": (0, 5), "left": (3, 0)}


def real_tokens(left: int, right: int) -> torch.Tensor:
    """int64 [2, S], the second row padded."""
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :left] = 0
    real[1, LENGTH - right :] = 0
    return real


def seen(kind: str, real: torch.Tensor) -> torch.Tensor:
    """bool [2, 1, S, S]: real keys, up to the end of a query's block, counted from the first real token."""
    block = (torch.arange(LENGTH) - real.argmax(1, keepdim=True)) // BLOCK
    dense = real.bool()[:, None, :].expand(-1, LENGTH, -1)
    if kind == "block_causal":
        dense = dense & (block[:, :, None] >= block[:, None, :])
    return dense[:, None]


def expected_logits(model, dense: torch.Tensor) -> torch.Tensor:
    """Return logits of the model's eager attention under a 4-D mask, cut to windows if layers have them."""
    window = getattr(model.config, "sliding_window", None)
    if window is not None:
        near = dense & ((torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() < window)
        mixed = "full_attention" in (getattr(model.config, "layer_types", None) or ())
        dense = {"full_attention": dense, "sliding_attention": near} if mixed else near
    before = model.config._attn_implementation
    model.config._attn_implementation_internal = "eager"

    def added(mask):
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    mask = {name: added(mask) for name, mask in dense.items()} if isinstance(dense, dict) else added(dense)
    try:
        with torch.no_grad():
            return model(IDS, attention_mask=mask, use_cache=False).logits
    finally:
        model.config._attn_implementation_internal = before


def saved(tmp_path, config, kind):
    """A folder with a random checkpoint, marked by hand, that plain transformers wrote."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    model.config.mask_token_id, model.config.diffusion = 119, {"attention": [kind], "block_size": BLOCK}
    model.save_pretrained(tmp_path)
    return tmp_path


def check(model, kind):
    for left, right in PADDING.values():
        real = real_tokens(left, right)
        expected = expected_logits(model, seen(kind, real))
        with torch.no_grad():
            found = model(IDS, attention_mask=real).logits
            without_mask = model(IDS).logits
        torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=2e-4, rtol=0)
        if left == right == 0:
            torch.testing.assert_close(without_mask, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_published_checkpoints(tmp_path, family, kind):
    entry = {"attention": [kind], "block_size": BLOCK}
    folder = PUBLISHED[family].write(tmp_path, diffusion=entry, mask_token_id=119)
    if "block_size" in PUBLISHED[family].config:
        assert PUBLISHED[family].config["block_size"] == BLOCK
    check(dk.load(folder, device="cpu")[0], kind)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_attend(tmp_path, name, kind):
    """Windows, learned positions, and models that are not attached to transformers' attention interface."""
    check(dk.load(saved(tmp_path, CONFIGS[name], kind), device="cpu")[0], kind)


@pytest.mark.parametrize("name", CAPPED_OR_WITH_SINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_our_attention_does_not_have_is_left_to_eager(tmp_path, name, kind):
    model, _ = dk.load(saved(tmp_path, CAPPED_OR_WITH_SINKS[name], kind), device="cpu")
    assert model.config._attn_implementation == "eager"
    check(model, kind)
    with (
        dk.enable_attention(model),
        pytest.raises(ValueError, match=r'(softcap|s_aux).*set_attn_implementation\("eager"\)'),
    ):
        model(IDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(("mistral with windows", implementation) for implementation in ("eager", "sdpa", "dllm")),
        *(("gpt_neox", implementation) for implementation in ("eager", "sdpa", "flex_attention")),
    ],
)
def test_every_attention_implementation(tmp_path, name, kind, implementation):
    model, _ = dk.load(saved(tmp_path, CONFIGS[name], kind), device="cpu")
    model.set_attn_implementation(implementation)
    check(model, kind)


def llada(tmp_path, kind="bidirectional"):
    return PUBLISHED["llada"].write(tmp_path, diffusion={"attention": [kind], "block_size": BLOCK})


@pytest.mark.parametrize("write", ["save_pretrained", "dk.save"])
def test_plain_transformers_sees_the_whole_row_too(tmp_path, write):
    model, _ = dk.load(llada(tmp_path / "published"), device="cpu")
    folder = tmp_path / "stock"
    if write == "dk.save":
        dk.save(model, None, folder)
    else:
        model.save_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config.is_causal is False
    check(plain, "bidirectional")


def test_a_checkpoint_of_both_kinds_sees_the_one_it_is_loaded_for():
    for kind in KINDS:
        model, _ = dk.load("tiny-python", device="cpu", attention=kind)
        ids = torch.arange(40)[None]
        block = torch.arange(40) // model.config.diffusion["block_size"]
        dense = torch.ones(40, 40, dtype=torch.bool) if kind == "bidirectional" else block[:, None] >= block
        with torch.no_grad():
            found = model(ids).logits
            expected = model(ids, attention_mask=dense[None, None]).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_causal_mask_is_there_for_the_asking(tmp_path):
    for kind in KINDS:
        model, _ = dk.load(llada(tmp_path / kind, kind), device="cpu")
        causal = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
        with torch.no_grad():
            found = model(IDS, is_causal=True).logits
        torch.testing.assert_close(found, expected_logits(model, causal), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_of_block_causal_models_are_separate(tmp_path, kind):
    """Position ids that start again tell of another document, as for any transformers model."""
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None].expand(2, -1)
    with torch.no_grad():
        packed = model(IDS, position_ids=positions).logits
        alone = torch.cat([model(IDS[:, :9]).logits, model(IDS[:, 9:]).logits], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_with_holes(tmp_path, kind):
    model, _ = dk.load(llada(tmp_path, kind), device="cpu")
    real = real_tokens(2, 3)
    real[:, 6:8] = 0
    with torch.no_grad():
        found = model(IDS, attention_mask=real).logits
    expected = expected_logits(model, seen(kind, real))
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_sees_the_same(tmp_path, kind, checkpointing):
    """Gradients are those under the 4-D mask, with recomputed activations too."""
    model, _ = dk.load(llada(tmp_path, kind), device="cpu")
    real = real_tokens(0, 5)
    labels = IDS.masked_fill(real == 0, -100)
    dense = seen(kind, real)
    gradients = []
    for mask in (dense, real):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_models(tmp_path, kind):
    """peft, accelerate and Trainer hand the call on."""
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    model, _ = dk.load(llada(tmp_path / "m", kind), device="cpu")
    real = real_tokens(3, 0)
    expected = expected_logits(model, seen(kind, real))[real.bool()]
    with torch.no_grad():
        prepared = accelerate.Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
        found = prepared(input_ids=IDS, attention_mask=real).logits
        torch.testing.assert_close(found[real.bool()], expected, atol=2e-4, rtol=0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # starts as zero
        found = adapted(input_ids=IDS, attention_mask=real).logits
        torch.testing.assert_close(found[real.bool()], expected, atol=2e-4, rtol=0)

    rows = [dict(input_ids=row, labels=row) for row in IDS]
    options = transformers.TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True, disable_tqdm=True)
    metrics = transformers.Trainer(adapted, options, eval_dataset=rows).evaluate()
    with torch.no_grad():
        logits = expected_logits(model, seen(kind, torch.ones(2, LENGTH, dtype=torch.long)))
    loss = model.loss_function(logits, IDS, vocab_size=120)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_flash_attention_refuses_blocks_by_name(tmp_path):
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r'flash_attention_2.*block_causal.*llama.*set_attn_implementation\("dllm"\)'
    ):
        model(IDS)


def test_a_diffusion_entry_that_says_nothing_sensible_is_refused(tmp_path):
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    for entry, reason in (
        ({"attention": ["block_causal"]}, 'blocks without a "block_size"'),
        (
            {"attention": ["block_causal"], "block_size": 0},
            'config.diffusion is .*"block_size" of at least 1',
        ),
        ({"attention": ["both"], "block_size": 4}, "config.diffusion is .*bidirectional"),
    ):
        model.config.diffusion = entry
        with pytest.raises(ValueError, match=reason):
            model(IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_attention_sinks_keep_their_own_attention(tmp_path, kind):
    """GPT-OSS adds to the softmax what our attention does not have."""
    config = transformers.GptOssConfig(
        **SIZES, **GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention", "full_attention"], sliding_window=5,
    )  # fmt: skip
    check(dk.load(saved(tmp_path, config, kind), device="cpu")[0], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", PADDING)
def test_layers_that_attend_in_chunks(tmp_path, kind, padding):
    """Chunks count from a row's first real token; masks given whole reach every layer as they are."""
    config = transformers.Llama4TextConfig(
        **SIZES, **GROUPED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8,
        layer_types=["chunked_attention"] * 3, no_rope_layers=[1, 1, 1], moe_layers=[0],
    )  # fmt: skip
    model, _ = dk.load(saved(tmp_path, config, kind), device="cpu")
    real = real_tokens(*PADDING[padding])
    chunk = (torch.arange(LENGTH) - real.argmax(1, keepdim=True)) // 8
    expected = expected_logits(model, seen(kind, real) & (chunk[:, None, :, None] == chunk[:, None, None]))
    with torch.no_grad():
        found = model(IDS, attention_mask=real).logits
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=2e-4, rtol=0)


# ---- 4-D masks ---------------------------------------------------------------------------------------------
def test_masks_of_inference_mode(tmp_path):
    """They count no changes in place, and still count anew after one."""
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    with torch.inference_mode():
        mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
        for dense in (mask, mask.tril_()):
            found = model(IDS, attention_mask=dense).logits
            torch.testing.assert_close(found, expected_logits(model, dense), atol=2e-4, rtol=0)


def test_masks_whose_memory_is_rewritten(tmp_path):
    """torch counts no changes through numpy, nor those of `.data`."""
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    buffer = np.ones((2, 1, LENGTH, LENGTH), dtype=bool)
    mask = torch.from_numpy(buffer)
    with torch.no_grad():
        model(IDS, attention_mask=mask)
        for change in (lambda: np.copyto(buffer, np.tril(buffer)), lambda: mask.data.fill_(True)):
            change()
            found = model(IDS, attention_mask=mask).logits
            torch.testing.assert_close(found, expected_logits(model, mask.clone()), atol=2e-4, rtol=0)


@pytest.mark.parametrize("made_within", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_masks_that_evaluation_saw_first_serve_training(made_within, window):
    sizes = {**SIZES, **GROUPED, "head_dim": 8, "sliding_window": window}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))
    positions = torch.arange(LENGTH)[None]
    with torch.inference_mode(made_within):
        span_mask = dk.SpanMask.causal(LENGTH)
        dense = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    masks = [
        {"dllm_mask": span_mask, "position_ids": positions},
        *([] if window else [{"attention_mask": dense}]),
    ]
    with dk.enable_attention(model):
        for mask in masks:
            with torch.inference_mode():
                evaluated = model(IDS, **mask).logits
            model.zero_grad()
            trained = model(IDS, **mask).logits
            trained.sum().backward()
            torch.testing.assert_close(trained, evaluated.clone(), atol=1e-5, rtol=0)
            assert all(p.grad is not None for p in model.model.layers.parameters())


def test_threads_keep_their_masks_apart(tmp_path):
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    full = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    masks = [full, full.tril(), full.triu() | full.tril(-4)]
    expected = [expected_logits(model, mask) for mask in masks]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(100):
                found = model(IDS, attention_mask=masks[index].clone()).logits
                if not torch.allclose(found, expected[index], atol=2e-4):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_masks_are_refused_by_name(tmp_path, dtype):
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=dtype)
    with pytest.raises(ValueError, match=r"attention_mask is .*bool"):
        model(IDS, attention_mask=mask)


@pytest.mark.parametrize("implementation", ["dllm", "sdpa"])
@pytest.mark.parametrize("shape", [(3, LENGTH), (2, LENGTH - 4), (2, LENGTH, LENGTH)])
def test_padding_of_another_size_is_named(tmp_path, shape, implementation):
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=rf"attention_mask is .*{shape[-1]}\]; allowed: \[2, {LENGTH}\]"):
        model(IDS, attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(3, 1, LENGTH, LENGTH), (2, 1, 5, LENGTH), (2, 1, LENGTH, LENGTH - 4)])
def test_4d_masks_of_another_size_are_named(tmp_path, shape):
    model, _ = dk.load(llada(tmp_path, "block_causal"), device="cpu")
    with pytest.raises(ValueError, match=rf"attention_mask is .*= \[2, 1, {LENGTH}, {LENGTH}\]"):
        model(IDS, attention_mask=torch.ones(shape, dtype=torch.bool))


# ---- caches and compilation --------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_that_of_sdpa(cache):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **GROUPED)).eval()
    options = dict(
        attention_mask=real_tokens(3, 0), max_new_tokens=6, do_sample=False, pad_token_id=0,
        cache_implementation=cache,
    )  # fmt: skip
    expected = model.generate(IDS, **options)
    with dk.enable_attention(model):
        assert torch.equal(model.generate(IDS, **options), expected)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("padded", ["none", "2-D", "4-D"])
def test_one_graph_under_compile(kind, padded):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**{**SIZES, "num_hidden_layers": 2}, **GROUPED, sliding_window=5)
    model = transformers.MistralForCausalLM(config).eval()
    if kind is not None:
        model.config.diffusion = {"attention": [kind], "block_size": BLOCK}
    real = real_tokens(3, 0)
    mask = {"none": None, "2-D": real, "4-D": seen("block_causal", real)}[padded]
    torch._dynamo.reset()
    with torch.no_grad(), dk.enable_attention(model):
        expected = model(IDS, attention_mask=mask, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[real.bool()], expected[real.bool()], atol=1e-4, rtol=0)
