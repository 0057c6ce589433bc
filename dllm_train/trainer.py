"""Trainers of diffusion language models: transformers' Trainer with our losses, batches and checkpoints.

The loss is normalised over the global batch: the count of its mean covers all accumulation steps and ranks of
an optimizer step, so that the division into batches does not change the gradient. Batches stay on the CPU
until the loss, which copies its results to the device, so that a step never waits for the device.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from dllm_kernels.models.fused_layers import FUSING_DEVICES, fuse_layers
from dllm_kernels.models.staging import staged
from dllm_train.annealing import annealed_reach
from dllm_train.arguments import DiffusionTrainingArguments
from dllm_train.batches import GlobalBatches, IgnoringCollator, NumberedDataset, NumberedStream, lengths_of
from dllm_train.checkpoints import UNFINISHED, check_complete, finish_checkpoint, last_complete
from dllm_train.collate import DiffusionCollator
from dllm_train.finite import FiniteLosses, check_finite_weights
from dllm_train.meters import FixedLevel, LoggedLosses, LossMeter
from dllm_train.model_loss import wrapped_model
from dllm_train.objective_settings import objective_settings
from dllm_train.objectives import LossOutput, bd3lm_loss, dream_loss, loss_normalizer, mdlm_loss
from dllm_train.selective_checkpointing import checkpoint_selectively
from dllm_train.sharding import choose_fsdp_units
from dllm_train.trainer_checks import check_arguments

logger = logging.getLogger(__name__)

_NOISE = ("schedule", "eps", "stratified")
_LOSS = (
    "complementary", "loss_weight_type", "loss_norm_type", "weight_eps", "bar_mask_token", "certainty_weight",
    "certainty_temperature",
)  # fmt: skip
# Files that a smaller model, or another number of shards, would leave beside new ones.
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors(\.index\.json)?")
# In evaluation the loss is the bound, whatever the training loss.
_BOUND = {"complementary": False, "certainty_weight": 0.0, "weight_eps": 0.0, "ar_weight": 0.0}


class DiffusionTrainer(Trainer):
    """Train and evaluate with one objective; use MDLMTrainer, BD3LMTrainer or DreamTrainer.

    model: a transformers model, or one with adapters of peft. args: DiffusionTrainingArguments.
    train_dataset, eval_dataset: items with `input_ids` and optionally `labels` and `document_lengths`;
    map-style or iterable (then max_steps says when training ends). data_collator: makes the losses' batches
    of items with "example_id", their number; None: DiffusionCollator. processing_class: the tokenizer,
    which is saved with every checkpoint.

    Logs `loss`, the mean over the global batches, and nll (a bound, in nats per token), ppl and the cross
    entropy of masked tokens by noise level, ce_t0.1 … ce_t1.0. At the end it logs train_loss, the mean over
    all steps of the run, those before it was resumed included. Evaluation draws the same noise every time,
    and eval_loss is the bound.
    Raises ValueError for options that would be ignored or conflict with the model, and FloatingPointError
    when the loss is no longer finite.
    """

    objective: Callable[..., LossOutput]
    attention = "bidirectional"
    default_shift = False
    options: tuple[str, ...] = _NOISE + _LOSS
    # The loss is already the share of this batch in the global one.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DiffusionTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = DiffusionTrainingArguments("trainer_output") if args is None else args
        check_arguments(type(self), model, args, kwargs)
        self.settings = objective_settings(
            model, processing_class, trainer=type(self).__name__, attention=self.attention,
            default_shift=self.default_shift, mask_id=args.mask_id, bos_id=args.bos_id, shift=args.shift,
            block_size=args.block_size,
        )  # fmt: skip
        if data_collator is None:
            data_collator = self._default_collator(processing_class)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if args.fused_layers:
            _fuse_layers(wrapped_model(model), args.device)
        if args.selective_checkpointing:
            checkpoint_selectively(wrapped_model(model))
        if self.is_fsdp_enabled:
            choose_fsdp_units(wrapped_model(model))
        self.model_accepts_loss_kwargs = (
            True  # asked where there is no loss_is_scaled_for_ga (transformers 5.17)
        )
        self._refuse_parallelism()
        fixed = {name: getattr(args, name) for name in self.options} | vars(self.settings)
        self._fixed = {name: value for name, value in fixed.items() if value is not None}
        self._train_examples: NumberedDataset | NumberedStream | None = None
        self._meter, self._losses = LossMeter(args.device), FiniteLosses(args.device)
        self._normalizers: dict[str, float | Tensor] = {}
        self._logged = LoggedLosses()
        for name, dataset in _datasets(train_dataset, eval_dataset):
            if not isinstance(dataset, IterableDataset):
                NumberedDataset(dataset, name)  # refuses an empty one, and items without input_ids

    def _default_collator(self, tokenizer) -> DiffusionCollator:
        # Without blocks, trained padding would make an example depend on the other rows of its batch.
        block_size = self.settings.block_size
        return DiffusionCollator(tokenizer, block_size=block_size, train_padding=block_size is not None)

    def _refuse_parallelism(self) -> None:
        """Raise ValueError for parallelism that the losses or the checkpoints do not support."""
        for name, size in (("context", self.get_cp_size()), ("sequence", self.get_sp_size())):
            if size > 1:
                raise ValueError(
                    f"{name} parallelism of {size} ranks splits rows, which the losses do not support"
                )
        state = self.accelerator.state
        if self.is_fsdp_enabled and "FULL" not in str(state.fsdp_plugin.state_dict_type):
            raise ValueError(
                f"fsdp_state_dict_type is {state.fsdp_plugin.state_dict_type}; checkpoints would hold no "
                "weights that other programs read. Use FULL_STATE_DICT"
            )
        if self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
            zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            if not zero.get("stage3_gather_16bit_weights_on_model_save"):
                raise ValueError(
                    "stage3_gather_16bit_weights_on_model_save is not true; checkpoints would hold no "
                    "weights that other programs read. Set it in the DeepSpeed config (in accelerate's, "
                    "zero3_save_16bit_model)"
                )

    # ---- batches -----------------------------------------------------------------------------------------
    @cached_property
    def _ranks(self) -> tuple[int, int]:
        """Return this process's data-parallel index, and their number; tensor-parallel peers share one."""
        peers = self.get_tp_size()
        return self.args.process_index // peers, self.args.world_size // peers

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        args, (rank, ranks) = self.args, self._ranks
        name = "train_dataset" if is_training else "eval_dataset"
        collator = self.data_collator
        if isinstance(collator, DiffusionCollator) and not is_training:
            collator = collator.without_cuts()
        options = {
            "collate_fn": IgnoringCollator(collator),
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        }
        if isinstance(dataset, IterableDataset):
            if is_training and args.train_sampling_strategy == "group_by_length":
                raise ValueError(
                    f"train_sampling_strategy is 'group_by_length', and {name} is a stream, whose lengths "
                    "are not known beforehand"
                )
            examples = NumberedStream(dataset, name, batch_size, rank=rank, ranks=ranks, endless=is_training)
            loader = DataLoader(examples, batch_size=batch_size, **options)
        else:
            examples = NumberedDataset(dataset, name)
            order = args.train_sampling_strategy if is_training else "sequential"
            lengths = lengths_of(dataset, args.length_column_name) if order == "group_by_length" else None
            batches = GlobalBatches(
                examples, batch_size, rank=rank, ranks=ranks, accumulation=args.gradient_accumulation_steps,
                order=order, seed=args.data_seed, lengths=lengths,
                drop_last=is_training and args.dataloader_drop_last,
            )  # fmt: skip
            if not len(batches):
                raise ValueError(
                    f"{name} has {len(examples)} examples, less than one batch of {batch_size} on {ranks} "
                    "ranks, and dataloader_drop_last leaves it out"
                )
            loader = DataLoader(examples, batch_sampler=batches, **options)
        if is_training:
            self._train_examples = examples
        loader = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
        if dataloader_key is not None and args.dataloader_persistent_workers:
            # get_eval_dataloader looks here, so that workers are not started for every evaluation.
            self._eval_dataloaders = {**getattr(self, "_eval_dataloaders", {}), dataloader_key: loader}
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Return the batches of an optimizer step and its normalizer, a tensor if there are several ranks."""
        if self.state.global_step >= self.state.max_steps:  # a run that had ended was resumed
            self.control.should_training_stop = True
            num_batches = 0
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        self._normalizers = self._counted(batches)
        return batches, self._normalizers["normalizer"]

    def _counted(self, batches: list[dict]) -> dict[str, float | Tensor]:
        """Return the divisor of the losses of `batches`, counted over all ranks."""
        kinds = {"normalizer": self.args.loss_norm_type}
        if self._fixed.get("ar_weight"):
            kinds["ar_normalizer"] = "next_token"
        counts = [sum(self._count(batch, kind) for batch in batches) for kind in kinds.values()]
        if self._ranks[1] > 1:
            # One fill and one reduction: the host neither copies nor waits.
            totals = torch.cat([torch.full((1,), float(n), device=self.args.device) for n in counts])
            distributed.all_reduce(totals)
            counts = (totals / self.get_tp_size()).unbind()
        return dict(zip(kinds, counts, strict=True))

    def _count(self, batch: dict, norm_type: str) -> int:
        if batch.get("ignored"):
            return 0
        return loss_normalizer(
            batch.get("labels", batch["input_ids"]), norm_type, lengths=batch.get("lengths"),
            document_lengths=batch.get("document_lengths"), shift=self.settings.shift,
        )  # fmt: skip

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Leave the batch on the CPU: the loss copies its results to the device."""
        return inputs

    def floating_point_ops(self, inputs: dict) -> int:
        """Return the arithmetic of a forward and backward on `inputs`."""
        return 6 * inputs["input_ids"].numel() * self._parameters_used

    @cached_property
    def _parameters_used(self) -> int:
        return wrapped_model(self.model).num_parameters(exclude_embeddings=True)

    # ---- losses ------------------------------------------------------------------------------------------
    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Return the loss of a batch, whose mean over ranks DDP and FSDP take (and its LossOutput)."""
        normalizers = {} if num_items_in_batch is None else self._normalizers
        epoch = self._train_examples.epoch if self._train_examples is not None else 0
        output = self._loss(
            model, inputs, seed=self.args.noise_seed, epoch=epoch, **normalizers, **self._reach()
        )
        if num_items_in_batch is not None:
            self._meter.add(output)
            self._losses.add(self.state.global_step + 1, output.loss, inputs["example_ids"])
        loss = output.loss
        if normalizers and self._ranks[1] > 1:
            loss = loss * self._ranks[1]
        return (loss, output) if return_outputs else loss

    def _loss(self, model, inputs: dict, **options) -> LossOutput:
        if "example_ids" not in inputs:
            raise ValueError(
                f"the batch of {type(self.data_collator).__name__} has no example_ids, int64 [B], which "
                'key the noise; make them from the items\' "example_id"'
            )
        inputs = {name: value for name, value in inputs.items() if name != "ignored"}
        try:
            with self.compute_loss_context_manager():
                return type(self).objective(model, **inputs, **{**self._fixed, **options})
        except ValueError:  # NaN in the weights looks like a model that mixes positions
            self._check_finite(model, collective=False)
            raise

    def _check_finite(self, model, collective: bool) -> None:
        """Raise FloatingPointError if a loss since the last check, or a weight, is not finite."""
        self._losses.check(collective=collective)
        check_finite_weights(model, self.state.global_step, self.args.device, collective)

    def _reach(self) -> dict[str, int | None]:
        """Return the keyword that anneals the mask in this step."""
        steps = self.args.annealing_steps
        if not steps:
            return {}
        steps = steps * self.state.max_steps if steps < 1 else steps
        step, length, seed = self.state.global_step, self.args.annealing_length, self.args.noise_seed
        return {"reach": annealed_reach(step, steps, length, seed)}

    # ---- meters ------------------------------------------------------------------------------------------
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, and the meters with the loss of training. FloatingPointError: a loss is not finite."""
        of_training = {"loss", "learning_rate"} <= logs.keys()
        at_the_end = self.is_in_train and "train_loss" in logs
        if of_training or at_the_end:
            self._losses.check()
            loss, figures = self._meter.read()
            mean_loss = self._logged.add(loss / self.get_tp_size(), self.state.global_step)
        if of_training:
            logs["loss"] = mean_loss
            logs |= figures
            if "nll" not in figures:
                logger.warning("no example had a label in the steps before step %d", self.state.global_step)
        if at_the_end:
            logs["train_loss"] = self._logged.mean_loss
        super().log(logs, start_time)

    def prediction_step(self, model, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        """Add a batch to the meters of the evaluation; there are no predictions to return."""
        bound = {name: value for name, value in _BOUND.items() if name in self._fixed}
        bound["seed"] = self.args.eval_noise_seed
        with torch.no_grad():
            output = self._loss(model, inputs, **bound)
            self._eval_meter.add_bound(output)
            self._eval_losses.add(self.state.global_step, output.nll_sum, inputs["example_ids"])
            for level in self.args.eval_noise_levels:
                output = self._loss(model, inputs, **bound, schedule=FixedLevel(level))
                self._eval_meter.add_level(level, output)
                self._eval_losses.add(self.state.global_step, output.ce_sum, inputs["example_ids"])
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Return transformers' EvalLoopOutput with loss, nll, ppl and ce_t… as metrics."""
        self._eval_meter = LossMeter(self.args.device)
        self._eval_losses = FiniteLosses(self.args.device)
        output = super().evaluation_loop(
            dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
        )
        self._eval_losses.check("bound of evaluation")
        _, figures = self._eval_meter.read()
        if "nll" not in figures:
            raise ValueError(
                f"{metric_key_prefix}_loss has no value: no example of this dataset has a token with a label"
            )
        figures = {"loss": figures["nll"], **figures}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    # ---- checkpoints -------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train, from the last complete checkpoint with resume_from_checkpoint=True, or from a given one.

        Raises ValueError for a checkpoint that is not complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True, and output_dir {self.args.output_dir!r} has no "
                    "complete checkpoint"
                )
        if resume_from_checkpoint:
            check_complete(resume_from_checkpoint)
            resume_from_checkpoint = str(resume_from_checkpoint)
        self._meter, self._losses = LossMeter(self.args.device), FiniteLosses(self.args.device)
        self._logged = LoggedLosses()
        if resume_from_checkpoint:
            self._load_meter(Path(resume_from_checkpoint))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and its tokenizer; FloatingPointError if weights are not finite."""
        if not _internal_call:
            self._check_finite(self.model, collective=False)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the model and the tokenizer beside their place, and move them when all is written."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self._unfinished is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with staged(Path(output_dir), _WEIGHTS) as beside:
            super()._save(str(beside), state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        self._check_finite(model, collective=True)
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)  # of a process that died
        _wait_for_all()
        self._unfinished = run / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        _wait_for_all()
        if self.state.best_model_checkpoint == str(run / UNFINISHED / name):
            self.state.best_model_checkpoint = str(run / name)
        if self.args.should_save:
            self.state.save_to_json(str(run / UNFINISHED / name / "trainer_state.json"))
            finish_checkpoint(run / UNFINISHED / name, run / name)
            rotate_checkpoints(
                str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        _wait_for_all()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / name))

    _unfinished: Path | None = None

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: a checkpoint is pushed when it is complete."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {"meter": self._meter.state_dict(), "logged": asdict(self._logged)}
        torch.save(state, Path(output_dir) / f"meter_{self.args.process_index}.pt")

    def _load_meter(self, checkpoint: Path) -> None:
        """Continue from this rank's sums in a checkpoint; of other ranks than now, rank 0 takes all."""
        files = sorted(checkpoint.glob("meter_*.pt"))
        states = [torch.load(file, weights_only=True) for file in files]
        self._logged = LoggedLosses(**states[0]["logged"])
        rank = self.args.process_index
        if len(states) == self.args.world_size:
            states = [torch.load(checkpoint / f"meter_{rank}.pt", weights_only=True)]
        if len(states) == 1 or rank == 0:
            self._meter.load_state_dict(*(state["meter"] for state in states))


