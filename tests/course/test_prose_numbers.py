"""The numbers that a chapter's prose states are those that its executed solution notebook shows."""

import sys
from pathlib import Path

import pytest

from course_utils.lint import read_lesson
from tests.conftest import ROOT
from tests.support.prose_numbers import compare

sys.path.insert(0, str(ROOT / "docs" / "site"))

from executed import common_hash, executed


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize(
    "lesson", sorted((ROOT / "chapters" / "src").glob("[0-9]*.md")), ids=lambda lesson: lesson.stem
)
def test_the_prose_states_what_the_notebook_shows(lesson: Path) -> None:
    text = (ROOT / "solutions" / f"{lesson.stem}.ipynb").read_text(encoding="utf-8")
    found = compare(read_lesson(lesson), executed(lesson.stem, text, common_hash(ROOT)))
    assert not found.problems, "\n".join(found.problems)
    assert found.compared, "no number of the prose was compared"
