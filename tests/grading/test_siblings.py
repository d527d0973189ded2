"""One chapter of each part is graded like chapter 02, whoever hands in what."""

from pathlib import Path

import pytest

from course_utils.exercises import PARTS, course_exercises, part_of
from course_utils.grading.collect import collected
from course_utils.grading.grade import close_servers, grade_all, grade_one
from course_utils.grading.results import Result, Settings, Submission
from tests.grading import siblings, submissions
from tests.grading.siblings import SIBLINGS, Sibling
from tests.grading.submissions import Case, packed

pytestmark = pytest.mark.slow
NAMES = [case.learner for sibling in SIBLINGS for case in siblings.cases(sibling, Path("/nowhere"), 0)]


@pytest.fixture(scope="module")
def cases(outside: Path, port: int) -> dict[str, tuple[Sibling, Case]]:
    return {case.learner: (sibling, case) for sibling in SIBLINGS for case in siblings.cases(sibling, outside, port)}


@pytest.fixture(scope="module")
def graded(
    box: str, cases: dict[str, tuple[Sibling, Case]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("submissions")
    submissions.write(folder, [case for _, case in cases.values()])
    settings = Settings(timeout=12.0, sandbox=box, jobs=2)
    with collected(folder) as found:
        results = grade_all(found.submissions, tmp_path_factory.mktemp("report"), settings, lambda _: None)
    close_servers()
    return {result.learner: result for result in results}


def test_each_part_of_the_course_has_its_chapter() -> None:
    tried = {part_of(chapter) for chapter in [submissions.CHAPTER, *(sibling.chapter for sibling in SIBLINGS)]}
    assert len(NAMES) == len(set(NAMES)) >= 30 * len(SIBLINGS)
    assert tried == set(PARTS)
    assert all(set(sibling.right) <= set(sibling.symbols) for sibling in SIBLINGS)
    assert {sibling.chapter for sibling in SIBLINGS} <= course_exercises().keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_case_gets_the_states_it_should(
    name: str, cases: dict[str, tuple[Sibling, Case]], graded: dict[str, Result]
) -> None:
    (sibling, case), result = cases[name], graded[name]
    assert result.chapter == sibling.chapter
    assert {one.exercise: one.state for one in result.exercises} == {name: case.state(name) for name in sibling.symbols}
    about = next(one for one in result.exercises if one.exercise == sibling.symbol)
    assert case.words in about.message or any(case.words in problem for problem in result.problems), result
    assert "Traceback" not in about.message and "/tmp" not in about.message


def test_nothing_outside_was_touched(graded: dict[str, Result], outside: Path) -> None:
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "nobody's business"


def test_a_check_that_breaks_off_an_endless_answer_accuses_nobody() -> None:
    """Python stops tracing by itself there, in the learner's frame; this once passed for a trick."""
    endless = "def best_assignment(gain):\n    rows = 0\n    while True:\n        rows += 1"
    sibling = Sibling("06", "best_assignment", ())
    content = packed(sibling.partly(best_assignment=endless))
    given = Submission("ada", "06", Path(sibling.notebook), content)
    result = grade_one(given, Settings(sandbox="none"))
    close_servers()
    [own] = [one for one in result.exercises if one.exercise == "best_assignment"]
    assert (own.state, result.problems) == ("wrong", ()), own
    assert "it found no answer within" in own.message
