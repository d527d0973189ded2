"""Read a learner's notebook as a module, without running its demos.

`load_notebook(path)` runs imports, functions and classes, and of the rest what the answers need: whatever gives a value
to a name that they read, or changes it.
"""

import ast
import contextlib
import linecache
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from course_utils.cells import Cell, cell_name, read_cells
from course_utils.places import CourseError
from course_utils.slicing import DEFINITIONS, Unit, left_aside, make_units, pruned, slice_for

MOST_SECONDS = 30.0  # of processor time, for what answers need beside their definitions
MISSING = re.compile(r"name '(\w+)' is not defined")


# --- a notebook as a module -----------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """A statement at the notebook's own level, as much of it as is to be run."""

    cell: int
    node: ast.stmt
    read: set[str]
    bound: set[str]
    changed: set[str]
    error: Exception | None  # why its cell is no Python


class LeftOut(Exception):
    """A statement is needed, and cannot be run here."""


class OutOfTime(BaseException):
    """Not an Exception, which a learner's code may catch."""


def load_notebook(path: Path, wanted: Iterable[str] = (), seconds: float = MOST_SECONDS) -> types.ModuleType:
    """Import a notebook as a module: its definitions, and what the `wanted` answers need, without running its demos.

    All imports, functions and classes run, and of the other statements those that an answer needs (see `slice_for`);
    without `wanted` every definition counts as an answer. After so many seconds of processor time, statements that are
    no definitions are stopped.

    A broken statement costs only what it defines: `module.__cell_errors__` maps the number of a code cell (the first
    is 1) to a sentence, `module.__broken__` maps names which could not be bound to a sentence, and `__left_out__` those
    which are not what Jupyter would have made of them; `exercise` and `explained` report them. `module.__reads__` maps
    each name to those that its value was made of or reads. The sources stay reachable for tracebacks. Raises
    CourseError where the file is missing or no notebook.
    """
    path = Path(path)
    module = types.ModuleType("notebook_" + re.sub(r"\W", "_", path.stem))
    module.__doc__ = f"The definitions of {path.name}."
    space: dict[str, Any] = {"__cell_errors__": {}, "__broken__": {}, "__left_out__": {}, "__reads__": {}}
    space |= {"__notebook__": path.name, "__places__": {}, "__unseen__": [], "__aside__": {}}
    module.__dict__.update(space, display=_shows_nothing, input=_answers_nothing)  # as IPython does
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up by name
    cells = list(read_cells(path))
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _at_most(seconds, cell_name(path, 0)[:-1]) as alarm,
    ):
        to_run, aside = plan(cells, set(wanted))
        for statement in to_run:
            alarm.armed = not isinstance(statement.node, DEFINITIONS)
            _run(statement, path, module)
    for unit, names in aside:
        text = linecache.getline(cell_name(path, unit.cell), unit.node.lineno).strip()[:80]
        module.__aside__.update(dict.fromkeys(names, f"{_where(path, unit.cell, unit.node.lineno)}: {text}"))
    for cell in cells:
        if cell.magic:
            what = "is not run here" if cell.body else "keeps no names"
            why = f"code cell {cell.number} of {path.name}: `{cell.magic}` {what}"
            module.__unseen__.append(why)
            module.__left_out__.update(dict.fromkeys(cell.lost - vars(module).keys(), why))
    return module


def plan(cells: list[Cell], wanted: set[str]) -> tuple[list[Statement], list[tuple[Unit, set[str]]]]:
    """The statements to run, in the order of the notebook, and those left aside that might change a name needed."""
    units = make_units((cell.number, node) for cell in cells for node in cell.body)
    broken = {cell.body[0]: cell for cell in cells if cell.error}
    for unit in units:
        if unit.node in broken:
            unit.found.now.bound.update(broken[unit.node].lost)
            unit.replaces = True
    top = [unit for unit in units if not unit.parents]
    always = {unit for unit in top if isinstance(unit.node, DEFINITIONS) or unit.node in broken}
    needed = slice_for(units, wanted or set().union(*(unit.found.now.bound for unit in always)))
    chosen = needed.units | always
    nodes = {unit.node for unit in chosen}
    statements = []
    for unit in top:
        if unit in chosen:
            inside = [part for part in chosen if part is unit or unit in part.parents]
            uses = [use for part in inside for use in part.found[:2]]
            read, bound = set().union(*(use.read for use in uses)), set().union(*(use.bound for use in uses))
            changed = set().union(*(part.changed for part in inside))
            error = broken[unit.node].error if unit.node in broken else None
            statements.append(Statement(unit.cell, pruned(unit.node, nodes), read, bound, changed - bound, error))
    return statements, list(left_aside(units, needed))


