"""`dk.sample` and `dk.infill`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dllm_kernels.models.chat import chat_ids
from dllm_kernels.sampling.canvases import Canvases, check_ids, completions, gaps, token_lists
from dllm_kernels.sampling.config import SampleConfig
from dllm_kernels.sampling.device_rounds import DeviceRounds, serves
from dllm_kernels.sampling.job import Job, prepare
from dllm_kernels.sampling.output import SampleOutput, completion_output, infill_output
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
    rounds = _rounds(job, canvases, on_round, job.eos_ids if job.config.stop_on_eos else ())
    rounds.run()
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
    rounds = _rounds(job, filled, on_round)
    rounds.run()
    return infill_output(filled, masked, rounds.unmask_step, tokenizer, **rounds.measured())


def _rounds(job: Job, canvases: Canvases, on_round, stop_ids: tuple[int, ...] = ()) -> Rounds | DeviceRounds:
    """On a GPU the rounds stay there, unless the host must see or do something in every one."""
    if on_round is not None and not callable(on_round):
        raise TypeError(f"on_round is a {type(on_round).__name__}; it must be a function of a Round")
    if job.device.type == "cuda" and on_round is None and serves(job):
        return DeviceRounds(job, canvases, stop_ids)
    return Rounds(job, canvases, on_round, stop_ids)


def _prompt_ids(job: Job, prompts, attention_mask: Tensor | None, tokenizer) -> list[list[int]]:
    if not job.config.chat:
        return token_lists("prompts", prompts, attention_mask, tokenizer, job.mask_id)
    if attention_mask is not None:
        raise ValueError("attention_mask has no meaning with chat=True, whose prompts are messages")
    return chat_ids(prompts, tokenizer, job.diffusion.chat)
