"""JSON for scripts, and files of many prompts: what comes out, in which order, and what an error leaves."""

import json

import pytest
from typer.testing import CliRunner

import dllm_kernels as dk
from dllm_kernels.cli import app

SHORT = ("--max-new-tokens", "6")
PROMPTS = ["def add(a, b):", "x = 1\n", "class A:", "import os\n", "y = "]


def run(*arguments: str, stdin: str | bytes | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(PROMPTS[0]), "", *(json.dumps({"prompt": one, "id": one[:3]}) for one in PROMPTS[1:])]
    path.write_text("\n".join(lines) + "\n")
    return path


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def tiny():
    return dk.load("tiny-python")


def test_one_text_as_json(tiny):
    model, tokenizer = tiny
    result = run("sample", PROMPTS[0], *SHORT, "--json", "--logprobs", "2")
    fields = json.loads(result.stdout)
    output = dk.sample(model, PROMPTS[0], tokenizer=tokenizer, threshold=0.9, max_new_tokens=6, logprobs=2)
    start = output.sequences.shape[1] - 6
    assert fields["prompt"] == PROMPTS[0] and fields["text"] == output.texts[0]
    assert fields["tokens"] == output.sequences[0, start:].tolist()
    assert fields["logprobs"] == pytest.approx(output.logprobs[0, start:].tolist(), abs=1e-6)
    assert [len(top) for top in fields["top_logprobs"]] == [2] * 6
    assert fields["forwards"] == output.forwards and fields["seconds"] > 0


def test_an_infilled_text_as_json():
    fields = json.loads(run("infill", "-", "--json", stdin="x = <mask:3>\n").stdout)
    assert fields["prompt"] == "x = <mask:3>\n" and fields["text"].startswith("x = ")
    assert len(fields["tokens"]) == 3


def test_output_goes_to_a_file(tmp_path):
    target = tmp_path / "completion.py"
    result = run("sample", PROMPTS[0], *SHORT, "--output", target)
    assert result.exit_code == 0 and result.stdout == ""
    assert target.read_text() == run("sample", PROMPTS[0], *SHORT).stdout


def test_many_prompts_come_out_in_their_order(file, tmp_path, tiny):
    target = tmp_path / "out.jsonl"
    result = run("sample", "--jsonl", file, "--output", target, "--max-batch", "2", *SHORT)
    assert result.exit_code == 0, result.stderr
    found = records(target.read_text())
    assert [one["prompt"] for one in found] == PROMPTS
    assert [one.get("id") for one in found] == [None, *(one[:3] for one in PROMPTS[1:])]
    model, tokenizer = tiny
    expected = dk.sample(model, PROMPTS, tokenizer=tokenizer, threshold=0.9, max_new_tokens=6)
    assert [one["text"] for one in found] == expected.texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_noise_does_not_depend_on_what_runs_together(file):
    noisy = ("--temperature", "1.0", "--seed", "3", *SHORT)
    together = records(run("sample", "--jsonl", file, *noisy).stdout)
    apart = records(run("sample", "--jsonl", "-", "--max-batch", "1", *noisy, stdin=file.read_bytes()).stdout)
    assert [one["text"] for one in together] == [one["text"] for one in apart]


def test_canvases_are_filled_from_a_file(tmp_path):
    file = tmp_path / "canvases.jsonl"
    file.write_text('"x = <mask:2>\\n"\n{"prompt": "é = <mask:1>;", "id": 1}\n')
    first, second = records(run("infill", "--jsonl", file).stdout)
    assert first["text"].startswith("x = ") and len(first["tokens"]) == 2
    assert second["text"].startswith("é = ") and second["text"].endswith(";") and second["id"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"promt": "x"}', 'line 2: expected a string, or {"prompt": a string, "id": ...}'),
        (b"{", "line 2 is not JSON: Expecting property name"),
        (b"3", "line 2: expected a string"),
        (b'"\xff"', "line 2 is not UTF-8: byte 0xff at offset 1"),
        (b"[" * 100_000, "line 2 is nested too deeply"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_runs(tmp_path, line, reason, monkeypatch):
    monkeypatch.setattr("dllm_kernels.cli.sample.load", lambda *_, **__: pytest.fail("the model was loaded"))
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'"x"\n' + line + b"\n")
    result = run("sample", "--jsonl", file, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and f"{file} {reason}" in result.stderr, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_prompt_that_does_not_fit_is_named_by_its_line_and_what_is_done_is_kept(tmp_path):
    file, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    target.write_text("older\n")
    file.write_text('"x"\n\n"y"\n' + json.dumps("z = 1\n" * 900) + "\n")
    result = run("sample", "--jsonl", file, "--output", target, "--max-batch", "1", *SHORT)
    assert result.exit_code == 2
    assert f"{file} line 4" in result.stderr and f"2 lines are in {target}.partial" in result.stderr
    assert target.read_text() == "older\n"
    assert [one["prompt"] for one in records((tmp_path / "out.jsonl.partial").read_text())] == ["x", "y"]


def test_an_interrupted_file_keeps_its_whole_lines(file, tmp_path, monkeypatch):
    sample, calls = dk.sample, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr(dk, "sample", interrupted)
    target = tmp_path / "out.jsonl"
    result = run("sample", "--jsonl", file, "--output", target, "--max-batch", "2", *SHORT)
    assert result.exit_code == 130
    assert f"interrupted; 4 lines are in {target}.partial" in result.stderr
    assert not target.exists() and len(records((tmp_path / "out.jsonl.partial").read_text())) == 4


def test_files_without_prompts(tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text("\n\n")
    result = run("sample", "--jsonl", file)
    assert result.exit_code == 2 and "holds no prompts" in result.stderr
    result = run("sample", "--jsonl", tmp_path / "missing.jsonl")
    assert result.exit_code == 2 and "No such file" in result.stderr


# ---- two runs, and their page -----------------------------------------------------------------------------
def test_two_runs_are_compared_and_replayed(tmp_path):
    page = tmp_path / "run.html"
    result = run("sample", PROMPTS[0], *SHORT, "--compare", "steps=2", "--replay", page)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == run("sample", PROMPTS[0], *SHORT).stdout
    assert "steps=2: 6 tokens" in result.stderr and f"replay: {page}" in result.stderr
    text = page.read_text()
    assert "threshold=0.9" in text and "steps=2" in text


def test_choices_are_sorted_by_probability(tiny):
    model, tokenizer = tiny
    names = ["1", "4", "17"]
    found = dk.choose(model, "assert 2 + 2 == ", names, tokenizer=tokenizer).probabilities.tolist()
    asked = ("choose", "assert 2 + 2 == ", *(part for name in names for part in ("--choice", name)))
    lines = [line.split() for line in run(*asked).stdout.splitlines()]
    assert [name for _, name in lines] == [name for _, name in sorted(zip(found, names, strict=True))[::-1]]
    choices = json.loads(run(*asked, "--json").stdout)["choices"]
    assert [one["text"] for one in choices] == names
    assert [one["probability"] for one in choices] == pytest.approx(found, abs=1e-5)
