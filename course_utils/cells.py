"""The code cells of a notebook file, as Python: magics read as IPython would run them, broken cells told apart."""

import ast
import contextlib
import json
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from course_utils.places import CourseError
from course_utils.scopes import scan

# Cell magics that run the cell in the notebook's own namespace; all others keep no names.
KEEPING = {"capture", "debug", "prun", "time"}
OPTIONS = r"(?:--[\w-]+\s+|-[lsTD]\s*\S+\s+|-[rq]\s+)*"
LINE_MAGIC = re.compile(r"^(\s*(?:[\w, ]+= )?)get_ipython\(\)\.run_line_magic\('(?:time|prun)', (.+)\)$", re.MULTILINE)


# --- code -----------------------------------------------------------------------------------------------------------


class Names(NamedTuple):
    """Names in the notebook's own namespace (not those local to a function)."""

    read: set[str]
    bound: set[str]


def plain_python(cell_source: str) -> str:
    """The cell as Python: magics and shell lines become calls, as IPython itself would run them."""
    return TransformerManager().transform_cell(cell_source)


def without_magics(cell_source: str) -> str:
    """The same, with what stands under `%%time` or behind `%time` as code on its own lines."""
    blank, name, rest = re.match(r"(\s*)(?:%%(\w+).*\n)?((?s:.*))", cell_source).groups()  # type: ignore[union-attr]
    if name in KEEPING:
        return "\n" * (blank.count("\n") + 1) + without_magics(rest)

    def statement(magic: re.Match[str]) -> str:
        code = plain_python(re.sub(f"^{OPTIONS}", "", ast.literal_eval(magic[2]))).rstrip("\n")
        try:
            return magic[1] + code if ast.parse(code).body else magic[0]
        except (SyntaxError, ValueError):
            return magic[0]

    return LINE_MAGIC.sub(statement, plain_python(cell_source))


def names(code: str) -> Names:
    """What the code reads and binds, functions' insides included. Raises SyntaxError on code that is broken."""
    tree = ast.parse(code)
    uses = scan(tree, deep=True)
    found = Names(uses.now.read | uses.later.read, uses.now.bound | uses.later.bound)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("run_"):
            hidden = hidden_names(node)
            found.read.update(hidden.read)
            found.bound.update(hidden.bound)
    return found


def hidden_names(magic: ast.Call) -> Names:
    """Names inside the strings of a magic: `%timeit f(x)` reads f and x, and `%%time` runs its whole body."""
    strings = [arg.value for arg in magic.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if magic.func.attr == "run_line_magic":  # type: ignore[attr-defined]
        return Names(set(re.findall(r"[^\W\d]\w*", " ".join(strings[1:]))), set())
    with contextlib.suppress(SyntaxError):
        if magic.func.attr == "run_cell_magic":  # type: ignore[attr-defined]
            return names(plain_python(strings[-1]))
    return Names(set(), set())


# --- files ----------------------------------------------------------------------------------------------------------


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Read a notebook file, or say in one sentence why that is not possible."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a byte order mark at its start
        json.loads(text)
    except FileNotFoundError:
        raise CourseError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} cannot be read as a notebook ({error}); restore it or fetch a new copy.") from None
    try:
        notebook = nbformat.from_dict(nbformat.reads(text, as_version=4))
        if all(isinstance(cell.source, str) for cell in notebook.cells):
            return notebook
    except Exception:  # nbformat fails in many ways on JSON that is no notebook
        pass
    raise CourseError(f"{path} is JSON but not a Jupyter notebook; restore it or fetch a new copy.")


class Cell(NamedTuple):
    """A code cell; one that is no Python has the error instead of statements."""

    number: int
    body: list[ast.stmt]
    error: Exception | None = None
    lost: frozenset[str] = frozenset()  # what it would define, if it were Python
    magic: str | None = None  # one that is not run and may define names: `%run`, and most that stand over a cell


def cell_name(path: Path, number: int) -> str:
    """The file name which tracebacks show for a cell."""
    return f"{path.name} code cell {number}"


def read_cells(path: Path) -> Iterator[Cell]:
    """The code cells of a notebook."""
    sources = [cell.source for cell in read_notebook(path).cells if cell.cell_type == "code"]
    for number, source in enumerate(sources, start=1):
        name = cell_name(path, number)
        defined = re.findall(r"^(?:async def|def|class)\s+(\w+)|^(\w+)\s*=", source, re.MULTILINE)
        lost = frozenset(a or b for a, b in defined)
        try:
            code = without_magics(source)
            tree = ast.parse(code, name)
            compile(tree, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            for node in ast.walk(tree):
                if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "__name__":
                    node.left = ast.copy_location(ast.Constant("__main__"), node.left)  # as it is in Jupyter
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            yield Cell(number, [ast.Pass(lineno=1, col_offset=0)], error, lost)
            continue
        # The fourth field is any path; mtime None keeps the entry when linecache looks for changed files.
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        whole = re.match(r"\s*%%(\w+)", source)
        if whole and whole[1] not in KEEPING:
            yield Cell(number, [], lost=lost, magic=f"%%{whole[1]}")
        else:
            part = re.search(r"^\s*(%(?:run|pylab|store)\b)", source, re.MULTILINE)
            yield Cell(number, tree.body, magic=part and part[1])
