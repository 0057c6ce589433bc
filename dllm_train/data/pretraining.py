"""Rows of equal length for pretraining: tokenized documents with their end tokens, laid end to end."""

import logging
from collections.abc import Iterable, Iterator

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value

from dllm_train.data.sources import (
    AnyDataset,
    fields_of,
    load_dataset_spec,
    map_numbered,
    require_fields,
)
from dllm_train.data.text import check_length, check_tokens, end_token, first_token, text_of

logger = logging.getLogger(__name__)

TOKENS = List(Value("int32"))


def load_pretraining_dataset(
    dataset: str,
    tokenizer,
    *,
    max_length: int,
    text_field: str = "text",
    packing: bool = True,
    drop_tail: bool = False,
    insert_bos: bool = False,
    insert_eos: bool = True,
    block_size: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    num_proc: int | None = None,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """Return rows of `max_length` tokens cut from the documents of a dataset specification, in their order.

    Every token of every document is in one row, at one place. Rows have `input_ids`, `length` and, with
    `packing`, `document_lengths`.

    dataset: see `load_dataset_spec`, also for `streaming`, `shuffle_buffer` (of documents) and `seed`.
    text_field: the field that holds a document.
    packing: True: `document_lengths` keeps the documents of a row from seeing each other; the part of a
      document that continues in the next row is a separate document there. False: plain concatenation, in
      which all tokens of a row see each other.
    drop_tail: leave out the last row of a split when it is shorter than `max_length`; a log line counts its
      tokens.
    insert_bos, insert_eos: begin, end each document with that token of the tokenizer, unless it already does.
    block_size: max_length must be a multiple of it. num_proc: processes that tokenize; they change no row.
    Raises ValueError that names the dataset, the row and the field.
    """
    max_length = check_length(max_length, block_size)
    encode = EncodeDocuments(tokenizer, text_field, insert_bos=insert_bos, insert_eos=insert_eos)

    def prepare(documents: AnyDataset, name: str) -> AnyDataset:
        return encode.apply(documents, name, num_proc=num_proc)

    documents = load_dataset_spec(
        dataset, streaming=streaming, shuffle_buffer=shuffle_buffer, seed=seed, prepare=prepare
    )
    features = row_features(packing)
    rows = {}
    for split, part in documents.items():
        options = dict(documents=part, max_length=max_length, packing=packing, drop_tail=drop_tail)
        if next(pack_rows(**options), None) is None:
            raise ValueError(f"{dataset!r}, {split}, is empty: its documents make no row")
        made = IterableDataset if streaming else Dataset
        rows[split] = made.from_generator(pack_rows, features=features, gen_kwargs=options)
    return IterableDatasetDict(rows) if streaming else DatasetDict(rows)


def row_features(packing: bool) -> Features:
    """Return the types of packed or concatenated rows."""
    features = {"input_ids": TOKENS, "length": Value("int32")}
    return Features(features | {"document_lengths": TOKENS} if packing else features)


def pack_rows(
    documents: Iterable[dict], max_length: int, packing: bool = True, drop_tail: bool = False
) -> Iterator[dict]:
    """Yield the rows of tokenized documents, {"input_ids": [n]} each."""
    packer = Packer(max_length, packing)
    for ids in _all_ids(documents):
        yield from packer.add(ids)
    yield from packer.finish(drop_tail)


def _all_ids(documents: Iterable[dict]) -> Iterator[list[int]]:
    """Yield the ids of all documents, also in a dataloader worker, to which a stream itself gives a share."""
    if isinstance(documents, AnyDataset):
        for batch in documents.iter(batch_size=100):
            yield from batch["input_ids"]
    else:
        for document in documents:
            yield document["input_ids"]


class Packer:
    """Cut rows from documents that arrive one by one.

    ids, document_lengths: the row that is not full yet, which is the whole state.
    """

    def __init__(self, max_length: int, packing: bool = True):
        self.max_length, self.packing = max_length, packing
        self.ids: list[int] = []
        self.document_lengths: list[int] = []

    def add(self, document: list[int]) -> Iterator[dict]:
        """Yield the rows that this document fills."""
        start = 0
        while start < len(document):
            piece = document[start : start + self.max_length - len(self.ids)]
            self.ids += piece
            self.document_lengths.append(len(piece))
            start += len(piece)
            if len(self.ids) == self.max_length:
                yield self._row()

    def finish(self, drop_tail: bool = False) -> Iterator[dict]:
        """Yield the last row, shorter than the others, if one is left."""
        if self.ids and drop_tail:
            logger.info("drop_tail left out the last %d tokens", len(self.ids))
        elif self.ids:
            yield self._row()

    def _row(self) -> dict:
        row = {"input_ids": self.ids, "length": len(self.ids)}
        if self.packing:
            row["document_lengths"] = self.document_lengths
        self.ids, self.document_lengths = [], []
        return row


class EncodeDocuments:
    """Tokenize a batch of documents; a class, so that datasets can hash it and send it to processes."""

    def __init__(self, tokenizer, text_field: str, *, insert_bos: bool, insert_eos: bool):
        self.tokenizer, self.text_field, self.name = tokenizer, text_field, ""
        self.bos_id = first_token(tokenizer) if insert_bos else None
        self.eos_id = end_token(tokenizer) if insert_eos else None

    def apply(self, documents: AnyDataset, name: str, **options) -> AnyDataset:
        """Return {"input_ids"} for each document.

        name: of the dataset, for errors. options: of `map_numbered`.
        """
        require_fields(documents, [self.text_field], name)
        return map_numbered(
            documents,
            self,
            name,
            batched=True,
            remove_columns=fields_of(documents),
            features=Features({"input_ids": TOKENS}),
            **options,
        )

    def __call__(self, batch: dict, rows: list[int], name: str) -> dict:
        texts = [
            text_of(text, self.text_field, row, name)
            for row, text in zip(rows, batch[self.text_field], strict=True)
        ]
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for row, ids in zip(rows, encoded, strict=True):
            check_tokens(self.tokenizer, ids, row, name)
            if self.bos_id is not None and ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
            if self.eos_id is not None and ids[-1:] != [self.eos_id]:
                ids.append(self.eos_id)
        return {"input_ids": encoded}
