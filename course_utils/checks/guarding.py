"""What must not happen around a call: an argument changed, or the world left in another state than before.

`run_check` guards every answer, so that no check has to. An exercise that is asked to change something says so beside
its check: `@may_change("model")`.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn

from course_utils.checks.keeping import KeptWorld, keep
from course_utils.checks.outcomes import CheckFailed, Evidence, Stop
from course_utils.checks.whose import is_library_module

GLOBAL_RANDOM = "torch's global random numbers"

Check = TypeVar("Check", bound=Callable[[Any], None])


def may_change(*arguments: str) -> Callable[[Check], Check]:
    """Say which arguments an exercise is asked to change, such as "model" or "model.grad", or GLOBAL_RANDOM.

    `self` stands for a module's own parameters.
    """

    def attach(check: Check) -> Check:
        check.may_change = frozenset(arguments)  # type: ignore[attr-defined]
        return check

    return attach


@contextmanager
def guarded(check: Callable[[Any], None], name: str, answer: Any) -> Iterator[Any]:
    """The answer, every call of which is guarded: a function wrapped, a class with its methods wrapped for a while.

    What the methods of a class hand to each other is their own business.
    """
    allowed: frozenset[str] = getattr(check, "may_change", frozenset())
    running: list[str] = []
    if not isinstance(answer, type):
        yield _watching(name, answer, allowed, running) if callable(answer) else answer
        return
    theirs = [cls for cls in answer.__mro__ if not is_library_module(cls.__module__)]
    methods = [
        (cls, label, method)
        for cls in theirs
        for label, method in list(vars(cls).items())
        if inspect.isfunction(method) and not label.startswith("__")
    ]
    try:
        for cls, label, method in methods:
            setattr(cls, label, _watching(name, method, allowed, running))
        yield answer
    finally:
        for cls, label, method in methods:
            setattr(cls, label, method)


def _watching(
    name: str, function: Callable[..., Any], allowed: frozenset[str], running: list[str]
) -> Callable[..., Any]:
    try:
        labels = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        labels = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if running:
            return function(*args, **kwargs)
        given = {labels[i] if i < len(labels) else f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
        if not isinstance(given.get("self"), nn.Module) or function.__name__ != "forward":
            given.pop("self", None)  # most methods are there to change their object; a module's forward is not
        named = {label.split(".")[0] for label in allowed - {GLOBAL_RANDOM}}
        renamed = bool(named) and named.isdisjoint(given)  # then nobody can tell which of them may be changed
        before = {
            label: keep(value, label, grads=f"{label}.grad" not in allowed)
            for label, value in given.items()
            if label not in allowed and not renamed
        }
        world, random = KeptWorld(), torch.get_rng_state()
        running.append(name)
        call.first = getattr(call, "first", (args, kwargs))  # type: ignore[attr-defined]
        stopped = None
        try:
            answer = function(*args, **kwargs)
        except Stop as stop:
            stopped = stop
        finally:
            running.pop()
            # Put back even when it failed: what one answer spoils must not count against the next.
            changes = [change for kept in [*before.values(), world] if kept and (change := kept.put_back())]
        if stopped:
            changes = [
                change for change in changes if ".grad`" not in change
            ]  # half of a gradient is no promise broken
            if changes:
                raise LeftBehind(f"{name}: after an error half-way, {changes[0]}") from None
            raise stopped
        if changes:
            raise CheckFailed(f"{name}: {changes[0]}")
        if GLOBAL_RANDOM not in allowed and not torch.equal(random, torch.get_rng_state()):
            raise CheckFailed(
                f"{name}: it drew from torch's global random numbers, so its result depends on what ran before.\n"
                "  Next: pass `generator=` to the function that draws, or draw nothing."
            )
        return answer

    return call


class LeftBehind(CheckFailed):
    """Something is not as it was before a run that broke off."""


def interrupt(answer: Any) -> None:
    """Make the first call once more, with a model or a metric that raises: what is left behind then, the guard says."""
    if isinstance(answer, type) or not hasattr(answer, "first"):
        return
    args, kwargs = answer.first
    for value in [*args, *kwargs.values()]:
        if isinstance(value, nn.Module):
            handle = value.register_forward_hook(_raise_stop)
            try:
                _call_again(answer, args, kwargs)
            finally:
                handle.remove()
    if "metric" in kwargs:
        _call_again(answer, args, kwargs | {"metric": _raise_stop})
    elif "metric" in (labels := list(inspect.signature(answer).parameters)[: len(args)]):
        place = labels.index("metric")
        _call_again(answer, (*args[:place], _raise_stop, *args[place + 1 :]), kwargs)


def _call_again(answer: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        answer(*args, **kwargs)
    except LeftBehind:
        raise
    except Exception:  # it broke off, as it should; or its first inputs can be used once only
        return


def _raise_stop(*given: Any, **options: Any) -> Any:
    raise Stop


class BreakingOff:
    """Whether `at_most_lines` breaks off just now: then Python itself stops tracing, in the middle of the answer."""

    now = False


@contextmanager
def at_most_lines(where: str, most: int, advice: str) -> Iterator[None]:
    """Break off after `most` lines of Python, for answers whose loop may never end, or not in time."""
    left, before = most, sys.gettrace()
    too_many = CheckFailed(
        f"{where}: it found no answer within {most} lines of Python.",
        evidence=Evidence(where, "no answer"),
        advice=f"  Next: {advice}",
    )

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            BreakingOff.now = True
            raise too_many
        return count

    sys.settrace(count)
    try:
        yield
    except Exception:
        if left >= 0:
            raise
    finally:
        sys.settrace(before)
        BreakingOff.now = False
    if left < 0:  # also where the code that was broken off caught it, or raised something else
        raise too_many
