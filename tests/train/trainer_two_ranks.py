"""Two ranks together, besides training: resume, stop and share examples. Run by torchrun."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from dllm_train import MDLMTrainer, mdlm_loss
from tests.process_groups import end_together
from tests.train.trainer_runs import examples, losses, trainer

# 13 examples in global batches of 4: four steps an epoch.
OPTIONS = dict(
    per_device_train_batch_size=2, max_steps=9, save_strategy="steps", save_steps=1, logging_steps=3,
    optim="adamw_torch", learning_rate=1e-2,
)  # fmt: skip


def resumed(folder):
    """Return whether runs that continue at steps 4 and 6 end as the whole run, and the losses of that."""
    same = {}
    whole = trainer(folder / "whole", rows=examples(13), **OPTIONS)
    whole.train()
    for step in (4, 6):
        again = trainer(folder / f"from-{step}", rows=examples(13), **OPTIONS)
        again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
        weights = whole.model.state_dict()
        same[step] = losses(again) == losses(whole) and all(
            torch.equal(weight, weights[name]) for name, weight in again.model.state_dict().items()
        )
    return {
        **same,
        "losses": [entry["loss" if "loss" in entry else "train_loss"] for entry in whole.state.log_history],
    }


def stopped(folder):
    """Return the errors of both ranks when the loss of example 5, which one of them has, is NaN."""

    def objective(model, *, example_ids, **options):
        output = mdlm_loss(model, example_ids=example_ids, **options)
        return replace(output, loss=output.loss * (math.nan if 5 in example_ids.tolist() else 1.0))

    class Poisoned(MDLMTrainer):
        pass

    Poisoned.objective = staticmethod(objective)
    from tests.train import trainer_runs

    trainer_runs.TRAINERS["poisoned"] = Poisoned
    run = trainer(
        folder / "stopped",
        "poisoned",
        **{**OPTIONS, "train_sampling_strategy": "sequential", "save_steps": 3},
    )
    try:
        run.train()
    except FloatingPointError as error:
        return str(error)


def peers(folder):
    """Losses and weights of two tensor-parallel peers, which share their examples."""

    class Peers(MDLMTrainer):
        def get_tp_size(self):
            return 2

    from tests.train import trainer_runs

    trainer_runs.TRAINERS["peers"] = Peers
    run = trainer(
        folder / "peers", "peers", per_device_train_batch_size=8, max_steps=2, evaluated=examples(3)
    )
    run.train()
    return losses(run), run.model.state_dict(), run.evaluate()["eval_loss"]


def main(folder):
    results = {"resumed": resumed(folder), "stopped": stopped(folder), "peers": peers(folder)}
    results["world"] = distributed.get_world_size()
    torch.save(results, folder / f"results-{distributed.get_rank()}")
    end_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
