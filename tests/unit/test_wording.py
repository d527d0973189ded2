"""Words with a better one are found in prose, and nowhere else."""

from pathlib import Path

import pytest

from course_utils.build import BuildError, build
from course_utils.wording import findings
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("prose", "word", "better"),
    [
        ("Heads that are silenced.", "silenced", "ablate"),
        ("So take the rest away.", "take the rest away", "ablate"),
        ("The heads are taken away.", "heads are taken away", "ablated"),
        ("Two arrows meet.", "arrows", "edge"),
        ("At which depth?", "depth", "layer"),
        ("It carries the news on.", "news", "information"),
        ("See chapter 2.", "chapter 2", "chapter 02, with two digits"),
        ("The model of 02 is here, as we said in 02, too.", "in 02", "chapter 02, with the word"),
        ("In the mean it is 2.", "In the mean", "on average"),
        ("It is so, be it for its names.", "be it for", "whether"),
        ("The slope is that of the run.", "that of the", "the noun again"),
        ("And what came of it?", "what came of it", "the result"),
        ("A so-called head.", "so-called", "leave it out"),
        ("It is quick besides.", "besides", "also, or too"),
        ("The curves lie on each other.", "lie on each other", "coincide"),
        ("Fine. Who mixes the two up credits\nthe wrong half.", "Who", "If you ..., or Anyone who ..."),
    ],
)
def test_what_is_found(prose: str, word: str, better: str) -> None:
    [found] = findings(f"A line.\n\n{prose}\n")
    assert (found.word, found.better, found.line) == (word, better, 2)


@pytest.mark.parametrize(
    "prose",
    [
        "Who writes the answer? Who tells the writer?",
        "`depth`, $depth$ and [it](depth.md); “news” and \"silence\"; <b title='arrow'>",
        "```text\nnews\n```",
        "In the meantime, in the mean time; the mean of these, in the mean of all heads.",
        "chapter 02, chapters 00 to 05, in 0.5 s, from 0123, in 2024",
        "Those who mix the two up.",
        "That head, of the two, is that. Take the hook away.",
        "An arrow. <!-- meant: arrow -->",
        "The lens\nat some depth, be it for once. <!-- meant: depth --> <!-- meant: be it for -->",
    ],
)
def test_what_is_left_alone(prose: str) -> None:
    assert list(findings(prose)) == []


def test_an_exception_holds_for_its_word_and_paragraph() -> None:
    prose = "An arrow and news. <!-- meant: arrow -->\n\nAn arrow."
    assert [(found.line, found.word) for found in findings(prose)] == [(0, "news"), (2, "arrow")]


def test_a_lesson_is_refused_with_file_line_and_the_better_word(small_course: Path) -> None:
    lesson = small_course / "chapters/src/07_toy.md"
    text = lesson.read_text()
    lesson.write_text(text.replace("Prose with $x^2$.", "Prose.\n\nAn arrow."))
    line = text.splitlines().index("Prose with $x^2$.") + 3
    with pytest.raises(BuildError, match=rf"^chapters/src/07_toy\.md:{line}: “arrow”: edge \(or"):
        build(small_course)
    lesson.write_text(text.replace("Prose with $x^2$.", "Prose.\n\nAn arrow. <!-- meant: arrow -->"))
    build(small_course)
    assert 'An arrow."' in (small_course / "chapters/07_toy.ipynb").read_text()


GUIDES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{name}" for name in ("running.md", "teaching.md", "research.md")),
]


@pytest.mark.parametrize("name", [*GUIDES, "docs/glossary.md", "docs/site/written/index.md"])
def test_the_guides_follow_the_rules(name: str) -> None:
    assert [f"{name}:{f.line + 1}: {f}" for f in findings((ROOT / name).read_text(encoding="utf-8"))] == []
