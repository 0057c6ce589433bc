"""A decoding loop of your own on the operators, around a model that is not a transformers model.

Block-causal decoding: a block attends to itself and to finished blocks, whose keys and values lie in pages.
At the end the same tokens are found without the cache, by attention under a mask over the whole canvas.
"""

import argparse

import torch
from torch import Tensor, nn

import dllm_kernels as dk

VOCABULARY, MASK, HEADS, HEAD_DIM, BLOCK, PAGE = 100, 99, 4, 16, 8, 8
parser = argparse.ArgumentParser()
parser.add_argument("--blocks", type=int, default=4, help="blocks to write after the prompt's")


class Layer(nn.Module):
    """One layer: `attend` says what the tokens see."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(512, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, positions: Tensor, attend) -> Tensor:
        hidden = self.embed(ids) + self.position(positions)
        q, k, v = self.qkv(hidden).view(*ids.shape, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return self.head(hidden + self.out(attend(q, k, v).transpose(1, 2).flatten(2)))


def decode_cached(model: Layer, canvas: Tensor) -> int:
    """Fill the masks of `canvas` [1, T] block after block with a paged cache; return the forwards."""
    length = canvas.shape[1]
    cache = dk.BlockKVCache(
        1, HEADS, HEAD_DIM, pages=length // PAGE, page_size=PAGE, dtype=torch.float32, device="cpu"
    )
    keys, values, table = cache.keys(0), cache.values(0), cache.page_table([cache.admit(length)])
    forwards, rule = 0, dk.Rule.threshold(0.5)
    for start in range(0, length, BLOCK):
        positions = torch.arange(start, start + BLOCK, dtype=torch.int32)[None]
        finished = torch.tensor([[[[0, start]]]], dtype=torch.int32)  # what stays visible of the cache

        def attend(q: Tensor, k: Tensor, v: Tensor, finished=finished, positions=positions) -> Tensor:
            if not (canvas.gather(1, positions.long()) == MASK).any():
                dk.kv_write_(keys, values, k, v, table, positions)  # the block is final: keep it
            return dk.cached_block_attention(q, k, v, keys, values, table, finished)

        while True:
            block = canvas[:, start : start + BLOCK]
            masked = bool((block == MASK).any())
            logits = model(block, positions, attend)
            forwards += 1
            if not masked:
                break  # that forward wrote the block
            stats = dk.token_stats(logits, suppress_tokens=[MASK])
            dk.commit_(canvas, positions, stats, rule, mask_id=MASK)
    return forwards


def decode_whole(model: Layer, canvas: Tensor) -> None:
    """Fill the masks of `canvas` with a forward over all of it in every step."""
    length, rule = canvas.shape[1], dk.Rule.threshold(0.5)
    mask = dk.SpanMask.block_causal(length, BLOCK)
    for start in range(0, length, BLOCK):
        while (canvas[:, start : start + BLOCK] == MASK).any():
            logits = model(
                canvas, torch.arange(length)[None], lambda q, k, v: dk.block_attention(q, k, v, mask)
            )
            dk.unmask_(
                canvas, logits[:, start : start + BLOCK], rule, mask_id=MASK, suppress_tokens=[MASK],
                block_start=start, block_size=BLOCK,
            )  # fmt: skip


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Layer()
    model.head.weight.mul_(8)  # random, but sure of some tokens
    prompt = torch.randint(0, MASK, (1, BLOCK))
    canvas = torch.cat([prompt, torch.full((1, options.blocks * BLOCK), MASK)], dim=1)
    whole = canvas.clone()
    forwards = decode_cached(model, canvas)
    decode_whole(model, whole)
    print(canvas.tolist()[0])
    print(f"{options.blocks * BLOCK} tokens, {forwards} forwards of {BLOCK} tokens")
    print("the same without the cache:", torch.equal(canvas, whole))


if __name__ == "__main__":
    main()
