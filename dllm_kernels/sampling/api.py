"""`dk.sample` and `dk.infill`."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from dllm_kernels.models.chat import chat_ids
from dllm_kernels.sampling.canvas_control import Allowed, Pinned, allowed_tokens, draft_of
from dllm_kernels.sampling.config import SampleConfig, rule_name
from dllm_kernels.sampling.graph_loop import graph_loop_of
from dllm_kernels.sampling.graphs import NotRecorded
from dllm_kernels.sampling.loop import Finished, HostLoop, Round
from dllm_kernels.sampling.output import SampleOutput, completion_output, infill_output
from dllm_kernels.sampling.plan import Plan, make_plan
from dllm_kernels.sampling.prefix_cache import PrefixCache
from dllm_kernels.sampling.prompts import (
    Canvases,
    GappedText,
    check_ids,
    completions,
    gapped_text,
    gaps,
    prompt_text_ids,
    token_lists,
)


def sample(
    model,
    prompts: str | list[str] | list[list[int]] | Tensor,
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    on_round: Callable[[Round], None] | None = None,
    attention_mask: Tensor | None = None,
    new_tokens: Sequence[int] | None = None,
    row_ids: Sequence[int] | None = None,
    prefix_cache: PrefixCache | None = None,
    **overrides,
) -> SampleOutput:
    """Complete every prompt by `max_new_tokens` tokens, or up to its end token.

    model: a transformers model marked for diffusion (see `dk.load`), or a callable from ids [B, T] to logits
    [B, T, V]. prompts: text (with `tokenizer`), lists of ids of any lengths, or a Tensor [B, S] whose real
    tokens `attention_mask` tells; with chat=True messages. config: a SampleConfig; overrides: options in its
    place; without a config or block_size, blocks are of the checkpoint's own size. on_round: called after
    every round. new_tokens: of each row, >= 1, in place of max_new_tokens. row_ids: what noise knows each row
    by, 0..2**31-1, in place of 0, 1, …, so that a row's tokens do not depend on the rows beside it.
    prefix_cache: keys and values that earlier calls left, for block-causal models.
    """
    plan = make_plan(model, tokenizer, config, overrides)
    rows = prompt_rows(plan, prompts, attention_mask, tokenizer)
    canvases = completions(rows, plan, new_tokens, row_ids)
    if prefix_cache is not None and not isinstance(prefix_cache, PrefixCache):
        raise TypeError(f"prefix_cache is a {type(prefix_cache).__name__}; it must be a dk.PrefixCache")
    finished = run(plan, canvases, on_round, plan.stop_ids, prefix_cache)
    return completion_output(canvases, finished, plan.eos_ids, tokenizer)


def infill(
    model,
    canvases: str | list[str] | list[list[int]] | Tensor,
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    on_round: Callable[[Round], None] | None = None,
    attention_mask: Tensor | None = None,
    row_ids: Sequence[int] | None = None,
    pinned: Pinned = True,
    allowed: Allowed | None = None,
    **overrides,
) -> SampleOutput:
    """Fill the mask tokens of every canvas; what is given stays as it is.

    canvases: as `prompts` of `sample`, with mask tokens where text is to come; in text, `<mask:24>` stands
    for 24 of them. A text is tokenized as a whole, and comes back in `texts` with its gaps filled. Blocks
    count from position 0; those without masks cost nothing. No token ends a row. row_ids: as of `sample`.
    pinned: which given tokens must stay, bool [B, T] or a list of bools for each canvas; the others are a
    draft that rule "edit" may change, so that a canvas may start from any text. False: all are a draft.
    allowed: the only tokens that may fill a mask: ids (or texts of one token each, with `tokenizer`) for
    every mask, or a mapping from positions to them for each canvas.
    """
    if "max_new_tokens" in overrides:
        raise ValueError("max_new_tokens has no meaning for infill: what is masked gets filled")
    plan = make_plan(model, tokenizer, config, overrides)
    if plan.config.chat:
        raise ValueError("chat has no meaning for infill: a canvas is not a conversation")
    gapped: list[GappedText] = []

    def ids_of_text(name: str, text: str) -> list[int]:
        gapped.append(gapped_text(name, text, tokenizer, plan.mask_id, plan.diffusion.max_positions))
        return gapped[-1].ids

    rows = token_lists("canvases", canvases, attention_mask, None if tokenizer is None else ids_of_text)
    check_ids("canvases", rows, plan.diffusion.vocab_size)
    draft = draft_of(pinned, rows, plan.mask_id, rule_name(plan.config))
    tokens = None
    if allowed is not None:
        tokens = allowed_tokens(
            allowed, rows, mask_id=plan.mask_id, barred=plan.config.suppress_tokens,
            vocab_size=plan.diffusion.vocab_size, tokenizer=tokenizer,
        )  # fmt: skip
    filled = gaps(rows, plan.fill, row_ids, draft, tokens)
    masked = filled.ids == plan.mask_id
    return infill_output(filled, masked, run(plan, filled, on_round), tokenizer, gapped)


def run(
    plan: Plan,
    canvases: Canvases,
    on_round: Callable[[Round], None] | None = None,
    stop_ids: tuple[int, ...] = (),
    prefix_cache: PrefixCache | None = None,
) -> Finished:
    """Take every row to its end: on a GPU by replayed steps, where that can be."""
    if on_round is not None and not callable(on_round):
        raise TypeError(f"on_round is a {type(on_round).__name__}; it must be a function of a Round")
    by_host = on_round is not None or prefix_cache is not None or not _may_record(plan, canvases)
    graph_loop = None if by_host else graph_loop_of(plan)
    if graph_loop is not None:
        try:
            return graph_loop(plan, canvases, stop_ids).run()
        except NotRecorded as error:
            _NOT_RECORDED.add(plan.model)
            warnings.warn(
                f"{type(plan.model).__name__} cannot be recorded as a CUDA graph, so that the host launches "
                f"every kernel of its steps: {error}",
                stacklevel=3,
            )
    return HostLoop(plan, canvases, on_round, stop_ids, prefix_cache).run()


_NOT_RECORDED: weakref.WeakSet = weakref.WeakSet()


def _may_record(plan: Plan, canvases: Canvases) -> bool:
    """Not where weights are gathered from several processes in each forward, nor with DLLM_DEBUG=1, when
    every call waits for the device, nor where positions depend on the length of a row, nor under a caller's
    control of single positions."""
    checked = os.environ.get("DLLM_DEBUG") == "1"
    if plan.device.type != "cuda" or checked or plan.model in _NOT_RECORDED:
        return False
    if canvases.draft is not None or canvases.allowed is not None:
        return False
    scaling_of = plan.runner.scaling_of
    if any(scaling_of(end) != scaling_of(1) for end in canvases.end.tolist()):
        return False
    return not any(hasattr(weight, "device_mesh") for weight in plan.model.parameters())


def prompt_rows(plan: Plan, prompts, attention_mask: Tensor | None, tokenizer) -> list[list[int]]:
    """Return the checked ids of every prompt of `sample`."""
    rows = _prompt_ids(plan, prompts, attention_mask, tokenizer)
    check_ids("prompts", rows, plan.diffusion.vocab_size, plan.parity.empty_prompts)
    for index, row in enumerate(rows):
        if plan.mask_id in row:
            raise ValueError(f"prompts[{index}] holds the mask token {plan.mask_id}; dk.infill fills gaps")
    return rows


def _prompt_ids(plan: Plan, prompts, attention_mask: Tensor | None, tokenizer) -> list[list[int]]:
    limit = plan.diffusion.max_positions
    if not plan.config.chat:
        ids_of_text = partial(prompt_text_ids, tokenizer=tokenizer, limit=limit)
        return token_lists("prompts", prompts, attention_mask, None if tokenizer is None else ids_of_text)
    if attention_mask is not None:
        raise ValueError("attention_mask has no meaning with chat=True, whose prompts are messages")
    return chat_ids(prompts, tokenizer, plan.diffusion.chat, limit)
