"""The offline tasks: held-out data, made on the spot, and what models score on them."""

import ast

import lm_eval
import pytest

import dllm_kernels as dk
from dllm_train.evaluate import DiffusionLM, task_manager
from dllm_train.evaluate.tasks import generated
from dllm_train.recipes.tiny_python import arithmetic
from dllm_train.recipes.tiny_python.data import collect_sources, split

NAMES = ["python_arithmetic", "python_infill", "python_bits_per_byte"]


@pytest.fixture(scope="module")
def manager():
    return task_manager(include_defaults=False, metadata={"pretrained": "tiny-python"})


@pytest.fixture(scope="module")
def lm():
    return DiffusionLM("tiny-python", threshold=0.9)


@pytest.fixture(scope="module")
def held_out() -> dict[str, str]:
    return {document.path: document.text for document in split(collect_sources())[1]}


def evaluate(lm, manager, name, **options):
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )
    return results["results"][name], results["samples"][name]


def test_they_are_found_beside_those_of_lm_eval(manager):
    assert {*NAMES, "dllm_offline"} == {*manager.all_tasks}
    assert {*manager.load(["dllm_offline"])["tasks"]} == {*NAMES}


def test_additions_are_all_held_out_pairs_and_examples_are_not(manager):
    documents = generated.arithmetic()
    pairs = [tuple(map(int, row["prompt"].split()[1:4:2])) for row in documents["test"]]
    assert pairs == arithmetic.held_out_pairs()
    assert all(row["prompt"] + row["answer"] + "\n" == arithmetic.line(a, b) for row, (a, b) in
               zip(documents["test"], pairs, strict=True))  # fmt: skip
    examples = [tuple(map(int, row["prompt"].split()[1:4:2])) for row in documents["train"]]
    assert examples and not any(arithmetic.is_held_out(a, b) for a, b in examples)


def test_tiny_python_adds(lm, manager):
    scores, samples = evaluate(lm, manager, "python_arithmetic", limit=40)
    assert scores["exact_match,none"] == 1.0
    assert samples[0]["resps"] == [[" 23"]] and samples[0]["arguments"][0][0] == "assert 10 + 13 =="


def test_few_shot_examples_are_lines(lm, manager):
    _, samples = evaluate(lm, manager, "python_arithmetic", limit=2, num_fewshot=2)
    *examples, question = samples[0]["arguments"][0][0].split("\n")
    assert question == "assert 10 + 13 ==" and len(examples) == 2
    for example in examples:
        exec(example)


def test_gaps_are_lines_of_held_out_definitions(held_out):
    documents = generated.gaps(pretrained="tiny-python")["test"]
    tokenizer = dk.load("tiny-python")[1]
    assert len(documents) > 100
    for row in documents:
        whole = row["before"] + row["line"] + row["after"]
        assert whole in held_out[row["place"].split(":")[0]] + "\n"
        ast.parse(whole)
        masks = int(row["gapped"].split("<mask:")[1].split(">")[0])
        given = tokenizer(row["before"])["input_ids"], tokenizer(row["after"])["input_ids"]
        assert masks == len(tokenizer(whole)["input_ids"]) - sum(map(len, given)) <= 24


def test_the_line_left_out_is_exact_and_parses_and_another_may_parse():
    row = dict(before="def f(x):\n", line="    return x", after="\n")
    for line, exact, parses in (("    return x", 1, 1), ("    return 2", 0, 1), ("    return (", 0, 0)):
        assert generated.score_line(row, [line]) == {"exact_line": exact, "parses": parses}


def test_infilled_lines_go_through_dk_infill(lm, manager):
    scores, samples = evaluate(lm, manager, "python_infill", limit=6)
    both, tokenizer = dk.load("tiny-python", attention="bidirectional")
    for sample in samples:
        document = sample["doc"]
        (whole,) = dk.infill(both, document["gapped"], tokenizer=tokenizer, threshold=0.9).texts
        assert document["before"] + sample["resps"][0][0] + document["after"] == whole
    exact = [sample["resps"][0][0] == sample["doc"]["line"] for sample in samples]
    assert scores["exact_line,none"] == sum(exact) / 6


def test_infilling_needs_a_tokenizer():
    with pytest.raises(ValueError, match="python_infill counts tokens; give pretrained="):
        generated.gaps()


def test_beginnings_are_whole_lines_of_held_out_files(held_out):
    documents = generated.beginnings()["test"]
    assert len(documents) == len({row["place"] for row in documents}) > 10
    for row in documents:
        assert held_out[row["place"]].startswith(row["text"]) and row["text"].endswith("\n")
        assert len(row["text"].encode()) <= generated.MOST_BYTES


def test_bits_per_byte_of_tiny_python(lm, manager):
    """Between the bound on the whole held-out files, 1.4, and gzip, 2.1; beginnings have less context."""
    scores, _ = evaluate(lm, manager, "python_bits_per_byte", limit=4)
    assert 1.2 < scores["bits_per_byte,none"] < 2.1
    measures = lm.measures.of("python_bits_per_byte")
    assert 0 < measures["bits_per_byte_error"] < 0.05
