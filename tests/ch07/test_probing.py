"""What the checks of probes by hand cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import solutions.ch07_probes as ref
from course_utils.checks.ch07.probing import (
    difference_probe,
    logistic,
    mass_mean,
    pair_by_pair,
    principal,
    ridge,
    softmax,
    standardising,
)
from course_utils.checks.ch07.small import two_classes
from tests.ch07 import other_probes as other

SECRETS = ("torch.linalg.svd", "within.T", "strong_wolfe", "binary_cross_entropy", "[labels][:, None]")
SETTINGS = "history_size=20, ", "tolerance_grad=1e-07, ", "tolerance_change=1e-12, "
LBFGS = f"torch.optim.LBFGS([W, b], max_iter=300, {''.join(SETTINGS)}line_search_fn='strong_wolfe')"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # Directions beyond the number of singular values come last, and have no share.
    "False -> True",
    "torch.linalg.svd(centred, full_matrices=False) -> torch.linalg.svd(centred)",
    "components * largest.sign() -> components / largest.sign()",  # by 1 or -1
    # What it is added to, or multiplied with, has the dtype of the input; on a GPU they are refused.
    "torch.eye(len(yes)).to(x) -> torch.eye(len(yes))",
    "torch.eye(x.shape[1]).to(x) -> torch.eye(x.shape[1])",
    "(yes == no).to(scores) -> yes == no",
    "(yes > no).to(scores) -> yes > no",
    # Centred rows sum to 0, so that a number added to all numbers drops out.
    "numbers - mean -> numbers",
    "numbers - mean -> numbers + mean",
    # logistic_probe: its `loss` only says whether a step goes too far; where the steps end, the gradient says.
    "(penalty * theta ** 2).sum() / 2 -> 2",
    "data + (penalty * theta ** 2).sum() / 2 -> data",
    "data + (penalty * theta ** 2).sum() / 2 -> data - (penalty * theta ** 2).sum() / 2",
    "penalty * theta ** 2 -> penalty",
    "theta ** 2 -> 2",
    "2 -> 3",  # there, or a third of a step instead of half of it
    "loss(theta - step) > loss(theta) -> loss(theta - step) >= loss(theta)",  # equal at the minimum
    # How short a step is tried at least: it is hardly ever needed.
    "1e-12 -> 1.000000000001",
    "loss(theta - step) > loss(theta) and step.norm() > 1e-12 -> loss(theta - step) > loss(theta)",
    "step.norm() > 1e-12 -> step.norm() != 1e-12",
    "step.norm() > 1e-12 -> step.norm() >= 1e-12",
    # More steps than are needed, of logistic_probe or of softmax_probe.
    "100 -> 99",
    "100 -> 101",
    "300 -> 299",
    "300 -> 301",
    "gradient @ step < 1e-12 -> gradient @ step <= 1e-12",
    "gradient @ step < 1e-12 -> gradient @ step == 1e-12",
    "1e-12 -> -0.999999999999",
    "1e-07 -> -0.9999999",
    # Seen on a GPU only
    "torch.zeros(inputs.shape[1], dtype=torch.float64, device=x.device) -> "
    "torch.zeros(inputs.shape[1], dtype=torch.float64)",
    # softmax_probe: settings with which it gets there, too
    "20 -> 19",
    "20 -> 21",
    *(f"{LBFGS} -> {LBFGS.replace(part, '')}" for part in SETTINGS),
    # A result may come with a graph.
    "W.detach() -> W",
    "(b - b.mean()).detach() -> b - b.mean()",
    # The gradients of the biases sum to 0, so that their mean stays where they begin.
    "b - b.mean() -> b",
    "b - b.mean() -> b + b.mean()",
}


def rounded(fn: Any) -> Any:
    """In float32 inside."""

    def answer(x: Any, *given: Any) -> Any:
        found = fn(
            x.float(),
            *(value.float() if torch.is_tensor(value) and value.is_floating_point() else value for value in given),
        )
        return tuple(part.to(x) for part in found) if isinstance(found, tuple) else found.to(x)

    return answer


def unchecked(fn: Any) -> Any:
    """Without the error for one class alone."""

    def answer(x: Any, y: Any, *given: Any) -> Any:
        if y.all() or not y.any():
            return torch.zeros_like(x[0]), x.new_zeros(())
        return fn(x, y, *given)

    return answer


def descended(x: Any, y: Any, l2: float) -> Any:
    """Forty steps of gradient descent."""
    ref.class_means(x, y)
    w, b = torch.zeros_like(x[0]), x.new_zeros(())
    for _ in range(40):
        error = torch.sigmoid(x @ w + b) - y.to(x)
        w, b = w - 0.1 * (error @ x / len(x) + l2 * w), b - 0.1 * error.mean()
    return w, b


def nearly(x: Any, y: Any, l2: float) -> Any:
    w, b = ref.logistic_probe(x, y, l2)
    return w * 1.004, b


def nearly_softmax(x: Any, y: Any, n_classes: int, l2: float) -> Any:
    W, b = ref.softmax_probe(x, y, n_classes, l2)
    return W * 1.006, b


def of_classes_that_occur(x: Any, y: Any, n_classes: int, l2: float) -> Any:
    return ref.softmax_probe(x, y, len(y.unique()), l2)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "standardise": [
        ("in float64", rounded(ref.standardise)),
        ("values are wrong", standardising(guard=lambda scale, constant: scale.masked_fill(constant, 1.0) + 1e-2)),
        (
            "around 1e-5",
            lambda x, reference: ref.standardise(x, reference.where(reference.std(0) > 1e-4, reference[0])),
        ),
        ("values are wrong", standardising(mean=lambda x, reference: reference.median(0).values)),
    ],
    "pca": [
        ("in float64", rounded(ref.pca)),
        ("expected a tuple", lambda x, k: ref.pca(x, k)[0]),
        ("values are wrong", principal(turn=lambda rows: rows * rows.sum(1, keepdim=True).sign())),
        ("values are wrong", principal(turn=lambda rows: rows * rows[0, rows[0].abs().argmax()].sign())),
    ],
    "mean_difference_probe": [
        ("in float64", rounded(ref.mean_difference_probe)),
        ("should raise ValueError", unchecked(ref.mean_difference_probe)),
        ("values are wrong", difference_probe(lambda x, y, no, yes: x[y].median(0).values - no)),
    ],
    "mass_mean_probe": [
        ("in float64", rounded(ref.mass_mean_probe)),
        ("should raise ValueError", unchecked(ref.mass_mean_probe)),
        ("values are wrong", mass_mean(steady=lambda C, s: C + s * C.diagonal().diag())),
    ],
    "logistic_probe": [
        ("should raise ValueError", unchecked(ref.logistic_probe)),
        ("values are wrong", descended),
        ("above the smallest one", nearly),
        ("values are wrong", logistic(labels=lambda y: 0.1 + 0.8 * y.double())),
    ],
    "softmax_probe": [
        ("above the smallest one", nearly_softmax),
        ("has no rows", of_classes_that_occur),
        ("values are wrong", softmax(lambda ones, l2, n: F.pad(3 * l2 * ones[:, :-1], (0, 1)))),
    ],
    "ridge_probe": [
        ("in float64", rounded(ref.ridge_probe)),
        ("values are wrong", ridge(penalty=lambda l2, n: l2**2 * n)),
        ("the bias", ridge(bias=lambda mean, middle, direction: mean + middle @ direction)),
    ],
    "auroc": [
        (
            "should raise ValueError",
            lambda scores, labels: (
                (
                    (scores[labels][:, None] > scores[~labels]).to(scores)
                    + (scores[labels][:, None] == scores[~labels]).to(scores) / 2
                )
                .mean()
                .nan_to_num()
            ),
        ),
        ("values is wrong", pair_by_pair(lambda yes, no: 1 / (1 + 2.0 ** (no - yes)))),
        ("auroc with ties", lambda scores, labels: pair_by_pair()((10 * scores).round(), labels)),
        ("expected a Tensor", lambda scores, labels: ref.auroc(scores, labels).item()),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_the_gradient_is_zero_where_the_fits_stop(l2: float) -> None:
    """The condition that every minimum meets, scikit-learn's too; the functions to be minimised are convex."""
    x, y = two_classes(1, n_batch=40, d_model=6)
    x = x.double()
    w, b = (part.requires_grad_() for part in ref.logistic_probe(x, y, l2))
    loss = F.binary_cross_entropy_with_logits(x @ w + b, y.double()) + l2 / 2 * w @ w
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [w, b])) < 1e-5
    kinds = torch.arange(40) % 4
    W, c = (part.requires_grad_() for part in ref.softmax_probe(x, kinds, 4, l2))
    loss = F.cross_entropy(x @ W + c, kinds) + l2 / 2 * W.square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, [W, c])) < 1e-5


def test_oracles_reach_the_minimum() -> None:
    x, y = two_classes(9, n_batch=13)
    for l2 in (0.1, 0.5):
        w, b = (part.requires_grad_() for part in logistic()(x.double(), y, l2))
        loss = F.binary_cross_entropy_with_logits(x.double() @ w + b, y.double()) + l2 / 2 * w @ w
        assert max(g.abs().max() for g in torch.autograd.grad(loss, [w, b])) < 1e-8


def test_two_classes_by_softmax_are_a_logistic_regression() -> None:
    """The directions are opposite, and each has half of the length: the penalty counts for half as much."""
    x, y = two_classes(2, n_batch=30)
    w, b = ref.logistic_probe(x, y, 0.1)
    W, c = ref.softmax_probe(x, y.long(), 2, 0.2)
    torch.testing.assert_close(W[:, 1] - W[:, 0], w, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(c[1] - c[0], b, rtol=1e-3, atol=1e-4)
