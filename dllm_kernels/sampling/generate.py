"""`dk.sample` and `dk.infill`."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable

from torch import Tensor

from dllm_kernels.models.chat import chat_ids
from dllm_kernels.sampling.block_rounds import BlockRounds
from dllm_kernels.sampling.canvases import Canvases, check_ids, completions, gaps, token_lists
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.cuda_graph import NotRecorded
from dllm_kernels.sampling.device_rounds import DeviceRounds
from dllm_kernels.sampling.job import Job, prepare
from dllm_kernels.sampling.output import SampleOutput, completion_output, infill_output
from dllm_kernels.sampling.refreshed_rounds import RefreshedRounds
from dllm_kernels.sampling.rounds import Round, Rounds


def sample(
    model,
    prompts: str | list[str] | list[list[int]] | Tensor,
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    on_round: Callable[[Round], None] | None = None,
    attention_mask: Tensor | None = None,
    **overrides,
) -> SampleOutput:
    """Complete every prompt by `max_new_tokens` tokens, or up to its end token.

    model: a transformers model marked for diffusion (see `dk.load`), or a callable from ids [B, T] to logits
    [B, T, V]. prompts: text (with `tokenizer`), lists of ids of any lengths, or a Tensor [B, S] whose real
    tokens `attention_mask` tells; with chat=True messages. config: a SampleConfig; overrides: options in its
    place; without a config or block_size, blocks are of the checkpoint's own size. on_round: called after
    every round.
    """
    job = prepare(model, tokenizer, config, overrides)
    rows = _prompt_ids(job, prompts, attention_mask, tokenizer)
    check_ids("prompts", rows, job.diffusion.vocab_size, job.parity.empty_prompts)
    for index, row in enumerate(rows):
        if job.mask_id in row:
            raise ValueError(f"prompts[{index}] holds the mask token {job.mask_id}; dk.infill fills gaps")
    canvases = completions(rows, job)
    rounds = _run(job, canvases, on_round, job.eos_ids if job.config.stop_on_eos else ())
    return completion_output(canvases, rounds.unmask_step, job.eos_ids, tokenizer, **rounds.measured())


def infill(
    model,
    canvases: str | list[str] | list[list[int]] | Tensor,
    *,
    tokenizer=None,
    config: SampleConfig | None = None,
    on_round: Callable[[Round], None] | None = None,
    attention_mask: Tensor | None = None,
    **overrides,
) -> SampleOutput:
    """Fill the mask tokens of every canvas; what is given stays as it is.

    canvases: as `prompts` of `sample`, with mask tokens where text is to come; in text, `<mask:24>` stands
    for 24 of them. Blocks count from position 0; those without masks cost nothing. No token ends a row.
    """
    if "max_new_tokens" in overrides:
        raise ValueError("max_new_tokens has no meaning for infill: what is masked gets filled")
    job = prepare(model, tokenizer, config, overrides)
    if job.config.chat:
        raise ValueError("chat has no meaning for infill: a canvas is not a conversation")
    rows = token_lists("canvases", canvases, attention_mask, tokenizer, job.mask_id)
    check_ids("canvases", rows, job.diffusion.vocab_size)
    filled = gaps(rows, job.fill)
    masked = filled.ids == job.mask_id
    rounds = _run(job, filled, on_round)
    return infill_output(filled, masked, rounds.unmask_step, tokenizer, **rounds.measured())


def rounds_on_the_device(job: Job) -> type[DeviceRounds] | None:
    """Those that do all that `job` asks; None: the host must see or do something in every round."""
    return next((kind for kind in (BlockRounds, RefreshedRounds) if kind.serves(job)), None)


def _run(job: Job, canvases: Canvases, on_round, stop_ids: tuple[int, ...] = ()) -> Rounds | DeviceRounds:
    """Every row to its end: on a GPU by rounds that stay there, where that can be."""
    if on_round is not None and not callable(on_round):
        raise TypeError(f"on_round is a {type(on_round).__name__}; it must be a function of a Round")
    kind = rounds_on_the_device(job) if on_round is None and _may_record(job) else None
    if kind is not None:
        try:
            rounds = kind(job, canvases, stop_ids)
            rounds.run()
            return rounds
        except NotRecorded as error:
            _NOT_RECORDED.add(job.model)
            warnings.warn(
                f"{type(job.model).__name__} cannot be recorded as a CUDA graph, so that the host launches "
                f"every kernel of its steps: {error}",
                stacklevel=3,
            )
    rounds = Rounds(job, canvases, on_round, stop_ids)
    rounds.run()
    return rounds


_NOT_RECORDED: weakref.WeakSet = weakref.WeakSet()


def _may_record(job: Job) -> bool:
    """Not where weights are gathered from several processes in each forward, nor with DLLM_DEBUG=1, when
    every call waits for the device."""
    checked = os.environ.get("DLLM_DEBUG") == "1"
    if job.device.type != "cuda" or checked or job.model in _NOT_RECORDED:
        return False
    return not any(hasattr(weight, "device_mesh") for weight in job.model.parameters())


def _prompt_ids(job: Job, prompts, attention_mask: Tensor | None, tokenizer) -> list[list[int]]:
    if not job.config.chat:
        return token_lists("prompts", prompts, attention_mask, tokenizer, job.mask_id)
    if attention_mask is not None:
        raise ValueError("attention_mask has no meaning with chat=True, whose prompts are messages")
    return chat_ids(prompts, tokenizer, job.diffusion.chat)
