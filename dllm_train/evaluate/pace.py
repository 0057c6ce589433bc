"""Estimate the time of a run of requests early in the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
log = logging.getLogger("lm_eval.dllm")

WORTH_TELLING = 10.0  # seconds
WAVE = 60.0  # seconds of work that an interruption may lose


def waves(
    what: str,
    items: Sequence[Item],
    costs: Sequence[float],
    *,
    first: int,
    least: int,
    most: int | None = None,
    quiet: bool = False,
) -> Iterator[list[Item]]:
    """Yield `items` in order: `first` of them, whose time tells that of all, then what takes a minute.

    costs: of each item, in proportion to its time. least, most: how many items a later wave may have. The
    expected time is logged after the first wave, and what is left after every tenth of the costs, unless
    `quiet`.
    """
    begin, done, total, told = time.monotonic(), 0, sum(costs), 0.1
    spent = seconds = 0.0
    while done < len(items):
        count = first if done == 0 else max(least, int(WAVE * done / max(seconds, 1e-3)))
        count = count if most is None else min(count, most)
        yield list(items[done : done + count])
        spent += sum(costs[done : done + count])
        done += count
        seconds = time.monotonic() - begin
        left = 0.0 if quiet else seconds * (total - spent) / max(spent, 1)
        if done == first and left > WORTH_TELLING:
            log.info("%s: %d requests, about %s expected", what, len(items), duration(seconds + left))
        elif done < len(items) and spent >= told * total and left > WORTH_TELLING:
            log.info("%s: %d of %d requests, %s left", what, done, len(items), duration(left))
            told = spent / total + 0.1


def duration(seconds: float) -> str:
    """Return seconds in words."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
