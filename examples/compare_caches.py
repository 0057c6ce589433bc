"""Compare the caches of a model: forwards, seconds, and how many tokens are those of the exact run.

python examples/compare_caches.py
python examples/compare_caches.py --model GSAI-ML/LLaDA-8B-Instruct --new-tokens 256
"""

import argparse
import time

import dllm_kernels as dk

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-python")
parser.add_argument("--attention", default="bidirectional", help="block_causal or bidirectional")
parser.add_argument("--new-tokens", type=int, default=64)
parser.add_argument("--threshold", type=float, default=0.9)

PROMPTS = ["def read_lines(path):\n", "class Stack:\n    def push(self, item):\n", "import os\n"]
CACHES = {
    "bidirectional": {
        "none": {},
        "prefix": dict(cache="prefix"),
        "dual": dict(cache="dual"),
        "dual, refreshed": dict(cache="dual", refresh_every=4),
    },
    "block_causal": {"none": dict(cache="none"), "block": dict(cache="block")},
}


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    model, tokenizer = dk.load(options.model, attention=options.attention)
    exact = None
    print(f"{'cache':<18}{'forwards':>9}{'seconds':>9}{'as exact':>10}")
    for name, cache in CACHES[options.attention].items():
        start = time.perf_counter()
        output = dk.sample(
            model, PROMPTS, tokenizer=tokenizer, max_new_tokens=options.new_tokens,
            threshold=options.threshold, stop_on_eos=False, **cache,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        exact = output if exact is None else exact
        written = output.unmask_step >= 0
        agreement = (output.sequences == exact.sequences)[written].float().mean().item()
        print(f"{name:<18}{output.forwards:>9}{seconds:>9.2f}{agreement:>10.0%}")


if __name__ == "__main__":
    main()
