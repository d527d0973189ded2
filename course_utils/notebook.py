"""Read a learner's notebook as a module, without running its demos.

`load_notebook(path)` keeps imports, functions, classes and the plain assignments which those read; everything else
(demos, training, plots) is left out. `mine("02", Transformer)` carries a learner's own class into a later chapter.
"""

import ast
import contextlib
import importlib.util
import io
import json
import linecache
import re
import symtable
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

COURSE = "circuits-from-scratch"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (ast.Import, ast.ImportFrom, *FUNCTIONS, ast.ClassDef)


class CourseError(Exception):
    """Something that a person can put right; the message is one sentence that says how."""

    def _render_traceback_(self) -> list[str]:  # IPython prints these lines instead of frames
        return [str(self)]


# --- what a piece of code reads and binds ---------------------------------------------------------------------------


class Names(NamedTuple):
    """Names in the notebook's own namespace (not those local to a function)."""

    read: set[str]
    bound: set[str]


def plain_python(cell_source: str) -> str:
    """The cell as Python: magics and shell lines become calls, as IPython itself would run them."""
    return TransformerManager().transform_cell(cell_source)


def names(code: str) -> Names:
    """What the code reads and binds, functions' insides included. Raises SyntaxError on code that is broken."""
    found = Names(set(), set())
    tables = [symtable.symtable(code, "cell", "exec")]
    top = tables[0]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                if symbol.is_referenced():
                    found.read.add(symbol.get_name())
                if symbol.is_assigned() or symbol.is_imported():
                    found.bound.add(symbol.get_name())
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.read.add(node.target.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("run_"):
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


# --- a notebook as a module -----------------------------------------------------------------------------------------


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Read a notebook file, or say in one sentence why that is not possible."""
    try:
        text = Path(path).read_text(encoding="utf-8")
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


class Statement(NamedTuple):
    """A top-level statement of a code cell; for a cell that is no Python, an empty one with the error."""

    cell: int
    node: ast.stmt
    names: Names
    error: Exception | None = None


def load_notebook(path: Path, wanted: Iterable[str] = ()) -> types.ModuleType:
    """Import the definitions of a notebook as a module, without running its demos.

    Kept are imports, functions and classes, and transitively the plain assignments which they read (`cfg = ...`),
    or which bind a name in `wanted` (an exercise may be answered by `gelu_new = partial(...)`). An assignment is
    plain when it calls no function of the notebook itself, for that is how demos and training begin.

    A broken statement costs only what it defines: `module.__cell_errors__` maps the number of a code cell (the first
    is 1) to a sentence, `module.__broken__` maps names to the cell that failed to define them, and `exercise(module,
    name)` reports them. `module.__reads__` maps each definition to the names that it reads. The sources stay
    reachable for tracebacks. Raises CourseError where the file is missing or no notebook.
    """
    path = Path(path)
    module = types.ModuleType("notebook_" + re.sub(r"\W", "_", path.stem))
    module.__doc__ = f"The definitions of {path.name}."
    space: dict[str, Any] = {"__cell_errors__": {}, "__broken__": {}, "__reads__": {}, "__notebook__": path.name}
    module.__dict__.update(space)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up by name
    for statement in kept(list(statements(path)), set(wanted)):
        for name in statement.names.bound:
            module.__reads__[name] = statement.names.read
        tree = ast.Module(body=[statement.node], type_ignores=[])
        try:
            if statement.error:
                raise statement.error
            exec(compile(tree, cell_name(path, statement.cell), "exec", dont_inherit=True), module.__dict__)
        except (Exception, SystemExit) as error:
            line = error.lineno if isinstance(error, SyntaxError) else statement.node.lineno
            what = error.msg if isinstance(error, SyntaxError) else error
            where = f"code cell {statement.cell} of {path.name}, line {line}"
            module.__cell_errors__.setdefault(statement.cell, f"{where}: {type(error).__name__}: {what}")
            module.__broken__.update(dict.fromkeys(statement.names.bound, statement.cell))
        else:
            for name in statement.names.bound:
                module.__broken__.pop(name, None)
    return module


def cell_name(path: Path, number: int) -> str:
    """The file name which tracebacks show for a cell."""
    return f"{path.name} code cell {number}"


def statements(path: Path) -> Iterator[Statement]:
    """The top-level statements of all code cells."""
    cells = [cell.source for cell in read_notebook(path).cells if cell.cell_type == "code"]
    for number, source in enumerate(cells, start=1):
        try:
            code = plain_python(source)
            tree = ast.parse(code, cell_name(path, number))
            compile(tree, cell_name(path, number), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            lost = set(re.findall(r"^(?:async def|def|class)\s+(\w+)|^(\w+)\s*=", source, re.MULTILINE))
            yield Statement(number, ast.Pass(lineno=1), Names(set(), {a or b for a, b in lost}), error)
            continue
        # The fourth field is any path; mtime None keeps the entry when linecache looks for changed files.
        linecache.cache[cell_name(path, number)] = (len(code), None, code.splitlines(True), cell_name(path, number))
        for node in tree.body:
            yield Statement(number, node, names(ast.unparse(node)))


def kept(candidates: list[Statement], wanted: set[str]) -> list[Statement]:
    """The definitions, and the assignments they need, in the order of the notebook."""
    functions = {s.node.name for s in candidates if isinstance(s.node, FUNCTIONS)}
    always = (*DEFINITIONS, ast.Pass)  # Pass: a broken cell, or nothing

    def plain(node: ast.AST) -> bool:
        called = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        return not called & functions

    def may_stay(node: ast.stmt, bound: set[str]) -> bool:
        if isinstance(node, always):
            return True
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            return bool(bound & wanted) or plain(node)
        if isinstance(node, (ast.If, ast.Try)):  # `try: import ...`, `if torch.cuda.is_available(): device = ...`
            inside = [n for n in ast.walk(node) if isinstance(n, ast.stmt) and n is not node]
            return all(isinstance(n, (*DEFINITIONS, ast.Assign, ast.Pass, ast.If)) for n in inside) and plain(node)
        return False

    chosen: set[int] = set()
    needed = set(wanted)
    possible = {i: s for i, s in enumerate(candidates) if may_stay(s.node, s.names.bound)}
    while True:
        new = {
            i: statement
            for i, statement in possible.items()
            if i not in chosen and (isinstance(statement.node, always) or statement.names.bound & needed)
        }
        if not new:
            return [candidates[i] for i in sorted(chosen)]
        chosen |= new.keys()
        needed.update(*(statement.names.read for statement in new.values()))


def exercise(module: types.ModuleType, name: str) -> Any:
    """The learner's object of that name, or a CourseError that says which cell is to blame."""
    if name in module.__broken__:
        raise CourseError(f"{name}: {module.__cell_errors__[module.__broken__[name]]}")
    if not hasattr(module, name):
        raise CourseError(f"{name}: not found in {module.__notebook__}; was its cell deleted or the name changed?")
    return getattr(module, name)


# --- where things are -----------------------------------------------------------------------------------------------


def checkout() -> Path | None:
    """The copy of the repository that the current folder is part of, if it is."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "chapters" / "src").is_dir() and (folder / "course_utils").is_dir():
            return folder
    return None


def chapters_folder() -> Path:
    """Where the learner's notebooks come from: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "chapters"
    return installed if installed.is_dir() else package.parent / "chapters"


def work_folder() -> Path:
    """Where the learner's own copies are: `work` in the checkout that the current folder is part of, else `./work`."""
    here = Path.cwd()
    root = here.parent if here.name == "work" else here
    return (checkout() or root) / "work"


def verify_solutions() -> None:
    """Raise CourseError when `import solutions` would find somebody else's package; found out without importing it."""
    spec = importlib.util.find_spec("solutions")
    if spec is None:
        raise CourseError(f"The package `solutions` is missing: install {COURSE} again.")
    if spec.origin is None or COURSE not in Path(spec.origin).read_text(encoding="utf-8", errors="replace"):
        found = Path(spec.origin).parent if spec.origin else next(iter(spec.submodule_search_locations or ["?"]))
        raise CourseError(
            f"`import solutions` finds {found}, which is not this course's: rename it, or work in another folder."
        )


def mine(chapter: str, reference: type) -> type:
    """The learner's own class of that name if its checks pass, otherwise the reference; prints one line saying which.

    The class is looked for in the chapter's notebook in `work/`. Its checks are that of the class itself and those of
    every exercise of the chapter that its code uses. A part that is not written yet may be missing where the class
    passes without it: a GPT-2 needs no `RotaryAttention`.
    """
    verify_solutions()
    name = reference.__name__
    try:
        own, unwritten = checked(chapter, name)
    except CourseError as error:
        print(f"{name}: the reference ({error})")
        return reference
    without = f"; not written yet: {', '.join(unwritten)}" if unwritten else ""
    print(f"{name}: yours, from chapter {chapter}{without}")
    return own


def checked(chapter: str, name: str) -> tuple[type, list[str]]:
    """The learner's object, and which of the exercises that its code names are not written and were not missed.

    Raises CourseError, with the reason, where it or an exercise that it uses is wrong, or one that it needs unwritten.
    """
    from course_utils.checks import CheckFailed, NotWritten, check, find_checks

    paths = sorted(work_folder().glob(f"{chapter}_*.ipynb"))
    if not paths:
        raise CourseError(f"there is no notebook of chapter {chapter} in {work_folder().name}/")
    symbols = find_checks()[chapter]
    module = load_notebook(paths[0], symbols)
    used, waiting = {name}, [name]
    while waiting:
        new = module.__reads__.get(waiting.pop(), set()) - used
        used |= new
        waiting += new
    unwritten: list[str] = []
    for symbol in [*(s for s in symbols if s in used and s != name), name]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check(exercise(module, symbol), symbol)
        except NotWritten as error:
            unwritten.append(symbol)
            if symbol == name:
                needed = [s for s in unwritten if f"`{s}`" in str(error)] or unwritten
                raise CourseError(f"yours needs {needed[0]}, which is not written yet") from None
        except CheckFailed as error:
            raise CourseError(f"yours does not pass: {str(error).splitlines()[0]}") from None
    return getattr(module, name), unwritten
