"""The scripts of examples/ run, small, and what they print is what they promise."""

import json
import re
import runpy
from pathlib import Path

import pytest

import dllm_kernels as dk

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a script with arguments in an empty folder; return the lines of its standard output."""
    monkeypatch.chdir(tmp_path)

    def main(name: str, *arguments: str) -> list[str]:
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([*arguments])
        return capsys.readouterr().out.splitlines()

    return main


def test_every_script_has_a_test_and_a_row_on_the_page():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} <= set(
        re.findall(r"examples/([\w.]+)", page)
    )


def test_llada_samples_a_checkpoint_in_its_own_layout_exactly_and_with_a_cache(run):
    lines = run("llada", "--new-tokens", "8")
    assert lines[0].startswith("LlamaForCausalLM on ")
    assert "one token per step: 8 forwards, exact" in lines
    assert re.search(r"all above 0\.9, dual cache: \d+ forwards, approximate", "\n".join(lines))


def test_batch_completes_every_prompt_in_order(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("assert 37 + 85 ==\nimport\nfor index, line in\n")
    *rows, last = run("batch", "--prompts", "prompts.txt", "--rows", "2", "--new-tokens", "5")
    rows = [json.loads(row) for row in rows]
    assert [row["prompt"] for row in rows] == ["assert 37 + 85 ==", "import", "for index, line in"]
    assert rows[0]["completion"].startswith(" 122")
    assert all(row["forwards"] >= 1 and 1 <= row["tokens"] <= 5 for row in rows)
    assert last.endswith("forwards for 3 rows")


def test_infill_file_changes_the_line_and_no_other(run, tmp_path):
    program = "import os\n\n\ndef name():\n    x = 1\n    return x\n"
    (tmp_path / "program.py").write_text(program)
    *diff, last = run("infill_file", "program.py", "--lines", "5", "--tokens", "3")
    assert diff[:2] == ["--- program.py", "+++ program.py (infilled)"]
    assert [line for line in diff[2:] if line.startswith("-")] == ["-    x = 1"]
    assert last == "3 tokens in 3 forwards" or re.fullmatch(r"3 tokens in [12] forwards", last)
    assert (tmp_path / "program.py").read_text() == program


def test_own_loop_finds_with_pages_what_it_finds_without(run):
    lines = run("own_loop", "--blocks", "3")
    ids = json.loads(lines[0])
    assert len(ids) == 32 and 99 not in ids
    tokens, forwards = map(int, re.match(r"(\d+) tokens, (\d+) forwards", lines[1]).groups())
    assert tokens == 24 and forwards < tokens
    assert lines[2] == "the same without the cache: True"


def test_train_mdlm_lowers_the_bound_and_saves_a_checkpoint(run, tmp_path):
    lines = run("train_mdlm", "--steps", "20", "--output", "trained")
    (line,) = (line for line in lines if line.startswith("bound on held-out text"))
    before, after = map(float, re.findall(r"\d+\.\d+", line))
    assert after < before - 2
    assert lines[-1].startswith("def find(path: dict) ->")
    model, _ = dk.load(tmp_path / "trained", device="cpu")
    assert model.config.diffusion["attention"] == ["bidirectional"]


@pytest.mark.parametrize(
    ("attention", "caches"),
    [("bidirectional", ["none", "prefix", "dual", "dual, refreshed"]), ("block_causal", ["none", "block"])],
)
def test_compare_caches_measures_every_cache_against_the_exact_run(run, attention, caches):
    head, *rows = run("compare_caches", "--attention", attention, "--new-tokens", "8")
    assert head.split() == ["cache", "forwards", "seconds", "as", "exact"]
    cells = [re.split(r"\s{2,}", row) for row in rows]
    assert [row[0] for row in cells] == caches
    shares = dict(zip(caches, (row[-1] for row in cells), strict=True))
    assert shares["none"] == "100%" and shares.get("block", "100%") == "100%"
