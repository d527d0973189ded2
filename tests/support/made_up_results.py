"""Results of a grading that nobody graded: what the tests of the reports share."""

import random

from course_utils.exercises import course_exercises
from course_utils.grading.results import ExerciseResult, Result

NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)>'
MISTAKES = (
    "the diagonal is masked too; a query may look at itself.",
    "past and future are swapped.",
    None,
)


def made_up(exercise: str, state: str, mistake: str | None = None, message: str | None = None) -> ExerciseResult:
    """One exercise, with a message such as checks write."""
    said = {
        "correct": f"{exercise}: correct",
        "wrong": f"{exercise}: 30 of 150 values are wrong.\n  first at [batch=0, query=0]: expected -3.05, got -inf",
        "not written yet": f"{exercise}: not written yet.",
        "timed out": f"{exercise}: stopped after 20 s.",
        "cheated": f"{exercise}: the comparison was replaced.",
        "error": f"{exercise}: the process died.",
    }[state]
    if mistake:
        said += f"\n  This is what you get if {mistake}"
    return ExerciseResult(exercise, state, said if message is None else message, mistake, 0.125)


def all_of(chapter: str, learner: str, state: str = "correct", **others: ExerciseResult) -> Result:
    """A whole chapter in one state, but for the exercises that are named."""
    exercises = tuple(others.get(e.name) or made_up(e.name, state) for e in course_exercises()[chapter])
    return Result(learner, chapter, f"key of {learner}", exercises, (), 1.5, 512.0)


def a_class(n_learners: int, chapter: str = "02", seed: int = 0) -> list[Result]:
    """Learners who get more or less far, and make mistakes where it is difficult."""
    chance = random.Random(seed)
    results = []
    for position in range(n_learners):
        reached, care = chance.uniform(0.2, 1.1), chance.uniform(0.5, 1.0)
        own = {}
        exercises = course_exercises()[chapter]
        for place, exercise in enumerate(exercises):
            if place / len(exercises) > reached:
                own[exercise.name] = made_up(exercise.name, "not written yet")
            elif chance.random() > care - 0.05 * exercise.difficulty:
                state = chance.choices(("wrong", "timed out", "error", "cheated"), (20, 2, 1, 1))[0]
                mistake = chance.choice(MISTAKES) if state == "wrong" else None
                own[exercise.name] = made_up(exercise.name, state, mistake)
        results.append(all_of(chapter, f"learner-{position:03}", **own))
    return results
