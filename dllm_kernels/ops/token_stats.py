"""Statistics of rows of logits: the proposal and every kind of confidence.

`token_stats` reads each row once; `linear_token_stats` takes hidden states and the weight of the vocabulary
projection instead, and never stores the logits. Bad arguments raise ValueError, from these functions and
from torch.ops.dllm_kernels alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_kernels import _library  # noqa: F401
from dllm_kernels._arguments import check_optional_tensors, check_tensors
from dllm_kernels.ops._autograd import register_no_derivative
from dllm_kernels.ops._fake import register_fake
from dllm_kernels.ops.skinny_linear import PackedWeight, RowMajorWeight, skinny_linear
from dllm_kernels.ops.stats_options import StatsOptions, checked_options, with_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ops = torch.ops.dllm_kernels

_OF_THE_SOFTMAX = ("suppress_tokens", "confidence_exclude", "confidence_temperature", "float64")
CHUNK_LOGITS = 1 << 26  # logits in memory at once if the projection is a library's product


class TokenStats(NamedTuple):
    """Statistics of rows of logits; every field has the logits' leading shape.

    token       int64, the proposal
    prob        p(token) under softmax(logits / confidence_temperature)
    margin      p1 − p2, the two highest probabilities
    entropy     −Σ p ln p in nats; as a confidence it counts negated, so that larger is surer
    logsumexp   of logits / confidence_temperature
    divergence  KL(p ‖ p of the previous step) in nats, or None
    """

    token: Tensor
    prob: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor
    divergence: Tensor | None = None


@with_options
def token_stats(
    logits: Tensor,
    *,
    noise_ids: Tensor | None = None,
    previous: Tensor | None = None,
    **options: Unpack[StatsOptions],
) -> TokenStats:
    """Return proposal and confidence of every row of logits, in one pass over them.

    Options (`StatsOptions`) and their defaults: temperature=0.0, seed=0, suppress_tokens=None,
    proposal_exclude=None, confidence_exclude=None, top_p=None, top_k=None, confidence_temperature=1.0,
    precision="float32".

    logits: [..., V] float32, bfloat16 or float16. The proposal is the argmax (ties to the lowest id) of
    logits + temperature · g, with Gumbel noise g = −ln(−ln(1 − w)) from Philox4x32-10 [Salmon et al.
    2011] keyed by `seed` and counted by (token id, noise_ids) alone.
    LLaDA's `exp(l) / (−ln u)^T` has the same distribution.

    noise_ids: int32 [N, 3] or [..., 3], (sequence, position, step) of each row; None: (0, row, 0).
    suppress_tokens: ids that are −inf for proposal and softmax. proposal_exclude: ids that are only
    barred from the proposal. confidence_exclude: ids left out of the softmax after the proposal was
    made; a proposal among them has prob and margin 0 [LLaDA's confidence_eos_eot_inf].

    top_p, top_k: filters of softmax(logits / confidence_temperature), at temperature 0 too [Dream, with
    confidence_temperature = temperature where that is not 0]. top_p keeps ids in descending probability
    while the sum before them is at most top_p, then top_k keeps ids not below the k-th highest. The
    proposal is drawn from the kept ids, and the statistics are those of the kept ids, renormalised. If no
    kept id may be proposed, the best id that may is proposed, with prob and margin 0.

    previous: the logits of the step before, like `logits`. divergence is then KL(p ‖ q) with p and q the
    softmax of logits and previous, at confidence_temperature and without suppress_tokens and
    confidence_exclude, before any filter; +inf where p puts weight on an id that q does not.
    precision: "float32", or "float64" for a softmax in double (statistics are then float64).

    NaN counts as −inf, +inf as the largest float. A row without a finite logit yields the lowest
    allowed id with prob 0, margin 0, entropy ln V, logsumexp −inf and divergence +inf. Statistics have no
    derivative: a backward pass through them raises NotImplementedError.
    """
    check_tensors(logits=logits)
    check_optional_tensors(noise_ids=noise_ids, previous=previous)
    checked = checked_options("token_stats", options)
    stats = _ops.token_stats(logits, noise_ids=noise_ids, **checked)
    if previous is not None:
        of_softmax = {name: checked[name] for name in _OF_THE_SOFTMAX if name in checked}
        stats = (*stats, _ops.token_divergence(logits, previous, **of_softmax))
    return TokenStats(*stats)


@with_options
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor | PackedWeight | RowMajorWeight,
    bias: Tensor | None = None,
    *,
    noise_ids: Tensor | None = None,
    previous: Tensor | None = None,
    **options: Unpack[StatsOptions],
) -> TokenStats:
    """Return `token_stats` of hidden · weightᵀ + bias, without storing these logits.

    hidden: [..., H]; weight: [V, H]; bias: [V]; each float32, bfloat16 or float16. weight may also be a
    PackedWeight, as `skinny_linear` multiplies it; the logits of a chunk of rows then exist for a moment.
    On the CPU products and sums are float32 whatever the storage, and a row's result does not depend on the
    rows beside it. The same holds on Hopper GPUs if hidden and weight are both bfloat16 or both float16, H is
    a multiple of 8, rows are contiguous and begin at multiples of 16 bytes, and precision is "float32".
    Otherwise the projection on CUDA is the library's, in the dtype of weight and in chunks of rows. The
    other arguments are those of `token_stats`; top_p, top_k and previous need stored logits and are refused.
    """
    top_p, top_k = options.pop("top_p", None), options.pop("top_k", None)
    needs_logits = dict(top_p=top_p, top_k=top_k, previous=previous)
    for name, value in needs_logits.items():
        if value is not None:
            raise ValueError(
                f"linear_token_stats: {name} needs stored logits; leave it None, or call token_stats on them"
            )
    laid_out = weight if isinstance(weight, PackedWeight | RowMajorWeight) else None
    check_tensors(hidden=hidden, weight=laid_out[0] if laid_out else weight)
    check_optional_tensors(bias=bias, noise_ids=noise_ids)
    checked = checked_options("linear_token_stats", options)
    if laid_out:
        return TokenStats(
            *_stats_in_chunks(
                hidden,
                lambda some: skinny_linear(some, laid_out, bias),
                laid_out.outputs,
                {"noise_ids": noise_ids, **checked},
            )
        )
    return TokenStats(*_ops.linear_token_stats(hidden, weight, bias, noise_ids=noise_ids, **checked))


def chunked_linear_token_stats(hidden, weight, bias=None, *options) -> tuple[Tensor, ...]:
    """Compute linear_token_stats by the library's product, a chunk of rows at a time."""
    schema = _ops.chunked_linear_token_stats.default._schema
    named = {argument.name: value for argument, value in zip(schema.arguments[3:], options, strict=False)}
    return _stats_in_chunks(
        hidden.to(weight.dtype), lambda some: F.linear(some, weight, bias), weight.shape[0], named
    )


def _stats_in_chunks(
    hidden: Tensor, project: Callable[[Tensor], Tensor], vocabulary: int, options: dict
) -> tuple[Tensor, ...]:
    """Compute token_stats of the projected rows of hidden [..., H]; logits exist for a chunk of rows."""
    shape, hidden = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
    noise_ids = options.pop("noise_ids", None)
    if noise_ids is None:
        noise_ids = torch.zeros(len(hidden), 3, dtype=torch.int32, device=hidden.device)
        noise_ids[:, 1] = torch.arange(len(hidden), device=hidden.device)
    rows = max(1, CHUNK_LOGITS // max(vocabulary, 1))
    chunks = [
        _ops.token_stats(project(some), noise_ids=ids, **options)
        for some, ids in zip(hidden.split(rows), noise_ids.reshape(-1, 3).split(rows), strict=True)
    ]
    return tuple(torch.cat(field).reshape(shape) for field in zip(*chunks, strict=True))


torch.library.register_kernel("dllm_kernels::chunked_linear_token_stats", ("cpu", "cuda"))(
    chunked_linear_token_stats
)


def _new_stats(rows: Tensor, float64: bool) -> tuple[Tensor, ...]:
    shape = rows.shape[:-1]
    reals = [rows.new_empty(shape, dtype=torch.float64 if float64 else torch.float32) for _ in range(4)]
    return (rows.new_empty(shape, dtype=torch.int64), *reals)


@register_fake("token_stats")
def _(logits, float64=False, **options):
    return _new_stats(logits, float64)


@register_fake("token_divergence")
def _(logits, float64=False, **options):
    return logits.new_empty(logits.shape[:-1], dtype=torch.float64 if float64 else torch.float32)


@register_fake("chunked_linear_token_stats")
@register_fake("linear_token_stats")
def _(hidden, float64=False, **options):
    return _new_stats(hidden, float64)


# A loss over logits has its own operators.
for _name in ("token_stats", "token_divergence", "linear_token_stats", "chunked_linear_token_stats"):
    register_no_derivative(_name, "call it under torch.no_grad(), or differentiate logits.softmax(-1)")
