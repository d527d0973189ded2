"""Small changes of a reference solution, one at a time: what a chapter's checks must refuse."""

import ast
import copy
import linecache
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from course_utils.checks import CheckFailed
from course_utils.checks.running import run_once

SWAPS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitOr: (ast.BitAnd,),
}
COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


def variants(node: ast.expr) -> Iterator[ast.expr]:
    """The expression with one thing changed: an operator, a number, a comparison, an argument, or a part left out."""
    if isinstance(node, ast.BinOp):
        for operator in SWAPS.get(type(node.op), ()):
            yield ast.BinOp(node.left, operator(), node.right)
        yield from (node.left, node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (ast.Constant(node.value + 1), ast.Constant(node.value - 1))
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], COMPARISONS):
        for other in COMPARISONS:
            if not isinstance(node.ops[0], other):
                yield ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Call):
        for position in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, node.keywords[:position] + node.keywords[position + 1 :])
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
        if len(node.args) == 1:
            yield node.args[0]


def mutants(path: Path, name: str) -> Iterator[tuple[str, types.ModuleType]]:
    """Every variant of one definition of a module, but for `__init__`: what was changed, and the changed module."""
    tree = ast.parse(path.read_text())
    definition = next(node for node in tree.body if getattr(node, "name", None) == name)
    functions = [node for node in ast.walk(definition) if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    for statement in [statement for function in functions for statement in function.body]:
        for parent in list(ast.walk(statement)):
            for field, value in list(ast.iter_fields(parent)):
                places = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
                for position, node in places:
                    if not isinstance(node, ast.expr) or isinstance(parent, ast.Expr):
                        continue
                    for variant in variants(node):
                        changed = list(value) if position is not None else variant
                        if position is not None:
                            changed[position] = variant
                        setattr(parent, field, changed)
                        yield f"{ast.unparse(node)} -> {ast.unparse(variant)}", _load(tree)
                        setattr(parent, field, value)


def survivors(
    path: Path,
    exercise: str,
    check: Callable[[Any], None],
    only_on_gpu: str | None = None,
    refusals: tuple[type[Exception], ...] = (CheckFailed,),
) -> set[str]:
    """The changes of an exercise's reference that its check lets pass; without looking for the part to blame.

    Where there is no GPU, changes that hold the words `only_on_gpu` are let off: nothing else could show them. A loop
    that never ends counts as refused.
    """
    passed = set()
    for change, module in mutants(path, exercise):
        try:
            with at_most(seconds=5):
                run_once(check, getattr(module, exercise))
        except (*refusals, Endless, MemoryError):
            continue
        if only_on_gpu is None or only_on_gpu not in change or torch.cuda.is_available():
            passed.add(change)
    return passed


class Endless(BaseException):
    """Not an Exception, or the checks would translate it into words for the learner."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Endless when the block takes more processor time, which does not pass faster on a busy machine."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs an alarm clock")

    def give_up(*_: object) -> None:
        raise Endless

    previous = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _load(tree: ast.Module) -> types.ModuleType:
    source = ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
    module = types.ModuleType("mutant")
    linecache.cache["mutant.py"] = (len(source), None, source.splitlines(keepends=True), "mutant.py")
    exec(compile(source, "mutant.py", "exec"), module.__dict__)
    return module
