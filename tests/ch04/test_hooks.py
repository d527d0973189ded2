"""What the checks of a hook system cannot know: see tests/test_checks.py."""

from functools import partial
from typing import Any

import torch

import solutions.ch04_induction as ref
from course_utils.checks.ch04.hooks import in_turn
from course_utils.checks.standins.hooked import Watched
from solutions.ch04_induction import MyHookPoint
from tests.ch04 import other_induction as other

SECRETS = ("named_modules(",)
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {"len(self.fns) > 0 -> len(self.fns) != 0"}


def point(forward: Any) -> type:
    """A hook point with another `forward`."""
    return type("MyHookPoint", (MyHookPoint,), {"forward": forward})


def takes_all_that_is_returned(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        activation = fn(activation)
    return activation


def clears(self: Any, activation: Any) -> Any:
    activation = in_turn(self.fns, activation)
    self.fns.clear()
    return activation


def writes(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        new = fn(activation)
        if new is not None:
            activation.data.copy_(new)
    return activation


def asks_twice(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        fn(activation)
        activation = in_turn([fn], activation)
    return activation


def run_with_hooks(model: Any, tokens: Any, hooks: Any, **wrong: Any) -> Any:
    """my_run_with_hooks with switches for what people get wrong."""
    points = {name: module for name, module in model.named_modules() if isinstance(module, MyHookPoint)}
    if wrong.get("forgiving"):
        hooks = [(name, fn) for name, fn in hooks if name in points]
    if not wrong.get("late"):
        hooks = [(points[name], fn) for name, fn in hooks]
    before, done = {where: list(where.fns) for where in points.values()}, []

    def clean() -> None:
        for where, fn in done:
            if wrong.get("clear_all") or wrong.get("overwrite"):
                where.fns = []
            elif wrong.get("pop_first"):
                where.fns.pop(0)
            elif wrong.get("late"):
                where.fns = before[where]
            elif not wrong.get("leaves"):
                where.fns.remove(fn)

    for where, fn in hooks:
        where = points[where] if wrong.get("late") else where
        where.fns = [fn] if wrong.get("overwrite") else [*where.fns, fn]
        done.append((where, fn))
    try:
        if wrong.get("twice"):
            model(tokens)
        output = model(tokens)
    except Exception:
        if not wrong.get("no_finally"):
            clean()
        if wrong.get("swallows"):
            return None
        raise
    clean()
    return output


def removing_the_first_equal(model: Any, tokens: Any, hooks: Any) -> Any:
    points = {name: module for name, module in model.named_modules() if isinstance(module, MyHookPoint)}
    pairs = [(points[name], fn) for name, fn in hooks]
    for where, fn in pairs:
        where.fns.append(fn)
    try:
        return model(tokens)
    finally:
        for where, fn in pairs:
            where.fns.remove(fn)


class CallableObject:
    def __call__(self, model: Any, tokens: Any, hooks: Any) -> Any:
        return ref.my_run_with_hooks(model, tokens, hooks)


def hooking(**wrong: Any) -> Any:
    return lambda model, tokens, hooks: run_with_hooks(model, tokens, hooks, **wrong)


def run_with_a_cache(model: Any, tokens: Any, names: Any = None, **wrong: Any) -> Any:
    """my_run_with_cache with switches for what people get wrong."""
    points = [name for name, module in model.named_modules() if isinstance(module, MyHookPoint)]
    everything = names is None or wrong.get("all") or (wrong.get("falsy") and not names)
    chosen, cache = points if everything else list(names), {}

    def keep(name: str) -> Any:
        def fn(x: Any) -> Any:
            cache[chosen[-1] if wrong.get("late_binding") else name] = x * 2 if wrong.get("doubled") else x

        return fn

    output = run_with_hooks(model, tokens, [(name, keep(name)) for name in chosen], **wrong)
    return wrong.get("answer", lambda output, cache: (output, cache))(output, cache)


def caching(**wrong: Any) -> Any:
    return lambda model, tokens, names=None: run_with_a_cache(model, tokens, names, **wrong)


def first_text(tensor: Any) -> Any:
    return tensor[:1].expand_as(tensor)


NOT_CLEAN = "are not those that were there before"
SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "MyHookPoint": [
        ("returned None", point(takes_all_that_is_returned)),
        ("was called 0 times, expected 1", point(lambda self, activation: in_turn(self.fns[:1], activation))),
        ("`fns` is another list after the run", point(clears)),
        ("no gradient comes through it", point(lambda self, activation: in_turn(self.fns, activation.detach()))),
        ("it changed `activation` in place", point(writes)),
        ("was called 2 times", point(asks_twice)),
        ("a copy comes out", point(lambda self, activation: in_turn(self.fns, activation.clone()))),
    ],
    "my_run_with_hooks": [
        ("after a run, a function is left behind at `blocks.0.hook_in`", hooking(leaves=True)),
        (
            "after a run that ended in an exception, a function is left behind at `blocks.0.hook_out`",
            hooking(no_finally=True),
        ),
        (f"the functions at `blocks.0.hook_out` {NOT_CLEAN}", hooking(clear_all=True)),
        ("not those that were there before: 2 before, 2 now", hooking(pop_first=True)),
        ("raised an exception, and it was swallowed", hooking(swallows=True)),
        ("functions that others had attached were called 4 times", hooking(twice=True)),
        ("a name that no hook point has, 'hook_strat', should raise KeyError", hooking(forgiving=True)),
        ("after a name that no hook point has, a function is left behind at `blocks.0.hook_out`", hooking(late=True)),
        (
            "the name of a module that is no hook point, 'between', should raise KeyError",
            lambda model, tokens, hooks: ref.my_run_with_hooks(
                model, tokens, [pair for pair in hooks if pair[0] != "between"]
            ),
        ),
        (
            "it changed `hooks`, which it was only given to read",
            lambda model, tokens, hooks: ref.my_run_with_hooks(model, tokens, [hooks.pop(0) for _ in list(hooks)]),
        ),
        ("attached, too, the functions at `blocks.0.hook_out`", removing_the_first_equal),
        (
            "values are wrong",  # every hook doubles
            lambda model, tokens, hooks: ref.my_run_with_hooks(
                model, tokens, [(name, lambda x, fn=fn: None if fn(x) is None else x * 2) for name, fn in hooks]
            ),
        ),
    ],
    "my_run_with_cache": [
        ("after a run, a function is left behind at `hook_start`", caching(leaves=True)),
        ("after a run that ended in an exception, a function is left behind", caching(no_finally=True)),
        (NOT_CLEAN, caching(clear_all=True)),
        ("the names in the cache", caching(late_binding=True)),
        ("the names in the cache", caching(all=True)),
        ("with an empty list of names: wrong answer", caching(falsy=True)),
        ("should raise KeyError", caching(forgiving=True)),
        ("the cache comes first", caching(answer=lambda output, cache: (cache, output))),
        ("expected two things, the output and the cache", caching(answer=lambda output, cache: cache)),
        ("Every value is 2 times the right one", caching(doubled=True)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
ALSO_RIGHT["my_run_with_hooks"].append(partial(other.my_run_with_hooks))  # beside which stands a MyHookPoint, too
ALSO_RIGHT["my_run_with_hooks"].append(CallableObject())


def test_a_hook_may_ask_for_what_is_not_there_yet() -> None:
    """The model of the checks is a model like any other: somebody's hooks stay while ours come and go."""
    small = Watched(MyHookPoint)
    output, cache = ref.my_run_with_cache(small, torch.tensor([[1, 2]]))
    torch.testing.assert_close(cache["hook_end"], output)
    assert not any(module.fns for module in small.modules() if isinstance(module, MyHookPoint))
