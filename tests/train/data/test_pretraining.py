"""Pretraining rows: every token is in one row, at one place, in order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dllm_train import DiffusionCollator, Noise, mdlm_loss
from dllm_train.batches import NumberedStream
from dllm_train.data import load_pretraining_dataset
from dllm_train.data.pretraining import EncodeDocuments, Packer, pack_rows
from tests.sampling.tokenizer_zoo import tokenizer_of

END = 0
documents_of_ids = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)
TEXTS = ["the cat sat on the mat, and the dog sat too.", "def f(x): return y", "Öl für é 日本語", "x"] * 3


@given(documents_of_ids, st.integers(1, 9), st.booleans())
def test_every_token_is_in_one_row_in_order(documents, max_length, packing):
    rows = list(pack_rows(({"input_ids": ids} for ids in documents), max_length, packing))
    assert [token for row in rows for token in row["input_ids"]] == [t for ids in documents for t in ids]
    assert all(row["length"] == len(row["input_ids"]) == max_length for row in rows[:-1])
    assert all(0 < row["length"] == len(row["input_ids"]) <= max_length for row in rows[-1:])
    assert all(("document_lengths" in row) == packing for row in rows)


@given(documents_of_ids, st.integers(1, 9))
def test_document_lengths_cut_the_stream_where_documents_and_rows_end(documents, max_length):
    rows = list(pack_rows(({"input_ids": ids} for ids in documents), max_length))
    assert all(sum(row["document_lengths"]) == row["length"] for row in rows)
    assert all(n > 0 for row in rows for n in row["document_lengths"])
    borders, place = set(), 0
    for row in rows:
        for n in row["document_lengths"]:
            place += n
            borders.add(place)
    total = sum(map(len, documents))
    ends = {sum(map(len, documents[: i + 1])) for i in range(len(documents))} - {0}
    assert borders == ends | {*range(max_length, total + 1, max_length)}


@given(documents_of_ids, st.integers(1, 9))
def test_drop_tail_leaves_out_the_last_short_row_alone(documents, max_length):
    whole = list(pack_rows(({"input_ids": ids} for ids in documents), max_length))
    kept = list(pack_rows(({"input_ids": ids} for ids in documents), max_length, drop_tail=True))
    assert kept == [row for row in whole if row["length"] == max_length]


def test_a_packer_goes_on_from_its_state():
    first, whole = Packer(5), Packer(5)
    rows = list(whole.add([1, 2, 3])) + list(whole.add([4] * 9)) + list(whole.finish())
    resumed = list(first.add([1, 2, 3]))
    second = Packer(5)
    second.ids, second.document_lengths = first.ids, first.document_lengths
    assert resumed + list(second.add([4] * 9)) + list(second.finish()) == rows


@pytest.mark.parametrize("packing", [True, False])
def test_documents_end_with_the_end_token_and_decode_to_their_texts(write, tokenizer, packing):
    name = write("a.jsonl", [{"text": text} for text in TEXTS])
    rows = load_pretraining_dataset(name, tokenizer, max_length=16, packing=packing)["train"]
    ids = [token for row in rows for token in row["input_ids"]]
    assert tokenizer.decode(ids) == "".join(text + "<|endoftext|>" for text in TEXTS)
    assert rows.column_names == ["input_ids", "length", *["document_lengths"] * packing]


def test_bos_and_end_tokens_are_options_and_never_doubled(write, tokenizer):
    name = write("a.jsonl", [{"text": "<s>a"}, {"text": "b<|endoftext|>"}])

    def decoded(**options):
        rows = load_pretraining_dataset(name, tokenizer, max_length=64, **options)["train"]
        return tokenizer.decode(rows[0]["input_ids"])

    assert decoded() == "<s>a<|endoftext|>b<|endoftext|>"
    assert decoded(insert_bos=True) == "<s>a<|endoftext|><s>b<|endoftext|>"
    assert decoded(insert_eos=False) == "<s>ab<|endoftext|>"


def test_a_tokenizer_that_adds_bos_itself_adds_none():
    tokenizer = tokenizer_of("Llama with a first token")
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id
    for insert_bos in (False, True):
        encode = EncodeDocuments(tokenizer, "text", insert_bos=insert_bos, insert_eos=True)
        ids = encode({"text": ["the cat"]}, [0], "test")["input_ids"][0]
        assert ids.count(tokenizer.bos_token_id) == insert_bos


def test_processes_and_streaming_change_no_row(write, tokenizer):
    name = write("a.jsonl", [{"text": text} for text in TEXTS])
    rows = list(load_pretraining_dataset(name, tokenizer, max_length=16)["train"])
    assert list(load_pretraining_dataset(name, tokenizer, max_length=16, num_proc=3)["train"]) == rows
    streamed = load_pretraining_dataset(name, tokenizer, max_length=16, streaming=True)["train"]
    assert list(streamed) == rows
    for workers in (0, 2):
        loader = DataLoader(streamed, batch_size=None, num_workers=workers)
        assert [row["input_ids"] for row in loader] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("packing", [True, False])
def test_workers_of_the_trainer_read_every_row_of_a_stream_once(write, tokenizer, packing):
    names = [write(f"texts/{i}.jsonl", [{"text": text}]) for i, text in enumerate(TEXTS)]
    folder = names[0].replace("0.jsonl", "")
    rows = load_pretraining_dataset(folder, tokenizer, max_length=16, packing=packing)["train"]
    stream = load_pretraining_dataset(folder, tokenizer, max_length=16, packing=packing, streaming=True)
    shuffled = load_pretraining_dataset(
        folder, tokenizer, max_length=16, packing=packing, streaming=True, shuffle_buffer=4, seed=1
    )
    assert list(shuffled["train"]) != list(rows)
    for workers in (0, 2):
        numbered = NumberedStream(shuffled["train"], "train_dataset", batch_size=2)
        loader = DataLoader(numbered, batch_size=2, num_workers=workers, collate_fn=list)
        read = [example["input_ids"] for batch in loader for example in batch]
        assert read == [row["input_ids"] for row in shuffled["train"]]
    for workers in (0, 2):
        numbered = NumberedStream(stream["train"], "train_dataset", batch_size=2)
        loader = DataLoader(numbered, batch_size=2, num_workers=workers, collate_fn=list)
        read = [example for batch in loader for example in batch]
        assert [example["example_id"] for example in read] == [*range(len(rows))]
        assert [example["input_ids"] for example in read] == list(rows["input_ids"])


def test_packed_documents_have_the_loss_of_separate_ones(tiny_model):
    documents = [[5, 6, 7, END], [8, 9, END], [4, 4, 4, 4, END]]
    (row,) = pack_rows(({"input_ids": ids} for ids in documents), 16)
    collate = DiffusionCollator(None, block_size=4, train_padding=False, end_id=END)
    packed = collate([{**row, "example_id": 0}])
    assert packed["input_ids"].shape == (1, 12)
    alone = collate([{"input_ids": ids, "example_id": i} for i, ids in enumerate(documents)])
    masked = torch.tensor([[True, False, True, True] * 3])
    noise = Noise(torch.full((1, 12), 0.5), masked)
    spread = torch.zeros(3, 8, dtype=torch.bool)
    for i, part in enumerate(masked[0].split([4, 3, 5])):
        spread[i, : len(part)] = part
    together = mdlm_loss(tiny_model, **packed, mask_id=39, noise=noise)
    apart = mdlm_loss(tiny_model, **alone, mask_id=39, noise=Noise(torch.full((3, 8), 0.5), spread))
    assert torch.allclose(together.loss, apart.loss, rtol=1e-9)


def test_wrong_texts_are_refused_by_row(write, tokenizer):
    def load(rows, **options):
        return load_pretraining_dataset(write("a.jsonl", rows), tokenizer, **{"max_length": 8, **options})

    good = {"text": "a"}
    with pytest.raises(ValueError, match=r"row 1 of '.*a.jsonl', train: 'text' is missing; expected text"):
        load([good, {"text": None}])
    with pytest.raises(ValueError, match=r"has no field 'text'; its fields are \['content'\]"):
        load([{"content": "a"}])
    with pytest.raises(ValueError, match=r"row 0 of .*: 'text' is a int; expected text"):
        load([{"text": 3}])
    with pytest.raises(ValueError, match=r"row 1 of .*: the text contains the mask token, '<\|mask\|>'"):
        load([good, {"text": "what <|mask|> is"}])
    with pytest.raises(ValueError, match="max_length is 10; expected a multiple of block_size, 4"):
        load([good], max_length=10, block_size=4)
    with pytest.raises(ValueError, match="max_length must lie in 1"):
        load([good], max_length=0)
    with pytest.raises(ValueError, match="train, is empty: its documents make no row"):
        load([good], drop_tail=True)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="insert_eos needs an eos_token"):
        load([good])
    with pytest.raises(ValueError, match="insert_bos needs a bos_token"):
        load([good], insert_bos=True)


def test_a_lone_surrogate_is_refused_by_row(tokenizer):
    encode = EncodeDocuments(tokenizer, "text", insert_bos=False, insert_eos=True)
    with pytest.raises(
        ValueError, match=r"row 8 of a: 'text' has the lone surrogate '\\ud800' at character 1"
    ):
        encode({"text": ["a", "b\ud800"]}, [7, 8], "a")
