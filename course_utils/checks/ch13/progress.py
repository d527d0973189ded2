"""Checks of chapter 13, progress: what logits say about a + b, losses with and without it, and embeddings filtered."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch13.small import Fn, basis, frequency_of, small_model, sums, wave
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import Stop

# ----------------------------------------------------------------------------------------------------- what a + b says

Inside = Callable[[int, int], int]


def averaged(
    frequencies: Callable[[list[int], int], list[int]] = lambda wanted, n: wanted,
    mean: bool = True,
    kinds: tuple[str, ...] = ("cos", "sin"),
    inside: Inside = lambda a, b: a + b,
    rest: bool = False,
) -> Fn:
    """sum_part by averages: first over all pairs with the same sum, then by waves in that sum. No grid of waves."""

    def sum_part(grid: Tensor, wanted: Sequence[int]) -> Tensor:
        n, wide = len(grid), grid.double()
        places = torch.tensor([[inside(a, b) % n for b in range(n)] for a in range(n)])
        by_sum = torch.stack([wide[places == s].mean(dim=0) for s in range(n)])
        kept = by_sum.mean(dim=0).expand_as(by_sum) * mean
        for k in frequencies(list(wanted), n):
            for kind in kinds:
                row = torch.tensor(wave(kind, k, n), dtype=torch.float64)
                if float(row @ row) > 1e-9:
                    kept = kept + torch.tensordot(row, torch.tensordot(row, by_sum, 1) / (row @ row), 0)
        found = kept[places]
        return ((wide - found) if rest else found).to(grid.dtype)

    return sum_part


def others(wanted: list[int], n: int) -> list[int]:
    return [k for k in range(1, n // 2 + 1) if k not in wanted]


def all_of_these(grid: Tensor, wanted: Sequence[int]) -> Tensor:
    """Every product of waves whose frequencies are among those, or constant."""
    n = len(grid)
    rows = basis(n)[[number for number in range(n) if frequency_of(number) in (0, *wanted)]]
    flat = torch.einsum("ia,ic,a...->c...", rows, rows, grid.double())
    return torch.einsum("ib,id,cb...->cd...", rows, rows, flat).to(grid.dtype)


WAVES: dict[str, Fn] = {  # other parts of the logits than the one that is meant
    "the mean over all pairs is left out.": averaged(mean=False),
    "the sines are left out; a wave of any phase is cosine and sine.": averaged(kinds=("cos",)),
    "the waves are in a - b.": averaged(inside=lambda a, b: a - b),
    "only the first frequency is kept.": averaged(lambda wanted, n: wanted[:1]),
    "all other frequencies are kept, and these are left out.": averaged(others),
    "everything that a + b says is kept, at all frequencies.": averaged(lambda wanted, n: list(range(1, n // 2 + 1))),
}


@known_mistakes(
    {
        **WAVES,
        "every product of these waves is kept; a wave in a + b is one combination of them.": all_of_these,
        "it is what is left without them.": averaged(rest=True),
    }
)
def check_sum_part(fn: Fn) -> None:
    """Against averages over pairs with the same sum; with further axes and without."""
    name = "sum_part"
    for shape, wanted in (((7, 7, 3), [2, 3]), ((6, 6), [3, 1]), ((5, 5, 2, 3), [1]), ((8, 8, 2), [2, 4, 3])):
        grid = noise(*shape, seed=sum(shape)) + 0.5 + torch.arange(float(shape[-1]))
        axes = " ".join(["a", "b", "neuron", "more"][: len(shape)])
        with unchanged(name, grid=grid):
            actual = fn(grid, wanted)
        compare(f"{name} at {wanted} of {tuple(shape)}", actual, averaged()(grid, wanted), axes)
    compare(f"{name} at no frequency", fn(noise(3, 3), []), averaged()(noise(3, 3), []), "a b")
    follows_input(name, fn, (noise(5, 5, 2), [2]), "a b neuron")


# ---------------------------------------------------------------------------------------------------------- two losses


def cross_entropy(logits: Tensor, answers: Tensor, reduction: str = "mean") -> Tensor:
    """By PyTorch, in double precision."""
    flat = logits.double().flatten(0, -2)
    return torch.nn.functional.cross_entropy(flat, answers.flatten(), reduction=reduction).to(logits.dtype)


def addition(n: int, sign: int = 1) -> Tensor:
    """Or subtraction: the answers need not be those of a + b."""
    return torch.tensor([[(a + sign * b) % n for b in range(n)] for a in range(n)])


def split(n: int) -> Tensor:
    """Some of the pairs."""
    return noise(n, n, seed=40 + n) > 0.3


def case(n: int, sign: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that say something about a + b, and something about each pair; answers; training pairs."""
    x, answers, is_train = torch.arange(n), addition(n, sign), split(n)
    distance = (x[:, None, None] + x[:, None] - x) % n
    logits = 2 * torch.tensor(wave("cos", 2, n))[distance] + torch.tensor(wave("cos", 1, n))[distance]
    logits = logits + noise(n, n, n, seed=n) + noise(n, seed=n + 3)
    memory = torch.nn.functional.one_hot(answers, n) * is_train[..., None]
    return logits + 1.5 * memory, answers, is_train


