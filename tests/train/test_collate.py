"""A batch is what its examples say: padding trained or hidden, BOS, and cuts keyed by the example."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dllm_train import DiffusionCollator

END, BOS, IGNORED = 1, 2, -100
TOKENIZER = SimpleNamespace(eos_token_id=END, bos_token_id=BOS)
SFT = {"input_ids": [7, 8, 9, END], "labels": [IGNORED, 8, 9, END], "example_id": 5}


def examples_of(*lengths, **fields):
    return [
        {"input_ids": list(range(10, 10 + n)), "example_id": index, **fields}
        for index, n in enumerate(lengths)
    ]


def test_end_tokens_fill_the_last_block_and_are_trained():
    batch = DiffusionCollator(TOKENIZER, block_size=4)([*examples_of(5), SFT])
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 13, 14, END, END, END],
        [7, 8, 9, END, END, END, END, END],
    ]
    assert batch["labels"].tolist() == [
        [10, 11, 12, 13, 14, END, END, END],
        [IGNORED, 8, 9, END, IGNORED, IGNORED, IGNORED, IGNORED],
    ]
    assert batch["lengths"].tolist() == [8, 4]
    assert batch["example_ids"].tolist() == [0, 5]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_end_tokens_fill_the_row_and_are_trained_without_blocks():
    batch = DiffusionCollator(TOKENIZER)([*examples_of(6), SFT])
    assert batch["labels"].tolist() == [[10, 11, 12, 13, 14, 15], [IGNORED, 8, 9, END, END, END]]
    assert "lengths" not in batch


@pytest.mark.parametrize("block_size", [None, 4])
def test_untrained_padding_is_hidden(block_size):
    batch = DiffusionCollator(TOKENIZER, block_size=block_size, train_padding=False)([*examples_of(6), SFT])
    assert batch["input_ids"].shape == (2, 8 if block_size else 6)
    assert batch["lengths"].tolist() == [6, 4]
    hidden = torch.arange(batch["input_ids"].shape[1]) >= batch["lengths"][:, None]
    assert (batch["labels"][hidden] == IGNORED).all()


def test_end_tokens_of_an_example_are_never_taken_for_padding():
    example = {"input_ids": [END, 5, END, END], "example_id": 0}
    batch = DiffusionCollator(TOKENIZER, train_padding=False)([example])
    assert batch["labels"].tolist() == [[END, 5, END, END]]
    assert "lengths" not in batch


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.sampled_from([None, 1, 3, 8]),
    st.booleans(),
)
def test_every_token_is_kept_and_blocks_are_whole(lengths, block_size, train_padding):
    collator = DiffusionCollator(TOKENIZER, block_size=block_size, train_padding=train_padding)
    batch = collator(examples_of(*lengths))
    rows, width = batch["input_ids"].shape
    assert rows == len(lengths)
    assert width % (block_size or 1) == 0
    assert width - max(lengths) < (block_size or 1)
    visible = batch.get("lengths", torch.full((rows,), width)).tolist()
    for row, n in enumerate(lengths):
        assert batch["input_ids"][row, :n].tolist() == list(range(10, 10 + n))
        assert (batch["input_ids"][row, n:] == END).all()
        trained = int((batch["labels"][row] != IGNORED).sum())
        block_end = -(-n // block_size) * block_size if block_size else width
        assert trained == visible[row] == (block_end if train_padding else n)


def test_with_blocks_or_a_fixed_length_a_row_does_not_depend_on_its_batch():
    for collator in (DiffusionCollator(TOKENIZER, block_size=4), DiffusionCollator(TOKENIZER, pad_to=12)):
        examples = examples_of(3, 11, 6)
        together = collator(examples)
        for row, example in enumerate(examples):
            alone = collator([example])
            width = alone["labels"].shape[1]
            assert together["labels"][row, :width].equal(alone["labels"][0])
            assert (together["labels"][row, width:] == IGNORED).all()


def test_bos_is_put_before_rows_that_lack_it_and_is_not_trained():
    rows = [{"input_ids": [BOS, 5], "example_id": 0}, {"input_ids": [5, 6], "example_id": 1}]
    batch = DiffusionCollator(TOKENIZER, insert_bos=True, train_padding=False)(rows)
    assert batch["input_ids"].tolist() == [[BOS, 5, END], [BOS, 5, 6]]
    assert batch["labels"].tolist() == [[BOS, 5, IGNORED], [IGNORED, 5, 6]]


def test_padding_of_packed_rows_is_in_no_document():
    rows = [
        {"input_ids": [5, END, 6, 7, END], "document_lengths": [2, 3], "example_id": 0},
        {"input_ids": [8, 9], "example_id": 1},
    ]
    batch = DiffusionCollator(TOKENIZER, block_size=4)(rows)
    assert batch["document_lengths"].tolist() == [[2, 3], [4, 0]]
    assert batch["labels"].tolist() == [
        [5, END, 6, 7, END, IGNORED, IGNORED, IGNORED],
        [8, 9, END, END, IGNORED, IGNORED, IGNORED, IGNORED],
    ]
    assert "lengths" not in batch


def test_bos_begins_every_packed_document():
    row = {"input_ids": [5, END, BOS, 7, END], "document_lengths": [2, 3], "example_id": 0}
    batch = DiffusionCollator(TOKENIZER, insert_bos=True)([row])
    assert batch["input_ids"].tolist() == [[BOS, 5, END, BOS, 7, END]]
    assert batch["document_lengths"].tolist() == [[3, 3]]


def test_random_truncation_cuts_the_stated_share_to_uniform_lengths():
    collator = DiffusionCollator(TOKENIZER, random_truncation=0.25)
    kept = [
        int((collator([{"input_ids": [9] * 10, "example_id": i}])["labels"] != IGNORED).sum())
        for i in range(4000)
    ]
    counts = np.bincount(kept, minlength=11)
    assert counts[0] == 0
    # A truncated row keeps each of 1..10 with probability 1/10, so 100 rows each; sigma is 10.
    assert all(abs(count - 100) < 50 for count in counts[1:10])
    assert abs(counts[10] - 3100) < 150


def test_a_cut_row_is_not_taught_to_end_there():
    collator = DiffusionCollator(TOKENIZER, block_size=4, random_truncation=1.0)
    batch = collator([{"input_ids": [9] * 9, "example_id": i} for i in range(200)])
    kept = (batch["labels"] == 9).sum(1)
    assert set(kept.tolist()) == {*range(1, 10)}
    whole_rows_ended = torch.where(kept == 9, 12, kept)
    assert batch["lengths"].equal(whole_rows_ended)
    assert (batch["labels"] != IGNORED).sum(1).equal(whole_rows_ended)


def test_a_crop_shortens_the_response_and_keeps_the_prompt():
    example = {"input_ids": list(range(10, 20)), "labels": [IGNORED] * 4 + list(range(14, 20))}
    collator = DiffusionCollator(TOKENIZER, response_crop=1.0)
    kept = [int((collator([{**example, "example_id": i}])["labels"] != IGNORED).sum()) for i in range(200)]
    assert set(kept) == {1, 2, 3, 4, 5}
    batch = collator([{**example, "example_id": 0}])
    assert batch["input_ids"][0, : 4 + kept[0]].tolist() == example["input_ids"][: 4 + kept[0]]


def test_a_batch_crop_cuts_every_response_to_the_length_of_one():
    examples = [
        {"input_ids": [7] * 3 + [9] * n, "labels": [IGNORED] * 3 + [9] * n, "example_id": n}
        for n in (2, 5, 9)
    ]
    collator = DiffusionCollator(TOKENIZER, batch_response_crop=True, train_padding=False)
    seen = set()
    for first in range(30):
        batch = collator([{**examples[0], "example_id": first}, *examples[1:]])
        kept = (batch["labels"] != IGNORED).sum(1).tolist()
        limit = max(kept)
        assert kept == [min(n, limit) for n in (2, 5, 9)]
        seen.add(limit)
    assert seen == {2, 5, 9}


def test_truncation_keeps_a_trained_token_and_cuts_documents():
    collator = DiffusionCollator(TOKENIZER, random_truncation=1.0)
    for i in range(30):
        batch = collator([{**SFT, "example_id": i}])
        assert (batch["labels"] != IGNORED).any()
        packed = {"input_ids": [5] * 9, "document_lengths": [4, 5], "example_id": i}
        batch = collator([packed])
        assert batch["document_lengths"].sum() == (batch["labels"] != IGNORED).sum()
        assert batch["document_lengths"][0, 0] <= 4


def test_evaluation_sees_whole_rows():
    collator = DiffusionCollator(
        TOKENIZER, block_size=4, random_truncation=1.0, response_crop=1.0, batch_response_crop=True
    )
    whole, examples = DiffusionCollator(TOKENIZER, block_size=4), [SFT, *examples_of(9, 5)]
    assert all(
        collator.without_cuts()(examples)[key].equal(tensor) for key, tensor in whole(examples).items()
    )
    assert not collator(examples)["labels"].equal(whole(examples)["labels"])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_equal_for_any_number_of_workers(workers):
    collator = DiffusionCollator(TOKENIZER, block_size=4, random_truncation=0.5, response_crop=0.5, seed=3)
    examples = examples_of(*range(3, 15))
    expected = [collator(examples[i : i + 4]) for i in range(0, len(examples), 4)]
    loader = DataLoader(examples, batch_size=4, collate_fn=collator, num_workers=workers)
    for batch, reference in zip(loader, expected, strict=True):
        assert batch.keys() == reference.keys()
        assert all(batch[key].equal(reference[key]) for key in batch)


def test_it_is_pickled_without_its_tokenizer():
    collator = DiffusionCollator(TOKENIZER, block_size=4, random_truncation=0.5)
    copy = pickle.loads(pickle.dumps(collator))
    assert "SimpleNamespace" not in repr(vars(copy))
    examples = examples_of(3, 9)
    assert all(copy(examples)[key].equal(tensor) for key, tensor in collator(examples).items())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"example_id": 3}, r"example 0 of the batch has no 'input_ids'; its fields: \['example_id'\]"),
        ({"input_ids": [4]}, "no 'example_id', the number that noise is keyed by"),
        ({"input_ids": [], "example_id": 3}, "input_ids of example 3 is empty"),
        ({"input_ids": [4, -1], "example_id": 3}, "example 3 has -1; expected token ids >= 0"),
        ({"input_ids": [4], "labels": [4, 5], "example_id": 3}, "labels of example 3 has 2 entries"),
        ({"input_ids": [4, 5], "labels": [4, 6], "example_id": 3}, "6 at position 1, where input_ids has 5"),
        ({"input_ids": [4, 5], "document_lengths": [1], "example_id": 3}, "sum to its 2 tokens"),
        ({"input_ids": [4, 5], "document_lengths": [2, 0], "example_id": 3}, "expected positive numbers"),
        ({"input_ids": [4, 5], "attention_mask": [1, 0], "example_id": 3}, "attention_mask of example 3"),
        ({"input_ids": [[4]], "example_id": 3}, r"shape \[1, 1\]; expected \[n\]"),
    ],
)  # fmt: skip
def test_wrong_examples_are_refused_by_name(example, message):
    with pytest.raises(ValueError, match=message):
        DiffusionCollator(TOKENIZER)([example])


def test_ids_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="input_ids of example 3 has float64 entries; expected integers"):
        DiffusionCollator(TOKENIZER)([{"input_ids": [0.5], "example_id": 3}])


def test_wrong_options_are_refused_by_name():
    with pytest.raises(ValueError, match="pad_to is 10; expected a multiple of block_size, 4"):
        DiffusionCollator(TOKENIZER, block_size=4, pad_to=10)
    with pytest.raises(ValueError, match=r"random_truncation is 1.5; expected a probability, 0..1"):
        DiffusionCollator(TOKENIZER, random_truncation=1.5)
    with pytest.raises(ValueError, match="block_size must lie in 1"):
        DiffusionCollator(TOKENIZER, block_size=0)
    with pytest.raises(ValueError, match="has no eos_token_id; give end_id"):
        DiffusionCollator(SimpleNamespace())
    with pytest.raises(ValueError, match="has no bos_token_id; give bos_id"):
        DiffusionCollator(SimpleNamespace(eos_token_id=0), insert_bos=True)
    with pytest.raises(ValueError, match="pad_to is 4, but example 0 has 5 tokens"):
        DiffusionCollator(TOKENIZER, pad_to=4)(examples_of(5))
    with pytest.raises(ValueError, match="response_crop cuts rows of one document; example 0"):
        DiffusionCollator(TOKENIZER, response_crop=0.1)(examples_of(5, document_lengths=[2, 3]))
    with pytest.raises(ValueError, match="examples is empty"):
        DiffusionCollator(TOKENIZER)([])
