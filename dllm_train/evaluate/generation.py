"""Answers to many prompts of unequal length: batched through `dk.sample`, cut at their stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import dllm_kernels as dk
from dllm_kernels.models.text import added_text, decoded_behind
from dllm_kernels.sampling.graph_loop import MOST_STOP_IDS
from dllm_kernels.sampling.plan import make_plan

GAP = re.compile("<mask:[0-9]+>")


@dataclass(frozen=True)
class Prompt:
    """A text to continue. ids: its tokens. new_tokens: the most to add. number: the key of its noise."""

    ids: tuple[int, ...]
    new_tokens: int
    number: int = 0


@dataclass(frozen=True)
class Answer:
    """The completion of a prompt.

    text: up to the first stop string. tokens: before the first end token. forwards: denoiser forwards that
    the row took part in. at_limit: whether the length limit ended it, and no end token or stop string.
    """

    text: str
    tokens: int
    forwards: int
    at_limit: bool

    @property
    def empty(self) -> bool:
        """Return whether the text is blank."""
        return not self.text.strip()


class StopTokens:
    """The tokens of a vocabulary whose text contains a stop string: a row may end at the first of them.

    A stop string that takes several tokens ends no row early; the text is cut at it afterwards.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._texts: list[str] | None = None
        self._found: dict[tuple[str, ...], tuple[int, ...]] = {}

    def of(self, until: tuple[str, ...]) -> tuple[int, ...]:
        """Return the ids of the tokens that contain one of `until`."""
        if until not in self._found:
            if self._texts is None:
                ids = range(len(self.tokenizer))
                self._texts = self.tokenizer.batch_decode([[token] for token in ids])
            self._found[until] = tuple(
                token for token, text in enumerate(self._texts) if any(stop in text for stop in until)
            )
        return self._found[until]


def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    until: tuple[str, ...] = (),
    stop_tokens: StopTokens | None = None,
    max_batch: int | None = None,
    config: dk.SampleConfig,
) -> list[Answer]:
    """Return the answers to `prompts`, in their order, from one call of `dk.sample`.

    until: stop strings; the text ends before the first. stop_tokens: where rows may end early; None lets all
    run to their end. An answer depends on its own prompt alone, not on the others nor on `max_batch`.
    """
    ends = make_plan(model, tokenizer, config, {}).eos_ids
    early = () if stop_tokens is None or not config.stop_on_eos else stop_tokens.of(until)
    if model.device.type == "cuda":  # more would leave the rounds to the host; frequent tokens come first
        early = early[: max(0, MOST_STOP_IDS - len(ends))]
    output = dk.sample(
        model, [list(prompt.ids) for prompt in prompts], config=config,
        new_tokens=[prompt.new_tokens for prompt in prompts], row_ids=[prompt.number for prompt in prompts],
        eos_ids=tuple(dict.fromkeys((*ends, *early))), max_batch=max_batch,
    )  # fmt: skip
    answers, misled = [], []
    rows = zip(prompts, output.sequences.tolist(), output.lengths.tolist(), strict=True)
    for row, (prompt, ids, tokens) in enumerate(rows):
        start = len(prompt.ids)
        ended = tokens < prompt.new_tokens
        last = ids[start + tokens] if ended else None
        at_stop = ended and last not in ends
        text = added_text(tokenizer, ids[:start], ids[start : start + tokens])
        if at_stop:
            whole = decoded_behind(tokenizer.decode, ids[:start], ids[start : start + tokens + 1])
            spoken = decoded_behind(tokenizer.decode, ids[:start], ids[start : start + tokens])
            text += whole[len(spoken) :] if whole.startswith(spoken) else ""
        cut = cut_at(text, until)
        if at_stop and cut == text:
            misled.append(row)  # its last token holds a stop string alone, and none behind the others
        limit = not ended and cut == text
        answers.append(Answer(cut, tokens, int(output.row_forwards[row]), limit))
    if misled:
        again = generate(
            model,
            tokenizer,
            [prompts[row] for row in misled],
            until=until,
            max_batch=max_batch,
            config=config,
        )
        for row, answer in zip(misled, again, strict=True):
            answers[row] = answer
    return answers


def fill(
    model,
    tokenizer,
    texts: Sequence[str],
    numbers: Sequence[int],
    *,
    until: tuple[str, ...] = (),
    max_batch: int | None = None,
    config: dk.SampleConfig,
) -> list[Answer]:
    """Return what fills the gap, written `<mask:24>`, of each text; numbers: the keys of their noise.

    The length of the gap is given, so no answer counts as at the limit.
    """
    output = dk.infill(
        model, list(texts), tokenizer=tokenizer, config=config, row_ids=list(numbers), max_batch=max_batch
    )
    answers = []
    for row, (text, whole) in enumerate(zip(texts, output.texts, strict=True)):
        before, after = GAP.split(text)
        filling = whole[len(before) : len(whole) - len(after)]
        forwards = int(output.row_forwards[row])
        answers.append(Answer(cut_at(filling, until), int(output.lengths[row]), forwards, False))
    return answers


def cut_at(text: str, until: Sequence[str]) -> str:
    """Return `text` up to the first of the stop strings that is in it."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
