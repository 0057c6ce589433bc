"""config.return_dict = False, which a config.json may hold, changes no result."""

import pytest

import dllm_kernels as dk
from dllm_train import mdlm_loss
from dllm_train.evaluate.likelihood import log_likelihoods
from tests.models.tiny_types import IDS, MASK
from tests.models.tiny_types import tiny_model as tiny_type


@pytest.mark.parametrize("name", ["phi3", "qwen3"])
def test_samples_losses_and_likelihoods(name):
    model = tiny_type(name)
    model.config.mask_token_id, model.config.diffusion = MASK, {"attention": ["bidirectional"]}
    results = []
    for named in (True, False):
        model.config.return_dict = named
        sampled = dk.sample(model, [[5, 6, 7]], max_new_tokens=4, block_size=4, eos_ids=2).sequences
        (estimate,) = log_likelihoods(model, [([5, 6], [7, 8])], samples=2)
        loss = mdlm_loss(model, IDS, mask_id=MASK).loss
        results.append((sampled.tolist(), estimate.log_likelihood, loss.item()))
        assert model.config.return_dict is named
    assert results[0] == results[1]
