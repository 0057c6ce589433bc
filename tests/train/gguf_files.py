"""Tiny GGUF files, written with the gguf package."""

from pathlib import Path

import numpy as np
import pytest


def paired(weight, heads):
    """Rows of a query or key projection as GGUF orders them: pairs (i, i + D/2) of a head side by side."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def write_gguf(
    file: Path,
    model,
    leave_out: str = "",
    tied: bool = False,
    kind: str = "F32",
    within=("",),
    arch="llama",
    **more,
) -> Path:
    """Write a tiny Llama, Qwen2 or Qwen3 as llama.cpp does [ggml-org/ggml, docs/gguf.md].

    kind: of the matrices whose name in the model holds one of `within`; the others are float32.
    """
    gguf = pytest.importorskip("gguf")
    from benchmarks.peers.gguf_file import add_sizes  # which imports gguf too

    config = model.config
    writer = gguf.GGUFWriter(str(file), arch)
    add_sizes(writer, config)
    letters = [chr(ord("a") + index) for index in range(26)]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(f"a{letter}" for letter in letters)][: config.vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[29:]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    found = next(kind for kind, called in gguf.MODEL_ARCH_NAMES.items() if called == arch)
    names = gguf.get_tensor_name_map(found, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == leave_out or (tied and name == "lm_head.weight"):
            continue
        if "q_proj" in name and arch == "llama":
            weight = paired(weight, config.num_attention_heads)
        if "k_proj" in name and arch == "llama":
            weight = paired(weight, config.num_key_value_heads)
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        values = weight.float().numpy().astype(np.float32)
        if values.ndim == 2 and any(part in name for part in within):
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(called, gguf.quants.quantize(values, stored), raw_dtype=stored)
        else:
            writer.add_tensor(called, values)
    for name, weight in more.items():
        writer.add_tensor(name.replace("__", "."), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
