"""The numbers in a lesson's prose, and the numbers that the executed notebook shows for them.

Compared are decimal numbers and percentages: `0.96`, `−6.38`, `57%`, a head such as `2.4`. Each must be among the
numbers that cells above it printed or drew, rounded as the prose rounds. Left alone are hints, code, formulas, links,
quotations, headings, references, and times and sizes with their unit. Where no output can hold a number, because a
paper or a made-up example does, `<!-- cited: 17.7, 29.2 -->` in the same paragraph says so.
"""

import base64
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import nbformat
import numpy as np

from course_utils.lint import HEADING, LessonCell
from course_utils.wording import CITED, LEFT_ALONE

# A picture with more values than this has one near any number, so only its extremes and ends count.
MANY = 100
UNITS = r"(?:GB|GiB|MB|MiB|kB|hours?|minutes?|min|seconds?|ms|s|times as fast)\b"
IN_PROSE = re.compile(
    rf"(?<![\w.,:/])(?P<sign>(?<![\w)%])[−-])?(?P<digits>\d+\.\d+(?P<scale> (?:m|b)illion)?|\d+(?:\.\d+)?[ ]?(?P<percent>%))"
    rf"(?![\w%]|[.,/]\d|[- ]{UNITS})"
)
SCALES = {" million": 1e6, " billion": 1e9}
IN_OUTPUT = re.compile(r"(?<![\w.])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?[ ]?%?(?!\w)|(?<=\d)-\d+\.\d+")
HINT = re.compile(r"<details><summary>(?:Hint|Stuck).*?</details>", re.DOTALL)
UNREAD_SECTIONS = {"References", "Going further"}
STYLE = {"template", "colorscale", "color", "font", "line", "marker", "hovertemplate", "colorbar"}


class Number(NamedTuple):
    """A number as prose or an output writes it; `value` of a percentage is the part of one."""

    text: str
    value: float
    unit: float  # of its last digit
    signed: bool
    line: int = 0


# --- prose ----------------------------------------------------------------------------------------------------------


def blank(match: re.Match[str]) -> str:
    """The same room, with nothing in it."""
    return re.sub(r"[^\n]", " ", match[0])


def in_prose(text: str) -> Iterator[Number]:
    """The numbers that a text of Markdown states, with its lines counted from 0."""
    text = LEFT_ALONE.sub(blank, HINT.sub(blank, text))
    text = HEADING.sub(blank, text)
    for match in IN_PROSE.finditer(text):
        written = match["digits"].removesuffix(match["scale"] or "").rstrip("% ")
        factor = 0.01 if match["percent"] else SCALES.get(match["scale"], 1.0)
        unit = 10.0 ** -len(written.partition(".")[2]) * factor
        value = float(written) * factor * (-1 if match["sign"] else 1)
        yield Number(match[0], value, unit, bool(match["sign"]), text.count("\n", 0, match.start()))


class Paragraph(NamedTuple):
    """What prose states in one paragraph, and what it says no output holds."""

    where: str  # file and line
    title: str  # where it is a heading
    numbers: list[Number]
    cited: set[str]


def paragraphs(cell: LessonCell) -> Iterator[Paragraph]:
    """The paragraphs of a cell of prose that state a number, carry a mark or are a heading."""
    file, _, first = cell.where.rpartition(":")
    source = HINT.sub(blank, cell.source)
    start = 0
    for part in re.split(r"(\n[ \t]*\n)", source):
        line = int(first) + source.count("\n", 0, start)
        start += len(part)
        cited = {word.strip() for mark in CITED.findall(part) for word in mark.split(",")}
        numbers = [n._replace(line=line + n.line) for n in in_prose(part)]
        heading = HEADING.match(LEFT_ALONE.sub(blank, part))
        if numbers or cited or heading:
            title = heading[2].strip() if heading else ""
            yield Paragraph(f"{file}:{numbers[0].line if numbers else line}", title, numbers, cited)


# --- outputs --------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """The numbers of outputs, sorted: as printed, and what was drawn."""

    printed: list[float]
    drawn: list[float]

    def holds(self, number: Number, drawn: bool = True) -> bool:
        """Whether one of them, rounded as the number is, is the number. Without a sign, either sign will do."""
        values = [self.printed, self.drawn] if drawn else [self.printed]
        signs = [1] if number.signed else [1, -1]
        return any(_near(sorted_, sign * number.value, number.unit) for sorted_ in values for sign in signs)


