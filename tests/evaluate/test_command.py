"""`dllm eval`: lm-eval's command line with our model and tasks, run records, and errors of one line."""

import json
import sys
from pathlib import Path

import lm_eval
import lm_eval.tasks
import pytest
from lm_eval import evaluator
from typer.testing import CliRunner

import dllm_train.evaluate
from dllm_kernels.cli import app
from dllm_train.evaluate import command, lm, record
from tests.evaluate.known_models import write_unigram
from tests.evaluate.local_tasks import CHANCES, write_tasks

FAILED = "dllm: "


def run(*arguments: str):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, an instruct checkpoint, and tasks."""
    folder = tmp_path_factory.mktemp("command")
    write_unigram(folder / "unigram", CHANCES)
    write_unigram(folder / "unigram-chat", CHANCES, chat=True)
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(autouse=True, scope="module")
def few_tasks():
    """Index few tasks: the thousands of lm-eval take seconds to find."""

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, **options):
            super().__init__(**options, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", Few)
        patch.setattr(command, "setup_logging", lambda: None)  # its handler would keep a stream of one test
        yield


def arguments_of(folder, tasks="numbers,texts", model="unigram", **more) -> list[str]:
    given = dict(include_path=folder / "tasks", tasks=tasks) | more
    model_args = f"pretrained={folder / model},estimator=ar_ftb"
    return [
        "--model_args",
        model_args,
        *(part for name, value in given.items() for part in (f"--{name}", value)),
    ]


@pytest.fixture(scope="module")
def output(folder, few_tasks):
    result = run(*arguments_of(folder, output_path=folder / "out"), "--log_samples")
    assert result.exit_code == 0, result.stderr
    return result


def saved(folder, kind: str) -> Path:
    """The file of the first run."""
    return min((folder / "out").glob(f"*/{kind}_*.json*"))


def test_scores_and_what_was_measured_are_one_table(output):
    rows = [[cell.strip() for cell in line.split("|")] for line in output.stdout.splitlines()]
    values = {row[5]: row[7] for row in rows if len(row) > 8}
    assert values["exact_match"] == "0.5000" and values["at_length_limit"] == "1.0000"
    assert values["empty_answers"] == "0.0000" and values["tokens_per_forward"] == "1.0000"
    assert "bits_per_byte" in values


def test_results_and_samples_are_saved_by_lm_eval(output, folder):
    results = json.loads(saved(folder, "results").read_text())
    assert results["results"]["numbers"]["exact_match,number"] == 0.5
    assert results["results"]["numbers"]["at_length_limit,dllm"] == 1.0
    assert len(saved(folder, "samples_numbers").read_text().splitlines()) == 4


def test_the_record_holds_what_the_result_depends_on(output, folder):
    found = json.loads(saved(folder, "record").read_text())
    assert found["checkpoint"]["sha256"] == record.checkpoint_hash(str(folder / "unigram"), None)
    assert found["checkpoint"]["attention"] == "bidirectional"
    assert len(found["tokenizer"]["sha256"]) == 64
    assert found["chat_template"] == {"applied": False, "sha256": None}
    assert found["sampling"]["block_size"] == 8 and found["estimation"] == {"estimator": "ar_ftb"}
    assert found["tasks"]["numbers"]["version"] == 3 and found["tasks"]["numbers"]["documents"] == 4
    assert found["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert {"python", "torch", "transformers", "lm_eval"} <= {*found["environment"]["versions"]}
    assert {"machine", "cores", "commit", "threads"} <= {*found["environment"]}
    assert found["requests"] == {"generate_until": 4, "loglikelihood_rolling": 4}
    assert found["warm_up"] and found["tasks"]["numbers"]["repeats"] == 1


def test_a_record_is_repeated(output, folder):
    again = run("--repeat", saved(folder, "record"))
    assert again.exit_code == 0, again.stderr
    assert again.stdout.endswith("repeated: every score is that of the record\n")


def test_a_repeated_run_that_differs_says_where(output, folder, tmp_path):
    changed = json.loads(saved(folder, "record").read_text())
    changed["results"]["numbers"]["exact_match,number"] = 0.75
    changed["environment"]["versions"]["torch"] = "1.0"
    record.write(tmp_path / "changed.json", changed)
    again = run("--repeat", tmp_path / "changed.json")
    assert "numbers exact_match: 0.75 in the record, 0.5 now\ntorch: 1.0 in the record" in again.stdout


def test_other_weights_are_refused(output, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_execute", lambda namespace: pytest.fail("something ran"))
    write_unigram(tmp_path, {"a": 0.5})
    result = run("--repeat", saved(folder, "record"), "--model_args", f"pretrained={tmp_path}")
    assert result.exit_code == 2
    assert f"the record is of {folder / 'unigram'} with weights sha256" in result.stderr
    assert "nothing was run" in result.stderr


def test_an_instruct_checkpoint_gets_its_template_and_the_order_of_its_sampler(folder):
    applied = run(*arguments_of(folder, "numbers", "unigram-chat", output_path=folder / "chat"))
    assert applied.exit_code == 0, applied.stderr
    (path,) = (folder / "chat").glob("*/record_*.json")
    found = json.loads(path.read_text())
    assert found["chat_template"]["applied"] and found["chat_template"]["sha256"]
    arguments = arguments_of(folder, "numbers", "unigram-chat", output_path=folder / "plain")
    assert run(*arguments, "--apply_chat_template", "none").exit_code == 0
    (path,) = (folder / "plain").glob("*/record_*.json")
    assert not json.loads(path.read_text())["chat_template"]["applied"]


def test_the_offline_tasks_need_no_path():
    result = run(
        "--model_args", "pretrained=tiny-python,threshold=0.9", "--tasks", "python_arithmetic", "--limit", 5
    )
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "exact_match" in line]
    assert float(line.split("|")[7]) == 1.0


def test_options_may_come_from_a_file(folder, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_args: pretrained={folder / 'unigram'},estimator=ar_ftb\n"
        f"tasks: [numbers]\ninclude_path: {folder / 'tasks'}\n"
    )
    result = run("--config", file)
    assert result.exit_code == 0, result.stderr
    assert "exact_match" in result.stdout
    kept = ["--output_path", tmp_path / "out"]
    assert run("--config", file, *kept).exit_code == 0
    (path,) = (tmp_path / "out").glob("*/record_*.json")
    assert run("--repeat", path).exit_code == 0
    file.write_text(file.read_text() + "limit: 1\n")
    assert "run.yaml, which has changed since the record; nothing was run" in run("--repeat", path).stderr
    file.write_text("model: hf\n")
    assert "--model is hf; dllm eval runs the model dllm" in run("--config", file).stderr


def test_tasks_are_listed(folder):
    listed = run("ls", "subtasks")
    assert listed.exit_code == 0, listed.stderr
    assert "python_infill" in listed.stdout


MISTAKES = {
    "an unknown task": (["--tasks", "nothing"], "Tasks not found: nothing"),
    "an unknown option": (["--taks", "numbers"], "unrecognized arguments: --taks"),
    "an unknown model option": (["--model_args", "treshold=0.9"], "did you mean threshold"),
    "an unknown sampling option": (["--gen_kwargs", "treshold=0.9"], "did you mean threshold"),
    "options that contradict": (["--model_args", "threshold=0.9,factor=1"], "contradicts"),
    "another model": (["--model", "hf"], "--model is hf; dllm eval runs the model dllm"),
    "a checkpoint that is not there": (["--model_args", "pretrained=no-such"], "no-such"),
    "an answer longer than the model": (
        ["--gen_kwargs", "max_gen_toks=300"],
        "task numbers, document 0: the context has 4 tokens and max_gen_toks 300, more than the 256 ",
    ),
    "a record that is not there": (["--repeat", "no-such.json"], "no-such.json"),
    "no record": (["--repeat"], "--repeat takes one record"),
    "samples without a place": (["--log_samples"], "--output_path"),
    "no template": (["--apply_chat_template"], "has no chat template; leave out --apply_chat_template"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(folder, name):
    more, reason = MISTAKES[name]
    result = run(*arguments_of(folder, "numbers"), *more)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith(FAILED)]
    assert len(errors) == 1 and reason in errors[0]
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_record(folder, tmp_path):
    file = tmp_path / "other.json"
    for text, reason in (("{}", "is not a run record of dllm eval"), ("{", "is not a run record")):
        file.write_text(text)
        assert reason in run("--repeat", file).stderr


def test_an_interrupted_run_says_what_is_kept(folder, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "generate", interrupted)
    result = run(*arguments_of(folder, "numbers"))
    assert result.exit_code == 130 and "interrupted: nothing is kept; with --use_cache PATH" in result.stderr
    kept = tmp_path / "kept"
    result = run(*arguments_of(folder, "numbers", use_cache=kept))
    assert result.exit_code == 130
    assert f"interrupted: finished answers are kept in {kept}, and the same command goes on" in result.stderr


def test_help_names_both_kinds_of_options():
    result = run("--help")
    assert result.exit_code == 0
    assert "--repeat record.json" in result.stdout and "--num_fewshot" in result.stdout


def test_a_missing_lm_eval_names_the_extras(monkeypatch):
    monkeypatch.delitem(sys.modules, "dllm_train.evaluate.command")
    monkeypatch.delattr(dllm_train.evaluate, "command")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("--tasks", "numbers")
    assert result.exit_code == 2 and 'pip install "dllm-kernels[eval]"' in result.stderr


def test_the_table_of_lm_eval_is_itself_again(folder):
    with command._observed():
        assert lm_eval.simple_evaluate is not evaluator.simple_evaluate
    assert lm_eval.simple_evaluate is evaluator.simple_evaluate
