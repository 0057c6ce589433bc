"""Merged projections, in a model and by themselves."""

import copy

import pytest
import torch
from torch import nn

from dllm_kernels.models.merged_projections import merge_projections
from tests.sampling.tiny_models import tiny_model


@pytest.fixture(params=["llama", "qwen3"])
def pair(request):
    """A stock model and the same one merged."""
    stock = copy.deepcopy(tiny_model(request.param))
    merged = copy.deepcopy(stock)
    assert merge_projections(merged) == 2 * len(merged.model.layers)
    return stock, merged


@pytest.fixture
def group():
    """Three merged projections, as a model's attention calls them."""
    parent = nn.Module()
    for name, size in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        setattr(parent, name, nn.Linear(6, size))
    assert merge_projections(parent) == 1
    return parent.q_proj, parent.k_proj, parent.v_proj


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
