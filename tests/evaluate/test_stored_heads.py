"""Likelihoods of models whose vocabulary head is an 8-bit copy of the tied embedding."""

import copy

import pytest
from torch import nn

from dllm_kernels.models.stored_weights import store_tied_head
from dllm_train.evaluate.likelihood import log_likelihoods
from tests.evaluate.plain_likelihood import MASK, PlainModel
from tests.evaluate.tiny_diffusion import marked

REQUESTS = [([5, 9, 12], [7, 3]), ([], [8]), ([4, 4, 30, 22, 6], [11, 40, 13])]


class DequantizedHead(nn.Module):
    """What an int8 head stands for on the CPU: each row of states is rounded to 8 bits."""

    def __init__(self, head):
        super().__init__()
        weight, scales = head.parts()
        self.register_buffer("weight", weight.double() * scales.double())

    def forward(self, x):
        steps = x.abs().amax(-1, keepdim=True) / 127
        return ((x / steps).round() * steps) @ self.weight.T


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal"])
def test_likelihoods_are_those_of_the_dequantized_head(attention):
    model = marked("qwen3", attention=attention)
    expected = copy.deepcopy(model)
    assert store_tied_head(model, "int8")
    float_head = PlainModel(expected, block_causal=attention == "block_causal")
    expected.lm_head = DequantizedHead(model.lm_head)
    plain = PlainModel(expected, block_causal=attention == "block_causal")
    assert all(token < MASK for pair in REQUESTS for part in pair for token in part)
    chains = [plain.chain(*request) for request in REQUESTS]
    with_rounding = pytest.approx(chains, rel=1e-4)
    assert [float_head.chain(*request) for request in REQUESTS] != with_rounding
    estimates = log_likelihoods(model, REQUESTS, estimator="ar_ftb")
    assert [estimate.log_likelihood for estimate in estimates] == with_rounding
    bounds = log_likelihoods(model, REQUESTS, samples=256, seed=3)
    for request, estimate in zip(REQUESTS, bounds, strict=True):
        exact = plain.bound(*request)
        assert abs(estimate.log_likelihood - exact) < 4 * estimate.standard_error + 1e-4 * abs(exact)
