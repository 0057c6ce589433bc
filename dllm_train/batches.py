"""Cut datasets into batches, the same for any number of ranks, accumulation steps and dataloader workers.

An optimizer step takes the next `batch size · ranks · accumulation steps` examples of one global order.
Every example carries its number, which keys its noise. No example is seen twice to fill a batch: a rank that
the last examples do not reach gets a copy of one with all labels ignored.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from dllm_train.noise import IGNORED_LABEL

_WINDOWS_SORTED_TOGETHER = 50


class NumberedDataset(Dataset):
    """A map-style dataset whose items carry "example_id", their index; an `example_id` of their own is kept.

    Index ~n gives example n to be ignored. epoch: of the order and the noise.
    Raises TypeError for what has no numbered items, and ValueError for an empty dataset and for items
    without input_ids.
    """

    def __init__(self, dataset, name: str):
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not indexed or isinstance(dataset, Mapping):
            raise TypeError(
                f"{name} is a {type(dataset).__name__}; expected one split, a list of items, a Dataset or an "
                "IterableDataset"
            )
        if not len(dataset):
            raise ValueError(f"{name} is empty; give at least one example")
        self.dataset, self.name, self.epoch = dataset, name, 0
        self[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; dataloaders of accelerate call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        numbers = [max(index, ~index) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        examples = fetch(numbers) if fetch else [self.dataset[number] for number in numbers]
        return [
            _numbered(example, number, self.name, ignored=index < 0)
            for example, number, index in zip(examples, numbers, indices, strict=True)
        ]


class GlobalBatches(Sampler[list[int]]):
    """Yield one rank's batches of indices into a NumberedDataset, in the order of its epoch.

    batch_size: of one rank. order: "sequential" | "random" | "group_by_length": the examples of an optimizer
    step, `accumulation` batches of every rank, have similar lengths. seed: of the order. lengths: of every
    example, for "group_by_length". drop_last: leave out the last incomplete batch.
    """

    def __init__(
        self,
        dataset: NumberedDataset,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        order: str = "sequential",
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        drop_last: bool = False,
    ):
        self.dataset, self.batch_size, self.rank, self.ranks = dataset, batch_size, rank, ranks
        self.window = batch_size * ranks * accumulation
        self.order, self.seed, self.lengths, self.drop_last = order, seed, lengths, drop_last

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        whole, rest = divmod(len(self.dataset), self.batch_size * self.ranks)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order, together = self._order(), self.batch_size * self.ranks
        for start in range(0, len(self) * together, together):
            first = start + self.rank * self.batch_size
            yield order[first : first + self.batch_size] or [~order[start]]

    def _order(self) -> list[int]:
        count = len(self.dataset)
        if self.order == "sequential":
            return list(range(count))
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        order = torch.randperm(count, generator=generator).tolist()
        if self.order == "random":
            return order
        together = self.window * _WINDOWS_SORTED_TOGETHER
        for start in range(0, count, together):
            order[start : start + together] = sorted(
                order[start : start + together], key=self.lengths.__getitem__, reverse=True
            )
        windows = [order[start : start + self.window] for start in range(0, count, self.window)]
        last = windows.pop() if len(windows[-1]) < self.window else []
        shuffled = torch.randperm(len(windows), generator=generator).tolist()
        return [*itertools.chain.from_iterable(windows[index] for index in shuffled), *last]


class NumberedStream(IterableDataset):
    """One rank's part of a stream whose examples carry "example_id", their place in the stream.

    Every rank and every dataloader worker reads the whole stream and keeps its batches, so the order and the
    numbers are those of one process without workers. endless: start over at the end, with increasing numbers.
    Raises ValueError for an empty stream and for examples without input_ids.
    """

    def __init__(
        self, dataset, name: str, batch_size: int, *, rank: int = 0, ranks: int = 1, endless: bool = False
    ):
        self.dataset, self.name, self.endless = dataset, name, endless
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        self.epoch = 0

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        worker, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        together = self.batch_size * self.ranks
        count, first = 0, None
        for example in self._examples():
            turn, place = divmod(count, together)
            if place // self.batch_size == self.rank and turn % workers == worker:
                yield _numbered(example, count, self.name)
            first = example if first is None else first
            count += 1
        turn, rest = divmod(count, together)
        if rest and rest <= self.rank * self.batch_size and turn % workers == worker:
            yield _numbered(first, 0, self.name, ignored=True)

    def _examples(self) -> Iterator[Mapping]:
        for epoch in itertools.count() if self.endless else range(1):
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            empty = True
            for example in _whole(self.dataset):
                empty = False
                yield example
            if empty:
                raise ValueError(f"{self.name} is empty; give at least one example")


class IgnoringCollator:
    """Call `collator` and give a batch of ignored examples no labels and "ignored": True."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: list[dict]) -> dict:
        ignored = [example.pop("ignored", False) for example in examples]
        batch = self.collator(examples)
        if all(ignored):
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORED_LABEL)
            batch["ignored"] = True
        return batch


def lengths_of(dataset, column: str) -> list[int]:
    """Return the length of every example, from `column` where the dataset has it, else from input_ids."""
    columns = getattr(dataset, "column_names", None) or ()
    if column in columns:
        return list(dataset[column])
    if "input_ids" in columns:
        return [len(ids) for ids in dataset["input_ids"]]
    return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


def _numbered(example: Mapping, number: int, name: str, ignored: bool = False) -> dict:
    if not isinstance(example, Mapping) or "input_ids" not in example:
        fields = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(f"example {number} of {name} has no field 'input_ids'; it has {fields}")
    numbered = {"example_id": number, **example}
    if ignored:
        numbered["ignored"] = True
    return numbered


def _whole(dataset) -> Iterator[Mapping]:
    """Iterate over all of a stream, also in a dataloader worker, where streams of `datasets` take a share."""
    library = sys.modules.get("datasets")
    if library is not None and isinstance(dataset, library.IterableDataset):
        for batch in dataset.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}
    else:
        yield from dataset
