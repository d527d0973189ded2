"""Comparing plain values (numbers, texts, lists, tuples, dictionaries), as `compare` does tensors."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from course_utils.checks.outcomes import CheckFailed, Evidence

LONGEST = 90  # characters of a value that a message shows


def agree(name: str, call: str, actual: object, expected: object) -> None:
    """Raise CheckFailed unless `actual` has the type and the value of `expected`; `call` says what was called.

    Dictionaries may come in any kind and order.
    """
    if actual is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    wanted, got = _kind(expected), _kind(actual)
    if wanted != got:
        raise CheckFailed(
            f"{name}: expected {wanted}, got {got}.\n  {call}\n  Next: look at what the signature promises."
        )
    place = _difference(actual, expected)
    if place is None:
        return
    raise CheckFailed(
        f"{name}: wrong answer.\n  {call}\n  {place}",
        evidence=Evidence(f"{name} {call}", actual),
        advice="  Next: work this case out by hand, and print what each of your steps gives.",
    )


def shown(value: object) -> str:
    """A value on one line, cut where it gets long."""
    text = repr(dict(value)) if isinstance(value, dict) else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


def call_of(name: str, *arguments: object) -> str:
    """The call as one would type it."""
    return f"{name}({', '.join(map(shown, arguments))})"


@contextmanager
def untouched(name: str, **inputs: Any) -> Iterator[None]:
    """Raise CheckFailed if one of these values is another one after the block than before it."""
    before = copy.deepcopy(inputs)
    yield
    for label, value in inputs.items():
        if value != before[label]:
            raise CheckFailed(
                f"{name}: it changed `{label}`, which it was only given to read.\n  Next: make a new one."
            )


def must_raise(
    name: str, kinds: type[Exception], call: str, run: Callable[[], object], advice: str = "see the docstring."
) -> None:
    """Raise CheckFailed unless `run` raises an error of that kind."""
    try:
        answer = run()
    except kinds:
        return
    raise CheckFailed(
        f"{name}: {call} should raise {kinds.__name__}, but it returned {shown(answer)}.\n  Next: {advice}"
    )


KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a bool"),  # which is an int, too
    (Integral, "an int"),  # numpy's whole numbers are as good
    (float, "a number"),
    (str, "a str"),
    (bytes, "bytes"),
    (list, "a list"),
    (tuple, "a tuple"),
    (Mapping, "a dict"),
)


def _kind(value: object) -> str:
    return next((words for kind, words in KINDS if isinstance(value, kind)), f"a {type(value).__name__}")


def _equal(actual: object, expected: object) -> bool:
    if isinstance(expected, float) and isinstance(actual, float):
        return math.isclose(actual, expected, rel_tol=1e-6)
    return _kind(actual) == _kind(expected) and bool(actual == expected)


def _difference(actual: Any, expected: Any) -> str | None:
    """The first place where they differ, in words; None where they agree."""
    if isinstance(expected, Mapping):
        for key in [*expected, *(key for key in actual if key not in expected)]:
            if key not in actual:
                return f"{shown(key)} is missing: expected {shown(expected[key])}"
            if key not in expected:
                return f"{shown(key)} should not be there: got {shown(actual[key])}"
            if not _equal(actual[key], expected[key]):
                return f"at {shown(key)}: expected {shown(expected[key])}, got {shown(actual[key])}"
        return None
    if isinstance(expected, list | tuple):
        for index, (got, want) in enumerate(zip(actual, expected, strict=False)):
            if not _equal(got, want):
                whole = f"; in all {shown(expected)} and {shown(actual)}" if len(repr(expected)) <= LONGEST else ""
                return f"first at [{index}]: expected {shown(want)}, got {shown(got)}{whole}"
        if len(actual) != len(expected):
            return f"expected {len(expected)} items, got {len(actual)}: {shown(expected)}, and not {shown(actual)}"
        return None
    return None if _equal(actual, expected) else f"expected {shown(expected)}, got {shown(actual)}"
