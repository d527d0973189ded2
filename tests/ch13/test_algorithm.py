"""What the checks of the algorithm in chapter 13 cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch13_grokking as ref
from course_utils.checks.ch13.algorithm import by_terms, directions, fitted, unembedded, waves_of
from tests.ch13 import other_grokking as other

SECRETS = ("W_out @", "einsum(", "2 * frequency - 1")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "n // 2 -> n",  # more frequencies than there are, and empty
    "1 -> 2",
    "2 -> 1",
    "total > 0 -> total != 0",  # a sum of squares
    "((numbers[:, None] + numbers) * frequency % n).double() -> (numbers[:, None] + numbers) * frequency % n",
    "(numbers[:, None] + numbers) * frequency % n -> (numbers[:, None] + numbers) * frequency",  # fewer digits
    "(distance * frequency % n).double() -> distance * frequency % n",
    "distance * frequency % n -> distance * frequency",
    "2 * frequency != n -> 2 * frequency < n",  # there are no frequencies above n / 2
    "1e-12 -> 1.000000000001",  # a wave is longer
}


def anything_goes(W_L: torch.Tensor, frequency: int) -> torch.Tensor:
    """Rows from elsewhere where there are no two waves."""
    return other.trig_directions(W_L, frequency if 1 <= frequency < W_L.shape[1] / 2 else 1)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "neuron_frequencies": [
        ("expected frequencies and shares", lambda grid: torch.stack(list(other.neuron_frequencies(grid)))),
        ("wrong", by_terms(lambda a, b, k: a == k)),
        ("expected dtype int64", lambda grid: (other.neuron_frequencies(grid)[0].float(), by_terms()(grid)[1])),
    ],
    "effective_unembedding": [
        ("values are wrong", unembedded(lambda found, model: found.abs())),
        ("expected a Tensor", lambda model: other.effective_unembedding(model).tolist()),
        ("wrong shape", lambda model: other.effective_unembedding(model)[1:]),
    ],
    "sum_waves": [
        ("values are wrong", waves_of(lambda a, b: 2 * a + b)),
        ("expected dtype float32", lambda n, frequency: other.sum_waves(n, frequency).double()),
        ("wrong shape", lambda n, frequency: other.sum_waves(n, frequency).flatten(1)),
    ],
    "trig_directions": [
        ("should raise ValueError", anything_goes),
        ("values are wrong", directions(change=lambda found: found.flip(1))),
        ("wrong shape", directions(change=lambda found: found[:1])),
    ],
    "logit_fit": [
        ("wrong", fitted(coefficient=lambda product, size: abs(product / size))),
        ("wrong", fitted(lambda a, b, c: a + b - 2 * c)),
        ("expected coefficients and shares", lambda *args: list(other.logit_fit(*args))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_directions_carry_the_logits_waves() -> None:
    """What neurons say along the directions are the logits' coefficients, pair by pair."""
    generator = torch.Generator().manual_seed(0)
    activations, W_L = torch.randn(6, 12, generator=generator), torch.randn(12, 9, generator=generator)
    for frequency in (1, 4):
        found = activations @ ref.trig_directions(W_L, frequency).T
        torch.testing.assert_close(found, ref.fft1d(activations @ W_L)[:, [2 * frequency - 1, 2 * frequency]])


@pytest.mark.parametrize("n", [8, 9])
def test_waves_in_the_sum_are_orthonormal(n: int) -> None:
    rows = torch.cat([ref.sum_waves(n, k) for k in range(1, (n + 1) // 2)]).flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)


def test_a_neuron_of_one_frequency_is_found() -> None:
    wave = ref.fourier_2d_basis_term(3, 4, 11) + ref.fourier_2d_basis_term(0, 3, 11) + 1
    best, share = ref.neuron_frequencies(torch.stack([wave, torch.zeros(11, 11)], dim=-1))
    assert best.tolist() == [2, 0]
    torch.testing.assert_close(share, torch.tensor([1.0, 0.0]))


def test_pure_waves_are_fitted_completely() -> None:
    x = torch.arange(10)
    angle = 2 * torch.pi * (x[:, None, None] + x[:, None] - x) / 10
    coefficients, shares = ref.logit_fit(3 * (2 * angle).cos() - (5 * angle).cos(), [2, 5, 1])
    torch.testing.assert_close(coefficients, torch.tensor([3.0, -1.0, 0.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
