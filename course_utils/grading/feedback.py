"""What goes back to a learner: Markdown, with the lines that the check would have shown in the notebook."""

import re
from collections.abc import Iterator, Sequence

from course_utils.grading.results import Result
from course_utils.grading.weights import Weights, number, points


def feedback(results: Sequence[Result], weights: Weights) -> str:
    """One learner's feedback, chapter after chapter; first what needs another look."""
    parts = [f"# Feedback for {escaped(results[0].learner)}"]
    for result in results:
        parts += chapter(result, weights)
    return "\n\n".join(parts) + "\n"


def chapter(result: Result, weights: Weights) -> Iterator[str]:
    """The paragraphs about one notebook."""
    got, of = points(result, weights)
    by_state: dict[str, list[str]] = {}
    for exercise in result.exercises:
        by_state.setdefault(exercise.state, []).append(f"`{exercise.exercise}`")
    correct = len(by_state.get("correct", []))
    yield f"## Chapter {result.chapter}"
    yield f"{number(got)} of {number(of)} points; {correct} of {len(result.exercises)} exercises are correct."
    if result.problems:
        yield "\n".join(f"- {escaped(problem)}" for problem in result.problems)
    for exercise in result.exercises:
        if exercise.state not in ("correct", "not written yet"):
            yield f"### `{exercise.exercise}`: {exercise.state}"
            yield fenced(exercise.message)
    for state in ("not written yet", "correct"):
        if state in by_state:
            yield f"{state.capitalize()}: {', '.join(by_state[state])}."


def fenced(text: str) -> str:
    """The text as a block of code, which it cannot end from inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def escaped(text: str) -> str:
    """The text in Markdown, meaning nothing but itself; no HTML either."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)
