"""Guesses: what can be written, how near it came, where it is kept, and that nothing else minds them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from course_utils import files, guesses
from course_utils.guesses import FILE, guess, kept, my_guesses, reveal, summary
from course_utils.notebook import load_notebook
from course_utils.places import CourseError
from course_utils.questions import Cells, Choice, Number, Score
from tests.conftest import ROOT

PATTERN = """
x..
xx.
"""
Said = Callable[[], str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a kernel that has just started."""
    monkeypatch.chdir(tmp_path)
    restart(monkeypatch)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What was shown since this was asked last, as text."""
    return lambda: capsys.readouterr().out.rstrip("\n")


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "_session", guesses.Session())


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "given", "read"),
    [
        (Number("nats"), 3, 3),
        (Number("nats"), torch.tensor(2.5, requires_grad=True), 2.5),
        (Number("nats"), np.float64(0.5), 0.5),
        (Choice([1, True, "Layer 0"]), True, True),
        (Choice(["Layer 0", "layer 1"]), " layer  0", "Layer 0"),
        (Choice([0, 1]), torch.tensor(1), 1),
        (Cells(2, 3), PATTERN, ["x..", "xx."]),
        (Cells(2, 3), ["X . .", "XX."], ["x..", "xx."]),
        (Cells(2, 3), [(0, 0), (1, 0), (1, 1)], ["x..", "xx."]),
        (Cells(2, 3), {(0, 0), (1, 1)}, ["x..", ".x."]),
        (Cells(2, 3), (1, 2), ["...", "..x"]),
        (Cells(2, 3), [], ["...", "..."]),
        (Cells(2, 3), torch.tensor([[0, 1], [1, 2]]), [".x.", "..x"]),
        (Cells(2, 3), torch.tensor([[True, False, False], [True, True, False]]), ["x..", "xx."]),
        (Cells(2, 2), np.eye(2) > 0, ["x.", ".x"]),
    ],
)
def test_answers_are_read(question: Any, given: Any, read: Any) -> None:
    found = question.read(given)
    assert found == read and type(found) is type(read)
    assert question.read(json.loads(json.dumps(found))) == read


SIZE = r"draw 2 rows of 3 cells with `\.` and `x`, or list pairs \(row, column\), such as \[\(0, 1\), \(2, 0\)\]\.$"


@pytest.mark.parametrize(
    ("answer", "keywords", "words"),
    [
        ("3", {}, r"04.a: '3' is a text: write a number without quotes, such as 2\.5\.$"),
        (True, {}, r"04.a: True is not a number: write a number, such as 2\.5\.$"),
        ([3] * 100, {}, r"04.a: \[3, 3, .{40,60}\.\.\. is not a number: write"),
        (None, {}, r"04.a: None is not a number"),
        (float("nan"), {}, r"04.a: nan is not finite: write a number"),
        (float("inf"), {}, r"04.a: inf is not finite"),
        ("c", {"choices": ("a", "b")}, r"04.a: 'c' is not offered: write one of 'a', 'b'\.$"),
        (1, {"choices": (True, False)}, r"04.a: 1 is not offered: write one of True, False\.$"),
        ("x..", {"cells": (2, 3)}, f"04.a: the drawing has 1 row: {SIZE}"),
        ("x..\nxx", {"cells": (2, 3)}, f"04.a: row 1 of the drawing has 2 cells: {SIZE}"),
        ("xo.\nxxx", {"cells": (2, 3)}, f"04.a: row 0 of the drawing is 'xo.': {SIZE}"),
        ("", {"cells": (2, 3)}, r"04.a: row 0 of the drawing is"),
        (3, {"cells": (2, 3)}, f"04.a: 3 is no pattern: {SIZE}"),
        ([(0, 1, 2)], {"cells": (2, 3)}, r"04.a: \(0, 1, 2\) is no cell: draw"),
        ([(0, 3)], {"cells": (2, 3)}, r"04.a: \(0, 3\) lies outside of the grid: rows go from 0 to 1 and columns from"),
        (3, {"unit": "cm", "cells": (2, 3)}, "04.a: a question has a unit, choices or cells, and no two of them"),
        (3, {"cells": (2, 0)}, r"04.a: `cells` are two sizes, \(rows, columns\)\.$"),
    ],
)
def test_what_is_no_answer_is_refused_in_a_sentence(
    folder: Path, answer: Any, keywords: dict[str, Any], words: str
) -> None:
    with pytest.raises(CourseError, match=words) as error:
        guess("04.a", answer, **keywords)
    assert error.value._render_traceback_() == [str(error.value)] and "\n" not in str(error.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["loss", "4.loss", "04", "04.", "04.the loss"])
def test_a_name_begins_with_its_chapter(name: str) -> None:
    with pytest.raises(CourseError, match=r"cannot name a guess: begin with the chapter, as in '04.loss'\.$"):
        guess(name, ...)


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "guessed", "measured", "score"),
    [
        (Number("nats"), 7, 7.05, Score("right", "right")),
        (Number("nats"), 6, 7.05, Score("close", "close, 1.05 nats too low")),
        (Number("nats"), 8.8, 7.05, Score("close", "close, 1.75 nats too high")),
        (Number("nats"), 8.9, 7.05, Score("off", "off by a factor of 1.3, 1.85 nats too high")),
        (Number(""), 12, 50, Score("off", "off by a factor of 4.2, 38 too low")),
        (Number(""), 1, 400_000, Score("off", "off by a factor of 400,000, 399,999 too low")),
        (Number(""), -12, -50, Score("off", "off by a factor of 4.2, 38 too high")),
        (Number("%"), 20, 50, Score("off", "off by a factor of 2.5, 30 points too low")),
        (Number("nats"), 1, -2.5, Score("off", "the other sign, 3.5 nats too high")),
        (Number(""), 0, 0.02, Score("off", "off, 0.02 too low")),
        (Number(""), 2, 0, Score("off", "off, 2 too high")),
        (Number(""), 0, 0.0, Score("right", "right")),
        (Choice(["a", "b"]), "a", "a", Score("right", "right")),
        (Choice(["a", "b"]), "a", "b", Score("off", "wrong")),
        (Cells(2, 2), ["x.", "xx"], ["x.", "xx"], Score("right", "right, an overlap of 1.00")),
        (Cells(2, 2), ["x.", "xx"], ["x.", "x."], Score("close", "close, an overlap of 0.67")),
        (Cells(2, 2), ["x.", ".."], [".x", "x."], Score("off", "off, an overlap of 0.00")),
        (Cells(2, 2), ["..", ".."], ["..", ".."], Score("right", "right, an overlap of 1.00")),
    ],
)
def test_scores(question: Any, guessed: Any, measured: Any, score: Score) -> None:
    assert question.score(guessed, measured) == score


def test_near_zero_a_difference_can_be_allowed(said: Said) -> None:
    guess("04.a", 0)
    reveal("04.a", 0.02)
    reveal("04.a", 0.02, within=0.05)
    assert said().splitlines()[1:] == [
        "Off, 0.02 too low. You guessed 0; measured: 0.02.",
        "Right. You guessed 0; measured: 0.02.",
    ]


# --- what is shown --------------------------------------------------------------------------------------------------


def test_dots_pass_silently_and_write_nothing(folder: Path, said: Said) -> None:
    guess("04.a", ..., unit="nats")
    guess("04.b", ..., choices=("a", "b"))
    guess("04.c", ..., cells=(3, 3))
    assert said() == ""
    reveal("04.a", torch.tensor(7.05))
    reveal("04.b", "b")
    reveal("04.c", torch.eye(3) > 0)
    assert said().splitlines() == [
        "Measured: 7.05 nats (no guess).",
        "Measured: b (no guess).",
        "Measured: (0, 0), (1, 1), (2, 2) (no guess).",
    ]
    my_guesses("04")
    assert said() == "You have made no guesses in this chapter: write them in place of the dots in `guess(...)`."
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (3, "3"),
        ("b", "b"),
        (torch.ones(2, 2) > 0, "(0, 0), (0, 1), (1, 0), (1, 1)"),
        (torch.ones(3, 3) > 0, "9 of 9 cells"),
    ],
)
def test_a_result_whose_guess_has_not_run(truth: Any, words: str, said: Said) -> None:
    reveal("04.a", truth)
    assert said() == f"Measured: {words} (no guess)."


def test_a_guess_beside_the_result(said: Said) -> None:
    guess("04.a", 6, unit="nats")
    reveal("04.a", torch.tensor(7.0))
    assert said() == "Noted: 6 nats.\nClose, 1 nats too low. You guessed 6 nats; measured: 7 nats."
    guess("04.c", PATTERN, cells=(2, 3))
    reveal("04.c", torch.tensor([[True, False, False], [True, False, True]]))
    assert said().splitlines() == [
        "Noted: (0, 0), (1, 0), (1, 1).",
        "x..",
        "xx.",
        "Close, an overlap of 0.50. You guessed (0, 0), (1, 0), (1, 1); measured: (0, 0), (1, 0), (1, 2).",
        "your guess   measured",
        "x..          x..",
        "xx.          x.x",
    ]


def test_a_result_that_does_not_answer_the_question() -> None:
    guess("04.a", ..., choices=("a", "b"))
    with pytest.raises(CourseError, match=r"^04.a: the result does not answer the question, for 'c' is not offered\.$"):
        reveal("04.a", "c")


def test_the_html_escapes_and_leaves_text_and_ground_to_the_theme(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(guesses, "_show", lambda text, html: shown.append(html))
    guess("04.a", "<b>", choices=("<b>", "c"))
    reveal("04.a", "c")
    guess("04.c", PATTERN, cells=(2, 3))
    reveal("04.c", [(0, 0), (1, 2)])
    my_guesses("04")
    assert not any(
        "<b>" in html.replace("<b>Wrong.</b>", "").replace("<b>Off, an overlap of 0.25.</b>", "") for html in shown
    )
    assert shown[3].count("×</td>") == 3 and shown[3].count("background:#3b7dbd;color:white") == 2
    assert sum(html.count("color:") for html in shown) == 2 + shown[4].count('<span style="color:')


def test_the_first_guess_that_met_the_result_counts(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    guess("04.a", 5)
    guess("04.a", 6)  # before the result one may change one's mind
    reveal("04.a", 10)
    restart(monkeypatch)
    said()
    guess("04.a", 10)
    assert said() == "You have seen the result, so your first guess counts: 6."
    reveal("04.a", 10)
    assert said() == "Off by a factor of 1.7, 4 too low. You guessed 6; measured: 10."
    guess("04.a", 6)
    guess("04.a", ...)
    assert said() == ""


def test_another_question_of_the_same_name_begins_anew(said: Said) -> None:
    guess("04.a", 5)
    reveal("04.a", 10)
    guess("04.a", ..., choices=("x", "y"))
    said()
    reveal("04.a", "x")
    assert said() == "Measured: x (no guess)."
    guess("04.a", "y", choices=("x", "y"))
    reveal("04.a", "x")
    assert said() == "Noted: y.\nWrong. You guessed y; measured: x."


def test_the_table_of_a_chapter(said: Said) -> None:
    guess("04.much_more", 10, unit="cm")
    guess("04.layer", "a", choices=("a", "b"))
    guess("04.heads", 9)
    guess("04.left_out", ...)
    guess("04.later", 1)
    guess("05.other", 1)
    reveal("04.much_more", 100)
    reveal("04.layer", "a")
    reveal("04.heads", 10)
    said()
    my_guesses("04")
    assert said().splitlines() == [
        "question    your guess   measured   verdict",
        "much more   10 cm        100 cm     off by a factor of 10, 90 cm too low",
        "layer       a            a          right",
        "heads       9            10         close, 1 too low",
        "later       1                       no result yet",
        "",
        "Your intuition was right in 1 of 3: layer. It was close in 1: heads. "
        "Look again at what surprised you: much more. Not answered: left out.",
        guesses.RULE,
    ]
    my_guesses("05")
    assert said().splitlines()[3] == "None of your guesses has met its result yet."


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_guesses_are_kept_beside_the_notebook(folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    guess("04.a", 6, unit="nats")
    guess("04.b", "x", choices=("x", "y"))
    guess("04.c", PATTERN, cells=(2, 3))
    reveal("04.c", [(0, 0)])
    assert [path.name for path in folder.iterdir()] == [FILE]
    restart(monkeypatch)
    said()
    reveal("04.a", 6.1)  # its cell alone, without that of the guess
    assert said() == "Right. You guessed 6 nats; measured: 6.1 nats."
    found = kept(folder)
    assert found.keys() == {"04.a", "04.b", "04.c"} and found["04.c"].score == Score("off", "off, an overlap of 0.33")
    assert summary(found, "04") == "guesses: 3, 1 right, 0 close" and summary(found, "05") == ""


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"04.a": 3}',
        '{"04.a": {}}',
        '{"04.a": {"question": {"unit": ""}, "guess": "x", "measured": null, "score": null}}',
        '{"04.a": {"question": {"size": 2}, "guess": 1, "measured": null, "score": null}}',
        '{"04.a": {"question": {"unit": ""}, "guess": 1, "measured": 2, "score": ["best", "best"]}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_file_is_set_aside(folder: Path, text: str | bytes, said: Said) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "guesses-damaged-1.json").write_text("older")
    (folder / FILE).write_bytes(content)
    guess("04.b", 2)
    assert said().splitlines() == [
        "guesses.json could not be read. It is now guesses-damaged-2.json, and your guesses begin anew.",
        "Noted: 2.",
    ]
    assert (folder / "guesses-damaged-1.json").read_text() == "older"
    assert (folder / "guesses-damaged-2.json").read_bytes() == content
    assert kept(folder).keys() == {"04.b"}


@pytest.mark.parametrize("damaged", [False, True])
def test_where_nothing_can_be_written(folder: Path, damaged: bool, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    if damaged:
        (folder / FILE).write_text("{")
    before = [path.name for path in folder.iterdir()]
    monkeypatch.setattr(files.tempfile, "mkstemp", refused)
    monkeypatch.setattr(guesses.os, "replace", refused)
    guess("04.a", 6)
    reveal("04.a", 6)
    guess("04.b", 2)
    my_guesses("04")
    lines = said().splitlines()
    assert lines[:4] == [
        "guesses.json cannot be written here (Permission denied), so your guesses end with this kernel.",
        "Noted: 6.",
        "Right. You guessed 6; measured: 6.",
        "Noted: 2.",
    ]
    assert lines[5].split() == "a 6 6 right".split() and not any("cannot" in line for line in lines[4:])
    assert [path.name for path in folder.iterdir()] == before


# --- the rest of the course -----------------------------------------------------------------------------------------


IMPORT = "from course_utils.guesses import guess, my_guesses, reveal"


@pytest.mark.parametrize("answer", ["3", "'three'", "...", "3 nats", "1 / 0"])
def test_a_notebook_that_is_read_for_its_answers_guesses_nothing(folder: Path, answer: str, said: Said) -> None:
    cells = [
        IMPORT,
        f"guess('04.a', {answer})",
        "X = 2",
        "reveal('04.a', X)\nY = reveal('04.a', X)",
        f"Z = guess('04.b', {answer})",
        "def double(x):\n    guess('04.c', 1)\n    return X * x if Z is None else Y",
        "my_guesses('04')",
    ]
    notebook = folder / "04_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), notebook)
    module = load_notebook(notebook, ["double"])
    if answer in ("3", "'three'", "..."):
        assert module.double(4) == 8 and not module.__broken__
    assert hasattr(module, "X") and said() == "" and [path.name for path in folder.iterdir()] == ["04_x.ipynb"]


def test_run_all(folder: Path) -> None:
    cells = ["%load_ext course_utils", IMPORT, "guess('04.a', ...)", "reveal('04.a', 3)", "my_guesses('04')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, startup_timeout=600).execute()
    assert not list(folder.iterdir())
    [quiet] = notebook.cells[3].outputs
    assert quiet.data["text/plain"] == "Measured: 3 (no guess)." and "no guess" in quiet.data["text/html"]
    notebook.cells[2].source = "guess('04.a', '3')"
    with pytest.raises(CellExecutionError):
        NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, startup_timeout=600).execute()
    [error] = notebook.cells[2].outputs
    assert error.traceback == ["04.a: '3' is a text: write a number without quotes, such as 2.5."]


def test_importing_costs_little() -> None:
    heavy = "torch", "plotly", "numpy", "IPython", "nbformat"
    code = f"import sys, course_utils.guesses; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
