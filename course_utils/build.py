"""`course build`: each lesson and its solutions become the two notebooks of a chapter.

    chapters/src/NN_slug.md  +  solutions/chNN_slug.py  ->  chapters/NN_slug.ipynb    what a learner opens
                                                        ->  solutions/NN_slug.ipynb   with the solutions in place
                                                        ->  passages of README.md and other guides (overview.py)

An exercise cell of a lesson imports its solution. That line becomes the signature, docstring and
`raise NotImplementedError` for the learner, and the full source in the solution notebook. Source is cut at the lines
which the AST names and is otherwise untouched, so both notebooks show what the author wrote. The result depends on
the sources alone: building twice changes no byte.

A section with `<!-- optional -->` below its heading says in both notebooks that it is optional, and where the core path
goes on. Below the last hint of an exercise the builder writes how to see the solution.
"""

import ast
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat

from course_utils.cells import names
from course_utils.links import read_release
from course_utils.lint import (
    OPTIONAL,
    LessonCell,
    Part,
    calls_in,
    in_parts,
    lesson_problems,
    name_problems,
    needed_from_optional,
    plain_python,
    read_lesson,
)
from course_utils.overview import FILES, read_chapter, with_passages
from course_utils.scopes import FUNCTIONS, scan
from course_utils.slicing import DEFINITIONS
from course_utils.wording import CITED, MEANT

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# IPython fills in `{importlib...}`: torch is asked for in the version that is there, so that pip leaves it alone.
SETUP = """\
# In Colab this installs the course; everywhere it lets an unwritten exercise say so in one line.
import importlib.metadata
import importlib.util
import sys

if "google.colab" in sys.modules:
    %pip install -q "{requirement}" "torch=={{importlib.metadata.version('torch')}}"
if not importlib.util.find_spec("course_utils"):
    raise ModuleNotFoundError("No course here. With a network: `pip install {requirement}`, then restart the kernel.")
%load_ext course_utils"""
LINKS = "[Open in Colab]({colab}) · [Download this notebook]({download}) · [Glossary]({glossary})"
# The hints with which the prose below a check begins, and what stands after the last of them.
HINTS = re.compile(r"\A\s*(?:<details><summary>Hint.*?</details>\s*)+", re.DOTALL)
WAY_OUT = """\
<details><summary>Stuck?</summary>

`!course solution {name}` in a cell, or without the `!` in a terminal, prints the reference solution.

</details>"""


Function = ast.FunctionDef | ast.AsyncFunctionDef


class BuildError(Exception):
    """What is wrong with the sources, one problem a line."""


class Exercise(NamedTuple):
    """One exercise cell of a lesson."""

    symbol: str
    source: str  # what the solution notebook shows
    stub: str  # what the learner's notebook shows; the same where all is given
    metadata: dict[str, Any]


# --- source ---------------------------------------------------------------------------------------------------------


def first_line(node: ast.stmt) -> int:
    """The line (from 1) on which a statement begins, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)])


def last_line(node: ast.stmt, lines: list[str]) -> int:
    """The line on which it ends, including comments at the end of its body, which the AST does not know."""
    end = node.end_lineno or node.lineno
    for number in range(end + 1, len(lines) + 1):
        text = lines[number - 1]
        if text.strip() and not (text.lstrip().startswith("#") and len(text) - len(text.lstrip()) > node.col_offset):
            break
        end = number if text.strip() else end
    return end


@functools.cache
def parsed(text: str) -> ast.Module:
    """A module's statements, parsed once for all its exercises."""
    return ast.parse(text)


