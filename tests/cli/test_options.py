"""Every option of SampleConfig is one of the commands that generate, with help; mistakes are one line."""

import dataclasses

import pytest
import typer.main
from typer.testing import CliRunner

import dllm_kernels as dk
from dllm_kernels.cli import app, options

PROMPT = "x = 1\n"
FIELDS = [field.name for field in dataclasses.fields(dk.SampleConfig)]


def run(*arguments: str, stdin: str | None = None, **settings):
    return CliRunner().invoke(app, list(arguments), input=stdin, **settings)


def flags(command: str) -> set[str]:
    """The options of a command."""
    group = typer.main.get_command(app)
    found = group.commands[command]
    with found.make_context(command, [], resilient_parsing=True) as context:
        return {flag for parameter in found.get_params(context) for flag in parameter.opts}


@pytest.mark.parametrize("command", ["sample", "infill", "edit", "chat"])
def test_every_field_is_an_option(command):
    left_out = typer.main.get_command(app).commands[command].left_out
    expected = {f"--{name.replace('_', '-')}" for name in FIELDS if name not in left_out}
    assert expected <= flags(command)
    assert left_out <= {"max_new_tokens", "chat", "stop_on_eos", "history", "max_batch"}


def test_every_field_has_help_of_its_own():
    assert set(options.HELP) == set(FIELDS)
    for _, text in options.HELP.values():
        assert text.endswith(".") and len(text) < 90


def test_a_field_that_is_new_is_an_option(monkeypatch):
    monkeypatch.delitem(options.HELP, "threshold")
    shown = run("sample", "--help", env={"COLUMNS": "120"}).stdout
    assert "--threshold" in shown and "threshold of dk.SampleConfig" in shown


@pytest.mark.parametrize(
    "command", ["sample", "infill", "edit", "chat", "choose", "convert", "merge", "train", "bench", "info"]
)
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout and f"dllm {command}" in result.stdout


def test_presets_are_those_of_the_config():
    from dllm_kernels.cli.sample import _PRESETS
    from dllm_kernels.sampling.config import PRESETS

    assert [*PRESETS] == [*_PRESETS]


def test_values_have_the_type_of_their_field():
    assert options.assignments("threshold=0.6,cache=none,steps=none,eos-ids=1,2,strict=yes,seed=3") == {
        "threshold": 0.6, "cache": "none", "steps": None, "eos_ids": (1, 2), "strict": True, "seed": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("threshold", "'threshold' is not NAME=VALUE"),
        ("thresh=0.6", "'thresh' is not an option; there are: max_new_tokens"),
        ("threshold=high", "threshold is 'high'; it must be a number"),
        ("steps=1.5", "steps is '1.5'; it must be an integer"),
        ("strict=maybe", "strict is 'maybe'; it must be true or false"),
        ("eos_ids=a", "it must be token ids, such as 1,2,3"),
    ],
)
def test_assignments_that_mean_nothing(text, reason):
    with pytest.raises(ValueError) as raised:
        options.assignments(text)
    assert reason in str(raised.value)


def test_a_threshold_is_the_rule_where_nothing_names_another():
    assert options.with_rule({"temperature": 0.5})["threshold"] == options.DEFAULT_THRESHOLD
    for named in ({"steps": 4}, {"factor": 1.0}, {"rule": "quota"}, {"schedule": "dream"}):
        assert options.with_rule(named) == named
    preset = options.with_rule({}, "llada")
    assert preset["config"] == dk.SampleConfig.preset("llada")
    assert options.with_rule({**preset, "cache": "none"}) == {**preset, "cache": "none"}
    assert options.with_rule({"edit_threshold": 0.9})["threshold"] == options.DEFAULT_THRESHOLD


def test_options_override_a_preset(monkeypatch):
    asked = {}

    def sample(model, prompt, **given):
        asked.update(given)
        raise ValueError("asked")

    monkeypatch.setattr(dk, "sample", sample)
    run("sample", PROMPT, "--preset", "fast_dllm", "--threshold", "0.7", "--suppress-tokens", "1,2")
    assert asked["config"] == dk.SampleConfig.preset("fast_dllm")
    assert asked["threshold"] == 0.7 and asked["suppress_tokens"] == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sample"], "give PROMPT, or --jsonl FILE for many"),
        (["sample", PROMPT, "--jsonl", "a.jsonl"], "give PROMPT or --jsonl, not both"),
        (["sample", PROMPT, "--preset", "none"], "preset is 'none'; allowed: llada"),
        (["sample", PROMPT, "--colour", "age"], "colour is 'age'; allowed: step, confidence"),
        (["chat", "--colour", "age"], "colour is 'age'; allowed: step, confidence"),
        (["sample", PROMPT, "--eos-ids", "a"], "eos_ids is 'a'; it must be token ids"),
        (["sample", PROMPT, "--temperature", "hot"], "'--temperature'"),
        (["sample", PROMPT, "--temprature", "1"], "no such option: --temprature"),
        (["sampel"], "no such command 'sampel'. Did you mean 'sample'"),
        (["sample", PROMPT, "--output", "no/such/folder/file"], "there is no folder"),
        (["sample", PROMPT, "--replay", "."], "is a folder; give a file"),
        (["sample", PROMPT, "--output", "/dev/null"], "/dev/null is not a regular file"),
        (["sample", PROMPT, "--replay", "/dev/null"], "/dev/null is not a regular file"),
        (["chat", "--history", "/dev/null"], "/dev/null is not a regular file"),
        (["sample", PROMPT, "--compare", "thresh=1"], "'thresh' is not an option"),
        (["sample", PROMPT, "--device", "abacus"], "device is 'abacus'"),
        (["infill", "-", "--max-new-tokens", "3"], "no such option: --max-new-tokens"),
        (["choose", PROMPT], "missing option '--choice'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, reason):
    result = run(*arguments, stdin="x = <mask:2>")
    assert result.exit_code == 2 and result.stdout == ""
    assert reason in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_debug_shows_the_traceback():
    result = run("--debug", "sample", PROMPT, "--cache", "warm")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "dllm: cache is 'warm'" in result.stderr


def test_an_error_of_the_library_is_one_line_and_exit_code_1(monkeypatch):
    def sample(*_, **__):
        raise RuntimeError("out of memory\nin two lines")

    monkeypatch.setattr(dk, "sample", sample)
    result = run("sample", PROMPT)
    assert result.exit_code == 1
    assert result.stderr.startswith("dllm: RuntimeError: out of memory in two lines; `dllm --debug")


def test_a_module_that_answers_an_interrupt_with_an_error_of_its_own(monkeypatch):
    """As numpy does when it is interrupted while it is imported."""
    from dllm_kernels.cli.commands import interrupts

    def sample(*_, **__):
        monkeypatch.setattr(interrupts, "seen", True)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr(dk, "sample", sample)
    result = run("sample", PROMPT)
    assert result.exit_code == 130 and result.stderr == "dllm: interrupted\n"


def test_completion_offers_values():
    names = {parameter.name: parameter for parameter in options._parameters(frozenset())}
    with typer.main.get_command(app).make_context("dllm", [], resilient_parsing=True) as context:
        offered = [item.value for item in names["cache"].shell_complete(context, "")]
    assert offered == ["auto", "none", "prefix", "dual", "block"]


@pytest.mark.parametrize("command", [[], ["sample"], ["train"], ["info"]], ids=str)
def test_help_can_be_read_in_twenty_columns(command):
    result = run(*command, "--help", env={"COLUMNS": "20"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 20 and "│" not in result.stdout
    assert "Show this message" in result.stdout
