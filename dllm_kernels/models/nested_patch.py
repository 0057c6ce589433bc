"""A change to a model that several contexts share, nested or in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

_lock = threading.RLock()
_made: dict[Hashable, tuple[ExitStack, set[object]]] = {}


@contextmanager
def nested_patch(key: Hashable, change: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Within this context the change holds that `change()` makes on entry and takes back on exit.

    Among contexts of one key, whatever their threads and order, the first makes it and the last to leave
    takes it back: each for itself would put back what another still needs, or has put there.
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
