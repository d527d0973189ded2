"""For authors, in a checkout: where the pieces of an exercise are, and a new exercise with all of its pieces begun."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from course_utils.places import CourseError, checkout

CHAPTERS = "chapters/src"
CHECKS = "course_utils/checks"


class Place(NamedTuple):
    """Where a piece of an exercise is."""

    piece: str  # lesson, solution, check, tests
    path: Path
    line: int


def where(symbol: str) -> list[Place]:
    """The lesson's cell, the solution, the check and the tests of an exercise, in that order.

    Raises CourseError outside a checkout, and where no lesson asks for an exercise of that name.
    """
    root = root_of_checkout()
    cell = re.compile(rf"^from solutions\.(ch\d\d_\w+) import {re.escape(symbol)}$", re.MULTILINE)
    for lesson in sorted((root / CHAPTERS).glob("[0-9][0-9]_*.md")):
        for match in cell.finditer(lesson.read_text(encoding="utf-8")):
            if f"check({symbol})" in match.string[match.end() :]:
                return [
                    Place("lesson", lesson, line_at(match.string, match.start())),
                    *places_in_code(root, lesson.stem[:2], match[1], symbol),
                ]
    raise CourseError(f"No lesson in {CHAPTERS} asks for an exercise named {symbol}.")


def places_in_code(root: Path, chapter: str, module: str, symbol: str) -> Iterator[Place]:
    yield found("solution", root / f"solutions/{module}.py", rf"^(?:def|class) {symbol}\b")
    checks = sorted((root / CHECKS / f"ch{chapter}").glob("*.py"))
    for path in checks:
        if re.search(rf"^def check_{symbol}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            yield found("check", path, rf"^def check_{symbol}\b")
            yield found("tests", root / f"tests/ch{chapter}/test_{path.name}", rf"\b{symbol}\b")


def found(piece: str, path: Path, pattern: str) -> Place:
    """The first line of the file that fits, or the file's first."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    match = re.search(pattern, text, re.MULTILINE)
    return Place(piece, path, line_at(text, match.start()) if match else 1)


