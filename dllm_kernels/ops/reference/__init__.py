"""Each operator in plain PyTorch: slow, short and obvious. The oracle that tests compare with."""

from .advance import advance_
from .attention import (
    attend_and_write_,
    block_attention,
    block_attention_backward,
    cached_block_attention,
    kv_write_,
    visible_keys,
)
from .cross_entropy import (
    diffusion_cross_entropy,
    diffusion_cross_entropy_backward,
    diffusion_cross_entropy_gradient_,
    linear_diffusion_cross_entropy,
)
from .layer import (
    add_rms_norm,
    rms_norm,
    rms_norm_backward,
    rotate_half,
    rotate_half_backward,
    silu_mul,
    silu_mul_backward,
)

__all__ = [
    "add_rms_norm",
    "advance_",
    "attend_and_write_",
    "block_attention",
    "block_attention_backward",
    "cached_block_attention",
    "diffusion_cross_entropy",
    "diffusion_cross_entropy_backward",
    "diffusion_cross_entropy_gradient_",
    "kv_write_",
    "linear_diffusion_cross_entropy",
    "rms_norm",
    "rms_norm_backward",
    "rotate_half",
    "rotate_half_backward",
    "silu_mul",
    "silu_mul_backward",
    "visible_keys",
]
