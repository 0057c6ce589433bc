"""What SampleOutput says of a run, worked out by hand on models that write what they are told."""

from dataclasses import replace

import pytest
import torch

import dllm_kernels as dk
from tests.sampling.tiny_models import EOS, MASK, VOCABULARY, prompts_of, tiny_model


class Letters:
    """A tokenizer of one-letter tokens: "a" is 0; the mask token is written "?", the end token "."."""

    mask_token_id, eos_token_id = MASK, EOS

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [{"?": MASK, ".": EOS}.get(letter, ord(letter) - 97) for letter in text]}

    def decode(self, ids, skip_special_tokens=False):
        special = {} if skip_special_tokens else {MASK: "?", EOS: "."}
        return "".join(chr(int(i) + 97) if i < 26 else special.get(int(i), "") for i in ids)


def writer(text: str, sure: dict[int, float] | None = None):
    """A model that writes `text[i]` at position i, surer the further left, or as `sure` says."""
    tokens = Letters()(text)["input_ids"]

    def model(ids):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        for position in range(ids.shape[1]):
            logits[:, position, tokens[position]] = (sure or {}).get(position, 20 - position / 10)
        return logits

    return model


def test_one_token_a_step():
    output = dk.sample(writer("abcdefgh"), ["ab"], tokenizer=Letters(), max_new_tokens=6, block_size=3)
    assert output.texts == ["cdefgh"]
    assert output.sequences.tolist() == [list(range(8))]
    assert output.lengths.tolist() == [6]
    assert output.unmask_step.tolist() == [[-1, -1, 0, 1, 2, 3, 4, 5]]
    assert (output.forwards, output.row_forwards.tolist(), output.tokens_per_forward) == (6, [6], 1.0)
    assert output.exact and output.history is None and output.filled is None


def test_a_row_ends_at_the_first_end_token_without_a_mask_before_it():
    """The end token at 4 is written first, and ends the row only when 2 and 3 stand."""
    model = writer("abcd.fgh", sure={4: 30})
    output = dk.sample(model, ["ab"], tokenizer=Letters(), max_new_tokens=6, block_size=8)
    assert output.texts == ["cd"]
    assert output.sequences.tolist() == [[0, 1, 2, 3, EOS, EOS, EOS, EOS]]
    assert output.unmask_step.tolist() == [[-1, -1, 1, 2, 0, -1, -1, -1]]
    assert output.lengths.tolist() == [2]
    assert (output.forwards, output.tokens_per_forward) == (3, 2 / 3)  # the end token does not count


def test_without_stop_on_eos_everything_is_written_and_the_tail_is_not_counted():
    model = writer("abcd.fgh")
    output = dk.sample(
        model,
        ["ab"],
        tokenizer=Letters(),
        max_new_tokens=6,
        block_size=3,
        stop_on_eos=False,
        steps_per_block=1,
    )
    assert output.sequences.tolist() == [[0, 1, 2, 3, EOS, 5, 6, 7]]
    assert output.texts == ["cd"] and output.lengths.tolist() == [2]
    assert (output.forwards, output.tokens_per_forward) == (2, 1.0)


def test_conversations_go_through_the_template():
    class Chat(Letters):
        chat_template = "given"

        def apply_chat_template(self, messages, **options):
            assert options["add_generation_prompt"] and options["tokenize"]
            return self("b".join(message["content"] for message in messages) + "b")["input_ids"]

    output = dk.sample(writer("abcdefgh"), "ac", tokenizer=Chat(), max_new_tokens=3, chat=True)
    assert output.sequences.tolist() == [[0, 2, 1, 3, 4, 5]] and output.texts == ["def"]
    for options, reason in (
        (dict(attention_mask=torch.ones(1, 2)), "attention_mask has no meaning with chat"),
        (dict(), "has no chat template"),
    ):
        tokenizer = Chat() if options else Letters()
        with pytest.raises(ValueError, match=reason):
            dk.sample(writer("abc"), "a", tokenizer=tokenizer, chat=True, **options)
    with pytest.raises(ValueError, match="chat has no meaning for infill"):
        dk.infill(writer("abc"), "a?", tokenizer=Chat(), chat=True)


