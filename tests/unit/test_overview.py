"""README, guide and the heads of lessons say what the lessons say: generated, or an error with file and line."""

from pathlib import Path

import pytest

from course_utils.build import BuildError, build, build_chapter, render
from course_utils.cells import names
from course_utils.exercises import PARTS, by_part, course_exercises, part_of
from course_utils.overview import BEGIN, FILES, PASSAGE, REAL, hours, read_chapter, words
from course_utils.solution import solution
from tests.conftest import ROOT

README = """\
# A course

<!-- generated: chapters -->
<!-- end -->

Do chapter 07 first (<!-- generated: hours 07 -->soon<!-- end -->).

<!-- generated: minutes -->

| time | chapter | from | to | minutes |
|---|---|---|---|---|
| 09:00–10:00 | 07 | `double` | `Shift` | 1 |
| day 2, 09:00–10:00 | 07 | `Shift` | `Shift` | |

<!-- end -->

| 09:00–10:00 | 07 | `double` | `Shift` | 1 |
"""
HEAD = (
    "**How long it takes**: the two exercises add up to about half an hour; "
    "with reading and looking at the results, to about two hours."
)


@pytest.fixture
def course(small_course: Path) -> Path:
    """A course of one chapter, with a README that has passages to be generated."""
    lesson = small_course / "chapters/src/07_toy.md"
    text = lesson.read_text().replace("---\nkernelspec", '---\nabout: "twice: more"\nreading: 80\nkernelspec', 1)
    text = text.replace("# A small chapter\n", f"# 07 · A small chapter: on numbers\n\n{HEAD} And more.\n")
    lesson.write_text(text)
    (small_course / "README.md").write_text(README)
    return small_course


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_passages_are_written_from_the_lessons(course: Path) -> None:
    assert course / "README.md" in build(course)
    text = (course / "README.md").read_text()
    everything = "2 exercises, 2 h"
    assert f"| [07 A small chapter](chapters/07_toy.ipynb) | twice: more |  | {everything} | {everything} |  |" in text
    assert f"\n| **II · What is represented?** | | | **{everything}** | **{everything}** | |\n| [07 " in text
    assert f"| **together** | | | **{everything}** | **{everything}** | |\n\n<!-- end -->" in text
    assert "first (<!-- generated: hours 07 -->about two hours<!-- end -->)." in text
    assert (
        "| 09:00–10:00 | 07 | `double` | `Shift` | 25 |\n| day 2, 09:00–10:00 | 07 | `Shift` | `Shift` | 15 |" in text
    )
    assert text.endswith("| 07 | `double` | `Shift` | 1 |\n"), "what is outside of passages stays"
    assert build(course) == [], "writing again changes nothing"
    edit(course / "chapters/src/07_toy.md", ":minutes: 10", ":minutes: 14")
    assert [path.name for path in build(course)] == ["07_toy.ipynb", "07_toy.ipynb", "README.md"]
    assert "`double` | `Shift` | 29 |" in (course / "README.md").read_text()


def test_the_table_says_which_chapters_have_a_part_on_a_real_model(course: Path) -> None:
    with (course / "chapters/src/07_toy.md").open("a") as lesson:
        lesson.write(f"\n+++\n\n## {REAL}\n\nIt is large.\n")
    build(course)
    assert "h | SmolLM2 |" in (course / "README.md").read_text()


def test_the_table_says_what_a_chapter_builds_on(course: Path) -> None:
    edit(course / "chapters/src/07_toy.md", "import torch\n", "import torch\nfrom solutions.ch02_one import One\n")
    edit(course / "chapters/src/07_toy.md", "print(x.sum())", "print(x.sum(), One)")
    (course / "solutions/ch02_one.py").write_text("class One: ...\n")
    lesson = course / "chapters/src/07_toy.md"
    assert read_chapter(lesson, build_chapter(lesson, course)[1]).needs == ("02",)


def test_the_chapters_to_choose_from(course: Path) -> None:
    guide = course / "docs/teaching.md"
    guide.parent.mkdir()
    guide.write_text(f"{BEGIN}choice -->\n<!-- end -->\n")
    build(course)
    assert "\n| II | [07 A small chapter](../chapters/07_toy.ipynb) |  | 25 | 2 h |  |\n" in guide.read_text()


def test_lines_and_models_are_counted_where_they_lie(course: Path) -> None:
    guide = course / "CONTRIBUTING.md"
    guide.write_text(f"{BEGIN}lines -->\n<!-- end -->\n\n{BEGIN}models -->\n<!-- end -->\n")
    (course / "tests/ch07").mkdir(parents=True)
    for name, lines in {"test_one.py": 60, "test_two.py": 41}.items():
        (course / "tests/ch07" / name).write_text("\n" * lines)
    (course / "course_utils/models/toy").mkdir(parents=True)
    (course / "course_utils/models/toy/card.md").write_text(
        "---\nname: toy\nlicence: MIT\n---\n\nIts licence: see above.\n"
    )
    build(course)
    text = guide.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 07 |"))
    lesson, solution, checks, tests, together = (int(cell) for cell in row.split("|")[2:-1])
    assert (tests, checks) == (150, 0) and 0 < lesson <= 150 and 0 < solution <= 100
    assert together == lesson + solution + tests
    assert f"| **together** | {lesson} | {solution} | 0 | {tests} | {together} |" in text
    assert "\n| `toy` | MIT |\n" in text