def _near(values: Sequence[float], value: float, unit: float) -> bool:
    slack = unit * (0.5 + 1e-6)
    place = bisect_left(values, value - slack)
    return place < len(values) and values[place] <= value + slack


def shown(outputs: Iterable[nbformat.NotebookNode]) -> Shown:
    """All numbers in the outputs of cells."""
    printed: list[float] = []
    drawn: list[float] = []
    for output in outputs:
        data = output.get("data", {})
        printed += in_text(output.get("text", "")) + in_text(data.get("text/plain", ""))
        html = re.sub(r"<(script|style).*?</\1>", " ", data.get("text/html", ""), flags=re.DOTALL)
        printed += in_text(re.sub(r"<[^>]*>", " ", html))
        if figure := data.get("application/vnd.plotly.v1+json"):
            for key in ("data", "layout", "frames"):
                for values in in_figure(figure.get(key)):
                    (printed if isinstance(values, str) else drawn).extend(
                        in_text(values) if isinstance(values, str) else telling(values)
                    )
    return Shown(sorted(printed), sorted(drawn))


def in_text(text: str) -> list[float]:
    """The numbers in a printed text; a percentage counts as a part of one too."""
    found = []
    for word in IN_OUTPUT.findall(re.sub(r"\x1b\[[\d;]*m", "", text)):
        value = float(word.rstrip("% ").replace(",", "").replace("−", "-"))
        found += [value, value / 100] if word.endswith("%") else [value]
    return found


def in_figure(part: Any) -> Iterator[str | np.ndarray]:
    """The texts and the arrays of numbers in a part of a plotly figure."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict) and "bdata" in part:
        yield np.frombuffer(base64.b64decode(part["bdata"]), dtype=part["dtype"]).astype(float)
    elif isinstance(part, dict):
        for key, inner in part.items():
            if key not in STYLE:
                yield from in_figure(inner)
    elif isinstance(part, list):
        if part and all(isinstance(value, int | float) for value in part):
            yield np.array(part, dtype=float)
        else:
            for inner in part:
                yield from in_figure(inner)


def telling(values: np.ndarray) -> list[float]:
    """The values that a text may name: all of a few; of many, the ends and the extremes."""
    values = values[np.isfinite(values)]
    if len(values) > MANY:
        values = np.array([values[0], values[-1], values.min(), values.max()])
    return values.tolist()


# --- both -----------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """How many numbers were compared, and what is wrong, a line for each paragraph."""

    compared: int
    problems: list[str]


def compare(lesson: Sequence[LessonCell], notebook: nbformat.NotebookNode) -> Comparison:
    """Look up each number of a lesson in what its executed notebook shows.

    Pictures count from the last heading on; what was printed, from the beginning of the chapter. Numbers in the code
    above count as printed: it is shown too.
    """
    run = [cell for cell in notebook.cells if cell.cell_type == "code"]
    run = run[len(run) - sum(cell.kind == "code" for cell in lesson) :]  # the builder puts a cell before the first
    above: list[float] = []
    here = Shown([], [])
    compared, problems, title, ran = 0, [], "", iter(run)
    for cell in lesson:
        if cell.kind == "code":
            executed = next(ran)
            new = shown(executed.outputs)
            above = sorted(above + new.printed + in_text(executed.source))
            here = Shown(above, sorted(here.drawn + new.drawn))
            continue
        for paragraph in paragraphs(cell):
            if paragraph.title:
                title, here = paragraph.title, Shown(above, [])
            if title in UNREAD_SECTIONS:
                continue
            wrong = [n.text for n in paragraph.numbers if n.text not in paragraph.cited and not here.holds(n)]
            compared += sum(n.text not in paragraph.cited for n in paragraph.numbers)
            idle = paragraph.cited - {n.text for n in paragraph.numbers}
            problems += [f"{paragraph.where}: no output above shows {', '.join(wrong)}"] * bool(wrong)
            problems += [f"{paragraph.where}: the paragraph does not say {', '.join(sorted(idle))}"] * bool(idle)
    return Comparison(compared, problems)
