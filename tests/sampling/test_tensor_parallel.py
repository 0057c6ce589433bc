"""A model whose heads lie in two processes samples the tokens of one process, with every cache."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, DistributedConfig

import dllm_kernels as dk
from tests.process_groups import end_together
from tests.sampling.tiny_models import prompts_of, tiny_model

RANKS = 2
CASES = [
    ("bidirectional", dict(cache="none")),
    ("bidirectional", dict(cache="prefix")),
    ("bidirectional", dict(cache="dual", temperature=0.7, seed=3)),
    ("block_causal", dict(cache="none")),
    ("block_causal", dict(cache="block")),
]


def all_tokens(model) -> list[torch.Tensor]:
    """What is sampled in every case."""
    found = []
    for attention, options in CASES:
        model.config.diffusion = {"attention": [attention], "block_size": 8}
        options = dict(max_new_tokens=12, threshold=0.3, **options)
        found.append(dk.sample(model, prompts_of(3, 13, seed=5), **options).sequences)
    return found


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", distributed_config=DistributedConfig(tp_size=RANKS)
    )
    torch.save(all_tokens(model.eval()), f"{folder}/{rank}.pt")
    end_together()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_tokens_are_those_of_one_process(tmp_path):
    tiny_model.cache_clear()  # its config changes
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    mp.spawn(one_rank, (str(tmp_path),), nprocs=RANKS)
    expected = all_tokens(model)
    tiny_model.cache_clear()
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(map(torch.equal, found, expected)), rank
