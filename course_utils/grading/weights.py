"""What a right answer is worth: the lesson's difficulty, unless the teacher says otherwise."""

import math
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from course_utils.exercises import course_exercises
from course_utils.grading.results import Result
from course_utils.places import CourseError

Weights = Mapping[str, float]


class Points(NamedTuple):
    """What was reached, and what could have been."""

    got: float
    of: float


def difficulty_weights() -> dict[str, float]:
    """Every exercise of the course is worth its difficulty, from 1 to 5 points."""
    return {e.name: float(e.difficulty) for chapter in course_exercises().values() for e in chapter}


def read_weights(path: Path) -> dict[str, float]:
    """The weights of all exercises: those that a TOML file names (`causal_mask = 2.5`), elsewhere the difficulty.

    Names of exercises are unique in the course, so the file needs no chapters. 0 takes an exercise out of the count.
    Raises CourseError for a file that cannot be read, an unknown exercise, and what is no number from 0 upwards.
    """
    weights = difficulty_weights()
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CourseError(f"The weights in {path} cannot be read ({error}).") from None
    for name, weight in own.items():
        if name not in weights:
            nearest = ", ".join(get_close_matches(name, weights, n=3, cutoff=0.0))
            raise CourseError(f"{path}: there is no exercise {name!r}; the nearest are {nearest}.")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise CourseError(f"{path}: {name} = {weight!r} is no weight; write a number from 0 upwards.")
    return weights | {name: float(weight) for name, weight in own.items()}


def points(result: Result, weights: Weights) -> Points:
    """The points of a submission: an exercise that is correct counts in full, any other not at all."""
    got = sum((weights[e.exercise] for e in result.exercises if e.state == "correct"), start=0.0)
    return Points(got, sum((weights[e.exercise] for e in result.exercises), start=0.0))


def number(value: float) -> str:
    """3, 2.5, 0.1: a number of points as people write it."""
    return f"{value:.4f}".rstrip("0").rstrip(".")