def restricted(part: Fn, reduction: str = "mean") -> Fn:
    return lambda logits, frequencies, answers: cross_entropy(part(logits, frequencies), answers, reduction)


def excluded(
    part: Fn, where: Callable[[Tensor], Tensor] = lambda is_train: is_train, reduction: str = "mean", mean: bool = True
) -> Fn:
    def excluded_loss(logits: Tensor, frequencies: Sequence[int], answers: Tensor, is_train: Tensor) -> Tensor:
        without = logits - part(logits, frequencies) + mean * logits.mean(dim=(0, 1))
        chosen = where(is_train)
        return cross_entropy(without[chosen], answers[chosen], reduction)

    return excluded_loss


def excluded_everywhere(logits: Tensor, frequencies: Sequence[int], answers: Tensor) -> Tensor:
    return excluded(averaged())(logits, frequencies, answers, torch.ones_like(answers, dtype=torch.bool))


@known_mistakes(
    {
        **{words: restricted(part) for words, part in WAVES.items()},
        "restricted and excluded are swapped: these frequencies were taken out, and all else was kept.": (
            excluded_everywhere
        ),
        "it is the loss of the logits as they are.": restricted(lambda logits, frequencies: logits),
        "it is the sum over the pairs; take the mean.": restricted(averaged(), "sum"),
        "every product of these waves is kept; take the waves in a + b.": restricted(all_of_these),
        "the answers are worked out as a + b; take the ones in `answers`.": (
            lambda logits, frequencies, answers: restricted(averaged())(logits, frequencies, addition(len(logits)))
        ),
    }
)
def check_restricted_loss(fn: Fn) -> None:
    """Against PyTorch's cross-entropy of averages."""
    name = "restricted_loss"
    for n, wanted, sign in ((7, [2, 3], 1), (6, [3, 1], -1), (5, [2], 1)):
        logits, answers, _ = case(n, sign)
        with unchanged(name, logits=logits, answers=answers):
            actual = fn(logits, wanted, answers)
        compare(f"{name} at {wanted}, n={n}", actual, restricted(averaged())(logits, wanted, answers), "")
    follows_input(name, fn, (case(5)[0], [1], addition(5)), "")


def everywhere(is_train: Tensor) -> Tensor:
    return torch.ones_like(is_train)


@known_mistakes(
    {
        "restricted and excluded are swapped: only these frequencies were kept.": (
            lambda logits, frequencies, answers, is_train: cross_entropy(
                averaged()(logits, frequencies)[is_train], answers[is_train]
            )
        ),
        "it is the loss over all pairs; take the training pairs, which memory can answer.": excluded(
            averaged(), everywhere
        ),
        "it is the loss over the held-out pairs; take the training pairs.": excluded(averaged(), torch.logical_not),
        "the mean over all pairs is taken out as well; it stays.": excluded(averaged(), mean=False),
        "nothing was taken out.": excluded(lambda logits, frequencies: logits.mean(dim=(0, 1)).expand_as(logits)),
        "the sines stay; a wave of any phase is cosine and sine.": excluded(averaged(kinds=("cos",))),
        "the waves are in a - b.": excluded(averaged(inside=lambda a, b: a - b)),
        "only the first frequency is taken out.": excluded(averaged(lambda wanted, n: wanted[:1])),
        "it is the sum over the pairs; take the mean.": excluded(averaged(), reduction="sum"),
        "every product of these waves is taken out; only the waves in a + b are meant.": excluded(all_of_these),
    }
)
def check_excluded_loss(fn: Fn) -> None:
    """Against PyTorch's cross-entropy of averages."""
    name = "excluded_loss"
    for n, wanted, sign in ((7, [2, 3], 1), (6, [3, 1], -1), (5, [2, 1], 1)):
        logits, answers, is_train = case(n, sign)
        with unchanged(name, logits=logits, answers=answers, is_train=is_train):
            actual = fn(logits, wanted, answers, is_train)
        right = excluded(averaged())(logits, wanted, answers, is_train)
        compare(f"{name} at {wanted}, n={n}", actual, right, "")
    follows_input(name, fn, (case(5)[0], [1], addition(5), split(5)), "")


def differences(
    per: Callable[[int], float] = lambda n: float(n * n),
    over: Callable[[list[float]], float] = lambda values: 2 * sum(values) / len(values),
    turn: Callable[[float], float] = lambda share: share,
) -> Fn:
    """gini by all pairs."""

    def gini(values: Tensor) -> Tensor:
        numbers = values.tolist()
        total = sum(abs(one - other) for one in numbers for other in numbers)
        return torch.tensor(turn(total / per(len(numbers)) / over(numbers)), dtype=values.dtype)

    return gini


def unsorted(values: Tensor) -> Tensor:
    n = len(values)
    return (((2 * torch.arange(1, n + 1) - n - 1) * values).sum() / (n * values.sum())).to(values.dtype)


