"""Evaluation of diffusion language models.

Importing this package registers the lm-eval model `dllm` (class `DiffusionLM`), where lm-eval is installed:

    import lm_eval
    import dllm_train.evaluate

    lm_eval.simple_evaluate(model="dllm", model_args="pretrained=tiny-python", tasks=["python_arithmetic"],
                            task_manager=dllm_train.evaluate.task_manager())

`likelihood` holds the estimators, which need no lm-eval. `dllm eval` is the same on the command line.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_train.evaluate.lm import DiffusionLM as DiffusionLM

__all__ = ["TASKS", "DiffusionLM", "task_manager"]

TASKS = Path(__file__).parent / "tasks"  # the offline tasks

if find_spec("lm_eval") is not None:
    from lm_eval.api.registry import model_registry

    model_registry.register("dllm", target=f"{__name__}.lm:DiffusionLM")


def task_manager(**options):
    """Return lm-eval's TaskManager with the offline tasks of this package beside its own.

    options: those of lm_eval.tasks.TaskManager; include_defaults=False indexes the tasks here alone.
    """
    from lm_eval.tasks import TaskManager

    more = options.pop("include_path", None) or []
    more = more if isinstance(more, list | tuple) else [more]
    return TaskManager(include_path=[TASKS, *more], **options)


def __getattr__(name: str):
    if name != "DiffusionLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dllm_train.evaluate.lm import DiffusionLM

    return DiffusionLM
