"""A model of LLaDA's architecture as a GGUF file, as llama.cpp reads it (architecture "llada")."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
from torch import Tensor

KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
# A vocabulary that spells ids: the text "<5><17>" is the tokens 5 and 17, and back.
NO_MERGE = "b c"  # the file must list merges; none of these is a token


def write(model, path: Path, kind: str) -> None:
    """Write a bidirectional LlamaForCausalLM; kind, one of KINDS: of all its matrices, norms stay float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llada")
    writer.add_name("random")
    add_sizes(writer, config)
    writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(False)
    _add_vocabulary(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLADA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = _in_their_order(name, weight, config).numpy().astype(numpy.float32)
        stored = KINDS[kind] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            gguf.quants.quantize(values, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: gguf.GGUFWriter, config) -> None:
    """Write the sizes of a model whose layers are Llama's, from its transformers config."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def text_of(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def _add_vocabulary(writer: gguf.GGUFWriter, config) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size)])
    # User-defined tokens are found in a prompt as they stand, and printed as they stand.
    writer.add_token_types([gguf.TokenType.USER_DEFINED] * config.vocab_size)
    writer.add_token_merges([NO_MERGE])
    writer.add_mask_token_id(config.mask_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def _in_their_order(name: str, weight: Tensor, config) -> Tensor:
    """Reorder the rows of query and key projections.

    Its rotation takes neighbours 2i and 2i + 1 as a pair, that of transformers takes i and i + head_dim / 2.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if f".{projection}." in name:
            halves = weight.view(count, 2, config.head_dim // 2, -1)
            return halves.transpose(1, 2).reshape(weight.shape)
    return weight
