"""Processes that share the requests of an evaluation, as accelerate or torchrun started them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import Tensor, distributed

_PATIENCE = timedelta(weeks=1)  # a process may compute for long before the others hear of it


class Processes:
    """This process among those that share an evaluation; alone unless a launcher started several.

    device: where this process computes. rank: its index. world_size: how many there are.
    """

    def __init__(self, device: str | torch.device | None = None):
        self.rank, self.world_size, self.device = 0, 1, device
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        on_cpu = torch.device(device or "cuda").type == "cpu" or not torch.cuda.is_available()
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, one after the other: [world_size, ...] for a scalar."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts) if tensor.dim() == 0 else torch.cat(parts)

    def gather_object(self, value, dst: int = 0) -> list | None:
        """Return the values of all processes in process `dst`, and None in the others."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(value, values, dst=dst)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            distributed.barrier()
