"""Inputs as people have them: slices and transposes, tensors with a graph, numbers in double precision."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.translating import during

STEP = 3.3e-6


def follows_every_kind(
    name: str, fn: Callable[..., Any], inputs: tuple[Any, ...], axes: str, graph: bool = False
) -> None:
    """Call `fn` with the same numbers laid out otherwise, and along a short line in float64.

    With `graph`, once more with inputs that require a gradient, for what is called where gradients may be recorded.
    """
    with torch.no_grad():
        usual = fn(*inputs)
        where = "on inputs that are not contiguous"
        with during(where):
            compare(f"{name} {where}", fn(*map(strided, inputs)), usual, axes)
    if graph:
        where = "on inputs that require a gradient"
        with during(where):
            compare(f"{name} {where}", fn(*map(with_graph, inputs)), usual, axes)
    if usual.is_floating_point():
        _keeps_double_precision(name, fn, inputs)


def strided(value: Any) -> Any:
    """The same numbers, the first axis running fastest in memory."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.transpose(0, -1).contiguous().transpose(0, -1)


def with_graph(value: Any) -> Any:
    return value.detach().clone().requires_grad_() if _real(value) else value


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return value.double() if _real(value) else value


@torch.no_grad()
def _keeps_double_precision(name: str, fn: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """On so short a line a smooth function is straight; one that is rounded to float32 on the way goes in steps."""
    doubled = [_double(value) for value in inputs]

    def at(steps: int) -> Tensor:
        moved = [value * (1 + steps * STEP) if _real(value) else value for value in doubled]
        return torch.as_tensor(fn(*moved))

    points = torch.stack([at(steps) for steps in range(7)])
    points = points[:, points[0].isfinite()]
    if points.numel() and points.diff(n=2, dim=0).abs().max() > 1e-9 * (1 + points.abs().max()):
        raise CheckFailed(
            f"{name} in float64: it computes with fewer digits than the input has.\n"
            "  Next: look for .float(), or a dtype of your own, on the way; the dtype should follow the input's."
        )
