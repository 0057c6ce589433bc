"""A block of a 308M model with the dual cache: linear layers that store their weights in fewer bytes.

Both sides run the same forwards: one over the whole canvas, and one for each further token of the block.
Tokens may differ where weights are rounded.
"""

import copy
import functools

import pytest
import torch

import dllm_kernels as dk
from benchmarks.llada_shaped import parameters, random_model
from dllm_kernels.models.stored_weights import KINDS, store_weights

BLOCK, CANVAS, ROUNDS = 32, 512, 3


@functools.cache
def stock_model(smoke: bool):
    return random_model(*((2, 64, 256) if smoke else (16, 1024, 50_257)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights(compare, pick, smoke, kind):
    stock = stock_model(smoke)
    model = copy.deepcopy(stock)
    store_weights(model, kind)
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
