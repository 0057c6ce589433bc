"""What a trainer takes: a class with an objective, a model that it can train, options that it uses."""

from torch import nn

from dllm_kernels.models.stored_weights import StoredLinear
from dllm_train.arguments import DiffusionTrainingArguments

_REFUSED = {
    "model_init": "give model: what its config says of diffusion is settled once",
    "compute_loss_func": "the loss is that of the trainer's objective; subclass the trainer for another",
    "compute_metrics": "no logits are made; evaluation reports nll, ppl and ce_t…, dk.sample gives texts",
    "preprocess_logits_for_metrics": "no logits are made",
}


def check_arguments(trainer: type, model, args, given: dict) -> None:
    """Raise TypeError or ValueError for what `trainer`, a class, cannot take.

    given: the keyword arguments that it passes on to transformers' Trainer.
    """
    if not hasattr(trainer, "objective"):
        raise TypeError("DiffusionTrainer has no objective; use MDLMTrainer, BD3LMTrainer or DreamTrainer")
    if model is None:
        raise ValueError("model is None; give a transformers model (get_model loads one)")
    if not isinstance(args, DiffusionTrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}; expected DiffusionTrainingArguments")
    if any(getattr(module, "copies_embedding", False) for module in model.modules()):
        raise ValueError(
            f"the vocabulary head of this {type(model).__name__} is an 8-bit copy of its embedding, which "
            "training would leave as it is; load the model without weights="
        )
    _refuse_stored_weights(model)
    for name, reason in _REFUSED.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is not supported: {reason}")
    only_for = {
        "annealing_steps": (
            args.annealing_steps,
            trainer.attention == "bidirectional",
            "bidirectional objectives",
        ),
        "ar_weight": (args.ar_weight, "ar_weight" in trainer.options, "BD3LMTrainer"),
        "clean": (args.clean != "block_causal", "clean" in trainer.options, "BD3LMTrainer"),
        "block_size": (args.block_size, trainer.attention == "block_causal", "BD3LMTrainer"),
        "time_per": (args.time_per != type(args).time_per, "time_per" in trainer.options, "BD3LMTrainer"),
        "loss_weight_type": (args.loss_weight_type == "cart", "cart_p" in trainer.options, "DreamTrainer"),
        "cart_p": (
            args.cart_p != type(args).cart_p,
            "cart_p" in trainer.options and args.loss_weight_type in (None, "cart"),
            "DreamTrainer with loss_weight_type='cart'",
        ),
    }
    for name, (value, has_effect, where) in only_for.items():
        if value and not has_effect:
            raise ValueError(
                f"{name} is {getattr(args, name)!r}; it has a meaning for {where}, not for {trainer.__name__}"
            )


def _refuse_stored_weights(model: nn.Module) -> None:
    """Refuse layers that would be trained if their weights were Parameters: all, under adapters those of
    modules_to_save."""
    stored = [name for name, module in model.named_modules() if isinstance(module, StoredLinear)]
    if hasattr(model, "peft_config"):
        stored = [name for name in stored if ".modules_to_save." in name]
    if stored:
        raise ValueError(
            f"weights of this {type(model).__name__} are stored for inference ({stored[0]}, one of "
            f"{len(stored)}), so that training would leave them as they are; load the model without weights="
        )
