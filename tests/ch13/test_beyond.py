"""What the checks of the last part of chapter 13 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch13_grokking as ref
from course_utils.checks.ch13.beyond import compared, cosine, powers
from tests.ch13 import other_grokking as other

SECRETS = ("autograd.grad(", "cosine_similarity(")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the last
    "nn.functional.cosine_similarity(by_x, by_y, dim=-1) -> nn.functional.cosine_similarity(by_x, by_y)",
    "1 -> 0",  # the powers of 0 are 1 and 0; modulo 2 that is the same
    "len(powers) < p - 1 -> len(powers) != p - 1",  # it grows by one
}

SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "gradient_symmetry": [
        ("value", compared(lambda x, y: cosine(x, -y).mean())),
        ("expected a Tensor", lambda *args: float(other.gradient_symmetry(*args))),
        ("value", compared(lambda x, y: cosine(x, y).median())),
    ],
    "primitive_powers": [
        ("wrong", powers(lambda roots, p: roots[len(roots) > 2])),
        ("expected a Tensor", lambda p: other.primitive_powers(p).tolist()),
        ("should raise ValueError", lambda p: other.primitive_powers(p if p in (2, 3, 7, 11, 23, 41) else 7)),
        ("wrong shape", lambda p: other.primitive_powers(p)[1:]),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_symmetric_logits_have_the_same_slopes() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 3, generator=generator)
    weights = torch.randn(3, 4, generator=generator)
    alike = ref.gradient_symmetry(lambda x, y: torch.tanh((x + y) @ weights), first, second, torch.arange(5) % 4)
    torch.testing.assert_close(alike, torch.tensor(1.0))


def test_products_are_sums_of_places() -> None:
    powers_of_g = ref.primitive_powers(59)
    place = torch.empty(59, dtype=torch.long)
    place[powers_of_g] = torch.arange(58)
    a, b = torch.arange(1, 59)[:, None], torch.arange(1, 59)
    assert torch.equal(place[a * b % 59], (place[a] + place[b]) % 58)
