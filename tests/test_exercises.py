"""Every exercise: the reference passes its check, the stub counts as unsolved; `--notebook PATH` checks a learner.

With `--notebook` an exercise that is not written yet is skipped, and a wrong answer fails.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

from course_utils.checks import CheckFailed, NotWritten, find_checks, refuse_foreign, run_check
from course_utils.lint import read_lesson
from course_utils.notebook import CourseError, exercise, explained, load_notebook

EXERCISES = [(chapter, symbol) for chapter, checks in find_checks().items() for symbol in checks]
IDS = [f"{chapter}-{symbol}" for chapter, symbol in EXERCISES]


def file_of(chapter: str, folder: str, pattern: str) -> Path:
    (path,) = (ROOT / folder).glob(pattern.format(chapter))
    return path


def reference(chapter: str, symbol: str) -> Any:
    """The solution, from the chapter's module."""
    return getattr(importlib.import_module(f"solutions.{file_of(chapter, 'solutions', 'ch{}_*.py').stem}"), symbol)


@functools.cache
def loaded(path: Path, chapter: str) -> ModuleType:
    return load_notebook(path, find_checks()[chapter])


def from_notebook(path: Path, chapter: str, symbol: str) -> Any:
    """What stands in a notebook under that name."""
    found = exercise(loaded(path, chapter), symbol)
    refuse_foreign(symbol, found)
    return found


@pytest.mark.parametrize(("chapter", "symbol"), EXERCISES, ids=IDS)
def test_exercise(chapter: str, symbol: str, request: pytest.FixtureRequest) -> None:
    path: Path | None = request.config.getoption("--notebook")
    if path is not None and path.name[:2] != chapter:
        pytest.skip(f"{path.name} is not of chapter {chapter}")
    try:
        found = from_notebook(path, chapter, symbol) if path else reference(chapter, symbol)
        run_check(find_checks()[chapter][symbol], found)
    except NotWritten as error:
        if path is None:
            raise
        pytest.skip(str(error))
    except (CheckFailed, CourseError) as error:
        wrong_answer = path is not None and isinstance(error, CheckFailed)
        message = explained(loaded(path, chapter), symbol, str(error)) if wrong_answer else str(error)
        raise pytest.fail.Exception(message, pytrace=False) from None


@pytest.mark.parametrize(("chapter", "symbol"), EXERCISES, ids=IDS)
def test_stub_is_unsolved(chapter: str, symbol: str) -> None:
    stub = from_notebook(file_of(chapter, "chapters", "{}_*.ipynb"), chapter, symbol)
    with pytest.raises(NotWritten):
        run_check(find_checks()[chapter][symbol], stub)


def test_every_exercise_has_a_check_and_every_check_an_exercise() -> None:
    asked = {
        lesson.stem[:2]: [cell.source.split()[-1] for cell in read_lesson(lesson) if "exercise" in cell.tags]
        for lesson in (ROOT / "chapters/src").glob("[0-9][0-9]_*.md")
    }
    assert {c: sorted(symbols) for c, symbols in asked.items()} == {c: sorted(s) for c, s in find_checks().items()}


def test_names_of_exercises_are_unique_in_the_course() -> None:
    symbols = [symbol for _, symbol in EXERCISES]
    assert len(set(symbols)) == len(symbols)
