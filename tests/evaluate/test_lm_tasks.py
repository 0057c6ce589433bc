"""Stock kinds of task on local files: what a model whose every probability is known scores, by hand."""

import json
import math
import subprocess

import lm_eval
import pytest

from dllm_train.evaluate import DiffusionLM
from tests.evaluate.known_models import write_unigram
from tests.evaluate.local_tasks import CHANCES, ROWS, TASKS, manager, write_tasks
from tests.train.recipe_runs import ROOT, environment, launcher


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_unigram(tmp_path_factory.mktemp("unigram"), CHANCES)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def evaluate(checkpoint, tasks, names=TASKS, lm=None, **options):
    lm = lm or DiffusionLM(str(checkpoint), estimator="ar_ftb")
    return lm_eval.simple_evaluate(
        model=lm, tasks=[*names], task_manager=manager(tasks), bootstrap_iters=0, **options
    )


@pytest.fixture(scope="module")
def results(checkpoint, tasks):
    return evaluate(checkpoint, tasks)


def test_multiple_choice(results):
    scores = results["results"]["choices"]
    assert scores["acc,none"] == pytest.approx(2 / 3), "the sums say a, a and b; b, a and b are right"
    assert scores["acc_norm,none"] == pytest.approx(1 / 3), "the means say a, a and aa"
    (first, second), *_ = [sample["resps"] for sample in results["samples"]["choices"]]
    assert first[0][0] == pytest.approx(nats(" a"), abs=1e-4)
    assert second[0][0] == pytest.approx(nats(" b"), abs=1e-4)


def test_generation_through_a_filter(results):
    assert results["results"]["numbers"]["exact_match,number"] == 0.5
    assert [sample["filtered_resps"] for sample in results["samples"]["numbers"]] == [["777"]] * 4


def test_rolling(results):
    texts = [row["text"] for row in ROWS["texts"]]
    expected = -sum(map(nats, texts)) / math.log(2) / sum(map(len, texts))
    assert results["results"]["texts"]["bits_per_byte,none"] == pytest.approx(expected, abs=1e-4)


def test_greedy_continuations_are_found_without_being_asked_for(results):
    assert results["results"]["words"]["acc,none"] == 0.5, "77 is what decoding gives, and 7a is not"


def test_what_was_measured_is_in_the_results(results):
    measures = without_speed(results["config"]["dllm"]["measures"])
    assert measures["numbers"] == {"empty_answers": 0.0, "at_length_limit": 1.0, "tokens_per_forward": 1.0}
    assert measures["texts"] == {"nats_error": 0.0, "bits_per_byte_error": 0.0}
    assert results["versions"]["texts"] == 3


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_changes_no_answer(checkpoint, tasks, batch_size):
    """Monte Carlo noise and noise of sampling included."""
    answers = [answers_of(checkpoint, tasks, size) for size in (batch_size, "auto")]
    assert_same(*answers)


def answers_of(checkpoint, tasks, batch_size, **options) -> dict[str, list]:
    """Likelihoods of three random masks, and texts drawn at temperature 0.8."""
    lm = DiffusionLM(str(checkpoint), samples=3, batch_size=batch_size, temperature=0.8, seed=2)
    found = evaluate(checkpoint, tasks, lm=lm, gen_kwargs=dict(do_sample=True), **options)
    return {name: [sample["resps"] for sample in found["samples"][name]] for name in TASKS}


def assert_same(answers: dict[str, list], others: dict[str, list]) -> None:
    """Texts are equal, and likelihoods but for the rounding of matrix products."""
    assert answers["numbers"] == others["numbers"]
    for name in ("choices", "texts", "words"):
        assert numbers_in(answers[name]) == pytest.approx(numbers_in(others[name]), rel=1e-5)


def numbers_in(answers) -> list[float]:
    if isinstance(answers, list | tuple):
        return [number for one in answers for number in numbers_in(one)]
    return [float(answers)]


def test_two_processes_share_the_requests(checkpoint, tasks, tmp_path, results):
    """Of 4, 4, 3 and 2 documents, so that one process has more than the other."""
    output = tmp_path / "facts.json"
    arguments = [str(checkpoint), str(tasks), str(output), str(tmp_path / "cache")]
    command = [*launcher("cpu"), "-m", "tests.evaluate.two_processes", *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(output.read_text())
    assert facts["processes"] == [[0, 2], [1, 2]]
    scores = {name: results["results"][name] for name in TASKS}
    assert numbers_of(facts["scores"]) == pytest.approx(numbers_of(scores), rel=1e-5)
    expected = {name: [sample["resps"][:1] for sample in results["samples"][name]] for name in TASKS}
    found = {name: [resps[:1] for resps in answers] for name, answers in facts["answers"].items()}
    assert numbers_in(found["texts"]) == pytest.approx(numbers_in(expected["texts"]), rel=1e-5)
    assert found["numbers"] == expected["numbers"]
    alone = results["config"]["dllm"]
    assert facts["requests"] == alone["requests"]
    assert without_speed(facts["measures"]) == without_speed(alone["measures"])


def without_speed(measures: dict) -> dict:
    return {
        task: {name: value for name, value in found.items() if name != "tokens_per_second"}
        for task, found in measures.items()
    }


def numbers_of(scores: dict) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, values in scores.items()
        for name, value in values.items()
        if isinstance(value, float)
    }


def nats(text: str) -> float:
    """log p of a text, by hand."""
    others = (1 - sum(CHANCES.values())) / (256 + 4 - 1 - len(CHANCES))
    return sum(math.log(CHANCES.get(character, others)) for character in text)
