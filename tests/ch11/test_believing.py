"""What the checks of believing in chapter 11 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch11_oracles as ref
from course_utils.checks.ch11.believing import binning, contradicting, counting, erring
from tests.ch11 import other_oracles as other

SECRETS = ("nn.functional.one_hot(", "return_counts")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes
    "dict.fromkeys(types) -> types",  # the same entries are made again
}


def looks_at_the_first(first: Any, second: Any, yes: int, no: int) -> Any:
    """It raises only where the first question is never answered."""
    answered = [(part == yes) | (part == no) for part in (first, second)]
    if not answered[0].any():
        raise ValueError("nothing is answered")
    return (first == second)[answered[0] & answered[1]].float().mean()


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "accuracy_by_type": [
        ("should not be there", lambda t, p, a: other.accuracy_by_type(t, p, a) | {"all": (0.5, 0.5, len(t))}),
        ("expected (0.0, 1.0, 1), got (1.0, 0.0, 1)", lambda t, p, a: {
            k: (v[1], v[0], v[2]) for k, v in other.accuracy_by_type(t, p, a).items()}),
        ("the types of what belongs", lambda t, p, a: {
            k: (torch.tensor(v[0]), *v[1:]) for k, v in other.accuracy_by_type(t, p, a).items()}),
        ("at 'who'", lambda t, p, a: {k: (v[0], max(v[:2]), v[2]) for k, v in other.accuracy_by_type(t, p, a).items()}),
        ("at 'mood'", counting(right=lambda p, a: float(p[0] == a[0]))),
    ],
    "reliability": [
        ("values are wrong", binning(which=lambda p, n: n - 1 - min(int(p * n), n - 1))),
        ("expected (confidence, right, counts)", lambda p, a, n: other.reliability(p, a, n)[:2]),
        ("its means are not", lambda p, a, n: tuple(
            part.float() if part.is_floating_point() else part for part in other.reliability(p, a, n))),
        ("values are wrong", binning(right=lambda group: float(bool(group)))),
    ],
    "expected_calibration_error": [
        ("is wrong", erring(total=lambda gaps, counts: 1 - gaps[0])),
        ("wrong shape", lambda p, a, n: other.expected_calibration_error(p, a, n)[None]),
        ("is wrong", lambda p, a, n: other.expected_calibration_error(p, a, n + 1)),
        ("is wrong", lambda p, a, n: other.expected_calibration_error(p, a, 4)),
    ],
    "contradiction_rate": [
        ("should raise ValueError", contradicting(checks=False)),
        ("where no row has both answers should raise ValueError", looks_at_the_first),
        ("is wrong", contradicting(counts=lambda pair, yes, no: pair[0] in (yes, no))),
        ("is wrong", lambda first, second, yes, no: other.contradiction_rate(first, second, 5, 9)
         if (yes, no) != (1, 2) else other.contradiction_rate(first, second, yes, no)),
        ("wrong shape", lambda *arguments: other.contradiction_rate(*arguments)[None]),
    ],
}  # fmt: skip

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_a_model_that_draws_its_answers_is_calibrated() -> None:
    """Answers drawn from the model's own probabilities: the error is what chance leaves."""
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(20_000, 5, generator=generator)).softmax(-1)
    answers = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    assert ref.expected_calibration_error(probabilities, answers, 10) < 0.02
    assert ref.expected_calibration_error((3 * probabilities.log()).softmax(-1), answers, 10) > 0.1
