"""One denoising step of a canvas of 512 tokens against llama.cpp's diffusion tool, on the same random model.

pytest benchmarks -k llama_cpp --peer llama.cpp=PATH/llama-diffusion-cli

It computes the whole canvas in every step, in float32 and with 8- and 4-bit weights; ours has stock layers,
or what dk.load(weights="int8") makes of them. In float32 it must predict our tokens before anything is timed.
Its time per step is the one that it prints: its steps are alike, so a few stand for those of a whole answer.
"""

import functools

import pytest
import torch

import dllm_kernels as dk
from benchmarks.llada_shaped import parameters, random_model
from benchmarks.self_timed import SelfTimed
from benchmarks.step_parts import STOCK, with_weights

BLOCK = 32
STEPS = 8  # of its runs, and of ours that computes the whole canvas
ROUNDS = 3
CACHES = {"none": "no cache", "dual": "dual cache (approximate)"}
CASES = {  # our cache, new tokens, our steps, what dk.load(weights=) makes of our model
    "step, no cache": ("none", BLOCK, STEPS, STOCK),
    "step, dual cache": ("dual", BLOCK, BLOCK, STOCK),
    "step, no cache, int8": ("none", BLOCK, STEPS, "int8"),
    "step, dual cache, int8": ("dual", BLOCK, BLOCK, "int8"),
    "answer, dual cache": ("dual", 8 * BLOCK, 8 * STEPS, STOCK),
    "answer, dual cache, int8": ("dual", 8 * BLOCK, 8 * STEPS, "int8"),
}


@functools.cache
def model_of_size(smoke: bool):
    return random_model(*((2, 64, 256) if smoke else (16, 1024, 32_000)))


@functools.cache
def weighted_model(smoke: bool, weights: str):
    return with_weights(model_of_size(smoke), weights)


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory):
    """gguf_files(model): the file of each kind, written once."""
    pytest.importorskip("gguf")
    from benchmarks.peers import gguf_file

    @functools.cache
    def files(model) -> dict:
        folder = tmp_path_factory.mktemp("gguf")
        paths = {kind: folder / f"{kind}.gguf" for kind in gguf_file.KINDS}
        for kind, path in paths.items():
            gguf_file.write(model, path, kind)
        return paths

    return files


def assert_same_tokens(ours: list[int], theirs: list[int], mask_id: int) -> None:
    """Every token that it predicts is ours; it may predict the mask token, which ours never does."""
    assert len(theirs) == len(ours), f"llama.cpp gave {len(theirs)} tokens, not {len(ours)}"
    other = [(mine, its) for mine, its in zip(ours, theirs, strict=True) if its not in (mine, mask_id)]
    assert not other, f"llama.cpp predicts other tokens (ours, its): {other}"


@pytest.mark.parametrize(("cache", "new_tokens", "steps", "weights"), CASES.values(), ids=CASES)
def test_step(compare, pick, smoke, peer, gguf_files, cache, new_tokens, steps, weights):
    program = peer("llama.cpp")
    from benchmarks.peers import llama_cpp

    model, canvas = model_of_size(smoke), pick(512, 512 if new_tokens > BLOCK else 128)
    ours = weighted_model(smoke, weights)
    prompt = torch.randint(2, model.config.mask_token_id, (canvas - new_tokens,)).tolist()
    files = gguf_files(model)
    first = llama_cpp.run(program, files["float32"], prompt, canvas, steps=1)
    at_once = dk.sample(
        model,
        [prompt],
        max_new_tokens=new_tokens,
        block_size=new_tokens,
        steps=1,
        cache="none",
        stop_on_eos=False,
    )
    assert_same_tokens(at_once.sequences[0, len(prompt) :].tolist(), first.tokens, model.config.mask_token_id)

    def theirs(path) -> SelfTimed:
        return SelfTimed(lambda: llama_cpp.run(program, path, prompt, canvas, STEPS).seconds)

    of = f", of {steps} for {new_tokens} tokens" if new_tokens > BLOCK else ""
    compare(
        lambda: dk.sample(
            ours, [prompt], max_new_tokens=new_tokens, block_size=BLOCK, steps=steps, cache=cache,
            stop_on_eos=False,
        ),
        {f"llama.cpp, {kind}": theirs(path) for kind, path in files.items()},
        title=f"one step{of}, canvas {canvas}, {parameters(model)} model, "
        f"{'float32' if weights == STOCK else weights}, {CACHES[cache]}",
        steps=steps,
        rounds=ROUNDS,
    )  # fmt: skip