def test_rows_of_unequal_length():
    output = dk.sample(
        writer("abcdefgh"), ["a", "abcd"], tokenizer=Letters(), max_new_tokens=3, steps=1, block_size=4
    )
    assert output.texts == ["bcd", "efg"]
    assert output.sequences.tolist() == [[0, 1, 2, 3, EOS, EOS, EOS], [0, 1, 2, 3, 4, 5, 6]]
    assert output.row_forwards.tolist() == [1, 1]


def test_tokens_per_forward_is_of_all_rows():
    """Positions 1 to 3 are written one by one: three forwards for the first row, four for the second."""
    model = writer("abcdefgh", sure={position: 0.0 for position in (1, 2, 3)})
    output = dk.sample(
        model, ["a", "ab"], tokenizer=Letters(), new_tokens=[3, 6], block_size=3, threshold=0.9
    )
    assert (output.lengths.tolist(), output.row_forwards.tolist()) == ([3, 6], [3, 4])
    assert output.tokens_per_forward == 9 / 7


def test_history_and_rounds_tell_the_same():
    rounds = []
    output = dk.sample(
        tiny_model(), prompts_of(3, 9), max_new_tokens=10, threshold=0.4, history=True, on_round=rounds.append
    )
    assert len(output.history) == len(rounds) + 1
    assert rounds[-1].forwards == output.forwards
    for before, after, event in zip(output.history, output.history[1:], rounds, strict=False):
        assert before.shape == after.shape == output.sequences.shape
        for row, position, token in zip(event.rows, event.positions, event.tokens, strict=True):
            assert before[row, position] == MASK and after[row, position] == token
        assert event.positions_of(0) == event.positions[event.rows == 0].tolist()
    assert torch.equal(output.history[-1], output.sequences)


def test_text_with_gaps():
    output = dk.infill(writer("abcdefgh"), "a<mask:2>d?f<mask:1>h", tokenizer=Letters(), block_size=4)
    assert output.texts == ["abcdefgh"]
    assert output.filled == [[(1, 3), (4, 5), (6, 7)]]
    assert output.lengths.tolist() == [4]
    assert output.unmask_step.tolist() == [[-1, 0, 1, -1, 2, -1, 3, -1]]


def test_a_canvas_without_gaps_costs_nothing():
    output = dk.infill(writer("abcdefgh"), ["abc", "a?c"], tokenizer=Letters())
    assert output.texts == ["abc", "abc"]
    assert output.row_forwards.tolist() == [0, 1] and output.filled == [[], [(1, 2)]]
    nothing = dk.infill(writer("abc"), ["abc"], tokenizer=Letters())
    assert (nothing.forwards, nothing.tokens_per_forward) == (0, 0.0)


def test_end_tokens_do_not_stop_infilling():
    output = dk.infill(writer("ab.def"), "a???ef", tokenizer=Letters(), block_size=2)
    assert output.sequences.tolist() == [[0, 1, EOS, 3, 4, 5]]


def test_the_checkpoints_block_size_holds_unless_told_otherwise():
    model = tiny_model(block_size=4)
    steps = [
        dk.sample(model, [[1]], max_new_tokens=11, steps_per_block=1, **options).forwards
        for options in (
            dict(),
            dict(block_size=12),
            dict(config=dk.SampleConfig(block_size=6, max_new_tokens=11)),
        )
    ]
    assert steps == [3, 1, 2]


def test_the_prompt_and_finished_blocks_cost_no_forward_of_their_own():
    output = dk.sample(
        tiny_model(), prompts_of(70), max_new_tokens=26, block_size=8, steps_per_block=2, stop_on_eos=False
    )
    blocks = 4  # 70..95 lies in blocks 8..11
    assert output.forwards == 2 * blocks


@pytest.mark.parametrize("name", ["llada", "fast_dllm", "dream", "bd3lm", "llada2"])
def test_presets_sample(name):
    """With a shorter completion; each on a model of its own kind of attention."""
    config = replace(dk.SampleConfig.preset(name), max_new_tokens=20)
    attention = "block_causal" if name in ("bd3lm", "llada2") else "bidirectional"
    output = dk.sample(tiny_model(attention=attention), [[1, 2, 3]], config=config)
    assert not (output.sequences == MASK).any() and output.exact == (name != "fast_dllm")


def test_unknown_preset():
    with pytest.raises(ValueError, match="allowed: llada, fast_dllm, dream, bd3lm, llada2"):
        dk.SampleConfig.preset("best")
