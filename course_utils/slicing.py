"""Which statements of a notebook an answer needs.

A unit is a statement at the notebook's own level: a simple one, a definition, or the head of a `for`, `with` or `if`,
whose body is made of further units. Nothing is run here.
"""

import ast
import builtins
import copy
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Set
from typing import NamedTuple

from course_utils.scopes import FUNCTIONS, base, parameters, scan

DEFINITIONS = (ast.Import, ast.ImportFrom, *FUNCTIONS, ast.ClassDef)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
TRIES = (ast.Try, ast.TryStar)
BINDS_UNSEEN = {"exec", "globals"}
ONLY_SHOW = {"print", "display", "check", "help", "len", "type", "guess", "reveal", "my_guesses"}
END = 1 << 30  # after the last statement: when the answers are called


class Unit:
    """A statement at the notebook's own level, or the head of one that has a body."""

    def __init__(self, node: ast.stmt, cell: int, index: int, parents: "tuple[Unit, ...]") -> None:
        self.node, self.cell, self.index, self.parents = node, cell, index, parents
        self.found = scan(node)
        self.at = index  # what it reads was made before; in a loop, also by what comes later in the loop
        self.companions: list[Unit] = []  # units that run wherever this head does
        self.changed: set[str] = set()
        self.perhaps: set[str] = set()  # what else it might change, for which alone it does not run
        # Nothing that was made before under the same name is left.
        self.replaces = not parents and isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, *DEFINITIONS))

    @property
    def bare_call(self) -> ast.Call | None:
        """The call that is all of this statement."""
        return self.node.value if isinstance(self.node, ast.Expr) and isinstance(self.node.value, ast.Call) else None


def blocks(node: ast.AST) -> list[tuple[ast.AST, str]]:
    """Where a statement at the notebook's own level has further ones: a node and the name of its field."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return []
    own = [(node, f) for f in ("body", "orelse", "finalbody") if isinstance(getattr(node, f, None), list)]
    for part in [*getattr(node, "handlers", ()), *getattr(node, "cases", ())]:
        own += blocks(part)
    return own


def make_units(statements: Iterable[tuple[int, ast.stmt]]) -> list[Unit]:
    """The units of the statements of all cells, each given with its cell's number, in their order."""
    units: list[Unit] = []

    def add(node: ast.stmt, cell: int, parents: tuple[Unit, ...]) -> None:
        unit = Unit(node, cell, len(units), parents)
        units.append(unit)
        for owner, field in blocks(node):
            start = len(units)
            for statement in getattr(owner, field):
                add(statement, cell, (*parents, unit))
            if (isinstance(node, TRIES) or _suppresses(node)) and owner is node and field == "body":
                unit.companions += units[start:]  # any of them may be what fails
            if isinstance(node, LOOPS):
                unit.companions += [u for u in units[start:] if isinstance(u.node, (ast.Break, ast.Continue))]

    for cell, node in statements:
        start = len(units)
        add(node, cell, ())
        for unit in units[start:]:
            if any(isinstance(u.node, LOOPS) for u in (unit, *unit.parents)):
                unit.at = len(units)
    _find_changes(units)
    return units


def _suppresses(node: ast.stmt) -> bool:
    """Whether it is `with contextlib.suppress(...)`, which is another way to write `try`."""
    calls = [item.context_expr for item in node.items] if isinstance(node, (ast.With, ast.AsyncWith)) else []
    return any(isinstance(call, ast.Call) and ast.unparse(call.func).endswith("suppress") for call in calls)


def _find_changes(units: list[Unit]) -> None:
    """Say of each unit which objects it changes, itself or by calling one of the notebook's own functions."""
    imported = {name for u in units if isinstance(u.node, (ast.Import, ast.ImportFrom)) for name in u.found.now.bound}
    functions: dict[str, list[Unit]] = defaultdict(list)
    aliases: dict[str, Set[str]] = {}
    for unit in units:
        if isinstance(unit.node, (*FUNCTIONS, ast.ClassDef)):
            functions[unit.node.name].append(unit)
    for unit in units:
        uses = unit.found.now
        fresh = uses.bound - uses.changed
        aliases = {name: others - fresh for name, others in aliases.items() if name not in fresh}
        for name, others in _aliases(unit.node).items():
            aliases[name] = aliases.get(name, frozenset()) | others
        # A library's own functions (`plt.show()`, `torch.manual_seed(0)`) make nothing that an answer reads.
        unit.changed |= uses.changed | (uses.called_on - imported)
        for call in unit.found.calls:
            called: str = call.func.id  # type: ignore[attr-defined]
            if call is unit.bare_call and not hasattr(builtins, called):
                unit.changed |= {called} - imported - functions.keys()  # an object that counts its calls, perhaps
            for function in functions.get(called, ()):
                later = function.found.later
                unit.changed |= later.bound | _changed_arguments(function, call)
                # Called for its result it may change things too, a cache perhaps, and demos and training do that.
                changed = unit.changed if call is unit.bare_call else unit.perhaps
                changed |= later.changed | (later.called_on - imported)
        waiting = list(unit.changed)
        while waiting:
            new = aliases.get(waiting.pop(), frozenset()) - unit.changed - imported
            unit.changed |= new
            waiting += new


