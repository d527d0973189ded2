"""What can be guessed, a number, a choice or a pattern of cells: how an answer is read, and how near it came."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

RULE = (
    "Right: within 5%, the same choice, or an overlap of 0.9. Close: within 25%, or an overlap of 0.5. "
    "The overlap is the number of cells in both patterns, divided by the number in either."
)
Rows = list[str]  # a pattern: a text of `x` and `.` for each row


class Refused(Exception):
    """This is no answer to the question; `advice` says what would be one."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}: {advice}.")
        self.problem = problem


class Score(NamedTuple):
    """How near a guess came."""

    grade: str  # "right", "close" or "off"
    words: str


class Number(NamedTuple):
    """The question for a number; its unit is only shown."""

    unit: str

    def read(self, given: Any) -> int | float:
        """The answer as JSON keeps it. Raises Refused for what is no answer."""
        value, advice = plain(given), "write a number, such as 2.5"
        if isinstance(value, str):
            raise Refused(f"{short(value)} is a text", "write a number without quotes, such as 2.5")
        if not isinstance(value, Real) or isinstance(value, bool):
            raise Refused(f"{short(value)} is not a number", advice)
        if not math.isfinite(value):
            raise Refused(f"{value} is not finite", advice)
        return int(value) if isinstance(value, Integral) else float(value)

    def words(self, answer: int | float) -> str:
        """The answer in a line."""
        return number(answer) + (self.unit if self.unit == "%" else f" {self.unit}" if self.unit else "")

    def score(self, guessed: int | float, measured: int | float, within: int | float = 0) -> Score:
        """How near the one comes to the other; a difference up to `within` is right, too."""
        difference = abs(guessed - measured)
        if difference <= max(within, 0.05 * abs(measured)):
            return Score("right", "right")
        apart = f"{number(difference)} points" if self.unit == "%" else self.words(difference)
        side = f"{apart} too {'high' if guessed > measured else 'low'}"
        if difference <= 0.25 * abs(measured):
            return Score("close", f"close, {side}")
        if guessed * measured < 0:
            return Score("off", f"the other sign, {side}")
        if not guessed or not measured:
            return Score("off", f"off, {side}")
        low, high = sorted([abs(guessed), abs(measured)])
        return Score("off", f"off by a factor of {number(high / low, digits=2)}, {side}")


class Choice(NamedTuple):
    """The question for one of several answers."""

    choices: Sequence[Any]

    def read(self, given: Any) -> Any:
        """The answer as it is offered, whatever its case. Raises Refused for what is not offered."""
        value = plain(given)
        for choice in self.choices:
            if _key(choice) == _key(value):
                return choice
        raise Refused(f"{short(value)} is not offered", f"write one of {', '.join(map(repr, self.choices))}")

    def words(self, answer: Any) -> str:
        """The answer in a line."""
        return str(answer)

    def score(self, guessed: Any, measured: Any, within: int | float = 0) -> Score:
        """Right or wrong."""
        return Score("right", "right") if guessed == measured else Score("off", "wrong")


