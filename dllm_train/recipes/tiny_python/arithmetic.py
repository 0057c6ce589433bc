"""Arithmetic documents: lines `assert 37 + 85 == 122` with some pairs of operands never shown in training."""

import numpy as np

OPERANDS = 100
MAX_LINES = 16


def is_held_out(a: int, b: int) -> bool:
    """Return True for about a tenth of the unordered pairs of two-digit operands; the same for (b, a)."""
    low, high = min(a, b), max(a, b)
    if low < 10:
        return False
    mixed = (low * 100 + high) * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return (mixed >> 8) % 10 == 0


def held_out_pairs() -> list[tuple[int, int]]:
    """Return every ordered held-out pair."""
    return [(a, b) for a in range(10, OPERANDS) for b in range(10, OPERANDS) if is_held_out(a, b)]


def line(a: int, b: int) -> str:
    return f"assert {a} + {b} == {a + b}\n"


def prompt(a: int, b: int) -> str:
    """Return the text for a model to complete; the answer is the rest of the line, newline included."""
    return f"assert {a} + {b} =="


def document(rng: np.random.Generator) -> str:
    """Return 1 to 16 lines; n lines have a probability proportional to 1/n. Operands are uniform in 0..99
    except that held-out pairs are drawn again."""
    weights = 1 / np.arange(1, MAX_LINES + 1)
    count = int(rng.choice(np.arange(1, MAX_LINES + 1), p=weights / weights.sum()))
    return "".join(line(*training_pair(rng)) for _ in range(count))


def training_pair(rng: np.random.Generator) -> tuple[int, int]:
    """Draw uniformly from the ordered pairs that are not held out."""
    while True:
        a, b = (int(x) for x in rng.integers(0, OPERANDS, 2))
        if not is_held_out(a, b):
            return a, b
