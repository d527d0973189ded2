"""Checks of chapter 07, probes by hand: what is fitted by a formula is compared with another one, the rest with minima.

Probes fitted in steps are right if their loss is near the smallest: directions are compared loosely, losses strictly.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch07.small import (
    D_MODEL,
    N_BATCH,
    Fn,
    Probe,
    compare_parts,
    parts_of_every_kind,
    parts_of_other_layouts,
    two_classes,
)
from course_utils.checks.comparing import compare, compare_kind, follows_input, parts
from course_utils.checks.kinds import follows_every_kind, strided
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise

PROBE = {"direction": "d_model", "bias": ""}
NEAR = 1e-6  # how far above its minimum a loss may be

# -------------------------------------------------------------------------------------------------------- standardise


def column_by_column(x: Tensor, reference: Tensor) -> Tensor:
    """The definition, one coordinate at a time."""
    columns = []
    for column, known in zip(x.T, reference.T, strict=True):
        mean = sum(known) / len(known)
        scale = math.sqrt(sum((value - mean) ** 2 for value in known.tolist()) / len(known))
        columns.append((column - mean) / (scale if len(set(known.tolist())) > 1 else 1.0))
    return torch.stack(columns, 1)


def standardising(
    mean: Callable[[Tensor, Tensor], Tensor] = lambda x, reference: reference.mean(0),
    scale: Callable[[Tensor, Tensor], Tensor] = lambda x, reference: reference.std(0, correction=0),
    guard: Callable[[Tensor, Tensor], Tensor] = lambda scale, constant: scale.masked_fill(constant, 1.0),
) -> Fn:
    return lambda x, reference: (
        (x - mean(x, reference)) / guard(scale(x, reference), reference.amax(0) == reference.amin(0))
    )


@known_mistakes(
    {
        "`x` is shifted and scaled by its own rows; the reference's rows say by how much.": standardising(
            lambda x, reference: x.mean(0), lambda x, reference: x.std(0, correction=0)
        ),
        "the rows are only shifted.": standardising(guard=lambda scale, constant: torch.ones_like(scale)),
        "the rows are only scaled.": standardising(mean=lambda x, reference: torch.zeros_like(x[0])),
        "the squares are divided by the number of rows minus 1; divide by the number of rows.": standardising(
            scale=lambda x, reference: reference.std(0)
        ),
        "it is divided by the variance; take its root.": standardising(
            scale=lambda x, reference: reference.var(0, correction=0)
        ),
        "one mean and one deviation are used for all coordinates; each has its own.": standardising(
            lambda x, reference: reference.mean(), lambda x, reference: reference.std(correction=0)
        ),
        "a coordinate that never changes gives 0/0; divide it by 1.": standardising(
            guard=lambda scale, constant: scale.masked_fill(constant, 0.0)
        ),
        "a coordinate that never changes is found by its deviation, which may be rounded to 1e-8 instead of 0.": (
            standardising(guard=lambda scale, constant: scale.masked_fill(scale == 0, 1.0))
        ),
    }
)
def check_standardise(fn: Fn) -> None:
    """Other rows than the reference's, the same rows, coordinates that hardly change, and such that never do."""
    x, reference = noise(3, D_MODEL, seed=1), two_classes(2)[0] * torch.tensor([1.0, 5.0, 0.2, 3.0])
    axes = "batch d_model"
    compare("standardise", fn(x, reference), column_by_column(x, reference), axes)
    compare("standardise(x, x)", fn(reference, reference), column_by_column(reference, reference), axes)
    ordered = reference.clone()
    ordered[:, 0], ordered[:, 1] = ordered[:, 0].sort().values, ordered[:, 1].sort(descending=True).values
    compare("standardise", fn(x, ordered), column_by_column(x, ordered), axes)
    small = reference * 1e-5
    compare("standardise of rows around 1e-5", fn(1e-5 * x, small), column_by_column(1e-5 * x, small), axes, rtol=1e-3)
    for value in (1.5, 0.1):  # the mean of eleven times 0.1 is not 0.1 to the last digit
        flat = reference.clone()
        flat[:, 2] = value
        words = f"standardise with a coordinate that is {value} in every row"
        compare(words, fn(x, flat), column_by_column(x, flat), axes)
    alone = x[:, 2:3], torch.full((N_BATCH, 1), 0.1)
    compare("standardise with one coordinate, 0.1 in every row", fn(*alone), column_by_column(*alone), axes)
    follows_input("standardise", fn, (x, reference), axes)
    follows_every_kind("standardise", fn, (x, reference), axes)


