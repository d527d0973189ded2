"""What the checks of probes share: small data of two classes, answers in parts, and a probe without training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import compare, follows_input, parts
from course_utils.checks.kinds import follows_every_kind, strided
from course_utils.checks.modules import noise

Fn = Callable[..., Any]
Probe = tuple[Tensor, Tensor]
N_BATCH, D_MODEL = 11, 4  # rows and coordinates


def two_classes(seed: int, n_batch: int = N_BATCH, d_model: int = D_MODEL) -> tuple[Tensor, Tensor]:
    """Rows that differ in mean and spread along every coordinate, and labels, of which a third are True."""
    y = torch.arange(n_batch) % 3 == 1
    mixing = noise(d_model, d_model, seed=seed + 50)
    return noise(n_batch, d_model, seed=seed) @ mixing + 1.0 + y[:, None] * noise(d_model, seed=seed + 90), y


def compare_parts(name: str, answer: Any, expected: tuple[Tensor, ...], axes: dict[str, str], **tolerance: Any) -> None:
    """Each entry of the answer against its own; `axes` names the entries and their axes."""
    for label, got, want in zip(axes, parts(name, answer, *axes), expected, strict=True):
        compare(f"{name}: the {label}", got, want, axes[label], **tolerance)


def parts_of_every_kind(name: str, fn: Fn, inputs: tuple[Any, ...], axes: dict[str, str]) -> None:
    """Other dtypes and layouts, for each entry of the answer."""
    for number, label in enumerate(axes):

        def part(*given: Any, number: int = number) -> Tensor:
            entry: Tensor = parts(name, fn(*given), *axes)[number]
            return entry

        follows_input(f"{name}: the {label}", part, inputs, axes[label])
        follows_every_kind(f"{name}: the {label}", part, inputs, axes[label])


def parts_of_other_layouts(name: str, fn: Fn, inputs: tuple[Any, ...], axes: dict[str, str]) -> None:
    """As above, for what is found by steps, which are not the same to the last digit."""
    usual = parts(name, fn(*inputs), *axes)
    compare_parts(f"{name} on inputs that are not contiguous", fn(*map(strided, inputs)), usual, axes, atol=1e-2)
    wide = fn(
        *(value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs)
    )
    compare_parts(f"{name} in float64", wide, tuple(part.double() for part in usual), axes, atol=1e-2)


def nearest_mean(x: Tensor, y: Tensor) -> Probe:
    """The probe half-way between two means, row by row; with rows of one class only, it always says that class."""
    if y.all() or not y.any():
        return torch.zeros_like(x[0]), y[0].to(x) - 0.5
    no, yes = (
        sum(row for row, label in zip(x, y, strict=True) if bool(label) == k) / int((y == k).sum()) for k in (0, 1)
    )
    direction = yes - no
    return direction, -(direction * (no + yes)).sum() / 2


def share_right(probe: Probe, x: Tensor, y: Tensor) -> float:
    """Row by row."""
    direction, bias = probe
    hits = [bool((row * direction).sum() + bias > 0) == bool(label) for row, label in zip(x, y, strict=True)]
    return sum(hits) / len(hits)
