"""Rewrite lines of a file from what stands before and after them, and show the change as a diff.

    python examples/infill_file.py                                    a line of a small program
    python examples/infill_file.py FILE --lines 10-12 --tokens 24     lines of a file

The file is not written; `dllm edit` can do that.
"""

import argparse
import difflib
from pathlib import Path

import dllm_kernels as dk

parser = argparse.ArgumentParser()
parser.add_argument("file", nargs="?", type=Path)
parser.add_argument("--lines", default="3", help="N or N-M, from 1")
parser.add_argument("--tokens", type=int, default=5, help="length of the gap")
parser.add_argument("--model", default="tiny-python")

PROGRAM = """\
class Stack:
    def __init__(self):
        pass

    def push(self, item):
        self.items.append(item)
"""


def main(arguments: list[str] | None = None) -> None:
    options = parser.parse_args(arguments)
    text = options.file.read_text() if options.file else PROGRAM
    first, _, last = options.lines.partition("-")
    before, after = int(first) - 1, int(last or first)
    lines = text.splitlines(keepends=True)
    indent = lines[before][: len(lines[before]) - len(lines[before].lstrip())]
    gapped = "".join(lines[:before]) + f"{indent}<mask:{options.tokens}>\n" + "".join(lines[after:])

    model, tokenizer = dk.load(options.model, attention="bidirectional")
    output = dk.infill(model, gapped, tokenizer=tokenizer, threshold=0.9)
    name = str(options.file or "program.py")
    changed = output.texts[0].splitlines(keepends=True)
    print("".join(difflib.unified_diff(lines, changed, name, f"{name} (infilled)")), end="")
    print(f"{int(output.lengths[0])} tokens in {output.forwards} forwards")


if __name__ == "__main__":
    main()