def definition(text: str, symbol: str) -> ast.stmt:
    """The top-level function, class or assignment of that name; LookupError where there is none."""
    for node in reversed(parsed(text).body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == symbol or symbol in [t.id for t in targets if isinstance(t, ast.Name)]:
            return node
    raise LookupError(f"it defines no {symbol}")


def full_source(text: str, symbol: str) -> str:
    """The definition as it stands in the text, decorators and comments included."""
    lines, node = text.split("\n"), definition(text, symbol)
    return "\n".join(lines[first_line(node) - 1 : last_line(node, lines)])


def is_given(node: Function, lines: list[str]) -> bool:
    """Whether a line of the signature ends in `# given`: that body is shown to the learner."""
    signature = lines[node.lineno - 1 : max(node.lineno, first_line(node.body[0]) - 1)]
    return any(line.rstrip().endswith("# given") for line in signature)


def stub_source(text: str, symbol: str) -> str:
    """The definition with the bodies taken out that the learner writes.

    A body becomes its docstring, `# YOUR CODE HERE` and `raise NotImplementedError("name")`. In a class the methods
    marked `# given` stay, and so does everything that is not a method. Raises ValueError where no statement of the
    exercise (a docstring) or nothing to write would be left, LookupError where the symbol is not defined.
    """
    lines, node = text.split("\n"), definition(text, symbol)
    if isinstance(node, ast.ClassDef):
        bodies = [(f"{symbol}.{n.name}", n) for n in node.body if isinstance(n, FUNCTIONS)]
    elif isinstance(node, FUNCTIONS):
        bodies = [(symbol, node)]
    else:
        raise ValueError(f"{symbol} is neither a function nor a class")
    bodies = [(name, body) for name, body in bodies if not is_given(body, lines)]
    if not bodies:
        raise ValueError(f"{symbol} leaves nothing to write: everything is marked `# given`")
    for name, body in [(symbol, node), *bodies]:
        # A constructor is stated by the docstring of its class.
        if not ast.get_docstring(body) and not name.endswith("__"):
            raise ValueError(f"{name} has no docstring, and that is the statement of the exercise")

    stub, position = [], first_line(node)
    for name, body in bodies:
        cut, indent = end_of_signature(name, body, lines), " " * body.body[0].col_offset
        stub += lines[position - 1 : cut]
        stub += [f"{indent}# YOUR CODE HERE", f'{indent}raise NotImplementedError("{name}")']
        position = last_line(body, lines) + 1
    return "\n".join(stub + lines[position - 1 : last_line(node, lines)])


def end_of_signature(name: str, node: Function, lines: list[str]) -> int:
    """The last line of signature and docstring, after which the body is cut off."""
    has_docstring = ast.get_docstring(node) is not None
    for statement in node.body[: 1 + has_docstring]:
        if lines[statement.lineno - 1][: statement.col_offset].strip():
            raise ValueError(f"{name}: every statement of the body must begin on a line of its own")
    return last_line(node.body[0], []) if has_docstring else first_line(node.body[0]) - 1


def read_exercise(cell: LessonCell, root: Path, optional: bool) -> Exercise:
    """Look up the solution of an exercise cell. Raises ValueError or LookupError with what is wrong."""
    match ast.parse(cell.source).body:
        case [ast.ImportFrom(module=str(module), names=[ast.alias(name=symbol, asname=None)])]:
            pass
        case _:
            raise ValueError("an exercise cell holds one line, `from solutions.chNN_slug import name`")
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    if not module.startswith("solutions.") or not path.is_file():
        raise LookupError(f"there is no module {module}")
    text = path.read_text(encoding="utf-8")
    try:
        source = full_source(text, symbol)
        if "given" in cell.tags:
            return Exercise(symbol, source, source, {"tags": ["given"]})
        stub = stub_source(text, symbol)
    except (LookupError, ValueError) as error:
        raise type(error)(f"{module}: {error}") from None
    difficulty, minutes = cell.options.get("difficulty"), cell.options.get("minutes")
    if difficulty not in (1, 2, 3, 4, 5) or not isinstance(minutes, int) or minutes < 1:
        raise ValueError(f"{symbol} needs `:difficulty:` from 1 to 5 and `:minutes:`")
    header = f"# Exercise · difficulty {'●' * difficulty}{'○' * (5 - difficulty)} · about {minutes} minutes"
    header += " · optional\n" if optional else "\n"
    course = {"exercise": symbol, "difficulty": difficulty, "minutes": minutes}
    course |= {"optional": True} if optional else {}
    return Exercise(symbol, header + source, header + stub, {"tags": ["exercise"], "course": course})


# --- which cells wait for an exercise -------------------------------------------------------------------------------


def waiting_cells(cells: list[str], exercises: set[str]) -> list[bool]:
    """For each code cell whether running it needs one of the exercises, directly or through what other cells bind.

    Static and generous: a cell that reads a tainted name may stop at its first line, so all that it binds, and every
    object which it changes or calls a method of in passing, is tainted from there on.
    """
    tainted, modules, waiting = set(exercises), set(), []
    for cell in cells:
        code = plain_python(cell)
        tree, found = ast.parse(code), names(code)
        modules |= set().union(*(names(ast.unparse(n)).bound for n in tree.body if isinstance(n, DEFINITIONS[:2])))
        if all(isinstance(node, DEFINITIONS) for node in tree.body):
            # Defining is harmless; calling what was defined is not. An exercise cell itself ends up here.
            parts = [names(ast.unparse(node)) for node in tree.body]
            tainted |= set().union(*(part.bound for part in parts if part.read & tainted))
            waiting.append(False)
        elif found.read & tainted:
            tainted |= found.bound | (changed(tree) - modules)
            waiting.append(True)
        else:
            tainted -= found.bound
            waiting.append(False)
    return waiting


def changed(tree: ast.Module) -> set[str]:
    """Names of objects that the code writes into (`seen[0] = ...`) or calls for their effect (`losses.append(...)`)."""
    found = scan(tree, deep=True)
    return set().union(*(uses.changed | uses.called_on for uses in (found.now, found.later)))


# --- prose ----------------------------------------------------------------------------------------------------------


def with_marks(parts: list[list[Part]]) -> list[str]:
    """The prose of each cell as readers see it: every optional section says so, and where the core path goes on."""
    following = [part for cell in parts for part in cell if part.level]
    result = []
    for cell in parts:
        texts = []
        for part in cell:
            following = following[1:] if part.level else following
            texts.append(with_mark(part, following) if part.marked else part.source)
        result.append(CITED.sub("", MEANT.sub("", "".join(texts))))
    return result


def with_mark(part: Part, following: list[Part]) -> str:
    """The text of a marked section's first part; `following` are the parts below it that begin with a heading."""
    if part.level == 1:
        return part.source.replace(OPTIONAL, "*This chapter is optional: the core path goes without it.*", 1)
    goes_on = next((later.title for later in following if later.level <= part.level and not later.optional), None)
    note = f"*Optional. The core path goes on at “{goes_on}”.*" if goes_on else "*Optional. The core path ends above.*"
    heading, _, rest = part.source.partition("\n")
    return f"{heading} (optional)\n{rest.replace(OPTIONAL, note, 1)}"


def under_title(source: str, lines: str) -> str:
    """The first cell's text with these lines below its title."""
    return source.replace("\n", f"\n\n{lines}\n", 1)


def with_way_out(source: str, symbol: str) -> str:
    """The prose below an exercise's check, with the way out after its hints."""
    hints = HINTS.match(source)
    end = hints.end() if hints else 0
    return "\n\n".join(filter(None, [source[:end].strip(), WAY_OUT.format(name=symbol), source[end:].strip()]))


# --- notebooks ------------------------------------------------------------------------------------------------------


def new_cell(kind: str, source: str, identity: str, metadata: Mapping[str, Any]) -> nbformat.NotebookNode:
    """A cell with no id, output or metadata but ours."""
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": identity,
        "source": source,
        "metadata": {k: v for k, v in metadata.items() if v},
    }
    cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
    return nbformat.from_dict(cell)  # the notebook is validated as a whole


