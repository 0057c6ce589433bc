"""The replay page: what it records, text that would break a page, and its use in a browser."""

import json
import os
import re
from itertools import pairwise

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.sampling.output import SampleOutput, TopLogprobs
from dllm_kernels.viewer.replay import replay_page, visible, write_replay
from tests.sampling.tokenizer_zoo import tokenizer_of
from tools import chromium

MASK = 99

HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "<!--<script>",
    "]]>&lt;&amp;",
    "line\u2028paragraph\u2029",
    "\u202egnp.exe\u202c",
    "\u200f\u2067abc\u2069",
    "bell\x07 null\x00 escape\x1b[31m",
    "\ud800",
    "{{script}} \\u003c ${1+1} `",
    "‹U+202E›",
]


class Words:
    """A tokenizer whose token i is the i-th of its words."""

    def __init__(self, words):
        self.words = words

    def __call__(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return "".join(self.words[token] for token in ids)


LETTERS = Words([chr(ord("a") + index) for index in range(26)])


def output_of(sequences, unmask_step, *, filled=True, history=None, logprobs=None, top=None) -> SampleOutput:
    """An output of `dk.infill`, or of `dk.sample` with filled=False, with what the page reads."""
    step = torch.tensor(unmask_step)
    return SampleOutput(
        sequences=torch.tensor(sequences),
        texts=None,
        lengths=(step >= 0).sum(1),
        forwards=int(step.max()) + 1,
        row_forwards=step.amax(1) + 1,
        tokens_per_forward=1.0,
        exact=True,
        unmask_step=step,
        history=None if history is None else [torch.tensor(canvas) for canvas in history],
        filled=[[(0, 1)]] * len(sequences) if filled else None,
        logprobs=logprobs,
        top_logprobs=top,
    )


def hostile_output() -> tuple[SampleOutput, Words]:
    count = len(HOSTILE)
    tokens = torch.arange(count)
    top = TopLogprobs(torch.stack([tokens, tokens.flip(0)], -1)[None], torch.full((1, count, 2), -0.7))
    steps = [[-1, *range(count - 1)]]
    return output_of([tokens.tolist()], steps, logprobs=torch.full((1, count), -0.7), top=top), Words(HOSTILE)


def recording(page: str) -> dict:
    """What the page's script reads."""
    (content,) = re.findall(r'<script type="application/json" id="recording">(.*?)</script>', page, re.DOTALL)
    return json.loads(content)


def run_of(output, tokenizer=LETTERS, **options) -> dict:
    """The one run of a page, with texts in place of their numbers and "#" in place of masks."""
    read = recording(replay_page({"run": output}, tokenizer, **({"mask_id": MASK} | options)))
    (run,) = read["runs"]

    def text(number):
        return "#" if number < 0 else read["texts"][number]

    run["initial"] = "".join(map(text, run["initial"]))
    run["writes"] = [{position: text(number) for position, number in step} for step in run["writes"]]
    if run["alternatives"]:
        run["alternatives"] = [{text(n): p for n, p in token} for token in run["alternatives"]]
    return run


# ---- what is recorded -------------------------------------------------------------------------------------


def test_steps_are_those_of_the_output():
    run = run_of(output_of([[0, 1, 2, 3]], [[-1, 1, 0, 1]]))
    assert run["initial"] == "a###"
    assert run["writes"] == [{2: "c"}, {1: "b", 3: "d"}]


def test_the_row_that_is_asked_for_is_shown():
    run = run_of(output_of([[0, 1], [2, 3]], [[-1, 0], [0, -1]]), row=1)
    assert run["initial"] == "#d" and run["writes"] == [{0: "c"}]


def test_what_fills_a_completion_up_after_its_end_is_left_out():
    run = run_of(output_of([[0, 1, 2, 25, 25, 25]], [[-1, 0, 1, 1, -1, -1]], filled=False))
    assert run["initial"] == "a###"


def test_given_text_behind_the_last_gap_stays():
    run = run_of(output_of([[0, 1, 2, 3]], [[-1, 0, -1, -1]]))
    assert run["initial"] == "a#cd"


def test_replaced_tokens_come_from_the_history():
    """Position 1 is written in the row's first step and replaced in its third; another row went first."""
    history = [
        [[0, MASK, MASK], [MASK, 1, 1]],
        [[0, MASK, MASK], [1, 1, 1]],
        [[0, 5, MASK], [1, 1, 1]],
        [[0, 5, 2], [1, 1, 1]],
        [[0, 1, 2], [1, 1, 1]],
    ]
    run = run_of(output_of([[0, 1, 2], [1, 1, 1]], [[-1, 2, 1], [0, -1, -1]], history=history))
    assert run["initial"] == "a##"
    assert run["writes"] == [{1: "f"}, {2: "c"}, {1: "b"}]


def test_a_draft_that_was_given_and_replaced_is_shown_at_first():
    history = [[[0, 4, 2]], [[0, 1, 2]]]
    run = run_of(output_of([[0, 1, 2]], [[-1, 0, -1]], history=history))
    assert run["initial"] == "aec" and run["writes"] == [{1: "b"}]


def test_probabilities_and_alternatives_belong_to_written_tokens():
    logprobs = torch.tensor([[0.0, -0.5]])
    top = TopLogprobs(torch.tensor([[[0, 0], [1, 7]]]), torch.tensor([[[0.0, 0.0], [-0.5, float("-inf")]]]))
    run = run_of(output_of([[0, 1]], [[-1, 0]], logprobs=logprobs, top=top))
    assert run["probabilities"] == [None, pytest.approx(0.6065)]
    assert run["alternatives"] == [{}, {"b": pytest.approx(0.6065), "h": 0.0}]


def test_an_output_without_probabilities_records_none():
    run = run_of(output_of([[0, 1]], [[-1, 0]]))
    assert run["probabilities"] is None and run["alternatives"] is None


def test_a_character_of_several_tokens_stands_with_the_last_of_them():
    tokenizer = tokenizer_of("GPT-2")
    tokens = tokenizer("a é 中")["input_ids"]
    output = output_of([tokens], [list(range(len(tokens)))])
    texts = [text for step in run_of(output, tokenizer, mask_id=-5)["writes"] for text in step.values()]
    assert "".join(texts) == "a é 中" and len(texts) == len(tokens)
    assert "" in texts and not any("\ufffd" in text for text in texts)


def test_words_keep_the_spaces_before_them():
    """Decoded alone, a word has no space before it in SentencePiece tokenizers."""
    tokenizer = tokenizer_of("Llama")
    tokens = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "▁sat"])
    output = output_of([tokens], [[-1, 0, 1]])
    read = recording(replay_page({"run": output}, tokenizer, mask_id=tokenizer.mask_token_id))
    assert read["texts"] == ["the", " cat", " sat"]


