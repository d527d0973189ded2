"""Checks of chapter 07, "Is the probe fooling us?": what is drawn is judged by what the statement promises of it."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch07.small import Fn, Probe, compare_parts, nearest_mean, share_right, two_classes
from course_utils.checks.comparing import compare, compare_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed

# Ten types, whose numbers say nothing, in no order; some have more rows than others.
TYPES = torch.tensor([7, 3, 3, 90, -2, 7, 12, 40, 5, 5, 90, 8, 61, 3, 12, 77, 8, 7, 40, 61, 77, 5])
SEEDS = range(6)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_first(values: Tensor, types: Tensor) -> Tensor:
    """Every row with the value of the first row of its type."""
    first: dict[int, Any] = {}
    for value, kind in zip(values, types.tolist(), strict=True):
        first.setdefault(kind, value)
    return torch.stack([first[kind] for kind in types.tolist()])


def must_be_of_rows(name: str, answer: Any, dtype: torch.dtype) -> None:
    """A tensor with an entry for each row: what it should hold depends on what was drawn."""
    expected = torch.zeros(len(TYPES), dtype=dtype)
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        compare(name, answer, expected, "batch")
    compare_kind(name, answer, expected)


def must_use_up(name: str, draw: Callable[[torch.Generator], object]) -> None:
    """What is drawn with a generator moves it on, so that the next call draws something else."""
    generator = seeded(1)
    before = generator.get_state()
    draw(generator)
    if torch.equal(generator.get_state(), before):
        raise CheckFailed(
            f"{name}: nothing was drawn with `generator` itself; the next call would draw the same.\n"
            "  Next: hand `generator` to what draws, not one of your own with its seed."
        )


def must_differ(name: str, draw: Callable[[int], Tensor], what: str) -> None:
    """Not the same with six generators, and the same again with one of them."""
    answers = [draw(seed) for seed in SEEDS]
    differ = torch.tensor(any(not torch.equal(answer, answers[0]) for answer in answers))
    compare(f"{name}: whether {what} with the generator", differ, torch.tensor(True), "")
    if not torch.equal(draw(0), answers[0]):
        raise CheckFailed(
            f"{name}: two generators with the same seed give two answers.\n  Next: draw with `generator` alone."
        )


# ----------------------------------------------------------------------------------------------------------- hold_out


def holding(
    n_out: Callable[[float, int], int] = lambda share, n: min(max(1, round(share * n)), n - 1),
    draw: Callable[[int, torch.Generator], Tensor] = lambda n, generator: torch.randperm(n, generator=generator),
    end: Callable[[Tensor], Tensor] = lambda out: out,
) -> Fn:
    """hold_out with something else in one of its steps."""

    def hold_out(types: Tensor, share: float, generator: torch.Generator) -> Tensor:
        known = sorted(set(types.tolist()))
        out = {known[index] for index in draw(len(known), generator)[: n_out(share, len(known))].tolist()}
        return end(torch.tensor([kind in out for kind in types.tolist()]))

    return hold_out


def rows_held_out(types: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Rows are drawn, whatever their type."""
    return torch.rand(len(types), generator=generator) < max(share, 0.2)


