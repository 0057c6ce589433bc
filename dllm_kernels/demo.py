"""`dllm demo`: the embedded model writes half a file, adds numbers in parallel, fills gaps from both sides.

The last table compares the same texts by the loop that everyone starts from. All is computed on the spot.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

import dllm_kernels as dk
from dllm_kernels.sampling.loop import Round
from dllm_kernels.sampling.output import SampleOutput
from dllm_kernels.viewer.terminal import TerminalView

THRESHOLD = 0.7
REPEATS = 3
HIDDEN = re.compile("[⟦⟧]")

# What stands in ⟦ ⟧ is hidden from the model. tools/pick_gaps.py chooses the places.
FILE = """class Stack⟦:⟧
    ⟦def __init__(self):⟧
        ⟦self.items =⟧ []

    ⟦def⟧ push⟦(self,⟧ item⟦):⟧
        ⟦self.items.append(⟧item⟦)⟧

    ⟦def⟧ pop⟦(self⟧):
        ⟦return⟧ self⟦.⟧items⟦.⟧pop⟦()⟧

    def⟦ __⟧len⟦__⟧(⟦self):⟧
        ⟦return len⟧(⟦self⟧.⟦items⟧)


⟦def⟧ read_lines⟦(⟧path⟦):⟧
    with open⟦(⟧path⟦) as⟧ handle:
        for⟦ line in⟧ handle⟦:⟧
            ⟦if not⟧ line.⟦startswith('⟧#'):
                yield line
