"""What a check raises when an answer is not right; the text is for the learner."""

from typing import Any, NamedTuple


class Evidence(NamedTuple):
    """What was compared, and what the learner's code gave there: enough to tell which mistake gives the same."""

    place: str
    answer: Any


class CheckFailed(AssertionError):
    """A learner's answer is wrong; the message is the lesson, so notebooks show no traceback.

    `advice` is said only while no cause is known: where a known mistake gives the same `evidence`, its sentence takes
    the place of the advice.
    """

    def __init__(self, message: str, *, evidence: Evidence | None = None, advice: str = "") -> None:
        super().__init__(f"{message}\n{advice}" if advice else message)
        self.message, self.evidence, self.advice = message, evidence, advice

    def with_lines(self, *lines: str) -> "CheckFailed":
        """The same failure with more to say before the advice."""
        return CheckFailed("\n".join([self.message, *lines]), evidence=self.evidence, advice=self.advice)

    def because(self, cause: str) -> "CheckFailed":
        """The same failure with its cause, which takes the place of the advice."""
        return CheckFailed(f"{self.message}\n  This is what you get if {cause}")

    def _render_traceback_(self) -> list[str]:  # IPython calls this instead of printing frames
        return str(self).splitlines()


class NotWritten(NotImplementedError):
    """An exercise, or one that it needs, still raises NotImplementedError: unsolved, which is not the same as wrong."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class Stop(Exception):
    """What a check raises in the middle of a learner's run, to see what is left behind."""