def line_at(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def root_of_checkout() -> Path:
    root = checkout()
    if root is None:
        raise CourseError("This is for authors: change into a clone of the repository first.")
    return root


# --- a new exercise --------------------------------------------------------------------------------------------------

SOLUTION = '''

def {name}(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """Say what it means in one sentence, then what a shape cannot say: this is what the learner reads."""
    raise NotImplementedError("{name}")
'''

LESSON = """
### Exercise: `{name}`

Say what it is for, and what the learner has to know; then move all of this to its place.

```{{code-cell}} python
:tags: [exercise]
:difficulty: 2
:minutes: 15
from solutions.{module} import {name}
```

```{{code-cell}} python
check({name})
```

<details><summary>Hint</summary>

Say where to begin.

</details>
"""

CHECK = '''

@known_mistakes({{}})  # what people get wrong: the rest of "This is what you get if ..." -> an answer that does it
def check_{name}(fn: Any) -> None:
    """Say which cases there are, and what the oracle is."""
    resid = noise(2, 5, 7)
    expected = resid  # a slow loop, a builtin of torch, an identity: never the reference
    compare("{name}", fn(resid), expected, "batch pos d_model")
    follows_input("{name}", fn, (resid,), "batch pos d_model")
'''

SOLUTION_IMPORTS = """\
from jaxtyping import Float
from torch import Tensor
"""

CHECK_IMPORTS = """\
from typing import Any
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
"""

CHAPTER = '"""Chapter {chapter}."""\n'

SECTION = '"""Checks of chapter {chapter}, {section}."""\n\n'

TESTS = """
SURPRISES["{name}"] = []  # (words of the refusal, a wrong answer that the check does not know)
ALSO_RIGHT["{name}"] = []  # right answers in another style
"""

SECTION_TESTS = '''\
"""What the checks of chapter {chapter}, {section}, cannot know: see tests/test_checks.py."""

from typing import Any

SECRETS: tuple[str, ...] = ()
SURPRISES: dict[str, list[tuple[str, Any]]] = {{}}
ALSO_RIGHT: dict[str, list[Any]] = {{}}
STILL_RIGHT: set[str] = set()
'''


def new_exercise(chapter: str, name: str, section: str | None) -> list[Place]:
    """Begin an exercise in solution, lesson, check and tests; returns the places to go on at.

    The suite fails until each is written. Raises CourseError, before anything is written, for a name that is taken,
    a chapter that is not there, and where the section has to be named.
    """
    root = root_of_checkout()
    lesson = next((root / CHAPTERS).glob(f"{chapter}_*.md"), None)
    if lesson is None:
        raise CourseError(f"There is no lesson of chapter {chapter} in {CHAPTERS}: see CONTRIBUTING.md, add a chapter.")
    if not name.isidentifier():
        raise CourseError(f"{name!r} cannot be the name of a function or class.")
    taken = re.compile(rf"^def check_{name}\b", re.MULTILINE)
    for path in (root / CHECKS).glob("ch*/*.py"):
        if taken.search(path.read_text(encoding="utf-8")):
            raise CourseError(f"There is an exercise named {name}: its check is in {path.relative_to(root)}.")
    module = f"ch{lesson.stem}"
    section = section or only_section(root, chapter)
    check, tests = root / CHECKS / f"ch{chapter}/{section}.py", root / f"tests/ch{chapter}/test_{section}.py"
    about = {"chapter": chapter, "section": section, "name": name, "module": module}
    solution = root / f"solutions/{module}.py"
    append(solution, SOLUTION.format(**about), start=CHAPTER.format(**about))
    add_imports(solution, SOLUTION_IMPORTS)
    append(lesson, LESSON.format(**about))
    append(check, CHECK.format(**about), start=SECTION.format(**about))
    add_imports(check, CHECK_IMPORTS)
    append(tests, TESTS.format(**about), start=SECTION_TESTS.format(**about))
    return where(name)


def begins_a_section(places: Iterable[Place]) -> bool:
    """Whether this exercise's check is the first of its section, as it is after a slip in the section's name."""
    check = next(place.path for place in places if place.piece == "check")
    return len(re.findall(r"^def check_\w+", check.read_text(encoding="utf-8"), re.MULTILINE)) == 1


def only_section(root: Path, chapter: str) -> str:
    """The one section of a chapter that has checks."""
    has_checks = re.compile(r"^def check_\w+", re.MULTILINE)
    modules = sorted((root / CHECKS / f"ch{chapter}").glob("*.py"))
    sections = [path.stem for path in modules if has_checks.search(path.read_text(encoding="utf-8"))]
    if len(sections) != 1:
        known = ", ".join(sections) or "none yet"
        raise CourseError(f"Say in which section, as --section NAME; chapter {chapter} has {known}.")
    return sections[0]


def append(path: Path, text: str, start: str = "") -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else start
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before.rstrip("\n") + "\n" + text, encoding="utf-8")


def add_imports(path: Path, lines: str) -> None:
    """Add what is not imported yet, after the docstring; `make format` puts it in order."""
    text = path.read_text(encoding="utf-8")
    missing = "".join(line for line in lines.splitlines(keepends=True) if not imports(text, line))
    if not missing:
        return
    end = text.index('"""', text.index('"""') + 3) + 4
    rest = text[end:].lstrip("\n")
    gap = "" if rest.startswith(("import ", "from ")) else "\n\n"
    path.write_text(text[:end] + "\n" + missing + gap + rest, encoding="utf-8")


def imports(text: str, line: str) -> bool:
    """Whether every name of `from x import a, b` is imported in the text."""
    module, names = re.fullmatch(r"from (\S+) import (.*)\n", line).groups()  # type: ignore[union-attr]
    block = re.search(rf"^from {re.escape(module)} import (\([^)]*\)|.*)$", text, re.MULTILINE)
    known = set(re.findall(r"\w+", block[1])) if block else set()
    return set(re.findall(r"\w+", names)) <= known
