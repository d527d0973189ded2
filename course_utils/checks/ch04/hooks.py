# ruff: noqa: N802 (check_MyHookPoint is named after its exercise)
"""Checks of chapter 04, seeing inside: a hook system written by hand."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare
from course_utils.checks.leftovers import assert_stops
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, with_methods
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import agree, must_raise
from course_utils.checks.standins.hooked import MyHookPoint, Watched
from course_utils.checks.translating import during
from course_utils.checks.whose import beside

Fn = Callable[..., Any]
VECTORS = "batch pos d_model"

# --------------------------------------------------------------------------------------------------- the hook system


POINTS = ["hook_start", *(f"blocks.{layer}.hook_{end}" for layer in range(2) for end in ("in", "out")), "hook_end"]
TOKENS, OTHERS = torch.tensor([[3, 1, 4, 10, 5], [9, 2, 6, 7, 8]]), torch.tensor([[7, 7, 2, 1]])
FAILING = torch.tensor([[3, 0, 1]])


def by_pytorch(hooks: Sequence[tuple[str, Fn]], tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle: PyTorch's own forward hooks, on the same model with identity layers. Output, and what was seen."""
    model = Watched(nn.Identity)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Fn:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    for name, fn in hooks:
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output, fn=fn: fn(output))
    for name in POINTS:
        model.get_submodule(name).register_forward_hook(keep(name))
    return model(tokens), seen


def hook_point(pass_on: Callable[[list[Fn], Tensor], Tensor]) -> type:
    """A MyHookPoint with another `forward`."""
    return with_methods(MyHookPoint, "MyHookPoint", forward=lambda self, activation: pass_on(self.fns, activation))


def in_turn(fns: Sequence[Fn], activation: Tensor, each: bool = False, until_none: bool = False) -> Tensor:
    """What the functions leave; with `each`, every one of them is given the original activation."""
    current = activation
    for fn in fns:
        left = fn(activation if each else current)
        if left is None and until_none:
            break
        current = current if left is None else left
    return current


def first_those_that_look(fns: Sequence[Fn], activation: Tensor) -> Tensor:
    """All are shown the original activation; then those that change something run in turn."""
    return in_turn([fn for fn in fns if fn(activation) is not None], activation)


@known_mistakes(
    {
        "what the functions return is thrown away; it should come out.": hook_point(
            lambda fns, activation: [activation, *(fn(activation) for fn in fns)][0]
        ),
        "every function is given the original activation; each should get what the one before left.": hook_point(
            partial(in_turn, each=True)
        ),
        "the functions run in reverse order.": hook_point(lambda fns, activation: in_turn(fns[::-1], activation)),
        "None ends it: the functions after one that returns None no longer run.": hook_point(
            partial(in_turn, until_none=True)
        ),
        "it gets the original activation; it should get what the function before it left.": hook_point(
            first_those_that_look
        ),
    }
)
def check_MyHookPoint(cls: Any) -> None:
    """What goes in, what the functions get, and what comes out, from no function to three."""
    name = "MyHookPoint"
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed(
            f"{name}: expected a class that inherits from nn.Module.\n  Next: keep the `class` line that was given."
        )
    point: Any = cls()
    activation = noise(2, 5, 7).requires_grad_()
    if not isinstance(getattr(point, "fns", None), list) or point.fns:
        raise CheckFailed(
            f"{name}: a new one should have `fns`, an empty list.\n  Next: keep the `__init__` that was given."
        )
    through = point(activation)
    compare(f"{name} without functions", through, activation, VECTORS)
    watched = [point.is_watched, [point.fns.append(print), point.is_watched][1]]
    if watched != [False, True]:
        raise CheckFailed(
            f"{name}: `is_watched` is {watched[0]} without functions and {watched[1]} with one.\n"
            "  Next: keep the one that was given."
        )
    got: list[Tensor] = []
    double, shift, square = (lambda x: 2 * x), (lambda x: x + 1), (lambda x: x * x)

    def look(x: Tensor) -> None:
        got.append(x)

    def first(x: Tensor) -> Tensor:
        return square(x) + 3

    cases: list[tuple[str, list[Fn], Tensor]] = [
        ("when its function returns None", [look], activation),
        ("when its function returns a tensor", [double], 2 * activation),
        ("with three functions", [first, look, shift, double], 2 * (activation**2 + 4)),
    ]
    for case, fns, expected in cases:
        got.clear()
        point.fns[:] = fns
        with during(case):
            actual = point(activation)
        if len(got) != fns.count(look):
            raise CheckFailed(
                f"{name} {case}: a function that only looks was called {len(got)} times, expected {fns.count(look)}.\n"
                "  Next: call every function in `self.fns` once."
            )
        compare(f"{name} {case}", actual, expected, VECTORS)
        if fns[0] is first:
            compare(f"{name} {case}: what the second gets", got[0], first(activation), VECTORS)
        if point.fns != fns:
            raise CheckFailed(
                f"{name} {case}: `fns` is another list after the run.\n  Next: only read `self.fns` in `forward`."
            )
    point.fns[:] = [look]
    if not point(activation).requires_grad:
        raise CheckFailed(
            f"{name}: no gradient comes through it.\n  Next: hand on the tensor itself, without .detach() or .data."
        )
    if through is not activation:
        raise CheckFailed(
            f"{name} without functions: a copy comes out, which costs memory at every hook point.\n"
            "  Next: return the activation itself."
        )


