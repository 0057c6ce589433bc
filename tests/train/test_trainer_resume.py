"""A run that was interrupted ends as the run that was not: the same bits, and no checkpoint is half."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset

import dllm_kernels as dk
from dllm_train.checkpoints import FILES, last_complete
from tests.train.tiny_models import MASK, tiny
from tests.train.trainer_runs import examples, losses, trainer


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


# 13 examples in batches of 2 and windows of 2 batches: four steps an epoch, of which the last is incomplete.
OPTIONS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=9, save_strategy="steps",
    save_steps=1, logging_steps=3, optim="adamw_torch", learning_rate=1e-2,
    lr_scheduler_type="linear", max_grad_norm=1.0,
)  # fmt: skip
CASES = {
    "shuffled": ("mdlm", {}),
    "workers": ("bd3lm", dict(dataloader_num_workers=2)),
    "dropout": ("mdlm", {}),
    "by-length": ("dream", dict(train_sampling_strategy="group_by_length")),
    "annealed": ("mdlm", dict(annealing_steps=7, annealing_length=12)),
    "adapters": ("mdlm", {}),
    "evaluated": ("mdlm", dict(eval_strategy="steps", eval_steps=2)),
    "stream": ("mdlm", {}),
    "stream-workers": ("mdlm", dict(dataloader_num_workers=2)),
}


def with_adapters():
    torch.manual_seed(0)
    model = tiny("llama", gain=2.0, attention="dllm")
    model.config.diffusion, model.config.mask_token_id = {"attention": ["bidirectional"]}, MASK
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear"))


MODELS = {
    "dropout": lambda: tiny("gpt2", gain=1.0, attention="sdpa", resid_pdrop=0.2),
    "adapters": with_adapters,
}


def run(folder, case, resume=None):
    objective, options = CASES[case]
    rows = examples(13)
    model = MODELS.get(case, lambda: None)()
    trained = trainer(
        folder, objective, rows=Stream(rows) if "stream" in case else rows, model=model,
        evaluated=examples(3, seed=2), **{**OPTIONS, **options},
    )  # fmt: skip
    trained.train(resume_from_checkpoint=resume)
    return trained


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return request.param, folder, run(folder, request.param)


# In the middle of an epoch, at its end, after it, and between two log entries.
@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_resumed_run_ends_with_the_same_bits(uninterrupted, step, tmp_path):
    case, folder, whole = uninterrupted
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = run(tmp_path, case, resume=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    of_whole, of_resumed = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    for index, state in of_whole["state"].items():
        for name, value in state.items():
            assert torch.equal(of_resumed["state"][index][name], value), name
    timed = ("runtime", "per_second", "preparation_time", "total_flos")
    expected, found = (
        [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in one.state.log_history]
        for one in (whole, resumed)
    )
    assert found == expected
    assert len(losses(whole)) == 3


@pytest.mark.parametrize("case", ["shuffled", "stream"])
def test_a_run_that_had_ended_takes_no_further_step(case, tmp_path):
    whole = run(tmp_path, case)
    again = run(tmp_path, case, resume=True)
    assert again.state.global_step == 9
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    entries = [one.state.log_history[-1]["train_loss"] for one in (whole, again)]
    assert entries[0] == entries[1]


@pytest.mark.parametrize("logging_steps", [1, 3, 4, 100])
def test_train_loss_is_the_mean_over_the_steps(logging_steps, tmp_path):
    def trained(every):
        made = trainer(
            tmp_path, rows=examples(13), **{**OPTIONS, "save_strategy": "no", "logging_steps": every}
        )
        return made, made.train()

    (each, _), (some, output) = trained(1), trained(logging_steps)
    assert len(losses(each)) == 9
    assert output.training_loss == pytest.approx(sum(losses(each)) / 9, rel=1e-6)
    assert some.state.log_history[-1]["train_loss"] == output.training_loss


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder, "shuffled")
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    for step in (3, 6, 9):
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def truncate(folder):
    file = folder / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES = {
    "a file that is missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a file that was cut": (truncate, "optimizer.pt has"),
    "a folder that was not completed": (lambda f: (f / FILES).unlink(), "was not completed"),
    "a list that is none": (lambda f: (f / FILES).write_text("[1"), "is corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_last_complete_one_named(copied, damage):
    spoil, message = DAMAGES[damage]
    spoil(copied / "checkpoint-9")
    with pytest.raises(ValueError, match=message) as refusal:
        run(copied, "shuffled", resume=str(copied / "checkpoint-9"))
    assert "checkpoint-9" in str(refusal.value)
    assert str(copied / "checkpoint-6") in str(refusal.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_true_resumes_from_the_last_complete_checkpoint(copied, damage):
    DAMAGES[damage][0](copied / "checkpoint-9")
    assert last_complete(copied) == copied / "checkpoint-6"
    assert run(copied, "shuffled", resume=True).state.global_step == 9


def test_without_a_complete_checkpoint_nothing_is_resumed(tmp_path):
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        run(tmp_path, "shuffled", resume=True)


def test_a_checkpoint_without_an_optimizer_is_not_resumed(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=1, save_only_model=True).train()
    dk.load(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="saved with save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_write_that_ends_early_leaves_the_checkpoints_of_before_and_no_other(tmp_path, monkeypatch):
    trained = trainer(tmp_path, **OPTIONS)
    write = trained._save_optimizer_and_scheduler

    def out_of_space(folder):
        if trained.state.global_step == 3:
            raise OSError("no space left on device")
        write(folder)

    monkeypatch.setattr(trained, "_save_optimizer_and_scheduler", out_of_space)
    with pytest.raises(OSError, match="no space left"):
        trained.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert run(tmp_path, "shuffled", resume=True).state.global_step == 9
    assert not (tmp_path / "unfinished-checkpoints").exists()


def test_a_checkpoint_of_the_same_step_is_replaced_whole(finished, tmp_path):
    shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "of-another-run").write_text("")
    trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    files = json.loads((tmp_path / "checkpoint-1" / FILES).read_text())
    assert "of-another-run" not in files
    assert not (tmp_path / "checkpoint-1" / "of-another-run").exists()


def test_the_best_checkpoint_is_known_and_kept(tmp_path):
    trained = trainer(
        tmp_path, rows=examples(13), evaluated=examples(4, seed=3),
        **{**OPTIONS, "save_steps": 3}, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        save_total_limit=1,
    )  # fmt: skip
    trained.train()
    best = Path(trained.state.best_model_checkpoint)
    assert best.is_dir() and best.parent == tmp_path
    bounds = {e["step"]: e["eval_loss"] for e in trained.state.log_history if "eval_loss" in e}
    assert best.name == f"checkpoint-{min(bounds, key=bounds.get)}"
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    model, _ = dk.load(best)
    for name, weight in model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], weight)
