"""What a piece of code reads, binds and changes in the notebook's own namespace, functions' insides included.

Nothing is run, and only the standard library is used: Python's own symbol tables say something else in every version.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

# What changes its first argument, and what changes the object that it is a method of; so do torch's names in `_`.
CHANGING_FUNCTIONS = set("setattr delattr next shuffle heapify heappush heappop insort".split())
CHANGING_METHODS = set("pop popitem setdefault".split())


class Uses(NamedTuple):
    """Names of the notebook's own namespace, by what happens to them."""

    read: set[str]
    bound: set[str]
    changed: set[str]  # `x.y = 1`, `x[0] = 1`, `x += [1]`, `setattr(x, "y", 1)`
    called_on: set[str]  # `x.append(1)` as a statement of its own

    @classmethod
    def none(cls) -> "Uses":
        return cls(set(), set(), set(), set())


class Found(NamedTuple):
    """What a piece of code does at once, and what its functions do when they are called."""

    now: Uses
    later: Uses
    parameters: set[str]  # what a function changes of what it is given
    calls: list[ast.Call]  # of functions by their names, at once


class Scope:
    """The inside of a function, class or comprehension. Where there is None, it is the notebook's own level."""

    def __init__(self, node: ast.AST, parent: "Scope | None", inside: list[ast.AST]) -> None:
        self.node, self.parent = node, parent
        is_function = isinstance(node, (*FUNCTIONS, ast.Lambda))
        self.deferred: bool = is_function or (parent is not None and parent.deferred)
        everything = list(own_nodes(inside))
        self.outside = {name for n in everything if isinstance(n, ast.Global) for name in n.names}
        self.local: set[str] = set()  # a class's grows as its body runs
        if isinstance(node, COMPREHENSIONS):
            self.local = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        elif is_function:
            self.local = set(parameters(node)).union(*map(bound_by, everything)) - self.outside

    def owner(self, name: str) -> "Scope | None":
        """The scope that a name belongs to."""
        scope: Scope | None = self
        while scope is not None and name not in scope.outside:
            if name in scope.local and (scope is self or not isinstance(scope.node, ast.ClassDef)):
                return scope
            scope = scope.parent
        return None


def parameters(function: ast.AST) -> list[str]:
    """The names of a function's parameters, those by position first, and of its type parameters."""
    given: ast.arguments = function.args  # type: ignore[attr-defined]
    rest = [given.vararg, *given.kwonlyargs, given.kwarg]
    types = [kind.name for kind in getattr(function, "type_params", ())]  # from Python 3.12 on
    return [arg.arg for arg in [*given.posonlyargs, *given.args, *rest] if arg] + types


def split(node: ast.AST) -> tuple[list[ast.AST], list[ast.AST]] | None:
    """Of a node that opens a scope: what is evaluated outside of it and what inside; None for any other node."""
    match node:
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            first, *others = node.generators
            results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return [first.iter], [first.target, *first.ifs, *others, *results]
        case ast.ClassDef():
            return [*node.decorator_list, *node.bases, *node.keywords], [*node.body]
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return [*node.decorator_list, node.args, *filter(None, [node.returns])], [*node.body]
        case ast.Lambda():
            return [node.args], [node.body]
    return None


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, in the order in which they run: a value comes before the name that gets it."""
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.AnnAssign) and node.value is None:
        del fields["target"]  # `x: int` binds nothing
    for field in sorted(fields, key=lambda field: field not in ("value", "iter")):
        values = fields[field] if isinstance(fields[field], list) else [fields[field]]
        yield from (value for value in values if isinstance(value, ast.AST))


def own_nodes(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of one scope: neither the insides of functions and classes in it nor the targets of comprehensions."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.comprehension):
            waiting += [node.iter, *node.ifs]
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            waiting += (split(node) or ([], []))[0]
        else:
            waiting += ast.iter_child_nodes(node)


def bound_by(node: ast.AST) -> list[str]:
    """The names that this very node binds or deletes."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            return [name]
        case ast.alias(name=name, asname=other):
            return [other or name.split(".")[0]]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return [name]
        case ast.MatchMapping(rest=str(name)):
            return [name]
    return []


def changed_by(node: ast.AST) -> list[str]:
    """The names whose objects this very node writes into, or may write into."""
    touched: list[ast.AST] = []
    match node:
        case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
            touched = [node]
        case ast.AugAssign(target=ast.Name() as target):
            touched = [target]
        case ast.Call(func=ast.Name(id=last) | ast.Attribute(attr=last)):
            in_place = last.endswith("_") and not last.endswith("__")
            if in_place or last in CHANGING_FUNCTIONS:
                touched = [*node.args[:1]]
            if isinstance(node.func, ast.Attribute) and (in_place or last in CHANGING_METHODS):
                touched.append(node.func)
    return [name for name in map(base, touched) if name]


def base(node: ast.AST) -> str | None:
    """The name of the object that an expression such as `x.y[0]` or `x.get(1)` is a part of."""
    while True:
        match node:
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
                node = inner
            case ast.Call(func=ast.Attribute(value=inner, attr="get" | "setdefault")):
                node = inner
            case ast.Name(id=name):
                return name
            case _:
                return None


def scan(root: ast.AST, deep: bool = False) -> Found:
    """What the code does; without `deep`, statements inside a `for`, `with` or `if` are left to units of their own."""
    found = Found(Uses.none(), Uses.none(), set(), [])
    waiting: list[tuple[ast.AST, Scope | None]] = [(root, None)]
    while waiting:  # no recursion: an expression of hundreds of terms is deep
        node, scope = waiting.pop()
        _record(found, root, node, scope)
        parts = split(node)
        if parts is None:
            below = [(n, scope) for n in children(node) if deep or scope or not isinstance(n, ast.stmt)]
        else:
            outside, inside = parts
            inner = Scope(node, scope, inside)
            below = [*((n, scope) for n in outside), *((n, inner) for n in inside)]
        waiting += reversed(below)
    return found


def _record(found: Found, root: ast.AST, node: ast.AST, scope: Scope | None) -> None:
    uses = found.later if scope is not None and scope.deferred else found.now
    bound, changed = bound_by(node), changed_by(node)
    read: list[str] = []
    called_on: list[str] = []
    match node:
        case ast.Name(id=name, ctx=ast.Load()) | ast.AugAssign(target=ast.Name(id=name)):
            read = [name]
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=inner))):
            called_on = [name for name in [base(inner)] if name]
        case ast.Call(func=ast.Name()) if uses is found.now:
            found.calls.append(node)
    if scope is not None:
        if isinstance(scope.node, ast.ClassDef):
            scope.local.update(name for name in bound if name not in scope.outside)
        owners = {name: scope.owner(name) for name in (*read, *bound, *changed, *called_on)}
        found.parameters.update(
            name for name in (*changed, *called_on) if (owner := owners[name]) and owner.node is root
        )
        read, bound, changed, called_on = (
            [n for n in names if owners[n] is None] for names in (read, bound, changed, called_on)
        )
    uses.read.update(read)
    uses.bound.update(bound)
    uses.changed.update(changed)
    uses.called_on.update(called_on)
