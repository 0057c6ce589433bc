"""`dllm demo`: the embedded model adds numbers, completes a method and fills a gap, beside the plain loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.sampling.output import SampleOutput
from dllm_kernels.viewer.terminal import TerminalView, canvas_text

ADDITIONS = ((14, 79), (26, 91), (35, 47), (46, 97), (53, 96), (67, 25), (78, 72), (92, 50))  # held out
SHEET = "".join(f"assert {a} + {b} ==<mask:{len(str(a + b)) + 1}>\n" for a, b in ADDITIONS)
PROMPT = """def find(self, key):
    for name, value in self.items():
"""
GAP = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

<mask:6>
        return 'Point(%r, %r)' % (self.x, self.y)
"""
THRESHOLD = 0.9
REPEATS = 3


def run(console: Console) -> None:
    """Print everything that `make demo` shows."""
    both_ways, tokenizer = dk.load("tiny-python", device="cpu", attention="bidirectional")
    block_causal, _ = dk.load("tiny-python", device="cpu", attention="block_causal")

    def fill(text: str) -> Callable:
        return lambda **more: dk.infill(both_ways, text, tokenizer=tokenizer, threshold=THRESHOLD, **more)

    def complete(**more) -> SampleOutput:
        whole_blocks = 2 * block_causal.config.diffusion["block_size"] - len(tokenizer(PROMPT)["input_ids"])
        options = dict(max_new_tokens=whole_blocks, stop_on_eos=False, threshold=THRESHOLD)
        return dk.sample(block_causal, PROMPT, tokenizer=tokenizer, **options, **more)

    console.rule("additions that were held out of training: several tokens per forward")
    show(console, fill(SHEET), both_ways, tokenizer, pause=0.5)
    console.rule("completion: block_causal attention, an exact cache of finished blocks")
    show(console, complete, block_causal, tokenizer, pause=0.05)
    console.rule("infilling: bidirectional attention, the text after the gap counts too")
    show(console, fill(GAP), both_ways, tokenizer, pause=0.2)


def show(console: Console, generate: Callable, model, tokenizer, *, pause: float) -> None:
    """Run `generate` in the live view, `pause` seconds a round, then time it beside the plain loop."""
    mask_id = model.config.mask_token_id
    with TerminalView(tokenizer, mask_id, pause=pause, console=console) as view:
        output = generate(on_round=view)
    filled = set((output.unmask_step[0] >= 0).nonzero().flatten().tolist())
    text = canvas_text(output.sequences[0].tolist(), tokenizer, mask_id, set(), filled)
    text.rstrip()
    console.print(text, end="\n\n")
    canvas, visible = start_of(output, model)
    ways = {
        "dllm_kernels": lambda: (generate().sequences, output.forwards),
        "plain loop, same rule": lambda: plain_loop(model, canvas, visible, THRESHOLD),
        "plain, one token/step": lambda: plain_loop(model, canvas, visible),
    }
    table = Table("", box=None)
    for column in ("tokens/s", "forwards", "tokens/forward", "seconds", "same text"):
        table.add_column(column, justify="right")
    for name, way in ways.items():
        (ids, forwards), seconds = median_time(way)
        same = torch.equal(ids[:, : output.sequences.shape[1]], output.sequences)
        tokens = len(filled)
        figures = f"{tokens / seconds:.0f}", str(forwards), f"{tokens / forwards:.2f}", f"{seconds:.3f}"
        table.add_row(name, *figures, "yes" if same else "no")
    console.print(table, end="\n\n")


def start_of(output: SampleOutput, model) -> tuple[Tensor, Tensor]:
    """Return the masked canvas of `output`, int64 [1, T], and what its queries see, bool [T, T]."""
    canvas = output.sequences.masked_fill(output.unmask_step >= 0, model.config.mask_token_id)
    bidirectional = model.config.diffusion["attention"][0] == "bidirectional"
    block = torch.arange(canvas.shape[1]) // model.config.diffusion["block_size"]
    return canvas, (block[:, None] >= block) | bidirectional


def median_time(function: Callable) -> tuple[object, float]:
    """Return what `function` returns, and the median of its seconds in REPEATS runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


@torch.no_grad()
def plain_loop(model, canvas: Tensor, visible: Tensor, threshold: float | None = None) -> tuple[Tensor, int]:
    """Run the loop everyone starts from [LLaDA generate.py]: each step is a forward over the whole canvas.

    canvas: int64 [1, T]; visible: bool [T, T], what each query sees. Blocks are filled from left to right.
    threshold: accept every p >= threshold, at least the highest; None: one token per step.
    Return the filled canvas and the number of forwards.
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
