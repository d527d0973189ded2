"""What the checks of "Is the probe fooling us?" cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch07_probes as ref
from course_utils.checks.ch07.fooling import drawing, holding, matrix_by, selecting
from tests.ch07 import other_probes as other

SECRETS = ("torch.isin", "return_inverse", "~train], labels")
ONLY_ON_GPU = ".to("
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # There are never more.
    "len(drawn.unique()) == min(n_classes, len(known)) -> len(drawn.unique()) >= min(n_classes, len(known))",
}


def from_the_world(types: Any, number: Any, generator: Any) -> Any:
    return ref.hold_out(types, number, torch.default_generator)


def from_the_world_too(types: Any, n_classes: int, generator: Any) -> Any:
    return ref.control_task(types, n_classes, torch.default_generator)


def endless_is_refused(types: Any, n_classes: int, generator: Any) -> Any:
    """As many classes as there are types at most."""
    return ref.control_task(types, min(n_classes, len(types.unique())), generator).float()


def alternating(n: int, n_classes: int, generator: Any) -> Any:
    """Balanced, begun anywhere."""
    return (torch.arange(n) + torch.randint(n_classes, (), generator=generator)) % n_classes


def all_different(types: Any, n_classes: int, generator: Any) -> Any:
    """Drawn until there are as many classes as there can be, also with fewer types than classes."""
    while True:
        labels = ref.control_task(types, n_classes, generator)
        if len(labels.unique()) == min(n_classes, len(types.unique())):
            return labels


def types_of_rows(types: Any, share: float, generator: Any) -> Any:
    """Types that have more rows are held out more often."""
    known = types.unique()
    rows = types[torch.randperm(len(types), generator=generator)].tolist()
    out = list(dict.fromkeys(rows))[: min(max(1, round(share * len(known))), len(known) - 1)]
    return torch.isin(types, torch.tensor(out))


def neighbours(n: int, generator: Any) -> Any:
    return (torch.arange(n) + torch.randint(n, (), generator=generator)) % n


def with_its_seed(fn: Any, place: int) -> Any:
    """The generator handed over stays where it is."""

    def answer(*given: Any) -> Any:
        own = torch.Generator().manual_seed(given[place].initial_seed())
        return fn(*given[:place], own, *given[place + 1 :])

    return answer


def begins_with_0(types: Any, n_classes: int, generator: Any) -> Any:
    labels = ref.control_task(types, n_classes, generator)
    return (labels - labels[0]) % n_classes


def filled_up(types: Any, n_classes: int, generator: Any) -> Any:
    """A class that is missing takes a type from the largest one, and nothing is drawn again."""
    known, which = types.unique(return_inverse=True)
    drawn = torch.randint(n_classes, (len(known),), generator=generator)
    for kind in range(n_classes if len(known) >= n_classes else 0):
        if kind not in drawn:
            drawn[(drawn == drawn.bincount().argmax()).nonzero()[0, 0]] = kind
    return drawn[which]


def of_training_types(fit: Any, x: Any, y: Any, types: Any, train: Any, *given: Any) -> Any:
    """Rows that judge count as one type more."""
    return ref.selectivity(fit, x, y, types.where(train, types[train][0]), train, *given)


def with_ints(fit: Any, *given: Any) -> Any:
    return ref.selectivity(lambda x, y: fit(x, y.long()), *given)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "hold_out": [
        ("it drew from torch's global random numbers", from_the_world),
        ("held out of 10", holding(lambda share, n: min(max(1, round(share * n) + 1), n - 1))),
        ("expected dtype bool", lambda *given: ref.hold_out(*given).long()),
        ("expected about 90", types_of_rows),
        ("different sets of types", holding(draw=neighbours)),
        ("nothing was drawn with `generator` itself", with_its_seed(ref.hold_out, 2)),
    ],
    "control_task": [
        ("it drew from torch's global random numbers", from_the_world_too),
        ("expected dtype int64", endless_is_refused),
        ("no two types ever had the same class", all_different),
        ("has class 1", begins_with_0),
        ("is the only one of its class", filled_up),
        ("nothing was drawn with `generator` itself", with_its_seed(ref.control_task, 2)),
        (
            "the shares of 3 classes",
            drawing(lambda n, k, generator: torch.randint(2 * k, (n,), generator=generator) % (k + 1) % k),
        ),
    ],
    "selectivity": [
        ("expected a tuple", lambda *given: ref.selectivity(*given)[1]),
        ("the number of probes", selecting(number=lambda n_controls: n_controls + 1)),
        ("values is wrong", selecting(end=lambda real, control: (real, real - control / 2))),
        ("expected dtype bool", with_ints),
        ("nothing was drawn with `generator` itself", with_its_seed(ref.selectivity, 5)),
        ("wrong", of_training_types),
        ("values is wrong", selecting(end=lambda real, control: (real, max(0.0, real - control)))),
        ("values is wrong", selecting(end=lambda real, control: (real, real - max(0.5, control)))),
        ("the share of True", selecting(lambda types, n, generator: ref.control_task(types, 3, generator))),
    ],
    "generalisation_matrix": [
        ("values are wrong", matrix_by(end=lambda table: (table + table.T) / 2)),
        ("wrong shape", matrix_by(end=lambda table: table.flatten())),
        ("values are wrong", matrix_by(tested=lambda train: train.roll(1))),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_control_tasks_of_neighbouring_types_are_independent() -> None:
    labels = ref.control_task(torch.arange(4000), 2, torch.Generator().manual_seed(1)).float()
    assert abs((labels[1:] == labels[:-1]).float().mean() - 0.5) < 0.04
