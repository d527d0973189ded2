"""What the checks of truth in chapter 09 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch09_dictionaries as ref
from course_utils.checks.ch09.truth import balanced, growing, judging, scoring, texts_of, tokens_there
from tests.ch09 import other_dictionaries as other

SECRETS = ("amax(", "isin(", "explain(fires")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # Where the sum is 1, both is 0.
    "1 -> 2",
    # A few whole numbers divide as well.
    "facts.sum(dim=0).double() -> facts.sum(dim=0)",
    "facts[fires].sum(dim=0).double() -> facts[fires].sum(dim=0)",
    "fires.sum().double() -> fires.sum()",
    # A gain of exactly a millionth.
    "gain.max() <= 1e-06 -> gain.max() < 1e-06",
}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "best_f1": [
        ("values are wrong", judging(lambda both, said, true, n: both / n)),
        ("wrong shape", lambda *args: ref.best_f1(*args).amax(1)),
    ],
    "explain": [
        ("expected", growing(leaf=lambda share: 1 - share)),
        ("expected", lambda fires, facts, n: [0, 0.0, 1.0]),
    ],
    "detection_score": [
        ("wrong", scoring(lambda rows: 1 - balanced(rows), texts_of)),
        ("expected a number", lambda *args: torch.tensor(ref.detection_score(*args))),
    ],
    "fuzzing_score": [
        ("wrong", scoring(lambda rows: balanced(rows) / 2, tokens_there)),
        ("expected a number", lambda *args: torch.tensor(ref.fuzzing_score(*args))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_a_rule_says_what_it_was_grown_from() -> None:
    generator = torch.Generator().manual_seed(0)
    facts = torch.rand(200, 5, generator=generator) > 0.5
    fires = facts[:, 1] & ~facts[:, 3]
    rule = ref.explain(fires, facts, 2)
    assert torch.equal(ref.follow_rule(rule, facts) > 0.5, fires)
