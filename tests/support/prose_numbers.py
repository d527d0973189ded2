"""The numbers in a lesson's prose, compared with those that the executed notebook shows.

Compared are numbers with decimals, percentages, and whole numbers of three digits and more that are neither round nor
years: `0.96`, `−6.38`, `57%`, `303`, and heads such as `2.4`. Left alone are hints, code, formulas, links, quotations,
headings, references, and times and sizes with their unit. If no output can hold a number, because a paper or a made-up
example does, `<!-- cited: 17.7, 29.2% -->` in the same paragraph says so, and the builder takes the comment out.
"""

import base64
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import nbformat
import numpy as np

from course_utils.lint import HEADING, LessonCell
from course_utils.wording import CITED, LEFT_ALONE

UNITS = r"(?:GB|GiB|MB|MiB|kB|hours?|minutes?|min|seconds?|ms|s)\b"
IN_PROSE = re.compile(
    r"(?:(?<![\w)%])(?P<sign>[−-])|(?<![\w.,:/-]))"
    r"(?P<written>\d+\.\d+|\d+(?=[ ]?%)|(?!(?:19|20)\d\d\b)\d[\d,]*\d[1-9])(?P<after>[ ]?%|[ ][mb]illion)?"
    rf"(?![\w%]|[.,/]\d|[- ]{UNITS})"
)
SCALES = {"%": 0.01, "million": 1e6, "billion": 1e9}
IN_OUTPUT = re.compile(r"(?<![\w.])[−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?[ ]?%?(?!\w)|(?<=\d)-\d+\.\d+")
IN_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*?(?:\btitle=\"(?P<title>[^\"]*)\"[^>]*)?>", re.DOTALL)
HINT = re.compile(r"<details><summary>Hint.*?</details>", re.DOTALL)
NOT_ABOUT_THE_OUTPUTS = {"Going further", "References"}

PLOTLY = "application/vnd.plotly.v1+json"
UNSEEN = {"template", "colorscale", "colorbar", "color", "font", "line", "marker", "hovertemplate", "hovertext"}
UNSEEN |= {"domain", "range"}
MANY = 100  # a trace with more values than this has one near any number


# --- prose ----------------------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number that prose states; a percentage is a part of one."""

    text: str
    value: float
    unit: float  # of its last digit
    digits: int
    line: int  # of the text, from 0

    def is_among(self, values: Iterable[float]) -> bool:
        """Whether one of the values, rounded as the number is, is the number. Without a sign, either sign will do."""
        slack = self.unit * 0.6  # half a digit, and room for the last bits of another processor
        sides = {self.value, self.value if self.text[0] in "−-" else -self.value}
        return any(abs(value - side) <= slack for value in values for side in sides)


class Paragraph(NamedTuple):
    """What a paragraph states."""

    line: int  # of the text, from 0
    title: str  # if it is a heading
    boxed: bool  # whether it is in a folded box
    numbers: list[Number]
    cited: set[str]  # what it says that no output holds


def paragraphs(text: str) -> Iterator[Paragraph]:
    """The paragraphs of a text of Markdown."""
    clear = text
    for pattern in (HINT, LEFT_ALONE):
        clear = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), clear)
    for part in re.finditer(r"(?:.+\n?)+", clear):
        own, before = text[part.start() : part.end()], text[: part.start()]
        heading = HEADING.match(part[0])
        cited = {number.strip() for mark in CITED.findall(own) for number in mark.split(", ")}
        boxed = before.count("<details") > before.count("</details>")
        numbers = [] if heading else list(in_prose(part[0]))
        yield Paragraph(before.count("\n"), heading[2].strip() if heading else "", boxed, numbers, cited)


def in_prose(text: str) -> Iterator[Number]:
    """The numbers that a paragraph states."""
    for match in IN_PROSE.finditer(text):
        written = match["written"].replace(",", "")
        factor = SCALES.get((match["after"] or "").strip(), 1.0)
        value = math.copysign(float(written) * factor, -1 if match["sign"] else 1)
        unit = factor * 10.0 ** -len(written.partition(".")[2])
        yield Number(
            match[0], value, unit, len(written.replace(".", "").lstrip("0")), text.count("\n", 0, match.start())
        )


