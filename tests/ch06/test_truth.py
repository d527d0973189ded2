"""What the checks of measures against the truth cannot know: see tests/test_checks.py."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import solutions.ch06_superposition as ref
from course_utils.checks.ch06 import truth as known
from tests.ch06 import other_dictionaries as other

SECRETS = ("einsum(", ".gather(", "masked_fill", ".clamp(", "owner[", "keepdim=True")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "latents[:, assignment] > 0 -> latents[:, assignment] != 0",  # neither is ever negative
    "features > 0 -> features != 0",
    "-1 -> 1",  # of two axes, the second is the last
    "0 -> -1",  # of one column
    "match_features(W_dec, truth)[1] > threshold -> match_features(W_dec, truth)[1] >= threshold",  # hardly ever equal
    "onwards > reached + 1e-09 -> onwards >= reached + 1e-09",
    "1 -> 2",  # -1 stands for nobody, and so does -2; where one sample is counted as two, see SURPRISES
    "gain.detach() -> gain",  # what comes out are whole numbers, which have no graph
    "gain.detach().double().cpu() -> gain.detach().double()",  # on a GPU
    # a tensor of one number is an index, too
    "int(reached.masked_fill(is_taken, -torch.inf).argmax()) -> reached.masked_fill(is_taken, -torch.inf).argmax()",
    "(onwards > reached + 1e-09).nonzero().flatten().tolist() -> (onwards > reached + 1e-09).nonzero().flatten()",
}


def with_parts(change: Any, fn: Any) -> Any:
    """An answer in parts, changed."""
    return lambda *given: change(*fn(*given))


def with_any_number_of_rows(gain: Tensor) -> Tensor:
    """The first rows get columns, the others none."""
    if len(gain) <= gain.shape[1]:
        return ref.best_assignment(gain)
    return torch.cat([ref.best_assignment(gain[: gain.shape[1]]), torch.tensor([-1] * (len(gain) - gain.shape[1]))])


def by_regret(gain: Tensor) -> Tensor:
    """Always the row that would lose most by its second choice."""
    if len(gain) > gain.shape[1]:
        raise ValueError("more rows than columns")
    left, found = gain.detach().double().clone(), torch.zeros(len(gain), dtype=torch.long)
    waiting = set(range(len(gain)))
    while waiting:
        row = max(waiting, key=lambda row: left[row].topk(min(2, gain.shape[1])).values.diff().abs().sum().item())
        found[row] = left[row].argmax()
        left[:, found[row]] = -1e9
        waiting.remove(row)
    return found


def without_an_end(gain: Tensor) -> Tensor:
    """Goes on as long as the sum does not fall."""
    found, total = ref.best_assignment(gain), -torch.inf
    while gain.gather(1, found[:, None]).sum() >= total:
        total = gain.gather(1, found[:, None]).sum()
        found = ref.best_assignment(gain)
    return found


def shares_of_counts(latents: Tensor, features: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers divided by whole numbers, which gives float32 whatever came in."""
    fires, there = latents[:, assignment] > 0, features > 0
    both = (fires & there).sum(0)
    return both / fires.sum(0).clamp(min=1), both / there.sum(0).clamp(min=1)


