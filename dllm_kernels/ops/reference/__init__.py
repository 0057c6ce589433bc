"""Each operator in plain PyTorch: slow, short and obvious. The oracle that tests compare with."""

from .attention import (
    block_attention,
    block_attention_backward,
    cached_block_attention,
    kv_write_,
    visible_keys,
)

__all__ = [
    "block_attention",
    "block_attention_backward",
    "cached_block_attention",
    "kv_write_",
    "visible_keys",
]