def test_a_real_run_is_recorded_whole():
    model, tokenizer = dk.load("tiny-python", attention="bidirectional")
    text = "assert 14 + 79 ==<mask:3>\nassert 26 + 91 ==<mask:4>\n"
    output = dk.infill(model, text, tokenizer=tokenizer, threshold=0.9, logprobs=3)
    read = recording(replay_page({"sums": output}, tokenizer, mask_id=model.config.mask_token_id))
    (run,) = read["runs"]
    final = run["initial"]
    for step in run["writes"]:
        for position, number in step:
            final[position] = number
    assert "".join(read["texts"][number] for number in final) == output.texts[0]
    assert len(run["writes"]) == output.forwards
    written = [position for step in run["writes"] for position, _ in step]
    assert all(len(run["alternatives"][position]) == 3 for position in written)
    assert all(run["alternatives"][position][0][0] == final[position] for position in written)


def test_a_real_run_of_rule_edit_is_replayed_with_what_it_replaced():
    model, tokenizer = dk.load("tiny-python", attention="bidirectional")
    text = "assert 14 + 79 ==<mask:3>\ndef find<mask:12>\n"
    options = dict(threshold=0.2, edit_threshold=0.3, history=True)
    output = dk.infill(model, text, tokenizer=tokenizer, **options)
    run = run_of(output, tokenizer, mask_id=model.config.mask_token_id)
    history = [canvas[0].tolist() for canvas in output.history]
    changed = [
        [position for position, token in enumerate(after) if token != before[position]]
        for before, after in pairwise(history)
    ]
    assert [list(step) for step in run["writes"]] == changed
    final = dict(enumerate(tokenizer.decode([token]) for token in history[0]))
    for step in run["writes"]:
        final |= step
    assert "".join(final.values()) == output.texts[0]


