"""The tokenizer loses nothing and never joins digits, lines or indentations."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dllm_train.recipes.tiny_python.tokenizer import newline_ids, train_tokenizer

TEXTS = [
    "def f(x):\n    return x + 10  # ten\n\n\nclass A:\n\tvalue = 'é'\n" * 20,
    "assert 37 + 85 == 122\n" * 20,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocab_size=400).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


@given(st.text() | st.text(alphabet="ab _(=:#'\n\t\r 0123456789½é٣"))
@example("    x = 1\n\n\n\n        y\r\n")
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@given(st.text(alphabet="ab _(=:#\n\t 0123456789"))
def test_digits_newlines_and_indentations_are_tokens_of_their_own(tokenizer, text):
    found = pieces(tokenizer, text)
    assert "".join(found) == text
    offset = 0
    for piece in found:
        line_start = offset == 0 or text[offset - 1] == "\n"
        assert not re.search(r"\d.|.\d", piece, re.DOTALL)
        assert "\n" not in piece or set(piece) == {"\n"}
        if line_start and piece[0] in " \t":
            assert not piece.strip()
        offset += len(piece)


def test_a_blank_sticks_to_words_and_signs_but_not_to_digits(tokenizer):
    assert pieces(tokenizer, "assert 37 + 85 == 122\n") == [
        *("assert", " ", "3", "7", " +", " ", "8", "5", " ==", " ", "1", "2", "2", "\n")
    ]


def test_special_tokens_stand_last_and_are_set(tokenizer):
    size = len(tokenizer)
    special = (tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id)
    assert special == (size - 3, size - 2, size - 1)
    assert tokenizer.convert_ids_to_tokens(special) == ["<|endoftext|>", "<|mask|>", "<|pad|>"]


def test_newline_ids_are_the_tokens_that_begin_with_a_newline(tokenizer):
    expected = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).startswith("\n")]
    assert newline_ids(tokenizer) == expected
    assert len(expected) > 1


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(TEXTS, vocab_size=200)
