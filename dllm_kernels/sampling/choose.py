"""`dk.choose`: the probabilities of given continuations, from one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels._arguments import integer, kind
from dllm_kernels.models.chat import chat_ids
from dllm_kernels.models.text import check_text, encode
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.plan import Plan, make_plan
from dllm_kernels.sampling.prompts import check_ids, prompt_text_ids
from dllm_kernels.sampling.step import Predictions, Statistics
from dllm_kernels.sampling.views import SCHEMES, Rows, view_of

NORMALIZE = ("sum", "mean")


@dataclass(frozen=True)
class Choices:
    """The result of `choose`, in the order of the choices.

    logprobs: float32 [n], the sum of the log-probabilities of a choice's tokens. probabilities: float32 [n],
    the softmax of these sums (normalize="mean": of the means), so that they add up to 1. tokens: the ids of
    each choice. forwards: forward passes of the model.
    """

    logprobs: Tensor
    probabilities: Tensor
    tokens: list[list[int]]
    forwards: int

    @property
    def best(self) -> int:
        """Return the index of the likeliest choice; of equal ones the first."""
        return int(self.probabilities.argmax())


@torch.no_grad()
def choose(
    model,
    prompt: str | Sequence[int] | Sequence[dict],
    choices: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    normalize: str = "sum",
    **overrides,
) -> Choices:
    """Return how likely each of `choices` is to follow `prompt`.

    Masks follow the prompt, one for each token of a choice, and all are predicted at once: log p(choice) =
    Σ_i log p(token_i | prompt). For choices of one token that is the model's distribution; the tokens of
    longer ones count as independent given the prompt. A block-causal model predicts each block of a choice
    behind the blocks before it, in the same forward. Choices of unequal length are compared by their sums, or
    with normalize="mean" per token.

    prompt: text, ids, or with chat=True a message or a list of messages. choices: texts (with `tokenizer`) or
    lists of ids. config, overrides: as of `sample`; what they say of steps has no meaning here. Rows whose
    positions are scaled by their length take a forward for each length.
    Raise TypeError or ValueError for a prompt or choices of other types, or without tokens.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize is {normalize!r}; allowed: {', '.join(NORMALIZE)}")
    plan = make_plan(model, tokenizer, config, overrides)
    pairs = _contexts_and_targets(plan, prompt, choices, tokenizer)
    asked = [_rows_of(plan, context, target) for context, target in pairs]
    rows = list(dict.fromkeys(row for parts in asked for row, _ in parts))
    number = {row: index for index, row in enumerate(rows)}
    wanted = [
        (number[row], offset, token) for parts in asked for row, tokens in parts for offset, token in tokens
    ]
    found, forwards = _log_probabilities(plan, rows, wanted)
    sums = torch.stack([part.sum() for part in found.split([len(target) for _, target in pairs])])
    scores = sums
    if normalize == "mean":
        scores = sums / torch.tensor([len(target) for _, target in pairs], device=sums.device)
    return Choices(sums.cpu(), scores.softmax(0).cpu(), [target for _, target in pairs], forwards)


# A row is what stands before the masks, and how many masks there are.
_Row = tuple[tuple[int, ...], int]


def _rows_of(plan: Plan, context: list[int], target: list[int]) -> list[tuple[_Row, list]]:
    """Return the rows that predict a choice, each with what it predicts: (offset among its masks, token)."""
    if not plan.block_causal:
        return [((tuple(context), len(target)), list(enumerate(target)))]
    size, parts, done = plan.config.block_size, [], 0
    while done < len(target):
        before = (*context, *target[:done])
        masks = size - len(before) % size
        some = target[done : done + masks]
        parts.append(((before, masks), list(enumerate(some))))
        done += len(some)
    return parts


def _log_probabilities(
    plan: Plan, rows: list[_Row], wanted: list[tuple[int, int, int]]
) -> tuple[Tensor, int]:
    """Return the log-probability of each wanted (row, offset, token), float32 [n], and the forwards made."""
    given = torch.tensor([len(before) for before, _ in rows], device="cpu")
    masks = torch.tensor([count for _, count in rows], device="cpu")
    plan.check_positions(given, given + masks)
    canvas = torch.full((len(rows), int((given + masks).max())), plan.fill, device="cpu")
    for index, (before, count) in enumerate(rows):
        canvas[index, : len(before)] = torch.tensor(before, device="cpu")
        canvas[index, len(before) : len(before) + count] = plan.mask_id
    row, offset, token = torch.tensor(wanted, device="cpu").unbind(1)
    result, forwards = torch.zeros(len(wanted), device=plan.device), 0
    with plan.runner.ready():
        for some in _rows_of_one_scaling(plan, (given + masks).tolist()):
            here = torch.isin(row, some)
            place = torch.searchsorted(some, row[here])
            output, made = _output_rows(
                plan, canvas[some].to(plan.device), given[some].to(plan.device), masks[some].to(plan.device),
                place.to(plan.device), offset[here].to(plan.device),
            )  # fmt: skip
            statistics = Statistics(plan, plan.config.acceptance(1), len(some), int(masks.max()))
            found = statistics.log_probabilities(output, token[here].to(plan.device))
            result[here.to(plan.device)] = found.chosen
            forwards += made
    return result, forwards


