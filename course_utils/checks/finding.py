"""Which checks there are, and which of them is meant."""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from course_utils.checks.outcomes import CheckFailed

CheckFn = Callable[[Any], None]

EXERCISE = re.compile(r"^:tags: \[exercise\]\n(?:^:.*\n)*^from solutions\.\w+ import (\w+)$", re.MULTILINE)


def find_checks() -> dict[str, dict[str, CheckFn]]:
    """All checks, as {"02": {"LayerNorm": check_LayerNorm, ...}}, in the order of the lessons."""
    found: dict[str, dict[str, CheckFn]] = {}
    for chapter, module in sections():
        found.setdefault(chapter, {}).update(
            (name.removeprefix("check_"), value)
            for name, value in vars(module).items()
            if name.startswith("check_") and callable(value) and value.__module__ == module.__name__
        )
    return {chapter: in_order(checks, lesson_order(chapter)) for chapter, checks in found.items()}


def sections() -> Iterator[tuple[str, ModuleType]]:
    """Every module in `chNN/`, with its chapter's number."""
    package = importlib.import_module(__package__)
    for folder in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        chapter = re.fullmatch(r"ch(\d\d)", folder.name)
        if chapter:
            inside = importlib.import_module(f"{package.__name__}.{folder.name}")
            for section in sorted(pkgutil.iter_modules(inside.__path__), key=lambda info: info.name):
                yield chapter[1], importlib.import_module(f"{inside.__name__}.{section.name}")


def in_order(checks: dict[str, CheckFn], order: tuple[str, ...]) -> dict[str, CheckFn]:
    """The checks in that order; those that no lesson asks for come last."""
    known = [symbol for symbol in order if symbol in checks]
    return {symbol: checks[symbol] for symbol in [*known, *(s for s in checks if s not in known)]}


@functools.cache
def lesson_order(chapter: str) -> tuple[str, ...]:
    """The exercises of a chapter as its lesson asks for them; none where lessons are out of reach, as in a sandbox."""
    package = Path(__file__).resolve().parents[1]
    lessons = [lesson for root in (package, package.parent) for lesson in root.glob(f"chapters/src/{chapter}_*.md")]
    return tuple(EXERCISE.findall(lessons[0].read_text(encoding="utf-8"))) if lessons else ()


def exercise_name(obj: object, name: str | None, known: list[str]) -> str:
    """The exercise that `obj` is meant to solve; raises CheckFailed where that cannot be told."""
    if isinstance(obj, str | Tensor | None) or not callable(obj):
        shown = repr(obj) if isinstance(obj, str | int | float | bool | None) else f"a {type(obj).__name__}"
        raise CheckFailed(
            f"check: expected the function or class that you wrote, got {shown}.\n"
            "  Next: write check(causal_mask), without quotes, and without calling it."
        )
    if isinstance(obj, nn.Module):
        kind = type(obj).__name__
        raise CheckFailed(f"check: this is one {kind} object.\n  Next: check the class itself: check({kind}).")
    own_name = getattr(obj, "__name__", None)
    wanted = name if name is not None else own_name
    if wanted in known:
        return wanted
    if name is None and (own_name is None or own_name == "<lambda>"):
        raise CheckFailed(
            'check: this has no name of its own.\n  Next: say which exercise it is, as check(..., name="causal_mask").'
        )
    nearest = ", ".join(get_close_matches(str(wanted), known, n=3, cutoff=0.0))
    raise CheckFailed(
        f"check: there is no exercise named {wanted!r}; the nearest are {nearest}.\n"
        f'  Next: give it that name, or say which you mean: check({own_name or "..."}, name="{nearest.split(",")[0]}").'
    )
