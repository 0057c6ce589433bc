"""Two ranks resume to the same bits, stop together, and share examples with tensor-parallel peers."""

import json

import pytest
import torch

from dllm_train.checkpoints import FILES
from tests.train.trainer_runs import examples, losses, on_two_ranks, trainer
from tests.train.trainer_two_ranks import OPTIONS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    on_two_ranks("tests.train.trainer_two_ranks", folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    ranks = [torch.load(folder / f"results-{rank}", weights_only=False) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    return ranks


@pytest.mark.parametrize("step", [4, 6])
def test_a_resumed_run_ends_with_the_same_bits(ranks, step):
    assert [rank["resumed"][step] for rank in ranks] == [True, True]


def test_one_rank_continues_what_two_began(folder, ranks, tmp_path):
    # Step 4 lies between two log entries, of which each rank has a part.
    options = OPTIONS | dict(per_device_train_batch_size=4)
    one = trainer(tmp_path, rows=examples(13), **options)
    one.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    logged = [entry["loss" if "loss" in entry else "train_loss"] for entry in one.state.log_history]
    assert logged == pytest.approx(ranks[0]["resumed"]["losses"], rel=1e-5)


def test_a_checkpoint_lists_the_files_of_both_ranks(folder, ranks):
    files = json.loads((folder / "whole" / "checkpoint-4" / FILES).read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth", "meter_0.pt", "meter_1.pt", "model.safetensors"} <= set(
        files
    )


def test_both_ranks_stop_when_the_loss_of_one_is_not_finite(folder, ranks):
    for rank in ranks:
        assert "loss of step 2 is nan, on examples [4, 5]" in rank["stopped"]
    assert not [path for path in (folder / "stopped").glob("checkpoint-*")]


def test_tensor_parallel_peers_train_as_one_process(ranks, tmp_path):
    one = trainer(tmp_path, per_device_train_batch_size=8, max_steps=2, evaluated=examples(3))
    one.train()
    for rank in ranks:
        of_peers, weights, bound = rank["peers"]
        assert of_peers == pytest.approx(losses(one), rel=1e-6)
        assert bound == pytest.approx(one.evaluate()["eval_loss"], rel=1e-6)
        for name, weight in one.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight)