class MDLMTrainer(DiffusionTrainer):
    """Train bidirectional masked diffusion (`mdlm_loss`: MDLM, LLaDA)."""

    objective = staticmethod(mdlm_loss)


class BD3LMTrainer(DiffusionTrainer):
    """Train block diffusion (`bd3lm_loss`)."""

    objective = staticmethod(bd3lm_loss)
    attention = "block_causal"
    options = (*_NOISE, *_LOSS, "time_per", "clean", "ar_weight")


class DreamTrainer(DiffusionTrainer):
    """Train Dream's objective (`dream_loss`): shifted predictions, weighted by their context."""

    objective = staticmethod(dream_loss)
    default_shift = True
    options = (*_NOISE, *_LOSS, "cart_p")


def _fuse_layers(model: nn.Module, device: torch.device) -> None:
    if device.type not in FUSING_DEVICES:
        raise ValueError(f"fused_layers=True: there are no kernels of fused layers for {device.type}")
    if not fuse_layers(model):
        raise ValueError(f"fused_layers=True: no layer of this {type(model).__name__} can be fused")


def _datasets(train_dataset, eval_dataset) -> Iterator[tuple[str, object]]:
    """Yield the datasets that are given, with their names."""
    if train_dataset is not None:
        yield "train_dataset", train_dataset
    if isinstance(eval_dataset, dict):
        yield from ((f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items())
    elif eval_dataset is not None:
        yield "eval_dataset", eval_dataset


def _wait_for_all() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