# --- outputs --------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """The numbers that a code cell shows: in texts (labels of pictures too), in pictures, and in its own code."""

    printed: list[float]
    drawn: list[float]
    code: list[float]


def shown(cell: nbformat.NotebookNode) -> Shown:
    """The numbers that an executed code cell shows."""
    texts: list[str] = []
    drawn: list[float] = []
    for output in cell.outputs:
        data = output.get("data", {})
        html = IN_TAGS.sub(lambda tag: f" {tag['title'] or ''} ", data.get("text/html", ""))
        texts += [output.get("text", ""), data.get("text/plain", ""), html]
        for part in in_figure(data.get(PLOTLY, {})):
            if isinstance(part, str):
                texts.append(part)
            else:
                drawn += telling(part)
    return Shown([value for text in texts for value in in_text(text)], drawn, list(in_text(cell.source)))


def in_text(text: str) -> Iterator[float]:
    """The numbers in a printed text; a percentage counts as a part of one too."""
    for word in IN_OUTPUT.findall(re.sub(r"\x1b\[[\d;]*m", "", text)):
        value = float(word.rstrip("% ").replace(",", "").replace("−", "-"))
        yield from [value, value / 100] if word.endswith("%") else [value]


def in_figure(part: Any) -> Iterator[str | list[float]]:
    """The texts and the rows of numbers in a part of a plotly figure."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict) and "bdata" in part:
        yield np.frombuffer(base64.b64decode(part["bdata"]), dtype=part["dtype"]).tolist()
    elif isinstance(part, dict):
        hovers = {"text"} if part.get("type") == "heatmap" and "texttemplate" not in part else set()
        for key, inner in part.items():
            if key not in UNSEEN | hovers:
                yield from in_figure(inner)
    elif isinstance(part, list) and all(isinstance(value, int | float | None) for value in part):
        yield [value for value in part if value is not None]  # gaps
    elif isinstance(part, list):
        for inner in part:
            yield from in_figure(inner)


def telling(values: Sequence[float]) -> list[float]:
    """The values that prose may name: all of a few; of many, the ends and the extremes."""
    values = [value for value in values if math.isfinite(value)]
    return values if len(values) <= MANY else [values[0], values[-1], min(values), max(values)]


# --- both -----------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """How many numbers were compared, and what is wrong, one line for each paragraph."""

    compared: int
    problems: list[str]


def compare(lesson: Sequence[LessonCell], notebook: nbformat.NotebookNode) -> Comparison:
    """Look up each number of a lesson in what its executed notebook shows.

    What cells show counts from the last heading on, and for prose outside a folded box also in the cells right below
    it. From earlier sections only printed numbers count, and only for a number of three digits and more: there is
    something near a shorter one in any chapter.
    """
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    codes = codes[len(codes) - sum(cell.kind == "code" for cell in lesson) :]  # the builder puts one before the first
    cells = [shown(cell) for cell in codes]
    begin = above = compared = 0  # the section's first code cell, and how many there are so far
    title, problems = "", []
    for position, cell in enumerate(lesson):
        if cell.kind == "code":
            above += 1
            continue
        below = sum(1 for _ in itertools.takewhile(lambda later: later.kind == "code", lesson[position + 1 :]))
        file, _, first = cell.where.rpartition(":")
        for paragraph in paragraphs(cell.source):
            if paragraph.title:
                title, begin = paragraph.title, above
            if title in NOT_ABOUT_THE_OUTPUTS:
                continue
            last = above if paragraph.boxed else above + below
            here = [*itertools.chain(*(itertools.chain(*seen) for seen in cells[begin:last]))]
            printed = [*itertools.chain(*(seen.printed for seen in cells[:begin]))]
            numbers = [number for number in paragraph.numbers if number.text not in paragraph.cited]
            wrong = [n for n in numbers if not n.is_among(here) and not (n.digits >= 3 and n.is_among(printed))]
            idle = sorted(paragraph.cited - {number.text for number in paragraph.numbers})
            where = f"{file}:{int(first) + paragraph.line + (wrong[0].line if wrong else 0)}"
            problems += [f"{where}: no output shows {', '.join(n.text for n in wrong)}"] * bool(wrong)
            problems += [f"{where}: marked as cited, but not in the paragraph: {', '.join(idle)}"] * bool(idle)
            compared += len(numbers)
    return Comparison(compared, problems)
