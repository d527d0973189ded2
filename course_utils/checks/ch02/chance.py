"""What random numbers show: a frequency or a deviation is never quite the same twice."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers measured on random draws, with their variances; equal to others where chance explains the difference."""

    values: Tensor
    variances: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measured):
            return NotImplemented
        # A sum of n squares of standard normal numbers has mean n and variance 2 n.
        squares = (self.values - other.values).square() / (self.variances + other.variances).clamp(min=1e-12)
        n = squares.numel()
        return bool(squares.sum() <= n + 3 * math.sqrt(2 * n))

    __hash__ = None  # type: ignore[assignment]
