"""Checks of chapter 05, is that the circuit: three criteria, and a search, by the scores of circuits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case, compare, worked_out
from course_utils.checks.ch05.circuit import (
    CIRCUITS,
    SIZES,
    Circuit,
    Fn,
    Head,
    Task,
    clean_run,
    each_score,
    every_head,
    of_all_kinds,
    scores_of,
    without,
)
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, must_raise

# -------------------------------------------------------------------------------------------------- the three criteria


def ratio(value: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Fn:
    """A faithfulness made of F(C), F(M), F(empty) and F(all but C)."""

    def faithfulness(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
        heads, n = every_head(model), len(circuits)
        rest = [without(heads, *circuit) for circuit in circuits]
        scores = scores_of(model, dataset, [*circuits, *rest, heads, []], means)
        return value(scores[:n], scores[-2], scores[-1], scores[n : 2 * n])

    return faithfulness


def mean_of_ratios(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
    whole = each_score(model, dataset, every_head(model), means)
    return torch.stack([(each_score(model, dataset, circuit, means) / whole).mean() for circuit in circuits])


@known_mistakes(
    {
        "it is F(C), not divided by F(M).": ratio(lambda c, m, e, r: c),
        "the ratio is upside down: it is F(C) / F(M).": ratio(lambda c, m, e, r: m / c),
        "it is the difference F(M) - F(C); return the ratio.": ratio(lambda c, m, e, r: m - c),
        "it is the distance from 1, |1 - F(C) / F(M)|; return the ratio itself.": ratio(
            lambda c, m, e, r: (1 - c / m).abs()
        ),
        "F(empty) is subtracted from both: a good measure, too, but another one.": ratio(
            lambda c, m, e, r: (c - e) / (m - e)
        ),
        "it is the mean of every prompt's ratio; take the ratio of the means.": mean_of_ratios,
        "it is what the model loses with the circuit: the circuit is ablated, not the rest.": ratio(
            lambda c, m, e, r: r / m
        ),
        "it is F(C) / F(empty): divide by the whole model's.": ratio(lambda c, m, e, r: c / e),
    }
)
def check_faithfulness(fn: Fn) -> None:
    """A ratio of means, for several circuits at once, and for one; where the wrong name wins, too."""
    name = "faithfulness"
    for sizes, wrong_name_wins in [*product(SIZES, [False]), (SIZES[0], True)]:
        for n in (5, 1):
            task = Task(sizes, wrong_name_wins)
            circuits = [*CIRCUITS, task.heads][:n]
            words = f"of {n} circuits {task.case.words}{', whose wrong name wins' * wrong_name_wins}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, of_all_kinds(circuits), task.means)
            right = task.scores(circuits) / task.scores([task.heads])
            compare(f"{name} {words}", actual, right, "circuit")


KS: list[list[Head]] = [[(0, 0)], [], [(1, 1), (1, 0)], [(1, 0), (0, 0), (1, 1)]]  # the last is all of the circuit


def two_sides(
    sides: Callable[..., tuple[Any, Any]] = lambda c, m, k: (c - k, m - k),
    then: Callable[[Tensor, Tensor], Tensor] = lambda scores, whole: scores,
) -> Fn:
    """A completeness whose two circuits come from `sides(circuit, every head, K)`, three sets."""

    def completeness(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
        heads = set(every_head(model))
        pairs = [sides(set(circuit), heads, set(k)) for k in removed]
        runs = [first for first, _ in pairs] + [second for _, second in pairs]
        *scores, whole = scores_of(model, dataset, [*runs, heads], means)
        return then(torch.stack(scores).reshape(2, -1), whole)

    return completeness


@known_mistakes(
    {
        "the sides are swapped: the circuit comes first.": two_sides(lambda c, m, k: (m - k, c - k)),
        "K is taken out of the circuit only, and not out of the model.": two_sides(lambda c, m, k: (c - k, m)),
        "K is taken out of the model only, and not out of the circuit.": two_sides(lambda c, m, k: (c, m - k)),
        "K is what is kept, not what is taken out.": two_sides(lambda c, m, k: (k, k)),
        "what is left of the circuit is taken out of the model, instead of K.": two_sides(
            lambda c, m, k: (c - k, m - (c - k))
        ),
        "on the model's side the circuit is gone too: only K is taken out of it.": two_sides(
            lambda c, m, k: (c - k, m - c)
        ),
        "the K come in reverse order.": two_sides(then=lambda scores, whole: scores.flip(1)),
        "it is the incompleteness, the difference of the two sides; give both.": two_sides(
            then=lambda scores, whole: (scores[0] - scores[1]).abs()
        ),
        "they are divided by F(M); return the scores themselves.": two_sides(then=lambda scores, whole: scores / whole),
        "a transpose became a reshape.": two_sides(then=lambda scores, whole: scores.T.reshape(scores.shape)),
    }
)
def check_completeness(fn: Fn) -> None:
    """Both sides for K of several sizes, the empty one among them; and a K that is not of the circuit."""
    name = "completeness"
    circuit = CIRCUITS[3]
    for sizes, kind in zip(SIZES, (tuple, set), strict=True):
        task = Task(sizes)
        words = f"of {circuit} with K in {KS} {task.case.words}"
        with clean_run(name, task, words):
            actual = fn(task.model, task.dataset, kind(circuit), of_all_kinds(KS), task.means)
        right = torch.stack([task.scores([without(side, *k) for k in KS]) for side in (circuit, task.heads)])
        compare(f"{name} {words}", actual, right, "side removed")
    task = Task(SIZES[0])
    must_raise(
        name,
        ValueError,
        "with a K that is not of the circuit, [(0, 0), (0, 2)],",
        partial(fn, task.model, task.dataset, circuit, [[(0, 0), (0, 2)]], task.means),
    )


# the heads come in an order of their own, not in the circuit's
REMOVED: dict[Head, list[Head]] = {(1, 0): [(1, 1)], (0, 0): [], (1, 1): [(1, 0), (0, 0)]}


def minimal(
    sets: Callable[..., tuple[Any, Any]] = lambda c, m, k, v: (c - k - v, c - k),
    value: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda a, b, m, c: (a - b).abs() / m,
    order: Callable[[Any, Any], Any] = lambda removed, circuit: removed,
) -> Fn:
    """A minimality that compares the two circuits of `sets(circuit, every head, K, {v})`, four sets.

    `value` gets both scores, then the model's and the circuit's.
    """

    def minimality(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
        heads, values = set(every_head(model)), []
        for v in order(removed, circuit):
            runs = sets(set(circuit), heads, set(removed[v]), {v})
            values.append(value(*scores_of(model, dataset, [*runs, heads, circuit], means)))
        return torch.stack(values)

    return minimality


@known_mistakes(
    {
        "K stays in: it is |F(C without v) - F(C)|.": minimal(lambda c, m, k, v: (c - v, c)),
        "it is what K adds: |F(C without K) - F(C)|; v is not taken out.": minimal(lambda c, m, k, v: (c - k, c)),
        "it is what v and K add together: F(C) stands where F(C without K) should.": minimal(
            lambda c, m, k, v: (c - k - v, c)
        ),
        "v alone is compared with K alone; take out both, and then K only.": minimal(lambda c, m, k, v: (c - v, c - k)),
        "it is measured in the whole model; take the heads out of the circuit.": minimal(
            lambda c, m, k, v: (m - k - v, m - k)
        ),
        "it has a sign; take the absolute value.": minimal(value=lambda a, b, m, c: (a - b) / m),
        "the difference is taken the other way round, and has a sign; take the absolute value.": minimal(
            value=lambda a, b, m, c: (b - a) / m
        ),
        "it is not a share of F(M).": minimal(value=lambda a, b, m, c: (a - b).abs()),
        "it is a share of F(C); take F(M).": minimal(value=lambda a, b, m, c: ((a - b) / c).abs()),
        "it is a share of F(C without K); take F(M).": minimal(value=lambda a, b, m, c: ((a - b) / b).abs()),
        "the ratio is upside down.": minimal(value=lambda a, b, m, c: m / (a - b).abs()),
        "the heads come in the circuit's order, not in the order of `removed`.": minimal(
            order=lambda removed, circuit: circuit
        ),
    }
)
def check_minimality(fn: Fn) -> None:
    """A score for each head, with K of several sizes; then what must be refused."""
    name = "minimality"
    circuit = CIRCUITS[3]
    for sizes, kind in zip(SIZES, (tuple, set), strict=True):
        task = Task(sizes)
        words = f"of {circuit} with removed={REMOVED} {task.case.words}"
        with clean_run(name, task, words):
            removed = dict(zip(REMOVED, of_all_kinds(list(REMOVED.values())), strict=True))
            actual = fn(task.model, task.dataset, kind(circuit), removed, task.means)
        less = task.scores([without(circuit, *k) for k in REMOVED.values()])
        least = task.scores([without(circuit, *k, v) for v, k in REMOVED.items()])
        right = (least - less).abs() / task.scores([task.heads])
        compare(f"{name} {words}", actual, right, "head")
    task = Task(SIZES[0])
    for wrong, why in [
        ({(0, 0): [(0, 2)]}, "a K that is not of the circuit"),
        ({(0, 2): [(0, 0)]}, "a v that is not of the circuit"),
        ({(0, 0): [(1, 0), (0, 0)]}, "a v in its own K"),
    ]:
        run = partial(fn, task.model, task.dataset, circuit, wrong, task.means)
        must_raise(name, ValueError, f"with {why}, removed={wrong},", run)


# ------------------------------------------------------------------------------------------------------------- greedy


def search(
    model: Any,
    dataset: Any,
    means: Any,
    share: float = 0.25,
    max_rows: int = 64,
    *,
    badness: Callable[[float, float, float], float] = lambda score, whole, now: abs(score - whole),
    count: Callable[[float], int] = int,
    once: bool = False,
    adding: bool = True,
    carried: bool = False,
) -> list[list[Head]]:
    """The search, spelled out: `badness` of (an expected score, the model's, the one before) says who goes next.

    The other switches: `count` rounds; with `once` changes are measured once, without `adding` they do not add up;
    `carried`, a round begins with what the one before expected.
    """
    known: dict[frozenset[Head], float] = {}

    def score(circuit: Circuit) -> float:
        if frozenset(circuit) not in known:
            known[frozenset(circuit)] = scores_of(model, dataset, [circuit], means).item()
        return known[frozenset(circuit)]

    circuit = every_head(model)
    rounds, whole, changes = [circuit], score(circuit), dict[Head, float]()
    now = whole
    while circuit:
        now = now if carried else score(circuit)
        if not once or not changes:
            changes = {head: score(without(circuit, head)) - score(circuit) for head in circuit}
        left = list(circuit)
        for _ in range(max(1, count(share * len(circuit)))):
            values = {head: badness(now + changes[head], whole, now) for head in left}
            gone = min(left, key=values.__getitem__)
            left.remove(gone)
            now += changes[gone] if adding else 0.0
        circuit = left
        rounds.append(circuit)
    return rounds


def searching(then: Callable[[list[list[Head]]], Any] = lambda rounds: rounds, **wrong: Any) -> Fn:
    """A greedy_circuit with a switch of `search` turned, or whose rounds were changed."""
    return lambda *given: then(search(*given, **wrong))


@known_mistakes(
    {
        "the heads that are missed most go first.": searching(badness=lambda f, m, now: -abs(f - m)),
        "heads go by the highest score that is left, even above the model's.": searching(badness=lambda f, m, now: -f),
        "heads go by the lowest score that is left.": searching(badness=lambda f, m, now: f),
        "scores are compared with the one before, not with the whole model's.": searching(
            badness=lambda f, m, now: abs(f - now)
        ),
        "the changes are measured once, in the whole model; measure them anew in every round.": searching(once=True),
        "within a round the changes do not add up: each head is looked at as if it went alone.": searching(
            adding=False
        ),
        "the share is rounded up; it is rounded down, but at least one head goes.": searching(
            count=lambda n: -int(-n // 1)
        ),
        "heads go one at a time, whatever `share` says.": searching(count=lambda n: 1),
        "the first circuit, with every head, is missing.": searching(lambda rounds: rounds[1:]),
        "the last circuit, the empty one, is missing.": searching(lambda rounds: rounds[:-1]),
        "the circuits come in reverse order: every head first.": searching(lambda rounds: rounds[::-1]),
        "each round holds the heads that went, not those that stay.": searching(
            lambda rounds: [without(rounds[0], *kept) for kept in rounds]
        ),
    }
)
def check_greedy_circuit(fn: Fn) -> None:
    """Every round of the search, heads one at a time and several at once, and by default; then memory."""
    name = "greedy_circuit"
    for sizes, share, max_rows in [(SIZES[1], 0.35, 64), (SIZES[0], 0.0, 64), (SIZES[0], 0.5, 9), (EIGHT, 0.25, 64)]:
        task = Task(sizes)
        call = f"greedy_circuit(..., share={share}, max_rows={max_rows}) {task.case.words}"
        with clean_run(name, task, f"with share={share}"), at_most(name, task.model, 150):
            given = () if sizes == EIGHT else (share, max_rows)
            actual = fn(task.model, task.dataset, task.means, *given)
        most_rows = task.model.most_rows
        right = worked_out(call, task.case, partial(searched, share=share))
        agree(name, call, as_lists(name, actual), right)
        if most_rows > max(max_rows, task.case.n_batch):
            raise CheckFailed(
                f"{name} with max_rows={max_rows}: one forward had {most_rows} rows.\n  Next: hand `max_rows` on."
            )


EIGHT = (2, 4, 2, 3)  # heads enough for the default share to take out two


def searched(case: Case, share: float) -> list[list[Head]]:
    task = Task(case.sizes)
    return search(task.model, task.dataset, task.means, share)


@contextmanager
def at_most(name: str, model: Any, runs: int) -> Iterator[None]:
    """A search that never ends is stopped."""
    start = model.runs

    def count(module: Any, inputs: Any) -> None:
        if model.runs - start > runs:
            raise CheckFailed(
                f"{name}: it goes on and on: more than {runs} runs for {len(every_head(model))} heads.\n"
                "  Next: every round has to take out one head at least, and the search ends when none is left."
            )

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def as_lists(name: str, rounds: Any) -> Any:
    """Each round's circuit as a sorted list; a set or a tuple is right, too."""
    try:
        return [sorted((int(layer), int(head)) for layer, head in circuit) for circuit in rounds]
    except (TypeError, ValueError):
        raise CheckFailed(
            f"{name}: expected a list of circuits, each with pairs (layer, head), got {repr(rounds)[:60]}.\n"
            "  Next: one circuit for each round, the first with every head."
        ) from None
