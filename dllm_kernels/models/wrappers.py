"""The transformers model in a wrapper that only forwards calls: DataParallel, DDP, torch.compile, peft."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Classes, by name and by the package they come from, that compute what the module in this attribute does.
_TRANSPARENT = {
    ("torch.nn", "DataParallel"): "module",
    ("torch.nn", "DistributedDataParallel"): "module",
    ("torch._dynamo", "OptimizedModule"): "_orig_mod",
}


def unwrapped(model: object) -> object:
    """Return the transformers model in `model`, through any number of wrappers; other objects as they are.

    ValueError for a wrapper that does more than forward calls: a learned prompt, sharded parameters, a custom
    module.
    """
    while isinstance(model, nn.Module) and not is_transformers_model(model):
        inner = _passed_on_to(model)
        if inner is None:
            _refuse_wrapper(model)
            break
        model = inner
    return model


def is_transformers_model(model: object) -> bool:
    """Return whether `model` is a model of transformers."""
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _passed_on_to(model: nn.Module) -> nn.Module | None:
    if _is_peft_model(model):
        _refuse_more_than_adapters(model)
        return model.get_base_model()
    for kind in type(model).__mro__:
        for (package, name), attribute in _TRANSPARENT.items():
            if kind.__name__ == name and kind.__module__.startswith(package):
                return getattr(model, attribute)
    return None


def _is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _refuse_more_than_adapters(model: nn.Module) -> None:
    """Refuse peft models that compute outside the base model: the computation would be lost."""
    for config in _active_configs(model):
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            reason = (
                "the learned prompt lies in the wrapper, and the model inside would be sampled without it"
            )
        elif kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
            reason = (
                "the wrapper chooses adapters by the prompt, and the model inside would be sampled without"
            )
        else:
            continue
        raise ValueError(
            f"model is a {type(model).__name__} with {kind} around a "
            f"{type(model.get_base_model()).__name__}: {reason}. That is not supported; use adapters in the "
            "layers (LoRA, for example), or give a function of ids, with the attention it was trained for"
        )


def _active_configs(model: nn.Module) -> Iterator:
    active = model.active_adapters if hasattr(model, "active_adapters") else model.active_adapter
    active = [active] if isinstance(active, str) else active
    return (model.peft_config[name] for name in active if name in model.peft_config)


def _refuse_wrapper(model: nn.Module) -> None:
    """Refuse a module around a transformers model: it would run it with its own, usually causal, mask."""
    inner = next((module for module in model.modules() if is_transformers_model(module)), None)
    if inner is None:
        return
    sharded = type(model).__name__ == "FullyShardedDataParallel"
    advice = (
        "its weights are whole only within its own forward: gather them first (summon_full_params, or "
        "its full state dict in a new model)"
        if sharded
        else "give the inner model, or a function of ids to use it as it stands"
    )
    raise ValueError(f"model is a {type(model).__name__} around a {type(inner).__name__}: {advice}")
