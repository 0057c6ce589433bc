"""Tiny random models marked for diffusion, beside their plain float64 copies."""

from tests.evaluate.plain_likelihood import BLOCK, MASK, PlainModel
from tests.train.tiny_models import tiny


def marked(name="qwen3", *, attention="bidirectional", shift=False, **entries):
    """A tiny model that says how it was trained."""
    model = tiny(name, attention="eager", **entries)
    model.config.diffusion = {"attention": [attention], "block_size": BLOCK, "shift": shift}
    model.config.mask_token_id = MASK
    return model


def with_plain(name="qwen3", *, attention="bidirectional", shift=False, window=None, **entries):
    """(model, PlainModel of it); window: the sliding window of all its layers."""
    if name == "mistral":
        entries["sliding_window"] = window
    if name in ("gemma2", "modernbert"):
        entries["layer_types"] = ["full_attention"] * 2
    model = marked(name, attention=attention, shift=shift, **entries)
    block_causal = attention == "block_causal"
    return model, PlainModel(model, block_causal=block_causal, shift=shift, window=window)
