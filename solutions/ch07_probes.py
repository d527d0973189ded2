"""Chapter 07: linear probes, what they prove, and whether a model uses what can be read from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from course_utils.hooks import HookPoint, run_with_cache, run_with_hooks

Probe = tuple[Tensor, Tensor]  # a direction and a bias: the score of x is x @ direction + bias
Fit = Callable[[Tensor, Tensor], Probe]

# --------------------------------------------------------------------------------------------------------- collecting


def stream_name(model: Any, layer: int) -> str:
    """The hook point of the residual stream after `layer` layers: 0 is what the first one reads."""
    n_layers = model.cfg.n_layers
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"


@torch.no_grad()
def extract_activations(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    layers: Sequence[int],
    position: str | Int[Tensor, " batch"],
    batch_size: int = 64,
) -> Float[Tensor, "layer batch d_model"]:
    """Collect one vector of the residual stream for each text, at some layers.

    Layer 0 is the stream that the first block reads, and n_layers is what the last block leaves (`stream_name` knows
    the hook points). `mask` is True where a token belongs to the text; all others are padding, on either side.
    `position` says which vector: "last" is that of the last token that is not padding, "mean" is the mean over all
    tokens that are not, and a tensor holds one position for each text. The model runs on `batch_size` texts at a time
    and keeps only the streams that were asked for.
    Raises ValueError for any other word, and for a text that is nothing but padding unless its position is given.
    """
    given = not isinstance(position, str)
    if not given and position not in ("last", "mean"):
        raise ValueError(f'extract_activations: position={position!r}; it is "last", "mean", or a position per text.')
    if not given and not mask.any(dim=1).all():
        raise ValueError("extract_activations: a text without any token; its row of `mask` is all False.")
    places = torch.arange(tokens.shape[1], device=tokens.device)
    if position == "mean" and not given:
        weights = mask / mask.sum(dim=1, keepdim=True)
    else:
        chosen = position if given else (mask * places).argmax(dim=1)
        weights = places.eq(chosen[:, None]).float()
    names = [stream_name(model, layer) for layer in layers]
    found = []
    for rows in torch.arange(len(tokens)).split(batch_size):
        _, cache = run_with_cache(model, tokens[rows], names=names)
        streams = torch.stack([cache[name] for name in names])
        share = weights[rows].to(streams)
        found.append(einops.einsum(streams, share, "layer batch pos d_model, batch pos -> layer batch d_model"))
    return torch.cat(found, dim=1)


# ----------------------------------------------------------------------------------------------------- probes by hand


def standardise(
    x: Float[Tensor, "batch d_model"], reference: Float[Tensor, "row d_model"]
) -> Float[Tensor, "batch d_model"]:
    """Shift and scale each coordinate so that it has mean 0 and standard deviation 1 over the rows of `reference`.

    The standard deviation is that of the rows themselves: divide by their number. A coordinate that is the same in all
    rows of `reference` is only shifted.
    """
    mean, scale = reference.mean(dim=0), reference.std(dim=0, correction=0)
    same = (reference == reference[:1]).all(dim=0)  # `scale` may then be rounded to a little more than 0
    return (x - mean) / scale.masked_fill(same, 1.0)


def pca(x: Float[Tensor, "batch d_model"], k: int) -> tuple[Float[Tensor, "k d_model"], Float[Tensor, " k"]]:
    """Find the `k` orthogonal directions along which the rows vary most: (components, shares).

    Components have length 1 and come in the order of their variance, the largest first. `shares` says which part of
    the total variance each of them has. The sign of a component is arbitrary; here its entry of the largest absolute
    value is positive.
    """
    centred = x - x.mean(dim=0)
    _, sizes, components = torch.linalg.svd(centred, full_matrices=False)
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    shares = sizes**2 / (sizes**2).sum()
    return (components * largest.sign())[:k], shares[:k]


def class_means(
    x: Float[Tensor, "batch d_model"], y: Bool[Tensor, " batch"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """The means of the rows in which y is False, and of those in which it is True. ValueError if there are none."""
    if y.all() or not y.any():
        raise ValueError("a probe needs examples of both classes.")
    return x[~y].mean(dim=0), x[y].mean(dim=0)


def mean_difference_probe(
    x: Float[Tensor, "batch d_model"], y: Bool[Tensor, " batch"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """Return the simplest probe, (direction, bias): from the mean of the False rows to the mean of the True rows.

    The score of a vector is `x @ direction + bias`, and a score above 0 says True. The bias puts 0 half-way between
    the two means. Raises ValueError if one of the classes has no rows.
    """
    no, yes = class_means(x, y)
    direction = yes - no
    return direction, -direction @ (no + yes) / 2


def mass_mean_probe(
    x: Float[Tensor, "batch d_model"], y: Bool[Tensor, " batch"], shrinkage: float = 1e-3
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """Return the difference of the means, corrected for how the rows vary within their classes: (direction, bias).

    The direction is the inverse of C times the difference of the means. C is the covariance of the rows around the mean
    of *their own* class, over all rows (divide by their number), plus `shrinkage` times the mean of its diagonal times
    the identity, so that it has an inverse. The bias puts 0 half-way between the two means. Raises ValueError if one
    of the classes has no rows.
    Source: Marks and Tegmark 2024, section 5.1 (there, without shrinkage); Fisher 1936.
    """
    no, yes = class_means(x, y)
    within = x - torch.where(y[:, None], yes, no)
    covariance = within.T @ within / len(x)
    covariance = covariance + shrinkage * covariance.diagonal().mean() * torch.eye(len(yes)).to(x)
    direction = torch.linalg.solve(covariance, yes - no)
    return direction, -direction @ (no + yes) / 2


def logistic_probe(
    x: Float[Tensor, "batch d_model"], y: Bool[Tensor, " batch"], l2: float
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """Fit a logistic regression, to the minimum: (direction, bias).

    The loss is the *mean* over the rows of -log p(y), where p(True) is the sigmoid of the score, plus `l2`/2 times the
    squared length of the direction; the bias is not regularised. The loss that you reach is at most 1e-6 above the
    smallest one. Compute in float64, and return the dtype of `x`. Raises ValueError if one of the classes has no rows.
    scikit-learn's `LogisticRegression(C=1 / (l2 * n))` has the same minimum.
    """
    class_means(x, y)
    inputs = nn.functional.pad(x.double(), (0, 1), value=1.0)  # the bias is the weight of a coordinate that is always 1
    labels, theta = y.double(), torch.zeros(inputs.shape[1], dtype=torch.float64, device=x.device)
    penalty = torch.full_like(theta, l2)
    penalty[-1] = 0.0

    def loss(theta: Tensor) -> Tensor:
        data = nn.functional.binary_cross_entropy_with_logits(inputs @ theta, labels)
        return data + (penalty * theta**2).sum() / 2

    for _ in range(100):
        p = torch.sigmoid(inputs @ theta)
        gradient = inputs.T @ (p - labels) / len(x) + penalty * theta
        hessian = (inputs.T * (p * (1 - p))) @ inputs / len(x) + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        if gradient @ step < 1e-12:  # twice what the loss can still fall by, if it is quadratic
            break
        while loss(theta - step) > loss(theta) and step.norm() > 1e-12:  # too far, where it is not
            step = step / 2
        theta = theta - step
    return theta[:-1].to(x), theta[-1].to(x)


def softmax_probe(
    x: Float[Tensor, "batch d_model"], y: Int[Tensor, " batch"], n_classes: int, l2: float
) -> tuple[Float[Tensor, "d_model n_class"], Float[Tensor, " n_class"]]:
    """Fit a logistic regression with many classes, to the minimum: (directions, biases).

    The scores are `x @ directions + biases`, one for each class; their softmax is the probability. The loss is the
    mean of -log p(y) plus `l2`/2 times the sum of the squares of all directions. Biases are not regularised; as the
    same number added to all of them changes nothing, they are returned with mean 0. The loss that you reach is at
    most 1e-6 above the smallest one. Compute in float64, and return the dtype of `x`. A class may have no rows.
    """
    inputs = x.double()
    W = inputs.new_zeros(x.shape[1], n_classes, requires_grad=True)
    b = inputs.new_zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [W, b],
        max_iter=300,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        value = nn.functional.cross_entropy(inputs @ W + b, y) + l2 / 2 * W.square().sum()
        W.grad, b.grad = torch.autograd.grad(value, [W, b])
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return W.detach().to(x), (b - b.mean()).detach().to(x)


def ridge_probe(
    x: Float[Tensor, "batch d_model"], numbers: Float[Tensor, " batch"], l2: float
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """Fit a probe for a number instead of a class: (direction, bias), with `x @ direction + bias` as the estimate.

    It minimises the mean of the squared errors plus `l2` times the squared length of the direction; the bias is not
    regularised. There is a formula: after both sides are centred, (X^T X / n + l2 I)^-1 X^T numbers / n.
    """
    centred, mean = x - x.mean(dim=0), numbers.mean()
    gram = centred.T @ centred / len(x) + l2 * torch.eye(x.shape[1]).to(x)
    direction = torch.linalg.solve(gram, centred.T @ (numbers - mean) / len(x))
    return direction, mean - x.mean(dim=0) @ direction


def auroc(scores: Float[Tensor, " batch"], labels: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return how often a True row scores higher than a False one, over all pairs of the two; a tie counts one half.

    So 0.5 is what a blind probe gets, whatever the share of True rows, and no threshold or bias is needed. Raises
    ValueError if there are no rows of one kind.
    """
    if labels.all() or not labels.any():
        raise ValueError("auroc: it compares True rows with False ones, and one of the two has none.")
    yes, no = scores[labels][:, None], scores[~labels]
    return ((yes > no).to(scores) + (yes == no).to(scores) / 2).mean()