# ---------------------------------------------------------------------------------------------------------------- pca


def by_covariance(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the covariance, one after the other, each turned so that its largest entry is positive."""
    centred = (x - x.mean(0)).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    order = variances.argsort(descending=True)[:k]
    rows = [axes[:, index] for index in order]
    turned = [row if max(row.tolist(), key=abs) > 0 else -row for row in rows]
    return torch.stack(turned).to(x), (variances[order] / variances.sum()).to(x)


def principal(
    prepare: Callable[[Tensor], Tensor] = lambda x: x - x.mean(0),
    turn: Callable[[Tensor], Tensor] = lambda rows: rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign(),
    shares: Callable[[Tensor, int], Tensor] = lambda sizes, k: (sizes**2 / (sizes**2).sum())[:k],
    pick: Callable[[Tensor, int], Tensor] = lambda rows, k: rows[:k],
) -> Fn:
    """pca by singular values, with something else in one of its steps."""

    def pca(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, sizes, rows = torch.linalg.svd(prepare(x), full_matrices=False)
        return turn(pick(rows, k)), shares(sizes, k)

    return pca


@known_mistakes(
    {
        "the rows are not centred: the first component then points at their mean.": principal(prepare=lambda x: x),
        "the mean of each row is subtracted; subtract the mean of each coordinate.": principal(
            prepare=lambda x: x - x.mean(1, keepdim=True)
        ),
        "the coordinates are scaled, too; only centre them.": principal(
            prepare=lambda x: (x - x.mean(0)) / x.std(0, correction=0)
        ),
        "the signs stay as they come; the largest entry of a component should be positive.": principal(
            turn=lambda rows: rows * -rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        ),
        "the first entry of each component is made positive; it should be the largest one.": principal(
            turn=lambda rows: rows * rows[:, :1].sign()
        ),
        "the smallest components come; take the largest.": principal(pick=lambda rows, k: rows.flip(0)[:k]),
        "the shares are of singular values; variances are their squares.": principal(
            shares=lambda sizes, k: (sizes / sizes.sum())[:k]
        ),
        "the shares are of the variance that the k components have; divide by all of it.": principal(
            shares=lambda sizes, k: sizes[:k] ** 2 / (sizes[:k] ** 2).sum()
        ),
        "the variances come back; divide them by their sum over all components.": principal(
            shares=lambda sizes, k: sizes[:k] ** 2
        ),
    }
)
def check_pca(fn: Fn) -> None:
    """More rows than coordinates, and fewer; components, then shares."""
    axes = {"components": "k d_model", "shares": "k"}
    cases = (two_classes(3)[0] + 3.0, 2), *((two_classes(seed)[0], D_MODEL) for seed in (3, 4, 5, 6))
    for x, k in (*cases, (noise(5, 7, seed=4) - 2.0, 3)):
        right = by_covariance(x, k)
        compare_parts(f"pca of {len(x)} rows, k={k}", fn(x, k), right, axes, rtol=1e-3, atol=1e-4)
    parts_of_every_kind("pca", fn, (x, k), axes)


# -------------------------------------------------------------------------------------------------- two means and more


def means_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the False rows, and of the True ones, row by row."""
    sums, counts = [torch.zeros_like(x[0]), torch.zeros_like(x[0])], [0, 0]
    for row, label in zip(x, y.tolist(), strict=True):
        sums[label] = sums[label] + row
        counts[label] += 1
    if not all(counts):
        raise ValueError("one class")
    return sums[0] / counts[0], sums[1] / counts[1]


Between = Callable[[Tensor, Tensor, Tensor], Tensor]  # (direction, middle of the means, mean of all rows) -> bias


def half_way(direction: Tensor, middle: Tensor, overall: Tensor) -> Tensor:
    return -(direction * middle).sum()


def difference_probe(
    direction: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda x, y, no, yes: yes - no,
    bias: Between = half_way,
) -> Fn:
    """A direction between two means, with something else for the direction or the bias."""

    def probe(x: Tensor, y: Tensor, *more: float) -> Probe:
        no, yes = means_of(x, y)
        found = direction(x, y, no, yes, *more)
        return found, bias(found, (no + yes) / 2, x.mean(0))

    return probe


WRONG_BIASES: dict[str, Between] = {
    "the bias is 0; a score of 0 should lie half-way between the two means.": lambda direction, middle, overall: (
        torch.zeros(()).to(direction)
    ),
    "the bias puts 0 at the mean of all rows, nearer to the larger class.": lambda direction, middle, overall: (
        -(direction @ overall)
    ),
    "the sign of the bias is turned round.": lambda direction, middle, overall: direction @ middle,
    "the bias lacks the half: it is at the sum of the two means.": lambda direction, middle, overall: (
        -2 * direction @ middle
    ),
}


@known_mistakes(
    {
        "the direction points from True to False.": difference_probe(lambda x, y, no, yes: no - yes),
        "the direction is the mean of the True rows alone.": difference_probe(lambda x, y, no, yes: yes),
        "rows are summed; the larger class then counts more. Take means.": difference_probe(
            lambda x, y, no, yes: x[y].sum(0) - x[~y].sum(0)
        ),
        "the direction is scaled to length 1; leave it as long as the means are apart.": difference_probe(
            lambda x, y, no, yes: F.normalize(yes - no, dim=0)
        ),
        "the mean of all rows is subtracted from the mean of the True rows.": difference_probe(
            lambda x, y, no, yes: yes - x.mean(0)
        ),
    },
    {sentence: difference_probe(bias=bias) for sentence, bias in WRONG_BIASES.items()},
)
def check_mean_difference_probe(fn: Fn) -> None:
    """Unequal classes; one class alone."""
    _check_difference("mean_difference_probe", fn, difference_probe())


def _check_difference(name: str, fn: Fn, right: Fn, *more: float) -> None:
    for seed in (5, 6):
        x, y = two_classes(seed)
        compare_parts(name, fn(x, y, *more), right(x, y, *more), PROBE)
    parts_of_every_kind(name, fn, (x, y, *more), PROBE)
    for label in (True, False):
        call = f"{name}(x, y) with y all {label}"
        must_raise(name, ValueError, call, partial(fn, x, torch.full_like(y, label), *more))


def scatter(x: Tensor, y: Tensor, no: Tensor, yes: Tensor) -> Tensor:
    """The covariance within the classes, one outer product after the other."""
    total = torch.zeros(x.shape[1], x.shape[1]).to(x)
    for row, label in zip(x, y.tolist(), strict=True):
        apart = row - (yes if label else no)
        total = total + torch.outer(apart, apart)
    return total / len(x)


def of_all(x: Tensor, y: Tensor, no: Tensor, yes: Tensor) -> Tensor:
    return scatter(x, y, x.mean(0), x.mean(0))


def mass_mean(
    covariance: Callable[..., Tensor] = scatter,
    steady: Callable[[Tensor, float], Tensor] = lambda C, s: C + s * C.diagonal().mean() * torch.eye(len(C)).to(C),
    solve: Callable[[Tensor, Tensor], Tensor] = lambda C, apart: torch.linalg.inv(C) @ apart,
    bias: Between = half_way,
) -> Fn:
    """mass_mean_probe with something else in one of its steps."""

    def direction(x: Tensor, y: Tensor, no: Tensor, yes: Tensor, shrinkage: float = 1e-3) -> Tensor:
        return solve(steady(covariance(x, y, no, yes), shrinkage), yes - no)

    return difference_probe(direction, bias)


@known_mistakes(
    {
        "the covariance is that of all rows around one mean; each row counts from the mean of its class.": (
            mass_mean(of_all)
        ),
        "the covariance is that of the True rows alone.": mass_mean(lambda x, y, no, yes: scatter(x[y], y[y], no, yes)),
        "the two classes' covariances count the same; every row should.": mass_mean(
            lambda x, y, no, yes: (scatter(x[y], y[y], no, yes) + scatter(x[~y], y[~y], no, yes)) / 2
        ),
        "the covariance is divided by the number of rows minus 1.": mass_mean(
            lambda x, y, no, yes: scatter(x, y, no, yes) * len(x) / (len(x) - 1)
        ),
        "the covariances of coordinates with each other are left out: only the diagonal is used.": mass_mean(
            lambda x, y, no, yes: scatter(x, y, no, yes).diagonal().diag()
        ),
        "it is multiplied by the covariance; it should be by its inverse.": mass_mean(solve=lambda C, apart: C @ apart),
        "the covariance does nothing: it is the difference of the means.": mass_mean(solve=lambda C, apart: apart),
        "nothing is added to the diagonal.": mass_mean(steady=lambda C, s: C),
        "the shrinkage itself is added to the diagonal; multiply it by the mean of the diagonal.": mass_mean(
            steady=lambda C, s: C + s * torch.eye(len(C)).to(C)
        ),
    },
    {sentence: mass_mean(bias=bias) for sentence, bias in WRONG_BIASES.items()},
)
def check_mass_mean_probe(fn: Fn) -> None:
    """With much shrinkage and with the default; one class alone."""
    _check_difference("mass_mean_probe", fn, mass_mean(), 0.4)
    x, y = two_classes(8)  # whose covariance is far from singular: with 7, the order of sums moves the fourth digit
    compare_parts("mass_mean_probe", fn(x, y), mass_mean()(x, y), PROBE)
    few = noise(5, 7, seed=8) + 4.0, torch.tensor([True, False, True, False, False])
    compare_parts(
        "mass_mean_probe of fewer rows than coordinates", fn(*few, 0.2), mass_mean()(*few, 0.2), PROBE, rtol=1e-3
    )


# ------------------------------------------------------------------------------------------------------ to the minimum


def logistic(
    penalty: Callable[[Tensor, float, int], Tensor] = lambda ones, l2, n: F.pad(l2 * ones[:-1], (0, 1)),
    labels: Callable[[Tensor], Tensor] = lambda y: y.double(),
    column: float = 1.0,
    rounds: int = 60,
) -> Fn:
    """The minimum by least squares with weights that follow the probabilities, with something else in the loss."""

    def logistic_probe(x: Tensor, y: Tensor, l2: float) -> Probe:
        if y.all() or not y.any():
            raise ValueError("one class")
        inputs = torch.cat([x.double(), torch.full((len(x), 1), column, dtype=torch.float64)], 1)
        wanted, theta = labels(y), torch.zeros(inputs.shape[1], dtype=torch.float64)
        weight = penalty(torch.ones_like(theta), l2, len(x))
        for _ in range(rounds):
            p = torch.sigmoid(inputs @ theta)
            slopes = (p * (1 - p)).clamp(min=1e-12)
            targets = inputs @ theta + (wanted - p) / slopes
            normal = inputs.T @ (slopes[:, None] * inputs) / len(x) + weight.diag()
            new = torch.linalg.pinv(normal) @ (inputs.T @ (slopes * targets)) / len(x)
            theta = (theta + new) / 2 if (new - theta).norm() > 3 else new
        return theta[:-1].to(x), theta[-1].to(x)

    return logistic_probe


def logistic_loss(x: Tensor, y: Tensor, l2: float, direction: Tensor, bias: Tensor) -> float:
    """In float64, row by row."""
    total = 0.0
    for row, label in zip(x.double(), y.tolist(), strict=True):
        score = float(row @ direction.double() + bias.double()) * (1 if label else -1)
        total += math.log1p(math.exp(-score)) if score > -30 else -score
    return total / len(x) + l2 / 2 * float(direction.double().square().sum())


def near_the_smallest(name: str, found: float, smallest: float) -> None:
    if not found <= smallest + NEAR:
        raise CheckFailed(
            f"{name}: the loss is {found - smallest:.2g} above the smallest one; it may be {NEAR:g} above it.\n"
            "  Next: go on until the gradient of the loss is nearly 0, in float64."
        )


def squares(x: Tensor, y: Tensor, l2: float) -> Probe:
    """Least squares on 0 and 1."""
    means_of(x, y)
    return ridge()(x, y.to(x), l2)


@known_mistakes(
    {
        "the bias is regularised, too.": logistic(lambda ones, l2, n: l2 * ones),
        "the loss is a sum over the rows; take the mean, or the penalty counts for too little.": logistic(
            lambda ones, l2, n: F.pad(l2 * ones[:-1] / n, (0, 1))
        ),
        "the penalty lacks the half: it is l2 times the squared length.": logistic(
            lambda ones, l2, n: F.pad(2 * l2 * ones[:-1], (0, 1))
        ),
        "nothing is regularised.": logistic(lambda ones, l2, n: 1e-4 * F.pad(ones[:-1], (0, 1))),
        "there is no bias.": logistic(column=0.0),
        "True and False are swapped.": logistic(labels=lambda y: 1 - y.double()),
        "it is a fit by least squares to 0 and 1.": squares,
        "it stops after one step of Newton's method.": logistic(rounds=1),
    }
)
def check_logistic_probe(fn: Fn) -> None:
    """Classes that overlap, classes that a plane separates, coordinates that are large; one class alone."""
    name = "logistic_probe"
    x, y = two_classes(9, n_batch=13)
    for l2 in (0.1, 0.5):
        answer, right = fn(x, y, l2), logistic()(x, y, l2)
        compare_parts(f"{name} with l2={l2}", answer, right, PROBE, rtol=1e-2, atol=1e-2)
        near_the_smallest(f"{name} with l2={l2}", *(logistic_loss(x, y, l2, *probe) for probe in (answer, right)))
    rows = x + 50.0
    smallest = logistic_loss(rows.double() - 50.0, y, 0.5, *logistic()(rows.double() - 50.0, y, 0.5))
    found = logistic_loss(rows, y, 0.5, *parts(name, fn(rows, y, 0.5), *PROBE))  # the bias is not regularised
    near_the_smallest(f"{name} with l2=0.5 on rows around 50", found, smallest)
    apart = 6.0 * x + 30.0 * y[:, None]
    far = 3.0 * two_classes(17, n_batch=13)[0]
    far[0] *= 30.0  # full steps of Newton's method then jump too far
    for rows, l2, words in (
        (apart, 1e-2, " that a plane separates"),
        (apart * 20, 1e-3, " that a plane separates"),
        (far, 1e-3, ", one of them much longer than the others"),
    ):
        answer, right = (parts(name, each(rows, y, l2), *PROBE) for each in (fn, logistic()))
        where = f"{name} on rows of length {rows.norm(dim=1).mean():.0f}{words}"
        near_the_smallest(where, *(logistic_loss(rows, y, l2, *probe) for probe in (answer, right)))
    parts_of_other_layouts(name, fn, (x, y, 0.1), PROBE)
    for label in (True, False):
        must_raise(
            name, ValueError, f"{name}(x, y, l2) with y all {label}", partial(fn, x, torch.full_like(y, label), 0.1)
        )


def softmax(
    penalty: Callable[[Tensor, float, int], Tensor] = lambda ones, l2, n: F.pad(l2 * ones[:, :-1], (0, 1)),
    shift: Callable[[Tensor], Tensor] = lambda b: b.mean(),
    end: Callable[[Tensor, Tensor], Any] = lambda W, b: (W, b),
    rounds: int = 12,
) -> Fn:
    """The minimum by Newton's method on all weights at once, with something else in the loss."""

    def softmax_probe(x: Tensor, y: Tensor, n_classes: int, l2: float) -> Any:
        inputs = F.pad(x.double(), (0, 1), value=1.0)
        n, width = inputs.shape
        theta = torch.zeros(n_classes, width, dtype=torch.float64)
        weight = penalty(torch.ones_like(theta), l2, n)
        for _ in range(rounds):
            p = (inputs @ theta.T).softmax(1)
            gradient = (p - F.one_hot(y, n_classes)).T @ inputs / n + weight * theta
            curves = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            hessian = torch.einsum("ncd,nx,ny->cxdy", curves, inputs, inputs).reshape(theta.numel(), -1) / n
            step = torch.linalg.pinv(hessian + weight.flatten().diag()) @ gradient.flatten()
            theta = theta - step.reshape(theta.shape) * min(1.0, 3 / float(step.norm() + 1e-9))
        W, b = theta[:, :-1].T, theta[:, -1]
        return end(W.to(x), (b - shift(b)).to(x))

    return softmax_probe


def softmax_loss(x: Tensor, y: Tensor, l2: float, W: Tensor, b: Tensor) -> float:
    """In float64, row by row."""
    total = 0.0
    for row, label in zip(x.double(), y.tolist(), strict=True):
        scores = (row @ W.double() + b.double()).tolist()
        total += math.log(sum(math.exp(score - max(scores)) for score in scores)) + max(scores) - scores[label]
    return total / len(x) + l2 / 2 * float(W.double().square().sum())


FAR = 10.0


def overlapping() -> tuple[Tensor, Tensor]:
    """Rows of three classes."""
    return two_classes(10, n_batch=14)[0], torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1, 0, 0, 2, 0, 0])


