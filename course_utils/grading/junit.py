"""JUnit XML: what continuous integration reads. One file for each learner, one suite for each chapter."""

from collections.abc import Sequence
from xml.etree import ElementTree

from course_utils.grading.results import Result

COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}
KIND = {"correct": None, "wrong": "failure", "not written yet": "skipped"}  # any other state is an error


def junit(results: Sequence[Result]) -> str:
    """One learner's results: wrong is a failure, not written yet is skipped, what could not be judged is an error."""
    suites = ElementTree.Element("testsuites", name="Circuits from Scratch")
    for result in results:
        kinds = [KIND.get(e.state, "error") for e in result.exercises]
        counts = {word: str(kinds.count(kind)) for word, kind in COUNTS.items()}
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            {"name": f"chapter {result.chapter}", "tests": str(len(kinds)), **counts, "time": f"{result.seconds:.3f}"},
        )
        for exercise, kind in zip(result.exercises, kinds, strict=True):
            names = {"classname": f"chapter_{result.chapter}", "name": exercise.exercise}
            case = ElementTree.SubElement(suite, "testcase", names, time=f"{exercise.seconds:.3f}")
            if kind:
                first = exercise.message.partition("\n")[0]
                outcome = ElementTree.SubElement(case, kind, message=first)
                if kind != "skipped":
                    outcome.set("type", exercise.state)
                    outcome.text = exercise.message
        if result.problems:
            ElementTree.SubElement(suite, "system-err").text = "\n".join(result.problems)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"
