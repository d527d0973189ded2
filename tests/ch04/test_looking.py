"""Chapter 04's checks of its first half, against mistakes that learners make, and right answers in another style.

Each mistake returns the right type, shape and dtype, and must be refused with its promised words. Those marked
`surprise` are absent from the check's own list of known mistakes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch02_transformer as ch02
import solutions.ch04_induction as ref
from course_utils.checks import find_checks, run_check
from course_utils.checks.ch04.hooks import Watched
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks as attached
from course_utils.hooks import reset_hooks, run_with_cache, run_with_hooks
from solutions.ch04_induction import MyHookPoint, residual_components
from tests.ch02 import other_transformer
from tests.ch04 import other_induction as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

OURS = ("hooks", "looking", "attribution")
CHECKS = {
    name: check for name, check in find_checks()["04"].items() if check.__module__.rpartition(".")[2].startswith(OURS)
}
INF = torch.inf
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    """Note a wrong answer."""
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# -------------------------------------------------------------------------------------------------------- MyHookPoint


def point(words: str, surprise: bool = False) -> Callable[[Any], Any]:
    """A hook point with another `forward`."""

    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        mistake("MyHookPoint", words, type("MyHookPoint", (MyHookPoint,), {"forward": forward}), surprise)
        return forward

    return note


@point("returned None")
def _(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        activation = fn(activation)
    return activation


@point("what the function returns is thrown away")
def _(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        fn(activation)
    return activation


@point("every function is given the original activation")
def _(self: Any, activation: Any) -> Any:
    out = activation
    for fn in self.fns:
        new = fn(activation)
        out = out if new is None else new
    return out


@point("None ends it")
def _(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        new = fn(activation)
        if new is None:
            return activation
        activation = new
    return activation


@point("was called 0 times, expected 1", surprise=True)
def _(self: Any, activation: Any) -> Any:
    for fn in self.fns[:1]:
        new = fn(activation)
        activation = activation if new is None else new
    return activation


@point("the functions run in reverse order")
def _(self: Any, activation: Any) -> Any:
    return reduce_over(self.fns[::-1], activation)


@point("`fns` is another list after the run", surprise=True)
def _(self: Any, activation: Any) -> Any:
    activation = reduce_over(self.fns, activation)
    self.fns.clear()
    return activation


@point("no gradient comes through it", surprise=True)
def _(self: Any, activation: Any) -> Any:
    return reduce_over(self.fns, activation.detach())


@point("it changed `activation` in place", surprise=True)
def _(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        new = fn(activation)
        if new is not None:
            activation.data.copy_(new)
    return activation


@point("was called 2 times", surprise=True)
def _(self: Any, activation: Any) -> Any:
    for fn in self.fns:
        activation = activation if fn(activation) is None else fn(activation)
    return reduce_over([fn for fn in self.fns if fn(activation) is not None][:0], activation)


def reduce_over(fns: Any, activation: Any) -> Any:
    for fn in fns:
        new = fn(activation)
        activation = activation if new is None else new
    return activation


# ------------------------------------------------------------------------------------------ my_run_with_hooks, _cache


def places(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MyHookPoint)}


def hooking(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A my_run_with_hooks with switches for what people get wrong."""

    def my_run_with_hooks(model: Any, tokens: Any, hooks: Any) -> Any:
        points = places(model)
        pairs = list(dict(hooks).items()) if wrong.get("as_dict") else hooks
        if wrong.get("forgiving"):
            pairs = [(name, fn) for name, fn in pairs if name in points]
        if not wrong.get("late"):
            pairs = [(name, fn, points[name]) for name, fn in pairs]
        if wrong.get("any_module"):
            pairs = [(name, fn, model.get_submodule(name)) for name, fn, _ in pairs]
        done = []
        try:
            for name, fn, *_ in pairs:
                if wrong.get("overwrite"):
                    points[name].fns = [fn]
                elif wrong.get("front"):
                    points[name].fns.insert(0, fn)
                else:
                    points[name].fns.append(fn)
                done.append((points[name], fn))
            if wrong.get("twice"):
                model(tokens)
            output = model(tokens)
        except Exception:
            if wrong.get("no_finally"):
                raise
            clean(done, wrong)
            if wrong.get("swallows"):
                return None
            raise
        clean(done, wrong)
        return output

    mistake("my_run_with_hooks", words, my_run_with_hooks, surprise)


