"""Whose code is it: the learner's, this course's, a library's, or Python's own?"""

import functools
import inspect
import linecache
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course_utils.checks.outcomes import CheckFailed

COURSE = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"]).resolve()


def refuse_foreign(name: str, obj: object) -> None:
    """Raise CheckFailed for an object that somebody else wrote: the reference solution, this package, a library."""
    obj = obj.func if isinstance(obj, functools.partial) else obj
    module = getattr(obj, "__module__", None) or ""
    package = module.split(".")[0]
    if package == "solutions":
        raise CheckFailed(
            f"{name}: this is the reference solution, imported from {module}.\n"
            "  Next: run the cell in which you wrote your own, and check that."
        )
    if inspect.isbuiltin(obj) or is_library_module(module):
        source = package or type(obj).__module__
        own = getattr(obj, "__name__", type(obj).__name__)
        where = f" of {source}" if source != "builtins" else ""
        raise CheckFailed(
            f"{name}: this is `{own}`{where}, not something you wrote.\n  Next: write your own; it may call it."
        )


def is_library(filename: str | None) -> bool:
    """Whether a file belongs to this package, to an installed one, or to Python itself."""
    if filename is None:
        return False
    if filename.startswith("<"):
        # Notebook cells may be named like this too, but then their text is known; beartype registers its wrappers.
        return filename.startswith("<@beartype") or not linecache.getlines(filename)
    path = Path(filename).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(installed) or path.is_relative_to(COURSE) or path.is_relative_to(STANDARD_LIBRARY)


def is_library_module(name: str) -> bool:
    """Whether a module is part of this package, of an installed one, or of Python itself."""
    if name == "__main__":  # its file is whatever was started: a kernel, pytest, ...
        return False
    return name in sys.builtin_module_names or is_library(getattr(sys.modules.get(name), "__file__", None))


def beside(fn: Callable[..., Any], name: str) -> Any:
    """What stands under that name beside the learner's function, partial or callable object; None if nothing does."""
    inner = inspect.unwrap(fn)
    if isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    if not inspect.isroutine(inner) and not isinstance(inner, type):  # an object that can be called
        inner = inspect.unwrap(type(inner).__call__)
    return getattr(inner, "__globals__", {}).get(name)
