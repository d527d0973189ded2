"""The gradebook: a table for a spreadsheet, one row for each learner and chapter."""

import csv
import io
from collections.abc import Sequence

from course_utils.exercises import course_exercises
from course_utils.grading.results import STATES, Result
from course_utils.grading.weights import Weights, number, points

FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def gradebook(results: Sequence[Result], weights: Weights) -> str:
    """The table as CSV: points and of how many, how many exercises in each state, the state of each exercise.

    "core points" are those of the core path alone, for whoever asks for no more.

    It begins with a byte order mark, without which Excel shows names with accents as gibberish (in Python, open it
    with "utf-8-sig"); lines end as RFC 4180 has it. No times stand in it, so the same work gives the same file.
    """
    exercises = list(dict.fromkeys(e.exercise for result in results for e in result.exercises))
    core = {e.name for chapter in course_exercises().values() for e in chapter if not e.optional}
    header = ["learner", "chapter", "points", "of", *STATES, "problems", "core points", "of core", *exercises]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(header)
    for result in results:
        got, of = points(result, weights)
        core_got, core_of = points(result, {name: weights[name] * (name in core) for name in weights})
        states = {e.exercise: e.state for e in result.exercises}
        counts = [list(states.values()).count(state) for state in STATES]
        row = [result.learner, result.chapter, number(got), number(of), *counts, " / ".join(result.problems)]
        row += [number(core_got), number(core_of)]
        row += [states.get(exercise, "") for exercise in exercises]
        writer.writerow([harmless(str(cell)) for cell in row])
    return "\ufeff" + text.getvalue()


def harmless(cell: str) -> str:
    """The cell with an apostrophe before what a spreadsheet would run as a formula."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell
