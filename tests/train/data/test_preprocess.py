"""Preprocessed folders hold what loading gives; an interrupted run goes on, and nothing is mixed up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dllm_kernels as dk
from dllm_train.data import load_preprocessed_dataset, load_pretraining_dataset, load_sft_dataset
from dllm_train.data.pretraining import EncodeDocuments
from dllm_train.data.sft import EncodeExamples
from dllm_train.preprocess import PreprocessArguments, main, preprocess
from tests.train.data.conftest import make_tokenizer

ROOT = Path(__file__).parents[3]
PAIRS = [{"prompt": "a " * (i + 1), "response": "b " * (i % 7 + 1)} for i in range(23)]
TEXTS = [{"text": "the cat sat. " * (i % 5)} for i in range(23)]


@pytest.fixture
def arguments(tmp_path, write):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def made(kind, **changed):
        name = write("pairs.jsonl", PAIRS) if kind == "sft" else write("texts.jsonl", TEXTS)
        options = {
            "dataset": f"{name}[train:20,test:3]",
            "tokenizer": str(tmp_path / "tokenizer"),
            "output": str(tmp_path / kind),
            "kind": kind,
            "max_length": 16,
            "rows_per_shard": 6,
            **changed,
        }
        return PreprocessArguments(**options)

    return made


def rows_of(datasets):
    return {split: list(dataset) for split, dataset in datasets.items()}


def files_of(folder):
    return {file: file.stat().st_mtime_ns for file in Path(folder).rglob("*") if file.is_file()}


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_folder_has_the_examples_of_loading(arguments, tokenizer, num_proc):
    given = arguments("sft", num_proc=num_proc)
    counts = preprocess(given)
    loaded = rows_of(load_sft_dataset(given.dataset, tokenizer, max_length=16))
    assert rows_of(load_preprocessed_dataset(given.output, tokenizer)) == loaded
    assert rows_of(load_preprocessed_dataset(given.output, streaming=True)) == loaded
    assert len(loaded["train"]) < 20
    for split, rows in loaded.items():
        assert counts[split]["rows"] == len(rows)
        assert counts[split]["tokens"] == sum(row["length"] for row in rows)
    assert (counts["train"]["shards"], counts["test"]["shards"]) == (4, 1)


def test_the_name_of_a_folder_is_no_pattern(arguments, tokenizer, tmp_path):
    given = arguments("sft", output=str(tmp_path / "a[b]*"))
    preprocess(given)
    loaded = rows_of(load_sft_dataset(given.dataset, tokenizer, max_length=16))
    for streaming in (False, True):
        assert rows_of(load_preprocessed_dataset(given.output, streaming=streaming)) == loaded


@pytest.mark.parametrize("packing", [True, False])
def test_a_folder_has_the_rows_of_pretraining(arguments, tokenizer, packing):
    given = arguments("pretraining", packing=packing)
    preprocess(given)
    loaded = load_pretraining_dataset(given.dataset, tokenizer, max_length=16, packing=packing)
    assert rows_of(load_preprocessed_dataset(given.output, tokenizer)) == rows_of(loaded)


def test_a_mixture_has_the_order_of_loading(arguments, tokenizer, write):
    other = write("other.jsonl", [{"instruction": "c", "output": "d " * i} for i in range(1, 9)])
    given = arguments("sft")
    given.dataset = f"0.6*{given.dataset}+0.4*{other}"
    preprocess(given)
    loaded = load_sft_dataset(given.dataset, tokenizer, max_length=16)
    assert rows_of(load_preprocessed_dataset(given.output)) == rows_of(loaded)


@pytest.mark.parametrize("kind", ["sft", "pretraining"])
def test_an_interrupted_run_goes_on_and_redoes_no_shard(arguments, monkeypatch, tmp_path, kind):
    whole, given = arguments(kind, output=str(tmp_path / "whole")), arguments(kind)
    preprocess(whole)
    encode = EncodeExamples if kind == "sft" else EncodeDocuments
    apply, encoded = encode.apply, []

    def interrupted(self, rows, name, **options):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(options["numbers"])
        return apply(self, rows, name, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(encode, "apply", interrupted)
        preprocess(given)
    assert not any(file.name.startswith(".") for file in files_of(given.output))
    written = {file: time for file, time in files_of(given.output).items() if file.suffix == ".parquet"}
    assert len(written) == 2
    with pytest.raises(
        ValueError, match="holds an unfinished dataset; run the same preprocess command again"
    ):
        load_preprocessed_dataset(given.output)

    def recorded(self, rows, name, **options):
        encoded.append(options["numbers"])
        return apply(self, rows, name, **options)

    monkeypatch.setattr(encode, "apply", recorded)
    preprocess(given)
    assert [number for numbers in encoded for number in numbers] == [*range(20), 0, 1, 2]
    assert written.items() <= files_of(given.output).items()
    assert rows_of(load_preprocessed_dataset(given.output)) == rows_of(
        load_preprocessed_dataset(whole.output)
    )
    for file in files_of(whole.output):
        if file.suffix == ".parquet":
            assert file.read_bytes() == (Path(given.output) / file.relative_to(whole.output)).read_bytes()


def test_a_run_killed_at_its_start_goes_on(arguments, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / ".preprocess.json.123").write_text('{"data')
    assert preprocess(arguments("sft"))["train"]["rows"]


def test_another_configuration_in_the_same_folder_is_refused_by_name(arguments, write):
    given = arguments("sft")
    preprocess(given)
    before = files_of(given.output)
    for name, value in {"max_length": 24, "rows_per_shard": 7, "train_on": "last", "seed": 1}.items():
        was = getattr(given, name)
        with pytest.raises(
            ValueError, match=f"another configuration: {name} was {was!r} and is now {value!r}"
        ):
            preprocess(arguments("sft", **{name: value}))
    write("pairs.jsonl", [*PAIRS[:-1], {"prompt": "new", "response": "row"}][::-1])
    with pytest.raises(ValueError, match="another configuration: rows_digest"):
        preprocess(PreprocessArguments(**vars(given)))
    assert (
        before.items()
        >= {file: time for file, time in files_of(given.output).items() if file.suffix == ".parquet"}.items()
    )


def test_folders_of_others_are_left_alone(arguments, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="neither a new folder nor one that this command wrote"):
        preprocess(arguments("sft"))
    assert [*(tmp_path / "sft").iterdir()] == [tmp_path / "sft" / "notes"]
    with pytest.raises(FileNotFoundError, match=r"holds no preprocessed dataset: preprocess.json is missing"):
        load_preprocessed_dataset(tmp_path)


def test_a_damaged_shard_is_refused_by_name(arguments):
    given = arguments("sft")
    preprocess(given)
    shard = Path(given.output) / "train" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"00001.parquet' is not a shard of this command, or is damaged; delete it"
    ):
        preprocess(given)
    shard.unlink()
    preprocess(given)
    assert len(load_preprocessed_dataset(given.output)["train"])


def test_another_tokenizer_kind_or_block_size_is_refused(arguments):
    given = arguments("sft")
    preprocess(given)
    with pytest.raises(ValueError, match=r"was made with another tokenizer, .* or with another"):
        load_preprocessed_dataset(given.output, make_tokenizer("{{ messages }}"))
    with pytest.raises(ValueError, match="was made for sft; expected one for pretraining"):
        load_preprocessed_dataset(given.output, kind="pretraining")
    with pytest.raises(ValueError, match="max_length is 16; expected a multiple of block_size, 3"):
        load_preprocessed_dataset(given.output, kind="sft", block_size=3)


def test_a_preprocessed_folder_is_no_source(arguments, tokenizer):
    given = arguments("sft")
    preprocess(given)
    with pytest.raises(ValueError, match="a preprocessed dataset, read by load_preprocessed_dataset"):
        load_sft_dataset(f'"{given.output}"', tokenizer, max_length=16)


def test_a_checkpoint_gives_the_tokenizer_that_trains_it(arguments):
    _, tokenizer = dk.load("tiny-python")
    given = arguments("sft", tokenizer="tiny-python")
    preprocess(given)
    assert len(load_preprocessed_dataset(given.output, tokenizer)["train"])


def test_the_command_writes_a_folder(arguments, tmp_path):
    given = arguments("sft")
    command = [sys.executable, "-m", "dllm_train.preprocess"]
    for name in ("dataset", "tokenizer", "output", "max_length", "rows_per_shard"):
        command += [f"--{name}", str(getattr(given, name))]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "test: 3 rows" in done.stdout
    assert json.loads((Path(given.output) / "complete.json").read_text())["test"]["rows"] == 3


def test_bad_input_ends_the_command_with_a_message(arguments, monkeypatch, capsys):
    given = arguments("sft", dataset="a[train:0]")
    command = ["preprocess"]
    for name in ("dataset", "tokenizer", "output"):
        command += [f"--{name}", getattr(given, name)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        "preprocess: dataset specification, position 8: expected a positive count of rows, found '0'\n  a[tr"
    )
