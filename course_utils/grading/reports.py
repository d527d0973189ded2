"""All reports of a grading, written into one folder.

    results.json          everything, in a documented form (docs/grading/results.md)
    gradebook.csv         one row for each learner and chapter
    report.html           one page for the teacher, complete in itself
    feedback/NAME.md      for each learner
    junit/NAME.xml        for each learner: continuous integration
    gradescope/NAME.json  for each learner: what Gradescope's autograder expects

NAME is the learner's own where that can be a file name everywhere, see `course_utils.grading.text.file_name`.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from course_utils.files import write_atomically
from course_utils.grading.feedback import feedback
from course_utils.grading.gradebook import gradebook
from course_utils.grading.gradescope import gradescope
from course_utils.grading.junit import junit
from course_utils.grading.page import page
from course_utils.grading.results import Result, Settings, to_json
from course_utils.grading.text import clean_result, file_name
from course_utils.grading.weights import Weights


def write_reports(out: Path, results: Iterable[Result], weights: Weights, settings: Settings) -> Path:
    """Write all reports; returns where the teacher's page is. The order of the results makes no difference."""
    results = sorted(map(clean_result, results), key=lambda result: (result.learner, result.chapter))
    write_atomically(out / "results.json", json.dumps(to_json(results, settings), ensure_ascii=False, indent=1) + "\n")
    write_atomically(out / "gradebook.csv", gradebook(results, weights))
    learners: dict[str, list[Result]] = {}
    for result in results:
        learners.setdefault(result.learner, []).append(result)
    for learner, own in learners.items():
        name = file_name(learner)
        write_atomically(out / "feedback" / f"{name}.md", feedback(own, weights))
        write_atomically(out / "junit" / f"{name}.xml", junit(own))
        write_atomically(out / "gradescope" / f"{name}.json", gradescope(own, weights))
    write_atomically(out / "report.html", page(results, weights))
    return out / "report.html"
