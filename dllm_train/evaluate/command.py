"""`dllm eval`: lm-eval's own command line with the model `dllm` and the offline tasks of this package."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from dllm_kernels.models.checkpoint import load_tokenizer
from dllm_train.evaluate import TASKS, record
from dllm_train.evaluate.modes import is_instruct
from dllm_train.evaluate.options import model_options
from dllm_train.process_group import end_process

log = logging.getLogger("lm_eval.dllm")

HELP = """usage: dllm eval --model_args pretrained=…,cache=…,threshold=… --tasks … [options of lm-eval]
       dllm eval --repeat record.json [options]
       dllm eval sweep --help
       dllm eval sweep --model_args … --task … --thresholds … --caches … --block_sizes … --output DIR
       dllm eval ls tasks

--model_args takes pretrained, every option of dk.SampleConfig and of the likelihood estimators, dtype,
device, attention, max_length, add_bos_token, truncate and instruct. Instruct checkpoints get their chat
template; --apply_chat_template none leaves it out. --repeat runs what a record of an earlier run says again,
and refuses other weights. With --output_path the results get a run record beside them. All other options are
those of lm-eval:
"""
_MISTAKES = (ValueError, TypeError, OSError, ImportError, KeyError, AssertionError, FloatingPointError)


class Mistake(Exception):
    """A user error, described in one line. code: the exit status."""

    def __init__(self, line: str, code: int = 2):
        super().__init__(line)
        self.code = code


def run(arguments: list[str]) -> None:
    """Evaluate as the command line says; raise Mistake for bad input and for an interrupted run."""
    setup_logging()
    use_cache = None
    try:
        if arguments[:1] == ["sweep"]:
            _sweep(arguments[1:])
            return
        arguments, earlier = _repeated(arguments)
        if arguments in ([], ["--help"], ["-h"]):
            print(HELP)
        namespace = _parsed(arguments)
        if namespace.command != "run":
            namespace.include_path = _with_ours(namespace.include_path)
            _execute(namespace)
            return
        _complete(namespace)
        use_cache = namespace.use_cache
        if earlier is not None:
            record.refuse_other_weights(earlier, _pretrained(namespace))
            record.refuse_other_options(earlier, namespace.config)
        with _observed() as observed:
            _execute(namespace)
        if observed.results is not None:
            _report(observed, arguments, namespace.config, earlier)
        end_process()
    except KeyboardInterrupt:
        kept = f"finished answers are kept in {use_cache}, and the same command goes on" if use_cache else (
            "nothing is kept; with --use_cache PATH finished answers are"
        )  # fmt: skip
        raise Mistake(f"interrupted: {kept}", 130) from None
    except _MISTAKES as error:
        if os.environ.get("DLLM_DEBUG") == "1":
            raise
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise Mistake(" ".join(str(said).split()) or type(error).__name__) from error


def _sweep(arguments: list[str]) -> None:
    from dllm_train.evaluate import sweep_command

    try:
        sweep_command.run(arguments)
    except KeyboardInterrupt:
        raise Mistake("interrupted: finished cells are kept, and the same command goes on", 130) from None


class _Observed:
    """Results of a run. results: lm-eval's, None in all processes but one. tracker: saves them."""

    results: dict | None = None
    tracker = None
    kwargs: dict


@contextlib.contextmanager
def _observed() -> Iterator[_Observed]:
    """Put the measures beside the scores of a run of lm-eval's command line, and keep its results."""
    evaluate, observed = lm_eval.simple_evaluate, _Observed()

    def simple_evaluate(**kwargs):
        results = evaluate(**kwargs)
        observed.results, observed.tracker, observed.kwargs = results, kwargs["evaluation_tracker"], kwargs
        if results is not None:
            for task, measures in results["config"]["dllm"]["measures"].items():
                scores = results["results"].setdefault(task, {})
                scores |= {f"{name},dllm": value for name, value in measures.items()}
        return results

    lm_eval.simple_evaluate = simple_evaluate
    try:
        yield observed
    finally:
        del lm_eval.simple_evaluate  # lm_eval finds its own again by its __getattr__


