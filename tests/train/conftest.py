"""A tiny Qwen3, and Python sources small enough to train on in seconds."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dllm_train.data import collect_sources, split


@pytest.fixture
def tiny_model():
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).double()


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory):
    """40 Python files in a few folders, some of them held out."""
    root = tmp_path_factory.mktemp("sources")
    for i in range(40):
        path = root / f"package{i % 4}" / f"file{i}.py"
        path.parent.mkdir(exist_ok=True)
        lines = [f"def function_{i}_{j}(value):\n    return value * {i * j} + {j}\n\n\n" for j in range(12)]
        path.write_text("".join(lines))
    assert split(collect_sources(root))[1]
    return root
