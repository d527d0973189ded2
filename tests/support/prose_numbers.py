"""The numbers in a lesson's prose, and the numbers that the executed notebook shows for them.

Compared are decimal numbers and percentages: `0.96`, `−6.38`, `57%`, a head such as `2.4`. Each must be among the
numbers that cells above it printed or drew, rounded as the prose rounds. Left alone are hints, code, formulas, links,
quotations, headings, references, and times and sizes with their unit. Where no output can hold a number, because a
paper or a made-up example does, `<!-- cited: 17.7, 29.2 -->` in the same paragraph says so.
"""

import base64
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
PLOTLY = "application/vnd.plotly.v1+json"
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


class Shown:
    """The numbers that outputs show: their values, sorted, and how those that are printed are written."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.written: set[str] = set()

    def add(self, texts: Iterable[str], drawn: Iterable[float] = ()) -> None:
        """Take in what was printed and what was drawn."""
        words = [word for text in texts for word in in_text(text)]
        self.values = sorted([*self.values, *drawn, *(value for word in words for value in values_of(word))])
        self.written.update(word.lstrip("-") for word in words)

    def holds(self, number: Number) -> bool:
        """Whether one of the values, rounded as the number is, is the number. Without a sign, either sign will do."""
        slack = number.unit * (0.5 + 1e-6)
        for value in {number.value, number.value if number.signed else -number.value}:
            place = bisect_left(self.values, value - slack)
            if place < len(self.values) and self.values[place] <= value + slack:
                return True
        return False


def printed(output: nbformat.NotebookNode) -> list[str]:
    """The texts that an output shows, those in pictures included."""
    data = output.get("data", {})
    html = re.sub(r"<(script|style).*?</\1>", " ", data.get("text/html", ""), flags=re.DOTALL)
    labels = [part for part in in_figure(data.get(PLOTLY, {})) if isinstance(part, str)]
    return [output.get("text", ""), data.get("text/plain", ""), re.sub(r"<[^>]*>", " ", html), *labels]


def drawn(output: nbformat.NotebookNode) -> list[float]:
    """The values in a picture that a text may name: all of a few; of many, the ends and the extremes."""
    found: list[float] = []
    for part in in_figure(output.get("data", {}).get(PLOTLY, {})):
        if isinstance(part, np.ndarray):
            values = part[np.isfinite(part)].tolist()
            found += values if len(values) <= MANY else [values[0], values[-1], min(values), max(values)]
    return found


def in_text(text: str) -> list[str]:
    """The numbers in a printed text, as they are written."""
    return [word.replace("−", "-") for word in IN_OUTPUT.findall(re.sub(r"\x1b\[[\d;]*m", "", text))]


def values_of(word: str) -> list[float]:
    """The value of a number as it is written; a percentage counts as a part of one too."""
    value = float(word.rstrip("% ").replace(",", ""))
    return [value, value / 100] if word.endswith("%") else [value]


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


# --- both -----------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """How many numbers were compared, and what is wrong, a line for each paragraph."""

    compared: int
    problems: list[str]


def compare(lesson: Sequence[LessonCell], notebook: nbformat.NotebookNode) -> Comparison:
    """Look up each number of a lesson in what its executed notebook shows.

    What was printed, drawn or written in code since the last heading counts as rounded by the prose. Of the sections
    before, it counts only where a number was printed in the same way, as heads are, or has three digits and more:
    shorter ones are near something in any chapter.
    """
    run = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ran = iter(run[len(run) - sum(cell.kind == "code" for cell in lesson) :])  # the builder puts a cell before the first
    above, here = Shown(), Shown()
    compared, problems, title = 0, [], ""
    for cell in lesson:
        if cell.kind == "code":
            executed = next(ran)
            texts = [text for output in executed.outputs for text in printed(output)]
            above.add(texts)
            here.add([*texts, executed.source], [value for output in executed.outputs for value in drawn(output)])
            continue
        for paragraph in paragraphs(cell):
            if paragraph.title:
                title, here = paragraph.title, Shown()
            if title in UNREAD_SECTIONS:
                continue
            looked_up = [number for number in paragraph.numbers if number.text not in paragraph.cited]
            wrong = [number.text for number in looked_up if not is_shown(number, here, above)]
            idle = paragraph.cited - {number.text for number in paragraph.numbers}
            compared += len(looked_up)
            problems += [f"{paragraph.where}: no output above shows {', '.join(wrong)}"] * bool(wrong)
            problems += [f"{paragraph.where}: the paragraph does not say {', '.join(sorted(idle))}"] * bool(idle)
    return Comparison(compared, problems)


def is_shown(number: Number, here: Shown, above: Shown) -> bool:
    """Whether the number is in this section, or well enough in one above."""
    digits = re.sub(r"\D", "", number.text).lstrip("0")
    written = number.text.lstrip("−-") in above.written
    return here.holds(number) or written or (len(digits) >= 3 and above.holds(number))
