"""Batches of the losses from tokenized examples: padding to whole blocks, BOS, truncation and crops.

Philox draws random cuts from (seed, example id), so they depend on neither batch, worker nor epoch.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dllm_kernels._arguments import integer, kind, number
from dllm_train.noise import IGNORED_LABEL, philox4x32

TRUNCATION_STREAM, CROP_STREAM, BATCH_CROP_STREAM = 16, 17, 18


@dataclass
class _Row:
    """One example while its batch is made: int64 arrays [n], document lengths, and whether it was cut."""

    example_id: int
    ids: np.ndarray
    labels: np.ndarray
    documents: list[int]
    packed: bool
    cut: bool = False

    @property
    def response_start(self) -> int:
        """Return the position of the first trained token, or the length of the row."""
        trained = self.labels != IGNORED_LABEL
        return int(trained.argmax()) if trained.any() else len(self.labels)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if length >= len(self.ids):
            return
        self.ids, self.labels, self.cut = self.ids[:length], self.labels[:length], True
        ends = np.minimum(np.cumsum(self.documents), length)
        self.documents = [int(n) for n in np.diff(ends, prepend=0) if n]


class DiffusionCollator:
    """Make the batch of a loss from a list of examples; picklable, and a pure function of the examples.

    Examples are mappings with `input_ids` [n], `example_id` int (the trainer adds it), and optionally
    `labels` [n] (-100 or the token itself; default: all tokens) and `document_lengths` (summing to n).
    The batch has int64 CPU tensors `input_ids` and `labels` [B, L], `example_ids` [B]; with hidden padding
    `lengths` [B], the visible tokens of each row; with a packed row `document_lengths` [B, D] in its place,
    filled with 0, that sum to the visible tokens.

    tokenizer: gives the end token (padding) and BOS; only their ids are kept.
    block_size: rows are padded to whole blocks; None: to the longest row.
    train_padding: True: end tokens fill the last block (without `block_size`: the row) of an example. They
      are visible and trained, as in LLaDA's SFT, so that the model learns to end a reply. False: padding is
      hidden and its labels are -100. Three kinds of padding are always hidden: beyond the last block; after
      a row that an option below cut, since its text does not end there; and after a packed row, whose
      documents have end tokens of their own.
    pad_to: pad every row to this length. With `train_padding` and no `block_size` it makes the padding of an
      example independent of the other rows of its batch.
    insert_bos: put the BOS token before every document that does not begin with it; its label is -100.
    random_truncation: probability of cutting a row to a uniformly drawn length that keeps at least one
      trained token (LLaDA's pretraining: 0.01).
    response_crop: probability of cutting the end of a response to a uniformly drawn shorter length. The
      response starts at the first trained token (Dream's SFT, `resp_cutoff_ratio`, per row here).
    batch_response_crop: cut all responses of a batch to the length of one of them, drawn by the id of the
      first example (Dream's SFT, `perbatch_cutoff`). This depends on which examples share a batch.
    seed: key of the random cuts. end_id, bos_id: replace the tokenizer's.
    Raises TypeError and ValueError that name the example and the field.
    """

    def __init__(
        self,
        tokenizer,
        *,
        block_size: int | None = None,
        train_padding: bool = True,
        pad_to: int | None = None,
        insert_bos: bool = False,
        random_truncation: float = 0.0,
        response_crop: float = 0.0,
        batch_response_crop: bool = False,
        seed: int = 0,
        end_id: int | None = None,
        bos_id: int | None = None,
    ):
        self.block_size = None if block_size is None else integer("block_size", block_size, 1)
        self.pad_to = None if pad_to is None else integer("pad_to", pad_to, 1)
        if self.block_size and self.pad_to and self.pad_to % self.block_size:
            raise ValueError(f"pad_to is {pad_to}; expected a multiple of block_size, {block_size}")
        self.train_padding, self.insert_bos = bool(train_padding), bool(insert_bos)
        self.random_truncation = _probability("random_truncation", random_truncation)
        self.response_crop = _probability("response_crop", response_crop)
        self.batch_response_crop = bool(batch_response_crop)
        self.seed = integer("seed", seed, 0, 2**64 - 1)
        self.end_id = _token_id(tokenizer, "eos_token_id", "end_id", end_id)
        self.bos_id = _token_id(tokenizer, "bos_token_id", "bos_id", bos_id) if insert_bos else None

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Return the batch of `examples`."""
        if not examples:
            raise ValueError("examples is empty; a batch needs at least one")
        rows = [_row(example, index) for index, example in enumerate(examples)]
        for row in rows:
            if self.insert_bos:
                _prepend_bos(row, self.bos_id)
            self._cut(row)
        if self.batch_response_crop:
            self._crop_to_one_of(rows)
        return self._padded(rows)

    def without_cuts(self) -> "DiffusionCollator":
        """Return a collator that leaves rows whole, for evaluation."""
        whole = copy.copy(self)
        whole.random_truncation = whole.response_crop = 0.0
        whole.batch_response_crop = False
        return whole

    def _cut(self, row: _Row) -> None:
        """Truncate the row and crop its response, each with its probability."""
        start = row.response_start
        if start == len(row.ids):
            return
        chance, place = self._uniform(row.example_id, TRUNCATION_STREAM)
        if chance < self.random_truncation:
            row.truncate(start + 1 + int(place * (len(row.ids) - start)))
        if self.response_crop and row.packed:
            raise ValueError(
                f"response_crop cuts rows of one document; example {row.example_id} has document_lengths"
            )
        chance, place = self._uniform(row.example_id, CROP_STREAM)
        response = len(row.ids) - start
        if chance < self.response_crop and response > 1:
            row.truncate(start + 1 + int(place * (response - 1)))

    def _crop_to_one_of(self, rows: list[_Row]) -> None:
        """Cut every response to the length of a drawn row's response."""
        for row in rows:
            if row.packed:
                raise ValueError(
                    f"batch_response_crop cuts rows of one document; example {row.example_id} has "
                    "document_lengths"
                )
        rows = [row for row in rows if row.response_start < len(row.ids)]
        if not rows:
            return
        chance, _ = self._uniform(rows[0].example_id, BATCH_CROP_STREAM)
        drawn = rows[int(chance * len(rows))]
        kept = len(drawn.ids) - drawn.response_start
        for row in rows:
            row.truncate(row.response_start + kept)

    def _padded(self, rows: list[_Row]) -> dict[str, torch.Tensor]:
        length = max(self._end_of_last_block(row) for row in rows)
        if self.pad_to:
            if length > self.pad_to:
                longest = max(rows, key=lambda row: len(row.ids))
                raise ValueError(
                    f"pad_to is {self.pad_to}, but example {longest.example_id} has {len(longest.ids)} "
                    "tokens; truncate it before"
                )
            length = self.pad_to
        ids = np.full((len(rows), length), self.end_id, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORED_LABEL, dtype=np.int64)
        visible = np.empty(len(rows), dtype=np.int64)
        for index, row in enumerate(rows):
            size = len(row.ids)
            ids[index, :size], labels[index, :size] = row.ids, row.labels
            visible[index] = size
            if self.train_padding and not row.cut and not row.packed:
                end = self._end_of_last_block(row) if self.block_size else length
                labels[index, size:end] = self.end_id
                row.documents, visible[index] = [end], end
        batch = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "example_ids": torch.tensor([row.example_id for row in rows]),
        }
        if any(row.packed for row in rows):
            batch["document_lengths"] = _document_table(rows)
        elif (visible < length).any():
            batch["lengths"] = torch.from_numpy(visible)
        return batch

    def _end_of_last_block(self, row: _Row) -> int:
        return len(row.ids) + (-len(row.ids) % self.block_size if self.block_size else 0)

    def _uniform(self, example_id: int, stream: int) -> tuple[float, float]:
        """Return two numbers in (0, 1), functions of (seed, example id, stream)."""
        counter = np.array([0, 0, example_id & 0xFFFFFFFF, stream], dtype=np.uint32)
        bits = philox4x32(counter, (self.seed & 0xFFFFFFFF, self.seed >> 32))
        first, second = ((bits[:2] >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24
        return float(first), float(second)


def _row(example: Mapping, index: int) -> _Row:
    """Check one example; errors name it by its id, or by its place in the batch."""
    if "input_ids" not in example:
        raise ValueError(f"example {index} of the batch has no 'input_ids'; its fields: {sorted(example)}")
    if example.get("example_id") is None:
        raise ValueError(
            f"example {index} of the batch has no 'example_id', the number that noise is keyed by; the "
            "trainers add it, and otherwise it is the example's index in its dataset"
        )
    example_id = integer("example_id", example["example_id"], 0, 2**63 - 1)
    ids = _token_array(example["input_ids"], "input_ids", example_id)
    if not len(ids):
        raise ValueError(f"input_ids of example {example_id} is empty")
    if (ids < 0).any():
        raise ValueError(f"input_ids of example {example_id} has {int(ids.min())}; expected token ids >= 0")
    if np.asarray(example.get("attention_mask", 1)).min(initial=1) < 1:
        raise ValueError(
            f"attention_mask of example {example_id} hides tokens; give unpadded input_ids, the collator pads"
        )
    labels = ids if example.get("labels") is None else _token_array(example["labels"], "labels", example_id)
    if len(labels) != len(ids):
        raise ValueError(f"labels of example {example_id} has {len(labels)} entries, input_ids {len(ids)}")
    wrong = np.flatnonzero((labels != IGNORED_LABEL) & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"labels of example {example_id} has {int(labels[at])} at position {at}, where input_ids has "
            f"{int(ids[at])}; a label is its token or {IGNORED_LABEL}"
        )
    documents, packed = [len(ids)], example.get("document_lengths") is not None
    if packed:
        documents = _token_array(example["document_lengths"], "document_lengths", example_id).tolist()
        if any(n < 1 for n in documents) or sum(documents) != len(ids):
            raise ValueError(
                f"document_lengths of example {example_id} is {documents}; expected positive numbers that "
                f"sum to its {len(ids)} tokens"
            )
    return _Row(example_id, ids, labels, documents, packed)


def _prepend_bos(row: _Row, bos_id: int) -> None:
    """Put BOS, not trained, before each document that does not begin with it."""
    starts = np.cumsum([0, *row.documents[:-1]])
    missing = row.ids[starts] != bos_id
    row.ids = np.insert(row.ids, starts[missing], bos_id)
    row.labels = np.insert(row.labels, starts[missing], IGNORED_LABEL)
    row.documents = [n + int(more) for n, more in zip(row.documents, missing, strict=True)]


def _document_table(rows: list[_Row]) -> torch.Tensor:
    """Return int64 [B, D]: the documents of each row, then zeros."""
    table = torch.zeros(len(rows), max(len(row.documents) for row in rows), dtype=torch.int64)
    for index, row in enumerate(rows):
        table[index, : len(row.documents)] = torch.tensor(row.documents)
    return table


def _token_array(values, name: str, example_id: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} of example {example_id} has shape {list(array.shape)}; expected [n]")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} of example {example_id} has {array.dtype} entries; expected integers")
    return array.astype(np.int64)


def _token_id(tokenizer, attribute: str, argument: str, given: int | None) -> int:
    if given is None:
        given = getattr(tokenizer, attribute, None)
    if given is None:
        raise ValueError(
            f"the tokenizer, a {kind(tokenizer)}, has no {attribute}; give {argument}, or set its token first"
        )
    return integer(argument, given, 0)


def _probability(name: str, value: float) -> float:
    value = number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; expected a probability, 0..1")
    return value
