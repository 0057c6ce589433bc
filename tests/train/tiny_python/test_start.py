"""tiny-python's training: a run that starts from an exported checkpoint, also with more layers."""

import json

import pytest
import torch

from dllm_kernels.models.checkpoint import checkpoint_folder
from dllm_train.recipes.tiny_python.model import build_model, start_from
from dllm_train.recipes.tiny_python.run import prepare_tokenizer
from dllm_train.recipes.tiny_python.settings import Settings

FOLDER = str(checkpoint_folder("tiny-python"))
LAYERS = json.loads((checkpoint_folder("tiny-python") / "config.json").read_text())["num_hidden_layers"]


def started(layers: int, tmp_path):
    settings = Settings(layers=layers, init=FOLDER)
    model = build_model(settings, prepare_tokenizer(settings, tmp_path))
    start_from(model, FOLDER)
    return model.eval()


@torch.no_grad()
def test_a_deeper_model_starts_with_what_the_checkpoint_computes(tmp_path):
    ids = torch.randint(0, 4000, (2, 20), generator=torch.Generator().manual_seed(0))
    given = started(LAYERS, tmp_path)
    for copies in (2, 3):
        deeper = started(copies * LAYERS, tmp_path)
        assert len(deeper.model.layers) == copies * LAYERS
        torch.testing.assert_close(deeper(ids).logits, given(ids).logits, rtol=1e-5, atol=1e-5)
        parts = zip(deeper.model.layers[::copies], given.model.layers, strict=True)
        assert all(a.mlp.up_proj.weight.equal(b.mlp.up_proj.weight) for a, b in parts)


def test_numbers_of_layers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"must be a multiple of the {LAYERS} layers of"):
        started(LAYERS + 1, tmp_path)
