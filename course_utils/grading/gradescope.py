"""The results.json that Gradescope's autograder expects. One file for each learner."""

import json
from collections.abc import Sequence
from typing import Any

from course_utils.grading.results import Result
from course_utils.grading.weights import Weights


def gradescope(results: Sequence[Result], weights: Weights) -> str:
    """One learner's results: a test for each exercise, with its points and what the check said, as plain text."""
    tests: list[dict[str, Any]] = []
    for result in results:
        for position, exercise in enumerate(result.exercises, start=1):
            correct = exercise.state == "correct"
            weight = weights[exercise.exercise]
            tests.append(
                {
                    "name": exercise.exercise,
                    "number": f"{result.chapter}.{position}",
                    "score": weight if correct else 0.0,
                    "max_score": weight,
                    "status": "passed" if correct else "failed",
                    "output": exercise.message,
                    "output_format": "text",
                    "visibility": "visible",
                }
            )
    content = {
        "tests": tests,
        "output": "\n".join(problem for result in results for problem in result.problems),
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "execution_time": round(sum(result.seconds for result in results), 1),
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