def _run(statement: Statement, path: Path, module: types.ModuleType) -> None:
    """Run one statement in the module, and take down what came of it."""
    line = statement.node.lineno
    try:
        if statement.error:
            raise statement.error
        if "get_ipython" in statement.read:
            raise LeftOut("IPython's own commands are not run here")
        tree = ast.Module(body=[statement.node], type_ignores=[])
        exec(compile(tree, cell_name(path, statement.cell), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit, OutOfTime) as error:
        line = error.lineno or 1 if isinstance(error, SyntaxError) else line
        what = error.msg if isinstance(error, SyntaxError) else error
        kind = "" if isinstance(error, LeftOut | OutOfTime) else f"{type(error).__name__}: "
        why = f"{_where(path, statement.cell, line)}: {kind}{what}"
        module.__cell_errors__.setdefault(statement.cell, why)
        module.__broken__.update(dict.fromkeys(statement.bound, why))
        if not isinstance(statement.node, (*DEFINITIONS, ast.Pass)):
            module.__left_out__.update(dict.fromkeys(statement.bound | statement.changed, why))
    else:
        for name in statement.bound:
            module.__broken__.pop(name, None)
            module.__left_out__.pop(name, None)
    known = module.__reads__
    read = statement.read
    if not isinstance(statement.node, DEFINITIONS):  # what a value is made of, as that is now: its name may be reused
        read = read.union(*(known.get(name, set()) for name in read))
    known.update(dict.fromkeys(statement.bound, read))
    known.update({name: known.get(name, set()) | read for name in statement.changed})
    module.__places__.update(dict.fromkeys(statement.bound, _where(path, statement.cell, line)))


def _where(path: Path, cell: int, line: int) -> str:
    return f"code cell {cell} of {path.name}, line {line}"


def _shows_nothing(*shown: object, **options: object) -> None:
    """`display`, while nobody looks."""


def _answers_nothing(prompt: object = "") -> str:
    """`input`, where nobody can answer."""
    raise LeftOut("nobody can answer `input` here")


@contextlib.contextmanager
def _at_most(seconds: float, cells: str) -> Iterator[types.SimpleNamespace]:
    """Stop code in these cells after so many seconds of processor time, and what follows after one second more.

    Only while what it gives is `armed`, only in the main thread, and not on Windows, which has no such alarm.
    """
    alarm = types.SimpleNamespace(armed=False)
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield alarm
        return

    def stop(number: int, frame: types.FrameType | None) -> None:
        while alarm.armed and frame is not None:
            if frame.f_code.co_filename.startswith(cells):
                raise OutOfTime(f"not finished after {seconds:g} s, so it was stopped")
            frame = frame.f_back

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        yield alarm
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)


# --- what came of it ------------------------------------------------------------------------------------------------


def exercise(module: types.ModuleType, name: str) -> Any:
    """The learner's object of that name, or a CourseError that says which cell is to blame."""
    if name in module.__broken__:
        raise CourseError(f"{name}: {reason(module, name)[1]}")
    if not hasattr(module, name):
        missing = f"not found in {module.__notebook__}; was its cell deleted or the name changed?"
        raise CourseError(f"{name}: {module.__left_out__.get(name, missing)}")
    found = getattr(module, name)
    if not callable(found) and name in module.__places__:
        place, kind = module.__places__[name], type(found).__name__
        raise CourseError(f"{name}: {place} gives this name to something else ({kind}); rename that.")
    return found


def reason(module: types.ModuleType, name: str) -> tuple[str, str]:
    """Why a name is not what it should be, in a sentence; and the name where that began, which this one was made of."""
    known, seen = module.__left_out__ | module.__broken__, {name}
    while (missing := MISSING.search(known[name])) and missing[1] in known.keys() - seen:
        name = missing[1]
        seen.add(name)
    return name, known[name]


def used_by(module: types.ModuleType, name: str) -> list[str]:
    """The name itself and those that its object is made of or reads, directly or through others, the nearest first."""
    used = [name]
    for one in used:
        used += sorted(module.__reads__.get(one, set()).difference(used))
    return used


def explained(module: types.ModuleType, name: str, message: str) -> str:
    """What a check says of an answer; where something that the answer needs was left out, that instead."""
    used, missing = used_by(module, name), MISSING.search(message)
    for part in used:
        # What does not exist does no harm as long as nobody asks for it.
        if part in module.__left_out__ and hasattr(module, part):
            return _needs(name, *reason(module, part))
    if missing and missing[1] in module.__left_out__ | module.__broken__:
        return _needs(name, *reason(module, missing[1]))
    if missing and module.__unseen__:
        return _needs(name, missing[1], module.__unseen__[0])
    aside = [(part, module.__aside__[part]) for part in used if part in module.__aside__]
    return message + "".join(f"\n  Not run here, though it may change `{part}`: {what}" for part, what in aside)


def _needs(name: str, part: str, why: str) -> str:
    return (
        f"{name}: it needs `{part}`, which could not be made as in Jupyter: {why}.\n"
        f"  Next: make sure that this line runs after a restart, or make `{part}` in a simpler way."
    )