def of_two_at_least(*given: Tensor) -> Tensor:
    """A child that is counted once has half its rate."""
    latents, features, assignment, parent = given
    n_counted = ((latents[:, assignment] > 0) & (features > 0) & (parent >= 0)).sum(0)
    return ref.absorption_rate(*given) / (1 + (n_counted == 1))


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "best_assignment": [
        ("should raise ValueError", with_any_number_of_rows),
        ("expected a Tensor, got a list", lambda gain: ref.best_assignment(gain).tolist()),
        ("expected dtype int64", lambda gain: ref.best_assignment(gain).int()),
        ("every row needs a column of its own", lambda gain: ref.best_assignment(gain) % (gain.shape[1] - 1)),
        ("another assignment is better", lambda gain: ref.best_assignment(gain.round())),
        ("another assignment is better", by_regret),
        ("does your loop come to an end?", without_an_end),
    ],
    "match_features": [
        ("the cosines", with_parts(lambda a, b: (a, b.square()), ref.match_features)),
        (
            "the cosines have a graph",
            lambda W, truth: ((found := ref.match_features(W, truth))[0], found[1] + 0 * W.sum()),
        ),
        ("expected a tuple (assignment, cosine)", with_parts(lambda a, b: [a, b], ref.match_features)),
        ("the assignment", with_parts(lambda a, b: (a.argsort(), b), ref.match_features)),
        (
            "with a row of zeros",
            lambda W, truth: known.pairing(
                lambda W, truth: torch.where((W == 0).all(-1), -2.0, known.cosines(W, truth)).nan_to_num(),
                value=lambda W, truth: known.cosines(W, truth) - (W == 0).all(-1).any() * 1.0,
            )(W, truth),
        ),
    ],
    "recovery": [
        ("expected a plain number, got a Tensor", lambda *given: torch.tensor(ref.recovery(*given))),
        ("values are wrong", lambda *given: 100 * ref.recovery(*given)),
        ("values are wrong", lambda W, truth, threshold: ref.recovery(W, truth, threshold - 0.1)),
    ],
    "firing_scores": [
        ("expected a tuple (precision, recall)", with_parts(lambda a, b: torch.stack([a, b]), ref.firing_scores)),
        ("the recall", with_parts(lambda a, b: (a, b.mean().expand_as(b)), ref.firing_scores)),
        ("the precision", with_parts(lambda a, b: (2 * a * b / (a + b), b), ref.firing_scores)),
        ("wrong shape", with_parts(lambda a, b: (a.mean(), b.mean()), ref.firing_scores)),
        ("a quotient of whole numbers", shares_of_counts),
        ("the precision", partial(known.counted, below=lambda fires, there, n: (max(fires, 2), max(there, 2)))),
    ],
    "shrinkage": [
        ("values", lambda x, made: ref.shrinkage(x - x.mean(0), made - made.mean(0))),
        ("wrong shape", lambda x, made: ref.shrinkage(x, made)[None, None]),
        ("no gradient gets through", lambda x, made: ref.shrinkage(x, made).detach()),
    ],
    "absorption_rate": [
        ("values", lambda *given: 1.1 * ref.absorption_rate(*given)),
        ("values", of_two_at_least),
        ("wrong shape", lambda *given: ref.absorption_rate(*given)[given[3] >= 0]),
        (
            "values",
            lambda latents, features, assignment, parent: ref.absorption_rate(
                latents, features, assignment, torch.where(parent >= 0, 0, parent)
            ),
        ),
    ],
    "matryoshka_loss": [
        ("value", lambda *given: ref.matryoshka_loss(*given[:4], sorted(given[4])[:2])),
        ("wrong shape", lambda *given: ref.matryoshka_loss(*given)[None, None]),
        ("the gradient of `W_dec`", lambda x, latents, W, *rest: ref.matryoshka_loss(x, latents, W.detach(), *rest)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("seed", range(20))
def test_no_assignment_is_better(seed: int) -> None:
    """Whole numbers, among which ties are common."""
    gain = torch.randint(-3, 4, (5, 7), generator=torch.Generator().manual_seed(seed)).float()
    found = ref.best_assignment(gain)
    best = max(
        sum(gain[row, column].item() for row, column in enumerate(way)) for way in itertools.permutations(range(7), 5)
    )
    assert len(set(found.tolist())) == 5
    assert gain.gather(1, found[:, None]).sum().item() == best


def test_forty_features_and_eighty_latents_in_any_order_are_matched() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(40, 16, generator=generator)
    order = torch.randperm(80, generator=generator)
    rows = torch.cat(
        [3 * truth + 0.1 * torch.randn(40, 16, generator=generator), torch.randn(40, 16, generator=generator)]
    )
    found, cosine = ref.match_features(rows[order], truth)
    assert (order[found] == torch.arange(40)).all()
    assert cosine.min() > 0.98
    assert ref.recovery(rows[order], truth, 0.98) == 1.0


def test_shrinkage_is_what_a_reconstruction_was_multiplied_by() -> None:
    x = torch.randn(100, 3, 5)
    torch.testing.assert_close(
        ref.shrinkage(x, x * torch.tensor([0.5, 1.0, 2.0])[:, None]), torch.tensor([0.5, 1.0, 2.0])
    )
