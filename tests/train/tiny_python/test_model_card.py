"""The embedded model's files agree with each other."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import dllm_kernels
from dllm_train.recipes.tiny_python.export import model_card, table

FOLDER = Path(dllm_kernels.__file__).parent / "assets" / "tiny-python"


@pytest.fixture(scope="module")
def evaluation():
    return json.loads((FOLDER / "evaluation.json").read_text())


def test_the_model_card_is_made_from_the_evaluation(evaluation):
    assert (FOLDER / "README.md").read_text() == model_card(evaluation)


def test_the_card_names_machine_commit_and_versions(evaluation):
    card = model_card(evaluation)
    environment = evaluation["environment"]
    assert environment["machine"] in card
    assert environment["commit"] in card
    assert all(version in card for version in environment["versions"].values())


def test_every_figure_names_its_attention(evaluation):
    kinds = {"block_causal", "bidirectional"}
    first, second = (part for part in model_card(evaluation).split("\n\n") if part.startswith("| "))
    rows = [line.strip("| ").split(" | ") for line in first.splitlines()[2:]]
    assert len(rows) == 9
    assert [what for what, attention, _ in rows if attention not in kinds] == [
        "`gzip -9` on the same bytes",
        "lines of held-out code that repeat the line before",
    ]
    columns = second.splitlines()[0].strip("| ").split(" | ")[1:]
    assert len(columns) == 4
    assert all(any(kind in column for kind in kinds) for column in columns)


def test_the_card_names_the_share_of_the_student_that_the_last_start_chose(evaluation):
    training = {
        "recipe": "parallel_decoding", "steps": 10, "minutes": 1.0, "settings": {"student_share": 1.0},
        "resumed": [{"step": 10, "settings": {"student_share": 0.75}}],
    }  # fmt: skip
    card = model_card(evaluation | {"training": training})
    assert "the weights are 75% the student's and 25% those from before" in card


def test_the_weights_fit_the_limits(evaluation):
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 16e6
    with safe_open(weights, "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert count == evaluation["model"]["parameters"] <= 8e6


def test_a_table_is_markdown():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
