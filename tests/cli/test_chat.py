"""`dllm chat`: turns, commands, the file of a conversation, and what ends a reply or the program."""

import json
import os
import stat

import pytest
from typer.testing import CliRunner

import dllm_kernels as dk
from dllm_kernels.cli import app
from dllm_kernels.cli.conversation import Conversation
from tests.cli.terminals import Terminal

TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
SHORT = ("--max-new-tokens", "8")


def run(*inputs: str | bytes, options=SHORT):
    lines = b"".join((one if isinstance(one, bytes) else one.encode()) + b"\n" for one in inputs)
    return CliRunner().invoke(app, ["chat", *map(str, options)], input=lines)


@pytest.fixture(scope="module")
def tiny():
    return dk.load("tiny-python")


@pytest.fixture
def templated(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = TEMPLATE
    yield Conversation(model, tokenizer, "tiny", {"max_new_tokens": 8, "threshold": 0.9})
    tokenizer.chat_template = None


def turn(conversation, text) -> str:
    conversation.ask(text)
    reply = conversation.sample().texts[0]
    conversation.answer(reply)
    return reply


# ---- a conversation ---------------------------------------------------------------------------------------
def test_every_turn_is_put_through_the_template(templated, tiny):
    first = turn(templated, "hello")
    second = turn(templated, "and?")
    model, tokenizer = tiny
    text = f"# user: hello\n# assistant: {first}\n# user: and?\n# assistant:"
    expected = dk.sample(model, text, tokenizer=tokenizer, max_new_tokens=8, threshold=0.9)
    assert second == expected.texts[0]


def test_later_turns_reuse_keys_and_values(templated):
    turn(templated, "x = 1\n" * 20)
    assert templated.reused == 0
    turn(templated, "and?")
    assert templated.reused >= 64


def test_without_a_template_each_input_begins_a_line_of_one_text(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer, "tiny", {"max_new_tokens": 8})
    first = turn(conversation, "def add(a, b):")
    second = turn(conversation, "x = 1")
    text = f"def add(a, b):{first}".removesuffix("\n") + "\nx = 1"
    expected = dk.sample(model, text, tokenizer=tokenizer, max_new_tokens=8, threshold=0.9)
    assert second == expected.texts[0]


def test_the_oldest_turns_are_dropped_where_all_do_not_fit(templated):
    templated.messages = [{"role": "system", "content": "Be brief."}]
    for _ in range(3):
        turn(templated, "y = 2\n" * 90)
    assert templated.dropped >= 2 and templated.dropped % 2 == 0
    assert len(templated.messages) == 7


def test_options_are_checked_when_they_are_set(templated):
    templated.set("threshold 0.8")
    templated.set("top-p=0.5")
    for wrong, reason in {
        "threshold high": "threshold is 'high'; it must be a number",
        "thresh 0.8": "'thresh' is not an option",
        "cache dual": "approximates",
        "steps 4": "not both",
        "chat true": "no meaning in a conversation",
        "seed": "give seed a value",
    }.items():
        with pytest.raises(ValueError, match=reason):
            templated.set(wrong)
    assert templated.options == {"max_new_tokens": 8, "threshold": 0.8, "top_p": 0.5}
    templated.set("top_p none")
    assert templated.options == {"max_new_tokens": 8, "threshold": 0.8}


def test_commands_leave_the_options_of_replies(tmp_path):
    talk = ("--history", tmp_path / "talk.json", *SHORT, "--threshold", "0.9")
    run("/infill x = <mask:2>", "x = 1", options=talk)
    (_, reply) = json.loads((tmp_path / "talk.json").read_text())["messages"]
    run("x = 1", options=("--history", tmp_path / "other.json", *SHORT, "--threshold", "0.9"))
    assert reply == json.loads((tmp_path / "other.json").read_text())["messages"][1]


# ---- over a pipe ------------------------------------------------------------------------------------------
def test_replies_go_to_standard_output_and_all_else_to_standard_error():
    result = run(
        "def add(a, b):", "/set threshold 0.5", "/undo", "/infill x = <mask:2>", "/quit", "never read"
    )
    assert result.exit_code == 0, result.stderr
    assert "it continues what you write" in result.stderr
    assert "threshold=0.5" in result.stderr and "took back: def add(a, b):" in result.stderr
    assert "x = " in result.stdout and "mask" not in result.stdout and "/undo" not in result.stdout


def test_a_text_of_several_lines_stands_between_triple_quotes(tmp_path):
    run('"""', "class A:", "    x = 1", '"""', options=(*SHORT, "--history", tmp_path / "talk.json"))
    (asked, _) = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert asked == {"role": "user", "content": "class A:\n    x = 1"}


def test_a_history_goes_on_and_keeps_its_mode(tmp_path):
    file = tmp_path / "talk.json"
    assert run("x = 1", options=(*SHORT, "--history", file)).exit_code == 0
    file.chmod(0o600)
    first = json.loads(file.read_text())["messages"]
    assert [one["role"] for one in first] == ["user", "assistant"]
    result = run("y = 2", options=(*SHORT, "--history", file))
    assert "1 turns from" in result.stderr
    assert json.loads(file.read_text())["messages"][:2] == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and os.listdir(tmp_path) == ["talk.json"]
    run("/undo", "/save " + str(tmp_path / "other.json"), options=(*SHORT, "--history", file))
    assert json.loads(file.read_text())["messages"] == first
    assert (tmp_path / "other.json").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is no conversation"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "messages[0] must be"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages[0] must be"),
    ],
)
def test_a_file_that_is_no_history_is_refused_and_stays(tmp_path, content, reason):
    file = tmp_path / "talk.json"
    file.write_bytes(content)
    result = run("x = 1", options=(*SHORT, "--history", file))
    assert result.exit_code == 2 and reason in result.stderr
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (("/nope",), "/nope is not a command; there are /set, /undo"),
        (("/set cache warm",), "cache is 'warm'; allowed"),
        (("/undo",), "nothing to take back"),
        (("/save",), "give a file"),
        (("/infill x = 1",), "the text has no gap"),
        ((b"caf\xe9",), "not UTF-8: byte 0xe9"),
    ],
)
def test_a_mistake_in_a_pipe_ends_with_code_2(inputs, reason):
    result = run(*inputs)
    assert result.exit_code == 2 and reason in result.stderr and "Traceback" not in result.stderr


# ---- on a terminal ----------------------------------------------------------------------------------------
def test_ctrl_c_stops_a_reply_and_ctrl_d_ends(tmp_path):
    file = tmp_path / "talk.json"
    options = ("--max-new-tokens", "512", "--pause", "0.05", "--history", str(file))
    with Terminal("chat", *options, columns=60, lines=16) as terminal:
        terminal.wait_for("> ")
        terminal.write("def add(a, b):\n")
        terminal.wait_for("tokens per forward", "per forward", "/fwd")
        terminal.interrupt()
        terminal.wait_for("stopped; /undo takes it back")
        terminal.write("/set threshold 2x\n")
        terminal.wait_for("it must be a number")
        terminal.wait_for("> ")  # until then the terminal itself would take Ctrl-D
        terminal.write("\x04")
        assert terminal.ended() == 0
    (asked, reply) = json.loads(file.read_text())["messages"]
    assert asked["content"] == "def add(a, b):" and reply["role"] == "assistant"