def _parsed(arguments: list[str]):
    """Return lm-eval's namespace of a command line; raise ValueError with the reason, without the usage."""
    if not arguments or arguments[0] not in ("run", "ls", "validate"):
        arguments = ["run", *arguments]
    given, sys.argv = sys.argv, ["dllm eval", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return HarnessCLI().parse_args()
    except SystemExit as end:
        if end.code in (0, None):
            raise
        reason = said.getvalue().strip().split("error: ")[-1]
        raise ValueError(f"{reason}; dllm eval --help lists the options") from None
    finally:
        sys.argv = given


def _execute(namespace) -> None:
    HarnessCLI().execute(namespace)


def _complete(namespace) -> None:
    """Fill in the choices of `dllm eval`: model, folder of its tasks, device and chat template."""
    file = EvaluatorConfig.load_yaml_config(namespace.config) if namespace.config else {}
    for model in (namespace.model, file.get("model")):
        if model not in (None, "dllm"):
            raise ValueError(f"--model is {model}; dllm eval runs the model dllm, and lm-eval the others")
    namespace.model = "dllm"
    namespace.model_args = {**_as_dict(file.get("model_args")), **(namespace.model_args or {})}
    namespace.include_path = _with_ours(namespace.include_path or file.get("include_path"))
    namespace.device = namespace.device or file.get("device") or _device()
    if not hasattr(namespace, "batch_size") and "batch_size" not in file:
        namespace.batch_size = namespace.model_args.pop("batch_size", "auto")
    namespace.device = namespace.model_args.pop("device", namespace.device)
    model_options(namespace.model_args)
    _choose_template(namespace, file)


def _choose_template(namespace, file: dict) -> None:
    """Apply the chat template of instruct checkpoints, unless the command line or its file says how."""
    given = getattr(namespace, "apply_chat_template", file.get("apply_chat_template"))
    if isinstance(given, str) and given.lower() in ("none", "false"):
        namespace.apply_chat_template = False
        return
    if given is not None or "pretrained" not in namespace.model_args:
        return
    name = str(namespace.model_args["pretrained"])
    tokenizer = load_tokenizer(namespace.model_args.get("tokenizer", name))
    instruct, reason = is_instruct(name, tokenizer)
    if not namespace.model_args.get("instruct", instruct):
        return
    if getattr(tokenizer, "chat_template", None):
        log.info("%s is an instruct checkpoint (%s): its chat template is applied", name, reason)
        namespace.apply_chat_template = True
    else:
        log.warning("%s is an instruct checkpoint (%s) without a chat template", name, reason)


def _report(observed: _Observed, arguments: list[str], config_file: str | None, earlier: dict | None) -> None:
    """Write the record beside the results; say whether a repeated run gave the same."""
    made = record.make(observed.results, observed.kwargs, arguments, config_file)
    tracker = observed.tracker
    if tracker.output_path and hasattr(tracker, "date_id"):
        path = Path(tracker.output_path)
        if path.suffix == ".json":
            path = path.with_name(f"{path.stem}_{tracker.date_id}.record.json")
        else:
            path = (
                path / tracker.general_config_tracker.model_name_sanitized / f"record_{tracker.date_id}.json"
            )
        record.write(path, made)
        print(f"record: {path}")
    else:
        log.info("results and their run record are kept with --output_path DIR")
    if earlier is not None:
        differing = record.differences(earlier, made)
        print("\n".join(differing) if differing else "repeated: every score is that of the record")


def _repeated(arguments: list[str]) -> tuple[list[str], dict | None]:
    """Return the arguments of the run that `--repeat` names before the others, and its record."""
    places = [i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--repeat"]
    if not places:
        return arguments, None
    first, *more = places
    path, rest = arguments[first].partition("=")[2], arguments[first + 1 :]
    if "=" not in arguments[first]:
        path, rest = (rest[0], rest[1:]) if rest else ("", rest)
    if not path or more:
        raise ValueError("--repeat takes one record of an earlier run")
    earlier = record.read(Path(path))
    return [*earlier["arguments"], *arguments[:first], *rest], earlier


def _with_ours(path: str | None) -> list[str]:
    return [str(TASKS), *([path] if path else [])]


def _pretrained(namespace) -> str:
    return str(namespace.model_args.get("pretrained", ""))


def _as_dict(given) -> dict:
    if isinstance(given, str):
        from lm_eval.utils import simple_parse_args_string

        return simple_parse_args_string(given)
    return dict(given or {})


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
