"""Training objectives of masked diffusion language models, as plain functions of a model and a batch.

MDLM (Sahoo et al. 2024, LLaDA): the whole row is noised at one time t and denoised bidirectionally.
BD3LM (Arriola et al. 2025): each block is noised and denoised given the clean blocks before it, in one
forward pass over x_t followed by x_0 under the block diffusion mask.

Both minimise  sum_i w(t_i) CE_i  over masked positions, normalised. With
w(t) = -alpha'(t)/(1 - alpha(t)) that sum is in expectation an upper bound on -log p(x). Hidden states are
taken from the base model; only the rows of masked positions are projected on the vocabulary.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dllm_kernels import SpanMask, linear_diffusion_cross_entropy
from dllm_train.noise import IGNORED_LABEL, Schedule, sample_noise


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar with gradient. The rest is detached and sums over this batch.

    nll_sum: float, sum of w(t) CE with scheduler weights, in nats. tokens: maskable positions.
    masked: masked positions. ce_sum: unweighted sum of CE over masked positions.
    """

    loss: torch.Tensor
    nll_sum: torch.Tensor
    ce_sum: torch.Tensor
    tokens: int
    masked: int

    @property
    def nll(self) -> float:
        """nll_sum / tokens: a bound on the negative log-likelihood of a token, in nats."""
        return float(self.nll_sum) / max(self.tokens, 1)


def mdlm_loss(model, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **options) -> LossOutput:
    """Masked diffusion loss over whole rows; every position sees the whole row.

    input_ids: int64 [B, L]. labels: int64 [B, L], -100 where a token is given and never masked;
    None: input_ids.
    Options:
      mask_id: the mask token (required).
      noise: a `Noise` of the same shape as input_ids; None: drawn by `sample_noise` from `example_ids`
        (default 0..B-1), `seed`, `epoch`, `eps`.
      lengths: int64 [B], valid tokens of right-padded rows; None: all.
      schedule: "linear" | "cosine".  loss_weight_type: "scheduler" w(t) | "uniform" 1.
      loss_norm_type: "token" (maskable positions) | "sequence" (mean over rows of sum / maskable of the row)
        | "batch" (rows). `normalizer` replaces the count of maskable positions, or of rows, by that of the
        global batch (all ranks and accumulation steps).
      shift: the prediction for position i comes from the output at i - 1. Unless column 0 of labels is all
        -100, `bos_id` is put before every row; a given noise then has L + 1 columns.
      weight_eps: added to the denominator of w(t) (dLLM adds 1e-6).
      bar_mask_token: leave the mask token out of the softmax.
    """
    return _diffusion_loss(model, input_ids, labels, block_size=None, **options)