def test_every_chapter_belongs_to_one_part() -> None:
    numbers = [number for part in PARTS for number in part.chapters]
    assert numbers == list(range(len(numbers)))
    assert part_of("09").numeral == "II"
    assert list(by_part(course_exercises())) == list(PARTS) or len(course_exercises()) < len(numbers)
    beyond = f"{len(numbers):02}"
    with pytest.raises(LookupError, match=rf"no part .* chapter {beyond}"):
        part_of(beyond)


def test_what_is_optional_is_left_out_of_the_core_path(course: Path) -> None:
    edit(course / "chapters/src/07_toy.md", "## Shifting\n", "## Shifting\n\n<!-- optional -->\n")
    build(course)
    text = (course / "README.md").read_text()
    assert "| twice: more |  | 1 exercise, 1 h | 2 exercises, 2 h |" in text
    assert "| `double` | `Shift` | 25 (15 optional) |" in text
    assert "| `Shift` | `Shift` | 15 (15 optional) |" in text
    assert build(course) == [], "writing again changes nothing"
    edit(course / "chapters/src/07_toy.md", "\n\n<!-- optional -->", "")
    edit(course / "chapters/src/07_toy.md", f"\n{HEAD}", f"\n<!-- optional -->\n\n{HEAD}")
    build(course)
    assert "| twice: more |  | optional | 2 exercises, 2 h |" in (course / "README.md").read_text()


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("lesson", "the two exercises", "the three exercises", r"toy\.md:12: .*: the two exercises"),
        ("lesson", ":minutes: 15", ":minutes: 45", r"toy\.md:12: .* add up to about one hour;"),
        ("lesson", "about two hours. And", "about three hours. And", r"toy\.md:12: .* to about two hours"),
        ("lesson", HEAD, "It takes long.", r"toy\.md:1: .* has to say"),
        ("lesson", "reading: 80\n", "", r"toy\.md:1: the front matter needs"),
        ("lesson", 'about: "twice: more"\n', "", r"toy\.md:1: the front matter needs"),
        (
            "README",
            "`double` | `Shift` | 1 |\n| day",
            "`triple` | `Shift` | 1 |\n| day",
            "README.md: .*exercise triple",
        ),
        ("README", "`Shift` | `Shift` |", "`Shift` | `double` |", "README.md: in chapter 07 double comes before Shift"),
        ("README", "hours 07", "hours 08", "README.md: there is nothing to write for .*hours 08 -->"),
        ("README", "generated: chapters", "generated: names", "README.md: there is nothing to write"),
        ("README", "soon<!-- end -->", "soon", r"README\.md: .*needs its"),
    ],
)
def test_what_disagrees_is_named(course: Path, file: str, old: str, new: str, words: str) -> None:
    path = course / {"lesson": "chapters/src/07_toy.md", "README": "README.md"}[file]
    edit(path, old, new)
    with pytest.raises(BuildError, match=words):
        render(course)


def test_the_course_s_own_guides_have_passages() -> None:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
    kinds = {name: len(PASSAGE.findall(text)) for name, text in texts.items()}
    assert kinds == {"README.md": 1, "CONTRIBUTING.md": 1, "docs/licences.md": 1, "docs/teaching.md": 6}


def test_the_core_path_takes_about_twenty_hours() -> None:
    solved = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "solutions").glob("*.ipynb")}
    lessons = sorted((ROOT / "chapters/src").glob("*.md"))
    hours_in_all = sum(read_chapter(lesson, solved[lesson.stem]).core_total for lesson in lessons) / 60
    assert 17 < hours_in_all < 23


# A model mentions a block that no GPT-2 has; `mine` takes it without. `diagonal_mean` is imported by chapter 04's
# set-up, so it is there for those who left chapter 00 out.
WITHOUT = {("Transformer", "ParallelBlock"), ("previous_token_scores", "diagonal_mean")}


def test_no_exercise_of_the_core_path_uses_an_optional_one() -> None:
    exercises = {exercise.name: exercise for own in course_exercises().values() for exercise in own}
    optional = {name for name, exercise in exercises.items() if exercise.optional}
    used = {
        (name, other)
        for name in exercises.keys() - optional
        for other in names(solution(name).source).read & optional - {name}
    }
    assert optional and used == WITHOUT


def test_numbers_in_words() -> None:
    assert [words(n) for n in (1, 12, 19, 20, 29, 34, 90)] == [
        *("one", "twelve", "nineteen", "twenty", "twenty-nine", "thirty-four", "ninety")
    ]
    assert [hours(n) for n in (25, 60, 90, 120, 160, 445)] == [
        *("half an hour", "one hour", "one and a half hours", "two hours"),
        *("two and a half hours", "seven and a half hours"),
    ]