@cache
def softmax_minima() -> tuple[Probe, Tensor, float]:
    """The best probe with l2=0.3; with two classes and l2=3, from one direction to the other; for far rows, the loss.

    Where the rows are makes no difference, as biases are not regularised; but they are rounded there.
    """
    x, y = overlapping()
    rows, wide = (x + FAR).double() - FAR, x.double()
    W, _ = softmax()(wide, y.clamp(max=1), 2, 3.0)
    return softmax()(x, y, 3, 0.3), W[:, 1] - W[:, 0], softmax_loss(rows, y, 10.0, *softmax()(rows, y, 3, 10.0))


def one_against_the_rest(x: Tensor, y: Tensor, n_classes: int, l2: float) -> Probe:
    """A logistic regression for each class."""
    probes = [logistic()(x, y == k, l2) for k in range(n_classes)]
    W, b = torch.stack([w for w, _ in probes], 1), torch.stack([b for _, b in probes])
    return W, b - b.mean()


@known_mistakes(
    {
        "the biases are regularised, too.": softmax(lambda ones, l2, n: l2 * ones),
        "the loss is a sum over the rows; take the mean.": softmax(
            lambda ones, l2, n: F.pad(l2 * ones[:, :-1] / n, (0, 1))
        ),
        "the penalty lacks the half.": softmax(lambda ones, l2, n: F.pad(2 * l2 * ones[:, :-1], (0, 1))),
        "the biases are counted from the first one; their mean should be 0.": softmax(shift=lambda b: b[0]),
        "the axes of the directions are (n_class, d_model).": softmax(end=lambda W, b: (W.T, b)),
        "each class is told from all others by a probe of its own, not by a common softmax.": one_against_the_rest,
        "it stops after one step of Newton's method.": softmax(rounds=1),
    }
)
def check_softmax_probe(fn: Fn) -> None:
    """Three classes that overlap; rows that are far from 0, which takes float64 and care with the steps."""
    name, axes = "softmax_probe", {"directions": "d_model n_class", "biases": "n_class"}
    x, y = overlapping()
    right, two, far = softmax_minima()
    answer = fn(x, y, 3, 0.3)
    compare_parts(f"{name} with l2=0.3", answer, right, axes, rtol=1e-2, atol=1e-2)
    near_the_smallest(f"{name} with l2=0.3", *(softmax_loss(x, y, 0.3, *probe) for probe in (answer, right)))
    rows = x + FAR
    found = softmax_loss(rows, y, 10.0, *parts(name, fn(rows, y, 3, 10.0), *axes))
    near_the_smallest(f"{name} with l2=10 on rows around {FAR:.0f}", found, far)
    W, b = parts(name, fn(strided(x.double()), y.clamp(max=1), 3, 3.0), *axes)
    if W.shape != (D_MODEL, 3) or b.shape != (3,):
        raise CheckFailed(
            f"{name} with a class that has no rows: its shapes are {tuple(W.shape)} and {tuple(b.shape)}.\n"
            "  Next: take the number of classes from `n_classes`, not from the labels that occur."
        )
    where = f"{name} in float64, on inputs that are not contiguous, with a class that has no rows: "
    compare(where + "from one direction to the other", W[:, 1] - W[:, 0], two, "d_model", atol=1e-2)
    compare_kind(where + "the biases", b, two)


