"""Complete many prompts of unequal length in one call: rows join and leave the batch as they finish.

python examples/batch.py
python examples/batch.py --model MODEL --prompts prompts.txt --rows 16    one prompt on each line
"""

import argparse
import json
import time
from pathlib import Path

import dllm_kernels as dk

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-python")
parser.add_argument("--prompts", type=Path, help="a text file; without it additions and a few lines of code")
parser.add_argument("--rows", type=int, default=4, help="rows in flight; the other prompts wait")
parser.add_argument("--new-tokens", type=int, default=16)

PROMPTS = [
    "assert 37 + 85 ==",
    "assert 64 + 19 ==",
    "import os\nimport",
    "class Stack:\n    def push(self, item):\n        self.items.",
    "for index, line in",
    "assert 12 + 30 ==",
]


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS
    model, tokenizer = dk.load(options.model)
    start = time.perf_counter()
    output = dk.sample(
        model,
        prompts,
        tokenizer=tokenizer,
        max_new_tokens=options.new_tokens,
        threshold=0.9,
        max_batch=options.rows,
    )
    seconds = time.perf_counter() - start
    rows = zip(prompts, output.texts, output.lengths.tolist(), output.row_forwards.tolist(), strict=True)
    for prompt, text, tokens, forwards in rows:
        print(json.dumps(dict(prompt=prompt, completion=text, tokens=tokens, forwards=forwards)))
    tokens = int(output.lengths.sum())
    print(f"{tokens} tokens in {seconds:.1f} s, {output.forwards} forwards for {len(prompts)} rows")


if __name__ == "__main__":
    main()