# --------------------------------------------------------------------------------------------- is the probe fooling us?


def hold_out(types: Int[Tensor, " batch"], share: float, generator: torch.Generator) -> Bool[Tensor, " batch"]:
    """Choose types at random, and mark all of their rows: True is held out.

    `types` says of which type each row is (which name, noun or template), by any numbers. The number of types held out
    is `share` of all that occur, rounded, but at least one and never all of them. Which ones depends on `generator`
    alone.
    """
    known = types.unique()
    n_out = min(max(1, round(share * len(known))), len(known) - 1)
    order = torch.randperm(len(known), generator=generator).to(types.device)
    return torch.isin(types, known[order[:n_out]])


def control_task(types: Int[Tensor, " batch"], n_classes: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
    """Give each *type* a random class, from 0 to n_classes - 1: labels that mean nothing, and can be learned by heart.

    All rows of one type get the same class. Classes are drawn with equal chances and independently of each other; if
    there are at least as many types as classes, none of the classes may stay without a type, so draw again.
    Source: Hewitt and Liang 2019, section 2.
    """
    known, which = types.unique(return_inverse=True)
    while True:
        drawn = torch.randint(n_classes, (len(known),), generator=generator).to(types.device)
        if len(drawn.unique()) == min(n_classes, len(known)) or len(known) < n_classes:
            return drawn[which]


def accuracy(probe: Probe, x: Float[Tensor, "batch d_model"], y: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """The share of rows that the probe gets right: a score above 0 says True."""
    direction, bias = probe
    return ((x @ direction + bias > 0) == y).to(x).mean()


def selectivity(
    fit: Fit,
    x: Float[Tensor, "batch d_model"],
    y: Bool[Tensor, " batch"],
    types: Int[Tensor, " batch"],
    train: Bool[Tensor, " batch"],
    generator: torch.Generator,
    n_controls: int = 5,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Compare a probe with probes of the same kind for labels that mean nothing: (accuracy, selectivity).

    `fit(x, y)` returns a probe (direction, bias). All probes are fitted on the rows of `train` and judged on the
    others. The control accuracy is the mean over `n_controls` control tasks of two classes, drawn one after the other
    with `generator`; types are those of all rows. Selectivity is the accuracy minus the control accuracy.
    Source: Hewitt and Liang 2019, section 2.
    """

    def judged(labels: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
        return accuracy(fit(x[train], labels[train]), x[~train], labels[~train])

    real = judged(y)
    controls = [judged(control_task(types, 2, generator).bool()) for _ in range(n_controls)]
    return real, real - torch.stack(controls).mean()


def generalisation_matrix(
    fit: Fit, sets: Mapping[str, tuple[Float[Tensor, "batch d_model"], Bool[Tensor, " batch"], Bool[Tensor, " batch"]]]
) -> Float[Tensor, "fitted tested"]:
    """Fit a probe on each set, and test it on every set: accuracies [fitted, tested], in the order of the mapping.

    A set is (x, y, train). Its probe is fitted on the rows of `train`, and every probe is tested on the rows that are
    not, also on the diagonal.
    """
    probes = [fit(x[train], y[train]) for x, y, train in sets.values()]
    rows = [torch.stack([accuracy(probe, x[~train], y[~train]) for x, y, train in sets.values()]) for probe in probes]
    return torch.stack(rows)


# -------------------------------------------------------------------------------------------------------- is it used?


@torch.no_grad()
def run_steered(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    positions: Int[Tensor, " batch"],
    vector: Float[Tensor, "*batch d_model"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model with a vector added to the stream at one layer, at one position of each text; return the logits.

    Layers are numbered as in `extract_activations`, and `vector` is one for all texts or one for each. All that comes
    later is computed from the changed stream. No other position is changed at that layer, and no hook stays behind.
    """
    rows = torch.arange(len(tokens), device=tokens.device)

    def steer(stream: Tensor, hook: HookPoint) -> Tensor:
        changed = stream.clone()
        changed[rows, positions] = stream[rows, positions] + vector
        return changed

    return run_with_hooks(model, tokens, hooks={stream_name(model, layer): steer})


def normalised_effect(
    steered: Float[Tensor, " batch"], before: Float[Tensor, " batch"], target: Float[Tensor, " case"]
) -> Float[Tensor, ""]:
    """Say how far an intervention moves a metric: 0 is where it was, 1 is where the texts of the other class are.

    A ratio of means: (steered - before) / (target - before). `before` and `steered` are the same texts without and with
    the intervention, and `target` is the metric on texts that do have the property; it may be another number of them.
    Raises ValueError if the means of `before` and `target` are the same: there is nowhere to go.
    Source: Marks and Tegmark 2024, section 6.
    """
    way = target.mean() - before.mean()
    if way == 0:
        raise ValueError("normalised_effect: `before` and `target` have the same mean, so there is nothing to reach.")
    return (steered.mean() - before.mean()) / way


def activation_pattern(
    x: Float[Tensor, "batch d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, " d_model"]:
    """Turn a direction that *reads* into the direction that the thing read is *written* along.

    It is the covariance of the rows with their own scores `x @ direction`, divided by the variance of the scores: by
    how much each coordinate changes, on average, when the score grows by 1.
    Source: Haufe et al. 2014, equation 6.
    """
    centred = x - x.mean(dim=0)
    scores = centred @ direction
    return scores @ centred / (scores @ scores)


def erase(
    x: Float[Tensor, "batch d_model"], y: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
    """Erase all that a linear probe could read about the class, and change as little as possible: (matrix, bias).

    The erased vectors are `x @ matrix.T + bias`. On the rows given, all classes then have the same mean, so that no
    linear probe does better than one that sees nothing. Among all affine maps that achieve this, it is the one with
    the smallest mean squared change. With W the inverse root of the covariance of `x` (on the directions in which the
    rows vary; 0 on all others), and P the orthogonal projection on the span of W C, where C is the covariance
    [d_model, n_class] of `x` with the one-hot classes:

        erased(x) = x - W^+ P W (x - mean)

    Compute in float64, and return the dtype of `x`. Classes may be any numbers. If the classes have equal means
    already, nothing changes.
    Source: Belrose et al. 2023 (LEACE), theorem 4.3.
    """
    wide = x.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    one_hot = (y[:, None] == y.unique()).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    kept = variances > 1e-10 * variances.max()
    axes, spread = axes[:, kept], variances[kept].sqrt()
    cross = (axes / spread).T @ centred.T @ (one_hot - one_hot.mean(dim=0)) / len(x)
    basis, sizes, _ = torch.linalg.svd(cross, full_matrices=False)
    basis = basis[:, sizes > 1e-6]  # with whitened rows these are correlations: this is 0 but for rounding
    removed = (axes * spread) @ basis @ basis.T @ (axes / spread).T
    matrix = torch.eye(x.shape[1], dtype=wide.dtype, device=x.device) - removed
    return matrix.to(x), (removed @ mean).to(x)


# --------------------------------------------------------------------------------------------------- attention probes


class AttentionProbe(nn.Module):
    """A probe for whole texts that learns where to look: one head of attention whose query is a parameter.

    `pattern(x, mask)` scores each position by `x @ query / sqrt(d_model)` and takes the softmax over the positions
    where `mask` is True; all others get 0. `forward(x, mask)` averages the vectors with these weights, and returns
    scores for the classes: the average times `W`, plus `b`. With the query at 0, where it begins, it is a probe on
    the mean.
    """

    def __init__(self, d_model: int, n_classes: int) -> None:  # given
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d_model))
        self.W = nn.Parameter(torch.zeros(d_model, n_classes))
        self.b = nn.Parameter(torch.zeros(n_classes))

    def pattern(
        self, x: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """Say how much of the average each position gets."""
        scores = x @ self.query / math.sqrt(x.shape[-1])
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n_class"]:
        """Score the classes from the weighted average."""
        pooled = einops.einsum(self.pattern(x, mask), x, "batch pos, batch pos d_model -> batch d_model")
        return pooled @ self.W + self.b
