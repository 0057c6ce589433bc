"""An evaluation that two processes share, started by torchrun: CHECKPOINT TASKS OUTPUT USE_CACHE."""

import json
import sys
from pathlib import Path

import lm_eval

from dllm_train.evaluate import DiffusionLM
from tests.evaluate.local_tasks import TASKS, manager
from tests.process_groups import end_together


def main(checkpoint, tasks, output, use_cache):
    lm = DiffusionLM(checkpoint, device="cpu", estimator="ar_ftb", batch_size=3)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[*TASKS], task_manager=manager(Path(tasks)), bootstrap_iters=0, log_samples=True,
        use_cache=use_cache,
    )  # fmt: skip
    seen = lm.gather_object((lm.rank, lm.world_size))
    if lm.rank == 0:
        answers = {
            task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
            for task, samples in results["samples"].items()
        }
        facts = dict(scores=results["results"], answers=answers, processes=seen)
        facts |= {name: results["config"]["dllm"][name] for name in ("measures", "requests")}
        Path(output).write_text(json.dumps(facts))
    else:
        assert results is None


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_together()
