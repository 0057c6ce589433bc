"""What docs/tutorial.md says to run runs, in its order, with a tiny model in place of the hub's."""

import json
import re
import shlex
from pathlib import Path

import lm_eval.tasks
import pytest
from typer.testing import CliRunner

from dllm_kernels.cli import app
from dllm_train.evaluate import command
from tests.train.recipe_runs import write_tokenizer
from tests.train.tiny_models import tiny

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
# The stand-in's tokens are bytes, so that its rows are longer. Later options win.
SMALL = shlex.split("--max_length 128 --max_steps 2 --per_device_train_batch_size 2 --report_to none")


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the reader after the last command, and the result of each `dllm` command."""
    folder = tmp_path_factory.mktemp("tutorial")
    tokenizer = write_tokenizer(folder / "smollm2", None)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny("llama", vocab_size=len(tokenizer), gain=1.0, max_position_embeddings=256, **ids)
    model.save_pretrained(folder / "smollm2")

    class Own(lm_eval.tasks.TaskManager):
        def __init__(self, **options):
            super().__init__(**options, include_defaults=False)

    results, namespace = {}, {"__name__": "tutorial"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(lm_eval.tasks, "TaskManager", Own)
        patch.setattr(command, "setup_logging", lambda: None)
        for language, block in BLOCKS:
            if language == "python":
                exec(block, namespace)
                continue
            for words in commands(block):
                if words[0] == "dllm":
                    results[" ".join(words)] = CliRunner().invoke(app, stand_in(words[1:]))
    return folder, results


def stand_in(words: list[str]) -> list[str]:
    words = [word.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2") for word in words]
    if words[0] == "eval":
        return [*words, "--limit", "2"]
    return [*words, *SMALL] if words[0] == "train" else words


def test_every_command_succeeds(finished):
    _, results = finished
    for words, result in results.items():
        assert result.exit_code == 0, f"{words}: {result.stdout}{result.stderr}"
    assert {words.split()[1] for words in results} == {"info", "sample", "convert", "train", "eval"}


def test_the_reader_gets_what_the_page_promises(finished):
    folder, results = finished
    assert (folder / "run.html").stat().st_size > 0
    assert len((folder / "people.jsonl").read_text().splitlines()) == 640
    tests = [json.loads(line) for line in (folder / "people-test.jsonl").read_text().splitlines()]
    assert len(tests) == 40
    for row in tests:
        person = json.loads(row["response"])
        assert all(str(value) in row["prompt"] for value in person.values())
    assert json.loads((folder / "models/people/eval_results.json").read_text())["eval_nll"] > 0
    config = json.loads((folder / "models/smollm2/config.json").read_text())["diffusion"]
    assert (config["attention"], config["block_size"]) == (["block_causal"], 8)
    for words, result in results.items():
        if words.startswith("dllm eval"):
            assert "exact_match" in result.stdout and "tokens_per_forward" in result.stdout


def test_only_the_installation_runs_other_programs():
    first, *others = [block for language, block in BLOCKS if language == "bash"]
    assert {words[0] for words in commands(first)} == {"python3", ".", "pip", "dllm"}
    assert {words[0] for block in others for words in commands(block)} == {"dllm"}
