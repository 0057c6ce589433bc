"""Pretraining of a diffusion language model on documents: continued, or from random weights.

    torchrun --nproc-per-node 8 -m dllm_train.recipes.pretrain --model_name_or_path MODEL --dataset DATA \\
        --packing True --output_dir FOLDER

Options and results are as in finetune. Documents become rows of --max_length tokens; with --packing no
document sees another. --from_scratch True takes only the shape of the model, from its config.json.
"""

from dataclasses import dataclass, field

from dllm_train.recipes.launch import parse, run


@dataclass
class PretrainArguments:
    """The source of the weights."""

    from_scratch: bool = field(
        default=False,
        metadata={"help": "Start from random weights in the shape of config.json, and read no weights."},
    )


def pretrain(arguments: list[str]) -> None:
    """Run the recipe; raise ValueError, TypeError, OSError and ImportError for bad input."""
    from transformers import set_seed

    from dllm_train.arguments import (
        DataArguments,
        DiffusionTrainingArguments,
        ModelArguments,
        get_model,
        get_tokenizer,
    )
    from dllm_train.data import load_pretraining_dataset
    from dllm_train.recipes.training import ObjectiveArguments, make_plan, read_dataset, train

    kinds = (ObjectiveArguments, PretrainArguments, ModelArguments, DataArguments, DiffusionTrainingArguments)
    chosen, start, model_args, data_args, training_args = parse(kinds, arguments)
    set_seed(training_args.seed)  # of new weights and adapters
    tokenizer = get_tokenizer(model_args)
    model = random_model(model_args) if start.from_scratch else get_model(model_args)
    plan = make_plan(chosen.objective, model.config, training_args)
    options = ("text_field", "packing", "drop_tail", "insert_bos", "insert_eos")
    load = load_pretraining_dataset
    dataset = read_dataset(load, "pretraining", options, plan, tokenizer, data_args, training_args)
    train(plan, model, tokenizer, dataset, data_args, training_args)


def random_model(model_args):
    """Return a model in the shape of model_name_or_path/config.json, with weights drawn by torch."""
    import torch

    from dllm_kernels.models.attention import see_as_trained
    from dllm_kernels.models.checkpoint import checkpoint_folder
    from dllm_kernels.models.checkpoint_files import read_json
    from dllm_kernels.models.config_json import read_config
    from dllm_kernels.models.empty_models import model_class, whole_weights
    from dllm_kernels.models.families import family_of

    if model_args.lora:
        raise ValueError("from_scratch is True, and so is lora; adapters need a trained model")
    entries = read_json(checkpoint_folder(model_args.model_name_or_path) / "config.json")
    family = family_of(entries.get("model_type"), entries.get("architectures"))
    config, _ = read_config(entries, family)
    kind = model_class(config, family.masked_lm, entries.get("architectures"))
    with whole_weights():
        model = kind.from_config(config, dtype=getattr(torch, model_args.dtype))
    model.set_attn_implementation(model_args.attn_implementation)
    see_as_trained(model)
    return model


if __name__ == "__main__":
    run(pretrain)
