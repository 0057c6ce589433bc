"""Random choices that a seed and a number repeat exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Between an operator and its reference in float64, by the dtype of what is stored.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Finding(AssertionError):
    """Something that the library should not have done."""


class Draw:
    def __init__(self, seed: int, index: int):
        self._generator = np.random.default_rng([seed, index])
        torch.manual_seed(self.integer(0, 2**31))

    def integer(self, low: int, high: int) -> int:
        """low..high, both included."""
        return int(self._generator.integers(low, high, endpoint=True))

    def number(self, low: float, high: float) -> float:
        return float(self._generator.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)

    def choice(self, values: Sequence):
        return values[self.integer(0, len(values) - 1)]

    def some(self, values: Sequence, most: int) -> list:
        """Up to `most` distinct ones, in any order."""
        count = self.integer(0, min(most, len(values)))
        return [values[i] for i in self._generator.permutation(len(values))[:count]]

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal numbers, contiguous, or strided as a slice or a transposed tensor is."""
        if len(shape) >= 2 and self.chance(0.2):
            *leading, rows, columns = shape
            return (torch.randn(*leading, columns, rows) * scale).to(dtype).transpose(-1, -2)
        if self.chance(0.2):
            return (torch.randn(*shape[:-1], shape[-1] + 8) * scale).to(dtype)[..., : shape[-1]]
        return (torch.randn(*shape) * scale).to(dtype)

    def spans(self, *rows: int, most: int, keys: int) -> Tensor:
        """int32 [*rows, R, 2], R up to `most`: sorted, disjoint ranges of `keys` keys, some of them empty."""
        count = self.integer(1, most)
        bounds = self._generator.integers(0, keys, (*rows, 2 * count), endpoint=True)
        return torch.from_numpy(np.sort(bounds, -1)).int().reshape(*rows, count, 2)


def close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal within `tolerance`, of the size where that is above 1; infinities and NaN in the same places."""
    try:
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    except AssertionError as error:
        raise Finding(f"{name} differs from its reference: {error}") from None


def equal(name: str, found: object, expected: object) -> None:
    same = torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
    if not same:
        raise Finding(f"{name} is {found}, its reference {expected}")
