"""How answers of this chapter are spoiled: another thing is patched, or something is done besides."""

from collections.abc import Callable
from typing import Any

import torch

from course_utils.checks.ch05.patching import put
from course_utils.hooks import hook_points


def added(activation: Any, source: Any, index: Any) -> Any:
    return put(activation, activation + source, index)


def zero(activation: Any, source: Any, index: Any) -> Any:
    return put(activation, torch.zeros_like(source), index)


def mean_of_prompts(activation: Any, source: Any, index: Any) -> Any:
    return put(activation, source.mean(0, keepdim=True).expand_as(source), index)


def leaving_a_hook(answer: Callable[..., Any]) -> Callable[..., Any]:
    def leave(model: Any, *arguments: Any, **options: Any) -> Any:
        hook_points(model)["hook_embed"].add(lambda activation, hook: None)
        return answer(model, *arguments, **options)

    return leave


def clearing_hooks(answer: Callable[..., Any]) -> Callable[..., Any]:
    def clear(model: Any, *arguments: Any, **options: Any) -> Any:
        hook_points(model)["hook_embed"].clear()
        return answer(model, *arguments, **options)

    return clear


def with_a_graph(answer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: answer(*arguments, **options) * torch.ones((), requires_grad=True)
