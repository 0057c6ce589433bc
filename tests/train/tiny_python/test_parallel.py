"""tiny-python's additions while it learns to decode in parallel."""

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import dllm_kernels as dk
from dllm_train.recipes.tiny_python import arithmetic, parallel

BLOCK = 32


def micro_model(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def test_only_answers_are_learned(monkeypatch):
    _, tokenizer = dk.load("tiny-python")
    seen = []

    def kept(model, ids, labels, **options):
        seen.append((ids, labels))
        return type("Output", (), {"loss": torch.zeros(())})

    monkeypatch.setattr(parallel, "mdlm_loss", kept)
    parallel.additions_loss(None, tokenizer, BLOCK, 5, np.random.default_rng(0))
    ((ids, labels),) = seen
    rng = np.random.default_rng(0)
    for row, (pair, learned) in enumerate(
        zip([arithmetic.training_pair(rng) for _ in range(5)], labels != -100, strict=True)
    ):
        assert tokenizer.decode(ids[row][ids[row] != tokenizer.mask_token_id]) == arithmetic.line(*pair)
        answer = arithmetic.line(*pair).removeprefix(arithmetic.prompt(*pair))
        assert tokenizer.decode(labels[row][learned]) == answer
    assert ids.shape == labels.shape == (5, BLOCK)


def test_repeated_additions_are_learned(monkeypatch):
    _, tokenizer = dk.load("tiny-python")
    model = micro_model(tokenizer)
    monkeypatch.setattr(parallel, "REPEATED_STEPS", 15)
    monkeypatch.setattr(parallel, "REPEATED_RATE", 0.02)

    def loss():
        with torch.no_grad():
            return float(parallel.additions_loss(model, tokenizer, BLOCK, 32, np.random.default_rng(1)))

    before = loss()
    parallel.repeat_additions(model, tokenizer, BLOCK, seed=0)
    assert loss() < 0.8 * before
