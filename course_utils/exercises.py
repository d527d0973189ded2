"""The exercises of each chapter as its notebook announces them: how hard, how long, on the core path or not."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from course_utils.places import chapters_folder


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


@functools.cache
def course_exercises() -> Mapping[str, tuple[Exercise, ...]]:
    """Those of all chapters, by number."""
    return {path.stem[:2]: exercises_of(path) for path in sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))}
