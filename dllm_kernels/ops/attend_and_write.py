"""A layer's cached attention with what stands on either side of it: rotation, and the writes into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from .._arguments import check_optional_tensors, check_tensors
from ._autocast import cast, register_autocast
from ._autograd import register_in_place
from ._fake import register_fake
from .attention import _empty_output, _scale

_ops = torch.ops.dllm_kernels


def attend_and_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    page_table: Tensor,
    cache_spans: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    fresh_spans: Tensor | None = None,
    q_lengths: Tensor | None = None,
    scale: float | None = None,
    plan: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, attend to the cache and the fresh keys, and keep fresh keys and values in the pages.

    The same as `rotate_half(q, k, cos, sin)`, `cached_block_attention` and `kv_write_(..., positions)`, one
    after the other and with their arguments; on CUDA one launch for 16-bit tensors whose head dim is a
    multiple of 16. cos and sin [B or 1, Tq, D]; None: q and k are rotated already. positions int32 [B, Tq]:
    where keys and values are kept, -1 for nowhere; None: none are. No query may see in the cache what the
    same call writes, as both happen at once: then call `kv_write_` afterwards. Returns out [B, Hq, Tq, D].
    Without gradients, as `kv_write_`.
    """
    check_tensors(
        q=q, k=k, v=v, cache_k=cache_k, cache_v=cache_v, page_table=page_table, cache_spans=cache_spans
    )
    check_optional_tensors(
        cos=cos, sin=sin, positions=positions, fresh_spans=fresh_spans, q_lengths=q_lengths, plan=plan
    )
    out, _ = _ops.attend_and_write_(
        q, k, v, cache_k, cache_v, page_table, cache_spans, cos, sin, positions, fresh_spans, q_lengths,
        _scale(q, scale), plan,
    )  # fmt: skip
    return out


@register_fake("attend_and_write_")
def _(
    q, k, v, cache_k, cache_v, page_table, cache_spans, cos, sin, positions, fresh_spans, q_lengths, scale,
    plan=None,
):  # fmt: skip
    return _empty_output(q)


register_in_place("attend_and_write_")


def _cast_to_cache(q, k, v, cache_k, cache_v, page_table, cache_spans, cos, sin, *rest):
    heads = (cast(tensor, cache_k.dtype) for tensor in (q, k, v))
    angles = (None if tensor is None else cast(tensor, cache_k.dtype) for tensor in (cos, sin))
    return *heads, cache_k, cache_v, page_table, cache_spans, *angles, *rest


register_autocast(_ops.attend_and_write_.default, _cast_to_cache)
