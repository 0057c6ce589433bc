"""Text that a model writes itself: completions of prompts, with their loops separated, and filled lines.

Greedy completions of small models run into loops, which decode fast: a student of them would loop more. So a
block that loops is drawn again at a temperature, several times at once, and the draw that took the fewest
forwards without a loop goes on; the loop is kept for the student to unlearn.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

import dllm_kernels as dk

ROWS_AT_ONCE = 24
NEVER = -1  # the step of tokens that were given
RECENT_LINES = 12
WINDOW, PHRASE, MOST_PHRASES = 24, 3, 3  # tokens, tokens, times


@dataclass
class Completion:
    """A prompt and what the model wrote after it.

    For each written token, steps: the forward of its block that wrote it; trained: whether a student learns
    it, always unless `leave_out_common_phrases` says otherwise; judged: its probability beside the others.
    """

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)

    @property
    def whole(self) -> list[int]:
        return self.prompt + self.ids


@dataclass(frozen=True)
class Loop:
    """A context and a block after it, whose tokens [start, end) repeat earlier ones."""

    ids: list[int]
    start: int
    end: int


@dataclass
class FilledRow:
    """A row, the row with its gaps filled by the model, and the gaps [start, end).

    For each token of the row, steps: the forward that wrote it, or NEVER; judged: its probability beside the
    others, nan where it was given.
    """

    given: list[int]
    whole: list[int]
    steps: list[int]
    gaps: list[tuple[int, int]]
    judged: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """The result of `complete`. tokens_per_forward: of the greedy blocks."""

    completions: list[Completion]
    loops: list[Loop]
    tokens_per_forward: float


def complete(
    model, prompts: Sequence[list[int]], ends: np.ndarray, *, end_ids: Sequence[int], block_size: int,
    tokens: int, threshold: float, temperature: float, draws: int, seed: int,
) -> Written:  # fmt: skip
    """Complete prompts block by block, up to `tokens` tokens.

    prompts: ids, of lengths that are equal modulo block_size. A block that loops is drawn again `draws` times
    at `temperature`. A completion ends before a block of which every draw loops, and after an end token.
    """
    completions, loops = [Completion(list(prompt)) for prompt in prompts], []
    live, written, forwards = completions, 0, 0
    first = block_size - len(prompts[0]) % block_size
    for number, size in enumerate([first] + [block_size] * ((tokens - first) // block_size)):
        if not live:
            break
        drawn = partial(
            _next_blocks, model, size=size, block_size=block_size, threshold=threshold, seed=seed + number
        )
        looping, going_on = [], []
        for text, (ids, steps) in zip(live, drawn(live), strict=True):
            written, forwards = written + len(ids), forwards + max(steps) + 1
            span = find_loop(text.whole, ids, ends)
            if span is None:
                going_on.append((text, ids, steps))
            else:
                context = text.whole
                loops.append(Loop(context + ids, len(context) + span[0], len(context) + span[1]))
                looping.append(text)
        again = [text for text in looping for _ in range(draws)]
        others = drawn(again, temperature=temperature) if again else []
        for place, text in enumerate(looping):
            candidates = sorted(others[place * draws : (place + 1) * draws], key=lambda block: max(block[1]))
            good = (block for block in candidates if not find_loop(text.whole, block[0], ends))
            going_on += [(text, *block) for block in islice(good, 1)]
        for text, ids, steps in going_on:
            text.ids += ids
            text.steps += steps
            text.trained += [True] * len(ids)
        live = [text for text, ids, _ in going_on if not set(end_ids) & set(ids)]
    return Written([c for c in completions if any(c.trained)], loops, written / max(forwards, 1))


def _next_blocks(
    model, texts: Sequence[Completion], *, size: int, **sampling
) -> list[tuple[list[int], list[int]]]:
    """Return the next `size` ids of each text, up to an end token, and the forward that wrote each."""
    contexts = [text.whole for text in texts]
    output = dk.sample(model, contexts, max_new_tokens=size, **sampling)
    blocks = []
    for row, context in enumerate(contexts):
        block = slice(len(context), len(context) + min(size, int(output.lengths[row]) + 1))
        blocks.append((output.sequences[row, block].tolist(), output.unmask_step[row, block].tolist()))
    return blocks


def find_loop(context: Sequence[int], ids: Sequence[int], ends: np.ndarray) -> tuple[int, int] | None:
    """Return the part [start, end) of `ids` that is the first loop after `context`, or None.

    A loop is a line like the line before it (eight tokens of an unfinished line are enough), a line of four
    tokens or more that stands twice in the twelve lines before it, or the same three tokens four times in 24.
    """
    whole, first = [*context, *ids], len(context)
    edges = [0, *(place + 1 for place, token in enumerate(whole) if ends[token])]
    if edges[-1] < len(whole):
        edges.append(len(whole))
    lines: list[tuple[int, ...]] = []
    for start, end in pairwise(edges):
        line = tuple(token for token in whole[start:end] if not ends[token])
        if not line:
            continue
        if end > first:
            finished, before = ends[whole[end - 1]], lines[-1] if lines else ()
            again = line == before if finished else len(line) >= 8 and line == before[: len(line)]
            if again or (finished and len(line) >= 4 and lines[-RECENT_LINES:].count(line) >= 2):
                return max(start, first) - first, end - first
        lines.append(line)
    for end in range(max(first + 1, WINDOW), len(whole) + 1):
        window = whole[end - WINDOW : end]
        phrases = Counter(tuple(window[place : place + PHRASE]) for place in range(WINDOW - PHRASE + 1))
        if max(phrases.values()) > MOST_PHRASES:
            return max(end - WINDOW // 2, first) - first, end - first
    return None


def leave_out_common_phrases(completions: Sequence[Completion], size: int = 8, others: int = 2) -> float:
    """Exclude the tokens of common phrases from training; return their share.

    A phrase is `size` tokens in a row. It is common if more than `others` other completions have it, or its
    own one had it before. A student of common phrases writes them more often, and in the end nothing else.
    """
    phrases = [
        [tuple(text.ids[start : start + size]) for start in range(len(text.ids) - size + 1)]
        for text in completions
    ]
    owners = Counter(phrase for found in phrases for phrase in set(found))
    tokens, common = 0, 0
    for text, found in zip(completions, phrases, strict=True):
        mark, seen = np.zeros(len(text.ids), dtype=bool), set()
        for start, phrase in enumerate(found):
            if phrase in seen or owners[phrase] > others + 1:
                mark[start : start + size] = True
            seen.add(phrase)
        text.trained = (np.array(text.trained) & ~mark).tolist()
        tokens, common = tokens + len(mark), common + int(mark.sum())
    return common / max(tokens, 1)


def fill(model, rows, gaps, *, mask_id: int, threshold: float) -> list[FilledRow]:
    """Let the model fill the gaps of every row that has some. rows: lists of ids. gaps: lists of spans."""
    pairs = [(list(ids), spans) for ids, spans in zip(rows, gaps, strict=True) if spans]
    filled = []
    for first in range(0, len(pairs), ROWS_AT_ONCE):
        part = pairs[first : first + ROWS_AT_ONCE]
        canvases = [list(ids) for ids, _ in part]
        for canvas, (_, spans) in zip(canvases, part, strict=True):
            for start, end in spans:
                canvas[start:end] = [mask_id] * (end - start)
        output = dk.infill(model, canvases, threshold=threshold)
        for row, (ids, spans) in enumerate(part):
            whole, steps = (
                table[row, : len(ids)].tolist() for table in (output.sequences, output.unmask_step)
            )
            filled.append(FilledRow(ids, whole, steps, spans))
    return filled


def ends_line(tokenizer, end_ids: Sequence[int]) -> np.ndarray:
    """Return bool [V]: the tokens whose text holds a newline, and the end tokens."""
    ends = np.array(["\n" in text for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])])
    ends[list(end_ids)] = True
    return ends


def line_starts(ids: Sequence[int], ends: np.ndarray) -> list[int]:
    """Return where lines begin in `ids`, 0 included."""
    return [0, *(np.flatnonzero(ends[np.asarray(ids[:-1])]) + 1).tolist()]


def choose_gaps(ids: Sequence[int], ends: np.ndarray, rng, longest: int = 24) -> list[tuple[int, int]]:
    """Return the spans of some lines of up to `longest` tokens, none next to another, without their ends."""
    starts, gaps = line_starts(ids, ends), []
    number = int(rng.integers(1, 4))
    while number < len(starts) - 1:
        start, end = starts[number], starts[number + 1] - 1
        if 0 < end - start <= longest:
            gaps.append((start, end))
            number += int(rng.integers(1, 4))
        number += 1
    return gaps


def states_passed(steps: Tensor, block_size: int, rng) -> tuple[Tensor, Tensor]:
    """Return (masked, written), bool [B, L]: for every block what was masked before a random one of its
    forwards, and what this one wrote. steps: int64 [B, L], the forward that wrote a token, or NEVER."""
    masked, written = torch.zeros((2, *steps.shape), dtype=torch.bool)
    for row in range(len(steps)):
        for first in range(0, steps.shape[1], block_size):
            block = slice(first, first + block_size)
            forwards = steps[row, block].unique()
            forwards = forwards[forwards != NEVER]
            if len(forwards):
                now = int(rng.choice(forwards))
                masked[row, block] = steps[row, block] >= now
                written[row, block] = steps[row, block] == now
    return masked, written


def states_of_decoding(written: Tensor, block_size: int, rng) -> Tensor:
    """Return bool [B, L]: which of the `written` tokens are masked, as in states that a sampler passes.

    All of a block in half of the blocks; in the others those from a random place on, of which every other
    time up to 40% are written already.
    """
    rows, length = written.shape
    blocks = -(-length // block_size)
    written = torch.nn.functional.pad(written, (0, blocks * block_size - length))
    written = written.view(rows, blocks, block_size)
    kind, place, share = torch.from_numpy(rng.random((3, rows, blocks, 1)))
    reached = written.cumsum(2) / written.sum(2, keepdim=True).clamp(min=1)
    already = torch.from_numpy(rng.random(written.shape)) < 0.4 * share
    masked = written & ((kind < 0.5) | (reached >= place)) & ~((kind > 0.75) & already)
    return masked.view(rows, -1)[:, :length]