def clean(done: Any, wrong: Any) -> None:
    for where, fn in done:
        if wrong.get("clear_all") or wrong.get("overwrite"):
            where.fns = []
        elif wrong.get("pop_first"):
            where.fns.pop(0)
        elif not wrong.get("leaves"):
            where.fns.remove(fn)


hooking("after a run, a function is left behind at `blocks.0.hook_in`", leaves=True)
hooking("after a run that ended in an exception, a function is left behind at `blocks.0.hook_out`", no_finally=True)
hooking("the functions at `blocks.0.hook_out` are not those that were there before", clear_all=True, surprise=True)
hooking("not those that were there before: 2 before, 2 now", pop_first=True, surprise=True)
hooking("raised an exception, and it was swallowed", swallows=True, surprise=True)
hooking("only the last hook at each place is kept", as_dict=True)
hooking("only the last hook at each place is kept", overwrite=True)
hooking("the hooks at one place run in reverse order", front=True)
hooking("functions that others had attached were called 4 times", twice=True, surprise=True)
hooking("a name that no hook point has, 'hook_strat', should raise KeyError", forgiving=True)


def _late_lookup(model: Any, tokens: Any, hooks: Any) -> Any:
    points = places(model)
    before = {where: list(where.fns) for where in points.values()}
    for name, fn in hooks:
        points[name].fns.append(fn)
    try:
        return model(tokens)
    finally:
        for where, fns in before.items():
            where.fns = fns


mistake(
    "my_run_with_hooks",
    "after a name that no hook point has, a function is left behind at `blocks.0.hook_out`",
    _late_lookup,
    True,
)
mistake(
    "my_run_with_hooks",
    "should raise KeyError",
    lambda model, tokens, hooks: ref.my_run_with_hooks(
        model, tokens, [(name, fn) for name, fn in hooks if hasattr(model, name.split(".")[0]) and name != "between"]
    ),
)
mistake("my_run_with_hooks", "the hooks change nothing", lambda model, tokens, hooks: model(tokens))
mistake(
    "my_run_with_hooks",
    "it changed the list `hooks`",
    lambda model, tokens, hooks: ref.my_run_with_hooks(model, tokens, [hooks.pop(0) for _ in list(hooks)]),
    True,
)
mistake(
    "my_run_with_hooks",
    "values are wrong",
    lambda model, tokens, hooks: ref.my_run_with_hooks(
        model, tokens, [(name, lambda x, fn=fn: None if fn(x) is None else fn(x) * 0 + x * 2) for name, fn in hooks]
    ),
    True,
)


