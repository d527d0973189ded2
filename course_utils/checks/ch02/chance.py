"""What random numbers show: a frequency or a deviation is never quite the same twice."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers measured on random draws, with their variances; equal to others where chance explains the difference."""

    values: Tensor
    variances: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measured):
            return NotImplemented
        squares = (self.values - other.values).square() / (self.variances + other.variances).clamp(min=1e-12)
        # how likely chance alone is to give a smaller sum: the chi-squared distribution
        return bool(torch.special.gammainc(torch.tensor(squares.numel() / 2), squares.sum() / 2) < 0.999)

    __hash__ = None  # type: ignore[assignment]
