"""GGUF files with q8_0 weights, whose linear layers stay int8: from the file's bytes, never as floats.

A q8_0 block is 32 inputs of one output: a scale in float16, then 32 int8 [ggml-org/ggml, ggml-quants.h].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dllm_kernels.models.empty_models import empty_model, skeleton
from dllm_kernels.models.incoming_layers import layers_to_store, receivers
from dllm_kernels.models.quantization_config import SCALE
from dllm_kernels.models.stored_weights import linear_layers

BLOCK = 32
# Architectures whose tensors are those of transformers, but for the order of rows in these projections.
_PAIRED_ROWS = {"llama": ("q_proj", "k_proj"), "qwen2": (), "qwen3": ()}
_ROWS_AT_ONCE = 4096  # of an embedding


def has_q8_0(file: Path) -> bool:
    """Return whether a GGUF file holds q8_0 weights that `read_q8_0` keeps."""
    import gguf

    reader = gguf.GGUFReader(file)
    kinds = {tensor.tensor_type for tensor in reader.tensors}
    return _architecture(reader) in _PAIRED_ROWS and gguf.GGMLQuantizationType.Q8_0 in kinds


def read_q8_0(file: Path, dtype: torch.dtype):
    """Return the model of a GGUF file, its linear layers int8 and everything else in `dtype`.

    Layers that are q8_0 in the file have its bytes, with a scale for each 32 inputs; those in other formats
    are rounded, with a scale for each output. Missing weights and other shapes are a ValueError.
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = gguf.GGUFReader(file)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    vars(config).pop("_name_or_path", None)
    stock = skeleton(AutoModelForCausalLM, config, dtype)
    tensors = _by_weight(reader, stock)
    quantized = {
        name: BLOCK
        for name in linear_layers(stock, "int8")
        if tensors[f"{name}.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    }
    layers = layers_to_store(stock, quantized, "int8")
    model = empty_model(AutoModelForCausalLM, config, torch.device("cpu"), dtype, layers)
    take, state = receivers(model, layers, dtype), model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        layer, order = name.rpartition(".")[0], _row_order(name, _architecture(reader), config)
        if layer in quantized and name.endswith(".weight"):
            weight, scales = _parts(tensor.data)
            take[name](order(weight))
            take[f"{layer}.{SCALE}"](order(scales))
        elif name in take:
            take[name](order(_floats(tensor, slice(None))))
        else:
            _fill(state[name].detach(), tensor, order)
    return model


def _by_weight(reader, stock) -> dict[str, object]:
    """Return the tensors of a file by the names of the model's weights, tied ones once."""
    import gguf

    name = _architecture(reader)
    arch = next(arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == name)
    names = gguf.get_tensor_name_map(arch, stock.config.num_hidden_layers)
    there = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, object] = {}
    missing, state = {}, stock.state_dict(keep_vars=True)
    for weight, parameter in state.items():
        base, _, kind = weight.rpartition(".")
        tensor = there.get(f"{names.get_name(base)}.{kind}")
        if tensor is None:
            missing[weight] = parameter
            continue
        shape = [*map(int, reversed(tensor.shape))]
        if shape != [*parameter.shape]:
            raise ValueError(f"the weights do not fit: {tensor.name} is {shape}, not {[*parameter.shape]}")
        found[weight] = tensor
    filled = {id(state[weight]) for weight in found}
    if lacking := sorted(weight for weight, parameter in missing.items() if id(parameter) not in filled):
        raise ValueError(f"the weights do not fit: missing: {', '.join(lacking[:8])}")
    return found


def _parts(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return int8 [out, in] and float32 scales [out, in / 32] of q8_0 rows, bytes [out, in / 32 * 34]."""
    parts = torch.from_numpy(np.array(blocks)).unflatten(1, (-1, 2 + BLOCK))
    scales = parts[..., :2].contiguous().view(torch.float16)[..., 0]
    return parts[..., 2:].flatten(1).view(torch.int8), scales.float()


def _floats(tensor, rows: slice) -> Tensor:
    """Return rows of a tensor in any format, in float32."""
    import gguf

    return torch.from_numpy(gguf.dequantize(tensor.data[rows], tensor.tensor_type).astype(np.float32))


def _fill(weight: Tensor, tensor, order: Callable[[Tensor], Tensor]) -> None:
    if weight.dim() < 2 or len(weight) <= _ROWS_AT_ONCE:
        weight.copy_(order(_floats(tensor, slice(None))))
        return
    for start in range(0, len(weight), _ROWS_AT_ONCE):  # an embedding or head, whose rows are in order
        rows = slice(start, start + _ROWS_AT_ONCE)
        weight[rows].copy_(_floats(tensor, rows))


def _row_order(name: str, architecture: str, config) -> Callable[[Tensor], Tensor]:
    """Return what puts rows of a weight in transformers' order.

    llama.cpp rotates neighbours 2i and 2i + 1 of a head, transformers i and i + half a head.
    """
    paired = name.split(".")[-2] in _PAIRED_ROWS[architecture]
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    if not paired:
        return lambda rows: rows
    return lambda rows: rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _architecture(reader) -> str:
    return str(reader.fields["general.architecture"].contents())
