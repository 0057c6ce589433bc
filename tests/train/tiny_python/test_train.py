"""The recipe on a micro configuration: interruption, processes, labels, schedule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dllm_train.recipes.tiny_python import train as recipe
from dllm_train.recipes.tiny_python.export import export
from dllm_train.recipes.tiny_python.labels import bd3lm_labels, mdlm_labels
from dllm_train.recipes.tiny_python.model import build_model
from dllm_train.recipes.tiny_python.muon import newton_schulz, orthogonalised
from dllm_train.recipes.tiny_python.run import Run, learning_rate_factor, part_of_batch, prepare_tokenizer
from dllm_train.recipes.tiny_python.settings import BLOCK_SIZE, Settings
from dllm_train.recipes.tiny_python.train import train

MICRO = Settings(
    minutes=None,
    steps=6,
    hidden=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    vocab_size=300,
    rows=8,
    length=64,
    ar_share=0.3,
    addition_length=32,
    compile=False,
    checkpoint_minutes=0.0,
)


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def settings(source_folder):
    return replace(MICRO, sources=str(source_folder))


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    train(settings, out)
    return weights(out)


def test_a_run_begins_with_an_exported_checkpoint(settings, uninterrupted, tmp_path):
    out, exported = tmp_path / "out", tmp_path / "exported"
    tokenizer = prepare_tokenizer(settings, out)
    model = build_model(settings, tokenizer)
    model.load_state_dict(uninterrupted)
    export(model, tokenizer, exported, BLOCK_SIZE)
    again = Run(replace(settings, init=str(exported)), tmp_path / "again", "cpu")
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, uninterrupted[name].half().float())


def test_a_resumed_run_equals_an_uninterrupted_one(settings, uninterrupted, tmp_path, monkeypatch):
    class Interrupted(recipe.JsonLines):
        def write(self, entry):
            if entry.get("step") == 3 and "phase" in entry:
                raise KeyboardInterrupt
            super().write(entry)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "JsonLines", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    train(settings, tmp_path, resume=True)
    resumed = weights(tmp_path)
    assert all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())


def test_parts_of_a_batch_cover_it_once():
    parts = [part_of_batch(8, rank, 4) for rank in range(4)]
    assert [row for part in parts for row in range(8)[part]] == list(range(8))


def test_resume_without_a_checkpoint_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="resume"):
        train(settings, tmp_path, resume=True)


def test_processes_must_divide_the_rows(settings, tmp_path):
    with pytest.raises(ValueError, match="processes"):
        train(settings, tmp_path, processes=3)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    rates = [learning_rate_factor(p, 1000, 0.5) for p in (0.0, 0.5, 0.75, 1.0)]
    assert rates == [1.0, 1.0, 0.5, 0.0]
    assert learning_rate_factor(0.0, 0, 0.5) < 0.1


def test_mdlm_labels_leave_whole_lines_or_a_prefix():
    ids = torch.arange(1, 61).repeat(64, 1)
    ends_line = np.zeros(100, dtype=bool)
    ends_line[[10, 20, 30, 40, 50]] = True
    lines = mdlm_labels(ids, ends_line, 1.0, 0.0, np.random.default_rng(0)).view(64, 6, 10) != -100
    assert torch.equal(lines.all(-1), lines.any(-1))
    assert 0 < float(lines.float().mean()) < 0.6
    prefix = mdlm_labels(ids, ends_line, 0.0, 1.0, np.random.default_rng(0)) != -100
    assert bool((prefix[:, 1:] >= prefix[:, :-1]).all())
    assert torch.equal(mdlm_labels(ids, ends_line, 0.0, 0.0, np.random.default_rng(0)), ids)


def test_bd3lm_labels_give_a_prefix_of_each_block():
    ids = torch.ones(16, 96, dtype=torch.int64)
    free = (bd3lm_labels(ids, 1.0, np.random.default_rng(0)) != -100).view(16, 3, 32)
    assert bool((free[..., 1:] >= free[..., :-1]).all())
    assert bool(free[..., -1].all())
    assert not bool(free.all())


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = [torch.randn(16, 40), torch.randn(40, 16), torch.randn(16, 40), torch.randn(16, 16)]
    for matrix, result in zip(matrices, orthogonalised(matrices), strict=True):
        assert result.shape == matrix.shape
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(result)
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.3
        assert float((result * (u @ v)).sum() / (result.norm() * (u @ v).norm())) > 0.95


def test_newton_schulz_of_a_batch_equals_one_by_one():
    batch = torch.randn(3, 8, 12)
    alone = torch.cat([newton_schulz(batch[i : i + 1], 5) for i in range(3)])
    torch.testing.assert_close(newton_schulz(batch, 5), alone)
