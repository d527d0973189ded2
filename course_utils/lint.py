"""Read a lesson, and say what would disappoint a learner in its prose, its exercises or the notebooks built from it."""

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from course_utils import cells as notebook_cells
from course_utils.cells import names
from course_utils.wording import findings

plain_python = functools.cache(notebook_cells.plain_python)  # several rules read each cell, in two notebooks
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#{1,6})[ \t]+(.*)$", re.MULTILINE)
OPTIONAL = "<!-- optional -->"  # below a heading: this section, with the exercises in it, is not on the core path
MYST = {
    "a directive": re.compile(r"^\s*(`{3,}|~{3,}|:{3,})\s*\{[^}]*\}|^\s*:{3,}\s*\w*\s*$", re.MULTILINE),
    "a role": re.compile(r"\{[\w:.-]+\}`[^`]+`"),
    "a target": re.compile(r"^\([\w:.-]+\)=\s*$", re.MULTILINE),
    "a comment": re.compile(r"^% ", re.MULTILINE),
}


class LessonCell(NamedTuple):
    """A cell of a lesson; `where` is its file and line."""

    kind: str  # "code" or "markdown"
    source: str
    tags: list[str]
    options: Mapping[str, Any]
    where: str


def read_lesson(path: Path) -> list[LessonCell]:
    """Read a lesson through jupytext (MyST), with the line on which each cell's text begins."""
    import jupytext

    text = path.read_text(encoding="utf-8")
    cells, position = [], 0
    for cell in jupytext.reads(text, fmt="md:myst").cells:
        position = max(position, text.find(cell.source, position))
        line = text.count("\n", 0, position) + 1
        options = dict(cell.metadata)
        tags = options.pop("tags", [])
        cells.append(LessonCell(cell.cell_type, cell.source, tags, options, f"chapters/src/{path.name}:{line}"))
    return cells


class Part(NamedTuple):
    """What stands in one cell under one heading; the first part of a cell may go on from the cell before."""

    source: str
    level: int  # of the heading that it begins with; 0 where it begins with none
    title: str
    marked: bool  # whether the heading carries the mark
    optional: bool  # whether it is in a section that does


def in_parts(cells: Iterable[LessonCell]) -> list[list[Part]]:
    """The parts of each cell, with which of them are optional; a cell of code is one part."""
    result, optional = [], 0  # the level of the optional section that we are in
    for cell in cells:
        parts = []
        for source in by_headings(cell.source) if cell.kind == "markdown" else [cell.source]:
            heading = HEADING.match(source) if cell.kind == "markdown" else None
            level, title = (len(heading[1]), heading[2].strip()) if heading else (0, "")
            if level and level <= optional:
                optional = 0
            marked = bool(heading) and source[heading.end() :].lstrip().startswith(OPTIONAL)  # type: ignore[union-attr]
            if marked and not optional:
                optional = level
            parts.append(Part(source, level, title, marked, bool(optional)))
        result.append(parts)
    return result


def by_headings(source: str) -> list[str]:
    """The text cut before each of its headings; what begins with `#` inside of a block of code is none."""
    prose = FENCED.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), source)
    starts = [match.start() for match in HEADING.finditer(prose)]
    bounds = [*({0} | set(starts)), len(source)]
    bounds.sort()
    return [source[begin:end] for begin, end in itertools.pairwise(bounds)]


def front_matter(path: Path) -> Mapping[str, Any]:
    """What stands between the two `---` with which a lesson begins."""
    import jupytext

    begin, mark, _ = path.read_text(encoding="utf-8").partition("\n---\n")
    return jupytext.reads(begin + mark, fmt="md:myst").metadata if begin.startswith("---\n") else {}


def lesson_problems(cells: list[LessonCell], exercises: Mapping[int, str]) -> list[str]:
    """What is wrong with the prose and the order of cells; `exercises` maps cell numbers to the symbol asked for."""
    problems = prose_problems(cell for cell in cells if cell.kind == "markdown")
    problems += [*misplaced_marks(cells), *wording_problems(cells)]
    code = [number for number, cell in enumerate(cells) if cell.kind == "code"]
    if not code or "setup" not in cells[code[0]].tags:
        problems.append(
            f"{cells[code[0]].where if code else 'the lesson'}: the first code cell must carry the tag `setup`"
        )
    for number in code:
        where = cells[number].where
        if cells[number].source.lstrip().startswith("%%"):
            problems.append(f"{where}: a cell magic hides its code from the builder; use statements or a line magic")
            continue
        try:
            compile(
                plain_python(cells[number].source), where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
            )
        except SyntaxError as error:
            problems.append(f"{where}: {error.msg}")
    for number, symbol in exercises.items():
        following = next((cells[n].source for n in code if n > number), "")
        if not is_check(following, symbol):
            problems.append(f"{cells[number].where}: the code cell after the exercise must hold `check({symbol})`")
    seen: set[str] = set()
    for number, symbol in exercises.items():
        if symbol in seen:
            problems.append(f"{cells[number].where}: {symbol} has been an exercise before")
        seen.add(symbol)
    return problems + guess_problems([cell for cell in cells if cell.kind == "code"])


