"""What the checks of chapter 13 share: a small model of sums, waves by loops, and Fourier coefficients by torch.fft."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig

Fn = Callable[..., Any]


def small_model(p: int = 7, n_layers: int = 1) -> Any:
    """A model of sums modulo p, without normalisation; every parameter random."""
    return SmallModel(
        TransformerConfig(
            d_vocab=p + 1,
            n_ctx=3,
            n_layers=n_layers,
            n_heads=3,
            d_model=6,
            d_head=2,
            d_mlp=5,
            act="relu",
            normalization="none",
        )
    )


def sums(p: int) -> Tensor:
    """Every pair as a, b, "="; not contiguous."""
    return torch.tensor([[a for a in range(p) for _ in range(p)], list(range(p)) * p, [p] * p**2]).T


def wave(kind: str, frequency: int, n: int) -> list[float]:
    """cos or sin of 2π frequency x / n, as it is."""
    return [getattr(math, kind)(2 * math.pi * frequency * x / n) for x in range(n)]


def names(n: int) -> list[tuple[str, int]]:
    """The waves in their order."""
    pairs = [(kind, k) for k in range(1, n // 2 + 1) for kind in ("cos", "sin")]
    return [("cos", 0), *pairs][:n]


def unit(row: list[float]) -> list[float]:
    """Divided by its length."""
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def basis(n: int) -> Tensor:
    """The orthonormal waves, by loops, in double precision."""
    return torch.tensor([unit(wave(*name, n)) for name in names(n)], dtype=torch.float64)


def coefficients(values: Tensor, dim: int = -1) -> Tensor:
    """Along one axis, by torch.fft: its real and imaginary parts are our cosines and minus our sines."""
    n = values.shape[dim]
    found = torch.fft.rfft(values.movedim(dim, -1).double(), norm="ortho")
    double = torch.full((found.shape[-1],), 2**0.5, dtype=torch.float64)
    double[0] = 1
    if n % 2 == 0:
        double[-1] = 1
    pairs = torch.stack([found.real * double, -found.imag * double], dim=-1).flatten(-2)
    return pairs[..., [0, *range(2, n + 1)]].movedim(-1, dim)


def frequency_of(wave_number: int) -> int:
    """Of the waves in their order."""
    return (wave_number + 1) // 2


def two_parts(name: str, answer: Any, words: str) -> tuple[Any, Any]:
    """The two tensors of an answer that has two."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        what = "None" if answer is None else f"a {type(answer).__name__}"
        raise CheckFailed(f"{name}: expected {words}, got {what}.\n  Next: return a tuple of the two.")
    return answer[0], answer[1]
