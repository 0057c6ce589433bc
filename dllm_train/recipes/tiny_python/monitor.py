"""Quick measurements on held-out data while tiny-python trains (attention: block_causal)."""

import math

import numpy as np
import torch

from dllm_train.attention_masks import hidden_states
from dllm_train.objectives import bd3lm_loss
from dllm_train.recipes.tiny_python import arithmetic
from dllm_train.recipes.tiny_python.tokenizer import newline_ids


@torch.no_grad()
def measure(model, tokenizer, held_out, held_out_bytes, block_size, *, rows=48, length=256, pairs=50) -> dict:
    """Return bits per byte on a sample of held-out rows, and accuracy on held-out additions."""
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        bytes_per_token = held_out_bytes / sum(map(len, held_out))
        ids = packed(held_out, length)
        ids = ids[np.linspace(0, len(ids) - 1, min(rows, len(ids))).astype(int)]
        nats = bound(model, ids, tokenizer.mask_token_id, block_size)
        result = {"bd3lm_bits_per_byte": nats / ids.size / math.log(2) / bytes_per_token}
        chosen = arithmetic.held_out_pairs()
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, pairs).astype(int)]
        for name, threshold in (("one_per_step", 2.0), ("threshold_0.9", 0.9)):
            exact, tokens, forwards = additions(model, tokenizer, chosen, block_size, threshold)
            result |= {f"additions_{name}": exact, f"tokens_per_forward_{name}": tokens / forwards}
    return result


def packed(documents: list[np.ndarray], length: int) -> np.ndarray:
    """Cut documents laid end to end into rows, int64 [rows, length]; an unfilled last row is dropped."""
    stream = np.concatenate(documents).astype(np.int64)
    return stream[: len(stream) // length * length].reshape(-1, length)


@torch.no_grad()
def bound(
    model,
    ids: np.ndarray,
    mask_id: int,
    block_size: int,
    *,
    seed: int = 1,
    epoch: int = 0,
    batch: int = 8,
    eps: float = 1e-3,
) -> float:
    """Sum the BD3LM bound on -log p over ids [N, L], in nats, one noise draw (t per block, stratified)."""
    device, total = next(model.parameters()).device, 0.0
    for first in range(0, len(ids), batch):
        part = torch.from_numpy(ids[first : first + batch]).to(device)
        output = bd3lm_loss(
            model,
            part,
            mask_id=mask_id,
            block_size=block_size,
            seed=seed,
            epoch=epoch,
            eps=eps,
            example_ids=range(first, first + len(part)),
            bar_mask_token=True,
        )
        total += float(output.nll_sum)
    return total


@torch.no_grad()
def additions(model, tokenizer, pairs, block_size, threshold) -> tuple[float, int, int]:
    """Return (share exact, answer tokens, forwards) for one-line prompts in one block; every step commits the
    positions with confidence >= threshold, at least the surest, until each line has ended."""
    device = next(model.parameters()).device
    prompts = [tokenizer(arithmetic.prompt(a, b), add_special_tokens=False)["input_ids"] for a, b in pairs]
    canvas = torch.full((len(pairs), block_size), tokenizer.mask_token_id, device=device)
    for row, prompt in zip(canvas, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    ends = torch.zeros(len(tokenizer), dtype=torch.bool, device=device)
    ends[newline_ids(tokenizer)] = True
    live, forwards = torch.ones(len(pairs), dtype=torch.bool, device=device), 0
    while live.any():
        forwards += int(live.sum())
        hidden = hidden_states(model, canvas, kind="full")
        logits = model.lm_head(hidden.flatten(0, 1)).unflatten(0, canvas.shape)
        logits[..., tokenizer.mask_token_id] = float("-inf")
        confidence, proposal = logits.softmax(-1).max(-1)
        masked = canvas == tokenizer.mask_token_id
        confidence = confidence.masked_fill(~masked, -1)
        accepted = (confidence >= threshold) & masked
        accepted.scatter_(1, confidence.argmax(1, keepdim=True), True)
        canvas = torch.where(accepted & masked & live[:, None], proposal, canvas)
        masked = canvas == tokenizer.mask_token_id
        first_mask = torch.where(masked.any(1), masked.int().argmax(1), block_size)
        position = torch.arange(block_size, device=device)
        live = ~(ends[canvas] & (position < first_mask[:, None])).any(1) & masked.any(1)
    exact = tokens = 0
    for row, prompt, (a, b) in zip(canvas.tolist(), prompts, pairs, strict=True):
        answer = row[len(prompt) :]
        end = next((i + 1 for i, token in enumerate(answer) if ends[token]), len(answer))
        tokens += end
        exact += tokenizer.decode(row[: len(prompt) + end]).split("\n")[0] + "\n" == arithmetic.line(a, b)
    return exact / len(pairs), tokens, forwards
