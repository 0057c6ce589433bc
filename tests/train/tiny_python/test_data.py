"""Corpus, split, and rows that depend on their index only."""

import numpy as np
import pytest

from dllm_train.recipes.tiny_python import arithmetic, data
from dllm_train.recipes.tiny_python.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def documents(source_folder):
    return data.collect_sources(source_folder)


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer((d.text for d in documents), vocab_size=400)


def test_split_is_disjoint_complete_and_independent_of_other_files(documents):
    train, held_out = data.split(documents, one_in=5)
    assert {d.path for d in train}.isdisjoint(d.path for d in held_out)
    assert {d.text for d in train}.isdisjoint(d.text for d in held_out)
    assert len(train) + len(held_out) == len(documents) == 40
    assert len(held_out) > 2
    assert data.split(documents[::2], one_in=5)[1] == [d for d in documents[::2] if d in held_out]


def test_a_copy_of_a_held_out_document_is_not_trained_on(documents):
    _, held_out = data.split(documents, one_in=5)
    copies = [data.Document(f"copies/{i}.py", held_out[0].text) for i in range(20)]
    train, _ = data.split([*documents, *copies], one_in=5)
    assert held_out[0].text not in {d.text for d in train}


def test_tests_and_generated_tables_of_the_standard_library_are_left_out():
    paths = {d.path for d in data.collect_sources()}
    assert {"argparse.py", "json/decoder.py"} <= paths
    assert not [p for p in paths if p.startswith(("test/", "idlelib/", "encodings/cp"))]
    assert not [p for p in paths if "site-packages" in p]


def test_no_documents_are_refused(tokenizer):
    with pytest.raises(ValueError, match="documents"):
        data.encode_documents([], tokenizer)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="root"):
        data.collect_sources(tmp_path / "absent")


def test_documents_end_with_the_end_token(documents, tokenizer):
    ids = data.encode_documents(documents[:3], tokenizer)
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    assert [tokenizer.decode(row[:-1]) for row in ids] == [d.text for d in documents[:3]]


def test_rows_depend_on_seed_and_index_only(documents, tokenizer):
    encoded = data.encode_documents(documents, tokenizer)
    rows, again, other = (data.Rows(encoded, tokenizer, seed=s) for s in (1, 1, 2))
    batch = rows.batch(5, 6, 64)
    assert batch.shape == (6, 64)
    assert batch.dtype == np.int64
    assert np.array_equal(batch[2:4], again.batch(7, 2, 64))
    assert not np.array_equal(batch, other.batch(5, 6, 64))


def test_rows_begin_at_line_starts_and_hold_the_wanted_share_of_arithmetic(documents, tokenizer):
    encoded = data.encode_documents(documents, tokenizer)
    code = data.Rows(encoded, tokenizer, arithmetic_share=0.0).batch(0, 50, 64)
    assert all(tokenizer.decode(row[:2]).startswith(("def", "    ", "\n")) for row in code)
    mixed = data.Rows(encoded, tokenizer, arithmetic_share=0.2).batch(0, 600, 256)
    first_of_code = np.isin(mixed, tokenizer("def value", add_special_tokens=False)["input_ids"][0])
    arithmetic_tokens = sum(int(np.argmax(row)) if row.any() else len(row) for row in first_of_code)
    assert 0.1 < arithmetic_tokens / mixed.size < 0.3


def test_held_out_pairs_are_symmetric_a_tenth_and_never_in_a_document():
    held_out = set(arithmetic.held_out_pairs())
    assert all((b, a) in held_out for a, b in held_out)
    assert 0.08 < len(held_out) / 90**2 < 0.13
    rng = np.random.default_rng(0)
    text = "".join(arithmetic.document(rng) for _ in range(2000))
    assert not any(arithmetic.line(a, b) in text for a, b in held_out if a >= 10 and b >= 10)


def test_arithmetic_documents_are_true_python():
    rng = np.random.default_rng(1)
    for _ in range(50):
        text = arithmetic.document(rng)
        assert 1 <= text.count("\n") <= arithmetic.MAX_LINES
        exec(text)


def test_a_line_continues_its_prompt():
    assert arithmetic.line(37, 85) == "assert 37 + 85 == 122\n"
    assert arithmetic.line(37, 85).startswith(arithmetic.prompt(37, 85))
