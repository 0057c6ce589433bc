"""Checkpoints whose answers are known: a unigram model says the same of every masked position."""

import json
import math
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

import dllm_kernels as dk
from tests.train.recipe_runs import write_tokenizer
from tests.train.tiny_models import tiny

_PRINTABLE = {*range(ord(" "), ord("~") + 1), ord("\n")}
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_OF_BYTE = {chr(byte): byte for byte in range(ord("!"), ord("~") + 1)} | {"\u0120": 32, "\u010a": 10}
# Ids of the tokenizer of single bytes that are no printable character.
UNPRINTABLE = tuple(token for token, text in enumerate(_ALPHABET) if _OF_BYTE.get(text) not in _PRINTABLE)


def write_random(folder: Path, attention="bidirectional", positions=128) -> Path:
    """Write a random model that is sure of some tokens, with a tokenizer of single bytes."""
    tokenizer = write_tokenizer(folder)
    model = tiny(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, gain=6.0,
    )  # fmt: skip
    model.lm_head.weight.data.mul_(4)
    return _saved(model, tokenizer, folder, attention)


def write_unigram(
    folder: Path, chances: dict[str, float], attention="bidirectional", positions=256, chat=False
) -> Path:
    """Write a model that gives every masked position these probabilities, by character, whatever is around.

    The other tokens share what is left of 1, and the mask token gets nothing. The layers are zero, and the
    head reads the embedding of the mask token, so log p(target | context) is the sum over the target's bytes.
    """
    tokenizer = write_tokenizer(folder)
    if not chat:
        tokenizer.chat_template = None
    model = tiny(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=positions, rms_norm_eps=1e-12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    mask, size = tokenizer.mask_token_id, model.config.hidden_size
    others = len(tokenizer) - 1 - len(chances)
    logits = torch.full((len(tokenizer),), math.log((1 - sum(chances.values())) / others))
    for text, chance in chances.items():
        (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        logits[token] = math.log(chance)
    logits[mask] = -60.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 1] = 1.0
        model.model.embed_tokens.weight[mask] = torch.eye(size)[0]
        model.lm_head.weight[:, 0] = logits / size**0.5  # the norm makes sqrt(size) of a single 1
    return _saved(model, tokenizer, folder, attention)


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Write documents as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _saved(model, tokenizer, folder: Path, attention: str) -> Path:
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.diffusion = {"attention": [attention], "block_size": 8, "shift": False}
    dk.save(model, tokenizer, folder)
    return folder
