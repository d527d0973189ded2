"""Checks of chapter 06, geometry: lengths, interference, dimensionality, and what one dimension holds.

Oracles go through the features one by one, integrate over a grid, or count what was drawn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch06.toy_models import active_values, draws, near, together
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.plain import must_raise

Fn = Callable[..., Any]

AXES = "instance feature"
STRANGE = "at a feature that is not stored"


def some_weights() -> dict[str, Tensor]:
    """Weights of toy models: any, and with features that are not stored, in one and in two places."""
    W = noise(3, 2, 5, seed=1)
    missing = noise(2, 4, 6, seed=2)
    missing[0, :, 3] = 0
    missing[1, :, [0, 4]] = 0
    short = noise(1, 3, 4, seed=3)
    short[0, :, 1] *= 0.05 / short[0, :, 1].norm()
    return {"any weights": W, STRANGE: missing, "with a short feature": short}


def geometry(name: str, fn: Fn, each: Callable[[Tensor, int], Tensor]) -> None:
    """Compare a quantity of every feature with `each`, which has the weights of one instance and a feature."""
    for what, W in some_weights().items():
        expected = torch.stack([torch.stack([each(w, f) for f in range(w.shape[1])]) for w in W])
        compare(f"{name}, {what}", fn(W), expected, AXES)
    W = some_weights()["any weights"]
    follows_input(name, fn, (W,), AXES)
    follows_every_kind(name, fn, (W,), AXES, graph=True)


# ------------------------------------------------------------------------------------------------------ feature_norms


@known_mistakes(
    {
        "the norm runs over the features; a feature's direction runs along d_hidden.": lambda W: W.norm(dim=2),
        "it is the square of the length.": lambda W: W.square().sum(1),
        "it is the sum of absolute values; the length is the root of the sum of squares.": lambda W: W.abs().sum(1),
        "it is the largest absolute value.": lambda W: W.abs().amax(1),
        "it is one number for each instance, repeated.": lambda W: W.norm(dim=(1, 2))[:, None].expand(-1, W.shape[2]),
        "the mean square takes the place of the sum.": lambda W: W.square().mean(1).sqrt(),
    }
)
def check_feature_norms(fn: Fn) -> None:
    """Any weights, and features that are not stored."""
    geometry("feature_norms", fn, lambda w, f: torch.sqrt(sum(w[k, f] ** 2 for k in range(len(w)))))


# ------------------------------------------------------------------------------------------------------- interference


def dots(W: Tensor, first: bool = True, second: bool = False) -> Tensor:
    """All products of two features of an instance, either of them normalised or not."""
    unit = F.normalize(W, dim=1)
    return (unit if first else W).mT @ (unit if second else W)


def off_diagonal(products: Tensor) -> Tensor:
    return products * (1 - torch.eye(products.shape[-1], dtype=products.dtype))


def disturbing(
    first: bool = True,
    second: bool = False,
    power: Callable[[Tensor], Tensor] = torch.square,
    itself: bool = False,
    total: Callable[[Tensor], Tensor] = lambda squares: squares.sum(-1),
) -> Fn:
    """Interference with other features normalised, another power, or another sum."""

    def interference(W: Tensor) -> Tensor:
        products = power(dots(W, first, second))
        return total(products if itself else off_diagonal(products))

    return interference


def divided_by_zero(then: Callable[[Tensor], Tensor]) -> Fn:
    """What comes where a direction is divided by a length of 0: NaN."""
    return lambda W: then((W / W.norm(dim=1, keepdim=True)).mT @ W)


def one_interference(w: Tensor, f: int) -> Tensor:
    length = w[:, f].norm()
    others = [(w[:, f] @ w[:, g]) ** 2 for g in range(w.shape[1]) if g != f]
    return torch.stack(others).sum() / length**2 if length > 0 else length


@known_mistakes(
    {
        "a feature that is not stored gives NaN: its length of 0 divides 0.": divided_by_zero(
            lambda products: off_diagonal(products.square()).sum(-1)
        ),
        "the sum includes the feature itself.": disturbing(itself=True),
        "the other feature is normalised, and the feature itself is not.": disturbing(first=False, second=True),
        "both features are normalised; the other keeps its length.": disturbing(second=True),
        "neither feature is normalised.": disturbing(first=False),
        "the products are not squared, so that they cancel.": disturbing(power=lambda products: products),
        "absolute values take the place of squares.": disturbing(power=torch.abs),
        "it is the mean over the other features; add them up.": disturbing(
            total=lambda squares: squares.sum(-1) / (squares.shape[-1] - 1)
        ),
        "it is the largest of the squares; add them up.": disturbing(total=lambda squares: squares.amax(-1)),
        "it is the root of the sum.": disturbing(total=lambda squares: squares.sum(-1).sqrt()),
    }
)
def check_interference(fn: Fn) -> None:
    """Any weights, features that are not stored, and a short one."""
    geometry("interference", fn, one_interference)


# --------------------------------------------------------------------------------------------- feature_dimensionality


def sharing(
    own: Callable[[Tensor], Tensor] = torch.square,
    power: Callable[[Tensor], Tensor] = torch.square,
    itself: bool = True,
    first: bool = True,
    second: bool = False,
    epsilon: float = 0.0,
) -> Fn:
    """Dimensionality with another numerator or another denominator."""

    def feature_dimensionality(W: Tensor) -> Tensor:
        above = own(W.norm(dim=1))
        below = disturbing(first, second, power, itself)(W) + epsilon
        return torch.where(above > 0, above / below.where(below != 0, 1.0), 0.0)

    return feature_dimensionality


def one_share(w: Tensor, f: int) -> Tensor:
    length = w[:, f].norm()
    return length**4 / sum((w[:, f] @ w[:, g]) ** 2 for g in range(w.shape[1])) if length > 0 else length


@known_mistakes(
    {
        "a feature that is not stored gives NaN: 0 is divided by 0.": lambda W: (
            W.square().sum(1) / dots(W).square().sum(-1)
        ),
        "the numerator is the length; it is the square of the length.": sharing(own=lambda length: length),
        "the sum leaves out the feature itself.": sharing(itself=False),
        "both features are normalised in the denominator; the other keeps its length.": sharing(second=True),
        "the other feature is normalised, and the feature itself is not.": sharing(first=False, second=True),
        "neither feature is normalised in the denominator.": sharing(first=False),
        "the products in the denominator are not squared.": sharing(power=torch.abs),
        "the sum in the denominator is squared, and not each product.": lambda W: (
            W.square().sum(1) / dots(W).sum(-1).square().clamp(min=1e-12)
        ),
        "a number as large as 1e-3 is added to the denominator, which matters where a feature is short.": sharing(
            epsilon=1e-3
        ),
    }
)
def check_feature_dimensionality(fn: Fn) -> None:
    """Any weights, features that are not stored, and a short one."""
    geometry("feature_dimensionality", fn, one_share)


# ----------------------------------------------------------------------------------------------------- losses_by_hand


def integrated(probability: Tensor, importance: Tensor, n: int = 60) -> Tensor:
    """The expected losses, added up over a grid of values of two features that are active or not."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    out = torch.empty(3, len(importance), len(probability), dtype=torch.float64)
    for column, p in enumerate(probability.double()):
        chance = torch.cat([1 - p[None], p.expand(n) / n])  # not active, or active with one of n values
        value = torch.cat([u.new_zeros(1), u])
        weight, first, second = chance[:, None] * chance, value[:, None], value
        mean = (chance * value).sum()
        alone = (weight * (first - mean) ** 2).sum()
        errors = (first - (first - second).clamp(min=0)) ** 2, (second - (second - first).clamp(min=0)) ** 2
        for row, i in enumerate(importance.double()):
            together_ = (weight * (errors[0] + i * errors[1])).sum()
            out[:, row, column] = torch.stack([i * alone, alone, together_]) / 2
    return out.to(probability.dtype)


