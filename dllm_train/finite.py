"""Stop a run whose losses or weights are no longer finite, before anything is saved."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

_MOST = 4096


class FiniteLosses:
    """The losses since the last check, by step and examples. Nothing waits for the device until `check`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, example_ids: Tensor) -> None:
        """Remember the loss of a batch, a scalar, without its graph."""
        self._seen.append((step, loss.detach(), example_ids))
        if len(self._seen) >= _MOST:  # of a run that neither logs nor saves
            self.check(collective=False)

    def check(self, what: str = "loss", collective: bool = True) -> None:
        """Raise FloatingPointError if a loss is NaN or infinite, and forget them.

        collective: all ranks call this, and all raise if one has to.
        """
        seen, self._seen = self._seen, []
        message = None
        if seen:
            values = torch.stack([loss.float() for _, loss, _ in seen])
            first = int((~values.isfinite()).int().argmax())
            if not values[first].isfinite():
                step, _, example_ids = seen[first]
                message = (
                    f"the {what} of step {step} is {float(values[first])}, on examples "
                    f"{example_ids.tolist()}. "
                    "Training stopped before anything was saved; the last checkpoint is from before"
                )
        _raise_everywhere(message, self._device if collective else None)


def check_finite_weights(model: nn.Module, step: int, device: torch.device, collective: bool = True) -> None:
    """Raise FloatingPointError if a weight is NaN or infinite; all ranks do if one does and `collective`."""
    message = None
    names, finite = [], []
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "ds_tensor", parameter)  # this rank's part, under ZeRO-3
        local = local.to_local() if hasattr(local, "to_local") else local
        if local.is_floating_point():
            names.append(name)
            finite.append(local.detach().isfinite().all())
    if finite:
        finite = torch.stack(finite).tolist()
        if not all(finite):
            message = (
                f"{names[finite.index(False)]} has weights that are not finite after step {step}, "
                f"{finite.count(False)} of {len(names)} tensors in all, so they are not saved"
            )
    _raise_everywhere(message, device if collective else None)


def _raise_everywhere(message: str | None, device: torch.device | None) -> None:
    """Raise `message` if there is one. With `device`, where ranks communicate, all raise one's message."""
    messages = [message]
    if device is not None and distributed.is_available() and distributed.is_initialized():
        failed = torch.tensor(message is not None, dtype=torch.int32, device=device)
        distributed.all_reduce(failed)
        if failed.item():
            messages = [None] * distributed.get_world_size()
            distributed.all_gather_object(messages, message)
    for rank, found in enumerate(messages):
        if found is not None:
            raise FloatingPointError(found if len(messages) == 1 else f"rank {rank}: {found}")
