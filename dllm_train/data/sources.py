"""Datasets of a specification: files, folders, saved datasets and hub names, as one dataset per split."""

import glob
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from pyarrow import ArrowException

from dllm_kernels._arguments import integer
from dllm_train.data.specification import Source, parse_specification

logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset
BUILDERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}),
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


def load_dataset_spec(
    spec: str,
    *,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
    prepare: Callable[[AnyDataset, str], AnyDataset] | None = None,
) -> DatasetDict | IterableDatasetDict:
    """Return the splits "train" and "test", those that there are, of a dataset specification.

    spec: see `dllm_train.data.specification`. A name that exists on disk is a file (.jsonl, .json, .parquet,
      .csv, .tsv, or .txt, one row of which is a whole file; also compressed, as in .jsonl.gz), a folder of
      such files, or a folder written by `save_to_disk`; any other name is a dataset of the hub.
    streaming: rows are read when they are asked for (IterableDataset).
    shuffle_buffer: with `streaming`, training rows are drawn from a buffer of so many; 0: in their order.
    seed: of the buffer, and of the order in which weighted sources take turns. They do so until each was read
      whole, so that a source smaller than its share repeats. Test splits are concatenated.
    prepare: applied to each split of each source before these are combined; its second argument names them.
    Splits named train* become "train", those named test*, validation*, valid*, val*, dev* or eval* "test". A
      test split that has a count but does not exist is taken from the first rows of the training split, which
      then starts after them.
    Raises ValueError that names the source, and FileNotFoundError.
    """
    sources = parse_specification(spec)
    parts: dict[str, list[tuple[AnyDataset, float | None]]] = {"train": [], "test": []}
    for source in sources:
        for split, dataset in load_source(source, streaming=streaming).items():
            name = f"{source.name!r}, {split}"
            parts[split].append((prepare(dataset, name) if prepare else dataset, source.weight))
    combined = {
        split: combine(datasets, weighted=split == "train", seed=seed)
        for split, datasets in parts.items()
        if datasets
    }
    shuffle_stream(combined, streaming=streaming, buffer=shuffle_buffer, seed=seed)
    return IterableDatasetDict(combined) if streaming else DatasetDict(combined)


def shuffle_stream(splits: dict[str, AnyDataset], *, streaming: bool, buffer: int, seed: int) -> None:
    """Replace the training split by one that is drawn from a buffer of rows."""
    if integer("shuffle_buffer", buffer, 0) and not streaming:
        raise ValueError(
            f"shuffle_buffer is {buffer}, which only streams need; trainers shuffle other datasets themselves"
        )
    if buffer and "train" in splits:
        splits["train"] = splits["train"].shuffle(seed=seed, buffer_size=buffer)


def load_source(source: Source, *, streaming: bool = False) -> dict[str, AnyDataset]:
    """Return the raw rows of one source: {"train": ..., "test": ...}, those that there are."""
    splits = _choose_splits(source, _read(source, streaming))
    for split, dataset in splits.items():
        for field, value in source.filters:
            require_fields(dataset, [field], f"{source.name!r}, {split}")
            dataset = dataset.filter(_FieldEquals(field, value))
        check_not_empty(dataset, f"{source.name!r}, {split}")
        splits[split] = dataset
    return splits


def combine(parts: list[tuple[AnyDataset, float | None]], *, weighted: bool, seed: int) -> AnyDataset:
    """Concatenate datasets, or interleave them by their weights."""
    datasets, weights = [dataset for dataset, _ in parts], [weight for _, weight in parts]
    if len(datasets) == 1:
        return datasets[0]
    shares = None
    if weighted and weights[0] is not None:
        shares = [weight / sum(weights) for weight in weights]
        _refuse_endless_mixture(datasets, weights, shares)
    try:
        if shares is not None:
            mixed = interleave_datasets(
                datasets, probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
            )
            if isinstance(mixed, Dataset):
                passes = [
                    share * len(mixed) / len(part) for share, part in zip(shares, datasets, strict=True)
                ]
                logger.info("%d rows of a mixture; passes over its sources: %s", len(mixed), passes)
            return mixed
        return concatenate_datasets(datasets)
    except ValueError as error:
        raise ValueError(f"the datasets of the specification have different fields: {error}") from error


