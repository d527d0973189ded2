"""What the checks of geometry cannot know: see tests/test_checks.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import solutions.ch06_superposition as ref
from course_utils.checks.ch06.geometry import both_or_none, integrated, one_at_most, pairing, pencil, phase_of, telling
from tests.ch06 import other_toys as other

SECRETS = ("masked_fill(itself", "squares / ", "gather(2")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "nn.functional.normalize(W, dim=1) -> nn.functional.normalize(W)",  # the default
    "shared > 0 -> shared != 0",  # it is never negative
    "weights.abs() > 0.5 -> weights.abs() >= 0.5",  # hardly ever equal
    "chance < probability -> chance <= probability",
    "chance > 1 - probability -> chance >= 1 - probability",
    "weights.prod(dim=-1) < 0 -> weights.prod(dim=-1) <= 0",  # of stored features, so it is not 0
    "-2 -> 2",  # of four axes
    "kind == 'correlated' -> kind >= 'correlated'",  # of two kinds
    "kind == 'anticorrelated' -> kind <= 'anticorrelated'",
}


def rounded(fn: Any) -> Any:
    return lambda W: fn(W.float()).to(W.dtype)


def of_first(fn: Any) -> Any:
    return lambda W: fn(W)[:1].expand(len(W), -1)


def strict_pairs(n_batch: int, n_instances: int, n_pairs: int, p: float, kind: str, generator: torch.Generator) -> Any:
    """Without the errors."""
    if kind not in ("correlated", "anticorrelated"):
        return torch.zeros(n_batch, n_instances, 2 * n_pairs)
    return refusing_only_kinds(n_batch, n_instances, n_pairs, p, kind, generator)


def refusing_only_kinds(*given: Any) -> Any:
    n_batch, n_instances, n_pairs, p, kind, generator = given
    p = min(p, 0.5) if kind == "anticorrelated" else p
    return ref.sample_pairs(n_batch, n_instances, n_pairs, p, kind, generator)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "feature_norms": [
        ("in float64", rounded(ref.feature_norms)),
        ("values are wrong", lambda W: ref.feature_norms(W) + 1e-3),
        ("values are wrong", of_first(ref.feature_norms)),
    ],
    "interference": [
        ("in float64", rounded(ref.interference)),
        ("values are wrong", of_first(ref.interference)),
        ("values are wrong", lambda W: ref.interference(W).clamp(max=1)),
    ],
    "feature_dimensionality": [
        ("in float64", rounded(ref.feature_dimensionality)),
        ("values are wrong", lambda W: ref.feature_dimensionality(W).clamp(min=0.05)),
        ("values are wrong", of_first(ref.feature_dimensionality)),
    ],
    "losses_by_hand": [
        ("wrong shape", lambda p, i: ref.losses_by_hand(p, i).mT),
        ("values are wrong", pencil(both=lambda p: p**2 / 5)),
        ("wrong shape", lambda p, i: ref.losses_by_hand(p, i)[:2]),
        ("values are wrong", pencil(alone=lambda p: p - p**2)),
    ],
    "phase_diagram": [
        ("wrong shape", lambda W, losses: ref.phase_diagram(W, losses).mT),
        ("near 0.5", telling(phase=lambda a, b: phase_of(a * 0.9, b * 0.9))),
        ("expected dtype int64", lambda W, losses: ref.phase_diagram(W, losses).float()),
        ("it changed `losses` in place", lambda W, losses: ref.phase_diagram(W, losses.neg_().neg_().add_(1))),
    ],
    "sample_pairs": [
        ("should raise ValueError", strict_pairs),
        ("should raise ValueError", refusing_only_kinds),
        (
            "it drew from torch's global random numbers",
            lambda *given: ref.sample_pairs(*given[:-1], torch.default_generator),
        ),
        ("how often a feature is active", pairing(lambda one, other, p: both_or_none(one, other, p / 2))),
        ("the mean of active values", pairing(flat=lambda pairs: pairs.flatten(-2).square())),
        ("how often", pairing(anticorrelated=lambda one, other, p: one_at_most(one, other, 0.4 * p))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def circle(n: int) -> Tensor:
    """n unit vectors in the plane, at equal angles: [1, 2, n]."""
    angles = torch.arange(n) * 2 * math.pi / n
    return torch.stack([angles.cos(), angles.sin()])[None]


TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).T[None]


@pytest.mark.parametrize(
    ("W", "share"),
    [(circle(2), 1 / 2), (circle(3), 2 / 3), (circle(4), 1 / 2), (circle(5), 2 / 5), (TETRAHEDRON, 3 / 4)],
    ids=["digon", "triangle", "square", "pentagon", "tetrahedron"],
)
def test_regular_shapes_share_their_dimensions(W: Tensor, share: float) -> None:
    for scale in (1.0, 0.3, 1.2):
        shares = ref.feature_dimensionality(scale * W)
        torch.testing.assert_close(shares, torch.full_like(shares, share), rtol=1e-4, atol=1e-5)


def test_dimensionality_follows_from_length_and_interference() -> None:
    W = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    squares = ref.feature_norms(W) ** 2
    torch.testing.assert_close(ref.feature_dimensionality(W), squares / (squares + ref.interference(W)))


def test_the_oracle_of_the_losses_is_what_samples_cost() -> None:
    """A million samples, and the three models themselves."""
    p, importance = torch.tensor([0.4]), torch.tensor([0.5])
    x = ref.sample_features(1_000_000, p.expand(1, 2), torch.Generator().manual_seed(0))
    weights = torch.cat([torch.ones(1), importance])
    first, second = x[..., :1], x[..., 1:]
    means = x.mean((0, 1))
    outputs = [
        torch.cat([first, means[1].expand_as(second)], -1),
        torch.cat([means[0].expand_as(first), second], -1),
        torch.cat([(first - second).relu(), (second - first).relu()], -1),
    ]
    measured = torch.stack([ref.importance_weighted_loss(out, x, weights) for out in outputs])
    torch.testing.assert_close(measured, integrated(p, importance).flatten(), rtol=0.02, atol=1e-4)
