"""A second sitting: what the second half of a notebook needs is made again, and no more."""

import types
from pathlib import Path
from typing import Any

import nbformat
import pytest

from course_utils import resume as module
from course_utils.exercises import Exercise
from course_utils.resume import resume

ABOVE = [
    "from math import floor\nfrom course_utils.resume import resume",
    "def double(x):\n    return FACTOR * floor(x)",
    "FACTOR = 2\ndata = [1, 2]\nlooked_at = []",
    "data.append(double(3.5))",
    "raise SystemExit('a demo')",
    "unused = open('/nowhere')",
    "def stub():\n    raise NotImplementedError('stub')",
    "waiting = stub()",
]
BELOW = ["def again(x):\n    return double(x)", "print(again(1), data)\nown = 1", "print(own, waiting)\ndata = 5"]


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a kernel that was just started beside a saved notebook."""
    (tmp_path / "work").mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in [*ABOVE, 'resume("07")', *BELOW]]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "work/07_toy.ipynb")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"resume": resume}
    monkeypatch.setattr(module, "get_ipython", lambda: types.SimpleNamespace(user_ns=space))
    return space


def test_what_the_cells_below_need_is_made(space: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    resume("07")
    assert space.keys() == {"resume", "double", "data"} and space["data"] == [1, 2, 6] and space["double"](4) == 8
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Running what the second half needs of 07_toy.ipynb ...", "2 names are back."]
    assert len(lines) == 3 and lines[2].startswith("  without waiting: code cell 8 of 07_toy.ipynb")


def test_an_optional_exercise_that_was_skipped_is_no_alarm(
    space: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = {"07": (Exercise("stub", 1, 5, optional=True), Exercise("core", 1, 5, optional=False))}
    monkeypatch.setattr(module, "course_exercises", lambda: course)
    above = [
        *ABOVE,
        "made_of_it = waiting + 1",
        "def core():\n    raise NotImplementedError('core')",
        "needed = core()",
    ]
    cells = [*above, 'resume("07")', *BELOW, "print(made_of_it, needed)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    nbformat.write(notebook, tmp_path / "work/07_toy.ipynb")
    resume("07")
    alarm, calm = capsys.readouterr().out.splitlines()[2:]
    assert alarm.startswith("  without needed: code cell 11") and "core" in alarm
    assert calm == (
        "Left out: what needs the optional exercises that you have not written (stub). The core path does not need it."
    )


def test_after_run_all_nothing_is_done(space: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    mine = object()
    space.update(double=mine, data=[], waiting=1)
    resume("07")
    assert space["double"] is mine and space["data"] == []
    assert capsys.readouterr().out == "Everything from above is here.\n"


def test_without_a_notebook_it_says_what_to_do(
    space: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "work/07_toy.ipynb").unlink()
    resume("07")
    assert "run the cells above this one instead" in capsys.readouterr().out and space.keys() == {"resume"}
    space["In"] = ["cell"] * 50
    resume("07")
    assert capsys.readouterr().out == "", "the cells above have run"


def test_outside_of_a_kernel_it_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    resume("07")
    assert capsys.readouterr().out == ""
