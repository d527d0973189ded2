"""What the checks of "Is it used?" cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch07_probes as ref
from course_utils.checks.ch07.small import two_classes
from course_utils.checks.ch07.using import erasing, oblique, pattern_by, place_by_place, steering
from course_utils.hooks import add_hook
from tests.ch07 import other_probes as other

SECRETS = ("stream.clone()", "scores @ centred", "svd(cross", "way = ")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    "stream.clone() -> stream",  # of this run: nobody else reads it
    # W and P are the same for any multiple of a covariance, and rounding is far below the threshold for each.
    "(axes / spread).T @ centred.T @ (one_hot - one_hot.mean(dim=0)) / len(x) -> "
    "(axes / spread).T @ centred.T @ (one_hot - one_hot.mean(dim=0))",
    "(axes / spread).T @ centred.T @ (one_hot - one_hot.mean(dim=0)) / len(x) -> "
    "(axes / spread).T @ centred.T @ (one_hot - one_hot.mean(dim=0)) * len(x)",
    "centred.T @ centred / len(x) -> centred.T @ centred",
    "centred.T @ centred / len(x) -> centred.T @ centred * len(x)",
    # Centred rows sum to 0, so that a number added to a column of `one_hot` drops out.
    "one_hot - one_hot.mean(dim=0) -> one_hot",
    "one_hot - one_hot.mean(dim=0) -> one_hot + one_hot.mean(dim=0)",
    "one_hot.mean(dim=0) -> one_hot.mean()",
    # Nothing is exactly at a threshold.
    "sizes > 1e-06 -> sizes >= 1e-06",
    "variances > 1e-10 * variances.max() -> variances >= 1e-10 * variances.max()",
    # Other columns with the same span, once they are centred.
    "y.unique() -> y",
    "y[:, None] == y.unique() -> y[:, None] != y.unique()",
    "y[:, None] == y.unique() -> y[:, None] < y.unique()",
    "y[:, None] == y.unique() -> y[:, None] <= y.unique()",
    "y[:, None] == y.unique() -> y[:, None] > y.unique()",
    "y[:, None] == y.unique() -> y[:, None] >= y.unique()",
}


def with_hooks(model: Any, tokens: Any, layer: int, positions: Any, vector: Any) -> Any:
    """Right, by a hook that stays."""
    add_hook(model, "blocks.0.hook_resid_pre", lambda stream, hook: None)
    return ref.run_steered(model, tokens, layer, positions, vector)


def infinite(steered: Any, before: Any, target: Any) -> Any:
    return (steered.mean() - before.mean()) / (target.mean() - before.mean())


def only_upwards(steered: Any, before: Any, target: Any) -> Any:
    if target.mean() <= before.mean():
        raise ValueError("nowhere to go")
    return infinite(steered, before, target)


def absolute(x: Any, y: Any) -> Any:
    """What varies by less than 1e-10 counts as rounding, however long the rows are."""

    def removed(covariance: Any, cross: Any) -> Any:
        inverse = torch.linalg.pinv(covariance, atol=1e-10, rtol=0.0, hermitian=True)
        return cross @ torch.linalg.pinv(cross.T @ inverse @ cross, rtol=1e-9, hermitian=True) @ cross.T @ inverse

    return erasing(removed)(x, y)


def small_ones_ignored(x: Any, y: Any) -> Any:
    """Directions in which the rows vary by less than a hundredth of the most count as none."""

    def removed(covariance: Any, cross: Any) -> Any:
        inverse = torch.linalg.pinv(covariance, rtol=1e-3, hermitian=True)
        return cross @ torch.linalg.pinv(cross.T @ inverse @ cross, rtol=1e-9, hermitian=True) @ cross.T @ inverse

    return erasing(removed)(x, y)


def rounded(fn: Any) -> Any:
    """In float32 inside."""

    def answer(*given: Any) -> Any:
        kind = given[0].dtype
        found = fn(*(value.float() if value.is_floating_point() else value for value in given))
        return tuple(part.to(kind) for part in found) if isinstance(found, tuple) else found.to(kind)

    return answer


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "run_steered": [
        ("a hook is left behind", with_hooks),
        ("values are wrong", steering(lambda stream, places, vector: place_by_place(stream, places, vector * 1.1))),
        (
            "values are wrong",
            steering(lambda stream, places, vector: place_by_place(stream, places, vector[:1].expand_as(vector))),
        ),
        ("a hook is left behind", lambda *given: _left_after_an_error(*given)),
    ],
    "normalised_effect": [
        ("should raise ValueError", infinite),
        (
            "values is wrong",
            lambda steered, before, target: (
                infinite(steered.median(), before, target) + 0 * ref.normalised_effect(steered, before, target)
            ),
        ),
        ("expected a Tensor", lambda *given: ref.normalised_effect(*given).item()),
        ("nowhere to go", only_upwards),
    ],
    "activation_pattern": [
        ("in float64", rounded(ref.activation_pattern)),
        ("values are wrong", pattern_by(end=lambda together, var, w: together / var * w.norm())),
        ("values are wrong", pattern_by(end=lambda together, var, w: together.abs() / var)),
    ],
    "erase": [
        ("expected a tuple", lambda x, y: ref.erase(x, y)[0]),
        ("in float64", rounded(ref.erase)),
        ("values are wrong", erasing(lambda covariance, cross: 0.99 * oblique(covariance, cross))),
        ("4096 times as long", absolute),
        ("coordinates of different sizes", small_ones_ignored),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def _left_after_an_error(model: Any, tokens: Any, layer: int, positions: Any, vector: Any) -> Any:
    """Without `finally`."""
    handle = model.blocks[0].hook_resid_pre.add(lambda stream, hook: None)
    logits = ref.run_steered(model, tokens, layer, positions, vector)
    handle.remove()
    return logits


@pytest.mark.parametrize("n_classes", [2, 3])
def test_no_probe_reads_what_was_erased(n_classes: int) -> None:
    """Every probe of the chapter then does what it would do without seeing the rows (Belrose et al. 2023)."""
    x = two_classes(3, n_batch=60, d_model=5)[0].double()
    y = torch.arange(60) % n_classes
    matrix, bias = ref.erase(x, y)
    erased = x @ matrix.T + bias
    W, _ = ref.softmax_probe(erased, y, n_classes, 1e-3)
    assert W.abs().max() < 1e-5
    difference, _ = ref.mean_difference_probe(erased, y == 0)
    assert difference.abs().max() < 1e-9
    assert (ref.logistic_probe(erased, y == 0, 1e-3)[0]).abs().max() < 1e-5


def test_erasing_twice_is_erasing_once_and_changes_less_than_projecting_the_means_out_twice() -> None:
    x = two_classes(4, n_batch=60, d_model=5)[0].double()
    y = (torch.arange(60) % 2).long()
    matrix, bias = ref.erase(x, y)
    torch.testing.assert_close(matrix @ matrix, matrix)
    torch.testing.assert_close(x.mean(0) @ matrix.T + bias, x.mean(0))
    direction, _ = ref.mean_difference_probe(x, y == 1)
    unit = direction / direction.norm()
    projected = x - torch.outer((x - x.mean(0)) @ unit, unit)
    assert ((x @ matrix.T + bias - x) ** 2).mean() <= ((projected - x) ** 2).mean()


def test_the_pattern_of_a_mass_mean_probe_is_the_difference_of_the_means() -> None:
    """Over all rows only the length changes, as the difference is part of their variance."""
    x, y = two_classes(5, n_batch=60)
    direction, _ = ref.mass_mean_probe(x, y, 1e-7)
    difference, _ = ref.mean_difference_probe(x, y)
    pattern = ref.activation_pattern(x, direction)
    torch.testing.assert_close(pattern / pattern.norm(), difference / difference.norm(), rtol=1e-3, atol=1e-4)
