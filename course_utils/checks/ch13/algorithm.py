"""Checks of chapter 13, the algorithm: neurons by frequency, their way to the logits, and waves in a + b."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch13.small import (
    Fn,
    coefficients,
    frequency_of,
    small_model,
    two_parts,
    unit,
    wave,
)
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.plain import must_raise

# ----------------------------------------------------------------------------------------------------------- neurons

Belongs = Callable[[int, int, int], bool]  # (frequency in a, frequency in b, frequency asked about)


def of_one(a: int, b: int, k: int) -> bool:
    """Each has frequency k or is the constant, and not both are."""
    return {a, b} <= {0, k} and (a, b) != (0, 0)


def by_terms(
    belongs: Belongs = of_one,
    constant: bool = False,
    number: Callable[[int], int] = lambda k: k,
    share: Callable[[float], float] = lambda part: part,
    dead: tuple[int, float] = (0, 0.0),
    last: Callable[[int], int] = lambda n: n // 2,
) -> Fn:
    """neuron_frequencies term by term, with switches for what people get wrong."""

    def neuron_frequencies(activations: Tensor) -> tuple[Tensor, Tensor]:
        n = len(activations)
        squares = coefficients(coefficients(activations, 0), 1).square()
        terms = [(i, j) for i in range(n) for j in range(n)]
        best: list[int] = []
        shares: list[float] = []
        for neuron in range(activations.shape[2]):
            size = {(i, j): float(squares[i, j, neuron]) for i, j in terms}
            total = sum(value for place, value in size.items() if constant or place != (0, 0))
            if not activations[:, :, neuron].any():
                best, shares = [*best, dead[0]], [*shares, dead[1]]
                continue
            parts = {
                k: sum(size[i, j] for i, j in terms if belongs(frequency_of(i), frequency_of(j), k))
                for k in range(1, last(n) + 1)
            }
            chosen = max(parts, key=lambda k: parts[k])
            best, shares = [*best, number(chosen)], [*shares, share(parts[chosen] / total)]
        return torch.tensor(best), torch.tensor(shares, dtype=activations.dtype)

    return neuron_frequencies


def firing(n: int, n_neurons: int, seed: int) -> Tensor:
    """Neurons with a favourite frequency each, noise, one that is always 0, and one that says little."""
    numbers, found = range(n), []
    for neuron in range(n_neurons):
        k = neuron % (n // 2) + 1
        row = torch.tensor(wave("cos", k, n), dtype=torch.float64)
        other = torch.tensor(wave("sin" if 2 * k < n else "cos", k, n), dtype=torch.float64)
        found.append(row[:, None] + 0.5 * other[None, :] + 0.7 * torch.outer(row, other) + 0.4)
    grid = torch.stack(found, dim=-1) + 0.25 * noise(n, n, n_neurons, seed=seed).double()
    grid[:, :, 0] = 0
    grid[:, :, -1] *= 0.05
    return grid[list(numbers)].float()


@known_mistakes(
    {
        "the products of two waves are left out.": by_terms(lambda a, b, k: (a, b) in ((0, k), (k, 0))),
        "the waves in a alone and in b alone are left out.": by_terms(lambda a, b, k: (a, b) == (k, k)),
        "only the waves in a are counted.": by_terms(lambda a, b, k: b == 0 and a == k),
        "every product in which the frequency occurs is counted; the other wave must have it too, or be constant.": (
            by_terms(lambda a, b, k: k in (a, b))
        ),
        "the constant counts as variance.": by_terms(constant=True),
        "the frequencies are off by one: they begin at 1.": by_terms(number=lambda k: k - 1),
        "the share is a root; take the squares themselves.": by_terms(share=math.sqrt),
        "it is the share that is left.": by_terms(share=lambda part: 1 - part),
        "the last frequency of an even n, n/2, is left out.": by_terms(last=lambda n: (n - 1) // 2),
        "a neuron that never fires has share 0 / 0.": by_terms(dead=(0, math.nan)),
        "a neuron that never fires has a frequency; say 0.": by_terms(dead=(1, 0.0)),
    }
)
def check_neuron_frequencies(fn: Fn) -> None:
    """Term by term; neurons that prefer a frequency more or less, and one that never fires."""
    name = "neuron_frequencies"
    for n, n_neurons in ((7, 5), (6, 4), (3, 2)):
        grid = firing(n, n_neurons, seed=n)
        with unchanged(name, activations=grid):
            answer = fn(grid)
        best, shares = two_parts(name, answer, "frequencies and shares")
        right = by_terms()(grid)
        words = f"{name} of {n_neurons} neurons over {n} x {n} pairs"
        compare(f"{words}: the shares", shares, right[1], "neuron")
        compare(f"{words}: the frequencies", best, right[0], "neuron")
    follows_input(name, lambda grid: fn(grid)[1], (firing(5, 3, seed=2),), "neuron")


def unembedded(
    change: Callable[[Tensor, Any], Tensor] = lambda found, model: found,
    layer: int = -1,
    columns: slice = slice(None, -1),
    first: str = "W_out",
) -> Fn:
    def effective_unembedding(model: Any) -> Tensor:
        mlp = model.blocks[layer].mlp
        rows = getattr(mlp, first).detach()
        rows = rows.T if first == "W_in" else rows
        W_U = model.unembed.W_U.detach()[:, columns]
        return change(torch.einsum("nd,dv->nv", rows.double(), W_U.double()).to(W_U.dtype), model)

    return effective_unembedding


@known_mistakes(
    {
        "the column of `=` is kept; it is no answer.": unembedded(columns=slice(None)),
        "the first column is left out; `=` is the last.": unembedded(columns=slice(1, None)),
        "`b_U` is added; a bias belongs to no neuron.": unembedded(
            lambda found, model: found + model.unembed.b_U.detach()[:-1]
        ),
        "`b_out` is carried along; a bias belongs to no neuron.": unembedded(
            lambda found, model: found + model.blocks[-1].mlp.b_out.detach() @ model.unembed.W_U.detach()[:, :-1]
        ),
        "the way in is taken, `W_in`; a neuron writes with `W_out`.": unembedded(first="W_in"),
        "it is the first MLP; the last one is meant.": unembedded(layer=0),
        "the mean over the answers is taken off.": unembedded(lambda found, model: found - found.mean(1, keepdim=True)),
        "it is transposed: a row for each neuron.": unembedded(lambda found, model: found.T),
    }
)
def check_effective_unembedding(fn: Fn) -> None:
    """One layer and two."""
    name = "effective_unembedding"
    for p, n_layers in ((7, 1), (4, 2)):
        model = small_model(p, n_layers)
        compare(f"{name}, p={p}, {n_layers} layers", fn(model), unembedded()(model), "neuron number")
    follows_input(name, lambda model: fn(model).detach(), (small_model(4),), "neuron number")


# ------------------------------------------------------------------------------------------------------ waves in a + b


def waves_of(
    inside: Callable[[int, int], int] = lambda a, b: a + b,
    scaled: Callable[[list[float]], list[float]] = lambda row: unit(row) if max(map(abs, row)) > 1e-9 else row,
    kinds: tuple[str, str] = ("cos", "sin"),
    shift: int = 0,
) -> Fn:
    """sum_waves pair by pair."""

    def sum_waves(n: int, frequency: int) -> Tensor:
        k, pairs = frequency + shift, [(a, b) for a in range(n) for b in range(n)]
        found = []
        for kind in kinds:
            row = [getattr(math, kind)(2 * math.pi * (k * inside(a, b) % n) / n) for a, b in pairs]
            row = [0.0] * (n * n) if kind == "sin" and 2 * k == n else row
            found.append(scaled(row))
        return torch.tensor(found).reshape(2, n, n)

    return sum_waves


def product_of_waves(n: int, frequency: int) -> Tensor:
    rows = [torch.tensor(wave(kind, frequency, n)) for kind in ("cos", "sin")]
    return torch.stack([torch.outer(row, row) / torch.outer(row, row).norm().clamp(min=1e-3) for row in rows])


@known_mistakes(
    {
        "they are waves in a - b.": waves_of(lambda a, b: a - b),
        "sine comes before cosine.": waves_of(kinds=("sin", "cos")),
        "they are not divided by their lengths.": waves_of(scaled=lambda row: row),
        "they are divided by n, the side of the grid; the length of most is n / sqrt(2).": waves_of(
            scaled=lambda row: [value / len(row) ** 0.5 for value in row]
        ),
        "they are waves in a alone.": waves_of(lambda a, b: a),
        "the frequency is off by one.": waves_of(shift=1),
        "they are cos(wa)cos(wb) and sin(wa)sin(wb), which is only half of a wave in a + b.": product_of_waves,
        "the sines have the wrong sign.": lambda n, frequency: (
            waves_of()(n, frequency) * torch.tensor([1.0, -1.0])[:, None, None]
        ),
    }
)
def check_sum_waves(fn: Fn) -> None:
    """Pair by pair; for even n, up to the frequency whose sine is 0 everywhere."""
    name = "sum_waves"
    for n, frequency in ((7, 2), (5, 1), (8, 3), (6, 3), (59, 29)):
        compare(f"{name}({n}, {frequency})", fn(n, frequency), waves_of()(n, frequency), "wave a b")


def directions(
    of: Callable[[int], list[int]] = lambda k: [2 * k - 1, 2 * k],
    change: Callable[[Tensor], Tensor] = lambda found: found,
) -> Fn:
    def trig_directions(W_L: Tensor, frequency: int) -> Tensor:
        if not 1 <= frequency < W_L.shape[1] / 2:
            raise ValueError(frequency)
        return change(coefficients(W_L)[:, of(frequency)].T).to(W_L.dtype)

    return trig_directions


@known_mistakes(
    {
        "sine comes before cosine.": directions(lambda k: [2 * k, 2 * k - 1]),
        "they are off by one wave: the first row of the basis is the constant.": directions(
            lambda k: [2 * k - 2, 2 * k - 1]
        ),
        "rows k and k + 1 of the basis are taken; frequency k has rows 2k - 1 and 2k.": directions(
            lambda k: [k, k + 1]
        ),
        "the directions are scaled to length 1.": directions(
            change=lambda found: torch.nn.functional.normalize(found, dim=1)
        ),
        "it is transposed: two rows, one for each direction.": directions(change=lambda found: found.T),
        "the sine has the wrong sign.": directions(change=lambda found: found * torch.tensor([[1.0], [-1.0]])),
    }
)
def check_trig_directions(fn: Fn) -> None:
    """Against torch.fft along the answers; and frequencies that have no two waves."""
    name = "trig_directions"
    for n_neurons, n, frequency in ((3, 8, 3), (4, 9, 2), (5, 7, 1), (6, 7, 3)):
        W_L = noise(n_neurons, n, seed=n) + 0.4
        with unchanged(name, W_L=W_L):
            actual = fn(W_L, frequency)
        compare(f"{name} {frequency} of {n}", actual, directions()(W_L, frequency), "wave neuron")
    for n, frequency in ((7, 0), (8, 4), (7, 4)):
        call = f"{name}(W_L, {frequency}) with {n} answers"
        must_raise(name, ValueError, call, partial(fn, noise(3, n), frequency), "it has no two waves.")
    follows_input(name, fn, (noise(3, 5), 2), "wave neuron")


# ---------------------------------------------------------------------------------------------------------- the logits


def fitted(
    inside: Callable[[int, int, int], int] = lambda a, b, c: a + b - c,
    centre: Callable[[Tensor], Tensor] = lambda logits: logits - logits.mean(2, keepdim=True),
    coefficient: Callable[[float, float], float] = lambda product, size: product / size,
    share: Callable[[float], float] = lambda part: part,
    kind: str = "cos",
) -> Fn:
    """logit_fit term by term in double precision, with switches for what people get wrong."""

    def logit_fit(logits: Tensor, frequencies: Sequence[int]) -> tuple[Tensor, Tensor]:
        n, wide = len(logits), logits.double()
        centred = centre(wide)
        places = torch.tensor([[[inside(a, b, c) % n for c in range(n)] for b in range(n)] for a in range(n)])
        found, shares = [], []
        for k in frequencies:
            row = torch.tensor(wave(kind, k, n), dtype=torch.float64)[places]
            product, size = float((centred * row).sum()), float((row * row).sum())
            found.append(coefficient(product, size))
            shares.append(share(product**2 / size / float(centred.square().sum())))
        return (torch.tensor(found).to(logits.dtype), torch.tensor(shares).to(logits.dtype))

    return logit_fit


def added_up(logits: Tensor, frequencies: Sequence[int]) -> tuple[Tensor, Tensor]:
    found, shares = fitted()(logits, frequencies)
    return found, shares.cumsum(0)


def some_logits(n: int, frequencies: dict[int, float]) -> Tensor:
    """Sums of waves with noise, and with means that the softmax does not see."""
    x = torch.arange(n)
    distance = (x[:, None, None] + x[:, None] - x) % n
    logits = 0.8 * noise(n, n, n, seed=n) + 2 * noise(n, n, 1, seed=n + 1)
    for k, size in frequencies.items():
        logits = logits + size * torch.tensor(wave("cos", k, n))[distance]
    return logits


@known_mistakes(
    {
        "c has the wrong sign: the wave is in a + b - c.": fitted(lambda a, b, c: a + b + c),
        "b has the wrong sign: the wave is in a + b - c.": fitted(lambda a, b, c: a - b - c),
        "the waves are sines.": fitted(kind="sin"),
        "each pair's mean over the answers stays in; the softmax does not see it.": fitted(
            centre=lambda logits: logits
        ),
        "one mean over everything is taken off; each pair has its own.": fitted(
            centre=lambda logits: logits - logits.mean()
        ),
        "the coefficient belongs to a wave of length 1; the cosine as it is is meant.": fitted(
            coefficient=lambda product, size: product / math.sqrt(size)
        ),
        "the coefficients are half as large: a cosine's mean square is 1/2.": fitted(
            coefficient=lambda product, size: product / size / 2
        ),
        "the shares are roots; take the squares themselves.": fitted(share=math.sqrt),
        "the shares are added up on the way; each term has its own.": added_up,
    }
)
def check_logit_fit(fn: Fn) -> None:
    """Term by term; up to the last frequency of an even n."""
    name = "logit_fit"
    for n, sizes, wanted in ((7, {2: 3.0, 1: 1.0}, [2, 3, 1]), (6, {3: 2.0, 1: -1.5}, [1, 3]), (5, {2: 4.0}, [2])):
        logits = some_logits(n, sizes)
        with unchanged(name, logits=logits):
            answer = fn(logits, wanted)
        found, shares = two_parts(name, answer, "coefficients and shares")
        right = fitted()(logits, wanted)
        words = f"{name} at {wanted}, n={n}"
        compare(f"{words}: the coefficients", found, right[0], "frequency")
        compare(f"{words}: the shares", shares, right[1], "frequency")
    follows_input(name, lambda logits, wanted: fn(logits, wanted)[1], (some_logits(5, {1: 2.0}), [1, 2]), "frequency")
