"""Attention without a mask, by a vendor's library where its kernels are better.

Without spans no tile is skipped, and vendors tune for this case. `backend` makes the whole decision, as a
pure function of what is known before a launch.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
FEWEST_PAIRS = 512 * 512  # of queries and keys: below, a launch costs more than a library saves
WIDEST_HEAD = {"sdpa": 128, "flash_attention_3": 256}


@dataclass(frozen=True)
class UnmaskedCall:
    """A call without a mask, as known before its launch."""

    capability: tuple[int, int] | None  # of the GPU; None: not a GPU
    dtype: torch.dtype
    head_dim: int
    q_len: int
    kv_len: int
    needs_grad: bool = False
    deterministic: bool = False  # as torch.use_deterministic_algorithms asks


def backend(call: UnmaskedCall, *, flash_attention_3: bool) -> str:
    """Return "dllm" (our kernels), "sdpa" (torch's, cuDNN first) or "flash_attention_3" (if installed)."""
    half = call.dtype in (torch.bfloat16, torch.float16)
    if call.capability is None or call.capability < AMPERE or not half:
        return "dllm"  # on CPUs and in float32 ours is faster or more exact
    if call.q_len * call.kv_len < FEWEST_PAIRS or (call.needs_grad and call.deterministic):
        return "dllm"  # the libraries sum gradients in any order
    hopper = HOPPER <= call.capability < BLACKWELL
    if hopper and flash_attention_3 and call.head_dim <= WIDEST_HEAD["flash_attention_3"]:
        return "flash_attention_3"
    return "sdpa" if call.head_dim <= WIDEST_HEAD["sdpa"] else "dllm"


def vendor_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Return softmax(scale · q kᵀ) v by a library, shapes as in `block_attention`; None: use our kernels."""
    if not q.is_cuda or not _fit(q, k, v):  # ours casts under autocast, and reports misfits
        return None
    call = UnmaskedCall(
        torch.cuda.get_device_capability(q.device),
        q.dtype,
        q.shape[3],
        q.shape[2],
        k.shape[2],
        torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)),
        torch.are_deterministic_algorithms_enabled(),
    )
    match backend(call, flash_attention_3=_has_flash_attention_3()):
        case "flash_attention_3":
            from flash_attn_interface import flash_attn_func

            out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
        case "sdpa":
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                return F.scaled_dot_product_attention(
                    q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
    return None


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    alike = all(t.dim() == 4 and t.dtype == q.dtype and t.device == q.device for t in (q, k, v))
    return (
        alike
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and min(q.shape + k.shape) > 0
        and q.shape[1] % k.shape[1] == 0
        and q.shape[3] % 8 == 0
    )


@functools.cache
def _has_flash_attention_3() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None