def identities(cells: list[LessonCell]) -> list[str]:
    """A cell's id comes from the lesson's text, and from how often that text stood before."""
    seen: Counter[str] = Counter()
    result = []
    for cell in cells:
        digest = hashlib.sha256(f"{cell.kind}\n{cell.source}".encode()).hexdigest()[:12]
        result.append(f"{digest}-{seen[digest]}" if seen[digest] else digest)
        seen[digest] += 1
    return result


def finished(name: str, cells: list[nbformat.NotebookNode], unused: bool) -> str:
    """The text of a notebook file; nothing in it comes from anywhere but the sources."""
    problems = name_problems(name, [cell.source for cell in cells if cell.cell_type == "code"], unused)
    if problems:
        raise BuildError("\n".join(problems))
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    return nbformat.writes(notebook, version=4) + "\n"


def build_chapter(lesson: Path, root: Path) -> tuple[str, str]:
    """The learner's notebook and the solution notebook of a lesson, as text. Raises BuildError with all problems."""
    cells = read_lesson(lesson)
    parts, exercises, problems = in_parts(cells), {}, []
    for number, cell in enumerate(cells):
        if {"exercise", "given"} & set(cell.tags):
            try:
                exercises[number] = read_exercise(cell, root, parts[number][0].optional)
            except (LookupError, ValueError, SyntaxError) as error:
                problems.append(f"{cell.where}: {error.args[0]}")
    to_write = {number: exercise.symbol for number, exercise in exercises.items() if exercise.stub != exercise.source}
    problems += lesson_problems(cells, to_write)
    if not problems:
        sources = [exercises[n].source if n in exercises else cell.source for n, cell in enumerate(cells)]
        problems += needed_from_optional(cells, sources)
    if problems:
        raise BuildError("\n".join(problems))

    release, name = read_release(root), f"{lesson.stem}.ipynb"
    setup = SETUP.format(requirement=release.requirement)
    links = LINKS.format(
        colab=release.colab(name), download=release.download(name), glossary=release.page("docs/glossary.md")
    )
    learner: list[nbformat.NotebookNode] = []
    solution: list[nbformat.NotebookNode] = []

    def both(cell: nbformat.NotebookNode) -> None:
        learner.append(cell)
        solution.append(nbformat.from_dict(cell))

    asked = checked = ""  # the exercise of the last code cell, and the one whose check that cell was
    for number, (cell, prose, identity) in enumerate(zip(cells, with_marks(parts), identities(cells), strict=True)):
        if cell.kind == "markdown":
            text = with_way_out(prose, checked) if checked else prose
            learner.append(new_cell("markdown", text if number else under_title(text, links), identity, {}))
            solution.append(new_cell("markdown", text, identity, {}))
            checked = ""
            continue
        if checked:
            both(new_cell("markdown", WAY_OUT.format(name=checked), f"stuck-{checked}"[:64], {}))
        if not any(c.kind == "code" for c in cells[:number]):
            both(new_cell("code", setup, "course-setup", {}))
        shown = exercises.get(number) or Exercise("", cell.source, cell.source, {"tags": cell.tags})
        learner.append(new_cell("code", shown.stub, identity, shown.metadata))
        solution.append(new_cell("code", shown.source, identity, shown.metadata))
        asked, checked = to_write.get(number, ""), asked
    if checked:
        both(new_cell("markdown", WAY_OUT.format(name=checked), f"stuck-{checked}"[:64], {}))

    code = [cell for cell in learner if cell.cell_type == "code"]
    for cell, waits in zip(code, waiting_cells([cell.source for cell in code], set(to_write.values())), strict=True):
        if waits or any(ast.unparse(call.func) == "guess" for call in calls_in(cell.source)):  # it may be refused
            cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), "raises-exception"})
    return finished(f"chapters/{name}", learner, unused=False), finished(f"solutions/{name}", solution, unused=True)


