"""Training common to finetune and pretrain: the trainer of an objective, resumption, the record of a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback

from dllm_train.arguments import DataArguments, DiffusionTrainingArguments
from dllm_train.checkpoints import last_complete
from dllm_train.collate import DiffusionCollator
from dllm_train.data.preprocessed import preprocessing_options
from dllm_train.objective_settings import DEFAULT_BLOCK_SIZE
from dllm_train.trainer import BD3LMTrainer, DiffusionTrainer, DreamTrainer, MDLMTrainer

TRAINERS = {"mdlm": MDLMTrainer, "bd3lm": BD3LMTrainer, "dream": DreamTrainer}


@dataclass
class ObjectiveArguments:
    """The objective to train."""

    objective: str | None = field(
        default=None,
        metadata={
            "help": "mdlm (bidirectional), bd3lm (block diffusion) or dream (Dream's weights and shift). "
            "None: bd3lm for block-causal checkpoints, else mdlm.",
            "choices": list(TRAINERS),
        },
    )


@dataclass(frozen=True)
class Plan:
    """An objective, its trainer, and the length of the blocks of sampling and, for bd3lm, of training."""

    objective: str
    trainer: type[DiffusionTrainer]
    block_size: int

    @property
    def whole_blocks(self) -> int | None:
        """Return the number that must divide the length of rows, or None."""
        return self.block_size if self.objective == "bd3lm" else None


def make_plan(objective: str | None, config, training_args: DiffusionTrainingArguments) -> Plan:
    """Return the plan for a model of this config; an objective that is None is that of the config."""
    entry = getattr(config, "diffusion", None) or {}
    if objective is None:
        kinds = entry.get("attention") or ["bidirectional"]
        objective = "bd3lm" if kinds[0] == "block_causal" else "mdlm"
    return Plan(
        objective,
        TRAINERS[objective],
        training_args.block_size or entry.get("block_size") or DEFAULT_BLOCK_SIZE,
    )


def read_dataset(load: Callable, kind: str, options: Sequence[str], plan: Plan, tokenizer, data_args, args):
    """Return the splits of data_args.preprocessed, or `load` of data_args.dataset.

    kind: "sft" | "pretraining". options: the fields of data_args that `load` takes besides the common ones.
    data_args.max_length becomes that of a preprocessed folder.
    Raises ValueError for options that would have no effect.
    """
    if bool(data_args.dataset) == bool(data_args.preprocessed):
        raise ValueError(
            f"dataset is {data_args.dataset!r} and preprocessed {data_args.preprocessed!r}; give one of them"
        )
    for name in _OPTIONS_OF_OTHERS[kind]:
        if getattr(data_args, name) != getattr(DataArguments, name):
            raise ValueError(f"{name} is {getattr(data_args, name)!r}; it has no effect on {kind} rows")
    common = {"block_size": plan.whole_blocks, "seed": args.data_seed}
    common |= {name: getattr(data_args, name) for name in ("streaming", "shuffle_buffer")}
    if data_args.preprocessed:
        from dllm_train.data import load_preprocessed_dataset

        splits = load_preprocessed_dataset(data_args.preprocessed, tokenizer, kind=kind, **common)
        _take_options_of_folder(data_args, ("max_length", *options))
        return splits
    given = {name: getattr(data_args, name) for name in ("max_length", "num_proc", *options)}
    with args.main_process_first(desc="preparing the dataset"):
        return load(data_args.dataset, tokenizer, **common, **given)


_OPTIONS_OF_OTHERS = {
    "sft": ("text_field", "packing", "drop_tail"),
    "pretraining": ("truncation", "chat", "train_on"),
}


def _take_options_of_folder(data_args: DataArguments, names: Sequence[str]) -> None:
    """Set the options of data_args to those that the rows of a preprocessed folder were made with.

    Raises ValueError for another value than these and the default.
    """
    made_with = preprocessing_options(data_args.preprocessed)
    for name in names:
        given = getattr(data_args, name)
        if given not in (getattr(DataArguments, name), made_with[name]):
            raise ValueError(
                f"{name} is {given!r}, and {data_args.preprocessed!r} was made with {made_with[name]!r}; "
                "leave it out, or preprocess again"
            )
        setattr(data_args, name, made_with[name])


def train(
    plan: Plan, model, tokenizer, dataset, data_args: DataArguments, args: DiffusionTrainingArguments
) -> None:
    """Train on dataset["train"], evaluate on dataset["test"] if there is one, and save to args.output_dir.

    End tokens pad rows to a multiple of pad_to_multiple_of, or else of a common divisor of block and
    max_length.
    """
    if "train" not in dataset:
        name = data_args.dataset or data_args.preprocessed
        raise ValueError(f"dataset is {name!r}, which has no split to train on")
    if args.do_eval and "test" not in dataset:
        name = data_args.dataset or data_args.preprocessed
        raise ValueError(f"do_eval is True, and dataset is {name!r}, which has no test split")
    _check_metric(args)
    collator = DiffusionCollator(
        tokenizer,
        block_size=_padding_multiple(plan, data_args),
        train_padding=data_args.train_padding,
        random_truncation=data_args.random_truncation,
        response_crop=data_args.response_crop,
        batch_response_crop=data_args.batch_response_crop,
        seed=args.noise_seed,
    )
    checkpoint = _checkpoint(args)
    trainer = plan.trainer(
        model=model, args=args, data_collator=collator, train_dataset=dataset["train"],
        eval_dataset=dataset.get("test"), processing_class=tokenizer,
    )  # fmt: skip
    trainer.add_callback(_Record(trainer, plan.objective))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if args.do_eval and "test" in dataset:
        trainer.save_metrics("eval", trainer.evaluate(), combined=False)


def _check_metric(args: DiffusionTrainingArguments) -> None:
    levels = [f"ce_t{level:.1f}" for level in args.eval_noise_levels]
    metrics = ["loss", "nll", "ppl", *levels]
    given = args.metric_for_best_model
    if given is not None and given.removeprefix("eval_") not in metrics:
        raise ValueError(f"metric_for_best_model is {given!r}; evaluation reports {', '.join(metrics)}")


def _padding_multiple(plan: Plan, data_args: DataArguments) -> int:
    """Return the number whose multiple rows are padded to; a row cut at max_length is not padded."""
    multiple = data_args.pad_to_multiple_of
    if multiple is None:
        return math.gcd(plan.block_size, data_args.max_length)
    if multiple < 1 or data_args.max_length % multiple or multiple % (plan.whole_blocks or 1):
        blocks = f" and a multiple of block_size, {plan.whole_blocks}" if plan.whole_blocks else ""
        raise ValueError(
            f"pad_to_multiple_of is {multiple}; expected a divisor of max_length, {data_args.max_length}"
            f"{blocks}"
        )
    return multiple


def _checkpoint(args: DiffusionTrainingArguments) -> str | None:
    """Return the folder to resume from; refuse to mix a new run with an older one's checkpoints."""
    last = last_complete(args.output_dir)
    if args.resume_from_checkpoint == "last":
        return None if last is None else str(last)
    if last is not None and args.resume_from_checkpoint is None:
        raise ValueError(
            f"output_dir is {args.output_dir!r}, which holds {last.name} of an earlier run; give "
            "--resume_from_checkpoint last to continue from it, or another output_dir"
        )
    return args.resume_from_checkpoint


