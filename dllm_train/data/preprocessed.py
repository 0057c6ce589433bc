"""Tokenized datasets on disk, written in shards, so that an interrupted run can continue.

    FOLDER/preprocess.json       what determines the rows: specification, tokenizer, options
    FOLDER/train/00000.parquet   the rows made from the first `rows_per_shard` rows of the dataset, and so on
    FOLDER/complete.json         written last: how many rows and tokens each split has

Every file is written beside its place and renamed. A shard carries in its metadata what the next one needs:
the tokens of pretraining rows that are not full yet, and counts.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, load_dataset

from dllm_train.data.pretraining import EncodeDocuments, Packer, row_features
from dllm_train.data.sft import EncodeExamples, warn_left_out
from dllm_train.data.sources import check_not_empty, combine, load_source, shuffle_stream
from dllm_train.data.specification import parse_specification
from dllm_train.data.text import check_length, tokenizer_digest

CONFIGURATION, COMPLETE = "preprocess.json", "complete.json"


def load_preprocessed_dataset(
    folder: str | Path,
    tokenizer=None,
    *,
    kind: str | None = None,
    block_size: int | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """Return the splits of a folder that `python -m dllm_train.preprocess` wrote.

    tokenizer, kind ("sft" | "pretraining"): when given, they must be those that the folder was made with.
    block_size: when given, it must divide the max_length that the folder was made with.
    streaming, shuffle_buffer, seed: as in `load_dataset_spec`.
    Raises FileNotFoundError for other folders, ValueError for an unfinished one and for what does not match.
    """
    folder = Path(folder)
    if not (folder / CONFIGURATION).exists():
        raise FileNotFoundError(f"{str(folder)!r} holds no preprocessed dataset: {CONFIGURATION} is missing")
    configuration = preprocessing_options(folder)
    if not (folder / COMPLETE).exists():
        raise ValueError(
            f"{str(folder)!r} holds an unfinished dataset; run the same preprocess command again to finish it"
        )
    if tokenizer is not None and tokenizer_digest(tokenizer) != configuration["tokenizer_digest"]:
        raise ValueError(
            f"{str(folder)!r} was made with another tokenizer, {configuration['tokenizer']!r}, or with "
            "another chat template"
        )
    if kind is not None and kind != configuration["kind"]:
        raise ValueError(f"{str(folder)!r} was made for {configuration['kind']}; expected one for {kind}")
    check_length(configuration["max_length"], block_size)
    splits = json.loads((folder / COMPLETE).read_text())
    files = {
        split: [
            glob.escape(str(shard))  # datasets reads patterns
            for shard in (_shard(folder, split, i) for i in range(counts["shards"]))
            if pq.read_metadata(shard).num_rows  # datasets cannot read a file without rows
        ]
        for split, counts in splits.items()
    }
    rows = load_dataset("parquet", data_files=files, streaming=streaming)
    shuffle_stream(rows, streaming=streaming, buffer=shuffle_buffer, seed=seed)
    return rows


def preprocessing_options(folder: str | Path) -> dict:
    """Return what determines the rows of a preprocessed folder: specification, tokenizer, options."""
    return json.loads((Path(folder) / CONFIGURATION).read_text())


def write_preprocessed_dataset(
    folder: str | Path,
    encode: EncodeExamples | EncodeDocuments,
    *,
    dataset: str,
    seed: int,
    rows_per_shard: int,
    options: dict,
    num_proc: int | None = None,
) -> dict:
    """Write the shards that `folder` lacks; return {split: {"shards", "rows", "tokens"}}.

    options: what else determines the rows, for `preprocess.json`; with EncodeDocuments `max_length`,
    `packing` and `drop_tail` are read from it. Raises ValueError when the folder holds something else, or
    rows of another configuration.
    """
    folder = Path(folder)
    sources = [(source.weight, load_source(source)) for source in parse_specification(dataset)]
    sources_of = {
        split: [(weight, parts[split]) for weight, parts in sources if split in parts]
        for split in ("train", "test")
    }
    names = [source.name for source in parse_specification(dataset)]
    configuration = {
        "dataset": dataset,
        "seed": seed,
        "rows_per_shard": rows_per_shard,
        **options,
        "tokenizer_digest": tokenizer_digest(encode.tokenizer),
        "rows_digest": _rows_digest([rows for parts in sources_of.values() for _, rows in parts]),
    }
    _claim(folder, configuration)
    splits = {}
    for split, parts in sources_of.items():
        if parts:
            named = [name for name, (_, there) in zip(names, sources, strict=True) if split in there]
            order = _order(parts, weighted=split == "train", seed=seed)
            shards = _Shards(folder, split, encode, parts, named, options, num_proc)
            splits[split] = shards.write(order, rows_per_shard)
    _write_atomically(folder / COMPLETE, json.dumps(splits, indent=2).encode())
    return splits


class _Shards:
    """The shards of one split."""

    def __init__(self, folder, split, encode, parts, names, options, num_proc):
        self.folder, self.split, self.encode, self.num_proc = folder, split, encode, num_proc
        self.parts, self.options = parts, options
        self.names = [f"{name!r}, {split}" for name in names]
        self.packs = isinstance(encode, EncodeDocuments)
        if self.packs:
            self.features = row_features(options["packing"])
        else:
            self.features = Features({k: v for k, v in encode.features.items() if k != "left_out"})

    def write(self, order: np.ndarray, rows_per_shard: int) -> dict:
        """Write the missing shards of the rows `order`, int64 [n, 2] of (source, row)."""
        count = -(-len(order) // rows_per_shard)
        state = {"ids": [], "document_lengths": [], "left_out": {}, "rows": 0, "tokens": 0}
        for index in range(count):
            path = _shard(self.folder, self.split, index)
            if path.exists():
                state = _state_of(path)
                continue
            chunk = order[index * rows_per_shard : (index + 1) * rows_per_shard]
            rows, state = self._rows(self._encoded(chunk), state, last=index == count - 1)
            schema = self.features.arrow_schema
            schema = schema.with_metadata({**schema.metadata, b"dllm": json.dumps(state).encode()})
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
            _write_atomically(path, sink.getvalue())
        warn_left_out(Counter(state["left_out"]), len(order))
        if not state["rows"]:
            raise ValueError(f"{self.split} of {str(self.folder)!r} is empty: every row was left out")
        return {"shards": count, "rows": state["rows"], "tokens": state["tokens"]}

    def _encoded(self, chunk: np.ndarray) -> Iterator[dict]:
        """Yield the tokenized rows of a chunk in its order."""
        encoded = {}
        for source in np.unique(chunk[:, 0]).tolist():
            numbers = chunk[chunk[:, 0] == source, 1].tolist()
            rows = self.parts[source][1].select(numbers)
            encoded[source] = iter(
                self.encode.apply(rows, self.names[source], numbers=numbers, num_proc=self.num_proc)
            )
        for source in chunk[:, 0].tolist():
            yield next(encoded[source])

    def _rows(self, encoded: Iterator[dict], state: dict, last: bool) -> tuple[list[dict], dict]:
        """Return the rows of a shard, and the state after it."""
        left_out = Counter(state["left_out"])
        packer = Packer(self.options["max_length"], self.options["packing"]) if self.packs else None
        if packer:
            packer.ids, packer.document_lengths = state["ids"], state["document_lengths"]
            rows = [row for document in encoded for row in packer.add(document["input_ids"])]
            rows += packer.finish(self.options["drop_tail"]) if last else []
        else:
            rows = []
            for example in encoded:
                reason = example.pop("left_out")
                left_out.update([reason] if reason else [])
                rows += [] if reason else [example]
        return rows, {
            "ids": packer.ids if packer else [],
            "document_lengths": packer.document_lengths if packer else [],
            "left_out": left_out,
            "rows": state["rows"] + len(rows),
            "tokens": state["tokens"] + sum(len(row["input_ids"]) for row in rows),
        }


def _order(parts: list, *, weighted: bool, seed: int) -> np.ndarray:
    """Return int64 [n, 2], the (source, row) pairs in the order of `load_dataset_spec`."""
    indices = [
        (Dataset.from_dict({"source": np.full(len(rows), i), "row": np.arange(len(rows))}), weight)
        for i, (weight, rows) in enumerate(parts)
    ]
    columns = combine(indices, weighted=weighted, seed=seed).with_format("numpy")[:]
    return np.stack([columns["source"], columns["row"]], axis=1)


def _claim(folder: Path, configuration: dict) -> None:
    """Write the configuration into a new folder, or check that an old one has the same."""
    path = folder / CONFIGURATION
    if path.exists():
        there = json.loads(path.read_text())
        for key in sorted({*there, *configuration}):
            if there.get(key) != configuration.get(key):
                raise ValueError(
                    f"{str(folder)!r} holds rows of another configuration: {key} was {there.get(key)!r} and "
                    f"is now {configuration.get(key)!r}; choose another folder"
                )
    elif folder.exists() and not (folder.is_dir() and all(map(_is_unfinished, folder.iterdir()))):
        raise ValueError(f"{str(folder)!r} is neither a new folder nor one that this command wrote")
    _write_atomically(path, json.dumps(configuration, indent=2).encode())


def _rows_digest(datasets: list[Dataset]) -> str:
    """Return a hash of the number of rows and of 64 rows spread over each dataset."""
    sha = hashlib.sha256()
    for rows in datasets:
        check_not_empty(rows, "a dataset")
        sha.update(str(len(rows)).encode())
        for index in np.linspace(0, len(rows) - 1, 64).astype(int).tolist():
            sha.update(repr(rows[index]).encode(errors="surrogatepass"))
    return sha.hexdigest()


def _state_of(path: Path) -> dict:
    try:
        return json.loads(pq.read_schema(path).metadata[b"dllm"])
    except (pa.ArrowInvalid, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a shard of this command, or is damaged; delete it") from error


def _shard(folder: Path, split: str, index: int) -> Path:
    return folder / split / f"{index:05d}.parquet"


def _is_unfinished(path: Path) -> bool:
    """Return whether a file is a leftover of `_write_atomically` in a killed process."""
    return path.name.startswith(f".{CONFIGURATION}.")


def _write_atomically(path: Path, data) -> None:
    """Write beside `path` and rename, so that an existing file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
