"""Tricks that make a check say "correct" to what is not: replaced functions, the reference solution, a peeping tom.

A learner's code runs in one process with the check that judges it, so nothing here is proof against somebody who
knows Python's insides well. What is found is found for certain; the most that can be won by what is not found is a
verdict on one's own exercise.
"""

import functools
import operator
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]

# --- replaced functions ---------------------------------------------------------------------------------------------

# What the checks stand on. A module added here costs time at every exercise.
WATCHED = ("course_utils", "einops.einops", "torch.nn.modules", "torch.autograd.grad_mode", "torch.testing")
WATCHED_ALONE = (
    "builtins copy functools inspect itertools json linecache math os random re sys time traceback numpy einops "
    "torch torch._tensor torch.functional torch.nn torch.nn.functional torch.nn.parameter torch.autograd torch.linalg "
    "torch.random torch.special torch.fft torch.optim"
).split()
REPLACED_BY_TORCH = {"torch.Storage"}  # by torch.set_default_dtype
Entry = tuple[str, object, tuple[object, ...]]


class Watch:
    """Remembers what functions and classes there are, and finds those that are others now."""

    def __init__(self) -> None:
        names = [name for name in sys.modules if name in WATCHED_ALONE or name.startswith(WATCHED)]
        self.spaces: list[tuple[str, Mapping[str, Any], list[Entry]]] = []
        classes: dict[type, None] = {}
        for name in sorted(names):
            module = sys.modules[name]
            entries = list(_entries(vars(module)))
            self.spaces.append((name, vars(module), entries))
            # Classes where they are at home, not at every place that imports them.
            own = (value for _, value, _ in entries if isinstance(value, type))
            classes.update({one: None for one in own if one.__module__ in names or one.__module__.startswith("torch")})
        for one in classes:
            self.spaces.append((f"{one.__module__}.{one.__qualname__}", vars(one), list(_entries(vars(one)))))
        self.classes = [(one, set(vars(one))) for one in classes]
        # A function added to the course's modules would come before the builtin of that name.
        self.closed = [(name, vars(sys.modules[name]), set(vars(sys.modules[name]))) for name in names if _ours(name)]

    def changes(self) -> list[str]:
        """The names of what was replaced, such as `torch.isclose`."""
        found = []
        for place, space, entries in self.spaces:
            for name, value, inside in entries:
                if space.get(name) is not value or (inside and not all(map(operator.is_, inside, _inside(value)))):
                    found.append(f"{place}.{name}")
        found = [name for name in found if name not in REPLACED_BY_TORCH]
        for one, known in self.classes:
            if len(vars(one)) != len(known):  # a method that hides an inherited one
                inherited = set().union(*(vars(base) for base in one.__mro__[1:]))
                found += [
                    f"{one.__module__}.{one.__qualname__}.{name}" for name in (vars(one).keys() - known) & inherited
                ]
        for place, space, known in self.closed:
            added = [name for name in space if name not in known and not isinstance(space[name], ModuleType)]
            found += [f"{place}.{name}" for name in added if callable(space[name])]
        return found


def _ours(module: str) -> bool:
    return module.startswith(("course_utils.checks", "course_utils.verdict"))


def _entries(space: Mapping[str, Any]) -> Iterator[Entry]:
    for name, value in list(space.items()):
        if isinstance(value, FunctionType):
            yield name, value, _inside(value)
        elif isinstance(value, property | staticmethod | classmethod) or callable(value):
            yield name, value, ()


def _inside(value: object) -> tuple[object, ...]:
    if not isinstance(value, FunctionType):
        return ()
    return value.__code__, value.__defaults__, value.__kwdefaults__


# --- the reference solution -----------------------------------------------------------------------------------------


