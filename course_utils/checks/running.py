"""Running a check on a learner's object: what comes of it, its cause, and the part that is to blame."""

import inspect
from types import CodeType, FunctionType
from typing import Any

import torch

from course_utils.checks.finding import CheckFn, exercise_name, find_checks
from course_utils.checks.guarding import guarded, interrupt
from course_utils.checks.keeping import KeptWorld
from course_utils.checks.mistakes import cause
from course_utils.checks.outcomes import CheckFailed, NotWritten
from course_utils.checks.translating import translated
from course_utils.checks.whose import is_library, is_library_module, refuse_foreign


def check(obj: object, name: str | None = None) -> None:
    """Check what you wrote, and print one line when it is right: `check(causal_mask)`.

    The exercise is found by the object's own name, or by `name`. Raises NotWritten for an exercise that still holds
    `raise NotImplementedError`, and CheckFailed for a wrong answer, and for anything that is not yours to check.
    """
    checks = {symbol: fn for chapter in find_checks().values() for symbol, fn in chapter.items()}
    name = exercise_name(obj, name, list(checks))
    refuse_foreign(name, obj)
    run_check(checks[name], obj)
    print(f"{name}: correct")


def run_check(check_fn: CheckFn, obj: object) -> None:
    """Run one check on an object; nothing is printed, and random numbers elsewhere stay what they were.

    Raises NotWritten for a stub (or where the object needs another exercise that still is one) and CheckFailed for a
    wrong answer: with the known mistake that gives the same, if there is one, otherwise with the part that is to blame,
    if there is one. An exception in the learner's code becomes a CheckFailed that names the learner's own line.
    """
    name = check_fn.__name__.removeprefix("check_")
    try:
        run_once(check_fn, obj)
    except CheckFailed as failure:
        known = cause(check_fn, failure, lambda answer: run_once(check_fn, answer))
        told = failure.because(known) if known else failure
        part = _failing_part(check_fn, obj)
        if part is not None:
            begin = f"  {name} uses `{part}`, which does not pass its own check: begin there."
            told = CheckFailed(f"{told.message}\n{begin}")
        raise told from None


def run_once(check_fn: CheckFn, obj: object) -> None:
    """Run one check on an object, without looking for the cause of what it says."""
    name = check_fn.__name__.removeprefix("check_")
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), guarded(check_fn, name, obj) as answer:
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would reach into every GPU
            world = KeptWorld()
            try:
                check_fn(answer)
                interrupt(answer)
            finally:
                change = world.put_back()  # by what is not guarded, such as a class that makes its object
            if change:
                raise CheckFailed(f"{name}: {change}")
    except (CheckFailed, NotWritten):
        raise
    except Exception as error:
        told = translated(name, error, obj)
        if told is None:
            error.add_note(f"This is a fault in the check of {name}, not in your code. Please report it.")
            raise
        raise told from None


def _failing_part(check_fn: CheckFn, obj: object) -> str | None:
    """The first exercise among those that `obj` uses, directly or not, which fails its own check."""
    checks = next((c for c in find_checks().values() if check_fn in c.values()), {})
    used = _used_definitions(obj)
    for symbol, part_check in checks.items():
        part = used.get(symbol)
        if part is not None and part is not obj and part_check is not check_fn:
            try:
                run_once(part_check, part)
            except NotWritten:
                continue
            except CheckFailed:
                return symbol
    return None


def _used_definitions(obj: object) -> dict[str, Any]:
    """Functions and classes, other than a library's, which the code of `obj` refers to, directly or through others."""
    found: dict[str, Any] = {}
    waiting = [obj]
    while waiting:
        for function in _functions_of(waiting.pop()):
            for name in _names_in(function.__code__):
                value = function.__globals__.get(name)
                theirs = isinstance(value, FunctionType | type) and not is_library_module(value.__module__)
                if theirs and name not in found:
                    found[name] = value
                    waiting.append(value)
    return found


def _functions_of(obj: object) -> list[FunctionType]:
    members = [m for base in obj.__mro__ for m in vars(base).values()] if isinstance(obj, type) else [obj]
    unwrapped = [inspect.unwrap(member) for member in members if callable(member)]
    return [
        member
        for member in unwrapped
        if isinstance(member, FunctionType) and not is_library(member.__code__.co_filename)
    ]


def _names_in(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]  # lambdas, comprehensions
    return set(code.co_names).union(*map(_names_in, inner))
