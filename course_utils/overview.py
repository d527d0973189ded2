"""How much there is to do in each chapter, and the passages of README and guides that say so, for `course build`.

A passage stands between two comments, which no reader sees:

    <!-- generated: chapters -->      the README's table
    <!-- generated: choice -->        the chapters beyond the first part, of which a teacher picks some
    <!-- generated: minutes -->       a timetable by hand, whose last column is the sum of what the lessons state
    <!-- generated: hours 00 -->      the time for one chapter, in words
    <!-- generated: lines -->         how long the files of each chapter are, so that growth is seen
    <!-- generated: models -->        the models that ship, by licence
    <!-- end -->

A lesson's front matter has what no exercise tells: `about`, what the learner writes, and `reading`, the minutes for all
the rest. What its head says of the time has to agree. The core path is what is left without the sections marked
`<!-- optional -->`; its share of the reading is its share of the text.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from course_utils.exercises import PARTS, by_part, part_of, title_of
from course_utils.lint import Part, front_matter, in_parts, read_lesson

FILES = ("README.md", "CONTRIBUTING.md", "docs/licences.md", "docs/teaching.md")
BEGIN = "<!-- generated: "
PASSAGE = re.compile(rf"({BEGIN}(\w+)(?: (\d\d))? -->)(.*?)(<!-- end -->)", re.DOTALL)
TIMETABLE_ROW = re.compile(
    r"^(\|.*\| (\d\d) \| `(\w+)` \| `(\w+)` \|) *(?:\d+(?: \(\d+ optional\))?)? *\|$", re.MULTILINE
)
HEAD = "**How long it takes**: "
IMPORTED = re.compile(r"^\s*from solutions\.ch(\d\d)_", re.MULTILINE)
REAL = "On a real language model"  # the title of a part that is about one
SMALL = """no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


class Chapter(NamedTuple):
    """What a lesson says of itself."""

    name: str  # of its notebook
    title: str
    about: str
    minutes: Mapping[str, int]  # by exercise
    reading: int
    core: Mapping[str, int]  # the same of the core path
    core_reading: int
    real: bool = False  # whether it has a part on a real language model
    needs: tuple[str, ...] = ()  # the earlier chapters whose solutions it imports

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def total(self) -> int:
        """The hours for all of it."""
        return max(1, round((sum(self.minutes.values()) + self.reading) / 60))

    @property
    def core_total(self) -> int:
        """The minutes for the core path through it."""
        return sum(self.core.values()) + self.core_reading


def read_chapter(lesson: Path, solution: str) -> Chapter:
    """From a lesson and its solution notebook. Raises ValueError where its front matter or its head needs mending."""
    where = f"chapters/src/{lesson.name}"
    front = front_matter(lesson)
    if not isinstance(front.get("about"), str) or not isinstance(front.get("reading"), int):
        raise ValueError(
            f"{where}:1: the front matter needs `about:`, what one writes, for the README's table, and `reading:`, the "
            "minutes that all but the exercises takes"
        )
    cells = json.loads(solution)["cells"]
    course = [cell["metadata"]["course"] for cell in cells if "course" in cell["metadata"]]
    minutes = {entry["exercise"]: entry["minutes"] for entry in course}
    core = {entry["exercise"]: entry["minutes"] for entry in course if not entry.get("optional")}
    lesson_cells = read_lesson(lesson)
    parts = [part for cell in in_parts(lesson_cells) for part in cell]
    code = "\n".join(cell.source for cell in lesson_cells if cell.kind == "code")
    chapter = Chapter(
        name=f"{lesson.stem}.ipynb",
        title=title_of(cells),
        about=front["about"],
        minutes=minutes,
        reading=front["reading"],
        core=core,
        core_reading=round(front["reading"] * core_share(parts)),
        real=any(part.title == REAL for part in parts),
        needs=tuple(n for n in sorted(set(IMPORTED.findall(code))) if n < lesson.stem[:2]),
    )
    said, wanted = lesson.read_text(encoding="utf-8"), HEAD + head(chapter)
    if wanted not in said:
        line = said.count("\n", 0, max(0, said.find(HEAD))) + 1
        raise ValueError(f"{where}:{line}: by its exercises, the lesson's head has to say: {wanted}")
    return chapter


def core_share(parts: list[Part]) -> float:
    """How much of a lesson's text is on the core path, from 0 to 1."""
    lengths = [len(part.source) * (not part.optional) for part in parts]
    return sum(lengths) / max(1, sum(len(part.source) for part in parts))


def head(chapter: Chapter) -> str:
    """What the head of a lesson says of the time, before anything else."""
    n = len(chapter.minutes)
    subject = "the one exercise takes" if n == 1 else f"the {words(n)} exercises add up to"
    return (
        f"{subject} about {hours(sum(chapter.minutes.values()))}; "
        f"with reading and looking at the results, to about {hours(60 * chapter.total)}."
    )


def with_passages(text: str, chapters: list[Chapter], root: Path) -> str:
    """The text with its passages written anew. Raises ValueError for one that cannot be."""
    tables: dict[str, Callable[[], str]] = {
        "chapters": lambda: table(chapters),
        "choice": lambda: choice(chapters),
        "lines": lambda: lines_table([chapter.number for chapter in chapters], root),
        "models": lambda: models_table(root),
    }
    by_number = {chapter.number: chapter for chapter in chapters}

    def written(match: re.Match[str]) -> str:
        begin, kind, number, old, end = match.groups()
        if kind in tables:
            new = f"\n\n{tables[kind]()}\n\n"
        elif kind == "minutes":
            new = TIMETABLE_ROW.sub(lambda row: f"{row[1]} {minutes(by_number, *row.group(2, 3, 4))} |", old)
        elif kind == "hours" and number in by_number:
            new = f"about {hours(60 * by_number[number].total)}"
        else:
            raise ValueError(f"there is nothing to write for `{begin}`")
        return begin + new + end

    if len(re.findall(rf"{BEGIN}\w", text)) != len(PASSAGE.findall(text)):
        raise ValueError(f"every `{BEGIN}... -->` needs its `<!-- end -->`")
    return PASSAGE.sub(written, text)