def _refuse_endless_mixture(datasets: Sequence[AnyDataset], weights: list, shares: list[float]) -> None:
    """Raise ValueError if others would repeat out of all proportion until a source of tiny share was read."""
    if not all(isinstance(dataset, Dataset) for dataset in datasets):
        return
    lengths = [len(dataset) / share for dataset, share in zip(datasets, shares, strict=True)]
    rows, longest = sum(map(len, datasets)), max(lengths)
    if longest > _MOST_REPEATS * rows:
        weight = weights[lengths.index(longest)]
        raise ValueError(
            f"weight {weight!r} of a mixture is too small: about {longest:.0f} rows would be drawn until "
            f"each of {rows} was"
        )


_MOST_REPEATS = 1000


def map_numbered(
    dataset: AnyDataset,
    function: Callable,
    name: str,
    *,
    num_proc: int | None = None,
    numbers: Sequence[int] | None = None,
    **options,
) -> AnyDataset:
    """Return dataset.map(function, **options); the function is called with a row, its number and `name`.

    numbers: the number of each row, for errors; None: its place in `dataset`. With `numbers` nothing is
      written to the cache of datasets.
    """
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"Tokenizing {name}"}
    if numbers is not None:
        function = _Renumbered(function, numbers)
        options |= {"keep_in_memory": True, "load_from_cache_file": False}
    return dataset.map(function, with_indices=True, fn_kwargs={"name": name}, **options)


def fields_of(dataset: AnyDataset) -> list[str]:
    """Return the field names, reading the first row of a stream that does not know them."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset.take(1)), {}))


def require_fields(dataset: AnyDataset, fields: list[str], name: str) -> None:
    """Raise ValueError that names the first field that is not there."""
    there = fields_of(dataset)
    for field in fields:
        if field not in there:
            raise ValueError(f"{name} has no field {field!r}; its fields are {there}")


def check_not_empty(dataset: AnyDataset, name: str) -> None:
    """Raise ValueError for a dataset without rows, or a stream whose first row cannot be read."""
    try:
        rows = len(dataset) if isinstance(dataset, Dataset) else any(True for _ in dataset.take(1))
    except (OSError, ArrowException) as error:
        raise ValueError(f"{name} could not be read: {error}") from error
    if not rows:
        raise ValueError(f"{name} is empty: no row is there, or none matches the filters")


def _read(source: Source, streaming: bool) -> dict[str, AnyDataset]:
    """Return every split of a source under its own name."""
    path = Path(source.name).expanduser()
    try:
        if not path.exists():
            if _kind(path) in BUILDERS or source.name.startswith((".", "/", "~")):
                raise FileNotFoundError(f"{source.name!r}: there is no such file or folder")
            return dict(load_dataset(source.name, source.configuration, streaming=streaming))
        if source.configuration is not None:
            raise ValueError(
                f"a configuration, here {source.configuration!r}, belongs to a dataset of the hub; "
                "a path that holds ':' must be quoted"
            )
        if (path / "preprocess.json").exists():
            raise ValueError("it is a preprocessed dataset, read by load_preprocessed_dataset")
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            return _saved(path, streaming)
        return _files(path, streaming)
    except FileNotFoundError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration):  # the error of `datasets` about files without a row
            cause = "it has no rows"
        raise ValueError(f"{source.name!r} could not be read: {cause}") from error


def _saved(path: Path, streaming: bool) -> dict[str, AnyDataset]:
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return {
        split: dataset.to_iterable_dataset() if streaming else dataset for split, dataset in splits.items()
    }


def _files(path: Path, streaming: bool) -> dict[str, AnyDataset]:
    """Read a file, or all files below a folder; files named train*, test*, validation* … are these splits."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    kinds = sorted({_kind(file) for file in files if _kind(file) in BUILDERS})
    if len(kinds) != 1:
        there = sorted({file.suffix or file.name for file in files})
        raise ValueError(
            f"expected files of one kind of {', '.join(BUILDERS)}; found {', '.join(there) or 'no file'}"
        )
    by_split: dict[str, list[str]] = {}
    for file in files:
        if _kind(file) == kinds[0]:
            split = "train" if path.is_file() else _split_of(file.stem) or "train"
            by_split.setdefault(split, []).append(glob.escape(str(file)))  # datasets reads patterns
    builder, options = BUILDERS[kinds[0]]
    return dict(load_dataset(builder, data_files=by_split, streaming=streaming, **options))


