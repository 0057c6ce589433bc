"""Rotation of queries and keys that is left to the attention which follows.

A layer of transformers rotates queries and keys and hands them to the attention function. Where attention is
a view's, one operator rotates them while it reads them. Then the rotation of a fused layer (fused_layers.py)
returns them as they are, and the attention function (attention.py) finds cos and sin here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Thread(threading.local):
    """What runs in this thread: whether rotations may be left, and the one that was: query, key, cos, sin."""

    allowed: bool = False
    left: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


_thread = _Thread()


@contextmanager
def late_rotation() -> Iterator[None]:
    """Let fused layers leave their rotation to the view, within this context and thread."""
    _thread.allowed = True
    try:
        yield
    finally:
        _thread.allowed, _thread.left = False, None


def leave_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether the attention that is called next rotates `query` and `key`.

    Under autocast it does not: it would convert them before.
    """
    if not _thread.allowed or torch.is_autocast_enabled(query.device.type):
        return False
    if _thread.left is not None:
        raise RuntimeError(_LOST)
    _thread.left = query, key, cos, sin
    return True


def take_rotation(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return cos and sin by which `query` and `key` are yet to be rotated; None: by nothing."""
    left = _thread.left
    if left is None:  # and nothing is written: compiled code guards what a thread has
        return None
    _thread.left = None
    if left[0] is not query or left[1] is not key:
        raise RuntimeError(_LOST)
    return left[2:]


_LOST = "attention was not called with the queries and keys that a fused layer left unrotated"
