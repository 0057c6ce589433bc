"""`propose`: what stays of a text, which candidate is taken, and what the model sees of a long text."""

import subprocess

import pytest
import torch

import dllm_kernels as dk
from dllm_kernels.edit import LENGTHS, OF_NOTHING, propose, split_lines

TEXT = "import sys\n\n\ndef add(a, b):\n    total = a + b\n    return total\n\n\nprint(add(1, 2))\n"
FIRST, LAST = 5, 6


@pytest.fixture(scope="module")
def tiny():
    return dk.load("tiny-python", attention="bidirectional")


class Writes:
    """A model that is the surer of one token the more masks there are, up to `best` of them."""

    def __init__(self, tokenizer, text, best):
        self.tokenizer, self.best = tokenizer, best
        (self.token,) = tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, ids):
        masks = (ids == self.tokenizer.mask_token_id).sum(1)
        logits = torch.zeros(*ids.shape, len(self.tokenizer))
        logits[..., self.token] = (8.0 - (masks - self.best).abs())[:, None]
        return logits


def proposed(tiny, text=TEXT, first=FIRST, last=LAST, **options):
    model, tokenizer = tiny
    return propose(model, text, first, last, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("span", [(1, 1), (FIRST, LAST), (9, 9)])
def test_everything_but_the_lines_stays(tiny, span, mark, end):
    text = mark + TEXT.replace("\n", end)
    proposal = proposed(tiny, text, *span, tokens=8)
    lines = split_lines(text)
    before, behind = "".join(lines[: span[0] - 1]) or mark, "".join(lines[span[1] :])
    assert proposal.text.startswith(before) and proposal.text.endswith(end + behind)
    assert proposal.text.count("\r\n") == proposal.text.count("\n") * (end == "\r\n")
    assert proposal.text[len(before) : len(proposal.text) - len(end + behind)] == proposal.candidates[0].text


def test_a_last_line_without_an_end_stays_without_one(tiny):
    proposal = proposed(tiny, TEXT.removesuffix("\n"), 9, 9, tokens=3)
    assert proposal.text.endswith(proposal.candidates[0].text)
    assert "\\ No newline at end of file" in proposal.diff


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("span", [(1, 2), (FIRST, LAST), (9, 9), (1, 9)])
@pytest.mark.parametrize("last_line", ["ended", "open"])
def test_the_diff_makes_the_text(tiny, tmp_path, span, end, last_line):
    text = TEXT.replace("\n", end).removesuffix(end if last_line == "open" else "")
    proposal = proposed(tiny, text, *span, tokens=5, name="module.py")
    (tmp_path / "module.py").write_bytes(text.encode())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, check=True, input=proposal.diff.encode())
    assert (tmp_path / "module.py").read_bytes() == proposal.text.encode()


def test_auto_takes_the_length_with_the_highest_mean_log_probability(tiny):
    tokenizer = tiny[1]
    old = len(tokenizer("    total = a + b\n    return total", add_special_tokens=False)["input_ids"])
    lengths = sorted({round(old * share) for share in LENGTHS})
    for best in lengths:
        model = Writes(tokenizer, "x", best)
        proposal = propose(model, TEXT, FIRST, LAST, tokenizer=tokenizer, steps_per_block=1)
        assert sorted(one.tokens for one in proposal.candidates) == lengths
        assert proposal.candidates[0].tokens == best
        assert proposal.candidates[0].text == "x" * best
        bounds = [one.mean_logprob for one in proposal.candidates]
        assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[1]


def test_blank_lines_are_filled_with_more_than_they_had(tiny):
    proposal = proposed(tiny, first=2, last=3)
    assert sorted(one.tokens for one in proposal.candidates) == list(OF_NOTHING)


def test_auto_leaves_out_lengths_that_the_model_has_no_positions_for(tiny):
    text = "x = [1, 2, 3, 4, 5, 6, 7, 8]\n" * 30
    proposal = proposed(tiny, text, 1, 30, threshold=0.0)
    tokens = [one.tokens for one in proposal.candidates]
    assert 1 < len(tokens) < len(LENGTHS) and max(tokens) < tiny[0].config.max_position_embeddings


def test_the_bound_is_that_of_the_committed_tokens(tiny):
    model, tokenizer = tiny
    (candidate,) = proposed(tiny, tokens=6, threshold=0.5).candidates
    canvas = TEXT.replace("    total = a + b\n    return total", "<mask:6>")
    output = dk.infill(model, canvas, tokenizer=tokenizer, threshold=0.5, logprobs=0)
    assert candidate.mean_logprob == pytest.approx(
        float(output.logprobs[0, slice(*output.filled[0][0])].mean())
    )


@pytest.mark.parametrize("line", [1, 2, 300, 599, 600])
def test_a_long_text_is_cut_at_line_borders_to_what_the_model_can_see(tiny, line):
    text = "".join(f"value_{number} = compute({number}, {number * 7})\n" for number in range(600))
    proposal = proposed(tiny, text, line, line, tokens=8)
    first, last = proposal.seen
    assert first <= line <= last and 20 < last - first < 200
    assert proposal.text.count("\n") >= 600
    used = len(tiny[1]("".join(split_lines(text)[first - 1 : last]))["input_ids"])
    assert used > 0.9 * tiny[0].config.max_position_embeddings


def test_a_line_that_is_longer_than_the_model_can_see_is_left_out(tiny):
    text = f"x = {'1 + ' * 5000}0\ny = 1\nz = 2\n"
    proposal = proposed(tiny, text, 3, 3, tokens=4)
    assert proposal.seen == (2, 3) and proposal.text.startswith(text[: text.index("z")])


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (dict(first=0), ValueError, "first"),
        (dict(first=6, last=5), ValueError, "last"),
        (dict(last=10), ValueError, "text has 9 lines; lines 5-10"),
        (dict(tokens=0), ValueError, "tokens"),
        (dict(tokens="many"), ValueError, "tokens is 'many'; give a number, or \"auto\""),
        (dict(tokens=5000), ValueError, "a gap of 5000 tokens in text does not fit; the model has 1024"),
        (dict(text=TEXT + "# <mask:3>\n"), ValueError, "mask token as text near these lines"),
        (dict(max_new_tokens=8), ValueError, "max_new_tokens"),
        (dict(text="", first=1, last=1), ValueError, "text has 0 lines"),
    ],
)
def test_bad_input_is_named(tiny, change, error, reason):
    with pytest.raises(error, match=reason):
        proposed(tiny, **change)
