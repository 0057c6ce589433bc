"""Patches of a model that several contexts share, nested or in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

_lock = threading.RLock()
_made: dict[Hashable, tuple[ExitStack, set[object]]] = {}


@contextmanager
def nested_patch(key: Hashable, change: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Hold the change that the context `change()` makes on entry and undoes on exit.

    Among contexts of one key, in any threads and order, the first makes the change and the last to leave
    undoes
    it: each by itself would restore a state that another still needs, or has made.
    """
    user = object()
    try:
        with _lock:
            if key not in _made:
                undo = ExitStack()
                undo.enter_context(change())
                _made[key] = undo, set()
            _made[key][1].add(user)
        yield
    finally:
        with _lock:
            undo, users = _made.get(key, (ExitStack(), {user}))
            users.discard(user)
            if not users:
                _made.pop(key, None)
                undo.close()
