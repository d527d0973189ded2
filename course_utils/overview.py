"""How much there is to do in each chapter, and the passages of README and guide that say so, for `course build`.

A passage stands between two comments, which no reader sees:

    <!-- generated: chapters -->      the README's table
    <!-- generated: minutes -->       a timetable by hand, whose last column is the sum of what the lessons state
    <!-- generated: hours 00 -->      the time for one chapter, in words
    <!-- end -->

A lesson's front matter has what no exercise tells: `about`, what the learner writes, and `reading`, the minutes for all
the rest. What its head says of the time has to agree.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from course_utils.lint import front_matter

FILES = ("README.md", "docs/teaching.md")
BEGIN = "<!-- generated: "
PASSAGE = re.compile(rf"({BEGIN}(\w+)(?: (\d\d))? -->)(.*?)(<!-- end -->)", re.DOTALL)
TIMETABLE_ROW = re.compile(r"^(\|.*\| (\d\d) \| `(\w+)` \| `(\w+)` \|) *\d* *\|$", re.MULTILINE)
HEAD = "**How long it takes**: "
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

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def total(self) -> int:
        """The hours for all of it."""
        return max(1, round((sum(self.minutes.values()) + self.reading) / 60))


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
    title = "".join(cells[0]["source"]).partition("\n")[0].lstrip("# ").partition(":")[0].replace(" ·", "")
    minutes = {entry["exercise"]: entry["minutes"] for entry in course}
    chapter = Chapter(f"{lesson.stem}.ipynb", title, front["about"], minutes, front["reading"])
    said, wanted = lesson.read_text(encoding="utf-8"), HEAD + head(chapter)
    if wanted not in said:
        line = said.count("\n", 0, max(0, said.find(HEAD))) + 1
        raise ValueError(f"{where}:{line}: by its exercises, the lesson's head has to say: {wanted}")
    return chapter


def head(chapter: Chapter) -> str:
    """What the head of a lesson says of the time, before anything else."""
    return (
        f"the {words(len(chapter.minutes))} exercises add up to about {hours(sum(chapter.minutes.values()))}; "
        f"with reading and looking at the results, to about {hours(60 * chapter.total)}."
    )


def with_passages(text: str, chapters: list[Chapter]) -> str:
    """The text with its passages written anew. Raises ValueError for one that cannot be."""
    by_number = {chapter.number: chapter for chapter in chapters}

    def written(match: re.Match[str]) -> str:
        begin, kind, number, old, end = match.groups()
        if kind == "chapters":
            new = f"\n\n{table(chapters)}\n\n"
        elif kind == "minutes":
            new = TIMETABLE_ROW.sub(lambda row: f"{row[1]} {minutes(by_number, *row.group(2, 3, 4))} |", old)
        elif kind == "hours" and number in by_number:
            new = f"about {hours(60 * by_number[number].total)}"
        else:
            raise ValueError(f"there is nothing to write for `{begin}`")
        return begin + new + end

    if text.count(BEGIN) != len(PASSAGE.findall(text)):
        raise ValueError(f"every `{BEGIN}... -->` needs its `<!-- end -->`")
    return PASSAGE.sub(written, text)


def table(chapters: list[Chapter]) -> str:
    """The chapters as Markdown."""
    rows = [
        f"| [{c.title}](chapters/{c.name}) | {c.about} | {len(c.minutes)} | {c.total} h |"
        for c in sorted(chapters, key=lambda chapter: chapter.name)
    ]
    return "\n".join(["| | you write | exercises | time |", "|---|---|---|---|", *rows])


def minutes(chapters: Mapping[str, Chapter], number: str, first: str, last: str) -> int:
    """The sum over a chapter's exercises, from one to another."""
    own = chapters[number].minutes if number in chapters else {}
    names = list(own)
    for name in (first, last):
        if name not in own:
            raise ValueError(f"chapter {number} has no exercise {name}")
    chosen = names[names.index(first) : names.index(last) + 1]
    if not chosen:
        raise ValueError(f"in chapter {number} {last} comes before {first}")
    return sum(own[name] for name in chosen)


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
