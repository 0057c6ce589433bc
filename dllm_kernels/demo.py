"""`dllm demo`: the embedded model completes a function and fills a gap, and the plain loop does so too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.viewer.terminal import TerminalView

PROMPT = """import os
import sys

def main(argv):
    if len(argv) < 2:
"""
GAP = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

<mask:6>
        return 'Point(%r, %r)' % (self.x, self.y)
"""
THRESHOLD = 0.9
PAUSE = 0.05  # seconds a round, for the eye; the timed runs have none


def run(console: Console, max_new_tokens: int = 48, repeats: int = 3) -> None:
    """Everything that `make demo` shows."""
    model, tokenizer = dk.load("tiny-python", device="cpu", attention="block_causal")
    console.rule("completion: block_causal, an exact cache of finished blocks")
    options = dict(max_new_tokens=max_new_tokens, stop_on_eos=False, threshold=THRESHOLD)

    def complete(**more):
        return dk.sample(model, PROMPT, tokenizer=tokenizer, **options, **more)

    ids = complete_canvas(model, tokenizer, max_new_tokens)
    block = torch.arange(ids.shape[1]) // model.config.diffusion["block_size"]
    show(console, complete, PROMPT, tokenizer, model, ids, block[:, None] >= block, repeats)

    model, tokenizer = dk.load("tiny-python", device="cpu", attention="bidirectional")
    console.rule("infilling: bidirectional, what follows the gap counts too")

    def fill(**more):
        return dk.infill(model, GAP, tokenizer=tokenizer, threshold=THRESHOLD, **more)

    ids = gap_canvas(tokenizer)
    everything = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
    show(console, fill, "", tokenizer, model, ids, everything, repeats)


def show(
    console, generate: Callable, prompt: str, tokenizer, model, canvas: Tensor, visible: Tensor, repeats: int
):
    """Run `generate` in the live view, then time it and the plain loop on the same canvas [1, T]."""
    with TerminalView(tokenizer, model.config.mask_token_id, pause=PAUSE, console=console) as view:
        output = generate(on_round=view)
    console.print(prompt + output.texts[0], style="cyan", markup=False, highlight=False)
    ways = {
        "dllm_kernels": lambda: (generate().sequences, output.forwards),
        "plain loop, same rule": lambda: plain_loop(model, canvas, visible, THRESHOLD),
        "plain loop, one token a step": lambda: plain_loop(model, canvas, visible),
    }
    tokens = int((output.unmask_step >= 0).sum())
    table = Table("", "tokens/s", "forwards", "tokens/forward", "seconds", "same text", box=None)
    for name, way in ways.items():
        (ids, forwards), seconds = median_time(way, repeats)
        same = torch.equal(ids[:, : output.sequences.shape[1]], output.sequences)
        figures = f"{tokens / seconds:.0f}", str(forwards), f"{tokens / forwards:.2f}", f"{seconds:.3f}"
        table.add_row(name, *figures, "yes" if same else "no")
    console.print(table)


def median_time(function: Callable, repeats: int) -> tuple[object, float]:
    """What `function` returns, and the median of its seconds; a first run is not counted."""
    result, seconds = function(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


@torch.no_grad()
def plain_loop(model, canvas: Tensor, visible: Tensor, threshold: float | None = None) -> tuple[Tensor, int]:
    """The loop everyone starts from [LLaDA generate.py]: each step a forward over the whole canvas.

    canvas: int64 [1, T]; visible: bool [T, T], what each query sees. Blocks are filled from left to right.
    threshold: accept every p >= threshold, at least the surest; None: one token a step.
    Returns the filled canvas and the number of forwards.
    """
    mask_id, size = model.config.mask_token_id, model.config.diffusion["block_size"]
    canvas, forwards = canvas.clone(), 0
    for start in range(0, canvas.shape[1], size):
        block = canvas[:, start : start + size]
        while (masked := block == mask_id).any():
            logits = model(input_ids=canvas, attention_mask=visible[None, None], use_cache=False).logits
            logits[..., mask_id] = -torch.inf
            confidence, token = logits.softmax(-1)[:, start : start + size].max(-1)
            confidence = confidence.masked_fill(~masked, -1)
            accepted = torch.zeros_like(masked)
            accepted[0, confidence.argmax()] = True
            if threshold is not None:
                accepted |= confidence >= threshold
            block[accepted] = token[accepted]
            forwards += 1
    return canvas, forwards


def complete_canvas(model, tokenizer, max_new_tokens: int) -> Tensor:
    """int64 [1, T]: the prompt and masks up to a whole block."""
    ids = tokenizer(PROMPT)["input_ids"]
    size = model.config.diffusion["block_size"]
    length = -(-(len(ids) + max_new_tokens) // size) * size
    return torch.tensor([ids + [tokenizer.mask_token_id] * (length - len(ids))])


def gap_canvas(tokenizer) -> Tensor:
    """int64 [1, T]: the text of GAP with mask tokens in its gap."""
    before, _, rest = GAP.partition("<mask:")
    count, _, after = rest.partition(">")
    ids = [tokenizer(text)["input_ids"] for text in (before, after)]
    return torch.tensor([ids[0] + [tokenizer.mask_token_id] * int(count) + ids[1]])
