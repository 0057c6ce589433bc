"""Train a masked diffusion model from random weights with MDLMTrainer, and fill a gap with it.

    python examples/train_mdlm.py
    torchrun --nproc-per-node 2 examples/train_mdlm.py --steps 400

`dllm train pretrain` does this for data of any size.
"""

import argparse
import random
import tempfile
from itertools import product

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import dllm_kernels as dk
from dllm_train import DiffusionTrainingArguments, MDLMTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--output", help="folder for the trained checkpoint")

NAMES = ("read", "write", "open", "close", "copy", "find")
ARGUMENTS = ("name", "value", "path", "key", "data", "text")
TYPES = ("int", "str", "list", "dict", "set", "object")
LINES = [
    f"def {name}({argument}: {kind}) -> {kind}:\n"
    for name, argument, kind in product(NAMES, ARGUMENTS, TYPES)
]


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    _, tokenizer = dk.load("tiny-python", device="cpu")  # for its tokenizer
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id, diffusion={"attention": ["bidirectional"]},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    rows = [{"input_ids": ids} for ids in tokenizer(random.Random(0).sample(LINES, len(LINES)))["input_ids"]]
    held_out, train = rows[:40], rows[40:]

    with tempfile.TemporaryDirectory() as folder:
        settings = DiffusionTrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=32, learning_rate=3e-3,
            logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True, eval_noise_levels=[],
        )  # fmt: skip
        trainer = MDLMTrainer(model=model, args=settings, train_dataset=train, processing_class=tokenizer)
        before = trainer.evaluate(held_out)["eval_nll"]
        trainer.train()
        after = trainer.evaluate(held_out)["eval_nll"]
    print(f"bound on held-out text: {before:.2f} -> {after:.2f} nats per token")

    model.eval()
    gap = "def find(path: dict) -><mask:1>:\n"
    print(dk.infill(model, gap, tokenizer=tokenizer).texts[0], end="")
    if options.output:
        dk.save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