@known_mistakes(
    {
        "rows are drawn; a type should be held out with all of its rows.": rows_held_out,
        "True and False are swapped: True is held out.": holding(end=lambda out: ~out),
        "the number of types is rounded down.": holding(lambda share, n: min(max(1, int(share * n)), n - 1)),
        "the number of types is rounded up.": holding(lambda share, n: min(max(1, -int(-share * n // 1)), n - 1)),
        "with a small share no type is held out; at least one should be.": holding(
            lambda share, n: min(round(share * n), n - 1)
        ),
        "with a large share all types are held out; one should stay.": holding(
            lambda share, n: max(1, round(share * n))
        ),
        "the first types are held out, whatever the generator says.": holding(
            draw=lambda n, generator: torch.arange(n)
        ),
    }
)
def check_hold_out(fn: Fn) -> None:
    """All rows of a type or none; how many types; which ones, by the generator."""
    name = "hold_out"
    for share, n_out in ((0.3, 3), (0.37, 4), (0.62, 6), (0.01, 1), (1.0, 9)):
        out = fn(TYPES, share, seeded(1))
        must_be_of_rows(f"{name} with share={share}", out, torch.bool)
        compare(f"{name} with share={share}", out, as_first(out, TYPES), "batch")
        held = torch.tensor(len(set(TYPES[out].tolist())))
        compare(f"{name} with share={share}: the number of types held out of 10", held, torch.tensor(n_out), "")
    must_differ(name, lambda seed: fn(TYPES, 0.3, seeded(seed)), "it changes")
    must_use_up(name, lambda generator: fn(TYPES, 0.3, generator))
    generator, known = seeded(7), sorted(set(TYPES.tolist()))
    draws = [tuple(sorted(set(TYPES[fn(TYPES, 0.3, generator)].tolist()))) for _ in range(300)]
    for kind in known:  # 90 are to be expected, give or take 8
        count = sum(kind in out for out in draws)
        if not 56 < count < 124:
            raise CheckFailed(
                f"{name} with share=0.3: in 300 draws type {kind} was held out {count} times, expected about 90.\n"
                "  Next: draw from the types that occur, each of them once, however many rows it has."
            )
    if len(set(draws)) < 60:  # of 120
        raise CheckFailed(
            f"{name} with share=0.3: in 300 draws there were only {len(set(draws))} different sets of types.\n"
            "  Next: draw the types independently, as `torch.randperm` does."
        )


# ------------------------------------------------------------------------------------------------------- control_task


def drawing(
    draw: Callable[[int, int, torch.Generator], Tensor] = lambda n, n_classes, generator: torch.randint(
        n_classes, (n,), generator=generator
    ),
    again: bool = True,
    end: Callable[[Tensor], Tensor] = lambda labels: labels,
) -> Fn:
    """control_task with something else in one of its steps."""

    def control_task(types: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
        known = sorted(set(types.tolist()))
        while True:
            drawn = draw(len(known), n_classes, generator)
            if not again or len(set(drawn.tolist())) >= n_classes or len(known) < n_classes:
                return end(torch.stack([drawn[known.index(kind)] for kind in types.tolist()]))

    return control_task


def per_row(types: Tensor, n_classes: int, generator: torch.Generator) -> Tensor:
    return torch.randint(n_classes, (len(types),), generator=generator)


@known_mistakes(
    {
        "a class is drawn for each example; draw one for each type.": per_row,
        "classes begin at 1; they begin at 0.": drawing(end=lambda labels: labels + 1),
        "a class may stay without a type; draw again until none does.": drawing(again=False),
        "the classes follow the order of the types, whatever the generator says.": drawing(
            lambda n, n_classes, generator: torch.arange(n) % n_classes
        ),
        "there is one class too few.": drawing(
            lambda n, n_classes, generator: torch.randint(n_classes - 1, (n,), generator=generator), again=False
        ),
        "one class for each type comes back; give one for each row.": lambda types, n_classes, generator: torch.randint(
            n_classes, (len(types.unique()),), generator=generator
        ),
        "the classes have unequal chances.": drawing(
            lambda n, n_classes, generator: (torch.rand(n, generator=generator) ** 2 * n_classes).long()
        ),
    }
)
def check_control_task(fn: Fn) -> None:
    """One class for each type; every class; with equal chances; by the generator."""
    name = "control_task"
    for n_classes in (2, 3):
        labels = fn(TYPES, n_classes, seeded(2))
        must_be_of_rows(f"{name} of {n_classes} classes", labels, torch.int64)
        compare(f"{name} of {n_classes} classes", labels, as_first(labels, TYPES), "batch")
    for seed in range(40):  # with two types one of two draws would leave a class out
        labels = fn(torch.tensor([4, 4, 9]), 2, seeded(seed))
        found = torch.tensor(sorted(set(labels.tolist())))
        if found.tolist() != [0, 1]:
            compare(f"{name} of 2 types: the classes that occur", found, torch.arange(2), "n_class")
    if fn(torch.tensor([4, 4, 9]), 5, seeded(0)).shape != (3,):
        raise CheckFailed(f"{name} of 2 types and 5 classes: wrong shape.\n  Next: one class for each row.")
    many = fn(torch.arange(3000), 3, seeded(3))
    shares = torch.bincount(many, minlength=3) / 3000
    compare(f"{name}: the shares of 3 classes among 3000 types", shares, torch.full((3,), 1 / 3), "n_class", atol=0.04)
    must_differ(name, lambda seed: fn(TYPES, 2, seeded(seed)), "it changes")
    must_use_up(name, lambda generator: fn(TYPES, 2, generator))
    few = [len(fn(torch.arange(4), 5, seeded(seed)).unique()) for seed in range(20)]  # all differ in one draw of five
    if min(few) == 4:
        raise CheckFailed(
            f"{name} of 4 types and 5 classes: in 20 draws, no two types ever had the same class.\n"
            "  Next: draw the classes independently; draw again only where there are as many types as classes or more."
        )
    _independent(name, fn)


def _independent(name: str, fn: Fn) -> None:
    """Three types, two classes: six outcomes that are equally likely, as the other two are drawn again."""
    generator, rows = seeded(8), torch.tensor([4, 4, 9, 6])
    ones, alone = Counter[int](), Counter[int]()
    for _ in range(400):
        labels = fn(rows, 2, generator)
        found = labels.unique()
        if found.tolist() != [0, 1]:  # one of four draws would leave a class out
            compare(f"{name} of 3 types: the classes that occur", found, torch.arange(2), "n_class")
        per_type = labels[1:].tolist()
        ones.update(place for place, label in enumerate(per_type) if label)
        alone[next(place for place, label in enumerate(per_type) if per_type.count(label) == 1)] += 1
    for place, kind in enumerate((4, 9, 6)):
        for count, expected, most, words in (
            (ones[place], 200, 45, "has class 1"),
            (alone[place], 133, 39, "is the only one of its class"),
        ):
            if abs(count - expected) > most:
                raise CheckFailed(
                    f"{name} of 3 types and 2 classes: in 400 draws, type {kind} {words} {count} times, expected about "
                    f"{expected}.\n  Next: draw a class for every type with equal chances; if one is missing, draw all "
                    "of them again."
                )


# -------------------------------------------------------------------------------------------------------- selectivity

ROWS = torch.arange(len(TYPES))
TRAIN = ROWS % 4 != 3  # every type has a row among these


class Watched:
    """A fit that remembers what it was given, and the probes that it gave."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Probe]] = []

    def __call__(self, x: Tensor, y: Tensor) -> Probe:
        probe = nearest_mean(x, y)
        self.calls.append((x.clone(), y.clone(), probe))
        return probe


RIGHT_LABELS = drawing()


def selecting(
    labels: Fn = RIGHT_LABELS,
    fitted: Callable[[Tensor], Tensor] = lambda train: train,
    tested: Callable[[Tensor], Tensor] = lambda train: ~train,
    judged: Callable[[Tensor, Tensor], Tensor] = lambda control, y: control,
    end: Callable[[float, float], Any] = lambda real, control: (real, real - control),
    number: Callable[[int], int] = lambda n_controls: n_controls,
    again: bool = False,
) -> Fn:
    """selectivity with something else in one of its steps."""

    def selectivity(
        fit: Fn,
        x: Tensor,
        y: Tensor,
        types: Tensor,
        train: Tensor,
        generator: torch.Generator,
        n_controls: int = 5,
    ) -> Any:
        rows, others = fitted(train), tested(train)

        def of(wanted: Tensor, truth: Tensor) -> float:
            return share_right(fit(x[rows], wanted[rows]), x[others], truth[others])

        real, state, found = of(y, y), generator.get_state(), []
        for _ in range(number(n_controls)):
            if again:
                generator.set_state(state)
            control = labels(types, 2, generator).bool()
            found.append(of(control, judged(control, y)))
        return tuple(torch.tensor(value).to(x) for value in end(real, sum(found) / len(found)))

    return selectivity


@known_mistakes(
    {
        "control labels are drawn per example; a type should have one.": selecting(per_row),
        "accuracies are those on the rows of the fit; judge on the others.": selecting(tested=lambda train: train),
        "accuracies are taken over all rows; judge only on those that were not fitted.": selecting(
            tested=lambda train: torch.ones_like(train)
        ),
        "probes are fitted on all rows, also on those that judge them.": selecting(
            fitted=lambda train: torch.ones_like(train)
        ),
        "`train` is turned round: the probes are fitted on the rows that should judge.": selecting(
            fitted=lambda train: ~train, tested=lambda train: train
        ),
        "the control's probe is judged by the real labels.": selecting(judged=lambda control, y: y),
        "the sign is turned round: it is the control accuracy minus the accuracy.": selecting(
            end=lambda real, control: (real, control - real)
        ),
        "the control accuracy comes second; return the difference.": selecting(
            end=lambda real, control: (real, control)
        ),
        "it is one control task, however many were asked for.": selecting(number=lambda n_controls: 1),
        "all control tasks are the same one: the generator is set back.": selecting(again=True),
    }
)
def check_selectivity(fn: Fn) -> None:
    """The fit is watched: what it is given, how often, and what follows from its probes; then many controls."""
    name = "selectivity"
    x, y = noise(len(TYPES), 6, seed=20) + 0.5, ROWS % 3 == 1
    x = x + y[:, None] * noise(6, seed=21)
    by_type = (TYPES[:, None] == TYPES.unique()).to(x)  # the controls are easy to learn from these, `upset` is not
    upset = torch.where(TRAIN, y, ~y)
    for n_controls, rows, labels, seed, words in (
        (4, x, y, 7, ""),
        (6, x, y, 20, ""),
        (None, x, y, 9, ""),
        (3, by_type, upset, 5, " and labels that turn round"),
    ):
        fit = Watched()
        count = 5 if n_controls is None else n_controls
        given = (fit, rows, labels, TYPES, TRAIN, seeded(seed)) + (() if n_controls is None else (n_controls,))
        answer = fn(*given)
        where = f"{name} with n_controls={count}{words}"
        expected = _by_what_was_fitted(where, fit, rows, labels, count)
        compare_parts(where, answer, expected, {"accuracy": "", "selectivity": ""})
    must_use_up(name, lambda generator: fn(Watched(), x, y, TYPES, TRAIN, generator))
    drawn: list[Tensor] = []

    def fit_nothing(x: Tensor, y: Tensor) -> Probe:
        drawn.append(y)
        return torch.zeros_like(x[0]), torch.zeros(())

    fn(fit_nothing, x, y, TYPES, TRAIN, seeded(6), 100)
    share = torch.cat(drawn[1:]).float().mean()
    compare(f"{name}: the share of True in 100 control tasks", share, torch.tensor(0.5), "", atol=0.1)


def _by_what_was_fitted(name: str, fit: Watched, x: Tensor, y: Tensor, n_controls: int) -> tuple[Tensor, Tensor]:
    """Accuracy and selectivity, from the labels and probes of each call."""
    compare(f"{name}: the number of probes", torch.tensor(len(fit.calls)), torch.tensor(n_controls + 1), "")
    real, controls, seen = None, [], []
    for rows, labels, probe in fit.calls:
        compare(f"{name}: the rows that a probe is fitted on", rows, x[TRAIN], "batch d_model")
        compare_kind(f"{name}: the labels of a probe", labels, y[TRAIN])
        if real is None and torch.equal(labels, y[TRAIN]):
            real = share_right(probe, x[~TRAIN], y[~TRAIN])
            continue
        compare(f"{name}: the labels of a control task", labels, as_first(labels, TYPES[TRAIN]), "batch")
        own = dict(zip(TYPES[TRAIN].tolist(), labels.tolist(), strict=True))
        truth = torch.tensor([own[kind] for kind in TYPES[~TRAIN].tolist()])
        controls.append(share_right(probe, x[~TRAIN], truth))
        seen.append(tuple(labels.tolist()))
    if real is None:
        raise CheckFailed(f"{name}: no probe was fitted with the real labels.\n  Next: `fit(x[train], y[train])`.")
    compare(f"{name}: whether the control tasks differ", torch.tensor(len(set(seen)) > 1), torch.tensor(True), "")
    return torch.tensor(real), torch.tensor(real - sum(controls) / len(controls))


# ---------------------------------------------------------------------------------------------- generalisation_matrix

Set = tuple[Tensor, Tensor, Tensor]


def matrix_by(
    fitted: Callable[[Tensor], Tensor] = lambda train: train,
    tested: Callable[[Tensor], Tensor] = lambda train: ~train,
    end: Callable[[Tensor], Tensor] = lambda table: table,
    order: Callable[[list[Set]], list[Set]] = lambda sets: sets,
) -> Fn:
    """generalisation_matrix, entry by entry, with other rows or another order."""

    def generalisation_matrix(fit: Fn, sets: Mapping[str, Set]) -> Tensor:
        table = []
        for x, y, train in order(list(sets.values())):
            probe = fit(x[fitted(train)], y[fitted(train)])
            others = [(u[tested(t)], v[tested(t)]) for u, v, t in order(list(sets.values()))]
            table.append([share_right(probe, rows, labels) for rows, labels in others])
        return end(torch.tensor(table).to(x))

    return generalisation_matrix


def tested_on_all_others(fit: Fn, sets: Mapping[str, Set]) -> Tensor:
    """Only on the diagonal the rows of the fit are left out."""
    own, everything = matrix_by()(fit, sets), matrix_by(tested=lambda train: torch.ones_like(train))(fit, sets)
    return torch.where(torch.eye(len(own)).bool(), own, everything)


@known_mistakes(
    {
        "rows and columns are swapped: a row belongs to one probe.": matrix_by(end=lambda table: table.T),
        "each probe is tested on the rows of `train`.": matrix_by(tested=lambda train: train),
        "each probe is tested on all rows.": matrix_by(tested=lambda train: torch.ones_like(train)),
        "off the diagonal each probe is tested on all rows, also those of `train`.": tested_on_all_others,
        "each probe is fitted on all rows.": matrix_by(fitted=lambda train: torch.ones_like(train)),
        "`train` is turned round.": matrix_by(fitted=lambda train: ~train, tested=lambda train: train),
        "the sets come in another order than that of the mapping.": matrix_by(order=lambda sets: sets[::-1]),
        "it is the share of wrong answers.": matrix_by(end=lambda table: 1 - table),
    }
)
def check_generalisation_matrix(fn: Fn) -> None:
    """Three sets of different sizes; one alone."""
    sets: dict[str, Set] = {}
    for seed, (label, n_batch) in enumerate((("third", 17), ("first", 13), ("second", 23)), start=31):
        x, y = two_classes(seed, n_batch)
        sets[label] = x, y, torch.arange(n_batch) % 5 < 3
    axes = "fitted tested"
    compare("generalisation_matrix", fn(nearest_mean, sets), matrix_by()(nearest_mean, sets), axes)
    alone = {"first": sets["first"]}
    compare("generalisation_matrix of one set", fn(nearest_mean, alone), matrix_by()(nearest_mean, alone), axes)
