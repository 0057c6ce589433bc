"""Sources of a specification: every kind of file, limits, held-out rows, filters and mixtures."""

import gzip
import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from dllm_train.data import load_dataset_spec, sources


def numbered(first, count, **fields):
    return [{"text": f"row {i}", "number": i, **fields} for i in range(first, first + count)]


def numbers(dataset):
    return [row["number"] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv", "saved", "saved split"])
def test_files_of_every_kind_have_the_same_rows(tmp_path, suffix, streaming):
    rows, path = numbered(0, 7), tmp_path / f"rows.{suffix.replace(' ', '_')}"
    dataset = Dataset.from_list(rows)
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        dataset.to_parquet(path)
    elif suffix == "csv":
        dataset.to_csv(path)
    elif suffix == "tsv":
        dataset.to_csv(path, sep="\t")
    elif suffix == "saved":
        DatasetDict(train=dataset).save_to_disk(path)
    else:
        dataset.save_to_disk(path)
    loaded = load_dataset_spec(f'"{path}"', streaming=streaming)
    assert list(loaded) == ["train"]
    assert list(loaded["train"]) == rows


def test_a_text_file_is_one_document(tmp_path):
    text = "a line\n\n  another, with spaces \nÖl\n"
    (tmp_path / "a.txt").write_text(text)
    for streaming in (False, True):
        assert list(load_dataset_spec(str(tmp_path / "a.txt"), streaming=streaming)["train"]) == [
            {"text": text}
        ]


def test_files_of_a_folder_are_read_in_order_and_by_split(tmp_path, write):
    write("rows/b.jsonl", numbered(3, 2))
    write("rows/a.jsonl", numbered(0, 3))
    write("rows/below/train-2.jsonl", numbered(5, 1))
    write("rows/validation.jsonl", numbered(50, 2))
    write("rows/.hidden.jsonl", numbered(90, 2))
    (tmp_path / "rows" / "README").write_text("what this is")
    loaded = load_dataset_spec(str(tmp_path / "rows"))
    assert numbers(loaded["train"]) == [0, 1, 2, 3, 4, 5]
    assert numbers(loaded["test"]) == [50, 51]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_count_takes_the_first_rows(write, streaming):
    name = write("a.jsonl", numbered(0, 10))
    loaded = load_dataset_spec(f"{name}[train:4]", streaming=streaming)
    assert numbers(loaded["train"]) == [0, 1, 2, 3]
    assert list(loaded) == ["train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_test_rows_are_taken_from_training_rows_and_not_trained(write, streaming):
    name = write("a.jsonl", numbered(0, 10))
    loaded = load_dataset_spec(f"{name}[train:4,test:3]", streaming=streaming)
    assert numbers(loaded["test"]) == [0, 1, 2]
    assert numbers(loaded["train"]) == [3, 4, 5, 6]
    assert numbers(load_dataset_spec(f"{name}[train,test:3]")["train"]) == [*range(3, 10)]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_are_concatenated(write, streaming):
    a, b = write("a.jsonl", numbered(0, 5)), write("b.jsonl", numbered(100, 5))
    loaded = load_dataset_spec(f"{a}[train:2,test:1]+{b}[train:2,test:1]", streaming=streaming)
    assert numbers(loaded["train"]) == [1, 2, 101, 102]
    assert numbers(loaded["test"]) == [0, 100]


def test_a_buffer_shuffles_the_training_rows_of_a_stream(write):
    name = write("a.jsonl", numbered(0, 40)) + "[train,test:8]"
    shuffled = load_dataset_spec(name, streaming=True, shuffle_buffer=10, seed=3)
    order = numbers(shuffled["train"])
    assert sorted(order) == [*range(8, 40)] != order
    assert numbers(shuffled["test"]) == [*range(8)]
    assert order == numbers(load_dataset_spec(name, streaming=True, shuffle_buffer=10, seed=3)["train"])
    assert order != numbers(load_dataset_spec(name, streaming=True, shuffle_buffer=10, seed=4)["train"])
    with pytest.raises(ValueError, match="shuffle_buffer is 10, which only streams need"):
        load_dataset_spec(name, shuffle_buffer=10)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_filter_keeps_the_rows_of_a_value(write, streaming):
    rows = [*numbered(0, 3, lang="python"), *numbered(3, 3, lang="c")]
    name = write("a.jsonl", rows)
    assert numbers(load_dataset_spec(f"{name}[lang:c]", streaming=streaming)["train"]) == [3, 4, 5]
    assert numbers(load_dataset_spec(f'{name}[number:"4",train:5]')["train"]) == [4]


def test_weights_set_the_shares_of_a_mixture_and_every_row_comes(write):
    a, b = write("a.jsonl", numbered(0, 400)), write("b.jsonl", numbered(1000, 400))
    mixed = numbers(load_dataset_spec(f"3*{a}+1*{b}", seed=1)["train"])
    assert set(mixed) == {*range(400), *range(1000, 1400)}
    share = Counter(number < 1000 for number in mixed)[True] / len(mixed)
    assert abs(share - 0.75) < 0.04
    assert mixed == numbers(load_dataset_spec(f"0.75*{a}+0.25*{b}", seed=1)["train"])
    assert mixed == numbers(load_dataset_spec(f"3*{a}+1*{b}", seed=1, streaming=True)["train"])
    assert mixed != numbers(load_dataset_spec(f"3*{a}+1*{b}", seed=2)["train"])


def test_a_weight_that_would_repeat_the_others_without_end_is_refused(write):
    a, b = write("a.jsonl", numbered(0, 4)), write("b.jsonl", numbered(1000, 4))
    with pytest.raises(ValueError, match=r"weight 1e-09 of a mixture is too small: about 4000000004 rows"):
        load_dataset_spec(f"1e-9*{a}+1*{b}")


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files_and_folders_are_no_patterns(write, streaming):
    name = write("odd [a-c] *?/rows +{x}:1,2.jsonl", numbered(0, 3))
    write("odd a bc/rows +x:1,2.jsonl", numbered(100, 3))
    for there in (name, name.replace("/rows +{x}:1,2.jsonl", "")):
        assert numbers(load_dataset_spec(there, streaming=streaming)["train"]) == [0, 1, 2]


def test_a_compressed_file_is_read(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, numbered(0, 3))))
    assert numbers(load_dataset_spec(str(tmp_path / "a.jsonl.gz"))["train"]) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_without_the_rows_are_refused(tmp_path, write, streaming):
    name = write("a.jsonl", numbered(0, 3))
    if not streaming:
        with pytest.raises(ValueError, match=r"a.jsonl', train has 3 rows, fewer than the 5 asked for"):
            load_dataset_spec(f"{name}[train:5]")
        with pytest.raises(ValueError, match="fewer than the 2 asked for after the 2 taken for tests"):
            load_dataset_spec(f"{name}[train:2,test:2]")
    with pytest.raises(ValueError, match=r"has no split 'test'; its splits are \['train'\]"):
        load_dataset_spec(f"{name}[train,test]", streaming=streaming)
    with pytest.raises(ValueError, match="split 'other' is neither for training nor for tests"):
        load_dataset_spec(f"{name}[other]", streaming=streaming)
    with pytest.raises(ValueError, match="two of the splits listed are for train"):
        load_dataset_spec(f"{name}[train:1,train_b:1]", streaming=streaming)
    with pytest.raises(ValueError, match=r"has no field 'lang'; its fields are \['text', 'number'\]"):
        load_dataset_spec(f"{name}[lang:c]", streaming=streaming)
    with pytest.raises(ValueError, match="is empty: no row is there, or none matches the filters"):
        load_dataset_spec(f"{name}[text:none]", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_lone_surrogate_in_json_is_refused_by_name(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl'.* could not be read: .*surrogate pair .* in row 0"):
        load_dataset_spec(str(tmp_path / "a.jsonl"), streaming=streaming)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"'\./none.jsonl': there is no such file or folder"):
        load_dataset_spec("./none.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"a.jsonl' could not be read"):
        load_dataset_spec(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"b.parquet' could not be read"):
        load_dataset_spec(str(tmp_path / "b.parquet"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl' could not be read: it has no rows"):
        load_dataset_spec(str(tmp_path / "empty.jsonl"))
    (tmp_path / "c.docx").write_bytes(b"what")
    with pytest.raises(ValueError, match=r"files of one kind of .jsonl, .*; found .docx"):
        load_dataset_spec(str(tmp_path / "c.docx"))
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"d.txt' could not be read"):
        load_dataset_spec(str(tmp_path / "d.txt"))
    write("mixed/a.jsonl", numbered(0, 1))
    (tmp_path / "mixed" / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"files of one kind of .*; found .jsonl, .txt"):
        load_dataset_spec(str(tmp_path / "mixed"))
    with pytest.raises(ValueError, match="a configuration, here 'python', belongs to a dataset of the hub"):
        load_dataset_spec(f"{write('e.jsonl', numbered(0, 1))}:python")
    (tmp_path / "f.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"f.jsonl"):
        load_dataset_spec(str(tmp_path / "f.jsonl"))


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset, in place of `datasets.load_dataset`; returns the calls."""
    calls = []

    def load_dataset(name, configuration, streaming):
        calls.append((name, configuration))
        splits = ("train_sft", "train_gen", "test_sft", "validation")
        rows = DatasetDict({split: Dataset.from_list(numbered(i, 3)) for i, split in enumerate(splits)})
        return {split: rows[split].to_iterable_dataset() for split in splits} if streaming else rows

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_has_a_configuration_and_splits_of_its_own_names(hub, streaming):
    loaded = load_dataset_spec("org/chat:default[train_sft:2,test_sft]", streaming=streaming)
    assert hub == [("org/chat", "default")]
    assert numbers(loaded["train"]) == [0, 1]
    assert numbers(loaded["test"]) == [2, 3, 4]
    assert numbers(load_dataset_spec("org/chat[validation:1]", streaming=streaming)["test"]) == [3]


def test_several_splits_for_training_are_told_apart_by_the_user(hub):
    message = (
        r"has several train splits, \['train_gen', 'train_sft'\]; name one of them: org/chat\[train_sft\]"
    )
    with pytest.raises(ValueError, match=message):
        load_dataset_spec("org/chat")


def test_sources_of_different_fields_are_not_concatenated(write):
    a, b = write("a.jsonl", [{"text": "a"}]), write("b.jsonl", [{"text": 3}])
    with pytest.raises(ValueError, match="have different fields"):
        load_dataset_spec(f"{a}+{b}")
