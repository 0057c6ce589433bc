"""Choose what the demo hides of its file: as much as the embedded model can write back exactly.

python tools/pick_gaps.py    prints the text of dllm_kernels/demo.py with new ⟦ ⟧

Each token that the model tells from all others with the probability CERTAIN is hidden. While the model,
decoding them all together, writes something else, the first wrong ones are shown again.
"""

import sys
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import dllm_kernels as dk
from dllm_kernels import demo

CERTAIN = 0.9


@torch.no_grad()
def pick(model, ids: list[int]) -> set[int]:
    """Return the positions to hide."""
    mask_id, count = model.config.mask_token_id, len(ids)
    canvases = torch.tensor(ids).repeat(count, 1)
    canvases.fill_diagonal_(mask_id)
    seen = torch.ones(1, 1, count, count, dtype=torch.bool)
    hidden = {
        at
        for at, canvas in enumerate(canvases)
        if model(canvas[None], attention_mask=seen).logits[0, at].softmax(-1)[ids[at]] >= CERTAIN
    }
    while True:
        canvas = [mask_id if at in hidden else token for at, token in enumerate(ids)]
        output = dk.infill(model, [canvas], block_size=count, threshold=demo.THRESHOLD)
        steps = {
            at: int(output.unmask_step[0, at]) for at in hidden if int(output.sequences[0, at]) != ids[at]
        }
        if not steps:
            return hidden
        hidden -= {at for at, step in steps.items() if step == min(steps.values())}


def main() -> None:
    model, tokenizer = dk.load("tiny-python", attention="bidirectional")
    ids = tokenizer(demo.HIDDEN.sub("", demo.FILE))["input_ids"]
    hidden = pick(model, ids)
    for is_hidden, run in groupby(range(len(ids)), hidden.__contains__):
        text = tokenizer.decode([ids[at] for at in run])
        print(f"⟦{text}⟧" if is_hidden else text, end="")


if __name__ == "__main__":
    main()