def ridge(
    penalty: Callable[[float, int], float] = lambda l2, n: l2 * n,
    centre: Callable[[Tensor], Tensor] = lambda x: x.mean(0),
    level: Callable[[Tensor], Tensor] = lambda numbers: numbers.mean(),
    bias: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda mean, middle, direction: mean - middle @ direction,
) -> Fn:
    """Least squares with the penalty as rows of its own, with something else in one of the steps."""

    def ridge_probe(x: Tensor, numbers: Tensor, l2: float) -> Probe:
        rows = torch.cat([x - centre(x), math.sqrt(penalty(l2, len(x))) * torch.eye(x.shape[1]).to(x)])
        targets = F.pad(numbers - level(numbers), (0, x.shape[1]))
        direction = torch.linalg.lstsq(rows, targets[:, None]).solution[:, 0]
        return direction, bias(numbers.mean(), x.mean(0), direction)

    return ridge_probe


def ridge_on_the_bias(x: Tensor, numbers: Tensor, l2: float) -> Probe:
    wide = F.pad(x, (0, 1), value=1.0)
    theta = torch.linalg.solve(wide.T @ wide / len(x) + l2 * torch.eye(wide.shape[1]).to(x), wide.T @ numbers / len(x))
    return theta[:-1], theta[-1]