def table(chapters: list[Chapter]) -> str:
    """The chapters as Markdown, part by part: what each builds on, all of each, and the core path through it."""
    by_number = {chapter.number: chapter for chapter in chapters}
    rows = ["| | you write | builds on | core path | everything | real model |", "|---|---|---|---|---|---|"]
    for part, numbers in by_part(by_number).items():
        own = [by_number[number] for number in numbers]
        rows.append(f"| **{part.heading}** | | | {sums(own)} | |")
        rows += [table_row(chapter) for chapter in own]
    return "\n".join([*rows, f"| **together** | | | {sums(chapters)} | |"])


def table_row(c: Chapter) -> str:
    """A chapter's line of the table."""
    everything, real = f"{exercises(c.minutes)}, {c.total} h", "SmolLM2" if c.real else ""
    cells = (f"[{c.title}](chapters/{c.name})", c.about, ", ".join(c.needs), core_path(c), everything, real)
    return f"| {' | '.join(cells)} |"


def sums(chapters: list[Chapter]) -> str:
    """The core path through some chapters and all of them, as two cells of the table."""
    core = f"{exercises(n for c in chapters for n in c.core)}, {round(sum(c.core_total for c in chapters) / 60)} h"
    everything = f"{exercises(n for c in chapters for n in c.minutes)}, {sum(c.total for c in chapters)} h"
    return f"**{core if any(c.core for c in chapters) else 'optional'}** | **{everything}**"


def choice(chapters: list[Chapter]) -> str:
    """The chapters beyond the first part as Markdown: what each builds on, and how long it takes."""
    rows = ["| part | chapter | builds on | minutes | with reading | real model |", "|---|---|---|---|---|---|"]
    for c in sorted(chapters, key=lambda chapter: chapter.name):
        part = part_of(c.number)
        if part is not PARTS[0]:
            title, real = f"[{c.title}](../chapters/{c.name})", "SmolLM2" if c.real else ""
            needs, time = ", ".join(c.needs), sum(c.minutes.values())
            rows.append(f"| {part.numeral} | {title} | {needs} | {time} | {c.total} h | {real} |")
    return "\n".join(rows)


def lines_table(numbers: Iterable[str], root: Path) -> str:
    """How many lines the files of each chapter have, as Markdown; rounded, so that most changes leave it as it is."""
    kinds = {
        "lesson": "chapters/src/{}_*.md",
        "solution": "solutions/ch{}_*.py",
        "checks": "course_utils/checks/ch{}/*.py",
        "tests": "tests/ch{}/*.py",
    }
    rows = [f"| | {' | '.join(kinds)} | together |", f"|---{'|---:' * (len(kinds) + 1)}|"]
    sums = [0] * len(kinds)
    for number in sorted(numbers):
        own = [rounded(sum(map(n_lines, root.glob(place.format(number))))) for place in kinds.values()]
        sums = [total + n for total, n in zip(sums, own, strict=True)]
        rows.append(f"| {number} | {' | '.join(f'{n:,}' for n in [*own, sum(own)])} |")
    return "\n".join([*rows, f"| **together** | {' | '.join(f'{n:,}' for n in [*sums, sum(sums)])} |"])


def n_lines(path: Path) -> int:
    """How many lines a file has, the empty ones included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def rounded(lines: int) -> int:
    """To the next fifty."""
    return 50 * math.ceil(lines / 50)


def models_table(root: Path) -> str:
    """The models that ship as Markdown, a row for each, with the licence that its card states."""
    rows = ["| model | licence |", "|---|---|"]
    for card in sorted((root / "course_utils" / "models").glob("*/card.md")):
        [licence] = re.findall(r"^licence: (.+)$", card.read_text(encoding="utf-8"), re.MULTILINE)
        rows.append(f"| `{card.parent.name}` | {licence} |")
    return "\n".join(rows)


def core_path(chapter: Chapter) -> str:
    """How much of a chapter is on the core path, in a cell of the table."""
    if not chapter.core:
        return "optional"
    return f"{exercises(chapter.core)}, {round(chapter.core_total / 30) / 2:g} h"


def exercises(names: Iterable[str]) -> str:
    """How many these are, in words."""
    number = len(list(names))
    return f"{number} exercise{'s' * (number != 1)}"


def minutes(chapters: Mapping[str, Chapter], number: str, first: str, last: str) -> str:
    """The sum over a chapter's exercises, from one to another, and how much of it is optional."""
    own, core = (chapters[number].minutes, chapters[number].core) if number in chapters else ({}, {})
    names = list(own)
    for name in (first, last):
        if name not in own:
            raise ValueError(f"chapter {number} has no exercise {name}")
    chosen = names[names.index(first) : names.index(last) + 1]
    if not chosen:
        raise ValueError(f"in chapter {number} {last} comes before {first}")
    optional = sum(own[name] for name in chosen if name not in core)
    return f"{sum(own[name] for name in chosen)}" + f" ({optional} optional)" * (optional > 0)


def hours(number_of_minutes: int) -> str:
    """In words, to the nearest half hour."""
    whole, half = divmod(round(number_of_minutes / 30), 2)
    if whole == 0:
        return "half an hour"
    return f"{words(whole)}{' and a half' * half} hour{'s' * (whole + half > 1)}"


def words(number: int) -> str:
    """A number below a hundred, as one writes it out."""
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{SMALL[ones]}" if ones else "")
