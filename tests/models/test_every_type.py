"""Every language model of transformers, written by transformers and by dk.save, is the same after dk.load.

Slow: `make test ARGS="-m slow -rs"` lists types of which no tiny model was made as skipped, with the reason.
"""

import pytest
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

import dllm_kernels as dk
from tests.models.tiny_types import NotTiny, logits, tiny_model

CAUSAL = [(name, False) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
MASKED = [(name, True) for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES]
# One of each way in which files and models differ: experts, expert lists, renames, prefixes, text models.
SOME = [
    (name, False)
    for name in (
        "qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "olmoe", "granitemoe", "gpt_oss", "jamba",
        "gpt_neox", "phi3", "llama4", "emu3", "nemotron_h",
    )
] + [("camembert", True), ("distilbert", True)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masked_lm"), CAUSAL + MASKED)
def test_every_type_loads_what_is_saved(name, masked_lm, tmp_path):
    try:
        model = tiny_model(name, masked_lm)
    except NotTiny as reason:
        pytest.skip(f"{name}: {reason}")
    check(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masked_lm"), CAUSAL + MASKED)
def test_every_type_computes_the_same_with_fused_layers(name, masked_lm):
    try:
        model = tiny_model(name, masked_lm)
    except NotTiny as reason:
        pytest.skip(f"{name}: {reason}")
    expected = logits(model)
    dk.fuse_layers(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("name", "masked_lm"), SOME)
def test_some_types_load_what_is_saved(name, masked_lm, tmp_path):
    check(tiny_model(name, masked_lm), tmp_path)


def check(model, folder) -> None:
    model.save_pretrained(folder / "transformers")
    dk.save(model, None, folder / "dk", max_shard_size="40KB")  # experts of a layer in several files
    for writer in ("transformers", "dk"):
        again, _ = dk.load(folder / writer, device="cpu")
        weights = again.state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items()), writer
        torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=0)
        assert again.config.diffusion["attention"] == ["block_causal"]