@known_mistakes(
    {
        "the bias is regularised, too.": ridge_on_the_bias,
        "the squared errors are summed; take their mean, or the penalty counts for too little.": ridge(
            penalty=lambda l2, n: l2
        ),
        "nothing is regularised.": ridge(penalty=lambda l2, n: 0.0),
        "the penalty is half of what it should be.": ridge(penalty=lambda l2, n: l2 * n / 2),
        "the rows are not centred.": ridge(centre=lambda x: torch.zeros_like(x[0])),
        "the bias is the mean of the numbers; what the mean of the rows scores has to be taken off.": ridge(
            bias=lambda mean, middle, direction: mean
        ),
        "there is no bias.": ridge(bias=lambda mean, middle, direction: 0 * mean),
    }
)
def check_ridge_probe(fn: Fn) -> None:
    """More rows than coordinates, and fewer."""
    x, numbers = two_classes(11)[0], 2.0 + noise(N_BATCH, seed=12)
    for l2 in (0.1, 2.0):
        compare_parts(f"ridge_probe with l2={l2}", fn(x, numbers, l2), ridge()(x, numbers, l2), PROBE, atol=1e-4)
    few = noise(4, 6, seed=13) + 1.0, noise(4, seed=14)
    compare_parts("ridge_probe of fewer rows than coordinates", fn(*few, 0.3), ridge()(*few, 0.3), PROBE, atol=1e-4)
    parts_of_every_kind("ridge_probe", fn, (x, numbers, 0.1), PROBE)


