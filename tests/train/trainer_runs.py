"""Runs of the trainers on a tiny model, in this process or in several."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback

from dllm_train import BD3LMTrainer, DiffusionTrainingArguments, DreamTrainer, MDLMTrainer
from tests.train.tiny_models import MASK, VOCABULARY, tiny

TRAINERS = {"mdlm": MDLMTrainer, "bd3lm": BD3LMTrainer, "dream": DreamTrainer}
BLOCK = 4


def tokenizer():
    """Words w0 … w47, of which w0 is padding, w1 BOS, w2 the end and w47 the mask token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", mask_token=f"w{MASK}"
    )


def examples(count=8, seed=0):
    """Rows of different lengths, of which some have a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(6, 17, (), generator=generator))
        ids = torch.randint(3, MASK, (length,), generator=generator).tolist()
        prompt = 3 * (index % 2)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def trainer(folder, objective="mdlm", *, rows=None, evaluated=None, model=None, collator=None, **options):
    """A trainer that saves and logs nothing unless `options` say so."""
    defaults = dict(
        use_cpu=True, per_device_train_batch_size=8, max_steps=1, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no",
        disable_tqdm=True, block_size=BLOCK if objective == "bd3lm" else None, eval_noise_levels=[0.5, 1.0],
    )  # fmt: skip
    callbacks = options.pop("callbacks", None)
    return TRAINERS[objective](
        model=tiny("llama", gain=2.0, attention="dllm") if model is None else model,
        args=DiffusionTrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=examples() if rows is None else rows,
        eval_dataset=evaluated,
        data_collator=collator,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def losses(trained):
    """The logged losses of a trainer."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def on_two_ranks(script: str, folder: Path, *arguments: str) -> None:
    """Run a module on two processes with torchrun; RuntimeError with what it printed if it fails."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", script,
        str(folder), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
