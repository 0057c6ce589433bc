"""Supervised fine-tuning of a diffusion language model on prompts and replies.

    python -m dllm_train.recipes.finetune --model_name_or_path MODEL --dataset DATA --output_dir FOLDER
    torchrun --nproc-per-node 8 -m dllm_train.recipes.finetune …
    accelerate launch --config_file $(python -m dllm_train.configs fsdp2) -m dllm_train.recipes.finetune …

The options are those of ObjectiveArguments, ModelArguments, DataArguments and DiffusionTrainingArguments,
which extends transformers' TrainingArguments. A YAML or JSON file of them may come first. Prompts are given
and replies are trained. The model is saved to --output_dir, for `dk.load` and for plain transformers.
"""

from dllm_train.recipes.launch import parse, run


def finetune(arguments: list[str]) -> None:
    """Run the recipe; raise ValueError, TypeError, OSError and ImportError for bad input."""
    from transformers import set_seed

    from dllm_train.arguments import (
        DataArguments,
        DiffusionTrainingArguments,
        ModelArguments,
        get_model,
        get_tokenizer,
    )
    from dllm_train.data import load_sft_dataset
    from dllm_train.recipes.training import ObjectiveArguments, make_plan, read_dataset, train

    kinds = (ObjectiveArguments, ModelArguments, DataArguments, DiffusionTrainingArguments)
    chosen, model_args, data_args, training_args = parse(kinds, arguments)
    set_seed(training_args.seed)  # of adapters
    tokenizer = get_tokenizer(model_args)
    model = get_model(model_args)
    plan = make_plan(chosen.objective, model.config, training_args)
    options = ("truncation", "chat", "train_on", "insert_bos", "insert_eos")
    dataset = read_dataset(load_sft_dataset, "sft", options, plan, tokenizer, data_args, training_args)
    train(plan, model, tokenizer, dataset, data_args, training_args)


if __name__ == "__main__":
    run(finetune)
