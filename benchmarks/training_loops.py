"""Whole trainers as people run them: ours, the bare loop around the same loss, and the plain implementation.

All of them train a model on the same rows with AdamW and gradient clipping, and write nothing.
"""

from __future__ import annotations

import tempfile

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from dllm_train import (
    BD3LMTrainer,
    DiffusionCollator,
    DiffusionTrainingArguments,
    MDLMTrainer,
    bd3lm_loss,
    mdlm_loss,
    sample_noise,
)

LEARNING_RATE, MAX_NORM = 1e-4, 1.0


def our_trainer(model, rows: Tensor, batch_size: int, block_size: int | None):
    """Return a function that trains one epoch of `rows` int64 [N, L]; block_size None: MDLM, else BD3LM."""
    args = DiffusionTrainingArguments(**arguments(batch_size), block_size=block_size)
    trainer = (MDLMTrainer if block_size is None else BD3LMTrainer)(
        model,
        args,
        data_collator=DiffusionCollator(None, block_size=block_size, end_id=0),
        train_dataset=_items(rows),
    )
    return trainer.train


def plain_trainer(model, rows: Tensor, batch_size: int, block_size: int | None):
    """Return the run by transformers' Trainer and `plain_loss`."""
    args = transformers.TrainingArguments(**arguments(batch_size), remove_unused_columns=False)
    trainer = PlainTrainer(model, args, train_dataset=_items(rows), data_collator=_stacked)
    trainer.block_size = block_size
    return trainer.train


def bare_loop(model, rows: Tensor, batch_size: int, block_size: int | None):
    """Return the run by our loss in a loop of six lines."""
    options = dict(mask_id=model.config.mask_token_id)
    loss_of = mdlm_loss if block_size is None else bd3lm_loss
    if block_size is not None:
        options["block_size"] = block_size

    def run() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for first in range(0, len(rows), batch_size):
            ids = rows[first : first + batch_size]
            loss_of(model, ids, example_ids=range(first, first + len(ids)), **options).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    return run


class PlainTrainer(transformers.Trainer):
    """transformers' Trainer with the loss that people write first."""

    block_size: int | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        noise = sample_noise(ids, range(len(ids)), block_size=self.block_size)
        return plain_loss(model, ids, noise, self.block_size)


def plain_loss(model, ids: Tensor, noise, block_size: int | None) -> Tensor:
    """Return Σ CE / t over masked positions ÷ all positions: dense mask, SDPA, logits of every position."""
    length = ids.shape[1]
    noised = torch.where(noise.masked, model.config.mask_token_id, ids)
    if block_size is None:
        logits = model(input_ids=noised, use_cache=False).logits
    else:
        position = torch.arange(length)
        logits = model(
            input_ids=torch.cat([noised, ids], dim=1),
            attention_mask=block_diffusion_mask(length, block_size),
            position_ids=torch.cat([position, position])[None].expand(len(ids), -1),
            use_cache=False,
        ).logits[:, :length]
    ce = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (ce * noise.masked / noise.t).sum() / ids.numel()


def block_diffusion_mask(length: int, block_size: int) -> Tensor:
    """bool [1, 1, 2L, 2L] over x_t ⊕ x_0 (Arriola et al. 2025, appendix B)."""
    block = (torch.arange(length) // block_size).repeat(2)
    clean = torch.arange(2 * length) >= length
    own = (block[:, None] == block) & (clean[:, None] == clean)
    before = clean & (block[:, None] > block)
    return (own | before)[None, None]


def arguments(batch_size: int) -> dict:
    """Return what all trainers are given."""
    return dict(
        output_dir=tempfile.mkdtemp(prefix="dllm-benchmark-"),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def _items(rows: Tensor) -> list[dict]:
    return [{"input_ids": row.tolist()} for row in rows]


def _stacked(items: list[dict]) -> dict:
    return {"input_ids": torch.tensor([item["input_ids"] for item in items])}
