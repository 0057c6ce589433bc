"""Canvas control: log-probabilities of what is written, allowed tokens, drafts that may change."""

import math

import pytest
import torch

import dllm_kernels as dk
from tests.sampling.test_output import Letters, writer
from tests.sampling.tiny_models import EOS, MASK, VOCABULARY, prompts_of, tiny_model

EDIT = dict(threshold=0.5, edit_threshold=0.5)


def canvas(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


# ---- log-probabilities ------------------------------------------------------------------------------------


def replayed_logprobs(model, output, barred=()) -> torch.Tensor:
    """What each written token's log-probability was, from a plain forward over each step's canvas."""
    expected = torch.zeros(output.sequences.shape)
    for row, steps in enumerate(output.unmask_step):
        for step in range(int(steps.max()) + 1):
            ids = output.sequences[row].masked_fill(steps >= step, MASK)[None]
            logits = model(ids).logits[0].double()
            logits[:, [MASK, *barred]] = -torch.inf
            written = steps == step
            scores = logits.log_softmax(-1)[written, output.sequences[row, written]]
            expected[row, written] = scores.float()
    return expected


@pytest.mark.parametrize("options", [dict(), dict(threshold=0.5), dict(temperature=0.7, seed=3)])
@pytest.mark.parametrize("shift", [False, True])
def test_log_probabilities_are_those_of_the_step_that_wrote_the_token(options, shift):
    model = tiny_model(attention="bidirectional")
    output = dk.sample(
        model, prompts_of(5, 9), max_new_tokens=12, logprobs=0, stop_on_eos=False, shift=False, **options
    )
    if shift:
        output = dk.sample(
            model, prompts_of(5), max_new_tokens=12, logprobs=0, stop_on_eos=False, shift=True, **options
        )
        steps, ids = output.unmask_step[0], output.sequences[0]
        for position in (steps >= 0).nonzero()[:, 0].tolist():
            logits = model(ids.masked_fill(steps >= steps[position], MASK)[None]).logits[0, position - 1]
            logits[MASK] = -torch.inf
            expected = logits.log_softmax(-1)[ids[position]]
            assert float(output.logprobs[0, position]) == pytest.approx(float(expected), abs=1e-4)
        return
    alone = [  # rows of a batch are padded, a plain model call is not
        dk.sample(model, [row], row_ids=[number], max_new_tokens=12, logprobs=0, stop_on_eos=False, **options)
        for number, row in enumerate(prompts_of(5, 9))
    ]
    for row, one in enumerate(alone):
        expected = replayed_logprobs(model, one)
        torch.testing.assert_close(one.logprobs, expected, rtol=0, atol=1e-4)
        width = one.sequences.shape[1]
        torch.testing.assert_close(output.logprobs[row, :width], one.logprobs[0], rtol=0, atol=1e-4)
    assert output.top_logprobs is None


def test_the_block_cache_gives_the_log_probabilities_of_no_cache():
    model = tiny_model()
    cached, plain = (
        dk.sample(model, prompts_of(5, 9, 3), max_new_tokens=16, cache=cache, logprobs=3, max_batch=2)
        for cache in ("block", "none")
    )
    assert cached.sequences.equal(plain.sequences)
    torch.testing.assert_close(cached.logprobs, plain.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(cached.top_logprobs.logprobs, plain.top_logprobs.logprobs, rtol=0, atol=1e-4)


def test_top_log_probabilities_hold_the_likeliest_tokens_and_nothing_where_text_was_given():
    model = writer("abcdef", sure={3: 2.0})
    output = dk.sample(model, ["ab"], tokenizer=Letters(), max_new_tokens=4, logprobs=2)
    tokens, logprobs = output.top_logprobs
    assert tokens[0, :2].eq(-1).all() and logprobs[0, :2].eq(0).all() and output.logprobs[0, :2].eq(0).all()
    assert tokens[0, 2:, 0].tolist() == [2, 3, 4, 5]
    assert logprobs[..., 0].equal(output.logprobs)
    others = VOCABULARY - 2  # of the vocabulary without the token and the mask, all of logit 0
    p = math.exp(2) / (math.exp(2) + others)
    assert float(logprobs[0, 3, 0]) == pytest.approx(math.log(p), abs=1e-5)
    assert float(logprobs[0, 3, 1]) == pytest.approx(math.log((1 - p) / others), abs=1e-5)


def test_log_probabilities_behind_an_end_token_are_zero_and_are_not_there_unless_asked_for():
    model = writer("abc.ef")
    output = dk.sample(model, ["ab"], tokenizer=Letters(), max_new_tokens=4, logprobs=1)
    assert (output.logprobs[0] != 0).tolist() == [False, False, True, True, False, False]
    assert output.top_logprobs.tokens[0, 4:].eq(-1).all()
    assert dk.sample(model, ["ab"], tokenizer=Letters(), max_new_tokens=4).logprobs is None


def test_more_log_probabilities_than_tokens_are_all_of_them():
    output = dk.sample(tiny_model(), prompts_of(4), max_new_tokens=4, logprobs=1000)
    total = output.top_logprobs.logprobs[0, 4:].double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_a_watcher_is_told_the_probabilities_of_the_tokens():
    rounds = []
    output = dk.sample(tiny_model(), prompts_of(4, 6), max_new_tokens=8, logprobs=0, on_round=rounds.append)
    seen = 0
    for event in rounds:
        expected = output.logprobs[event.rows, event.positions].exp()
        torch.testing.assert_close(event.probabilities, expected, rtol=0, atol=1e-5)
        seen += len(event.rows)
    assert seen == int((output.unmask_step >= 0).sum())


# ---- allowed tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(threshold=0.3), dict(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_only_allowed_tokens_are_written(attention, options):
    rows = [[*row, *[MASK] * 10] for row in prompts_of(5, 7)]
    allowed = [{6: [3, 5], 9: [7]}, None]
    model = tiny_model(attention=attention)
    free = dk.infill(model, rows, **options)
    output = dk.infill(model, rows, allowed=allowed, logprobs=0, **options)
    assert int(output.sequences[0, 6]) in (3, 5) and int(output.sequences[0, 9]) == 7
    assert float(output.logprobs[0, 9]) == 0.0
    assert output.sequences[1].equal(free.sequences[1])


def test_the_best_of_the_allowed_tokens_is_written_with_its_share_of_their_probability():
    model = writer("abcdef", sure={2: 3.0})
    output = dk.infill(model, [canvas("ab?def")], allowed={2: [1, 2]}, logprobs=2, mask_id=MASK)
    assert output.sequences[0].tolist() == canvas("abcdef")
    p = math.exp(3) / (math.exp(3) + 1)
    assert float(output.logprobs[0, 2]) == pytest.approx(math.log(p), abs=1e-5)
    assert output.top_logprobs.tokens[0, 2].tolist() == [2, 1]


def test_one_set_holds_for_every_mask_and_may_be_texts():
    model = writer("abcdef")
    for allowed in ([0, 1], ["a", "b"], torch.tensor([0, 1])):
        output = dk.infill(model, ["a??d"], tokenizer=Letters(), allowed=allowed)
        assert output.texts[0] in ("aaad", "aabd", "abad", "abbd")


def test_a_rule_that_compares_steps_takes_allowed_tokens():
    model = tiny_model()
    rows = [[*row, *[MASK] * 8] for row in prompts_of(5)]
    options = dict(threshold=0.5, kl_threshold=0.1)
    output = dk.infill(model, rows, allowed=[4, 5, 6], **options)
    assert set(output.sequences[0, 5:].tolist()) <= {4, 5, 6}


@pytest.mark.parametrize(
    "allowed, error, says",
    [
        ("ab", TypeError, "allowed is a str; give token ids"),
        ({0: [1]}, ValueError, "position 0, which holds no mask"),
        ({9: [1]}, ValueError, r"a position in allowed must lie in 0\.\.3, got 9"),
        ({1: []}, ValueError, r"allowed\[1\] is empty"),
        ({1: [MASK]}, ValueError, "leave none"),
        ({1: [VOCABULARY]}, ValueError, "allowed holds 120; the vocabulary is 0..119"),
        ({1: [-1]}, ValueError, r"an id in allowed\[1\] must lie in 0"),
        ({1: [1.5]}, TypeError, r"an id in allowed\[1\] must be an integer"),
        ({1: ["xy"]}, ValueError, "which is 2 tokens; a position holds one"),
        ({1: 3}, TypeError, r"allowed\[1\] is a int"),
        ([{1: [1]}, None], ValueError, "allowed has 2 entries for 1 canvases"),
    ],
)
def test_allowed_tokens_that_make_no_sense_are_refused(allowed, error, says):
    with pytest.raises(error, match=says):
        dk.infill(writer("abcd"), ["a??d"], tokenizer=Letters(), allowed=allowed)


def test_a_set_that_suppressed_tokens_leave_empty_is_refused():
    with pytest.raises(ValueError, match="leave none"):
        dk.infill(writer("abcd"), [canvas("a??d")], allowed=[2], suppress_tokens=(2,), mask_id=MASK)


# ---- drafts -----------------------------------------------------------------------------------------------


def test_a_draft_is_corrected_and_pinned_tokens_stay():
    model = writer("abcdef")
    start = canvas("axcxe?")
    free = dk.infill(model, [start], pinned=False, mask_id=MASK, **EDIT)
    assert free.sequences[0].tolist() == canvas("abcdef")
    pinned = [[True, True, True, False, True, False]]
    held = dk.infill(model, [start], pinned=pinned, mask_id=MASK, **EDIT)
    assert held.sequences[0].tolist() == canvas("axcdef")
    assert held.unmask_step[0].tolist() == [-1, -1, -1, 0, -1, 0]
    tensor = dk.infill(model, [start], pinned=torch.tensor(pinned), mask_id=MASK, **EDIT)
    assert tensor.sequences.equal(held.sequences)


def test_a_draft_without_any_mask_is_looked_at_block_by_block():
    model = writer("abcdefgh")
    output = dk.infill(
        model, [canvas("abxdefgx")], pinned=False, mask_id=MASK, block_size=4, logprobs=0, **EDIT
    )
    assert output.sequences[0].tolist() == canvas("abcdefgh")
    assert output.unmask_step[0].tolist() == [-1, -1, 0, -1, -1, -1, -1, 2]
    assert (output.logprobs[0] != 0).tolist() == (output.unmask_step[0] >= 0).tolist()


@pytest.mark.parametrize("cache", ["block", "none"])
def test_a_draft_of_a_block_causal_model_gives_the_same_with_and_without_its_cache(cache):
    model = tiny_model()
    rows = prompts_of(13, 21)
    output = dk.infill(model, rows, pinned=False, cache=cache, threshold=0.3, edit_threshold=0.3)
    alone = dk.infill(model, rows[:1], pinned=False, cache="none", threshold=0.3, edit_threshold=0.3)
    assert output.sequences[0, :13].equal(alone.sequences[0])
    assert not output.sequences[0, :13].equal(torch.tensor(rows[0]))


def test_a_draft_that_nothing_changes_costs_one_forward_a_block():
    output = dk.infill(writer("abcd"), [canvas("abcd")], pinned=False, mask_id=MASK, block_size=4, **EDIT)
    assert (output.forwards, output.lengths.tolist()) == (1, [0])


def test_a_draft_that_stays_keeps_its_special_tokens():
    model, tokenizer = dk.load("tiny-python", attention="bidirectional")
    end = tokenizer.eos_token
    (text,) = dk.infill(
        model, f"a{end} <mask:1> b", tokenizer=tokenizer, pinned=False, threshold=0.5, edit_threshold=1.0
    ).texts
    assert end and text.startswith(f"a{end}") and text.endswith(" b")


@pytest.mark.parametrize(
    "pinned, options, error, says",
    [
        (False, {}, ValueError, "the rule 'quota' never does"),
        (False, dict(threshold=0.9), ValueError, "the rule 'threshold' never does"),
        ("yes", EDIT, TypeError, "pinned is a str"),
        ([[True]], EDIT, ValueError, r"pinned\[0\] has 1 entries; the canvas has 4 tokens"),
        ([[1, 0, 1, 1]], EDIT, TypeError, r"pinned\[0\] is a list"),
        ([], EDIT, ValueError, "pinned has 0 entries for 1 canvases"),
        (torch.ones(1, 4), EDIT, TypeError, "pinned is a torch.float32 Tensor"),
        (torch.ones(1, 3, dtype=torch.bool), EDIT, ValueError, r"pinned is \[1, 3\] for canvases \[1, 4\]"),
    ],
)
def test_pinned_positions_that_make_no_sense_are_refused(pinned, options, error, says):
    with pytest.raises(error, match=says):
        dk.infill(writer("abcd"), [canvas("abcd")], pinned=pinned, mask_id=MASK, **options)


def test_everything_pinned_is_as_before_under_any_rule():
    model, start = writer("abcd"), canvas("a?xd")
    for pinned in (True, [[True] * 4], torch.ones(1, 4, dtype=torch.bool)):
        output = dk.infill(model, [start], pinned=pinned, mask_id=MASK, eos_ids=(EOS,))
        assert output.sequences[0].tolist() == canvas("abxd")
