"""dk.sample against the loops that it replaces, on the same model and prompt."""

import functools

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import dllm_kernels as dk
from benchmarks import loops
from benchmarks.llada_shaped import parameters
from dllm_train.recipes.tiny_python import arithmetic, data
from dllm_train.recipes.tiny_python.evaluate import code_prompts, spread

BLOCK, PROMPT, NEW_TOKENS = 32, 256, 128
VOCABULARY, MASK_ID = 32_000, 31_999
FEW_ROUNDS = 3  # a run of the plain loop takes half a minute
PROMPT_LENGTHS = [40, 77, 100, 128, 161, 190, 233, 256]  # of a batch
CACHES = {"none": "no cache (exact)", "dual": "dual cache (approximate)"}
COMPILED = {False: "", True: ", torch.compile"}


@functools.cache
def random_model(attention: str, smoke: bool) -> Qwen3ForCausalLM:
    """Qwen3-shaped, 60M parameters, random; `attention` is what it counts as trained for."""
    layers, hidden, vocabulary = (2, 32, 120) if smoke else (8, 512, VOCABULARY)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=hidden // 64 or 1,
        head_dim=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        mask_token_id=vocabulary - 1,
        diffusion={"attention": [attention], "block_size": BLOCK},
    )
    torch.manual_seed(0)
    return loops.see_both_ways(Qwen3ForCausalLM(config).eval())


def random_prompt(length: int, model) -> list[int]:
    return torch.randint(1, model.config.vocab_size - 1, (length,)).tolist()


def sequences(model, prompts, new_tokens, **options):
    output = dk.sample(model, prompts, max_new_tokens=new_tokens, block_size=BLOCK, **options)
    return output.sequences


@pytest.mark.parametrize(
    "cache, compile",
    [("none", False), ("none", True), ("dual", False), ("dual", True)],
    ids=["none", "none-compiled", "dual", "dual-compiled"],
)
def test_sampling_bidirectional(compare, pick, smoke, cache, compile):
    model = random_model("bidirectional", smoke)
    length, new_tokens = pick((PROMPT, NEW_TOKENS), (16, 8))
    mask_id = model.config.mask_token_id
    compare(
        lambda prompt: sequences(model, [prompt], new_tokens, cache=cache, compile=compile),
        {"LLaDA's loop": lambda prompt: loops.plain_loop(model, prompt, new_tokens, BLOCK, mask_id)},
        inputs=lambda: (random_prompt(length, model),),
        title=f"{new_tokens} tokens, {parameters(model)} model, {CACHES[cache]}{COMPILED[compile]}",
        tolerance={"atol": 0, "rtol": 0} if cache == "none" and not compile else None,
        rounds=FEW_ROUNDS,
    )


@pytest.mark.parametrize("rows", [1, 8])
def test_sampling_host_work(compare, pick, rows):
    """Sampler overhead, measured with a zero-size model, against the bare loop around each row."""
    model = random_model("bidirectional", smoke=True)
    prompts, new_tokens = [random_prompt(8, model) for _ in range(rows)], pick(BLOCK, 8)

    def bare_loop():
        for prompt in prompts:
            loops.plain_loop(model, prompt, new_tokens, BLOCK, model.config.mask_token_id)

    compare(
        lambda: sequences(model, prompts, new_tokens, cache="none"),
        {"bare loop": bare_loop},
        title=f"sampler overhead, zero-size model, batch {rows}",
    )


def test_sampling_block_causal(compare, pick, smoke):
    model = random_model("block_causal", smoke)
    length, new_tokens = pick((PROMPT, NEW_TOKENS), (BLOCK, 2 * BLOCK))
    mask_id = model.config.mask_token_id
    compare(
        lambda prompt: sequences(model, [prompt], new_tokens, cache="block"),
        {"copying loop": lambda prompt: loops.copying_loop(model, prompt, new_tokens, BLOCK, mask_id)},
        inputs=lambda: (random_prompt(length, model),),
        title=f"{new_tokens} tokens, {parameters(model)} block-causal model, block cache (exact)",
        tolerance={"atol": 0, "rtol": 0},
        rounds=FEW_ROUNDS,
    )


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_sampling_batch(compare, pick, smoke, rows):
    """Unequal prompts together, and one by one."""
    model = random_model("block_causal", smoke)
    new_tokens = pick(64, 8)
    every = len(PROMPT_LENGTHS) // rows
    lengths = pick(PROMPT_LENGTHS[every // 2 :: every], [3, 9, 4, 7, 5, 8, 6, 2][:rows])

    def one_by_one(*prompts):
        for prompt in prompts:
            sequences(model, [prompt], new_tokens)

    compare(
        lambda *prompts: sequences(model, list(prompts), new_tokens),
        {"one by one": one_by_one},
        inputs=lambda: tuple(random_prompt(length, model) for length in lengths),
        title=f"{new_tokens} tokens, {parameters(model)} block-causal model, batch of {rows}",
        batch=rows,
        rounds=FEW_ROUNDS,
    )


@pytest.mark.parametrize("weights", [None, "float32", "int8"], ids=["stock", "packed", "int8"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_sampling_tiny_python(compare, pick, compile, weights):
    """The embedded model on held-out files: threshold and cache against one token per full forward."""
    model, tokenizer = dk.load("tiny-python", weights=weights)
    plain, _ = dk.load("tiny-python", attention="bidirectional")
    loops.see_both_ways(plain)
    length, new_tokens, count = pick((PROMPT, NEW_TOKENS, 3), (32, 32, 1))
    files = data.encode_documents(data.split(data.collect_sources())[1], tokenizer)
    prompts = spread([file[:length].tolist() for file in files if len(file) >= length], count)
    mask_id = model.config.mask_token_id
    options = dict(max_new_tokens=new_tokens, threshold=0.9, stop_on_eos=False, compile=compile)

    def ours():
        for prompt in prompts:
            dk.sample(model, [prompt], **options)

    def plain_loop():
        for prompt in prompts:
            loops.plain_loop(plain, prompt, new_tokens, BLOCK, mask_id)

    compare(
        ours,
        {"plain loop": plain_loop},
        title=f"{len(prompts)} × {new_tokens} tokens of code, tiny-python, threshold 0.9{COMPILED[compile]}"
        + ("" if weights is None else f", weights={weights!r}"),
        rounds=FEW_ROUNDS,
    )


@functools.cache
def held_out_prompts(task, count) -> list[list[int]]:
    """Return held-out data of the embedded model: sums of two numbers, or 128 tokens of Python files."""
    _, tokenizer = dk.load("tiny-python")
    if task == "additions":
        texts = [arithmetic.prompt(*pair) for pair in arithmetic.held_out_pairs()[:count]]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    _, documents = data.split(data.collect_sources())
    return spread(code_prompts(data.encode_documents(documents, tokenizer), tokenizer), count)


@pytest.mark.parametrize("task, new_tokens", [("additions", 16), ("code", 128)])
@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_sampling_threshold(compare, pick, task, new_tokens, threshold):
    """Many tokens a step, by the embedded model's confidence, and one."""
    model, _ = dk.load("tiny-python")
    prompts = held_out_prompts(task, pick(16, 2))
    new_tokens = pick(new_tokens, 16)
    options = dict(max_new_tokens=new_tokens, stop_on_eos=False)
    compare(
        lambda: dk.sample(model, prompts, threshold=threshold, **options),
        {"one token per step": lambda: dk.sample(model, prompts, **options)},
        title=f"{len(prompts)} × {new_tokens} tokens of {task}, tiny-python, threshold {threshold}",
        rounds=5,
    )
