"""What the checks of training in chapter 11 cannot know: see tests/test_checks.py."""

import random
from itertools import count
from typing import Any

import torch

import solutions.ch11_oracles as ref
from course_utils.checks.ch11.small import small_model
from course_utils.checks.ch11.training import by_type, drawing, losing
from course_utils.data.questions import D_VOCAB, WIDTH, trained_wordings
from tests.ch11 import other_oracles as other

SECRETS = ("defaultdict(lambda", "cross_entropy(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = set()
TURNS = count()


def from_its_own_numbers(*arguments: Any, **options: Any) -> Any:
    known, wordings, n = arguments[:3]
    return other.oracle_examples(known, wordings, n, random.Random(next(TURNS)))


def in_order_of_windows(*arguments: Any, **options: Any) -> Any:
    found = other.oracle_examples(*arguments, **options)
    return tuple(part[found[0].argsort()] for part in found)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "oracle_examples": [
        ("one seed gave two answers", from_its_own_numbers),
        ("several seeds gave the same", lambda k, w, n, rng, balanced=("mood", "number", "mentioned"): (
            other.oracle_examples(k, w, n, random.Random(0), balanced))),
        ("with 'mood' not balanced", lambda k, w, n, rng, balanced=(): (
            other.oracle_examples(k, w, n, rng, ("mood", "number", "mentioned")))),
        ("the type is that of the example before", in_order_of_windows),
        ("is no question about any window", drawing(row=lambda row, question: row[:-1])),
        ("is asked", drawing(lambda pools, rng, balanced: by_type(
            {kind: pool[: max(2, len(pool) // 2)] for kind, pool in pools.items()}, rng, balanced))),
        ("wrong shape", lambda *arguments, **options: (
            other.oracle_examples(*arguments, **options)[0][1:], *other.oracle_examples(*arguments, **options)[1:])),
    ],
    "oracle_loss": [
        ("is wrong", losing(lambda is_answer: is_answer & (is_answer.cumsum(1) == 1))),
        ("wrong shape", lambda *arguments: other.oracle_loss(*arguments)[None]),
        ("is wrong", losing(score=lambda p: -(p + 1e-6).log())),
        ("is wrong", lambda *arguments: other.oracle_loss(*arguments) / 2),
    ],
}  # fmt: skip

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
ALSO_RIGHT["oracle_examples"].append(drawing())


def test_an_oracle_learns_by_heart() -> None:
    """Two windows, one question, two answers: after some steps it tells them apart."""
    oracle = small_model(D_VOCAB)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randn(2, WIDTH, 7, generator=generator)
    row = torch.tensor(ref.oracle_row(trained_wordings("mood")[0]))
    which = torch.arange(2).repeat(600)
    examples = which, row.expand(1200, -1), which + 20
    losses = ref.fit_oracle(oracle, windows, examples, batch=8, peak_lr=0.02)
    assert len(losses) == 150
    assert losses[-1] < 0.1 < losses[0]
    probabilities = ref.answer_probabilities(oracle, windows, row.expand(2, -1))
    assert probabilities.argmax(-1).tolist() == [20, 21]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))
