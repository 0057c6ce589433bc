"""Write keys and values into the pages of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_tensors
from ._autocast import cast, register_autocast
from ._autograd import register_in_place
from ._fake import register_fake

_ops = torch.ops.dllm_kernels


def kv_write_(
    cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, page_table: Tensor, positions: Tensor
) -> None:
    """Store keys and values of tokens at their positions, in place.

    cache_k and cache_v [pages, page_size, Hkv, D]; k and v [B, Hkv, T, D] of the same dtype; page_table int32
    [B, P]; positions int32 [B, T]: token position p of sequence b goes to page page_table[b, p // page_size],
    offset p % page_size; -1 skips a token. Of two tokens for one place the later one stays. Nothing that is
    written shares memory with another argument, and, while autograd records, nothing requires grad: the
    gradient would be lost.
    """
    check_tensors(cache_k=cache_k, cache_v=cache_v, k=k, v=v, page_table=page_table, positions=positions)
    _ops.kv_write_(cache_k, cache_v, k, v, page_table, positions)


@register_fake("kv_write_")
def _(cache_k, cache_v, k, v, page_table, positions):
    return None


register_in_place("kv_write_")


def _cast_to_cache(cache_k, cache_v, k, v, *rest):
    return cache_k, cache_v, cast(k, cache_k.dtype), cast(v, cache_v.dtype), *rest


register_autocast(_ops.kv_write_.default, _cast_to_cache)
