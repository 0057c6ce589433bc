"""Checks of every checkpoint that training saves."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

import dllm_kernels as dk

IDS = torch.arange(20, 40)[None]


def assert_loads(folder: Path, adapters: bool = False) -> None:
    """Check that `dk.load` and plain transformers read the same model and tokenizer, and that it samples."""
    model, tokenizer = dk.load(str(folder))
    if adapters:
        from peft import AutoPeftModelForCausalLM

        plain = AutoPeftModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    else:
        (architecture,) = AutoConfig.from_pretrained(folder).architectures
        plain, loading = getattr(transformers, architecture).from_pretrained(
            folder, attn_implementation="sdpa", output_loading_info=True
        )
        assert not any(loading.values()), loading
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    if model.config.diffusion["attention"] == ["bidirectional"]:
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    assert dk.sample(model, ["1 + 1 ="], tokenizer=tokenizer, max_new_tokens=8).sequences.shape[0] == 1
