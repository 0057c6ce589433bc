"""Finished work is kept by lm-eval's own means, and a run that was interrupted goes on where it was."""

import lm_eval
import pytest
from lm_eval.api.instance import Instance

from dllm_train.evaluate import DiffusionLM, lm, pace
from tests.evaluate.known_models import write_unigram
from tests.evaluate.local_tasks import CHANCES, TASKS, manager, write_tasks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_unigram(tmp_path_factory.mktemp("unigram"), CHANCES))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return manager(write_tasks(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(autouse=True)
def small_waves(monkeypatch):
    monkeypatch.setattr(lm, "_FIRST", 2)
    monkeypatch.setattr(lm, "_LEAST", 1)
    monkeypatch.setattr(lm, "ROWS", 1)
    monkeypatch.setattr(pace, "WAVE", 0.0)


@pytest.fixture
def asked(monkeypatch) -> dict[str, list]:
    """Record the requests to the model, by the function that is called."""
    calls = {}

    def watch(name: str) -> None:
        original = getattr(lm, name)

        def call(*arguments, **options):
            calls.setdefault(name, []).extend(arguments[-1])
            return original(*arguments, **options)

        monkeypatch.setattr(lm, name, call)

    for name in ("generate", "log_likelihoods", "rolling_log_likelihood"):
        watch(name)
    return calls


def evaluate(checkpoint, tasks, names=TASKS, model_options=(), **options):
    model = DiffusionLM(checkpoint, estimator="ar_ftb", **dict(model_options))
    return lm_eval.simple_evaluate(
        model=model, tasks=[*names], task_manager=tasks, bootstrap_iters=0, **options
    )


def test_an_interrupted_run_goes_on(checkpoint, tasks, asked, tmp_path, monkeypatch):
    options = dict(names=["numbers"], use_cache=str(tmp_path / "kept"))
    generate, calls = lm.generate, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lm, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(checkpoint, tasks, **options)
    assert len(asked["generate"]) == 2, "two of the four prompts were answered"
    asked.clear()
    results = evaluate(checkpoint, tasks, **options)
    assert len(asked["generate"]) == 2, "the other two"
    assert results["results"]["numbers"]["exact_match,number"] == 0.5
    assert results["config"]["dllm"]["measures"]["numbers"]["at_length_limit"] == 1.0


def test_a_finished_run_asks_nothing_again(checkpoint, tasks, asked, tmp_path):
    first = evaluate(checkpoint, tasks, use_cache=str(tmp_path / "kept"))
    assert {name: len(requests) for name, requests in asked.items()} == {
        "generate": 4, "log_likelihoods": 8, "rolling_log_likelihood": 4,
    }  # fmt: skip
    asked.clear()
    second = evaluate(checkpoint, tasks, use_cache=str(tmp_path / "kept"))
    assert not any(asked.values())
    assert second["results"] == first["results"]


@pytest.mark.parametrize("change", ["weights", "options"])
def test_answers_of_another_model_are_refused(checkpoint, tasks, tmp_path, change):
    kept = dict(names=["numbers"], use_cache=str(tmp_path / "kept"))
    evaluate(checkpoint, tasks, **kept)
    other = str(write_unigram(tmp_path / "other", {"a": 0.5})) if change == "weights" else checkpoint
    more = {} if change == "weights" else dict(threshold=0.5)
    with pytest.raises(ValueError, match="holds answers of another model or of other options"):
        evaluate(other, tasks, model_options=more, **kept)


def test_batch_size_is_no_other_option(checkpoint, tasks, asked, tmp_path):
    kept = dict(names=["numbers"], use_cache=str(tmp_path / "kept"))
    evaluate(checkpoint, tasks, **kept)
    asked.clear()
    evaluate(checkpoint, tasks, model_options=dict(batch_size=3), **kept)
    assert not any(asked.values())


def test_prepared_requests_are_kept(checkpoint, tasks, tmp_path, monkeypatch):
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path))
    first = evaluate(checkpoint, tasks, cache_requests=True)
    assert len([*tmp_path.iterdir()]) == len(TASKS)
    assert evaluate(checkpoint, tasks, cache_requests=True)["results"] == first["results"]


def test_equal_requests_are_computed_once(checkpoint, tasks, asked):
    model = DiffusionLM(checkpoint, estimator="ar_ftb")
    pairs = [("q:", " a"), ("q:", " b"), ("q:", " a")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", 0, 1)) for pair in pairs]
    first, _, third = model.loglikelihood(requests)
    assert first == third and len(asked["log_likelihoods"]) == 2