def pencil(
    alone: Callable[[Tensor], Tensor] = lambda p: p / 3 - p**2 / 4,
    both: Callable[[Tensor], Tensor] = lambda p: p**2 / 6,
    weight: Callable[[Tensor], Tensor] = lambda importance: 1 + importance,
    divisor: float = 2.0,
    order: tuple[int, int, int] = (0, 1, 2),
) -> Fn:
    """The three losses, with mistakes in the calculation."""

    def losses_by_hand(probability: Tensor, importance: Tensor) -> Tensor:
        i, variance = importance[:, None], alone(probability)
        three = [i * variance, torch.ones_like(i) * variance, weight(i) * both(probability)]
        return torch.stack([three[k] for k in order]) / divisor

    return losses_by_hand


@known_mistakes(
    {
        "a feature that is left out costs E[x²], as if the model guessed 0; it guesses the mean.": pencil(
            alone=lambda p: p / 3
        ),
        "the variance is that of an active feature, 1/12, times p; being active or not varies, too.": pencil(
            alone=lambda p: p / 12
        ),
        "both features are added up; take their mean.": pencil(divisor=1.0),
        "solutions 0 and 1 are exchanged: where feature 0 is stored, feature 1 costs.": pencil(order=(1, 0, 2)),
        "in superposition only feature 0 has an error.": pencil(weight=torch.ones_like),
        "in superposition only feature 1 has an error.": pencil(weight=lambda importance: importance),
        "superposition costs in proportion to p; both must be active, with p².": pencil(both=lambda p: p / 6),
        "superposition costs either feature the mean square of the larger value; it is the smaller.": pencil(
            both=lambda p: p**2 / 2
        ),
        "superposition costs the square of the mean of the smaller value, 1/9; it is the mean of the square.": pencil(
            both=lambda p: p**2 / 9
        ),
        "superposition costs twice what it should: the mean of min(u, v)² is 1/6, and the two are averaged.": pencil(
            both=lambda p: p**2 / 3
        ),
    }
)
def check_losses_by_hand(fn: Fn) -> None:
    """Against sums over a grid of values, whose squares are off by less than 1e-4."""
    name, axes = "losses_by_hand", "solution importance probability"
    probability, importance = torch.tensor([1.0, 0.6, 0.3, 0.05]), torch.tensor([0.2, 1.0])
    compare(name, fn(probability, importance), integrated(probability, importance), axes, rtol=1e-3, atol=1e-4)
    follows_input(name, fn, (probability, importance), axes)


