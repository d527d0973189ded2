"""What `course grade` does, from the submissions to the report."""

import contextlib
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from course_utils.grading import sandbox
from course_utils.grading.collect import collected, prepare_out
from course_utils.grading.grade import grade_all, grade_one
from course_utils.grading.reports import write_reports
from course_utils.grading.results import Result, Settings
from course_utils.grading.weights import difficulty_weights, read_weights
from course_utils.places import CourseError


def grade(
    source: Path, out: Path, jobs: int | None, resume: bool, timeout: float, weights: Path | None, scheduler: str | None
) -> int:
    """Grade all submissions and write the report; 0 when that is done, whatever the learners got right.

    Raises CourseError, before any work starts, where something is not as it should be.
    """
    if not 0 < timeout < math.inf or (jobs is not None and jobs < 1):
        raise CourseError("--timeout and --jobs need a number above 0.")
    worth = difficulty_weights() if weights is None else read_weights(weights)
    with contextlib.ExitStack() as stack:
        submissions, ignored = stack.enter_context(collected(source))
        prepare_out(out, source, resume)
        if scheduler is None:
            (box, why), way, cores = sandbox.choose(), grade_one, os.cpu_count() or 1
        else:
            from course_utils.grading.cluster import connect

            cluster = stack.enter_context(connect(scheduler))
            (box, why), way, cores = cluster.sandbox(), cluster.grade, cluster.jobs()
        if box == "none":
            advice = "Install bubblewrap, or grade" if "not installed" in why else "Grade"
            print(
                f"Warning: no sandbox ({why}). Notebooks run with limits on time and memory only: they can read your "
                f"files and use the network. {advice} only what you trust.",
                file=sys.stderr,
            )
        if ignored:
            print(f"Not of any chapter, and left out: {', '.join(ignored[:5])}{', ...' * (len(ignored) > 5)}")
        without = [one.learner for one in submissions if one.missing]
        if without:
            print(f"Without a notebook; the report says what there is instead: {', '.join(without)}")
        settings = Settings(timeout=timeout, sandbox=box, jobs=jobs or cores, resume=resume)
        with tqdm(total=len(submissions), unit="notebook", smoothing=0.1) as bar:

            def on_result(result: Result) -> None:
                bar.set_postfix_str(f"{result.learner} {result.chapter}", refresh=False)
                bar.update()

            results = grade_all(submissions, out, settings, on_result, way)
    page = write_reports(out, results, worth, settings)
    print(f"{len(results)} notebook{'s' * (len(results) != 1)} graded; the report: {page}")
    return 0
