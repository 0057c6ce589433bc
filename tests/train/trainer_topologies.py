"""The same training on any number of ranks and accumulation steps; run by torchrun for those of two ranks."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import IterableDataset

from tests.process_groups import end_together
from tests.train.trainer_runs import Gradients, examples, losses, trainer

# (batch size of a rank, accumulation steps) for one rank and for two; the global batch is always 8
ONE_RANK = {"8": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
TWO_RANKS = {"4": (4, 1), "2x2": (2, 2)}

# name: (objective, number of examples, options); 13 leave an incomplete window of 5, 9 one of 1
CASES = {
    "mdlm": ("mdlm", 8, {}),
    "mdlm-sequence": ("mdlm", 8, dict(loss_norm_type="sequence")),
    "mdlm-batch": ("mdlm", 9, dict(loss_norm_type="batch", max_steps=2)),
    "mdlm-cosine-uniform": ("mdlm", 8, dict(schedule="cosine", loss_weight_type="uniform")),
    "mdlm-complementary": ("mdlm", 8, dict(complementary=True)),
    "mdlm-annealed": (
        "mdlm", 13, dict(annealing_steps=0.8, annealing_length=12, num_train_epochs=2, max_steps=-1),
    ),
    "mdlm-adam": ("mdlm", 13, dict(num_train_epochs=2, max_steps=-1, max_grad_norm=0.5)),
    "mdlm-by-length": (
        "mdlm", 13, dict(train_sampling_strategy="group_by_length", num_train_epochs=2, max_steps=-1),
    ),
    "bd3lm": ("bd3lm", 8, {}),
    "bd3lm-incomplete": ("bd3lm", 9, dict(num_train_epochs=2, max_steps=-1)),
    "bd3lm-fused": ("bd3lm", 8, dict(fused_layers=True)),
    "bd3lm-causal": ("bd3lm", 8, dict(clean="causal", ar_weight=0.5)),
    "dream": ("dream", 13, dict(num_train_epochs=1, max_steps=-1)),
    "mdlm-stream": ("mdlm", 13, dict(max_steps=4)),
    "mdlm-stream-workers": ("mdlm", 13, dict(max_steps=3, dataloader_num_workers=2)),
    "mdlm-workers": ("mdlm", 13, dict(num_train_epochs=2, max_steps=-1, dataloader_num_workers=2)),
}  # fmt: skip


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def train(folder, case, batch_size, accumulation):
    """Logged losses, meters, gradients of every step, final weights, and an evaluation."""
    objective, count, options = CASES[case]
    rows = examples(count)
    kept = Gradients()
    trained = trainer(
        folder, objective, rows=Stream(rows) if "stream" in case else rows, callbacks=[kept],
        evaluated=examples(5, seed=1), per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation, per_device_eval_batch_size=batch_size, **options,
    )  # fmt: skip
    trained.train()
    evaluation = trained.evaluate()
    timed = ("runtime", "per_second", "preparation_time", "samples")
    model = trained.model
    return {
        "losses": losses(trained),
        "meters": [
            {k: v for k, v in entry.items() if k in ("nll", "ppl") or k.startswith("ce_t")}
            for entry in trained.state.log_history
            if "loss" in entry
        ],
        "gradients": kept.steps,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "evaluation": {k: v for k, v in evaluation.items() if not k.endswith(timed)},
    }


def main(folder):
    results = {}
    for case in CASES:
        for name, (batch_size, accumulation) in TWO_RANKS.items():
            results[case, name] = train(folder / "run", case, batch_size, accumulation)
    assert distributed.get_world_size() == 2
    rank = distributed.get_rank()
    torch.save({"world": distributed.get_world_size(), "results": results}, folder / f"results-{rank}")
    end_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
