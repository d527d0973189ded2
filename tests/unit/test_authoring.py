"""`course where` and `course new-exercise`, in a copy of the checkout's sources."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course_utils import authoring
from course_utils.places import CourseError
from tests.conftest import ROOT


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources that an author changes, elsewhere."""
    for folder in ("chapters", "course_utils", "solutions", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_where_names_the_line_of_each_piece() -> None:
    places = {place.piece: place for place in authoring.where("causal_mask")}
    assert list(places) == ["lesson", "solution", "check", "tests"]
    for piece, words in {
        "lesson": "from solutions.ch02_transformer import causal_mask",
        "solution": "def causal_mask(",
        "check": "def check_causal_mask(",
        "tests": "causal_mask",
    }.items():
        place = places[piece]
        assert words in place.path.read_text().splitlines()[place.line - 1]


def test_where_knows_every_exercise_or_says_so() -> None:
    with pytest.raises(CourseError, match="asks for an exercise named mask"):
        authoring.where("mask")


def test_a_new_exercise_is_begun_everywhere_and_holds_the_suite_until_it_is_written(clone: Path) -> None:
    places = authoring.new_exercise("02", "softcap", "sampling" if has("02", "sampling") else "layers")
    assert [place.piece for place in places] == ["lesson", "solution", "check", "tests"]
    for place in places:
        assert place.path.is_relative_to(clone)
        assert "softcap" in place.path.read_text().splitlines()[place.line - 1]
    words = "-q -p no:cacheprovider tests/test_checks.py --deselect tests/test_checks.py::test_stub -k".split()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "02-softcap or test_every_exercise_has_a_check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"},
    )
    failed = {line.split("::")[1].split("[")[0].split(" ")[0] for line in run.stdout.splitlines() if "FAILED" in line}
    assert "test_exercise" in failed  # the solution raises NotImplementedError
    assert "test_every_exercise_has_mistakes_surprises_and_another_right_answer" in failed
    assert "test_every_exercise_has_a_check_and_every_check_an_exercise" not in failed, run.stdout


def has(chapter: str, section: str) -> bool:
    return (ROOT / f"course_utils/checks/ch{chapter}/{section}.py").exists()


def test_the_section_must_be_named_where_there_are_several(clone: Path) -> None:
    with pytest.raises(CourseError, match=r"as --section NAME; chapter 02 has .*layers"):
        authoring.new_exercise("02", "softcap", None)


def test_a_section_that_is_new_is_noticed(clone: Path) -> None:
    """`--section sampeling` would go unseen."""
    assert authoring.begins_a_section(authoring.new_exercise("02", "softcap", "lairs"))
    assert not authoring.begins_a_section(authoring.new_exercise("02", "softcup", "layers"))
    lesson = next((clone / "chapters/src").glob("02_*.md")).read_text(encoding="utf-8")
    assert "### Exercise: `softcap`" in lesson


def test_names_are_refused_before_anything_is_written(clone: Path) -> None:
    before = {path: path.read_bytes() for path in clone.rglob("*.py")}
    for chapter, name, words in [
        ("02", "causal_mask", "There is an exercise named causal_mask"),
        ("02", "soft cap", "cannot be the name"),
        ("77", "softcap", "There is no lesson of chapter 77"),
    ]:
        with pytest.raises(CourseError, match=words):
            authoring.new_exercise(chapter, name, "layers")
    assert {path: path.read_bytes() for path in clone.rglob("*.py")} == before
