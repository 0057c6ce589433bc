"""The sampling loops that people write around a transformers model, as baselines of the sampler.

Greedy, one token per step. `plain_loop` is LLaDA's: for every step a forward over the whole canvas, and every
position through the vocabulary projection, argmax and softmax. `copying_loop` is that of block-causal
samplers: keys and values of finished blocks are kept, but copied for every step, and every row of the block
is projected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def see_both_ways(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its causal mask: torch's attention is then called without any."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


@torch.no_grad()
def plain_loop(model, prompt: list[int], new_tokens: int, block_size: int, mask_id: int) -> Tensor:
    """int64 [1, S + new_tokens]; `model` as of `see_both_ways`."""
    canvas = torch.tensor([prompt + [mask_id] * new_tokens], device=model.device)
    for start in range(len(prompt), canvas.shape[1], block_size):
        position = torch.arange(canvas.shape[1], device=canvas.device)
        inside = (position >= start) & (position < start + block_size)
        while (masked := inside & (canvas == mask_id)).any():
            logits = model(input_ids=canvas, use_cache=False).logits
            _commit_best(canvas, logits, masked, mask_id)
    return canvas


@torch.no_grad()
def copying_loop(model, prompt: list[int], new_tokens: int, block_size: int, mask_id: int) -> Tensor:
    """Run the loop of a block-causal model with a copied cache; the prompt fills whole blocks."""
    canvas = torch.tensor([prompt + [mask_id] * new_tokens], device=model.device)
    cache = DynamicCache(config=model.config)
    for start in range(0, canvas.shape[1], block_size):
        block = canvas[:, start : start + block_size]
        while (masked := block == mask_id).any():
            logits = _block_forward(model, block, start, copy.deepcopy(cache))
            _commit_best(block, logits, masked, mask_id)
        _block_forward(model, block, start, cache)
    return canvas


@torch.no_grad()
def block_step(model, canvas: Tensor, block_size: int, mask_id: int) -> Callable[[], None]:
    """One step of `copying_loop` at the last block of `canvas`, again and again."""
    start = canvas.shape[1] - block_size
    cache = DynamicCache(config=model.config)
    _block_forward(model, canvas[:, :start], 0, cache)

    @torch.no_grad()
    def step() -> None:
        block = canvas[:, start:].clone()
        logits = _block_forward(model, block, start, copy.deepcopy(cache))
        _commit_best(block, logits, block == mask_id, mask_id)

    return step


def _block_forward(model, ids: Tensor, start: int, cache: DynamicCache) -> Tensor:
    """Logits of a block that sees itself and the cache, to which it adds its keys and values."""
    end = start + ids.shape[1]
    visible = torch.zeros(1, 1, ids.shape[1], end, device=ids.device, dtype=model.dtype)
    position = torch.arange(start, end, device=ids.device)[None]
    return model(
        input_ids=ids, past_key_values=cache, attention_mask=visible, position_ids=position, use_cache=True
    ).logits


def _commit_best(ids: Tensor, logits: Tensor, masked: Tensor, mask_id: int) -> None:
    """The token of highest probability takes its place among the masks."""
    logits[..., mask_id] = -torch.inf
    token = logits.argmax(dim=-1, keepdim=True)
    probability = F.softmax(logits, dim=-1).gather(-1, token)[..., 0]
    best = torch.where(masked, probability, -torch.inf).argmax(dim=1, keepdim=True)
    ids.scatter_(1, best, token[..., 0].gather(1, best))
