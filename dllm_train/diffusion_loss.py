"""The computation of all objectives: predicting outputs, their weights, one forward, and sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_kernels._arguments import integer, number
from dllm_train.attention_masks import copied
from dllm_train.loss_weights import NORM_TYPES, check_choice, divisor, next_tokens, norm_shares, row_weights
from dllm_train.model_loss import MaskedRows, loss_in_forward, wrapped_model
from dllm_train.noised_batch import NoisedBatch
from dllm_train.vocabulary_head import Certainty


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar with gradient. The rest is detached and sums over this batch, on the model's device.

    nll_sum: float, sum of w(t) CE with scheduler weights, in nats. tokens: maskable positions.
    masked: masked positions. ce_sum: unweighted sum of CE over masked positions. With complementary masks
    all of them count both views of an example.
    ar_sum: sum of CE of next tokens, with `ar_weight`. entropy_sum, right: the entropies of masked positions
    whose argmax is right, and their number, with `certainty_weight`. None elsewhere.
    ce: float32 [masked], the cross entropy of each masked position. t: float32 [masked], its time, on the
    device of the batch.
    """

    loss: Tensor
    nll_sum: Tensor
    ce_sum: Tensor
    tokens: int
    masked: int
    ar_sum: Tensor | None = None
    entropy_sum: Tensor | None = None
    right: Tensor | None = None
    ce: Tensor | None = None
    t: Tensor | None = None

    @property
    def nll(self) -> float:
        """Return nll_sum / tokens: a bound on the negative log-likelihood of a token, in nats."""
        return float(self.nll_sum) / max(self.tokens, 1)


def diffusion_loss(
    model, batch: NoisedBatch, *, attention: dict, mask_id, loss_weight_type, loss_norm_type, normalizer,
    shift, weight_eps, bar_mask_token, complementary, certainty_weight, certainty_temperature,
    cart_p=None, ar_weight=0.0, ar_normalizer=None,
) -> LossOutput:  # fmt: skip
    """Return Σ w CE over the masked positions of a noised batch, and the terms beside it, from one forward.

    attention: its pattern, as keywords of `base_arguments` without lengths. cart_p: with CART weights. Other
    arguments as in `mdlm_loss` and `bd3lm_loss`.
    """
    check_choice("loss_norm_type", loss_norm_type, NORM_TYPES)
    check_not_negative(weight_eps=weight_eps, certainty_weight=certainty_weight)
    if not 0 < number("certainty_temperature", certainty_temperature) < math.inf:
        raise ValueError(f"certainty_temperature is {certainty_temperature}; expected a positive number")
    mask_id = _check_vocabulary(wrapped_model(model), batch.input_ids, mask_id)
    views, length = 2 if complementary else 1, batch.input_ids.shape[1]
    two_halves = attention["kind"] == "block_diffusion"

    # 1. The outputs that predict the masked positions.
    row, column = batch.masked.nonzero(as_tuple=True)
    source = column - 1 if shift else column
    if shift and two_halves:
        starts_block = (
            batch.places.position.expand_as(batch.masked)[row, column] % attention["block_size"] == 0
        )
        source = torch.where(starts_block, length + source, source)
    targets, times = batch.labels[row, column], batch.t[row, column]

    # 2. The weight of each of them.
    weights, scheduler_weights = row_weights(
        batch, row, column, loss_weight_type=loss_weight_type, weight_eps=weight_eps, cart_p=cart_p
    )
    shares, tokens, counted = norm_shares(batch, row, column, loss_norm_type)
    normalizer = divisor("normalizer", normalizer, counted / views) * views
    weights = _divided(weights if shares is None else weights / shares, normalizer)

    # 3. The next tokens that the clean half predicts; both views have the same.
    masked, certainty = len(row), None
    if ar_weight:
        next_row, next_column = next_tokens(batch, len(batch.labels) // views)
        ar_weights = torch.full_like(next_row, ar_weight, dtype=torch.float32)
        ar_weights = _divided(ar_weights, divisor("ar_normalizer", ar_normalizer, len(next_row)))
        row, source = torch.cat([row, next_row]), torch.cat([source, length + next_column - 1])
        targets = torch.cat([targets, batch.labels[next_row, next_column]])
        weights = torch.cat([weights, copied(ar_weights, weights.device)])

    if certainty_weight:
        forced = torch.arange(len(row), device=row.device) < masked
        certainty = Certainty(forced.float(), certainty_temperature)

    # 4. One forward.
    noised = batch.input_ids.masked_fill(batch.masked, mask_id)
    losses = loss_in_forward(
        model,
        MaskedRows(
            input_ids=torch.cat([noised, batch.input_ids], dim=1) if two_halves else noised,
            attention={**attention, "lengths": batch.lengths, "document_lengths": batch.document_lengths},
            row=row, source=source, targets=targets, weights=weights,
            outputs=2 * length if two_halves and (shift or ar_weight) else length,
            suppress_tokens=(mask_id,) if bar_mask_token else None,
            certainty=certainty,
        ),
    )  # fmt: skip
    loss, ce = losses.loss, losses.ce[:masked]
    if certainty_weight:
        share = counted / normalizer
        if isinstance(share, Tensor):
            share = copied(share, loss.device)
        loss = loss + certainty_weight * share * losses.entropy_sum / losses.right.clamp(min=1)
    return LossOutput(
        loss=loss,
        nll_sum=(ce * copied(scheduler_weights, ce.device)).sum(),
        ce_sum=ce.sum(),
        tokens=tokens,
        masked=masked,
        ar_sum=losses.ce[masked:].sum() if ar_weight else None,
        entropy_sum=losses.entropy_sum.detach() if certainty_weight else None,
        right=losses.right if certainty_weight else None,
        ce=ce,
        t=times,
    )


def _divided(weights: Tensor, divisor) -> Tensor:
    """Return weights / divisor on the device of the divisor."""
    return (copied(weights, divisor.device) if isinstance(divisor, Tensor) else weights) / divisor


def _check_vocabulary(inner, input_ids: Tensor, mask_id) -> int:
    """Return mask_id after a check that it and all ids have an embedding."""
    words = getattr(inner.get_input_embeddings(), "num_embeddings", inner.config.get_text_config().vocab_size)
    mask_id = integer("mask_id", mask_id, 0, words - 1)
    low, high = input_ids.aminmax()
    if low < 0 or high >= words:
        raise ValueError(f"input_ids and bos_id must lie in 0..{words - 1}, got {int(low)}..{int(high)}")
    return mask_id


def check_not_negative(**values) -> None:
    """Raise ValueError for a negative or infinite one of `values`, named by its keyword."""
    for name, value in values.items():
        if not 0 <= number(name, value) < math.inf:
            raise ValueError(f"{name} is {value}; expected a number that is not negative")
