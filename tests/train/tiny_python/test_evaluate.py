"""The counts of the evaluation."""

import pytest
import torch

from dllm_train.recipes.tiny_python.data import Document
from dllm_train.recipes.tiny_python.evaluate import Bench, held_out_repeated_lines, measured, repeated_lines
from dllm_train.recipes.tiny_python.export import export
from dllm_train.recipes.tiny_python.model import build_model
from dllm_train.recipes.tiny_python.run import prepare_tokenizer
from dllm_train.recipes.tiny_python.settings import BLOCK_SIZE, Settings


@pytest.mark.parametrize(
    ("before", "text", "counts"),
    [
        ("", "a\nb\na\n", (0, 3)),
        ("", "a\na\na\n", (2, 3)),
        ("a\n", "a\nb\n", (1, 2)),  # the line before the first is the prompt's last
        ("a\n\n", "\na\n", (1, 1)),  # lines without text do not count
        ("", "a\n a\n", (0, 2)),  # the indentation is part of a line
        ("a\n", "a", (0, 0)),  # nor does a line that was cut off
        ("", "", (0, 0)),
    ],
)
def test_lines_that_repeat_the_line_before_are_counted(before, text, counts):
    assert repeated_lines(before, text) == counts


def test_the_share_of_documents_is_over_all_their_lines():
    documents = [Document("a.py", "x\nx\n"), Document("b.py", "x\ny\n")]
    assert held_out_repeated_lines(documents) == 0.25


def test_processes_change_no_figure(source_folder, tmp_path):
    settings = Settings(
        vocab_size=300, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=24,
        sources=str(source_folder),
    )  # fmt: skip
    tokenizer = prepare_tokenizer(settings, tmp_path / "run")
    torch.manual_seed(0)
    export(build_model(settings, tokenizer), tokenizer, tmp_path / "model", BLOCK_SIZE)
    bench = Bench(tmp_path / "model", str(source_folder), 2, 2, 3, 2)
    tasks = [("bound",), ("completion", 0.9), ("infill", "bidirectional", None)]
    assert measured(bench, tasks, 1) == measured(bench, tasks, 2)