class _Record(TrainerCallback):
    """Write output_dir/run.json and print it when training begins."""

    def __init__(self, trainer: DiffusionTrainer, objective: str):
        self.trainer, self.objective = trainer, objective

    def on_train_begin(self, args, state, control, **kwargs):
        facts = {"objective": self.objective, **run_facts(self.trainer)}
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            beside = folder / ".run.json.tmp"
            beside.write_text(json.dumps(facts, indent=2) + "\n")
            os.replace(beside, folder / "run.json")
            print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)


def run_facts(trainer: DiffusionTrainer) -> dict:
    """Return how the model of a trainer that has begun is held: processes, wrapper, kinds of weights."""
    weights = list(trainer.model.parameters())
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in weights]
    return {
        "world_size": trainer.args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "wrapper": type(trainer.model_wrapped).__name__,
        "parameter_types": sorted({"ZeRO-3" if hasattr(w, "ds_id") else type(w).__name__ for w in weights}),
        "dtypes": sorted({str(w.dtype).removeprefix("torch.") for w in weights}),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "gradient_checkpointing": trainer.args.gradient_checkpointing or trainer.args.selective_checkpointing,
        "device": trainer.args.device.type,
        "weights": sum(sizes),
        "trained_weights": sum(size for w, size in zip(weights, sizes, strict=True) if w.requires_grad),
    }
