"""Modules whose weights lie in several processes, so that every call of them communicates."""

from __future__ import annotations

from collections.abc import Iterable

from torch import distributed, nn
from transformers import PreTrainedModel


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Return whether all processes must call `modules` at once.

    True for FSDP units, for DTensor weights and for weights of DeepSpeed ZeRO-3.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    units = (FSDPModule, FullyShardedDataParallel)
    return any(
        any(isinstance(part, units) for part in module.modules())
        or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())
        for module in modules
    )


def choose_fsdp_units(model: PreTrainedModel) -> None:
    """Leave modules that share a weight with others out of model._no_split_modules, the units of FSDP.

    The embeddings of ModernBERT are such a unit, and their weight is the head's too: sharded in one unit, it
    could not be sharded in another. Raises ValueError for heads whose bias is a weight of another module, as
    in BERT and RoBERTa: accelerate makes the head a unit of its own.
    """
    holders: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                holders.setdefault(id(weight), set()).add(module)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if len(holders.get(id(bias), ())) > 1:
        raise ValueError(
            f"FSDP cannot shard this {type(model).__name__}, whose head shares its bias with another module; "
            "use the configuration zero3 or ddp"
        )
    shared = [modules for modules in holders.values() if len(modules) > 1]
    for unit in model.modules():
        inside = set(unit.modules())
        if any(modules & inside and not modules <= inside for modules in shared):
            model._no_split_modules = set(model._no_split_modules or ()) - {type(unit).__name__}
