"""Models without weights: on the meta device to compare with a checkpoint, or on a device to be filled."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

# Allowed while a model is built: tied weights twice, and tables of positions and masks as buffers.
_TIMES, _SPARE, _BUFFERS = 4, 2**20, 2**28
_INITIALISED = "_is_hf_initialized"  # weights with this attribute are left alone by transformers
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
        with whole_weights(), _limited(None if elements is None else _TIMES * elements + _SPARE):
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
    with whole_weights(), _weights_on_meta():
        model = _built(kind, config, device, dtype)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, weight in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
            if name == "weight" and module_name in without:
                continue
            if weight not in made:
                made[weight] = _empty(weight, device)
            setattr(module, name, made[weight])
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:  # made in the shape of a weight, as zeros
                setattr(module, name, torch.zeros_like(buffer, device=device))
    model.tie_weights()
    return model


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Put the weights of modules that this thread makes on the meta device, where nothing is drawn.

    Buffers are made as ever.
    """
    thread = threading.get_ident()

    def replace(module: nn.Module, name: str, weight: nn.Parameter | None) -> nn.Parameter | None:
        if weight is None or weight.is_meta or threading.get_ident() != thread:
            return weight
        on_meta = _empty(weight, torch.device("meta"))
        setattr(on_meta, _INITIALISED, True)
        return on_meta

    hook = nn.modules.module.register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _empty(weight: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return an uninitialised weight like `weight`, with its attributes."""
    empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    empty = nn.Parameter(empty, weight.requires_grad)
    empty.__dict__.update({name: value for name, value in weight.__dict__.items() if name != _INITIALISED})
    return empty


def _built(kind: type, config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    build = getattr(kind, "_from_config", None) or kind.from_config  # the latter of auto classes
    with torch.device(device):
        model = build(config, dtype=dtype)
    model.tie_weights()
    return model


@contextmanager
def whole_weights() -> Iterator[None]:
    """Build models whole under DeepSpeed ZeRO-3, which would split them before they are filled.

    One thread at a time: DeepSpeed's setting and the default dtype, which transformers changes while it
    builds a model, are those of the process.
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