def caching(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A my_run_with_cache with switches for what people get wrong."""

    def my_run_with_cache(model: Any, tokens: Any, names: Any = None) -> Any:
        points, cache = places(model), {}
        if names is None or (wrong.get("falsy") and not names):
            chosen = list(points)
        else:
            chosen = [name for name in names if not wrong.get("forgiving") or name in points]
        if wrong.get("all"):
            chosen = list(points)
        before = {name: list(where.fns) for name, where in points.items()}

        def keep(name: str) -> Any:
            def fn(x: Any) -> Any:
                cache[chosen[-1] if wrong.get("late_binding") else name] = x * 2 if wrong.get("doubled") else x

            return fn

        for name in chosen:
            where = points[name]
            where.fns.insert(0, keep(name)) if wrong.get("front") else where.fns.append(keep(name))
        if wrong.get("no_finally"):
            output = model(tokens)
            for name, fns in before.items():
                points[name].fns = fns
        else:
            try:
                output = model(tokens)
            finally:
                for name, fns in before.items():
                    if wrong.get("clear_all"):
                        points[name].fns = []
                    elif not wrong.get("leaves"):
                        points[name].fns = fns
        return (cache, output) if wrong.get("swapped") else cache if wrong.get("cache_only") else (output, cache)

    mistake("my_run_with_cache", words, my_run_with_cache, surprise)


caching("after a run, a function is left behind at `hook_start`", leaves=True)
caching("after a run that ended in an exception, a function is left behind", no_finally=True)
caching("are not those that were there before", clear_all=True, surprise=True)
caching("the names in the cache", late_binding=True, surprise=True)
caching("the names in the cache", all=True)
caching("with an empty list of names: wrong answer", falsy=True, surprise=True)
caching("should raise KeyError", forgiving=True)
caching("a function that was there already had replaced it", front=True)
caching("the cache comes first", swapped=True)
caching("expected two things, the output and the cache", cache_only=True)
caching("Every value is 2 times the right one", doubled=True, surprise=True)


# ------------------------------------------------------------------------------------ pattern_from_qk, z_from_pattern


def attend(q: Any, k: Any, divisor: float | None = None, mask: Any = None, axis: int = -1) -> Any:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (q.shape[-1] ** 0.5 if divisor is None else divisor)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1) if mask is None else mask
    return scores.masked_fill(future, -INF).softmax(axis)


def never(q: Any) -> Any:
    return torch.zeros(q.shape[1], q.shape[1], dtype=torch.bool)


mistake("pattern_from_qk", "not divided by sqrt(d_head)", lambda q, k: attend(q, k, divisor=1.0))
mistake("pattern_from_qk", "divided by d_head; divide by its root", lambda q, k: attend(q, k, divisor=6.0))
mistake("pattern_from_qk", "nothing is masked", lambda q, k: attend(q, k, mask=never(q)))
mistake("pattern_from_qk", "masked after the softmax", lambda q, k: attend(q, k, mask=never(q)).tril())
mistake("pattern_from_qk", "the softmax runs over the queries", lambda q, k: attend(q, k, axis=-2))
mistake("pattern_from_qk", "queries and keys are swapped", lambda q, k: attend(k, q))
mistake("pattern_from_qk", "values are wrong", lambda q, k: attend(q, k, divisor=q.shape[2] ** 0.5), True)
mistake("pattern_from_qk", "values are wrong", lambda q, k: attend(q, k[:, :, :1].expand_as(k)), True)
mistake("pattern_from_qk", "All of the wrong values are at batch=1", lambda q, k: attend(q, k[:1].expand_as(k)), True)
mistake(
    "pattern_from_qk",
    "values are wrong",
    lambda q, k: attend(q, k, mask=torch.ones(q.shape[1], q.shape[1]).triu(2).bool()),
    True,
)
mistake("pattern_from_qk", "it changed `q` in place", lambda q, k: attend(q.div_(6**0.5), k, divisor=1.0))


def average(pattern: Any, v: Any) -> Any:
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


mistake("z_from_pattern", "the pattern is transposed", lambda pattern, v: average(pattern.mT, v))
mistake("z_from_pattern", "the softmax is taken again", lambda pattern, v: average(pattern.softmax(-1), v))
mistake("z_from_pattern", "the pattern of head 0", lambda pattern, v: average(pattern[:, :1].expand_as(pattern), v))
mistake("z_from_pattern", "the values are handed on as they are", lambda pattern, v: v.clone())
mistake("z_from_pattern", "Every value is", lambda pattern, v: average(pattern, v) / 3, True)
mistake(
    "z_from_pattern",
    "values are wrong",
    lambda pattern, v: (pattern @ v.transpose(1, 2)).reshape(v.shape),
    True,
)
mistake("z_from_pattern", "values are wrong", lambda pattern, v: average(pattern, v.flip(2)), True)
mistake("z_from_pattern", "All of the wrong values are at batch=1", lambda p, v: average(p, v[:1].expand_as(v)), True)


# ------------------------------------------------------------------------------------------------------------- scores


def stacked(cache: Any) -> Any:
    return cache.stack("pattern")


def back(pattern: Any, distance: int) -> Any:
    return pattern.diagonal(offset=-distance, dim1=-2, dim2=-1)


def mean(weights: Any) -> Any:
    return weights.mean((1, 3))


def swapped(table: Any) -> Any:
    return table.T.reshape(table.shape)


for exercise, right, words in (
    ("current_token_scores", lambda c: back(stacked(c), 0), "the positions are summed"),
    ("previous_token_scores", lambda c: back(stacked(c), 1), "the positions are summed"),
    ("first_token_scores", lambda c: stacked(c)[..., 0], "the positions are summed"),
):
    mistake(exercise, "only the first text", lambda c, right=right: mean(right(c)[:, :1]))
    mistake(exercise, "the texts of the batch are summed", lambda c, right=right: right(c).sum(1).mean(-1))
    mistake(exercise, words, lambda c, right=right: right(c).mean(1).sum(-1))
    mistake(exercise, "layers and heads are mixed up", lambda c, right=right: swapped(mean(right(c))))
    mistake(
        exercise, "The axes are all there, in another order: (head, layer)", lambda c, right=right: mean(right(c)).T
    )
    mistake(exercise, "the layers come in reverse order", lambda c, right=right: mean(right(c)).flip(0))
    mistake(exercise, "only the last query counts", lambda c, right=right: mean(right(c)[..., -1:]))
    mistake(exercise, "values are wrong", lambda c, right=right: mean(right(c)).flip(1), True)
    mistake(exercise, "values are wrong", lambda c, right=right: right(c).median(-1).values.mean(1), True)
    mistake(exercise, "values are wrong", lambda c, right=right: mean(right(c)[:, :, :, ::2]), True)

mistake("current_token_scores", "the position before", lambda c: mean(back(stacked(c), 1)))
mistake("current_token_scores", "query 0 is left out", lambda c: mean(back(stacked(c), 0)[..., 1:]))
mistake(
    "current_token_scores",
    "over all pairs of positions",
    lambda c: mean(back(stacked(c), 0)) / len(stacked(c)[0, 0, 0]),
)
mistake(
    "current_token_scores", "values are wrong", lambda c: c.stack("attn_scores").diagonal(0, -2, -1).mean((1, 3)), True
)
mistake("previous_token_scores", "off by one: it is the attention to the own", lambda c: mean(back(stacked(c), 0)))
mistake("previous_token_scores", "two positions back", lambda c: mean(back(stacked(c), 2)))
mistake("previous_token_scores", "query and key are swapped", lambda c: mean(back(stacked(c), -1)))
mistake(
    "previous_token_scores",
    "but not all of them count",
    lambda c: back(stacked(c), 1).sum(-1).mean(1) / stacked(c).shape[-1],
)
mistake("first_token_scores", "query 0 is left out", lambda c: mean(stacked(c)[..., 1:, 0]))
mistake("first_token_scores", "query and key are swapped", lambda c: mean(stacked(c)[..., 0, :]))
mistake("first_token_scores", "the attention to position 1", lambda c: mean(stacked(c)[..., 1]))

for exercise, shift in (("induction_scores", 1), ("duplicate_token_scores", 0)):

    def diagonal(c: Any, n: int, shift: int = shift) -> Any:
        return back(stacked(c), n - shift)

    def scored(c: Any, n: int, get: Any = diagonal) -> Any:
        return mean(get(c, n)[..., -n:])

    mistake(exercise, "only the first text", lambda c, n, get=diagonal: mean(get(c, n)[:, :1, :, -n:]))
    mistake(
        exercise, "the texts of the batch are summed", lambda c, n, get=diagonal: get(c, n)[..., -n:].sum(1).mean(-1)
    )
    mistake(exercise, "the whole diagonal is averaged", lambda c, n, get=diagonal: mean(get(c, n)))
    mistake(exercise, "the first queries of the diagonal", lambda c, n, get=diagonal: mean(get(c, n)[..., :n]))
    mistake(exercise, "the last query is left out", lambda c, n, get=diagonal: mean(get(c, n)[..., -n:-1]))
    mistake(
        exercise,
        "one too early" if shift else "the first queries",
        lambda c, n, get=diagonal: mean(get(c, n)[..., -n - 1 : -1]),
    )
    mistake(exercise, "layers and heads are mixed up", lambda c, n, score=scored: swapped(score(c, n)))
    mistake(exercise, "one before the first occurrence", lambda c, n: mean(back(stacked(c), n + 1)[..., -n:]))
    mistake(exercise, "values are wrong", lambda c, n, score=scored: score(c, n).flip(1), True)
    mistake(exercise, "values are wrong", lambda c, n, get=diagonal: get(c, n)[..., -n:].amax(-1).mean(1), True)
    mistake(exercise, "values are wrong", lambda c, n, get=diagonal: mean(get(c, n)[..., -n::2]), True)

mistake("induction_scores", "the same token's first occurrence", lambda c, n: mean(back(stacked(c), n)[..., -n:]))
mistake("induction_scores", "two after the first occurrence", lambda c, n: mean(back(stacked(c), n - 2)[..., -n:]))
mistake("duplicate_token_scores", "the token after the first", lambda c, n: mean(back(stacked(c), n - 1)[..., -n:]))
mistake("duplicate_token_scores", "to the own position", lambda c, n: mean(back(stacked(c), 0)[..., -n:]))


def by_hook(words: str, surprise: bool = False, **wrong: Any) -> None:
    """An induction_scores_by_hook with switches for what people get wrong."""

    def induction_scores_by_hook(model: Any, tokens: Any, n_half: int) -> Any:
        rows: list[Any] = []

        def look(pattern: Any, hook: Any) -> Any:
            weights = back(pattern, n_half - 1 + wrong.get("off", 0))[
                ..., slice(None) if wrong.get("all") else slice(-n_half, None)
            ]
            rows.append(pattern if wrong.get("keeps") else weights if wrong.get("views") else weights.mean((0, 2)))

        place = "blocks.*.attn.hook_attn_scores" if wrong.get("scores") else "blocks.*.attn.hook_pattern"
        with torch.set_grad_enabled(bool(wrong.get("gradients"))):
            if wrong.get("leaves") or wrong.get("reset"):
                for block in model.blocks:
                    block.attn.hook_pattern.add(look)
                model(tokens)
                if wrong.get("reset"):
                    reset_hooks(model)
            elif wrong.get("per_layer"):
                for layer in range(len(model.blocks)):
                    run_with_hooks(model, tokens, hooks={f"blocks.{layer}.attn.hook_pattern": look})
            elif wrong.get("no_finally"):
                handles = [block.attn.hook_pattern.add(look) for block in model.blocks]
                model(tokens)
                for handle in handles:
                    handle.remove()
            else:
                with attached(model, {place: look}):
                    model(tokens)
        if wrong.get("keeps"):
            rows = [back(pattern, n_half - 1)[..., -n_half:].mean((0, 2)) for pattern in rows]
        elif wrong.get("views"):
            rows = [weights.mean((0, 2)) for weights in rows]
        return torch.stack(rows[::-1] if wrong.get("reverse") else rows)

    mistake("induction_scores_by_hook", words, induction_scores_by_hook, surprise)


by_hook("the same token's first occurrence", off=1)
by_hook("two after the first occurrence", off=-1)
by_hook("the whole diagonal is averaged", all=True)
by_hook("the layers come in reverse order", reverse=True)
by_hook("gradients are recorded", gradients=True)
by_hook("it ran the model 3 times", per_layer=True)
by_hook("a hook is left behind at `blocks.0.attn.hook_pattern`", leaves=True)
by_hook("after a run that ended in an exception: a hook is left behind", no_finally=True)
by_hook("hooks that others had attached", reset=True)
by_hook("values are wrong", scores=True, surprise=True)


def _from_cache(model: Any, tokens: Any, n_half: int) -> Any:
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_pattern")
    model.holder = [cache]  # a cache that outlives the run, as one in a notebook does
    return ref.induction_scores(cache, n_half)


by_hook("3 of 3 patterns were still in memory", keeps=True, surprise=True)
by_hook("patterns were still in memory", views=True, surprise=True)
mistake("induction_scores_by_hook", "patterns were still in memory", _from_cache, True)


# --------------------------------------------------------------------------------------------------- repeated_tokens


def repeating(words: str, draw: Callable[..., Any], surprise: bool = False) -> None:
    """`draw(n_batch, n_half, d_vocab, generator)` gives the half; `bos` and the repetition are right."""

    def repeated_tokens(n_batch: int, n_half: int, d_vocab: int, generator: Any, bos: int) -> Any:
        half = draw(n_batch, n_half, d_vocab, generator)
        return torch.cat([torch.full((n_batch, 1), bos), half, half], 1)

    mistake("repeated_tokens", words, repeated_tokens, surprise)


def draw(b: int, n: int, v: int, g: Any) -> Any:
    return torch.randint(v, (b, n), generator=g)


def joined(words: str, join: Callable[..., Any], surprise: bool = False) -> None:
    """`join(half, bos, again)` puts the row together; `again()` draws anew."""

    def repeated_tokens(n_batch: int, n_half: int, d_vocab: int, generator: Any, bos: int) -> Any:
        def again() -> Any:
            return draw(n_batch, n_half, d_vocab, generator)

        return join(again(), torch.full((n_batch, 1), bos), again)

    mistake("repeated_tokens", words, repeated_tokens, surprise)


joined("`bos` is missing", lambda half, bos, again: torch.cat([half, half], 1))
joined("`bos` stands in front of each half", lambda half, bos, again: torch.cat([bos, half, bos, half], 1))
joined("This is what you get if `bos` ends the row", lambda half, bos, again: torch.cat([half, half, bos], 1))
joined("the second half is not the first one again", lambda half, bos, again: torch.cat([bos, half, again()], 1), True)
joined("each token is repeated at once", lambda half, bos, again: torch.cat([bos, half.repeat_interleave(2, 1)], 1))
joined("the first one backwards", lambda half, bos, again: torch.cat([bos, half, half.flip(1)], 1))
joined("that of another row", lambda half, bos, again: torch.cat([bos, half, half.roll(1, 0)], 1))
joined("the tokens come only once", lambda half, bos, again: torch.cat([bos, half], 1))
repeating("all rows are the same", lambda b, n, v, g: draw(1, n, v, g).expand(b, n))
repeating("it drew from torch's global generator", lambda b, n, v, g: torch.randint(v, (b, n)))
repeating(
    "the second batch from one generator is the first again",
    lambda b, n, v, g: draw(b, n, v, g.manual_seed(g.initial_seed())),
)
repeating("it left `generator` as it was", lambda b, n, v, g: draw(b, n, v, torch.Generator().manual_seed(0)))
repeating("the random tokens go from 1 to 6", lambda b, n, v, g: torch.randint(1, v, (b, n), generator=g))
repeating("the random tokens go from 0 to 5", lambda b, n, v, g: torch.randint(v - 1, (b, n), generator=g))
repeating("the random tokens go from 0 to 7", lambda b, n, v, g: torch.randint(v + 1, (b, n), generator=g))
repeating(
    "not drawn independently",
    lambda b, n, v, g: torch.stack([torch.randperm(n, generator=g) for _ in range(b)]) % v,
    True,
)
repeating(
    "not drawn independently",
    lambda b, n, v, g: (torch.rand(b, n, generator=g) ** 1.5 * v).long(),
    True,
)


def losses(logits: Any, targets: Any) -> Any:
    return -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]


mistake("per_token_losses", "the tokens are not shifted", lambda lo, t: losses(lo[:, :-1], t[:, :-1]))
mistake("per_token_losses", "the first position is dropped", lambda lo, t: losses(lo[:, 1:], t[:, 1:]))
mistake("per_token_losses", "the shift goes the wrong way", lambda lo, t: losses(lo[:, 1:], t[:, :-1]))
mistake("per_token_losses", "the sign is missing", lambda lo, t: -losses(lo[:, :-1], t[:, 1:]))
mistake("per_token_losses", "they are probabilities", lambda lo, t: (-losses(lo[:, :-1], t[:, 1:])).exp())
mistake(
    "per_token_losses",
    "the softmax is missing",
    lambda lo, t: -lo[:, :-1].gather(2, t[:, 1:, None])[..., 0],
)
mistake(
    "per_token_losses",
    "the softmax underflows",
    lambda lo, t: -lo[:, :-1].softmax(-1).gather(2, t[:, 1:, None])[..., 0].log(),
)
mistake("per_token_losses", "wrong shape", lambda lo, t: losses(lo[:, :-1], t[:, 1:]).mean(0))
mistake("per_token_losses", "wrong shape", lambda lo, t: losses(lo, t.roll(-1, 1)))
mistake(
    "per_token_losses",
    "values are wrong",
    lambda lo, t: -(lo[:, :-1].softmax(-1) + 1e-3).log().gather(2, t[:, 1:, None])[..., 0],
    True,
)
mistake(
    "per_token_losses",
    "All of the wrong values are at batch=1",
    lambda lo, t: losses(lo[:, :-1], t[:1, 1:].expand(len(t), -1)),
    True,
)
mistake("per_token_losses", "values are wrong", lambda lo, t: losses(lo[:, :-1], t[:, 1:]).cumsum(1), True)


def table(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A top_predictions with switches for what people get wrong."""

    def top_predictions(logits: Any, tokenizer: Any, k: int) -> Any:
        values, ids = logits.topk(k, largest=not wrong.get("lowest"))
        if wrong.get("ascending"):
            values, ids = values.flip(0), ids.flip(0)
        chances = (values if wrong.get("among_k") else logits).softmax(-1)
        rows = []
        for place, (value, token) in enumerate(zip(values, ids.tolist(), strict=True)):
            chance = chances[place] if wrong.get("among_k") else chances[token]
            text = wrong.get("text", lambda tok, i: tok.decode([i]))(tokenizer, token)
            number = wrong.get("logit", lambda v, c: v)(value, chance)
            rows.append((place + wrong.get("from", 1), text, number.item(), chance.item() * wrong.get("factor", 1)))
        return rows

    mistake("top_predictions", words, top_predictions, surprise)


table("ranks count from 0", **{"from": 0})
table("the unlikeliest come first", lowest=True)
table("the likeliest come last", ascending=True)
table("over the k best only", among_k=True)
table("they are percentages", factor=100)
table("convert_ids_to_tokens", text=lambda tok, i: tok.convert_ids_to_tokens(i))
table("they are log-probabilities", logit=lambda v, c: c.log())
table("they are probabilities", logit=lambda v, c: c)
table("the tokens: wrong answer", text=lambda tok, i: tok.decode([i]).strip(), surprise=True)
table("the tokens", text=lambda tok, i: i, surprise=True)
table("values are wrong", logit=lambda v, c: v.round(decimals=1), surprise=True)
table("the probabilities", factor=0.5, surprise=True)


# ------------------------------------------------------------------------------------------------------- attribution


def taking_apart(words: str, surprise: bool = False, labels: Any = None, vectors: Any = None, **pos: Any) -> None:
    """A residual_components whose labels or vectors are changed afterwards."""

    def wrong(cache: Any, at: int) -> Any:
        names, parts = ref.residual_components(cache, pos.get("always", at))
        rows = {name: row for row, name in enumerate(names)}
        parts = vectors(parts.clone(), rows, cache, at) if vectors else parts
        return labels(names) if labels else names, parts

    mistake("residual_components", words, wrong, surprise)


def _attention_whole(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    for layer in range(cache.n_layers):
        parts[rows[f"bias {layer}"]] = cache["attn_out", layer][:, at]
    return parts


def _spread(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    for layer in range(cache.n_layers):
        bias = rows[f"bias {layer}"]
        parts[bias - 3 : bias] += parts[bias] / 3
        parts[bias] = 0
    return parts


def _equal_heads(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    for layer in range(cache.n_layers):
        bias = rows[f"bias {layer}"]
        parts[bias - 3 : bias] = parts[bias - 3 : bias].mean(0)
    return parts


def _heads_swapped(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    first, second = rows["head 0.0"], rows["head 1.0"]
    parts[[first, second]] = parts[[second, first]]
    return parts


def _no_biases(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    parts[[row for name, row in rows.items() if name.startswith("bias")]] = 0
    return parts


def _mixed_embeddings(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    parts[[0, 1]] = parts[[1, 0]]
    return parts


def _one_bias(parts: Any, rows: Any, cache: Any, at: int) -> Any:
    parts[rows["bias 0"]] += parts[rows["bias 1"]]
    parts[rows["bias 1"]] = 0
    return parts


taking_apart("hold all of attention's output", vectors=_attention_whole)
taking_apart("the biases are spread over the heads", vectors=_spread)
taking_apart("the biases are left at 0", vectors=_no_biases)
taking_apart("pos is ignored: these are the vectors at the last position", always=-1)
taking_apart("pos is ignored: these are the vectors at position 0", always=0)
taking_apart("the first text only", vectors=lambda parts, rows, cache, at: parts[:, :1].expand_as(parts))
taking_apart("in another order", labels=lambda names: sorted(names))
taking_apart("the labels", labels=lambda names: [name.replace("head ", "L") for name in names], surprise=True)
taking_apart("values are wrong", vectors=_heads_swapped, surprise=True)
taking_apart("values are wrong", vectors=_equal_heads, surprise=True)  # the sums are right
taking_apart("values are wrong", vectors=_mixed_embeddings, surprise=True)
taking_apart("values are wrong", vectors=_one_bias, surprise=True)
mistake(
    "residual_components",
    "expected a list of labels and a tensor",
    lambda cache, pos: ref.residual_components(cache, pos)[1],
)


def attributing(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A logit_attribution with switches for what people get wrong."""

    def logit_attribution(cache: Any, model: Any, tokens: Any) -> Any:
        columns = []
        scale, W_U = cache["ln_final.scale"], model.unembed.W_U
        for pos in range(tokens.shape[1] - 1):
            _, parts = residual_components(cache, pos + wrong.get("ahead", 0))
            centred = parts if wrong.get("uncentred") else parts - parts.mean(-1, keepdim=True)
            divisor = scale[:, wrong.get("scale_at", pos)]
            if wrong.get("alone"):
                divisor = (centred.square().mean(-1, keepdim=True) + model.cfg.layer_norm_eps).sqrt()
            if wrong.get("first_scale"):
                divisor = divisor[:1]
            scaled = (
                centred / (1 if wrong.get("unscaled") else divisor) * (1 if wrong.get("no_w") else model.ln_final.w)
            )
            targets = tokens[:, pos + (0 if wrong.get("same") else 1)]
            entries = (scaled * W_U.T[targets]).sum(-1)
            constant = model.ln_final.b @ W_U[:, targets] + model.unembed.b_U[targets]
            if wrong.get("constants"):
                entries = entries + constant
            if wrong.get("spread"):
                entries = entries + constant / len(entries)
            if wrong.get("share"):
                entries = ((entries.sum(0) + constant) / len(entries)).expand_as(entries)
            if wrong.get("mixed"):
                entries = entries.roll(1, 0)
            if wrong.get("by_size"):
                sizes = parts.norm(dim=-1)
                entries = entries.sum(0) * sizes / sizes.sum(0)
            if wrong.get("batch_mean"):
                entries = entries.mean(1, keepdim=True).expand_as(entries)
            columns.append(entries)
        return torch.stack(columns, -1)

    mistake("logit_attribution", words, logit_attribution, surprise)


attributing("the final LayerNorm's scale is left out", unscaled=True)
attributing("the final LayerNorm's `w` is left out", no_w=True)
attributing("own mean is not subtracted", uncentred=True)
attributing("the final LayerNorm is left out", unscaled=True, uncentred=True, no_w=True)
attributing("a scale of its own", alone=True)
attributing("every position is divided by the scale of the last", scale_at=-1)
attributing("the scale of the first", first_scale=True)
attributing("the token at p itself", same=True)
attributing("those of the position after", ahead=1)
attributing("added to every component", constants=True)
attributing("spread over the components: the sums are right", spread=True)
attributing("an equal share of the logit: the sums are right", share=True)
attributing("The sums over the components are right", mixed=True, surprise=True)
attributing("The sums over the components are right", by_size=True, surprise=True)
attributing("values are wrong", batch_mean=True, surprise=True)
mistake(
    "logit_attribution",
    "leave the last position out",
    lambda c, m, t: torch.nn.functional.pad(ref.logit_attribution(c, m, t), (0, 1)),
)


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES],
)
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("einsum(", "diagonal(", "randint(", ".gather("))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "len(self.fns) > 0 -> len(self.fns) != 0",
    "-2 -> 2",  # of four axes
    "1 -> 0",  # of one axis, the last is the first
    "logits.topk(k).indices.tolist() -> logits.topk(k).indices",
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device=") <= STILL_RIGHT


# ---------------------------------------------------------------------------------- the reference, on a real model


TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=3, n_heads=4, d_model=20, d_head=5, d_mlp=24)
SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["reference", "other"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small transformer in which every parameter is random, whoever wrote it."""
    made = request.param(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return made


TOKENS = ref.repeated_tokens(2, 6, 31, torch.Generator().manual_seed(1), bos=0)


@SOLUTIONS
def test_attention_is_rebuilt_from_the_cache(module: Any, model: nn.Module) -> None:
    _, cache = run_with_cache(model, TOKENS)
    for layer in range(3):
        q, k, v, z = (cache[name, layer] for name in "qkvz")
        pattern = module.pattern_from_qk(q, k)
        torch.testing.assert_close(pattern, cache["pattern", layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.z_from_pattern(pattern, v), z, rtol=1e-4, atol=1e-5)


@SOLUTIONS
def test_components_sum_to_the_stream_and_attributions_to_the_logits(module: Any, model: nn.Module) -> None:
    names = ["hook_embed", "hook_pos_embed", "*hook_result", "*hook_attn_out", "*hook_mlp_out", "ln_final.*"]
    logits, cache = run_with_cache(model, TOKENS, names=[*names, "*hook_resid_post"])
    labels, vectors = module.residual_components(cache, 5)
    assert len(labels) == 2 + 3 * (4 + 1 + 1)
    torch.testing.assert_close(vectors.sum(0), cache["resid_post", -1][:, 5], rtol=1e-4, atol=1e-4)
    bias = vectors[labels.index("bias 1")]
    torch.testing.assert_close(bias, model.blocks[1].attn.b_O.expand(2, -1), rtol=1e-3, atol=1e-4)
    sums = module.logit_attribution(cache, model, TOKENS).sum(0)
    targets = TOKENS[:, 1:]
    constant = (model.ln_final.b @ model.unembed.W_U + model.unembed.b_U)[targets]
    expected = logits[:, :-1].gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(sums + constant, expected, rtol=1e-3, atol=1e-3)


@SOLUTIONS
def test_scores_by_hook_are_those_of_the_cache(module: Any, model: nn.Module) -> None:
    _, cache = run_with_cache(model, TOKENS)
    expected = module.induction_scores(cache, 6)
    torch.testing.assert_close(module.induction_scores_by_hook(model, TOKENS, 6), expected, rtol=1e-4, atol=1e-5)


def test_a_hook_may_ask_for_what_is_not_there_yet() -> None:
    """The model of the checks is a model like any other: somebody's hooks stay while ours come and go."""
    small = Watched(MyHookPoint)
    output, cache = ref.my_run_with_cache(small, torch.tensor([[1, 2]]))
    torch.testing.assert_close(cache["hook_end"], output)
    assert not any(place.fns for place in places(small).values())
