"""Training objectives of masked diffusion language models, as plain functions of a model and a batch.

MDLM (Sahoo et al. 2024, LLaDA): the whole row is noised at one time t and denoised bidirectionally.
BD3LM (Arriola et al. 2025): each block is noised and denoised given the clean blocks before it, in one
forward pass over x_t followed by x_0 under the block diffusion mask.
Dream (Ye et al. 2025): MDLM with shifted predictions, weighted by how much context a position has.

All minimise  sum_i w_i CE_i  over masked positions, normalised. With
w(t) = -alpha'(t)/(1 - alpha(t)) that sum is in expectation an upper bound on -log p(x). CE is that of the
model's own logits, of which only the rows of masked positions are made. It is computed inside the forward of
the model, so wrappers of it work: DistributedDataParallel, FSDP, DeepSpeed, peft, torch.compile.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dllm_kernels._arguments import integer, number
from dllm_train.diffusion_loss import LossOutput, check_not_negative, diffusion_loss
from dllm_train.loss_weights import check_choice, loss_normalizer
from dllm_train.noise import Noise, Schedule
from dllm_train.noised_batch import noised_batch

__all__ = ["LossOutput", "bd3lm_loss", "dream_loss", "loss_normalizer", "mdlm_loss"]


def mdlm_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    mask_id: int,
    noise: Noise | None = None,
    example_ids: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    epoch: int = 0,
    eps: float = 1e-3,
    stratified: bool = True,
    lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    schedule: Schedule | str = "linear",
    loss_weight_type: str = "scheduler",
    loss_norm_type: str = "token",
    normalizer: float | Tensor | None = None,
    shift: bool = False,
    bos_id: int | None = None,
    weight_eps: float = 0.0,
    bar_mask_token: bool = False,
    complementary: bool = False,
    certainty_weight: float = 0.0,
    certainty_temperature: float = 1.0,
    reach: int | None = None,
) -> LossOutput:
    """Return the masked diffusion loss over whole rows; every position sees the whole row.

    Tensors of the batch may be on the CPU while the model is elsewhere; the host then waits for no device.

    model: a transformers model with a vocabulary head, or any wrapper of it; its own sliding windows hold.
    input_ids: int64 [B, L]. labels: int64 [B, L], -100 where a token is given and never masked, else equal to
      input_ids; None: input_ids. mask_id: the mask token.
    noise: a `Noise` of the same shape as input_ids; None: drawn by `sample_noise` from `example_ids`
      (default 0..B-1), `seed`, `epoch`, `eps`, `stratified`.
    lengths: int64 [B], valid tokens of right-padded rows; None: all.
    document_lengths: int64 [B, D], zero-filled, the documents of packed rows. Each is as if it were a row:
      it sees no other, its positions start at 0, and it has its own times.
    schedule: "linear" | "cosine".  loss_weight_type: "scheduler" w(t) | "uniform" 1.
    loss_norm_type: "token" (maskable positions) | "sequence" (mean over rows of sum / maskable of the row)
      | "batch" (rows); documents count as rows. `normalizer` replaces the count of maskable positions, or of
      rows, by that of the global batch (all ranks and accumulation steps), which `loss_normalizer` counts.
    shift: the prediction for position i comes from the output at i - 1. `bos_id` is put before every row
      whose first token has a label; if there is one, a given noise has L + 1 columns. The first token of a
      packed document is taken as given instead.
    weight_eps: added to the denominator of w(t) (dLLM adds 1e-6).
    bar_mask_token: leave the mask token out of the softmax.
    complementary: take every example twice, the second time with its mask inverted, at the time t' with
      1 - alpha(t') = alpha(t), and return the mean (Fast-dLLM v2). nll is a bound with the linear schedule.
    certainty_weight: adds this times the mean entropy of softmax(logits / certainty_temperature) over masked
      positions whose argmax is right (dParallel). The mean is that of this batch, which then weighs what it
      has of `normalizer`.
    reach: query i sees keys before i + 1 + reach, to anneal a causal model's mask (DiffuLLaMA); None: all.
    Raises TypeError and ValueError for arguments, models and wrappers that this loss does not support.
    """
    batch = noised_batch(
        input_ids, labels, lengths, document_lengths, noise=noise, example_ids=example_ids, seed=seed,
        epoch=epoch, eps=eps, schedule=schedule, stratified=stratified, time_block=None, shift=shift,
        bos_id=bos_id, complementary=complementary,
    )  # fmt: skip
    check_choice("loss_weight_type", loss_weight_type, ("scheduler", "uniform"))
    return diffusion_loss(
        model, batch, attention=_whole_rows(reach), mask_id=mask_id, loss_weight_type=loss_weight_type,
        loss_norm_type=loss_norm_type, normalizer=normalizer, shift=shift, weight_eps=weight_eps,
        bar_mask_token=bar_mask_token, complementary=complementary, certainty_weight=certainty_weight,
        certainty_temperature=certainty_temperature,
    )  # fmt: skip


def bd3lm_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    block_size: int,
    mask_id: int,
    time_per: str = "block",
    clean: str = "block_causal",
    ar_weight: float = 0.0,
    ar_normalizer: float | Tensor | None = None,
    noise: Noise | None = None,
    example_ids: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    epoch: int = 0,
    eps: float = 1e-3,
    stratified: bool = True,
    lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    schedule: Schedule | str = "linear",
    loss_weight_type: str = "scheduler",
    loss_norm_type: str = "token",
    normalizer: float | Tensor | None = None,
    shift: bool = False,
    bos_id: int | None = None,
    weight_eps: float = 0.0,
    bar_mask_token: bool = False,
    complementary: bool = False,
    certainty_weight: float = 0.0,
    certainty_temperature: float = 1.0,
) -> LossOutput:
    """Return the block diffusion loss: block b of x_t sees itself and the blocks before b of x_0.

    Arguments as in `mdlm_loss`; `time_per`: "block" | "row", what shares one t when noise is drawn here: a
    block, or all blocks of a row or document. Block of position p: p // block_size, counted in each document.
    With `shift` the first prediction of a block comes from the x_0 half, as in sampling, and the others from
    the x_t half.
    clean: the mask of x_0, "block_causal" its own block and those before, or "causal" no later token.
    ar_weight: with clean="causal", adds this times the mean CE of next tokens predicted by the x_0 half
      (I-DLM, NeMo Automodel), over all labels that a token of their document precedes. `ar_normalizer`
      replaces their count by that of the global batch (`loss_normalizer(..., "next_token")`), and is needed
      beside `normalizer`.
    """
    block_size = integer("block_size", block_size, 1)
    check_choice("time_per", time_per, ("block", "row"))
    check_choice("clean", clean, ("block_causal", "causal"))
    check_choice("loss_weight_type", loss_weight_type, ("scheduler", "uniform"))
    batch = noised_batch(
        input_ids, labels, lengths, document_lengths, noise=noise, example_ids=example_ids, seed=seed,
        epoch=epoch, eps=eps, schedule=schedule, stratified=stratified,
        time_block=block_size if time_per == "block" else None, shift=shift, bos_id=bos_id,
        complementary=complementary,
    )  # fmt: skip
    if block_size > batch.input_ids.shape[1]:
        raise ValueError(f"block_size is {block_size}, and rows have {batch.input_ids.shape[1]} tokens")
    _check_ar(ar_weight, ar_normalizer, normalizer, clean)
    return diffusion_loss(
        model, batch, attention={"kind": "block_diffusion", "block_size": block_size, "clean": clean},
        mask_id=mask_id, loss_weight_type=loss_weight_type, loss_norm_type=loss_norm_type,
        normalizer=normalizer, shift=shift, weight_eps=weight_eps, bar_mask_token=bar_mask_token,
        complementary=complementary, certainty_weight=certainty_weight,
        certainty_temperature=certainty_temperature, ar_weight=ar_weight, ar_normalizer=ar_normalizer,
    )  # fmt: skip


def dream_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    mask_id: int,
    cart_p: float = 0.3,
    noise: Noise | None = None,
    example_ids: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    epoch: int = 0,
    eps: float = 1e-3,
    stratified: bool = True,
    lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    schedule: Schedule | str = "linear",
    loss_weight_type: str = "cart",
    loss_norm_type: str = "token",
    normalizer: float | Tensor | None = None,
    shift: bool = True,
    bos_id: int | None = None,
    weight_eps: float = 0.0,
    bar_mask_token: bool = False,
    complementary: bool = False,
    certainty_weight: float = 0.0,
    certainty_temperature: float = 1.0,
    reach: int | None = None,
) -> LossOutput:
    """Return Dream's loss: as `mdlm_loss`, shifted, with context-adaptive weights in place of w(t).

    Other arguments as in `mdlm_loss`. loss_weight_type: "cart" | "scheduler" | "uniform".
    cart_p: with "cart", w_i is the sum of ½ p (1 - p)^(|i - j| - 1) over the positions j of i's document that
    are not masked, in (0, 1].
    """
    if not 0 < number("cart_p", cart_p) <= 1:
        raise ValueError(f"cart_p is {cart_p}; expected 0 < cart_p <= 1")
    batch = noised_batch(
        input_ids, labels, lengths, document_lengths, noise=noise, example_ids=example_ids, seed=seed,
        epoch=epoch, eps=eps, schedule=schedule, stratified=stratified, time_block=None, shift=shift,
        bos_id=bos_id, complementary=complementary,
    )  # fmt: skip
    check_choice("loss_weight_type", loss_weight_type, ("cart", "scheduler", "uniform"))
    return diffusion_loss(
        model, batch, attention=_whole_rows(reach), mask_id=mask_id, loss_weight_type=loss_weight_type,
        loss_norm_type=loss_norm_type, normalizer=normalizer, shift=shift, weight_eps=weight_eps,
        bar_mask_token=bar_mask_token, complementary=complementary, certainty_weight=certainty_weight,
        certainty_temperature=certainty_temperature, cart_p=cart_p,
    )  # fmt: skip


def _whole_rows(reach: int | None) -> dict:
    """Return the attention of MDLM and Dream."""
    return {"kind": "full"} if reach is None else {"kind": "causal", "reach": integer("reach", reach, 0)}


def _check_ar(ar_weight, ar_normalizer, normalizer, clean: str) -> None:
    check_not_negative(ar_weight=ar_weight)
    if ar_weight and clean != "causal":
        raise ValueError(
            f'ar_weight is {ar_weight}, and clean is {clean!r}; expected clean="causal", since other x_0 '
            "tokens see what they would predict"
        )
    if ar_weight and normalizer is not None and ar_normalizer is None:
        raise ValueError(
            "ar_normalizer is None, and normalizer is given; expected both counts of the global batch: "
            'loss_normalizer(labels, "next_token") gives the former'
        )
