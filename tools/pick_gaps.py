"""Choose what the demo hides of its file: as much as the embedded model can write back exactly.

python tools/pick_gaps.py    prints the text of dllm_kernels/demo.py with new ⟦ ⟧

Each token that the model tells from all others with the probability CERTAIN is hidden, except white space, so
that lines stay where they are. While the model, decoding them all together, writes something else, the first
wrong ones are shown again.
"""

import sys
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import dllm_kernels as dk
from dllm_kernels import demo

CERTAIN = 0.6


@torch.no_grad()
def pick(model, ids: list[int], kept: set[int]) -> set[int]:
    """Return the positions to hide, none of `kept`."""
    mask_id, count = model.config.mask_token_id, len(ids)
    canvases = torch.tensor(ids).repeat(count, 1)
    canvases.fill_diagonal_(mask_id)
    seen = torch.ones(1, 1, count, count, dtype=torch.bool)
    hidden = {
        at
        for at, canvas in enumerate(canvases)
        if at not in kept
        and model(canvas[None], attention_mask=seen).logits[0, at].softmax(-1)[ids[at]] >= CERTAIN
    }
    while wrong := wrong_steps(model, ids, hidden):
        hidden -= {at for at, step in wrong.items() if step == min(wrong.values())}
    return hidden


def wrong_steps(model, ids: list[int], hidden: set[int]) -> dict[int, int]:
    """Return where the demo's rule, or else one token per step, writes another token, and the step."""
    canvas = [model.config.mask_token_id if at in hidden else token for at, token in enumerate(ids)]
    for rule in ({"threshold": demo.THRESHOLD}, {}):
        output = dk.infill(model, [canvas], block_size=len(ids), **rule)
        tokens, steps = output.sequences[0].tolist(), output.unmask_step[0].tolist()
        if wrong := {at: steps[at] for at in hidden if tokens[at] != ids[at]}:
            return wrong
    return {}


def main() -> None:
    model, tokenizer = dk.load("tiny-python", attention="bidirectional")
    ids = tokenizer(demo.HIDDEN.sub("", demo.FILE))["input_ids"]
    hidden = pick(model, ids, {at for at, token in enumerate(ids) if not tokenizer.decode([token]).strip()})
    for is_hidden, run in groupby(range(len(ids)), hidden.__contains__):
        text = tokenizer.decode([ids[at] for at in run])
        print(f"⟦{text}⟧" if is_hidden else text, end="")


if __name__ == "__main__":
    main()
