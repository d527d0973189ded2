"""The four parts of the course, and each chapter's exercises as its notebook announces them."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from course_utils.places import chapters_folder


class CoursePart(NamedTuple):
    """Some chapters in a row that belong together."""

    numeral: str
    title: str
    chapters: range

    @property
    def heading(self) -> str:
        return f"{self.numeral} · {self.title}"


PARTS = (
    CoursePart("I", "From text to circuits", range(6)),
    CoursePart("II", "What is represented?", range(6, 10)),
    CoursePart("III", "Circuits of features, and asking", range(10, 12)),
    CoursePart("IV", "Whole algorithms", range(12, 15)),
)


def part_of(chapter: str) -> CoursePart:
    """The part to which a chapter belongs, named by number ("04"). Raises LookupError for a chapter beyond the last."""
    for part in PARTS:
        if int(chapter) in part.chapters:
            return part
    raise LookupError(f"no part of the course has a chapter {chapter}: add it to PARTS in course_utils/exercises.py")


def by_part(chapters: Iterable[str]) -> dict[CoursePart, list[str]]:
    """These chapters, sorted, under the parts that they belong to; parts that have none of them are left out."""
    found: dict[CoursePart, list[str]] = {}
    for chapter in sorted(chapters):
        found.setdefault(part_of(chapter), []).append(chapter)
    return found


@dataclass(frozen=True)
class Exercise:
    """An exercise as its lesson announces it."""

    name: str
    difficulty: int  # 1 to 5
    minutes: int
    optional: bool  # not on the core path


def exercises_of(notebook: Path) -> tuple[Exercise, ...]:
    """The exercises of a notebook that the course hands out, in the order of the lesson."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    marked = [cell["metadata"]["course"] for cell in cells if "course" in cell["metadata"]]
    return tuple(Exercise(m["exercise"], m["difficulty"], m["minutes"], m.get("optional", False)) for m in marked)


def title_of(cells: Sequence[Mapping[str, Any]]) -> str:
    """The number and title that a chapter's first cell states, such as "04 Induction heads"; no subtitle."""
    return "".join(cells[0]["source"]).partition("\n")[0].lstrip("# ").partition(":")[0].replace(" ·", "")


@functools.cache
def chapter_titles() -> Mapping[str, str]:
    """Those of all chapters, by number."""
    read = {path.stem[:2]: path.read_text(encoding="utf-8") for path in chapters_folder().glob("[0-9][0-9]_*.ipynb")}
    return {number: title_of(json.loads(text)["cells"]) for number, text in sorted(read.items())}


@functools.cache
def course_exercises() -> Mapping[str, tuple[Exercise, ...]]:
    """Those of all chapters, by number."""
    return {path.stem[:2]: exercises_of(path) for path in sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))}
