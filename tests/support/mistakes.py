"""Wrong answers, and how a check must refuse them: what the tests of every chapter share."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from course_utils.checks import CheckFailed, run_check


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, and words that its refusal must hold."""

    exercise: str
    words: str
    answer: Any
    surprise: bool = False  # not in the check's list of known mistakes


def assert_refused(
    check: Callable[[Any], None], mistake: Mistake, secrets: Iterable[str] = (), not_a_cause: str | None = None
) -> None:
    """The refusal holds its words, names at most one cause (none for a surprise), and gives no secret away.

    `secrets` are words of a solution; the learner's own line may hold them. `not_a_cause` marks
    sentences which begin like a cause but are none.
    """
    with pytest.raises(CheckFailed) as caught:
        run_check(check, mistake.answer)
    message = str(caught.value)
    assert mistake.words in message
    assert message.startswith(mistake.exercise)
    known = message.count("This is what you get if") - (message.count(not_a_cause) if not_a_cause else 0)
    assert known <= (0 if mistake.surprise else 1), message
    assert "Traceback" not in message
    ours = "\n".join(line for line in message.splitlines() if not line.startswith("  at line"))
    assert not any(secret in ours for secret in secrets), message
    assert len(message.splitlines()) > 1


def assert_known_and_unknown(mistakes: Iterable[Mistake], exercise: str) -> None:
    """At least four mistakes for an exercise, one of which its check does not know."""
    own = [mistake for mistake in mistakes if mistake.exercise == exercise]
    assert len(own) >= 4
    assert any(mistake.surprise for mistake in own)


def assert_quick(check: Callable[[Any], None], answer: Any, seconds: float = 1.0, rounds: int = 1) -> None:
    """The check takes less processor time than that, in the best of `rounds`.

    50 ms is the aim; but the machines that run the suite are busy, which is why the clock on the wall is not asked.
    """
    run_check(check, answer)  # torch warms up
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run_check(check, answer)
        times.append(time.process_time() - start)
    assert min(times) < seconds
