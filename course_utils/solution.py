"""`course solution NAME`: the reference solution of an exercise, and where it stands."""

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from course_utils.build import definition, first_line, full_source
from course_utils.exercises import course_exercises
from course_utils.places import CourseError, chapters_folder, verify_solutions


class Solution(NamedTuple):
    """A reference solution; the wheel brings it too, so it is there without a checkout."""

    source: str
    path: Path
    line: int
    notebook: Path  # the chapter with all solutions in place


def solution(name: str) -> Solution:
    """The reference solution of that exercise. Raises CourseError for a name that no exercise has."""
    chapters = {exercise.name: number for number, own in course_exercises().items() for exercise in own}
    if name not in chapters:
        nearest = ", ".join(get_close_matches(name, chapters, n=3, cutoff=0.0))
        raise CourseError(f"There is no exercise named {name}; the nearest are {nearest}.")
    verify_solutions()
    spec = find_spec("solutions")
    assert spec is not None and spec.origin is not None  # verified above
    folder = Path(spec.origin).parent
    stem = next(chapters_folder().glob(f"{chapters[name]}_*.ipynb")).stem
    path = folder / f"ch{stem}.py"
    text = path.read_text(encoding="utf-8")
    return Solution(full_source(text, name), path, first_line(definition(text, name)), folder / f"{stem}.ipynb")


def described(found: Solution) -> str:
    """The source, and below it where it stands; paths are short where they are below the current folder."""
    here = Path.cwd()
    path, notebook = (
        one.relative_to(here) if one.is_relative_to(here) else one for one in (found.path, found.notebook)
    )
    return f"{found.source}\n\nIt stands in {path}:{found.line}, and in its place in {notebook}"
