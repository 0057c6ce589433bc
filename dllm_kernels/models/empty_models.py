"""Models without weights: on the meta device to compare with a checkpoint, or on a device to be filled."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

# Allowed while a model is built: tied weights twice, and tables of positions and masks as buffers.
_TIMES, _SPARE, _BUFFERS = 4, 2**20, 2**28
_building = threading.RLock()


def model_class(config, masked_lm: bool, architectures: Sequence[str] | None = None) -> type:
    """Return the auto class that builds models of `config`, or else the class that `architectures` names."""
    import transformers

    kind = transformers.AutoModelForMaskedLM if masked_lm else transformers.AutoModelForCausalLM
    if type(config) in kind._model_mapping:
        return kind
    classes = (getattr(transformers, name, None) for name in architectures or () if isinstance(name, str))
    found = next((each for each in classes if getattr(each, "config_class", None) is type(config)), None)
    if found is None:
        raise ValueError(f"config.json: transformers has no language model for {config.model_type!r}")
    return found


def skeleton(kind: type, config, dtype: torch.dtype, elements: int | None = None) -> nn.Module:
    """Return a model on the meta device.

    kind: a model class of transformers, or one of its auto classes. elements: how many numbers the checkpoint
    holds; building stops early for a model that needs many more. A config that no model can be built from is
    a ValueError.
    """
    try:
        with _limited(None if elements is None else _TIMES * elements + _SPARE):
            return _built(kind, copy.deepcopy(config), torch.device("meta"), dtype)
    except ImportError:
        raise  # of a package that this class needs
    except _TooLarge as error:
        raise ValueError(f"config.json: {error}, and the weights hold {elements:,}") from None
    except Exception as error:  # any error of a model's constructor from sizes that do not match
        reason = str(error).partition("\n")[0]  # torch adds its stack
        raise ValueError(
            f"config.json: no model can be built from it ({type(error).__name__}: {reason})"
        ) from error


def empty_model(
    kind: type, config, device: torch.device, dtype: torch.dtype, without: Collection[str] = ()
) -> nn.Module:
    """Return a model with uninitialised weights. without: names of nn.Linear whose weight stays on meta."""
    if not without:
        return _built(kind, config, device, dtype)
    hook = nn.modules.module.register_module_parameter_registration_hook(_linear_weights_on_meta())
    try:
        model = _built(kind, config, device, dtype)
    finally:
        hook.remove()
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.is_meta and name not in without:
            empty = nn.Parameter(torch.empty_like(module.weight, device=device))
            module.weight = made.setdefault(id(module.weight), empty)
    model.tie_weights()
    return model


def _linear_weights_on_meta() -> Callable:
    thread = threading.get_ident()

    def replace(module: nn.Module, name: str, weight: nn.Parameter | None) -> nn.Parameter | None:
        if name != "weight" or not isinstance(module, nn.Linear) or threading.get_ident() != thread:
            return weight
        return nn.Parameter(torch.empty_like(weight, device="meta"))

    return replace


def _built(kind: type, config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers.initialization import no_init_weights

    build = getattr(kind, "_from_config", None) or kind.from_config  # the latter of auto classes
    # The meta device draws nothing, so that `dk.save` leaves torch's initialisation to other threads.
    undrawn = nullcontext() if device.type == "meta" else no_init_weights()
    with whole_weights(), torch.device(device), undrawn:
        model = build(config, dtype=dtype)
    model.tie_weights()
    return model


@contextmanager
def whole_weights() -> Iterator[None]:
    """Build models whole under DeepSpeed ZeRO-3, which would split them before they are filled.

    One thread at a time: DeepSpeed's setting, the default dtype and torch's initialisation belong to the
    process. Threads that change and restore them in another order would leave them changed.
    """
    from transformers.integrations import deepspeed

    with _building:
        reference = deepspeed._hf_deepspeed_config_weak_ref
        deepspeed.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            deepspeed._hf_deepspeed_config_weak_ref = reference


class _TooLarge(Exception):
    pass


@contextmanager
def _limited(most: int | None) -> Iterator[None]:
    """Raise as soon as modules of this thread have registered more than `most` numbers as parameters."""
    if most is None:
        yield
        return
    hooks = (
        nn.modules.module.register_module_parameter_registration_hook(_counter(most)),
        nn.modules.module.register_module_buffer_registration_hook(_counter(_BUFFERS)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _counter(most: int) -> Callable:
    thread, registered = threading.get_ident(), 0

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal registered
        if tensor is None or threading.get_ident() != thread:
            return
        registered += tensor.numel()
        if registered > most:
            shape = [*tensor.shape]
            raise _TooLarge(f"{type(module).__name__}.{name} of {shape} is more than the model can have")

    return count
