"""What must not happen around a call: an argument changed, or the world left in another state than before.

`run_check` guards every answer, so that no check has to. An exercise that is asked to change something says so beside
its check: `@may_change("model")`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import identical
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.whose import is_library_module

Check = TypeVar("Check", bound=Callable[[Any], None])


def may_change(*arguments: str) -> Callable[[Check], Check]:
    """Say which arguments an exercise is asked to change; `self` stands for a module's own parameters."""

    def attach(check: Check) -> Check:
        check.may_change = frozenset(arguments)  # type: ignore[attr-defined]
        return check

    return attach


@contextmanager
def guarded(check: Callable[[Any], None], name: str, answer: Any) -> Iterator[Any]:
    """The answer, every call of which is guarded: a function wrapped, a class with its methods wrapped for a while."""
    allowed = getattr(check, "may_change", frozenset())
    if not isinstance(answer, type):
        yield _watching(name, answer, allowed) if callable(answer) else answer
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
            setattr(cls, label, _watching(name, method, allowed))
        yield answer
    finally:
        for cls, label, method in methods:
            setattr(cls, label, method)


def _watching(name: str, function: Callable[..., Any], allowed: frozenset[str]) -> Callable[..., Any]:
    try:
        labels = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        labels = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {labels[i] if i < len(labels) else f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs
        if not isinstance(given.get("self"), nn.Module) or function.__name__ != "forward":
            given.pop("self", None)  # most methods are there to change their object; a module's forward is not
        given = {label: value for label, value in given.items() if label not in allowed}
        before, world = {label: _copy(value) for label, value in given.items()}, _world()
        answer = function(*args, **kwargs)
        for label, value in given.items():
            change = _change(before[label], value, label)
            if change:
                raise CheckFailed(f"{name}: it changed {change}")
        for what, was, now in zip(world, world.values(), _world().values(), strict=True):
            if was != now and what not in allowed:
                raise CheckFailed(
                    f"{name}: after the call {what} is {now}; it was {was} before.\n"
                    "  Next: put back what you change, or use a `with` block, which does it for you."
                )
        return answer

    return call


def _world() -> dict[str, Any]:
    return {
        "gradient recording (torch.is_grad_enabled)": torch.is_grad_enabled(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
    }


def _copy(value: Any) -> Any:
    """Enough of a value to see later whether it is another one."""
    if isinstance(value, nn.Module):
        return {label: _copy(tensor) for label, tensor in _tensors_of(value).items()}, _flags(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(entry) for entry in value]
    return set(value) if isinstance(value, set) else value


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _flags(module: nn.Module) -> dict[str, bool]:
    training = {f"{label}.training".lstrip("."): part.training for label, part in module.named_modules()}
    return training | {f"{label}.requires_grad": entry.requires_grad for label, entry in module.named_parameters()}


def _change(before: Any, after: Any, label: str) -> str | None:
    """What changed, and what to do instead; None where nothing did."""
    if isinstance(after, nn.Module):
        tensors, flags = before
        for name, entry in _tensors_of(after).items():
            if name in tensors and _change(tensors[name], entry, name):
                return f"`{label}.{name}` in place.\n  Next: work on a copy; whoever passed it in goes on using it."
        for name, flag in _flags(after).items():
            if flags.get(name, flag) != flag:
                return f"`{label}.{name}` from {not flag} to {flag}.\n  Next: put it back when you are done."
        return None
    if isinstance(after, Tensor):
        if after.dtype == before.dtype and identical(after.detach(), before):
            return None
        return (
            f"`{label}` in place.\n"
            f"  Next: make a new tensor; `{label}[...] = `, `{label} += ` and methods named ..._() write into it."
        )
    told = f"`{label}`, which it was only given to read.\n  Next: make a new one."
    if isinstance(after, Mapping):
        if list(before) != list(after):
            return told
        return next(filter(None, (_change(before[key], after[key], f"{label}[{key!r}]") for key in after)), None)
    if isinstance(after, list | tuple):
        if len(before) != len(after):
            return told
        entries = enumerate(zip(before, after, strict=True))
        return next(filter(None, (_change(was, now, f"{label}[{i}]") for i, (was, now) in entries)), None)
    if isinstance(after, set | str | int | float):
        return told if before != after else None
    return None
