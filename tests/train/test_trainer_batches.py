"""The examples of a global batch, and their numbers, do not depend on who reads them."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from dllm_train import batches as module
from dllm_train.batches import GlobalBatches, IgnoringCollator, NumberedDataset, NumberedStream, lengths_of

SIZES = st.integers(1, 4)


def numbered(lengths):
    return NumberedDataset([{"input_ids": [5] * n} for n in lengths], "train_dataset")


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter({"input_ids": [n]} for n in range(self.count))


def windows(of_ranks, accumulation):
    """The examples of each optimizer step, from the batches of every rank."""
    of_ranks = [list(batches) for batches in of_ranks]
    assert len({len(batches) for batches in of_ranks}) == 1
    seen = [[i for batch in together for i in batch if i >= 0] for together in zip(*of_ranks, strict=True)]
    return [[*chain(*seen[i : i + accumulation])] for i in range(0, len(seen), accumulation)]


@pytest.mark.parametrize("order", ["sequential", "random", "group_by_length"])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=60), batch_size=SIZES, ranks=SIZES,
    accumulation=SIZES, epoch=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_windows_are_those_of_one_rank_without_accumulation(
    order, lengths, batch_size, ranks, accumulation, epoch
):
    dataset = numbered(lengths)
    dataset.set_epoch(epoch)
    options = dict(order=order, seed=3, lengths=lengths)
    parts = [
        GlobalBatches(dataset, batch_size, rank=rank, ranks=ranks, accumulation=accumulation, **options)
        for rank in range(ranks)
    ]
    assert all(len(list(part)) == len(part) for part in parts)
    one = GlobalBatches(dataset, batch_size * ranks * accumulation, **options)
    found = windows(parts, accumulation)
    assert found == [list(batch) for batch in one]
    assert sorted(chain(*found)) == list(range(len(lengths)))


@given(count=st.integers(1, 30), batch_size=SIZES, ranks=SIZES)
@settings(max_examples=40, deadline=None)
def test_drop_last_leaves_out_the_incomplete_batches_of_all_ranks(count, batch_size, ranks):
    dataset = numbered([3] * count)
    parts = [GlobalBatches(dataset, batch_size, rank=r, ranks=ranks, drop_last=True) for r in range(ranks)]
    whole = count // (batch_size * ranks)
    assert [len(list(part)) for part in parts] == [whole] * ranks
    assert all(len(batch) == batch_size and min(batch) >= 0 for part in parts for batch in part)


def test_windows_of_similar_lengths_come_in_random_order():
    lengths = torch.randint(1, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(GlobalBatches(numbered(lengths), 8, order="group_by_length", lengths=lengths))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in found]
    assert max(spread) < 40
    longest = [max(lengths[i] for i in batch) for batch in found]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def read(count, batch_size, rank, ranks, workers, monkeypatch, **options):
    """The batches that a dataloader with `workers` workers makes of a rank's stream."""
    of_workers = []
    for worker in range(workers):
        information = type("Worker", (), {"id": worker, "num_workers": workers})
        with monkeypatch.context() as patch:
            patch.setattr(module, "get_worker_info", lambda known=information: known)
            stream = NumberedStream(
                Stream(count), "train_dataset", batch_size, rank=rank, ranks=ranks, **options
            )
            examples = list(stream)
        of_workers.append([examples[i : i + batch_size] for i in range(0, len(examples), batch_size)])
    turns = max(map(len, of_workers))
    return [batches[turn] for turn in range(turns) for batches in of_workers if turn < len(batches)]


@given(count=st.integers(1, 30), batch_size=SIZES, ranks=SIZES, workers=SIZES)
@settings(max_examples=60, deadline=None)
def test_streams_give_ranks_and_workers_the_batches_of_one_reader(count, batch_size, ranks, workers):
    with pytest.MonkeyPatch.context() as monkeypatch:
        parts = [read(count, batch_size, rank, ranks, workers, monkeypatch) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    ids = [
        [example["example_id"] for part in together for example in part if "ignored" not in example]
        for together in zip(*parts, strict=True)
    ]
    assert [*chain(*ids)] == list(range(count))
    assert all(example["input_ids"] == [example["example_id"]] for p in parts for b in p for example in b)


def test_a_stream_of_training_starts_over_and_goes_on_counting():
    stream = iter(NumberedStream(Stream(3), "train_dataset", 2, endless=True))
    found = [next(stream) for _ in range(7)]
    assert [example["example_id"] for example in found] == list(range(7))
    assert [example["input_ids"] for example in found] == [[n % 3] for n in range(7)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_streams_of_datasets_are_whole_in_every_worker(workers):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[n] for n in range(11)]}).to_iterable_dataset(
        num_shards=3
    )
    loader = DataLoader(
        NumberedStream(rows, "train_dataset", 2), batch_size=2, num_workers=workers, collate_fn=list
    )
    expected = [next(iter(example["input_ids"])) for example in rows]
    found = [example for batch in loader for example in batch]
    assert [example["input_ids"] for example in found] == [[n] for n in expected]
    assert [example["example_id"] for example in found] == list(range(11))


def test_empty_streams_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="train_dataset is empty"):
        next(iter(NumberedStream(Stream(0), "train_dataset", 2)))
    stream = NumberedStream([{"input_ids": [1]}, {"text": "a"}], "eval_dataset", 2)
    with pytest.raises(
        ValueError, match=r"example 1 of eval_dataset has no field 'input_ids'; it has \['text'\]"
    ):
        list(stream)


def test_an_ignored_batch_has_no_labels():
    def collate(examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids}

    batch = IgnoringCollator(collate)([numbered([3])[~0]])
    assert batch["labels"].tolist() == [[-100] * 3] and batch["ignored"]
    assert "ignored" not in IgnoringCollator(collate)([numbered([3])[0]])


def test_lengths_come_from_a_column_or_from_the_ids():
    datasets = pytest.importorskip("datasets")
    ids = [[1], [1, 2, 3], [1, 2]]
    assert lengths_of([{"input_ids": row} for row in ids], "length") == [1, 3, 2]
    assert lengths_of(datasets.Dataset.from_dict({"input_ids": ids}), "length") == [1, 3, 2]
    columns = {"input_ids": ids, "length": [7, 8, 9]}
    assert lengths_of(datasets.Dataset.from_dict(columns), "length") == [7, 8, 9]
