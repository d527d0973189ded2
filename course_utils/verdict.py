"""One exercise of a notebook, checked, and what came of it as a value: what `course check` and the grader share."""

import contextlib
import os
import types
from typing import NamedTuple

from course_utils.checks import CheckFailed, NotWritten, check
from course_utils.notebook import exercise, explained
from course_utils.places import CourseError


class Verdict(NamedTuple):
    """What came of one exercise."""

    state: str  # "correct", "wrong" or "not written yet"
    message: str


def verdict(module: types.ModuleType, symbol: str) -> Verdict:
    """Check the exercise of that name in a loaded notebook."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            check(exercise(module, symbol), symbol)
    except NotWritten as error:
        return Verdict("not written yet", str(error))
    except CheckFailed as error:
        return Verdict("wrong", explained(module, symbol, str(error)))
    except CourseError as error:
        return Verdict("wrong", str(error))
    return Verdict("correct", f"{symbol}: correct")
