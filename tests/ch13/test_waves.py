"""What the checks of waves in chapter 13 cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch13_grokking as ref
from course_utils.checks.ch13.waves import both, on_rows, pooled, ranked, term, waves
from tests.ch13 import other_grokking as other

SECRETS = ("torch.outer(freq", "einsum(", ".topk(", "index_add")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "n // 2 -> n",  # more waves than there are numbers: the first ones are kept
    "1 -> 2",
    "2 -> 1",
    "(torch.outer(frequencies, numbers) % n).double() -> torch.outer(frequencies, numbers) % n",  # fewer digits
    "torch.outer(frequencies, numbers) % n -> torch.outer(frequencies, numbers)",
    "0 -> -1",  # the only axis
}

SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "fourier_basis": [
        ("expected dtype float32", lambda n: other.fourier_basis(n).double()),
        ("wrong shape", lambda n: torch.cat([other.fourier_basis(n), torch.zeros(1, n)])),
        ("values are wrong", waves(shape=lambda rows: rows.flip(1))),
        ("expected a Tensor", lambda n: other.fourier_basis(n).tolist()),
    ],
    "fft1d": [
        ("values are wrong", on_rows(lambda found: found.flip(-1))),
        ("values are wrong", on_rows(lambda found: found.abs())),
        ("wrong shape", lambda values: other.fft1d(values)[..., 1:]),
    ],
    "fourier_2d_basis_term": [
        ("values are wrong", term(lambda rows, i, j: torch.outer(rows[i], rows[j]).flip(0))),
        ("wrong shape", lambda i, j, n: other.fourier_2d_basis_term(i, j, n).flatten()),
    ],
    "fft2d": [
        ("values are wrong", both(lambda found: found.flip(0))),
        ("wrong shape", lambda grid: other.fft2d(grid)[1:]),
    ],
    "frequency_norms": [
        ("wrong", pooled(lambda found: max(map(abs, found)))),
        ("wrong shape", lambda vectors: other.frequency_norms(vectors)[:-1]),
    ],
    "key_frequencies": [
        ("wrong", ranked(lambda norms, n: sorted(range(1, len(norms)), key=lambda k: -norms[k] / k)[:n])),
        ("expected dtype int64", lambda W_E, n: other.key_frequencies(W_E, n).float()),
        ("expected a Tensor", lambda W_E, n: other.key_frequencies(W_E, n).tolist()),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("n", [1, 2, 9, 10, 58, 59, 113])
def test_coefficients_give_the_values_back(n: int) -> None:
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(ref.fft1d(values) @ ref.fourier_basis(n), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [5, 6])
def test_two_dimensional_terms_are_the_basis_of_fft2d(n: int) -> None:
    for i in range(n):
        for j in range(n):
            expected = torch.zeros(n, n)
            expected[i, j] = 1
            torch.testing.assert_close(ref.fft2d(ref.fourier_2d_basis_term(i, j, n)), expected, rtol=0, atol=1e-5)


def test_norms_hold_all_of_a_table() -> None:
    table = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ref.frequency_norms(table).norm(), table.norm())
