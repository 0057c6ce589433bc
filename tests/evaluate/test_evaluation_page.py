"""The commands of docs/evaluation.md run, with known models and local tasks in place of those of the hub."""

import glob
import re
import shlex
import subprocess

import lm_eval.tasks
import pytest
from typer.testing import CliRunner

from dllm_kernels.cli import app
from dllm_train.evaluate import command
from tests.evaluate.known_models import write_unigram
from tests.evaluate.local_tasks import CHANCES, write_tasks
from tests.train.recipe_runs import ROOT, environment, launcher

PAGE = (ROOT / "docs" / "evaluation.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
ALONE = [words[1:] for words in COMMANDS if words[0] == "dllm"]
TOGETHER = [words for words in COMMANDS if words[0] == "accelerate"]
LOCAL = {"GSAI-ML/LLaDA-8B-Instruct": "chat", "GSAI-ML/LLaDA-8B-Base": "base"}
TASKS = {"gsm8k": "numbers", "arc_easy": "choices"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_unigram(folder / "chat", CHANCES, chat=True)
    write_unigram(folder / "base", CHANCES)
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


def local(words: list[str], folder) -> list[str]:
    """A command with local stand-ins, on few documents."""
    words = [TASKS.get(word, word) for word in words]
    for name, stand_in in LOCAL.items():
        words = [word.replace(name, str(folder / stand_in)) for word in words]
    if "--repeat" in words:
        (path,) = glob.glob(words[-1], root_dir=folder)
        return [*words[:-1], path]
    if "--model_args" not in words:
        return words
    words = [word.replace("cache=dual,", "cache=dual,block_size=8,") for word in words]
    return [*words, "--include_path", str(folder / "tasks"), "--limit", "2"]  # the last limit wins


@pytest.fixture(scope="module")
def runs(folder):
    """The result of every command, run in the order of the page."""

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, **options):
            super().__init__(**options, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(lm_eval.tasks, "TaskManager", Few)
        patch.setattr(command, "setup_logging", lambda: None)
        return {" ".join(words): CliRunner().invoke(app, local(words, folder)) for words in ALONE}


@pytest.mark.parametrize("words", ALONE, ids=lambda words: " ".join(words))
def test_commands_run(runs, words):
    result = runs[" ".join(words)]
    assert result.exit_code == 0, result.stderr
    assert "Value" in result.stdout or words[1] == "ls"


def test_the_page_runs_what_its_issue_shows():
    assert ["eval", "--model_args", "pretrained=tiny-python,threshold=0.9", "--tasks",
            "python_arithmetic,python_bits_per_byte"] in ALONE  # fmt: skip


def test_processes_started_together(folder):
    (words,) = TOGETHER
    run = local(words[words.index("-m") :], folder)
    done = subprocess.run(
        [*launcher("cpu"), *run], env=environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("exact_match") == 1, "one process reports"


def test_the_table_is_that_of_the_first_command(runs):
    table = {line.split("|")[5].strip() for line in PAGE.splitlines() if line.startswith("    |")}
    (found,) = [runs[name].stdout for name in runs if "python_bits_per_byte" in name]
    assert all(metric in found for metric in table - {"Metric"})
