"""Text with gaps, by every kind of tokenizer: what is given comes back, and the model sees all of it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_kernels as dk
from dllm_kernels.models.text import added_text
from dllm_kernels.sampling.prompts import gapped_text
from tests.sampling.tokenizer_zoo import LOSSLESS, TOKENIZERS, tokenizer_of

every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
PIECES = [
    "the", "cat", " ", "  ", "\n", "\r\n", "\r", "\t", "(", ")", "return", "rn y", "x = 1", ".", " on", "on ",
    "'", "A", "é", "e\u0301", "ß", "日本", "\u3000", "\u200b", "\ufeff", "\x00", "😀", "🏽", "<s>",
    "👩\u200d👧", "[SEP]",
]  # fmt: skip
piece = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
gapped = st.tuples(piece, st.lists(st.tuples(st.integers(0, 3), piece), max_size=3))


def read(kind: str, text: str):
    tokenizer = tokenizer_of(kind)
    return gapped_text("canvases[0]", text, tokenizer, tokenizer.mask_token_id)


def filled(text, tokens) -> str:
    """`text` with `tokens` in its gaps, in turn."""
    tokens, mask = iter(tokens), text.tokenizer.mask_token_id
    return text.completed([next(tokens) if token == mask else token for token in text.ids])


@every_tokenizer
@settings(max_examples=25, deadline=None)
@given(sides=gapped, seed=st.integers(0, 2**16))
def test_what_is_given_comes_back(kind, sides, seed):
    first, others = sides
    text = read(kind, first + "".join(f"<mask:{length}>{given}" for length, given in others))
    tokenizer, mask = text.tokenizer, text.tokenizer.mask_token_id
    assert text.ids.count(mask) == sum(length for length, _ in others)
    ordinary = sorted({*range(len(tokenizer))} - {*getattr(tokenizer, "all_special_ids", ()), mask})
    draw = random.Random(seed)
    completed = filled(text, [draw.choice(ordinary) for _ in text.ids])
    place = len(first)
    assert completed.startswith(first)
    for _, given_piece in others:
        place = completed.index(given_piece, place) + len(given_piece)
    assert completed.endswith(others[-1][1] if others else first)


@pytest.mark.parametrize(
    "kind",
    # The last two read no mask token in text, or put a second space behind it.
    [kind for kind in TOKENIZERS if kind not in ("a user's own", "Llama by a normalizer")],
)
def test_the_model_sees_the_whole_text(kind):
    """As the tokenizer itself reads it with its mask token in the gaps, special tokens at the ends."""
    tokenizer = tokenizer_of(kind)
    for text in ("the cat <mask:1> on the mat", "<mask:2> the cat sat <mask:1>", "x = 1", "the <mask:1> sat"):
        masked = text.replace("<mask:1>", tokenizer.mask_token).replace("<mask:2>", 2 * tokenizer.mask_token)
        assert read(kind, text).ids == tokenizer(masked)["input_ids"], text


@pytest.mark.parametrize("kind", LOSSLESS)
def test_gaps_inside_a_word_leave_no_space(kind):
    """The token in the gap decides alone: what stands around it is joined to it."""
    text = read(kind, "the cat retu<mask:1>rn y")
    letter = added_id(text.tokenizer, "t")
    assert filled(text, [letter]) == "the cat retutrn y"
    ids = [letter if token == text.tokenizer.mask_token_id else token for token in text.ids]
    decoded = text.tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.removeprefix(" ") == "the cat retutrn y"


def added_id(tokenizer, text: str) -> int:
    """The id of a token that adds `text` to a text before it."""
    before = tokenizer("the", add_special_tokens=False)["input_ids"]
    return next(i for i in range(len(tokenizer)) if added_text(tokenizer, before, [i]) == text)


@pytest.mark.parametrize(
    ("kind", "word", "recorded"),
    [
        ("GPT-2", "Ġsat", True),
        ("RoBERTa", "Ġsat", False),
        ("Llama", "▁sat", True),
        ("Metaspace always", "▁sat", True),
        ("XLM-R", "▁sat", False),
        ("ALBERT", "▁sat", False),
        ("BERT", "sat", False),
    ],
)
def test_a_given_space_is_doubled_only_where_the_ids_hold_it(kind, word, recorded):
    token = tokenizer_of(kind).convert_tokens_to_ids(word)
    assert filled(read(kind, "the cat<mask:1> on"), [token]) == "the cat sat on"
    expected = "the cat  sat on" if recorded else "the cat sat on"
    assert filled(read(kind, "the cat <mask:1> on"), [token]) == expected


def test_words_of_bert_are_parted_where_they_would_join():
    tokenizer = tokenizer_of("BERT")
    cat, comma = tokenizer.convert_tokens_to_ids(["cat", ","])
    assert filled(read("BERT", "The<mask:1>sat"), [cat]) == "The cat sat"
    assert filled(read("BERT", "The <mask:1> SAT"), [cat]) == "The cat SAT"
    assert filled(read("BERT", "f(<mask:1>)"), [cat]) == "f(cat)"
    assert filled(read("BERT", "cat<mask:1> mat"), [comma]) == "cat, mat"


def test_the_mask_token_of_roberta_takes_one_space():
    """A line end before it stays in what the model sees."""
    tokenizer = tokenizer_of("RoBERTa")
    tokens = tokenizer.convert_ids_to_tokens(read("RoBERTa", "the cat\n <mask:1> on").ids)
    assert tokens == ["<s>", "the", "Ġcat", "Ċ", "<mask>", "Ġon", "</s>"]
    word = tokenizer.convert_tokens_to_ids("Ġsat")
    assert filled(read("RoBERTa", "the cat <mask:1> on"), [word]) == "the cat sat on"
    assert filled(read("RoBERTa", "the cat\n<mask:1> on"), [word]) == "the cat\n sat on"


def test_mask_tokens_written_in_the_text_are_gaps():
    tokenizer = tokenizer_of("BERT")
    sat = tokenizer.convert_tokens_to_ids("sat")
    text = read("BERT", "The Cat [MASK] on [MASK]<mask:1>.")
    assert text.ids == tokenizer("The Cat [MASK] on [MASK][MASK].")["input_ids"]
    assert filled(text, [sat] * 3) == "The Cat sat on sat sat."


def test_a_character_split_by_a_gap_is_told_as_far_as_it_goes():
    text = read("Llama", "a <mask:2>😀")
    broken = text.tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>"])
    completed = filled(text, broken)
    assert completed.startswith("a ") and completed.endswith("😀") and "\ufffd" in completed


@pytest.mark.parametrize("kind", LOSSLESS)
def test_prompt_and_completion_join_to_the_whole(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(len(ids) + 1):
        start = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        assert start + added_text(tokenizer, ids[:cut], ids[cut:]) == whole


def test_the_completion_of_half_a_character_is_the_character():
    tokenizer = tokenizer_of("ByT5")
    ids = tokenizer("né", add_special_tokens=False)["input_ids"]
    assert added_text(tokenizer, ids[:2], ids[2:]) == "é"


def writes(tokens: list[int], vocabulary: int):
    """A model that writes tokens[i] at position i."""

    def model(ids):
        logits = torch.zeros(*ids.shape, vocabulary)
        for position in range(ids.shape[1]):
            logits[:, position, tokens[position % len(tokens)]] = 9
        return logits

    return model


def test_sampled_and_infilled_texts_keep_their_spaces():
    tokenizer = tokenizer_of("Metaspace first")
    sat = tokenizer.convert_tokens_to_ids("▁sat")
    model = writes([sat], len(tokenizer))
    assert dk.sample(model, "the cat", tokenizer=tokenizer, max_new_tokens=2).texts == [" sat sat"]
    assert dk.infill(model, "the cat<mask:1> on", tokenizer=tokenizer).texts == ["the cat sat on"]
    output = dk.infill(model, ["a\r\nb<mask:0>", "<mask:1>"], tokenizer=tokenizer)
    assert output.texts == ["a\r\nb", "sat"]
