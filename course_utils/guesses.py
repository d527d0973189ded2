"""Guesses that a learner writes into a notebook before the result is there, and what came of them.

    guess("04.first_half", ..., unit="nats")     the learner writes a number in place of the dots, which pass silently
    reveal("04.first_half", loss)                in the cell of the result: shows the guess beside it
    my_guesses("04")                             the last cell of a chapter: all of them in a table

They are kept in `guesses.json` beside the notebook, for another session and for `course status`. Where a notebook is
only read for its answers (`course check`, the grader, a later chapter), guesses do nothing at all.
"""

import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from course_utils.files import write_atomically
from course_utils.places import CourseError
from course_utils.questions import RULE, Cells, Question, Refused, Rows, Score, question, question_about, short

FILE = "guesses.json"
COLOURS = {"right": "#3b7dbd", "close": "#d98b1f", "off": "#8a8a8a"}  # they show on white and on black


# --- in the notebook ------------------------------------------------------------------------------------------------


def guess(name: str, answer: Any, *, unit: str = "", choices: Sequence[Any] = (), cells: Sequence[int] = ()) -> None:
    """Note your guess before you see the result: write it in place of the dots, which mean that you make none.

    It is a number, or one of the `choices`, or, with `cells=(rows, columns)`, a pattern: a text with a line of `.` and
    `x` for each row, or a list of pairs (row, column). The first guess that meets the result is the one that counts.
    """
    if _only_read():
        return
    if not re.fullmatch(r"\d\d\.\w+", name):
        raise CourseError(f"{short(name)} cannot name a guess: begin with the chapter, as in '04.loss'.")
    try:
        asked = question(unit, choices, cells)
        guessed: Any = answer if answer is ... else asked.read(answer)
    except (Refused, ValueError) as error:
        raise CourseError(f"{name}: {error}") from None
    _session.questions[name] = asked
    if answer is ...:
        return
    before = _session.all().get(name)
    if before and before.score and before.question == asked:
        if before.guess != guessed:
            print(f"You have seen the result, so your first guess counts: {asked.words(before.guess)}.")
        return
    _session.keep(name, Kept(asked, guessed))
    drawing = guessed if isinstance(asked, Cells) else []
    said = f"Noted: {asked.words(guessed)}."
    _show("\n".join([said, *drawing]), _paragraph(said) + _grid(drawing, drawing and _nothing(drawing)))


def reveal(name: str, truth: Any, *, within: int | float = 0) -> None:
    """Show the guess of that name beside what was measured: a number, a choice or a pattern, perhaps in a tensor.

    Numbers that differ by no more than `within` count as equal, for a truth that is nearly zero.
    """
    if _only_read():
        return
    one = _session.all().get(name)
    asked = _session.questions.get(name) or (one.question if one else question_about(truth))
    try:
        measured: Any = asked.read(truth)
    except Refused as error:
        raise CourseError(f"{name}: the result does not answer the question, for {error.problem}.") from None
    if one is None or one.question != asked:
        said = f"Measured: {asked.words(measured)} (no guess)."
        _show(said, _paragraph(said, "opacity:.7"))
        return
    one = Kept(asked, one.guess, measured, asked.score(one.guess, measured, within))
    _session.keep(name, one)
    _show(*_compared(one))


def my_guesses(chapter: str) -> None:
    """Show a chapter's guesses beside what was measured, and say where your intuition was right."""
    if _only_read():
        return
    own = {name: one for name, one in _session.all().items() if name.startswith(f"{chapter}.")}
    open_ = [name for name in _session.questions if name.startswith(f"{chapter}.") and name not in own]
    _show(*_table(own, open_))


def _only_read() -> bool:
    """Whether `load_notebook` reads the calling cell for its answers, so that nobody guesses."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if "__notebook__" in frame.f_globals:
            return True
    return False


# --- what is kept ---------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A guess, and what was measured since."""

    question: Question
    guess: Any
    measured: Any = None
    score: Score | None = None

    def to_json(self) -> dict[str, Any]:
        """What the file holds of it."""
        asked = {"cells": self.question} if isinstance(self.question, Cells) else self.question._asdict()
        return {**self._asdict(), "question": asked}


