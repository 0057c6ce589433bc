"""Linear layers that store their weights in fewer bytes: a block with the dual cache, and loading.

A block: both sides run the same forwards, one over the whole canvas and one for each further token. Tokens
may differ where weights are rounded.

Loading is from a warm page cache, beside from_pretrained of the float32 checkpoint. That maps the file and
reads it in the first forward, so that rows with one forward show what a user waits for. Memory is the peak
that a call adds, pages of mapped files included.
"""

import copy
import functools

import pytest
import torch
from transformers import LlamaForCausalLM

import dllm_kernels as dk
from benchmarks.llada_shaped import parameters, random_model
from benchmarks.step_parts import with_weights
from dllm_kernels.models.stored_weights import KINDS_ON, store_weights

BLOCK, CANVAS, ROUNDS = 32, 512, 3


@functools.cache
def stock_model(smoke: bool):
    return random_model(*((2, 64, 256) if smoke else (16, 1024, 50_257)))


@pytest.mark.parametrize("kind", KINDS_ON["cpu"])
def test_weights(compare, pick, smoke, kind):
    stock = stock_model(smoke)
    model = with_weights(stock, kind)
    canvas = pick(CANVAS, 2 * BLOCK)
    options = dict(max_new_tokens=BLOCK, block_size=BLOCK, steps=BLOCK, cache="dual", stop_on_eos=False)

    def forwards(model, prompt) -> torch.Tensor:
        return torch.tensor(dk.sample(model, [prompt], **options).forwards)

    compare(
        lambda prompt: forwards(model, prompt),
        {"stock float32 layers": lambda prompt: forwards(stock, prompt)},
        inputs=lambda: (torch.randint(2, stock.config.mask_token_id, (canvas - BLOCK,)).tolist(),),
        title=f"a block of {BLOCK} tokens, {parameters(stock)} model, dual cache, {kind} weights",
        tolerance={"atol": 0, "rtol": 0},
        tokens=lambda _: BLOCK,
        rounds=ROUNDS,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(kind, smoke): a folder with the model, its linear layers in float32, bfloat16 or int8."""

    @functools.cache
    def checkpoint(kind: str, smoke: bool):
        folder = tmp_path_factory.mktemp(kind)
        model = stock_model(smoke)
        if kind != "float32":
            model = copy.deepcopy(model)
            store_weights(model, kind)
        dk.save(model, None, folder)
        return folder

    return checkpoint


@pytest.mark.parametrize("forward", [False, True], ids=["load", "first forward"])
@pytest.mark.parametrize(
    ("stored", "weights"),
    [
        ("float32", None),
        ("float32", "bfloat16"),
        ("float32", "int8"),
        ("bfloat16", "bfloat16"),
        ("int8", None),
    ],
)
def test_loading(compare, smoke, checkpoint, stored, weights, forward):
    folder, whole = checkpoint(stored, smoke), checkpoint("float32", smoke)
    ids = torch.randint(2, stock_model(smoke).config.mask_token_id, (1, BLOCK))

    def ours() -> None:
        model, _ = dk.load(folder, device="cpu", weights=weights)
        step(model)

    def theirs() -> None:
        step(LlamaForCausalLM.from_pretrained(whole, dtype=torch.float32))

    def step(model) -> None:
        if forward:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

    title = f"load a {parameters(stock_model(smoke))} model, {stored} in its file"
    if weights not in (None, stored):
        title += f", as {weights}"
    compare(
        ours,
        {"from_pretrained in float32": theirs},
        title=f"{title}, and run {BLOCK} tokens" if forward else title,
        memory=True,
        rounds=ROUNDS,
    )