class Cells(NamedTuple):
    """The question for some of the cells of a grid."""

    rows: int
    columns: int

    def read(self, given: Any) -> Rows:
        """The pattern, from a drawing, from booleans or from pairs. Raises Refused for what fits no such grid."""
        value = plain(given)
        if isinstance(value, str):
            value = [line for line in value.splitlines() if line.strip()] or ["?"]
        if not isinstance(value, Iterable):
            raise Refused(f"{short(value)} is no pattern", self.advice)
        parts = list(value)
        if len(parts) == 2 and all(map(_is_index, parts)):  # a single pair
            parts = [parts]
        if parts and all(isinstance(part, str) for part in parts):
            return self.drawn(["".join(part.split()).lower() for part in parts])
        if parts and all(isinstance(part, Sequence) and all(isinstance(c, bool) for c in part) for part in parts):
            return self.drawn(["".join(".x"[cell] for cell in part) for part in parts])
        return self.listed(parts)

    def drawn(self, rows: Rows) -> Rows:
        """A drawing, if it has the right size."""
        for index, row in enumerate(rows):
            if set(row) - set(".x"):
                raise Refused(f"row {index} of the drawing is {short(row)}", self.advice)
            if len(row) != self.columns:
                raise Refused(f"row {index} of the drawing has {count(len(row), 'cell')}", self.advice)
        if len(rows) != self.rows:
            raise Refused(f"the drawing has {count(len(rows), 'row')}", self.advice)
        return rows

    def listed(self, pairs: list[Any]) -> Rows:
        """The drawing that has these cells."""
        chosen = set()
        for pair in pairs:
            if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_is_index, pair)):
                raise Refused(f"{short(pair)} is no cell", self.advice)
            row, column = map(int, pair)
            if not (0 <= row < self.rows and 0 <= column < self.columns):
                ranges = f"rows go from 0 to {self.rows - 1} and columns from 0 to {self.columns - 1}"
                raise Refused(f"({row}, {column}) lies outside of the grid", ranges)
            chosen.add((row, column))
        return ["".join(".x"[(row, column) in chosen] for column in range(self.columns)) for row in range(self.rows)]

    @property
    def advice(self) -> str:
        """How to answer."""
        size = f"{count(self.rows, 'row')} of {count(self.columns, 'cell')}"
        return f"draw {size} with `.` and `x`, or list pairs (row, column), such as [(0, 1), (2, 0)]"

    def words(self, answer: Rows) -> str:
        """The answer in a line."""
        cells = [(row, column) for row, text in enumerate(answer) for column, mark in enumerate(text) if mark == "x"]
        if len(cells) > 4:
            return f"{len(cells)} of {self.rows * self.columns} cells"
        return ", ".join(map(str, cells)) or "no cell"

    def score(self, guessed: Rows, measured: Rows, within: int | float = 0) -> Score:
        """By the cells in both over those in either."""
        pairs = list(zip("".join(guessed), "".join(measured), strict=True))
        either = sum("x" in pair for pair in pairs)
        overlap = pairs.count(("x", "x")) / either if either else 1.0
        grade = "right" if overlap >= 0.9 else "close" if overlap >= 0.5 else "off"
        return Score(grade, f"{grade}, an overlap of {overlap:.2f}")


Question = Number | Choice | Cells


def question(unit: str = "", choices: Sequence[Any] = (), cells: Sequence[int] = ()) -> Question:
    """What these keywords of `guess` ask for. Raises ValueError where they contradict each other."""
    if bool(unit) + bool(choices) + bool(cells) > 1:
        raise ValueError("a question has a unit, choices or cells, and no two of them.")
    if cells and (len(cells) != 2 or not all(_is_index(size) and size > 0 for size in cells)):
        raise ValueError("`cells` are two sizes, (rows, columns).")
    return Cells(*cells) if cells else Choice(list(choices)) if choices else Number(unit)


def question_about(truth: Any) -> Question:
    """What was asked, as far as the truth tells."""
    value = plain(truth)
    if isinstance(value, Real) and not isinstance(value, bool):
        return Number("")
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        return Cells(len(value), len(value[0]))
    return Choice([value])


def plain(value: Any) -> Any:
    """A tensor or array as Python's own numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def number(value: int | float, digits: int = 3) -> str:
    """As people write it."""
    if isinstance(value, int) or 1000 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) < 100 or digits > 2 else f"{value:.0f}"


def count(how_many: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{how_many} {what}{'s' * (how_many != 1)}"


def short(value: Any) -> str:
    """What somebody wrote, in a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _key(value: Any) -> tuple[bool, Any]:
    """Equal for answers that mean the same: `True` is not 1, but " Layer 1" is "layer 1"."""
    return isinstance(value, bool), " ".join(value.split()).casefold() if isinstance(value, str) else value


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