def render(root: Path) -> dict[Path, str]:
    """Every generated file of the course and its text. Raises BuildError with the problems of all lessons.

    README and guide are among them: passages in them are generated (overview.py), and those ask something of a lesson.
    """
    files, problems, chapters = {}, [], []
    guides = [root / name for name in FILES if (root / name).is_file()]
    lessons = sorted((root / "chapters" / "src").glob("[0-9][0-9]_*.md"))
    for lesson in lessons:
        try:
            texts = build_chapter(lesson, root)
        except BuildError as error:
            problems.append(str(error))
        else:
            for folder, text in zip(("chapters", "solutions"), texts, strict=True):
                files[root / folder / f"{lesson.stem}.ipynb"] = text
            try:
                chapters += [read_chapter(lesson, texts[1])] if guides else []
            except ValueError as error:
                problems.append(str(error))
    known = {lesson.stem for lesson in lessons}
    for folder in ("chapters", "solutions"):
        for path in sorted((root / folder).glob("*.ipynb")):
            if path.stem not in known:
                problems.append(f"{folder}/{path.name}: generated from no lesson; delete it or restore its source")
    for path in guides if not problems else []:
        try:
            files[path] = with_passages(path.read_text(encoding="utf-8"), chapters, root)
        except (LookupError, ValueError) as error:
            problems.append(f"{path.relative_to(root).as_posix()}: {error}")
    if problems:
        raise BuildError("\n".join(problems))
    return files


def build(root: Path) -> list[Path]:
    """Bring what is generated up to date; returns the files that changed. Nothing is written after an error."""
    changes = {p: t for p, t in render(root).items() if not p.is_file() or p.read_bytes() != t.encode("utf-8")}
    for path, text in changes.items():
        path.write_bytes(text.encode("utf-8"))
    return list(changes)
