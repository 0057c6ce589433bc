"""Two processes with the global normalizer compute the loss and the gradients of one."""

import pytest
import torch

from tests.train import several_processes
from tests.train.several_processes import CASES, batch, gradients, loss_of, start


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return several_processes.run(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(results, name, objective):
    model = start(name)
    loss = loss_of(model, objective, slice(0, 4), batch().numel())
    loss.backward()
    whole, found = results[name, objective]
    torch.testing.assert_close(whole, loss.detach(), rtol=1e-5, atol=0)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for parameter, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5 * largest)