def guess_problems(cells: list[LessonCell]) -> list[str]:
    """What is wrong with the guesses: each has a name of this chapter, dots for an answer, and a result later on."""
    problems: list[str] = []
    open_: dict[str, str] = {}  # where a guess waits for its result
    summed = True
    for cell in cells:
        for call in calls_in(cell.source):
            function, name = ast.unparse(call.func), call.args and getattr(call.args[0], "value", None)
            wrong = ""
            if function == "guess":
                chapter = Path(cell.where).name[:3].replace("_", ".")
                if not isinstance(name, str) or not name.startswith(chapter):
                    wrong = f"a guess needs a name of this chapter, such as '{chapter}loss'"
                elif name in open_:
                    wrong = f"two guesses have the name {name!r}"
                elif len(call.args) != 2 or ast.unparse(call.args[1]) != "...":
                    wrong = f"the guess {name!r} is the learner's to make: write `...`"
                open_[str(name)] = cell.where
                summed = False
            elif function == "reveal" and name not in open_:
                wrong = f"`reveal` comes before any guess of the name {name!r}"
            elif function == "reveal":
                open_[str(name)] = ""
            elif function == "my_guesses":
                summed = True
            problems += [f"{cell.where}: {wrong}"] * bool(wrong)
    problems += [f"{where}: nothing reveals the guess {name!r}" for name, where in open_.items() if where]
    return problems if summed else [*problems, f"{cells[-1].where}: `my_guesses` has to come after the last guess"]


def calls_in(source: str) -> list[ast.Call]:
    """The calls in a cell; none where it is no Python."""
    try:
        return [node for node in ast.walk(ast.parse(plain_python(source))) if isinstance(node, ast.Call)]
    except SyntaxError:
        return []


def is_check(source: str, symbol: str) -> bool:
    """Whether the cell calls check(symbol)."""
    found = calls_in(source)
    return any(ast.unparse(c.func) == "check" and c.args and ast.unparse(c.args[0]) == symbol for c in found)


def prose_problems(cells: Iterable[LessonCell]) -> list[str]:
    """MyST syntax, which Jupyter and Colab show as it stands, and headings that skip a level."""
    problems, level = [], 0
    for cell in cells:
        for kind, pattern in MYST.items():
            for match in pattern.finditer(cell.source if kind == "a directive" else FENCED.sub("", cell.source)):
                problems.append(f"{cell.where}: {kind} of MyST does not render in Jupyter: {match[0].strip()}")
        for marks, title in re.findall(r"^(#{1,6})\s+(.*)$", FENCED.sub("", cell.source), re.MULTILINE):
            if len(marks) > level + 1 or (len(marks) == 1 and level):
                wanted = "a lesson has one title" if len(marks) == 1 else f"expected at most {'#' * (level + 1)}"
                problems.append(f"{cell.where}: heading `{marks} {title}` is out of order; {wanted}")
            level = len(marks)
    return problems


def wording_problems(cells: Iterable[LessonCell]) -> Iterator[str]:
    """Words in the prose for which the course has a better one."""
    for cell in cells:
        file, _, line = cell.where.rpartition(":")
        if cell.kind == "markdown":
            yield from (f"{file}:{int(line) + finding.line}: {finding}" for finding in findings(cell.source))


def misplaced_marks(cells: list[LessonCell]) -> Iterator[str]:
    """Marks that are not below a heading, or in a section that is optional already."""
    outer = 0
    for cell, parts in zip(cells, in_parts(cells), strict=True):
        for part in parts if cell.kind == "markdown" else []:
            if part.level and part.level <= outer:
                outer = 0
            if part.source.count(OPTIONAL) > part.marked:
                yield f"{cell.where}: `{OPTIONAL}` has to stand right below the heading of a section"
            if part.marked and outer:
                yield f"{cell.where}: the section around “{part.title}” is optional already"
            outer = outer or part.level * part.marked


def needed_from_optional(cells: list[LessonCell], sources: list[str]) -> Iterator[str]:
    """Names that the core path reads as an optional cell left them: missing, or another, for those who skipped it.

    `sources` is what stands in each cell of the solution notebook.
    """
    optional: set[str] = set()  # bound last by a cell that is
    for cell, [part, *_], source in zip(cells, in_parts(cells), sources, strict=True):
        if cell.kind != "code":
            continue
        found = names(plain_python(source))
        if part.optional:
            optional |= found.bound
            continue
        for name in sorted((found.read & optional) - found.bound):
            yield f"{cell.where}: this cell is on the core path, but `{name}` comes from an optional section above it"
        optional -= found.bound


def name_problems(notebook: str, cells: list[str], unused: bool = True) -> list[str]:
    """What pyflakes says about the code cells of a notebook read one after the other.

    Without `unused` nothing is said about imports that nobody reads yet: in a learner's notebook they wait for the
    learner's code.
    """
    from pyflakes import checker, messages  # type: ignore[import-untyped]

    waiting = () if unused else (messages.UnusedImport, messages.RedefinedWhileUnused)
    code, starts = "", []
    for cell in cells:
        starts.append(code.count("\n"))
        code += plain_python(cell).rstrip("\n") + "\n"
    tree = without_shapes(ast.parse(code))
    found = checker.Checker(tree, filename=notebook, builtins={"get_ipython", "display"})
    problems = []
    for message in sorted((m for m in found.messages if not isinstance(m, waiting)), key=lambda m: m.lineno):
        number = sum(start < message.lineno for start in starts)
        problems.append(f"{notebook}: code cell {number}: {message.message % message.message_args}")
    return problems


def without_shapes(tree: ast.Module) -> ast.Module:
    """The same code with `Float[Tensor, "batch pos"]` as `Float[Tensor]`: shapes are no code, and name no variables."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"]
    kinds = {alias.asname or alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in kinds:
            node.slice = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
    return tree