def _point_class(name: str, fn: Fn) -> type:
    """The learner's `MyHookPoint`, which stands where the function does."""
    cls = beside(fn, "MyHookPoint")
    if not isinstance(cls, type):
        raise CheckFailed(f"{name}: there is no class `MyHookPoint` beside it.\n  Next: run the cell that defines it.")
    return cls


def _earlier(model: nn.Module, calls: list[str]) -> dict[str, list[Fn]]:
    """Somebody else's hooks, which were there before: they count, and one of them changes something."""

    def count(activation: Tensor) -> None:
        calls.append("count")

    def raise_it(activation: Tensor) -> Tensor:
        return activation + 0.5

    for place, fn in (("blocks.0.hook_out", count), ("blocks.0.hook_out", raise_it), ("hook_end", count)):
        model.get_submodule(place).fns.append(fn)
    return _attached(model)


def _attached(model: nn.Module) -> dict[str, list[Fn]]:
    return {name: list(model.get_submodule(name).fns) for name in POINTS}


EARLIER: list[tuple[str, Fn]] = [("blocks.0.hook_out", lambda activation: activation + 0.5)]


def _assert_clean(name: str, when: str, model: nn.Module, before: dict[str, list[Fn]]) -> None:
    """The functions at every hook point are those from before the run."""
    for place, fns in _attached(model).items():
        module = model.get_submodule(place)
        extra = len(fns) + len(module._forward_hooks) + len(module._forward_pre_hooks) - len(before[place])
        if extra > 0:
            raise CheckFailed(
                f"{name}: {when}, {'a function is' if extra == 1 else f'{extra} functions are'} left behind at "
                f"`{place}`.\n  Next: take away what you attached, in the `finally` of a `try` around the run."
            )
        if fns != before[place]:
            raise CheckFailed(
                f"{name}: {when}, the functions at `{place}` are not those that were there before: "
                f"{len(before[place])} before, {len(fns)} now.\n"
                "  Next: take away your own functions only, and leave the others where they were."
            )


def hooked(model: Any, tokens: Tensor, hooks: Any, choose: Fn = list, at: int = 99) -> Any:
    """A run with hooks: those which `choose` leaves, put in at place `at` of the functions that are there already."""
    before = {point: point.fns for point in model.modules() if isinstance(point, MyHookPoint)}
    for point, fns in before.items():
        point.fns = list(fns)
    for name, fn in choose(hooks):
        model.get_submodule(name).fns.insert(at, fn)
    try:
        return model(tokens)
    finally:
        for point, fns in before.items():
            point.fns = fns


@known_mistakes(
    {
        "the hooks change nothing: what they return never reaches the model.": lambda model, tokens, hooks: model(
            tokens
        ),
        "the hooks at one place run in reverse order.": partial(hooked, at=0),
        "only the last hook at each place is kept.": partial(hooked, choose=lambda hooks: dict(hooks).items()),
        "only the first of the hooks is attached.": partial(hooked, choose=lambda hooks: hooks[:1]),
    }
)
def check_my_run_with_hooks(fn: Fn) -> None:
    """Beside PyTorch's forward hooks; then what is left when a run ends well, ends badly, or cannot begin."""
    name = "my_run_with_hooks"
    model = Watched(_point_class(name, fn))
    plain = by_pytorch([], TOKENS)[0]
    with during("with no hooks"):
        compare(f"{name} with no hooks", fn(model, TOKENS, []), plain, VECTORS)
    seen: dict[str, Tensor] = {}

    def keep(place: str) -> Fn:
        return lambda activation: seen.__setitem__(place, activation)

    double, shift = (lambda activation: 2 * activation), (lambda activation: activation + 0.7)
    cases: dict[str, list[tuple[str, Fn]]] = {
        "with a hook that replaces": [("blocks.0.hook_in", double)],
        "with hooks at two places": [("hook_end", shift), ("blocks.0.hook_in", double)],
        "with two hooks at one place": [("hook_start", double), ("blocks.0.hook_out", double), ("hook_start", shift)],
        "with the same hook twice": [("hook_start", shift), ("hook_start", shift)],
    }
    for case, pairs in cases.items():
        expected, sights = by_pytorch(pairs, TOKENS)
        looks = [(place, keep(place)) for place in ("blocks.1.hook_in", "blocks.1.hook_out")]
        before = _attached(model)
        with during(case):
            actual = fn(model, TOKENS, [*pairs, *looks])
        compare(f"{name} {case}", actual, expected, VECTORS)
        for place, _ in looks:
            if place not in seen:
                raise CheckFailed(
                    f"{name} {case}: the hook at `{place}` was not called.",
                    evidence=Evidence(f"{name} {case}: the first hook that is not called", place),
                    advice="  Next: attach every pair of `hooks`.",
                )
            compare(f"{name} {case}: what a later hook at `{place}` gets", seen[place], sights[place], VECTORS)
        _assert_clean(name, "after a run", model, before)
    _check_ends(name, model, lambda tokens, hooks: fn(model, tokens, hooks), lambda place, hook: [(place, hook)])