def from_json(data: Mapping[str, Any]) -> Kept:
    """What the file says of a guess. Raises an error of some kind where it is none."""
    asked = question(**data["question"])
    guessed = asked.read(data["guess"])
    if data["score"] is None:
        return Kept(asked, guessed)
    score = Score(*data["score"])
    COLOURS[score.grade]  # there is no other grade
    return Kept(asked, guessed, asked.read(data["measured"]), score)


def kept(folder: Path) -> dict[str, Kept]:
    """The guesses that a folder keeps, by name. Raises CourseError where they cannot be read."""
    path = folder / FILE
    try:
        return {name: from_json(data) for name, data in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, Refused):
        raise CourseError(f"{path} cannot be read: delete it, and your guesses begin anew.") from None


def summary(guesses: Mapping[str, Kept], chapter: str) -> str:
    """How many of a chapter's guesses there are and how many were right, in a line; nothing where there are none."""
    own = [one for name, one in guesses.items() if name.startswith(f"{chapter}.")]
    grades = [one.score.grade for one in own if one.score]
    return f"guesses: {len(own)}, {grades.count('right')} right, {grades.count('close')} close" if own else ""


class Session:
    """What this kernel knows beside the file: the questions it has met, and guesses that could not be written."""

    def __init__(self) -> None:
        self.questions: dict[str, Question] = {}
        self.unwritten: dict[str, Kept] = {}
        self.warned = False

    def all(self) -> dict[str, Kept]:
        """Every guess. A file that cannot be read is set aside."""
        folder = Path.cwd()
        try:
            return kept(folder) | self.unwritten
        except CourseError:
            names = (f"guesses-damaged-{number}.json" for number in itertools.count(1))
            aside = next(folder / name for name in names if not (folder / name).exists())
            try:
                os.replace(folder / FILE, aside)
                print(f"{FILE} could not be read. It is now {aside.name}, and your guesses begin anew.")
            except OSError as error:
                self.warn(error)
            return dict(self.unwritten)

    def keep(self, name: str, one: Kept) -> None:
        """Write a guess to the file; where nothing can be written, it lasts as long as the kernel."""
        guesses = self.all()
        if guesses.get(name) == one:
            return
        guesses[name] = one
        data = {name: each.to_json() for name, each in guesses.items()}
        try:
            write_atomically(Path.cwd() / FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
            self.unwritten.clear()
        except OSError as error:
            self.unwritten[name] = one
            self.warn(error)

    def warn(self, error: OSError) -> None:
        """Say once that guesses are not kept."""
        if not self.warned:
            print(f"{FILE} cannot be written here ({error.strerror}), so your guesses end with this kernel.")
        self.warned = True


_session = Session()


# --- what is shown --------------------------------------------------------------------------------------------------


class Shown:
    """A text, and the same for notebooks: without colours of its own for text and ground, so as to fit any theme."""

    def __init__(self, text: str, html: str) -> None:
        self.text, self.html = text, html

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def _show(text: str, html: str) -> None:
    from IPython.display import display

    display(Shown(text, html))


def _compared(one: Kept) -> tuple[str, str]:
    """One guess beside the result, as text and as HTML."""
    assert one.score
    verdict = f"{one.score.words[0].upper()}{one.score.words[1:]}."
    said = f"You guessed {one.question.words(one.guess)}; measured: {one.question.words(one.measured)}."
    text, grid = f"{verdict} {said}", ""
    if isinstance(one.question, Cells):
        width = max(len("your guess"), one.question.columns)
        rows = zip(["your guess", *one.guess], ["measured", *one.measured], strict=True)
        text = "\n".join([text, *(f"{left:<{width}}   {right}" for left, right in rows)])
        grid = _grid(one.guess, one.measured) + _paragraph("× your guess, filled: measured", "opacity:.7")
    style = f"border-left:4px solid {COLOURS[one.score.grade]};padding:2px 0 2px 12px;margin:4px 0"
    said = f"<b>{escape(verdict)}</b> {escape(said)}"
    return text, f'<div style="{style}"><div>{said}</div>{grid}</div>'


def _table(own: Mapping[str, Kept], unanswered: Sequence[str]) -> tuple[str, str]:
    """All guesses of a chapter, as text and as HTML."""
    heads = ("question", "your guess", "measured", "verdict")
    rows, grades = [], []
    for name, one in own.items():
        asked, seen = one.question, one.score
        grades.append(seen.grade if seen else "")
        measured, verdict = (asked.words(one.measured), seen.words) if seen else ("", "no result yet")
        rows.append((_bare(name), asked.words(one.guess), measured, verdict))
    said = _sentences(own, unanswered)
    if not own:
        return said, _paragraph(said, "opacity:.7")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["   ".join(map(str.ljust, row, widths)).rstrip() for row in [heads, *rows]]
    cell = "text-align:left;padding:3px 16px 3px 0"
    html = "".join(f'<th style="{cell}">{head}</th>' for head in heads)
    for row, grade in zip(rows, grades, strict=True):
        *first, verdict = (escape(text) for text in row)
        mark = f'<span style="color:{COLOURS[grade]}">●</span> ' if grade else ""
        html += "</tr><tr>" + "".join(f'<td style="{cell}">{text}</td>' for text in [*first, mark + verdict])
    table = f'<table style="border-collapse:collapse;margin:4px 0"><tr>{html}</tr></table>'
    return "\n".join([*lines, "", said, RULE]), table + _paragraph(said) + _paragraph(RULE, "opacity:.7")


def _sentences(own: Mapping[str, Kept], unanswered: Sequence[str]) -> str:
    """Where a chapter's guesses were right, and which are missing."""
    if not own:
        return "You have made no guesses in this chapter: write them in place of the dots in `guess(...)`."
    by_grade: dict[str, list[str]] = {grade: [] for grade in COLOURS}
    for name, one in own.items():
        if one.score:
            by_grade[one.score.grade].append(_bare(name))
    total = sum(map(len, by_grade.values()))
    right, close, off = by_grade.values()
    said = [f"Your intuition was right in {len(right)} of {total}{_named(right)}."] if total else []
    said += [f"It was close in {len(close)}{_named(close)}."] if close else []
    said += [f"Look again at what surprised you{_named(off)}."] if off else []
    said += [f"Not answered{_named(map(_bare, unanswered))}."] if unanswered else []
    return " ".join(said) or "None of your guesses has met its result yet."


def _bare(name: str) -> str:
    return name.partition(".")[2].replace("_", " ")


def _named(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f": {listed}" if listed else ""


def _paragraph(text: str, style: str = "") -> str:
    return f'<div style="{style}">{escape(text)}</div>'


def _nothing(rows: Rows) -> Rows:
    return ["." * len(row) for row in rows]


def _grid(crosses: Rows, filled: Rows) -> str:
    """A small picture: crosses where the guess is, and the colour where the measured pattern is."""
    size = max(7, min(18, 360 // max(1, *map(len, filled)))) if filled else 0
    style = f"width:{size}px;height:{size}px;min-width:{size}px;padding:0;border:1px solid rgba(128,128,128,.5);"
    style += f"font-size:{size - 2}px;line-height:1;text-align:center;"
    html = ""
    for guessed, measured in zip(crosses, filled, strict=True):
        html += '<tr style="background:none">'  # Jupyter gives every other row a ground of its own
        for cross, fill in zip(guessed, measured, strict=True):
            ground = f"background:{COLOURS['right']};color:white" if fill == "x" else "background:none"
            html += f'<td style="{style}{ground}">{"×" if cross == "x" else ""}</td>'
        html += "</tr>"
    return f'<table style="border-collapse:collapse;margin:6px 0">{html}</table>' if html else ""
