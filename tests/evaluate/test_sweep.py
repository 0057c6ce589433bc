"""A sweep measures every combination, goes on where it was interrupted and refuses what is not its own."""

import json
import shutil

import pytest

import dllm_kernels as dk
from dllm_kernels.models.checkpoint import checkpoint_folder
from dllm_train.evaluate import command, sweep, task_manager
from dllm_train.evaluate.lm import DiffusionLM

TASK = "python_arithmetic"
OPTIONS = dict(thresholds=[0.9, None], caches=["none", "block"], block_sizes=[8], limit=2)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(cells, folder) of a sweep of tiny-python."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    return sweep.sweep({"pretrained": "tiny-python"}, TASK, output=folder, **OPTIONS), folder


def test_every_combination_has_a_cell(swept):
    cells, _ = swept
    assert [(c.cache, c.block_size, c.threshold) for c in cells] == [
        ("none", 8, 0.9), ("none", 8, None), ("block", 8, 0.9), ("block", 8, None),
    ]  # fmt: skip
    assert all(cell.exact and 0 <= cell.accuracy <= 1 and cell.tokens_per_second > 0 for cell in cells)
    assert all(cell.tokens_per_forward <= 1 for cell in cells if cell.threshold is None)


def test_table_plot_and_results_tell_the_same(swept):
    cells, folder = swept
    results = json.loads((folder / "results.json").read_text())
    assert [sweep.Cell(**cell) for cell in results["cells"]] == cells
    assert {"machine", "commit", "versions"} <= results["environment"].keys()
    lines = (folder / "table.md").read_text().splitlines()
    assert sum(line.startswith("| block | 8 |") for line in lines) == 3  # two cells and their area
    assert "one token per step" in (folder / "table.md").read_text()
    assert (folder / "plot.svg").read_text().count("<svg") == 1


def test_finished_cells_are_not_run_again(swept, tmp_path, monkeypatch):
    cells, folder = swept
    interrupted = tmp_path / "sweep"
    shutil.copytree(folder, interrupted)
    (interrupted / "cells" / "cache=block,block_size=8,threshold=0.9.json").unlink()
    ran = []
    measured = sweep._measured
    monkeypatch.setattr(sweep, "_measured", lambda *a: ran.append(a[-1]) or measured(*a))
    again = sweep.sweep({"pretrained": "tiny-python"}, TASK, output=interrupted, **OPTIONS)
    assert ran == [{"threshold": 0.9, "cache": "block", "block_size": 8}]
    assert again[:2] == cells[:2] and again[3] == cells[3]


def test_an_interrupted_sweep_keeps_its_cells(tmp_path, monkeypatch):
    measured, ran = sweep._measured, []

    def interrupted(*arguments):
        if ran:
            raise KeyboardInterrupt
        ran.append(measured(*arguments))
        return ran[0]

    monkeypatch.setattr(sweep, "_measured", interrupted)
    line = ["sweep", "--model_args", "pretrained=tiny-python", "--task", TASK, "--limit", "1"]
    with pytest.raises(command.Mistake, match="finished cells are kept") as stopped:
        command.run([*line, "--thresholds", "0.9,none", "--output", str(tmp_path / "sweep")])
    assert stopped.value.code == 130
    assert [path.name for path in (tmp_path / "sweep" / "cells").iterdir()] == [
        "cache=auto,block_size=32,threshold=0.9.json"
    ]


def test_a_folder_of_other_weights_is_refused(swept, tmp_path):
    _, folder = swept
    other = tmp_path / "other"
    shutil.copytree(checkpoint_folder("tiny-python"), other)
    model, tokenizer = dk.load(str(other))
    model.model.norm.weight.data[0] += 1
    dk.save(model, tokenizer, str(other))
    with pytest.raises(ValueError, match=r"holds a sweep with checkpoint_sha256 .* Give another folder"):
        sweep.sweep({"pretrained": str(other)}, TASK, output=folder, **OPTIONS)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(limit=3), "holds a sweep with limit 2; this one has 3"),
        (dict(caches=["dual"]), 'cache="dual" approximates what bidirectional models see'),
        (dict(caches=["none", "none"]), "caches is .* each once"),
        (dict(thresholds=[]), "thresholds is .* at least one value"),
        (dict(block_sizes=[0]), "block_size"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_cell_runs(swept, monkeypatch, changed, message):
    monkeypatch.setattr(sweep, "_measured", lambda *_: pytest.fail("a cell ran"))
    with pytest.raises(ValueError, match=message):
        sweep.sweep({"pretrained": "tiny-python"}, TASK, output=swept[1], **(OPTIONS | changed))


def test_swept_options_are_not_given_twice(tmp_path):
    with pytest.raises(ValueError, match="model_args has threshold, which the sweep sets itself"):
        sweep.sweep({"pretrained": "tiny-python", "threshold": 0.5}, TASK, output=tmp_path, **OPTIONS)


def test_unknown_tasks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "task_manager", lambda **_: task_manager(include_defaults=False))
    with pytest.raises(ValueError, match="task is 'python_arithmetik', which lm-eval does not know"):
        sweep.sweep({"pretrained": "tiny-python"}, "python_arithmetik", output=tmp_path, **OPTIONS)


def test_other_peoples_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no sweep"):
        sweep.sweep({"pretrained": "tiny-python"}, TASK, output=tmp_path, **OPTIONS)


def test_cache_none_is_an_option_of_the_command_line():
    assert DiffusionLM("tiny-python", cache="none").config.cache == "none"


def test_the_command_prints_the_table(tmp_path, capsys):
    command.run(
        ["sweep", "--model_args", "pretrained=tiny-python", "--task", TASK, "--thresholds", "0.9", "--limit",
         "1", "--output", str(tmp_path / "sweep")]
    )  # fmt: skip
    assert "| auto | 32 | 0.9 |" in capsys.readouterr().out