def bd3lm_loss(
    model,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    block_size: int,
    time_per="block",
    **options,
) -> LossOutput:
    """Block diffusion loss: block b of x_t sees itself and the blocks before b of x_0.

    Arguments and options as in `mdlm_loss`; `time_per`: "block" | "row", what shares one t when noise is
    drawn here. Block of position p: p // block_size. With `shift` the first prediction of a block comes from
    the x_0 half, as in sampling, and the others from the x_t half.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; expected a positive integer")
    if time_per not in ("block", "row"):
        raise ValueError(f"time_per is {time_per!r}; allowed: 'block', 'row'")
    return _diffusion_loss(
        model,
        input_ids,
        labels,
        block_size=block_size,
        time_block=block_size if time_per == "block" else None,
        **options,
    )


def _diffusion_loss(
    model,
    input_ids,
    labels,
    *,
    block_size,
    mask_id,
    time_block=None,
    noise=None,
    example_ids=None,
    seed=0,
    epoch=0,
    eps=1e-3,
    lengths=None,
    schedule="linear",
    loss_weight_type="scheduler",
    loss_norm_type="token",
    normalizer=None,
    shift=False,
    bos_id=None,
    weight_eps=0.0,
    bar_mask_token=False,
) -> LossOutput:
    _check("loss_weight_type", loss_weight_type, ("scheduler", "uniform"))
    _check("loss_norm_type", loss_norm_type, ("token", "sequence", "batch"))
    schedule = Schedule(schedule) if isinstance(schedule, str) else schedule
    labels = input_ids if labels is None else labels
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; "
            "expected both [B, L]"
        )
    if lengths is not None:
        inside = torch.arange(input_ids.shape[1], device=labels.device) < lengths[:, None]
        labels = labels.masked_fill(~inside, IGNORED_LABEL)
    if shift and bool((labels[:, 0] != IGNORED_LABEL).any()):
        input_ids, labels, lengths = _prepend_bos(input_ids, labels, lengths, bos_id)
    batch, length = input_ids.shape
    if noise is None:
        example_ids = range(batch) if example_ids is None else example_ids
        noise = sample_noise(
            labels, example_ids, seed=seed, epoch=epoch, schedule=schedule, eps=eps, block_size=time_block
        )
    if noise.masked.shape != input_ids.shape or noise.t.shape != input_ids.shape:
        raise ValueError(
            f"noise has shapes t {tuple(noise.t.shape)}, masked {tuple(noise.masked.shape)}; "
            f"expected {tuple(input_ids.shape)}" + (" (BOS included)" if shift else "")
        )
    maskable = labels != IGNORED_LABEL
    masked = noise.masked & maskable
    noised = input_ids.masked_fill(masked, mask_id)

    if block_size is None:
        hidden = hidden_states(model, noised, kind="full", lengths=lengths)
    else:
        both = torch.cat([noised, input_ids], dim=1)
        hidden = hidden_states(model, both, kind="block_diffusion", lengths=lengths, block_size=block_size)
    row, column = masked.nonzero(as_tuple=True)
    source = column
    if shift:
        source = (column - 1).clamp(min=0)
        if block_size is not None:
            source = torch.where(column % block_size == 0, length + source, source)
    scheduler_weight = schedule.weight(noise.t[row, column], eps=weight_eps)
    weights = scheduler_weight if loss_weight_type == "scheduler" else torch.ones_like(scheduler_weight)
    tokens = int(maskable.sum())
    if loss_norm_type == "token":
        weights = weights / max(tokens if normalizer is None else normalizer, 1)
    else:
        weights = weights / (batch if normalizer is None else normalizer)
        if loss_norm_type == "sequence":
            weights = weights / maskable.sum(1).clamp(min=1)[row]
    head = model.get_output_embeddings()
    loss, ce = linear_diffusion_cross_entropy(
        hidden[row, source],
        head.weight,
        labels[row, column],
        weights,
        getattr(head, "bias", None),
        suppress_tokens=(mask_id,) if bar_mask_token else None,
        return_ce=True,
    )
    return LossOutput(loss, (ce * scheduler_weight).sum(), ce.sum(), tokens, len(row))


def hidden_states(model, input_ids, *, kind, lengths=None, block_size=None) -> torch.Tensor:
    """Last hidden states [B, S, hidden] of a causal-LM model under attention `kind`.

    kind: "full" | "causal" | "block_causal" | "block_diffusion" (input_ids is then x_t ⊕ x_0, and both halves
    carry positions 0..S/2-1). A model on our attention ("dllm") gets the SpanMask, any other a 4-D mask.
    """
    length = input_ids.shape[1]
    if kind == "block_diffusion":
        length //= 2
    positions = torch.arange(length, device=input_ids.device)
    if kind == "block_diffusion":
        positions = positions.repeat(2)
    ours = model.config._attn_implementation == "dllm"
    mask = (
        {"attention_mask": None, "dllm_mask": span_mask(kind, length, block_size, lengths)}
        if ours
        else {"attention_mask": dense_mask(kind, length, block_size, lengths, input_ids.device)}
    )
    output = model.base_model(
        input_ids=input_ids, position_ids=positions.expand(input_ids.shape[0], -1), use_cache=False, **mask
    )
    return output.last_hidden_state


def span_mask(kind, length, block_size=None, lengths=None) -> SpanMask:
    """The SpanMask of an attention kind; for "block_diffusion" `length` is that of one half."""
    if kind == "full":
        return SpanMask.full(length, lengths=lengths)
    if kind == "causal":
        return SpanMask.causal(length, lengths=lengths)
    constructor = {"block_causal": SpanMask.block_causal, "block_diffusion": SpanMask.block_diffusion}
    _check("kind", kind, ("full", "causal", *constructor))
    return constructor[kind](length, block_size, lengths=lengths)


def project(model, hidden: torch.Tensor) -> torch.Tensor:
    """Vocabulary logits [N, V] of hidden states [N, hidden]."""
    head = model.get_output_embeddings()
    return F.linear(hidden, head.weight, getattr(head, "bias", None))


def dense_mask(kind, length, block_size, lengths, device) -> torch.Tensor:
    """bool [B or 1, 1, S, S]; a padding query sees itself, since softmax needs one key."""
    if lengths is None:
        return _unpadded_dense_mask(kind, length, block_size, str(device))
    mask = span_mask(kind, length, block_size, lengths.to(device)).to_dense()
    return (mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=device))[:, None]


@functools.lru_cache(maxsize=16)
def _unpadded_dense_mask(kind, length, block_size, device):
    return span_mask(kind, length, block_size).to_dense()[:, None].to(device)


def _prepend_bos(input_ids, labels, lengths, bos_id):
    if bos_id is None:
        raise ValueError("bos_id is None; with shift it is needed unless every label of column 0 is -100")
    bos = torch.full_like(input_ids[:, :1], bos_id)
    labels = torch.cat([torch.full_like(bos, IGNORED_LABEL), labels], dim=1)
    return torch.cat([bos, input_ids], dim=1), labels, None if lengths is None else lengths + 1


def _check(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