def is_reference(value: object, chapter: str) -> bool:
    """Whether an object comes from the solutions of that chapter."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and name.startswith(f"solutions.ch{chapter}_")


def reference_behind(obj: object, chapter: str, others: Iterable[str]) -> str | None:
    """The solution that an answer is made of, such as `solutions.ch02_transformer.Attention`; None where there is none.

    Looked at are the object, its base classes and methods, what it closes over, and what its code names. The
    `others`, names of other exercises, are left out, for they are judged on their own.
    """
    others = set(others)
    seen: set[int] = set()
    waiting: list[object] = [obj]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if is_reference(value, chapter):
            return _name_of(value)
        if isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, type) and not _is_library(value.__module__):
            waiting += [*value.__mro__, *vars(value).values()]
        elif isinstance(value, staticmethod | classmethod):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting += [value.fget, value.fset]
        elif isinstance(value, FunctionType):
            path = Path(value.__code__.co_filename)
            if path.parent.name == "solutions" and path.name.startswith(f"ch{chapter}_"):
                return f"solutions.{path.stem}.{value.__code__.co_qualname}"
            if _is_library(value.__module__):
                continue
            waiting += [getattr(value, "__wrapped__", None), *(value.__defaults__ or ())]
            waiting += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
            names = _names_in(value.__code__)
            inside = next((name for name in names if name.startswith(f"solutions.ch{chapter}_")), None)
            if inside is not None:
                return inside
            waiting += [value.__globals__[n] for n in names if n in value.__globals__ and n not in others]
    return None


def _name_of(value: object) -> str:
    own = getattr(value, "__qualname__", None)
    return f"{value.__module__}.{own}" if own else getattr(value, "__name__", repr(type(value)))


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@functools.cache
def _is_library(module: str | None) -> bool:
    if module is None:
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    return module in sys.builtin_module_names or (path is not None and Path(path).exists())


def _names_in(code: CodeType) -> set[str]:
    """The names and the strings in a function's code, and in that of the functions inside it."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    strings = {const for const in code.co_consts if isinstance(const, str)}
    return (set(code.co_names) | strings).union(*map(_names_in, inner))


# --- looking where the answers are ----------------------------------------------------------------------------------

PEEPING = {
    "sys._getframe",
    "sys._current_frames",
    "sys.settrace",
    "sys.setprofile",
    "gc.get_objects",
    "gc.get_referrers",
}
PEEPING |= {"gc.get_referents", "ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata", "ctypes.PyObj_FromPtr"}


# Files of this course that read solutions for whoever asks.
READ_FOR_OTHERS = {str(Path(__file__).parents[1] / f"{name}.py") for name in ("cells", "solution")}


class Peeping(PermissionError):
    """What the learner's code sees instead of the reference solution or the grader's own frames."""


def guard(chapter: str, is_cell: Callable[[str], bool], found: Callable[[str], None]) -> None:
    """From here on, for good, refuse a learner's code the text of the chapter's solutions and the grader's frames.

    `is_cell` says whether a file name is that of a cell; `found` gets a sentence for each attempt.
    """
    import solutions
    from course_utils.checks.guarding import BreakingOff

    folder = os.path.dirname(os.path.realpath(solutions.__file__ or ""))
    hidden = tuple(os.path.join(folder, name) for name in (f"ch{chapter}_", f"{chapter}_", f"__pycache__/ch{chapter}_"))
    busy = False  # the hook's own questions are events too

    def theirs(frame: FrameType | None) -> bool:
        """Whether it is the learner's code that asks, itself, through Python's own library or through this course's."""
        while frame is not None:
            name = frame.f_code.co_filename
            if is_cell(name):
                return True
            if not name.startswith((STANDARD_LIBRARY, "<frozen")) and name not in READ_FOR_OTHERS:
                return False
            frame = frame.f_back
        return False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or (event != "open" and event not in PEEPING) or (event == "sys.settrace" and BreakingOff.now):
            return
        busy = True
        try:
            caller = sys._getframe(1)
            if event != "open":
                if is_cell(caller.f_code.co_filename):
                    found(f"it looked into the process that checks it ({event})")
                    raise Peeping(f"{event} is not to be used here")
            elif isinstance(args[0], str | bytes):
                path = os.path.realpath(os.fsdecode(args[0]))
                if path.startswith(hidden) and theirs(caller):
                    found(f"it read the reference solution ({os.path.basename(path)})")
                    raise Peeping("the reference solution is not to be read here")
        finally:
            busy = False

    sys.addaudithook(hook)