def _kind(file: Path) -> str:
    """Return the ending that says what a file holds: .jsonl of a.jsonl and of a.jsonl.gz."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def _split_of(name: str) -> str | None:
    """Return "train" or "test" for the name of a split, None for another name."""
    word = name.lower().replace("-", "_").replace(".", "_").split("_")[0]
    if word in TRAIN_NAMES:
        return "train"
    return "test" if word in TEST_NAMES else None


def _choose_splits(source: Source, there: dict[str, AnyDataset]) -> dict[str, AnyDataset]:
    """Return {"train", "test"} as the entries of `source` say, or as the splits that are there."""
    listed = source.splits or [(split, None) for split in _default_splits(source, there)]
    chosen: dict[str, AnyDataset] = {}
    held_out = 0
    for split, count in sorted(listed, key=lambda entry: _split_of(entry[0]) != "test"):
        target = _split_of(split)
        if target is None:
            raise ValueError(
                f"{source.name!r}: split {split!r} is neither for training nor for tests; expected a name "
                f"that begins with {', '.join(TRAIN_NAMES + TEST_NAMES)}"
            )
        if target in chosen:
            raise ValueError(f"{source.name!r}: two of the splits listed are for {target}; list one of them")
        if split in there:
            dataset, first = there[split], held_out if target == "train" else 0
        elif target == "test" and count is not None and "train" in there:
            dataset, first, held_out = there["train"], 0, count
        else:
            raise ValueError(f"{source.name!r} has no split {split!r}; its splits are {sorted(there)}")
        chosen[target] = _rows(dataset, first, count, f"{source.name!r}, {split}")
    return dict(sorted(chosen.items(), reverse=True))


def _default_splits(source: Source, there: dict[str, AnyDataset]) -> list[str]:
    """Return the split for training, and that for tests if there is one."""
    chosen = []
    for target, names in (("train", TRAIN_NAMES), ("test", TEST_NAMES)):
        candidates = [split for split in there if _split_of(split) == target]
        exact = [name for name in names if name in candidates]
        if not exact and len(candidates) > 1:
            raise ValueError(
                f"{source.name!r} has several {target} splits, {sorted(candidates)}; "
                f"name one of them: {source.name}[{candidates[0]}]"
            )
        chosen += (exact or candidates)[:1]
    if not chosen:
        raise ValueError(f"{source.name!r} has the splits {sorted(there)}; none is for training or tests")
    return chosen


def _rows(dataset: AnyDataset, first: int, count: int | None, name: str) -> AnyDataset:
    """Return `count` rows from row `first` on; a stream cannot say beforehand whether it has them."""
    if isinstance(dataset, Dataset) and first + (count or 0) > len(dataset):
        held_out = f" after the {first} taken for tests" if first else ""
        raise ValueError(f"{name} has {len(dataset)} rows, fewer than the {count} asked for{held_out}")
    dataset = dataset.skip(first) if first else dataset
    return dataset if count is None else dataset.take(count)


class _Renumbered:
    """Call a function of (row or batch, number or numbers) with other numbers than those of `map`."""

    def __init__(self, function: Callable, numbers: Sequence[int]):
        self.function, self.numbers = function, numbers

    def __call__(self, row, index, **options):
        if isinstance(index, int):
            return self.function(row, self.numbers[index], **options)
        return self.function(row, [self.numbers[i] for i in index], **options)


class _FieldEquals:
    """A filter of rows; a class, so that datasets can hash it."""

    def __init__(self, field: str, value: str):
        self.field, self.value = field, value

    def __call__(self, row) -> bool:
        return str(row[self.field]) == self.value