@known_mistakes(
    {
        "the numbers were not sorted.": unsorted,
        "they were sorted from the largest down: the sign is wrong.": differences(turn=lambda share: -share),
        "1 means that all are equal; it is the other way round.": differences(turn=lambda share: 1 - share),
        "pairs of a number with itself are left out: it is divided by n(n - 1), not n².": differences(
            lambda n: n * (n - 1)
        ),
        "it is divided by the mean; divide by twice the mean.": differences(over=lambda v: sum(v) / len(v)),
        "it is divided by the largest number; divide by twice the mean.": differences(over=lambda v: 2 * max(v)),
        "it is the sum over all pairs; take their mean.": differences(lambda n: 1.0),
    }
)
def check_gini(fn: Fn) -> None:
    """Against all pairs of numbers."""
    name = "gini"
    for values in ([3.0, 1.0, 4.0, 0.0, 5.0], [0.0, 7.0, 0.0], [2.0, 2.0], [0.5, 0.25, 8.0, 1.0, 1.0, 0.1]):
        given = torch.tensor(values)
        with unchanged(name, values=given):
            actual = fn(given)
        compare(f"{name} of {values}", actual, differences()(given), "")
    follows_input(name, fn, (torch.tensor([2.0, 5.0, 1.0]),), "")


# -------------------------------------------------------------------------------------------------- embeddings filtered


def rows_of(wanted: Sequence[int], n: int) -> list[int]:
    """The constant's row of the basis, and those of these frequencies."""
    return [number for number in range(n) if frequency_of(number) in (0, *wanted)]


def filtered(
    rows: Callable[[Sequence[int], int], list[int]] = rows_of,
    whole: bool = False,
    columns: slice = slice(None, -1),
    place: int = -1,
    reduction: str = "mean",
) -> Fn:
    """loss_with_frequencies with the embedding's own module answering differently, in place of a hook."""

    @torch.no_grad()
    def loss_with_frequencies(model: Any, tokens: Tensor, answers: Tensor, frequencies: Sequence[int]) -> Tensor:
        W_E = model.embed.W_E.double()
        numbers = W_E if whole else W_E[:-1]
        waves = basis(len(numbers))[rows(frequencies, len(numbers))]
        table = torch.cat([waves.T @ (waves @ numbers), W_E[len(numbers) :]]).to(model.embed.W_E.dtype)
        handle = model.embed.register_forward_hook(lambda module, inputs, output: table[inputs[0]])
        try:
            logits = model(tokens)
        finally:
            handle.remove()
        return cross_entropy(logits[:, place, columns], answers, reduction)

    return loss_with_frequencies


def without_hooks_end(model: Any, tokens: Tensor, answers: Tensor, frequencies: Sequence[int]) -> Tensor:
    """The loss of the model as it is."""
    with torch.no_grad():
        return cross_entropy(model(tokens)[:, -1, :-1], answers)


@known_mistakes(
    {
        "these frequencies are taken out; they are the ones to keep.": filtered(
            lambda wanted, n: [number for number in range(n) if frequency_of(number) not in wanted]
        ),
        "the constant is taken out as well; it stays.": filtered(
            lambda wanted, n: [number for number in range(n) if frequency_of(number) in wanted]
        ),
        "the sines are taken out; a frequency has two waves.": filtered(
            lambda wanted, n: [0, *(2 * k - 1 for k in wanted)]
        ),
        "places in the basis are kept instead of frequencies.": filtered(lambda wanted, n: [0, *wanted]),
        "`=` is filtered as if it were a number.": filtered(whole=True),
        "the logit of `=` takes part in the loss; it is no answer.": filtered(columns=slice(None)),
        "the answer is read at the second number; read it at `=`.": filtered(place=1),
        "it is the sum over the pairs; take the mean.": filtered(reduction="sum"),
        "the model runs as it is.": without_hooks_end,
    }
)
def check_loss_with_frequencies(fn: Fn) -> None:
    """Against the embedding's module answering differently; nothing is left behind."""
    name = "loss_with_frequencies"
    for p, wanted in ((7, [1, 3]), (6, [3]), (5, [])):
        model, tokens = small_model(p), sums(p)[1::2]
        answers = (tokens[:, 0] + tokens[:, 1]) % p
        right = filtered()(model, tokens, answers, wanted)
        with unchanged(name, tokens=tokens, answers=answers):
            actual = fn(model, tokens, answers, wanted)
        compare(f"{name} {wanted}, p={p}", actual, right, "")
    with nothing_left_behind(name, model):
        fn(model, tokens, answers, [1])

    def stop(module: Any, inputs: Any, output: Any) -> None:
        raise Stop

    handle = model.unembed.register_forward_hook(stop)
    with nothing_left_behind(name, model):
        assert_stops(name, partial(fn, model, tokens, answers, [1]), "a hook")
    handle.remove()
    follows_input(name, fn, (small_model(5), tokens, answers, [1]), "")
