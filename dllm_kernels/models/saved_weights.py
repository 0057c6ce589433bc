"""The tensors of a model as a checkpoint holds them: stored layers in their bytes, the others as they are."""

from __future__ import annotations

from torch import Tensor, nn

from dllm_kernels.models.checkpoint_layouts import Layout
from dllm_kernels.models.quantization_config import SCALE, QuantizationConfig
from dllm_kernels.models.stored_weights import SCALED, StoredLinear


def saved_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint of `model` by name. keep_vars: Parameters, not their data.

    Heads that hold a copy of the embedding have the embedding's weight there.
    """
    renamed = {f"{name}.scales": f"{name}.{SCALE}" for name in _stored_layers(model)}
    state = model.state_dict(keep_vars=keep_vars)
    for name, source in copied_heads(model).items():
        del state[f"{name}.scales"], state[f"{name}.weight"]
        if f"{source}.weight" in state:
            state[f"{name}.weight"] = state[f"{source}.weight"]
    return {renamed.get(name, name): tensor for name, tensor in state.items()}


def copied_heads(model: nn.Module) -> dict[str, str]:
    """Return the heads of `model` that hold an 8-bit copy of the embedding, by name -> its name."""
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, StoredLinear) and module.copies_embedding
    ]
    if not heads:
        return {}
    embedding = model.get_input_embeddings()
    source = next(name for name, module in model.named_modules() if module is embedding)
    return dict.fromkeys(heads, source)


def quantized_layers(model: nn.Module) -> dict[str, int | None]:
    """Return the layers of `model` that are stored in 8 bits, by name -> inputs per scale (None: all).

    A layer that is one group, where others have groups of this size, counts as one of them.
    """
    layers = {name: layer for name, layer in _stored_layers(model).items() if layer.stored.groups}
    sizes = {name: layer.in_features // layer.stored.groups for name, layer in layers.items()}
    of_groups = {size for name, size in sizes.items() if size < layers[name].in_features}
    return {name: size if size in of_groups else None for name, size in sizes.items()}


def quantized_kind(model: nn.Module) -> str:
    """Return the kind of the layers of `model` that are stored in 8 bits: "int8" unless they are "fp8".

    Raises ValueError for a model with both, which no checkpoint holds.
    """
    dtypes = {layer.stored_dtype for layer in _stored_layers(model).values()}
    kinds = [kind for kind, dtype in SCALED.items() if dtype in dtypes]
    if len(kinds) > 1:
        raise ValueError(f"this {type(model).__name__} has int8 and fp8 layers; a checkpoint holds one kind")
    return kinds[0] if kinds else "int8"


def quantization_of(model: nn.Module, layout: Layout | None) -> QuantizationConfig | None:
    """Return what config.json says of the 8-bit layers of `model`; None if it has none.

    layout: of the checkpoint, whose names of layers are used; None: the stock one.
    """
    sizes = quantized_layers(model)
    if not sizes:
        return None
    kinds = (nn.Linear, StoredLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    written = {name: name if layout is None else layout.own_module_name(name) for name in names}
    others = [written[name] for name in names if name not in sizes]
    named = {written[name]: size for name, size in sizes.items()}
    return QuantizationConfig.of_layers(named, others, quantized_kind(model))


def _stored_layers(model: nn.Module) -> dict[str, StoredLinear]:
    """Return the stored layers of `model` that a checkpoint holds as such, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StoredLinear) and not module.copies_embedding
    }
