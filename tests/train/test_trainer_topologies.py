"""One global batch gives one gradient, however ranks, accumulation steps and dataloader workers share it."""

import pytest
import torch

from tests.train.trainer_runs import on_two_ranks
from tests.train.trainer_topologies import CASES, ONE_RANK, TWO_RANKS, train


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    on_two_ranks("tests.train.trainer_topologies", folder)
    ranks = [torch.load(folder / f"results-{rank}", weights_only=False) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    return [rank["results"] for rank in ranks]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """The name of a case and its training with batches of 8."""
    return request.param, train(tmp_path_factory.mktemp("one"), request.param, *ONE_RANK["8"])


def assert_same_training(found, expected):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    assert len(found["meters"]) == len(expected["meters"])
    for step, of_one in zip(found["meters"], expected["meters"], strict=True):
        assert step == pytest.approx(of_one, rel=1e-4)
    assert len(found["gradients"]) == len(expected["gradients"])
    for step, of_one in zip(found["gradients"], expected["gradients"], strict=True):
        assert step.keys() == of_one.keys()
        largest = max(float(gradient.abs().max()) for gradient in of_one.values())
        for name, gradient in of_one.items():
            torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-4)


@pytest.mark.parametrize("topology", [name for name in ONE_RANK if name != "8"])
def test_accumulation_steps_change_nothing(case, topology, tmp_path):
    name, expected = case
    assert_same_training(train(tmp_path, name, *ONE_RANK[topology]), expected)


@pytest.mark.parametrize("topology", TWO_RANKS)
def test_two_ranks_change_nothing(case, topology, of_two_ranks):
    name, expected = case
    for results in of_two_ranks:
        assert_same_training(results[name, topology], expected)
