"""Answers from a stranger: every reference done differently, or spoiled in a way that is not about its subject.

`RIGHT` and `WRONG` map a name to a transformation, which takes an answer (a function, or a class whose `forward` is
meant) and returns another, or None where it makes no sense. Checks must accept the ones and refuse the others.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.hooks import ActivationCache

Function = Callable[..., Any]


def on_calls(change: Callable[[Function, inspect.Signature], Function | None]) -> Callable[[Any], Any]:
    """A transformation of functions, which changes the `forward` of a module."""

    def transform(answer: Any) -> Any:
        if not isinstance(answer, type):
            changed = change(answer, inspect.signature(answer))
            return changed and functools.wraps(answer)(changed)
        if not issubclass(answer, nn.Module):
            return None
        changed = change(answer.forward, inspect.signature(answer.forward))
        return changed and type(answer.__name__, (answer,), {"forward": functools.wraps(answer.forward)(changed)})

    return transform


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with its tensors changed: itself, or the entries of a list, tuple or dictionary."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(mapped(entry, change) for entry in value)
    if type(value) is dict:
        return {key: mapped(entry, change) for key, entry in value.items()}
    return value


def promises_a_tensor(signature: inspect.Signature) -> bool:
    return dims(signature.return_annotation) is not None


def dims(annotation: Any) -> str | None:
    """`batch pos d_model` of Float[Tensor, "batch pos d_model"]; None for anything else."""
    return getattr(annotation, "dim_str", None)


# --- right -----------------------------------------------------------------------------------------------------------


def by_keyword(function: Function, signature: inspect.Signature) -> Function | None:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if not kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        return None
    return lambda *args, **kwargs: function(**signature.bind(*args, **kwargs).arguments)


def as_partial(answer: Any) -> Any:
    return None if isinstance(answer, type) else functools.partial(answer)


def on_strided_inputs(function: Function, signature: inspect.Signature) -> Function:
    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor

    return lambda *args, **kwargs: function(*mapped(args, strided), **mapped(kwargs, strided))


def in_double_precision(function: Function, signature: inspect.Signature) -> Function | None:
    takes_modules = "self" in signature.parameters or any(
        name in ("model", "cache", "metric") for name in signature.parameters
    )
    if takes_modules or not promises_a_tensor(signature):
        return None

    def computed(*args: Any, **kwargs: Any) -> Any:
        kinds: set[torch.dtype] = set()

        def widen(tensor: Tensor) -> Tensor:
            kinds.update({tensor.dtype} if tensor.is_floating_point() else ())
            return tensor.double() if tensor.is_floating_point() else tensor

        answer = function(*mapped(args, widen), **mapped(kwargs, widen))
        return mapped(answer, lambda out: out.to(*kinds) if out.is_floating_point() and len(kinds) == 1 else out)

    return computed


def row_by_row(function: Function, signature: inspect.Signature) -> Function | None:
    """A batch of one, again and again, where the batch is the first axis of what goes in and of what comes out.

    Not for modules, whose hook points see the whole tensor.
    """
    if "self" in signature.parameters:
        return None
    batched = [name for name, p in signature.parameters.items() if (dims(p.annotation) or "").startswith("batch ")]
    if not batched or not (dims(signature.return_annotation) or "").startswith("batch"):
        return None

    def computed(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        rows = [
            function(**{name: value[row : row + 1] if name in batched else value for name, value in given.items()})
            for row in range(len(given[batched[0]]))
        ]
        return torch.cat(rows)

    return computed


def returning_views(function: Function, signature: inspect.Signature) -> Function:
    return lambda *args, **kwargs: mapped(function(*args, **kwargs), lambda out: torch.stack([out, out])[1])


RIGHT = {
    "arguments by keyword": on_calls(by_keyword),
    "a functools.partial": as_partial,
    "inputs that are not contiguous": on_calls(on_strided_inputs),
    "in double precision inside": on_calls(in_double_precision),
    "a batch of one, row by row": on_calls(row_by_row),
    "results that are views": on_calls(returning_views),
}


# --- wrong -----------------------------------------------------------------------------------------------------------


def with_result(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def spoil(function: Function, signature: inspect.Signature) -> Function | None:
        if not promises_a_tensor(signature):
            return None
        return lambda *args, **kwargs: mapped(function(*args, **kwargs), change)

    return on_calls(spoil)


def other_dtype(tensor: Tensor) -> Tensor:
    """Wider, so that no value gets lost: only the dtype is wrong."""
    if tensor.dtype is torch.bool:
        return tensor.to(torch.int64)
    if tensor.is_floating_point():
        return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)
    return tensor.to(torch.int32 if tensor.dtype == torch.int64 else torch.int64)


def spoil_argument(value: Any) -> bool:
    """Change an argument in place; False where it cannot be."""
    if isinstance(value, ActivationCache):
        return spoil_argument(next(iter(value.values())))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(spoil_argument(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, nn.Module):
        return any(spoil_argument(parameter) for parameter in value.parameters())
    if isinstance(value, Tensor) and value.numel():
        with torch.no_grad():
            value.logical_not_() if value.dtype is torch.bool else value.add_(1)
        return True
    if type(value) is list:
        value.append(value[-1] if value else 0)
        return True
    if type(value) is dict and value:
        value.pop(next(iter(value)))
        return True
    if type(value) is set:
        value.add("changed")
        return True
    return False


def changing_argument(name: str) -> Callable[[Any], Any]:
    def spoil(function: Function, signature: inspect.Signature) -> Function:
        def computed(*args: Any, **kwargs: Any) -> Any:
            answer = function(*args, **kwargs)
            if spoil_argument(signature.bind(*args, **kwargs).arguments.get(name)):
                spoiled.append(name)
            return answer

        return computed

    spoiled: list[str] = []
    transform = on_calls(spoil)

    def remembering(answer: Any) -> Any:
        changed = transform(answer)
        if changed is not None:
            changed.spoiled = spoiled  # stays empty where nothing that was given can be changed
        return changed

    return remembering


def ignoring(name: str) -> Callable[[Any], Any]:
    """Goes on with an argument's default, whatever was given."""

    def spoil(function: Function, signature: inspect.Signature) -> Function:
        def computed(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            given.pop(name, None)
            return function(**given)

        return computed

    return on_calls(spoil)


WRONG = {
    "a detached result": with_result(lambda out: out.detach()),  # for what promises a gradient
    "a result of another dtype": with_result(other_dtype),
    "a result on another device": with_result(lambda out: out.to("meta")),
}


def wrong_for(answer: Any) -> dict[str, Callable[[Any], Any]]:
    """The transformations above, and those for each argument by name."""
    call = answer.forward if isinstance(answer, type) and issubclass(answer, nn.Module) else answer
    if isinstance(call, type):
        return {}
    parameters = [
        p for p in inspect.signature(call).parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD
    ]
    changed = {f"`{p.name}` changed in place": changing_argument(p.name) for p in parameters}
    defaults = [p for p in parameters if p.default is not inspect.Parameter.empty]
    return WRONG | changed | {f"`{p.name}` ignored": ignoring(p.name) for p in defaults}