# -------------------------------------------------------------------------------------------------------------- auroc


def pair_by_pair(
    win: Callable[[float, float], float] = lambda yes, no: 1.0 if yes > no else 0.5 if yes == no else 0.0,
    end: Callable[[float, int, int], float] = lambda wins, n_yes, n_no: wins / (n_yes * n_no),
) -> Fn:
    """Every pair of a True row and a False one."""

    def auroc(scores: Tensor, labels: Tensor) -> Tensor:
        yes, no = scores[labels].tolist(), scores[~labels].tolist()
        if not yes or not no:
            raise ValueError("one kind")
        wins = sum(win(first, second) for first in yes for second in no)
        return torch.tensor(end(wins, len(yes), len(no)), dtype=scores.dtype)

    return auroc


@known_mistakes(
    {
        "ties count as lost; each counts one half.": pair_by_pair(lambda yes, no: float(yes > no)),
        "ties count as won; each counts one half.": pair_by_pair(lambda yes, no: float(yes >= no)),
        "low scores count as True.": pair_by_pair(lambda yes, no: 1.0 if yes < no else 0.5 if yes == no else 0.0),
        "it is the share of rows on the right side of 0; no threshold is needed.": (
            lambda scores, labels: ((scores > 0) == labels).to(scores).mean()
        ),
        "the pairs are divided by all pairs of rows; only those of a True and a False row count.": pair_by_pair(
            end=lambda wins, n_yes, n_no: wins / ((n_yes + n_no) * (n_yes + n_no - 1) / 2)
        ),
        "it is the number of pairs won; divide by the number of pairs.": pair_by_pair(
            end=lambda wins, n_yes, n_no: wins
        ),
    }
)
def check_auroc(fn: Fn) -> None:
    """Scores with ties and without, of any size, and all the same; rows of one kind alone."""
    scores = torch.tensor([0.3, -1.0, 2.0, 0.3, 0.301, 2.0, 0.3, -4.0])  # two of them are near, and no tie
    labels = torch.tensor([True, False, True, False, False, False, True, False])
    compare("auroc with ties", fn(scores, labels), pair_by_pair()(scores, labels), "")
    apart = noise(9, seed=15) * 100 + 500, torch.arange(9) % 2 == 0
    compare("auroc without ties", fn(*apart), pair_by_pair()(*apart), "")
    compare("auroc where all scores are 1", fn(torch.ones(8), labels), torch.tensor(0.5), "")
    follows_input("auroc", fn, (scores, labels), "")
    for label in (True, False):
        call = f"auroc(scores, labels) with labels all {label}"
        must_raise("auroc", ValueError, call, partial(fn, scores, torch.full_like(labels, label)))
