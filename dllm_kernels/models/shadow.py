"""A copy of a model for probing: its forwards change neither the model nor the counts of its hooks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection
from functools import partial

from torch import nn

_KEPT_HOOKS = ("torch", "transformers", "accelerate", "peft")  # modules whose hooks are part of the model
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def shadow(model: nn.Module, hooked: Collection[nn.Module] = ()) -> nn.Module:
    """Return a copy of `model` in eval mode with the same parameters, its own buffers, and without users'
    hooks but those on modules in `hooked`; `model` itself if a copy would not compute."""
    return model if _runs_only_itself(model) else _shadow(model, {}, hooked)


def _runs_only_itself(model: nn.Module) -> bool:
    """Return whether a copy would not compute: with sharded weights, or forwards bound to the originals."""
    return any("forward" in vars(module) for module in model.modules()) or any(
        hasattr(weight, "device_mesh") for weight in model.parameters()
    )


def _shadow(module: nn.Module, made: dict[nn.Module, nn.Module], hooked: Collection[nn.Module]) -> nn.Module:
    if module not in made:
        made[module] = shadow = module.__class__.__new__(module.__class__)
        for name, value in vars(module).items():
            vars(shadow)[name] = copy.copy(value) if isinstance(value, dict | set) else value
        vars(shadow)["training"] = False
        for name in _HOOKS:
            hooks = vars(module)[name].items()
            kept = [(key, hook) for key, hook in hooks if module in hooked or is_part_of_model(hook)]
            vars(shadow)[name] = OrderedDict(kept)
        shadow._buffers.update({n: None if b is None else b.clone() for n, b in module._buffers.items()})
        shadow._modules.update(
            {n: None if m is None else _shadow(m, made, hooked) for n, m in module._modules.items()}
        )
    return made[module]


def is_part_of_model(hook) -> bool:
    """Return whether a hook comes from a library that computes with it, not from a user."""
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.split(".")[0] in _KEPT_HOOKS