def _rows_of_one_scaling(plan: Plan, ends: list[int]) -> list[Tensor]:
    """Return groups of rows that may share a forward, int64 [n] each."""
    groups: dict = {}
    for index, end in enumerate(ends):
        groups.setdefault(plan.runner.scaling_of(end), []).append(index)
    return [torch.tensor(group, device="cpu") for group in groups.values()]


def _output_rows(
    plan: Plan, canvas: Tensor, given: Tensor, masks: Tensor, row: Tensor, offset: Tensor
) -> tuple[Tensor, int]:
    """Return output rows [n, H] of one forward, for masks `offset` [n] of rows [n], and the forwards made."""
    zero, end = torch.zeros_like(given), given + masks
    if plan.runner.scaling_of(int(end[0])):
        plan.runner.length = int(end[0])
    rows = Rows(given, end, end, zero, zero.bool(), zero)
    hidden = None
    if plan.streams == 2:
        rows = rows.twice()
        kept = torch.tensor(plan.config.cfg_keep_tokens, dtype=torch.int64, device=canvas.device)
        hidden = (canvas != plan.mask_id) & ~torch.isin(canvas, kept)
    view = view_of(SCHEMES["none"], rows, plan.config.block_size if plan.block_causal else None)
    width = int(masks.max())
    candidates = given[:, None] + torch.arange(width, device=given.device)
    return Predictions(plan, len(canvas)).of(
        canvas, hidden, view, zero, given, candidates, slice(None), row * width + offset
    )


def _contexts_and_targets(plan: Plan, prompt, choices, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Return the ids before each choice and those of the choice."""
    if not isinstance(choices, Sequence) or isinstance(choices, str | bytes):
        raise TypeError(f"choices is a {kind(choices)}; give a list of texts or of lists of ids")
    if not choices:
        raise ValueError("choices is empty; give at least one")
    pairs = []
    for index, choice in enumerate(choices):
        name = f"choices[{index}]"
        if isinstance(choice, str):
            if tokenizer is None:
                raise ValueError(f"{name} is text, which needs tokenizer=; or give token ids")
            pair = _text_pair(plan, prompt, name, choice, tokenizer)
        elif isinstance(choice, Sequence | Tensor) and not isinstance(choice, bytes):
            ids = choice.tolist() if isinstance(choice, Tensor) else choice
            pair = _prompt_ids(plan, prompt, tokenizer), [integer(f"an id in {name}", token) for token in ids]
        else:
            raise TypeError(f"{name} is a {kind(choice)}; give text or a list of ids")
        if not pair[1]:
            raise ValueError(f"{name} has no tokens")
        pairs.append(pair)
    check_ids("prompt", [context for context, _ in pairs], plan.diffusion.vocab_size)
    check_ids("choices", [target for _, target in pairs], plan.diffusion.vocab_size)
    barred = {plan.mask_id, *plan.config.suppress_tokens}
    for index, (context, target) in enumerate(pairs):
        if plan.mask_id in context:
            raise ValueError(f"prompt holds the mask token {plan.mask_id}")
        if refused := barred & set(target):
            raise ValueError(f"choices[{index}] holds {min(refused)}, which is never proposed")
    return pairs


def _prompt_ids(plan: Plan, prompt, tokenizer) -> list[int]:
    """Return the ids of a prompt alone."""
    if plan.config.chat:
        conversation = prompt if isinstance(prompt, str) else [prompt]
        return chat_ids(conversation, tokenizer, plan.diffusion.chat, plan.diffusion.max_positions)[0]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompt is text, which needs tokenizer=; or give token ids")
        return prompt_text_ids("prompt", prompt, tokenizer, plan.diffusion.max_positions)
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(f"prompt is a {kind(prompt)}; give a text or a list of ids")
    return [integer("an id in prompt", token) for token in prompt]


def _text_pair(plan: Plan, prompt, name: str, choice: str, tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of a text choice behind a prompt.

    Prompt and choice are tokenized together, since a token may reach over their border: what the ids have in
    common with those of the prompt alone is given, the rest is the choice.
    """
    check_text(name, choice)
    before = _prompt_ids(plan, prompt, tokenizer)
    if plan.config.chat or not isinstance(prompt, str):
        return before, encode(name, choice, tokenizer, special_tokens=False)
    whole = prompt_text_ids(name, prompt + choice, tokenizer, plan.diffusion.max_positions)
    common = 0
    while common < min(len(before), len(whole)) and before[common] == whole[common]:
        common += 1
    return whole[:common], whole[common:]
