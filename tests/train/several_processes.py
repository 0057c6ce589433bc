"""Losses and gradients of one batch that two processes share, for every way to distribute a model.

Run by `run`, in processes of their own; `CASES` are what is tried.
"""

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dllm_train import bd3lm_loss, mdlm_loss, vocabulary_head
from tests.process_groups import end_together
from tests.train.tiny_models import MASK, tiny

PARTS = (slice(0, 1), slice(1, 4))  # rows of each process: their numbers of masked positions differ


def batch():
    torch.manual_seed(3)
    return torch.randint(3, MASK, (4, 12))


def with_adapters(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )


def ddp(model, **options):
    return DistributedDataParallel(model, **options)


def sharded(model, head=False):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


# name: (model of tests.train.tiny_models, what is done to it first, how it is distributed)
CASES = {
    "ddp": ("qwen3", None, ddp),
    "ddp-of-a-head-with-a-transform": ("bert", None, ddp),
    "ddp-of-a-soft-cap": ("gemma2", None, ddp),
    "ddp-with-unused-parameters": ("llama", None, lambda m: ddp(m, find_unused_parameters=True)),
    "ddp-static": ("llama", None, lambda m: ddp(m, static_graph=True)),
    "ddp-of-adapters": ("llama", with_adapters, ddp),
    "fsdp2": ("qwen3", None, sharded),
    "fsdp2-of-a-soft-cap": ("gemma2", None, sharded),
    "fsdp2-with-a-head-apart": ("llama", None, lambda m: sharded(m, head=True)),
}


def loss_of(model, objective, rows, normalizer):
    options = {"mask_id": MASK, "example_ids": range(4)[rows], "normalizer": normalizer, "eps": 0.2}
    if objective == "mdlm":
        return mdlm_loss(model, batch()[rows], **options).loss
    return bd3lm_loss(model, batch()[rows], block_size=4, **options).loss


def start(name):
    """The model of a case as it is before it is distributed."""
    model_name, prepare, _ = CASES[name]
    model = tiny(model_name, attention="eager")
    return model if prepare is None else prepare(model)


def gradients(model):
    names = {n.replace("module.", "").replace("_orig_mod.", ""): p for n, p in model.named_parameters()}
    found = {}
    for name, parameter in names.items():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        found[name] = gradient
    return found


def work(rank, folder):
    """One process's part of every case; process 0 writes the losses and gradients to folder/results."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    vocabulary_head.ROWS_AT_ONCE = 4  # several chunks, and not as many in one process as in the other
    results = {}
    for name, (*_, distribute) in CASES.items():
        for objective in ("mdlm", "bd3lm"):
            model = distribute(start(name))
            total = batch().numel()
            loss = loss_of(model, objective, PARTS[rank], total)
            (2 * loss).backward()  # gradients are averaged over the processes
            whole = loss.detach().clone()
            distributed.all_reduce(whole)
            results[name, objective] = whole, gradients(model)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    end_together()


def run(folder):
    """{(case, objective): (loss, gradients)} of two processes."""
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return torch.load(folder / "results")