# ------------------------------------------------------------------------------------------------------ phase_diagram


def grid() -> tuple[Tensor, Tensor]:
    """Weights and losses of 3 times 4 cases with five copies each: every phase, in every order of the losses."""
    large, small = 0.7, 0.3
    kinds = [(large, small), (-small, large), (large, -large), (-large, large), (large, large), (small, -small)]
    kinds += [(-large, small), (small, -large), (-large, -large)]
    W, losses = torch.empty(3, 4, 5, 1, 2), torch.empty(3, 4, 5)
    for case in range(12):
        for copy in range(5):
            W[case // 4, case % 4, copy, 0] = torch.tensor(kinds[(case * 2 + copy * 4) % len(kinds)])
        losses[case // 4, case % 4] = 0.1 + torch.tensor([(case * 7 + copy * 3 + 2) % 5 for copy in range(5)])
    return W * (1 + 0.05 * noise(*W.shape, seed=4).clamp(-1, 1)), losses


def phase_of(first: float, second: float) -> int:
    stored = abs(first) > 0.5, abs(second) > 0.5
    if stored == (True, True):
        return 2 if first * second < 0 else 3
    return 3 if stored == (False, False) else stored.index(True)


def telling(
    chosen: Callable[[Tensor], Tensor] = lambda losses: losses.argmin(-1),
    phase: Callable[[float, float], int] = phase_of,
) -> Fn:
    """The diagram with another choice among the copies, or other names for what they learned."""

    def phase_diagram(W: Tensor, losses: Tensor) -> Tensor:
        best = chosen(losses)
        rows = [
            [phase(*W[i, j, best[i, j], 0].tolist()) for j in range(losses.shape[1])] for i in range(losses.shape[0])
        ]
        return torch.tensor(rows)

    return phase_diagram


def without_sizes(first: float, second: float) -> int:
    """As if a weight of either size were stored only if it is positive."""
    return {(True, False): 0, (False, True): 1, (True, True): 3, (False, False): 3}[first > 0.5, second > 0.5]


@known_mistakes(
    {
        "the worst copy is taken, with the largest loss.": telling(lambda losses: losses.argmax(-1)),
        "the first copy is taken, whatever its loss.": telling(lambda losses: losses.argmin(-1) * 0),
        "the copy with the best mean loss is taken in all cases.": telling(
            lambda losses: losses.mean((0, 1)).argmin().expand(losses.shape[:2])
        ),
        "a weight counts as stored only if it is positive; its size counts.": telling(phase=without_sizes),
        "both stored with the same sign counts as superposition.": telling(
            phase=lambda a, b: 2 if min(abs(a), abs(b)) > 0.5 else phase_of(a, b)
        ),
        "opposite signs count as superposition, however small the weights.": telling(
            phase=lambda a, b: 2 if a * b < 0 else phase_of(a, b)
        ),
        "0 and 1 are exchanged.": telling(phase=lambda a, b: {0: 1, 1: 0}.get(phase_of(a, b), phase_of(a, b))),
        "what is none of the three cases counts as 0; it is 3.": telling(phase=lambda a, b: phase_of(a, b) % 3),
    }
)
def check_phase_diagram(fn: Fn) -> None:
    """Every kind of weights, near the threshold too; the best copy stands in every place."""
    W, losses = grid()
    compare("phase_diagram", fn(W, losses), telling()(W, losses), "importance probability")
    close = W.new_tensor([[0.49, 0.51], [-0.51, 0.49], [-0.49, -0.49], [0.51, -0.52]])[None, :, None, None]
    expected = torch.tensor([[1, 0, 3, 2]])
    compare("phase_diagram near 0.5", fn(close, losses[:1, :, :1]), expected, "importance probability")


# ------------------------------------------------------------------------------------------------------- sample_pairs


def pairing(
    correlated: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    anticorrelated: Callable[[Tensor, Tensor, float], Tensor] | None = None,
    flat: Callable[[Tensor], Tensor] = lambda pairs: pairs.flatten(-2),
    **wrong: Any,
) -> Fn:
    """Pairs with another rule for who is active (from two draws for each pair), in another order, or with one value."""

    def sample_pairs(
        n_batch: int, n_instances: int, n_pairs: int, probability: float, kind: str, generator: torch.Generator
    ) -> Tensor:
        if kind not in ("correlated", "anticorrelated") or (kind == "anticorrelated" and probability > 0.5):
            raise ValueError(kind)
        shape = (n_batch, n_instances, n_pairs)
        one, other = torch.rand((2, *shape), generator=generator)
        if wrong.get("one_for_all_pairs"):
            one, other = one[..., :1].expand(shape), other[..., :1].expand(shape)
        if wrong.get("one_for_all_instances"):
            one, other = one[:, :1].expand(shape), other[:, :1].expand(shape)
        p, right = probability, {"correlated": both_or_none, "anticorrelated": one_at_most}
        rule = {"correlated": correlated, "anticorrelated": anticorrelated}[kind] or right[kind]
        if wrong.get("exchanged"):
            rule = right["anticorrelated" if kind == "correlated" else "correlated"]
        values = torch.rand((*shape, 2), generator=generator)
        if "one_value" in wrong:  # along this axis
            values = values.narrow(wrong["one_value"], 0, 1).expand_as(values)
        return flat(values * rule(one, other, p))

    return sample_pairs


def both_or_none(one: Tensor, other: Tensor, p: float) -> Tensor:
    return torch.stack([one < p, one < p], dim=-1)


def one_at_most(one: Tensor, other: Tensor, p: float) -> Tensor:
    return torch.stack([(one < 2 * p) & (other < 0.5), (one < 2 * p) & (other >= 0.5)], dim=-1)


def by_themselves(one: Tensor, other: Tensor, p: float) -> Tensor:
    return torch.stack([one < p, other < p], dim=-1)


def unless_both(one: Tensor, other: Tensor, p: float) -> Tensor:
    return by_themselves(one, other, p) & ~((one < p) & (other < p))[..., None]


@known_mistakes(
    {
        "correlated partners are only equally likely; they have to be active together.": pairing(by_themselves),
        "anticorrelated partners are independent, so that both can be active.": pairing(anticorrelated=by_themselves),
        "anticorrelated partners are drawn independently, and dropped where both are active: then they are too rare.": (
            pairing(anticorrelated=unless_both)
        ),
        "one of the anticorrelated partners is active with `probability`; each of them should be.": pairing(
            anticorrelated=lambda one, other, p: one_at_most(one, other, p / 2)
        ),
        "of the anticorrelated partners only the first is ever active.": pairing(
            anticorrelated=lambda one, other, p: torch.stack([one < p, one < 0], dim=-1)
        ),
        "one of the anticorrelated partners is always active.": pairing(
            anticorrelated=lambda one, other, p: torch.stack([one < p, one >= p], dim=-1)
        ),
        "the two kinds are exchanged.": pairing(exchanged=True),
        "partners have the same value; values are drawn independently.": pairing(one_value=3),
        "all pairs have the same two values; values are drawn independently.": pairing(one_value=2),
        "all instances have the same values; values are drawn independently.": pairing(one_value=1),
        "partner f stands at f + n_pairs; partners are neighbours.": pairing(flat=lambda pairs: pairs.mT.flatten(-2)),
        "one draw decides for all pairs.": pairing(one_for_all_pairs=True),
        "one draw decides for all instances.": pairing(one_for_all_instances=True),
    }
)
def check_sample_pairs(fn: Fn) -> None:
    """What many samples say about each feature, about partners, and about all others; then what is refused."""
    name, n_pairs = "sample_pairs", 3
    for kind, p in (("correlated", 0.7), ("anticorrelated", 0.3)):
        call = f'{name}(5, 2, 3, {p}, "{kind}", generator)'
        axes, of_kind = "batch instance feature", f"{name}, {kind}"
        draws(of_kind, call, partial(_of_kind, fn, 5, 2, n_pairs, p, kind), (5, 2, 6), axes)
        x = fn(3000, 2, n_pairs, p, kind, torch.Generator().manual_seed(5))
        share = (x > 0).float().mean(0)
        advice = "count in many samples how often one feature is active."
        near(of_kind, "how often a feature is active", share, torch.full((2, 6), p), 0.05, "instance feature", advice)
        both = together(x)
        expected = torch.full((12, 12), p * p)
        for first in range(0, 12, 2):  # the partners of each pair
            expected[first, first + 1] = expected[first + 1, first] = p if kind == "correlated" else 0.0
        advice = "look at a few rows: which features of a pair are active, and which of other pairs and instances?"
        off = 1 - torch.eye(12)
        near(of_kind, "how often two features are active", both * off, expected * off, 0.05, "feature feature", advice)
        mean, square = active_values(x)
        advice = "draw the values of active features with torch.rand, apart from which are active."
        whole = torch.ones(2, 6)
        near(of_kind, "the mean of active values", mean, whole / 2, 0.06, "instance feature", advice)
        near(of_kind, "the mean square of active values", square, whole / 3, 0.06, "instance feature", advice)
        products = x.flatten(1).T @ x.flatten(1) / len(x)
        advice = "every active feature has a value of its own."
        what = "the mean product of two features"
        near(of_kind, what, products * off, expected / 4 * off, 0.02, "feature feature", advice)
    half = fn(2000, 1, 1, 0.5, "anticorrelated", torch.Generator().manual_seed(6))
    one, advice = (half > 0).float().sum(-1), "with a probability of 1/2 one of the partners is always active."
    near(f"{name} at 0.5", "active partners", one.mean(0), torch.ones(1), 0.01, "instance", advice)
    generator = torch.Generator()
    for kind, chance in (("opposite", 0.2), ("anticorrelated", 0.6)):
        call = f'{name}(4, 2, 3, {chance}, "{kind}", generator)'
        must_raise(name, ValueError, call, partial(fn, 4, 2, 3, chance, kind, generator))


def _of_kind(fn: Fn, n: int, i: int, k: int, p: float, kind: str, generator: torch.Generator) -> Any:
    return fn(n, i, k, p, kind, generator)