def _aliases(node: ast.stmt) -> dict[str, Set[str]]:
    """Names that stand for other names' objects or for parts of them: `x = xs[0]`, `for x in xs`."""
    if isinstance(node, (ast.For, ast.AsyncFor)):
        others = frozenset(_handed_on(node.iter))
        return {n.id: others for n in ast.walk(node.target) if isinstance(n, ast.Name)}
    if isinstance(node, ast.Assign):
        same = {part.id for part in [*node.targets, node.value] if isinstance(part, ast.Name)}  # `x = y = z`
        whole = {name for name in [base(node.value)] if name}
        return {name: frozenset(same | whole) - {name} for name in same}
    return {}


def _handed_on(iterated: ast.AST) -> Iterator[str]:
    """The names whose parts a loop hands on: `xs` and `ys` of `zip(xs, ys.values())`, none of what a function makes."""
    match iterated:
        case ast.Name(id=name):
            yield name
        case ast.Call(func=ast.Name(id="zip" | "enumerate" | "reversed" | "list" | "tuple" | "sorted")):
            for argument in iterated.args:
                yield from _handed_on(argument)
        case ast.Call(func=ast.Attribute(value=inner)) | ast.Attribute(value=inner) | ast.Subscript(value=inner):
            yield from _handed_on(inner)
        case ast.Tuple() | ast.List() | ast.Set() | ast.Dict():
            for part in ast.iter_child_nodes(iterated):
                yield from _handed_on(part)


def _changed_arguments(function: Unit, call: ast.Call) -> set[str]:
    """The names that a call hands to parameters which the function changes."""
    if not isinstance(function.node, FUNCTIONS):
        return set()
    given = dict(zip(parameters(function.node), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    names = {base(value) for name, value in given.items() if name in function.found.parameters}
    return {name for name in names if name}


# --- the slice ------------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """The units that answers need, and all names that these read, directly or not."""

    units: set[Unit]
    names: set[str]


def slice_for(units: list[Unit], wanted: Iterable[str]) -> Slice:
    """What must run so that the wanted names are, after the last statement, what they would be after "Run All".

    Going back from there: whatever binds or changes a name that is needed, up to where it was made anew, and in turn
    what this reads. What functions read counts twice, for when they were made and for when the answers are called.
    """
    defined = {name for u in units if isinstance(u.node, DEFINITIONS) and not u.parents for name in u.found.now.bound}
    writers: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        bound = unit.found.now.bound
        # `for sample in samples` in a demo is no answer to the exercise `sample`.
        for name in (bound - defined if isinstance(unit.node, LOOPS) else bound) | unit.changed:
            writers[name].append(unit)
    unseen = [unit for unit in units if unit.found.now.read & BINDS_UNSEEN]

    chosen: set[Unit] = set()
    seen: set[tuple[str, int]] = set()
    waiting = [(name, END) for name in wanted]

    def choose(unit: Unit, at: int) -> None:
        for part in (unit, *unit.parents):
            waiting.extend((name, part.at) for name in part.found.now.read)
            waiting.extend((name, time) for name in part.found.later.read for time in (at, END))
            if part not in chosen:
                chosen.add(part)
                for companion in part.companions:
                    choose(companion, companion.at)

    while waiting:
        name, at = waiting.pop()
        if (name, at) in seen:
            continue
        seen.add((name, at))
        for unit in reversed(writers.get(name) or ([] if hasattr(builtins, name) else unseen)):
            if unit.index < at:
                choose(unit, at)
                if unit.replaces and name in unit.found.now.bound:
                    break
    return Slice(chosen, {name for name, _ in seen})


def left_aside(units: list[Unit], needed: Slice) -> Iterator[tuple[Unit, set[str]]]:
    """What does not run and might change what an answer needs, which is in the hands of a library's function, say."""
    data = {name for u in units if not isinstance(u.node, DEFINITIONS) for name in u.found.now.bound} & needed.names
    for unit in units:
        call, names = unit.bare_call, unit.perhaps & needed.names
        if call and getattr(call.func, "id", None) not in ONLY_SHOW:
            given = {base(value) for value in [*call.args, *(keyword.value for keyword in call.keywords)]}
            names |= {name for name in given if name in data}
        if names and unit not in needed.units:
            yield unit, names


def pruned(node: ast.stmt, chosen: Container[ast.AST]) -> ast.stmt:
    """A copy of the statement without what was not chosen inside of it."""

    def copied(old: ast.AST) -> ast.AST:
        new = copy.copy(old)
        for field in ("handlers", "cases"):
            if hasattr(new, field):
                setattr(new, field, [copied(part) for part in getattr(old, field)])
        for owner, field in blocks(old):
            if owner is old and getattr(old, field):
                kept = [copied(statement) for statement in getattr(old, field) if statement in chosen]
                setattr(new, field, kept or [ast.copy_location(ast.Pass(), getattr(old, field)[0])])
        return new

    result = copied(node)
    assert isinstance(result, ast.stmt)
    return result
