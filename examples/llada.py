"""Sample LLaDA: every step on the whole canvas, then with Fast-dLLM's dual cache.

    python examples/llada.py                                       a tiny random model of LLaDA's shape
    python examples/llada.py --model GSAI-ML/LLaDA-8B-Instruct     the real one, on a GPU

The checkpoint is LLaDA's own; no code of it is run.
"""

import argparse
import tempfile

from transformers import LlamaConfig, LlamaForCausalLM

import dllm_kernels as dk

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a folder or hub name; without it a tiny random model")
parser.add_argument("--prompt", default="Write a haiku about the sea.")
parser.add_argument("--new-tokens", type=int, default=32)


def tiny_llada(folder: str) -> str:
    """Write a random checkpoint in LLaDA's own layout; return its folder."""
    _, tokenizer = dk.load("tiny-python", device="cpu")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, diffusion={"attention": ["bidirectional"]},
    )  # fmt: skip
    dk.save(LlamaForCausalLM(config), tokenizer, folder, layout="llada")
    return folder


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = dk.load(options.model or tiny_llada(folder))
    print(f"{type(model).__name__} on {model.device}, {model.num_parameters():,} parameters")
    common = dict(
        tokenizer=tokenizer,
        max_new_tokens=options.new_tokens,
        block_size=32,
        chat=bool(tokenizer.chat_template),
    )
    for name, settings in {
        "one token per step": {},
        "all above 0.9": dict(threshold=0.9),
        "all above 0.9, dual cache": dict(threshold=0.9, cache="dual"),
    }.items():
        output = dk.sample(model, options.prompt, **common, **settings)
        print(f"\n{name}: {output.forwards} forwards, {'exact' if output.exact else 'approximate'}")
        print(output.texts[0])


if __name__ == "__main__":
    main()