"""
ADDITIONS = ((14, 79), (26, 91), (35, 47), (46, 97), (53, 96), (67, 25), (78, 72), (92, 50))  # held out
SHEET = "".join(f"assert {a} + {b} ==⟦ {a + b}⟧\n" for a, b in ADDITIONS)
# Each gap can be told only from the text after it.
GAPS = (
    "with open(path) as⟦ f⟧:\n    for line in f:\n        print(line)\n",
    "def __init__(self,⟦ path⟧):\n    self.path = path\n",
    "def size(self,⟦ text⟧):\n    return len(text)\n",
    "def add(a,⟦ b⟧):\n    return a + b\n",
)


@dataclass(frozen=True)
class Result:
    """What one loop took for a text, and whether the text equals that of the live view."""

    forwards: int
    seconds: float
    equal: bool


@dataclass(frozen=True)
class Comparison:
    """A text and the results of several loops by their names; the first is the baseline."""

    name: str
    results: dict[str, Result]


def run(console: Console) -> None:
    """Print everything that `make demo` shows."""
    both_ways, tokenizer = dk.load("tiny-python", device="cpu", attention="bidirectional")
    left_to_right, _ = dk.load("tiny-python", device="cpu", attention="block_causal")
    file, sheet = hidden_ids(FILE, tokenizer), hidden_ids(SHEET, tokenizer)
    masks = file.count(both_ways.config.mask_token_id)
    heading(console, f"writing {masks} of {len(file)} tokens, the surest ones first")
    compared = [fill(console, "the file", file, both_ways, tokenizer, pause=0.6)]
    heading(console, f"adding {len(ADDITIONS)} pairs of numbers that training never showed")
    compared.append(fill(console, "the sums", sheet, both_ways, tokenizer, pause=1.0))
    heading(console, "filling gaps that only the text after them explains")
    gaps(console, both_ways, left_to_right, tokenizer)
    heading(console, "the same texts by LLaDA's loop, with a forward over everything in each step")
    closing_table(console, compared)


def heading(console: Console, title: str) -> None:
    console.rule(f"[bold]{title}", align="left", style="dim")


def hidden_ids(text: str, tokenizer) -> list[int]:
    """Return the ids of `text` with the mask token in place of those that lie in ⟦ ⟧."""
    parts = HIDDEN.split(text)
    encoding = tokenizer("".join(parts), return_offsets_mapping=True)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    return [
        tokenizer.mask_token_id if any(first < end and start < last for first, last in spans) else token
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def fill(console: Console, name: str, ids: list[int], model, tokenizer, pause: float) -> Comparison:
    """Fill the masks of `ids` in the live view, `pause` seconds a round; time it beside the plain loop."""
    options = dict(block_size=len(ids), threshold=THRESHOLD)
    canvas, none = torch.tensor([ids]), torch.empty(0, dtype=torch.int64)
    with TerminalView(tokenizer, model.config.mask_token_id, pause=pause, console=console) as view:
        view(Round(none, none, none, none.float(), canvas, forwards=0))
        output = dk.infill(model, [ids], on_round=view, **options)
    console.print(Padding(filled_text(output, tokenizer), (0, 2)))
    committed = output.unmask_step[output.unmask_step >= 0]
    counts = " ".join(map(str, committed.bincount().tolist()))
    console.print(f"  [dim]tokens committed by each forward:[/] [bold]{counts}[/]\n", highlight=False)
    loops = {
        "LLaDA's loop": lambda: plain_loop(model, canvas),
        f"LLaDA's loop, threshold {THRESHOLD}": lambda: plain_loop(model, canvas, THRESHOLD),
        "dllm_kernels": lambda: (dk.infill(model, [ids], **options).sequences, output.forwards),
    }
    results = {}
    for loop, function in loops.items():
        (filled, forwards), seconds = median_time(function)
        results[loop] = Result(forwards, seconds, torch.equal(filled, output.sequences))
    return Comparison(f"{name}, {len(committed)} tokens", results)


def filled_text(output: SampleOutput, tokenizer, row: int = 0) -> Text:
    """Return a filled canvas with what was written in colour."""
    text, ids, start = Text(), output.sequences[row].tolist(), 0
    while ids[-1] == tokenizer.eos_token_id:  # shorter rows of a batch are filled up
        ids.pop()
    written = (output.unmask_step[row] >= 0).tolist()
    for end in range(1, len(ids) + 1):
        if end == len(ids) or written[end] != written[start]:
            text.append(tokenizer.decode(ids[start:end]), style="bold cyan" if written[start] else "dim")
            start = end
    text.rstrip()
    return text


def gaps(console: Console, both_ways, left_to_right, tokenizer) -> None:
    """Fill all GAPS in one batch, and beside each show the token that follows when the rest is not seen."""
    filled = dk.infill(both_ways, [hidden_ids(text, tokenizer) for text in GAPS])
    before = [text.partition("⟦")[0] for text in GAPS]
    unseeing = dk.sample(left_to_right, before, tokenizer=tokenizer, max_new_tokens=1)
    forwards = "one forward" if filled.forwards == 1 else f"{filled.forwards} forwards"
    table = Table(box=None, padding=(0, 4, 1, 2), header_style="")
    table.add_column("from the left alone")
    table.add_column(f"both ways, {len(GAPS)} texts in {forwards}")
    for row, text in enumerate(GAPS):
        rest = text.partition("⟧")[2].rstrip("\n")
        guess = Text.assemble((before[row], "dim"), (unseeing.texts[row], "bold yellow"), (rest, "dim"))
        table.add_row(guess, filled_text(filled, tokenizer, row))
    console.print(table)


def closing_table(console: Console, compared: list[Comparison]) -> None:
    """Print forwards, seconds and speedup of every loop, whichever wins."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("", no_wrap=True)
    for column in ("forwards", "seconds", "speedup", "same text"):
        table.add_column(column, justify="right")
    for text in compared:
        table.add_row(text.name)
        baseline = next(iter(text.results.values()))
        for name, result in text.results.items():
            table.add_row(
                f"  {name}",
                str(result.forwards),
                f"{result.seconds:.3f}",
                f"{baseline.seconds / result.seconds:.1f}×",
                "yes" if result.equal else "no",
                style="bold" if name == "dllm_kernels" else "",
            )
    console.print(table)


def median_time(function: Callable) -> tuple[object, float]:
    """Return what `function` returns, and the median of its seconds in REPEATS runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


@torch.no_grad()
def plain_loop(model, canvas: Tensor, threshold: float | None = None) -> tuple[Tensor, int]:
    """Run the loop everyone starts from [LLaDA generate.py]: each step is a forward over the whole canvas.

    canvas: int64 [1, T], its masks one block. threshold: accept every p >= threshold, at least the highest;
    None: one token per step. Return the filled canvas and the number of forwards.
    """
    mask_id, canvas, forwards = model.config.mask_token_id, canvas.clone(), 0
    seen = torch.ones(1, 1, canvas.shape[1], canvas.shape[1], dtype=torch.bool)
    while (masked := canvas == mask_id).any():
        logits = model(input_ids=canvas, attention_mask=seen, use_cache=False).logits
        logits[..., mask_id] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(~masked, -1)
        accepted = torch.zeros_like(masked)
        accepted[0, confidence.argmax()] = True
        if threshold is not None:
            accepted |= confidence >= threshold
        canvas[accepted] = token[accepted]
        forwards += 1
    return canvas, forwards