def _check_ends(name: str, model: Watched, run: Fn, wanted: Callable[[str, Fn], Any]) -> None:
    """Other people's hooks, a run that ends in an exception, and one that cannot begin."""
    calls: list[str] = []
    before = _earlier(model, calls)
    run(TOKENS, wanted("blocks.0.hook_out", lambda activation: None))
    _assert_clean(name, "after a run", model, before)
    if calls != ["count", "count"]:
        raise CheckFailed(
            f"{name}: functions that others had attached were called {len(calls)} times, expected 2.\n"
            "  Next: leave those that are there already where they are, and run the model once."
        )
    failing = wanted("blocks.0.hook_out", lambda activation: activation * 2)
    assert_stops(name, lambda: run(FAILING, failing), "the model")
    _assert_clean(name, "after a run that ended in an exception", model, before)
    runs = model.runs
    must_raise(
        name,
        KeyError,
        "a name that no hook point has, 'hook_strat',",
        lambda: run(TOKENS, [*failing, *wanted("hook_strat", lambda activation: None)]),
    )
    must_raise(
        name,
        KeyError,
        "the name of a module that is no hook point, 'between',",
        lambda: run(TOKENS, wanted("between", lambda activation: None)),
    )
    _assert_clean(name, "after a name that no hook point has", model, before)
    if model.runs != runs:
        raise CheckFailed(
            f"{name}: for a name that no hook point has, the model ran all the same.\n"
            "  Next: look up all the names before you begin."
        )
    run(TOKENS, wanted("blocks.0.hook_out", before["blocks.0.hook_out"][0]))
    _assert_clean(name, "after a run with a function that others had attached, too", model, before)


def cached(model: Any, tokens: Tensor, names: Any = None, only: str | None = None, at: int = 99) -> Any:
    """A run with a cache, in which every place holds what the place `only` saw, if that is given."""
    seen: dict[str, Tensor] = {}
    keeps = [(place, lambda activation, place=place: seen.__setitem__(place, activation)) for place in POINTS]
    output = hooked(model, tokens, keeps, at=at)
    return output, {place: seen[only or place] for place in (POINTS if names is None else names)}


@known_mistakes(
    {
        f"the cache holds what `{place}` saw in its place.": partial(cached, only=place)
        for place in POINTS
        if place != "blocks.0.hook_in"  # which sees what `hook_start` does
    },
    {"it is what came in; a function that was there already had replaced it.": partial(cached, at=0)},
)
def check_my_run_with_cache(fn: Fn) -> None:
    """All places, some, none; a cache that stays as it is; and the ends of a run, good and bad."""
    name = "my_run_with_cache"
    model = Watched(_point_class(name, fn))
    expected, sights = by_pytorch([], TOKENS)
    before = _attached(model)
    for case, names in (
        ("without names", None),
        ("with names", ["hook_end", "blocks.1.hook_in"]),
        ("with an empty list of names", []),
    ):
        with during(case):
            returned = fn(model, TOKENS) if names is None else fn(model, TOKENS, names)
        cache = _output_and_cache(name, returned, expected)
        wanted = POINTS if names is None else names
        agree(f"{name} {case}", "the names in the cache, sorted", sorted(cache), sorted(wanted))
        for place in wanted:
            compare(f"{name} {case}: `{place}`", cache[place], sights[place], VECTORS)
        _assert_clean(name, "after a run", model, before)
        model(OTHERS)
        for place in wanted:
            compare(f"{name}: `{place}`, after the model ran on something else", cache[place], sights[place], VECTORS)
    _earlier(model, [])
    changed, sights = by_pytorch(EARLIER, TOKENS)
    cache = _output_and_cache(name, fn(model, TOKENS), changed)
    for place in POINTS:
        compare(f"{name} with others' functions: `{place}`", cache[place], sights[place], VECTORS)
    model = Watched(_point_class(name, fn))
    _check_ends(name, model, partial(fn, model), lambda place, hook: [place])


def _output_and_cache(name: str, returned: Any, output: Tensor) -> Mapping[str, Tensor]:
    if returned is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise CheckFailed(
            f"{name}: expected two things, the output and the cache, got a {type(returned).__name__}.\n"
            "  Next: return output, cache."
        )
    if isinstance(returned[0], Mapping):
        raise CheckFailed(f"{name}: the cache comes first.\n  Next: return the output first, then the cache.")
    compare(f"{name}: the output", returned[0], output, VECTORS)
    if not isinstance(returned[1], Mapping):
        raise CheckFailed(
            f"{name}: expected a dict of activations, got a {type(returned[1]).__name__}.\n"
            "  Next: keep each activation under the path of its hook point."
        )
    return returned[1]
