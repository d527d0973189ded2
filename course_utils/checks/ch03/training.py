"""What the checks of a training loop compare: plain numbers, and all the numbers of a model."""

from collections.abc import Iterable
from numbers import Real

import torch
from torch import Tensor

from course_utils.checks.comparing import compare
from course_utils.checks.outcomes import CheckFailed


def number(name: str, what: str, actual: object, expected: float) -> None:
    """Raise CheckFailed unless `actual` is a plain number with this value, up to the rounding of float32."""
    if actual is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    if isinstance(actual, Tensor):
        raise CheckFailed(
            f"{name}: expected {what} as a plain number, got a Tensor.\n"
            "  Next: `.item()` makes a number of it, and lets go of the graph behind it."
        )
    if isinstance(actual, bool) or not isinstance(actual, Real):
        raise CheckFailed(f"{name}: expected {what} as a number, got a {type(actual).__name__}.\n  Next: return that.")
    right = torch.tensor(float(expected), dtype=torch.float64)
    compare(f"{name}: {what}", torch.tensor(float(actual), dtype=torch.float64), right, "")


def side_by_side(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