# ---- text that would break a page -------------------------------------------------------------------------


def test_no_text_of_the_model_becomes_markup():
    output, tokenizer = hostile_output()
    page = replay_page({"</script><b>run": output}, tokenizer, mask_id=MASK)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page and "<b>" not in page and "<!--" not in page
    assert set(recording(page)["texts"]) == {visible(text) for text in HOSTILE}


def test_the_page_holds_no_character_that_is_not_seen():
    output, tokenizer = hostile_output()
    page = replay_page({"\u202erun\x00": output}, tokenizer, mask_id=MASK)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", page
    )


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\n", "a\tb\n"),
        ("\r\x00\x1b", "␍␀␛"),
        ("\x7f\x85", "‹U+007F›‹U+0085›"),
        ("\u202eabc", "‹U+202E›abc"),
        ("\u2028", "‹U+2028›"),
        ("שלום नमस्ते 👩\u200d💻", "שלום नमस्ते 👩\u200d💻"),
    ],
)
def test_characters_without_a_shape_get_one(text, shown):
    assert visible(text) == shown


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone():
    output, tokenizer = hostile_output()
    page = replay_page({"run": output}, tokenizer, mask_id=MASK)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|import\s*\(""", page.replace("src=x", ""))


# ---- the file ---------------------------------------------------------------------------------------------


def test_a_file_that_stands_there_is_replaced(tmp_path):
    path = tmp_path / "replay.html"
    path.write_text("old")
    write_replay(path, {"run": output_of([[0, 1]], [[-1, 0]])}, LETTERS, mask_id=MASK)
    assert path.read_text().startswith("<!doctype html>")
    assert os.listdir(tmp_path) == ["replay.html"]


def test_a_file_stays_as_it_was_if_the_page_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "replay.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_replay(path, {"run": output_of([[0, 1]], [[-1, 0]])}, LETTERS, mask_id=MASK)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["replay.html"]


RUN = output_of([[0, 1]], [[-1, 0]])


@pytest.mark.parametrize("name", ["", "missing/replay.html"])
def test_a_path_that_names_no_file_of_a_folder_is_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="it must name a file in a folder that exists"):
        write_replay(tmp_path / name, {"run": RUN}, LETTERS, mask_id=MASK)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(runs=RUN), TypeError, "runs is a SampleOutput; it must map names to outputs"),
        (dict(runs={}), ValueError, "runs holds 0 outputs; allowed: 1 or 2"),
        (dict(runs={"a": RUN, "b": RUN, "c": RUN}), ValueError, "runs holds 3 outputs; allowed: 1 or 2"),
        (dict(row=1), ValueError, "row of 'run' must lie in 0..0, got 1"),
        (dict(tokenizer=None), TypeError, "tokenizer is a NoneType"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, message):
    path = tmp_path / "replay.html"
    arguments = dict(runs={"run": RUN}, tokenizer=LETTERS, row=0) | arguments
    with pytest.raises(error, match=re.escape(message)):
        write_replay(path, arguments["runs"], arguments["tokenizer"], mask_id=MASK, row=arguments["row"])
    assert not path.exists()


# ---- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if chromium.executable() is None:
        pytest.skip(f"no Chromium in PATH ({', '.join(chromium.NAMES)})")
    with chromium.page() as page:
        yield page


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of runs; afterwards it must have reported no error and asked for no other file."""
    browser.errors.clear()
    browser.requests.clear()
    path = tmp_path / "replay.html"

    def open_page(runs, tokenizer=LETTERS, **options):
        write_replay(path, runs, tokenizer, mask_id=MASK)
        browser.open(path, **options)
        return browser

    yield open_page
    assert browser.errors == []
    assert set(browser.requests) <= {path.as_uri()}


TWO = {
    "fast": output_of([[0, 1, 2, 3]], [[-1, 0, 1, 1]], logprobs=torch.tensor([[0, -0.1, -1.0, -3.0]])),
    "slow": output_of([[0, 1, 2, 3]], [[-1, 0, 1, 2]]),
}
SHOWN = """[...document.querySelectorAll('.text')].map((text) => [...text.querySelectorAll('.token')]
    .map((token) => token.classList.contains('masked') ? '#' : token.textContent).join(''))"""


def test_arrows_and_the_ends_go_through_the_steps_of_both_runs(opened):
    page = opened(TWO)
    assert page.run(SHOWN) == ["abcd", "abcd"]
    page.press("Home")
    assert page.run(SHOWN) == ["a###", "a###"]
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run(SHOWN) == ["abcd", "abc#"]
    page.press("ArrowLeft")
    assert page.run(SHOWN) == ["ab##", "ab##"]
    assert page.run("document.getElementById('step').getAttribute('aria-valuetext')") == "step 1 of 3"
    page.press("End")
    assert page.run(SHOWN) == ["abcd", "abcd"]


def test_the_slider_moves_the_text(opened):
    page = opened(TWO)
    page.run("(s => { s.value = 1; s.dispatchEvent(new Event('input')) })(document.getElementById('step'))")
    assert page.run(SHOWN) == ["ab##", "ab##"]


def test_space_plays_to_the_end_and_stops(opened):
    page = opened(TWO)
    speed = "(s => { s.value = %d; s.dispatchEvent(new Event('change')) })(document.getElementById('speed'))"
    page.run(speed % 1)
    page.press(" ")
    assert page.run("document.getElementById('play').getAttribute('aria-label')") == "Pause"
    assert page.run(SHOWN) == ["a###", "a###"]
    page.run(speed % 32)
    ended = "new Promise(done => setInterval(() => step === steps && playing === null && done(true), 10))"
    assert page.run(ended)
    assert page.run(SHOWN) == ["abcd", "abcd"]
    assert page.run("document.getElementById('play').getAttribute('aria-label')") == "Play"


def test_a_token_tells_its_step_probability_and_alternatives(opened):
    top = TopLogprobs(torch.tensor([[[0, 0], [1, 7]]]), torch.tensor([[[0.0, 0.0], [-0.105, -2.5]]]))
    output = output_of([[0, 1]], [[-1, 0]], logprobs=torch.tensor([[0.0, -0.105]]), top=top)
    page = opened({"run": output})
    told = "document.getElementById('token').innerText.replace(/\\s+/g, ' ')"
    x, y = page.run("(r => [r.x + r.width / 2, r.y + r.height / 2])"
                    "(document.querySelectorAll('.token')[1].getBoundingClientRect())")  # fmt: skip
    page.hover(x, y)
    assert page.run(told) == "b step 1 · 90.0% · position 1 b 90.0% h 8.2%"
    page.hover(x, y + 200)
    assert page.run(told).startswith("Point at a token")
    page.run("document.querySelectorAll('.token')[1].focus()")
    assert "90.0%" in page.run(told)
    page.press("Escape")
    assert page.run(told).startswith("Point at a token")


def test_arrows_move_between_tokens_when_one_has_the_focus(opened):
    page = opened(TWO)
    page.run("document.querySelectorAll('.token')[1].focus()")
    page.press("ArrowRight")
    assert page.run("document.activeElement.textContent") == "c"
    assert page.run(SHOWN) == ["abcd", "abcd"]


def test_a_screen_reader_hears_nothing_new_while_nothing_is_pointed_at(opened):
    page = opened(TWO)
    page.run("""(() => { window.changes = 0;
        new MutationObserver(() => changes++).observe(document.getElementById('token'),
            {childList: true, subtree: true, characterData: true}) })()""")
    page.press("Home")
    page.press("ArrowRight")
    assert page.run("new Promise(done => setTimeout(() => done(changes), 0))") == 0
    page.run("document.querySelectorAll('.token')[1].focus()")
    assert page.run("new Promise(done => setTimeout(() => done(changes), 0))") == 1


def test_a_replaced_token_is_marked_and_told(opened):
    history = [[[0, MASK]], [[0, 5]], [[0, 1]]]
    page = opened({"run": output_of([[0, 1]], [[-1, 1]], history=history)})
    page.run("document.querySelectorAll('.token')[1].click()")
    assert "replaced f (step 1)" in page.run("document.getElementById('token').innerText")
    assert page.run("document.querySelectorAll('.rewritten').length") == 1
    page.press("ArrowLeft")
    assert page.run(SHOWN) == ["af"]


def test_hostile_text_is_only_text(opened):
    output, tokenizer = hostile_output()
    page = opened({"<b>run</b>": output}, tokenizer)
    assert page.run("document.title") == "<b>run</b>"
    assert page.run("document.querySelector('.text').textContent") == "".join(map(visible, HOSTILE))
    assert page.run("document.querySelectorAll('img, main b, main script').length") == 0
    for index in range(len(HOSTILE)):
        page.run(f"document.querySelectorAll('.token')[{index}].click()")
    assert page.run("document.title") == "<b>run</b>"


def contrast(one: str, other: str) -> float:
    """The WCAG contrast of two colours as CSS computes them."""

    def luminance(colour):
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("colour", ["step", "probability"])
def test_text_can_be_read_on_every_colour_of_a_scale(opened, dark, colour):
    count = 26
    logprobs = torch.linspace(0, 1, count).log().clamp(min=-20)[None]
    output = output_of([list(range(count))], [list(range(count))], logprobs=logprobs)
    page = opened({"run": output}, dark=dark)
    page.run(f"document.querySelector('input[value={colour}]').click()")
    pairs = page.run("""[...document.querySelectorAll('.token')].map(getComputedStyle)
        .map(style => [style.color, style.backgroundColor])""")
    assert len({background for _, background in pairs}) > 20
    assert min(contrast(*pair) for pair in pairs) >= 4.5


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_width_scrolls_sideways(opened, width):
    words = ["a_name_that_does_not_end" * 8, " short", "\n", "\t\tx", "y" + 40 * " "]
    tokens = [[0, 1, 2, 3, 4, 4, 4, 1]]
    output = output_of(tokens, [list(range(8))], logprobs=torch.full((1, 8), -0.5))
    page = opened(
        {"a name of a run that is rather long": output, "x" * 60: output}, Words(words), width=width
    )
    page.run("document.querySelector('.token').click()")
    assert page.run("document.documentElement.scrollWidth") <= width
    rights = """(selector => Math.max(...[...document.querySelectorAll(selector)]
        .flatMap(one => [...one.getClientRects()]).map(box => box.right)))"""
    assert page.run(f"{rights}('.token')") <= page.run(f"{rights}('.text')")


def test_every_control_has_a_name(opened):
    page = opened(TWO)
    nameless = page.run("""[...document.querySelectorAll('button, input, select, [role]')]
        .filter(one => !(one.getAttribute('aria-label') || one.labels?.length)).map(one => one.outerHTML)""")
    assert nameless == []


def test_nothing_fades_where_motion_is_not_wanted(opened, browser):
    page = opened(TWO)
    durations = "getComputedStyle(document.querySelector('.token')).transitionDuration"
    page.run("document.body.classList.add('playing')")
    assert page.run(durations) == "0.2s"
    browser.media(**{"prefers-reduced-motion": "reduce"})
    assert page.run(durations) in ("0s", "")


def test_a_run_without_steps_shows_what_was_given(opened):
    page = opened({"run": output_of([[0, 1]], [[-1, -1]])})
    assert page.run(SHOWN) == ["ab"]
    page.press("ArrowRight")
    assert page.run("document.getElementById('where').textContent") == "step 0 / 0"
