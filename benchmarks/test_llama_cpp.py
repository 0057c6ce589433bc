"""One denoising step of a canvas of 512 tokens against llama.cpp's diffusion tool, on the same random model.

pytest benchmarks -k llama_cpp --peer llama.cpp=PATH/llama-diffusion-cli

It computes the whole canvas in every step, in float32 and with 8- and 4-bit weights; ours is float32. In
float32 it must predict our tokens before anything is timed. Its time per step is the one that it prints.
"""

import functools

import pytest
import torch

import dllm_kernels as dk
from benchmarks.llada_shaped import parameters, random_model
from benchmarks.self_timed import SelfTimed

BLOCK = 32
STEPS = 8  # of its runs, and of ours that computes the whole canvas
ROUNDS = 3
CACHES = {"none": ("no cache", STEPS), "dual": ("dual cache (approximate)", BLOCK)}  # and our steps


@functools.cache
def model_of_size(smoke: bool):
    return random_model(*((2, 64, 256) if smoke else (16, 1024, 32_000)))


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


@pytest.mark.parametrize("cache", CACHES, ids=[name for name, _ in CACHES.values()])
def test_step(compare, pick, smoke, peer, gguf_files, cache):
    program = peer("llama.cpp")
    from benchmarks.peers import llama_cpp

    model, canvas = model_of_size(smoke), pick(512, 128)
    prompt = torch.randint(2, model.config.mask_token_id, (canvas - BLOCK,)).tolist()
    options = dict(max_new_tokens=BLOCK, block_size=BLOCK, stop_on_eos=False)
    files = gguf_files(model)
    at_once = dk.sample(model, [prompt], steps=1, cache="none", **options).sequences[0, len(prompt) :]
    first = llama_cpp.run(program, files["float32"], prompt, canvas, steps=1)
    assert_same_tokens(at_once.tolist(), first.tokens, model.config.mask_token_id)

    def theirs(path) -> SelfTimed:
        return SelfTimed(lambda: llama_cpp.run(program, path, prompt, canvas, STEPS).seconds)

    name, steps = CACHES[cache]
    compare(
        lambda: dk.sample(model, [prompt], steps=steps, cache=cache, **options),
        {f"llama.cpp, {kind}": theirs(path) for kind, path in files.items()},
        title=f"one step, canvas {canvas}, {parameters(model)} model, float32, {name}",
        steps=steps,
        rounds=ROUNDS,
    )
