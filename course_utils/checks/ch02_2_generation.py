# ruff: noqa: N802 (check_KVCache is named after its exercise)
"""Chapter 02: is text written sooner with a key-value cache, and is what beam search finds the likeliest there is?

Oracles are the whole sequences out of which a cache gets its parts, a search over plain lists, and the search through
all texts that there are. Sizes are odd and all different.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.beams import exhaustive, judge_beams, search
from course_utils.checks.caching import judge_every_split, judge_widths, refuses_used_cache
from course_utils.checks.core import CheckFailed, Mistakes, compare, during, follows_input, identical, unchanged
from course_utils.checks.drawing import ToyModel
from course_utils.checks.modules import make_cache, noise
from course_utils.checks.plain import must_raise
from course_utils.config import TransformerConfig

CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=4, n_heads=3, d_model=7, d_head=5, d_mlp=11)
HEADS = "batch key head d_head"
LOGITS = "batch d_vocab"
INF = torch.inf


# -------------------------------------------------------------------------------------------------- the key-value cache


def check_KVCache(cls: Any) -> None:
    """Parts of known sequences go in; what comes back is the sequence so far, of that layer."""
    if not isinstance(cls, type):
        raise CheckFailed("KVCache: expected a class.\n  Next: begin with `class KVCache:`, as in the exercise.")
    _check_appends(cls)
    _check_limits(cls)
    _check_select(cls)
    judge_every_split(cls, CFG)
    follows_input("KVCache", lambda k, v: cls(CFG, 2).append(1, k, v)[1], (noise(2, 3, 3, 5), noise(2, 3, 3, 5)), HEADS)


def _sequences(batch: int, n_pos: int = 6, seed: int = 0) -> Tensor:
    """Keys and values of every layer, all different: [layer 2 batch pos head d_head]."""
    return noise(CFG.n_layers, 2, batch, n_pos, CFG.n_heads, CFG.d_head, seed=seed)


def _appended(name: str, cache: Any, layer: int, k: Tensor, v: Tensor) -> tuple[Any, Any]:
    """What `append` returns: two tensors."""
    with unchanged(name, k=k, v=v):
        returned = cache.append(layer, k, v)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        got = f"{len(returned)} values" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
        raise CheckFailed(
            f"{name}: append should return two tensors, all keys and all values; got {got}.\n"
            "  Next: return the pair, the keys first."
        )
    return returned[0], returned[1]


def _check_length(name: str, cache: Any, expected: int, when: str, mistakes: dict[int, str]) -> None:
    length = cache.length
    if callable(length):
        raise CheckFailed(f"{name}: `length` is a method.\n  Next: keep `@property` above it, so that it is a number.")
    if not isinstance(length, int):
        kind = type(length).__name__
        raise CheckFailed(f"{name}: `length` should be a whole number, got a {kind}.\n  Next: count positions.")
    if length != expected:
        hint = f"\n  This is what you get if {mistakes[length]}" if length in mistakes else ""
        raise CheckFailed(
            f"{name}: {when}, `length` should be {expected}, got {length}.{hint}\n"
            "  Next: count the positions that all layers have stored; before anything is stored that is 0."
        )


def _check_appends(cls: Any) -> None:
    """Three parts, layer after layer as a model does it."""
    whole, cache, other = _sequences(2), cls(CFG, 2), cls(CFG, 2)
    _check_length("KVCache", cache, 0, "in a new cache", {})
    start = 0
    for end in (3, 5, 6):
        for layer in range(CFG.n_layers):
            name = f"KVCache after append of positions {start} to {end - 1} to layer {layer}"
            new = whole[layer, :, :, start:end]
            k, v = _appended(name, cache, layer, *new)
            for what, got, index in (("keys", k, 0), ("values", v, 1)):
                expected = whole[layer, index, :, :end]
                mistakes = _distinct(_append_mistakes(whole, layer, index, start, end), expected)
                compare(f"{name}: the {what}", got, expected, HEADS, mistakes)
            if layer < CFG.n_layers - 1:
                early = {end: "the first layer's number is taken; the other layers have not got there."}
                when = f"when layers 0 to {layer} have {end} positions and the others {start}"
                _check_length("KVCache", cache, start, when, early)
        later = {
            end + 1: "the position after the next is counted.",
            end - 1: "the last position is not counted.",
            end * CFG.n_layers: "the layers are added up.",
            end - start: "only the newest are counted.",
        }
        _check_length("KVCache", cache, end, f"when every layer has {end} positions", later)
        start = end
    _check_length("KVCache", other, 0, "in a second cache, to which nothing was appended", {6: "the caches share."})


def _append_mistakes(whole: Tensor, layer: int, index: int, start: int, end: int) -> dict[str, Tensor]:
    """What comes out of caches that people write; the hints end the sentence "This is what you get if ..."."""
    right = whole[layer, index]
    old, new = right[:, :start], right[:, start:end]
    if not start:
        return {
            "keys and values are swapped.": whole[layer, 1 - index, :, :end],
            "all of the n_ctx positions are returned; return those that are in use.": F.pad(
                new, (0, 0, 0, 0, 0, CFG.n_ctx - end)
            ),
        }
    n_new = end - start
    from_zero = torch.cat([new, old[:, n_new:]], dim=1)
    return {
        "only the new positions are returned; the old ones belong in front of them.": new,
        "the new positions are not stored.": old,
        "the new positions stand before the old ones.": torch.cat([new, old], dim=1),
        "keys and values are swapped.": whole[layer, 1 - index, :, :end],
        "another layer's are returned: each layer has its own.": whole[layer - 1, index, :, :end],
        "the new positions are written over the first ones.": from_zero,
        "the new positions are written over the first ones, with room for all.": F.pad(
            from_zero, (0, 0, 0, 0, 0, end - from_zero.shape[1])
        ),
        "they are stored one position too early, over the last old one.": torch.cat([old[:, :-1], new], dim=1),
        "they are stored one position too early, over the last old one, and a position stays empty.": F.pad(
            torch.cat([old[:, :-1], new], dim=1), (0, 0, 0, 0, 0, 1)
        ),
        "they are stored one position too late, behind an empty one.": torch.cat(
            [F.pad(old, (0, 0, 0, 0, 0, 1)), new[:, :-1]], dim=1
        ),
        "all layers are stored in one sequence; each has its own.": torch.cat(
            [*(whole[before, index, :, start:end] for before in range(layer)), new], dim=1
        ),
        "all of the n_ctx positions are returned; return those that are in use.": F.pad(
            right[:, :end], (0, 0, 0, 0, 0, CFG.n_ctx - end)
        ),
    }


def _check_limits(cls: Any) -> None:
    """n_ctx positions fit, one more does not; another number of rows does not either, and nothing is stored then."""
    whole = _sequences(2, n_pos=CFG.n_ctx + 1)
    cache = cls(CFG, 2)

    def refuse(what: str, layer: int, k: Tensor, v: Tensor) -> None:
        try:
            cache.append(layer, k, v)
        except ValueError:
            return
        except RuntimeError as error:
            raise CheckFailed(
                f"KVCache: {what} should raise ValueError, and not a RuntimeError of torch ({error}).\n"
                "  Next: compare the sizes before anything is stored."
            ) from None
        raise CheckFailed(f"KVCache: {what} should raise ValueError.\n  Next: compare before anything is stored.")

    for layer in range(CFG.n_layers):
        cache.append(layer, *whole[layer, :, :, :7])
        refuse(f"{CFG.n_ctx + 1} positions with n_ctx = {CFG.n_ctx}", layer, *whole[layer, :, :, 7:])
        refuse("one row, in a cache made for a batch of 2,", layer, *whole[layer, :, :1, 7:8])
        refuse("three rows, in a cache made for a batch of 2,", layer, *_sequences(3)[layer, :, :, 5:])
        with during("after appends that it had to refuse"):
            k, _ = _appended("KVCache", cache, layer, *whole[layer, :, :, 7 : CFG.n_ctx])
        name = f"KVCache with {CFG.n_ctx} positions, after appends that it had to refuse"
        compare(name, k, whole[layer, 0, :, : CFG.n_ctx], HEADS)
        refuse(f"{CFG.n_ctx + 1} positions with n_ctx = {CFG.n_ctx}", layer, *whole[layer, :, :, CFG.n_ctx :])
    _check_length("KVCache", cache, CFG.n_ctx, f"when all of the {CFG.n_ctx} positions are taken", {})


def _check_select(cls: Any) -> None:
    """Rows in another order, one of them twice, with a batch that grows and shrinks; then each goes on by itself."""
    for rows in (torch.tensor([1, 0]), torch.tensor([1, 1, 0]), torch.tensor([1])):
        cache, before = cls(CFG, 2), _sequences(2, n_pos=4)
        for layer in range(CFG.n_layers):
            cache.append(layer, *before[layer])
        with unchanged("KVCache.select", rows=rows):
            cache.select(rows)
        _check_length("KVCache", cache, 4, "after `select`", {0: "the stored positions are lost."})
        then = _sequences(len(rows), n_pos=2, seed=1)
        for layer in range(CFG.n_layers):
            label = f"KVCache after select({rows.tolist()}), layer {layer}"
            for position in range(2):
                new = then[layer, :, :, position : position + 1]
                returned = _appended(label, cache, layer, *new)
                for what, got, index in (("keys", returned[0], 0), ("values", returned[1], 1)):
                    old, late = before[layer, index], then[layer, index, :, : position + 1]
                    mistakes = {}
                    if len(rows) == len(old):
                        mistakes["the rows are not selected: the cache is as it was."] = torch.cat([old, late], dim=1)
                    expected = torch.cat([torch.stack([old[row] for row in rows.tolist()]), late], dim=1)
                    compare(f"{label}: the {what}", got, expected, HEADS, mistakes)


# -------------------------------------------------------------------------------------------------- repeated n-grams


def check_ban_repeated_ngrams(fn: Callable[..., Any]) -> None:
    """Every token is tried: does the run that it would complete stand in the row?"""
    long = [[3, 1, 5, 3, 1, 4, 3, 1, 0, 3, 1], [6, 2, 6, 2, 6, 2, 6, 2, 6, 2, 6], [0, 12, 7, 3, 1, 9, 5, 12, 3, 1, 7]]
    cases = [(long, 3), (long, 2), (long, 1), ([[1, 2, 1, 7, 7, 7], [3, 5, 2, 0, 3, 5]], 3), ([[6, 3, 6, 3]], 4)]
    for rows, n in [*cases, ([[4], [8]], 2), ([[4], [8]], 3)]:
        _check_bans(fn, rows, n)
    for n in (0, -1):
        try:
            fn(noise(1, 13), torch.tensor([[3, 1]]), n)
        except ValueError:
            continue
        raise CheckFailed(
            f"ban_repeated_ngrams: n = {n} should raise ValueError.\n  Next: test n before anything else."
        )
    follows_input("ban_repeated_ngrams", fn, (noise(3, 13), torch.tensor(long), 2), LOGITS)


def _check_bans(fn: Callable[..., Any], rows: list[list[int]], n: int) -> None:
    tokens, logits = torch.tensor(rows), noise(len(rows), 13, seed=n)
    original = logits.clone()

    def runs(row: list[int], n: int = n) -> list[tuple[int, ...]]:
        return [tuple(row[start : start + n]) for start in range(len(row) - n + 1)] if n else []

    def banned(choose: Callable[[list[int], int], bool]) -> Tensor:
        """-inf for every token that may not follow its row."""
        out = original.clone()
        for index, row in enumerate(rows):
            for token in range(13):
                if choose(row, token):
                    out[index, token] = -INF
        return out

    def only(chosen: int) -> Callable[[list[int], int], bool]:
        """Of the runs that begin as the row ends, the first (0) or the last (-1)."""

        def choose(row: list[int], token: int) -> bool:
            followers = [run[-1] for run in runs(row) if run[:-1] == tuple(row[len(row) - n + 1 :])]
            return bool(followers) and followers[chosen] == token

        return choose

    everyones = [run for row in rows for run in runs(row)]
    expected = banned(lambda row, token: tuple([*row, token][-n:]) in runs(row))
    mistakes = {
        "nothing is banned.": original,
        "another row's runs count too; each row has its own.": banned(
            lambda row, token: tuple([*row, token][-n:]) in everyones
        ),
        "every row gets the bans of all rows.": original.masked_fill((expected == -INF).any(dim=0), -INF),
        "the banned logits are 0; softmax gives them exp(0) = 1.": expected.masked_fill(expected == -INF, 0.0),
        "every token of the row is banned.": banned(lambda row, token: token in row),
        "runs of n + 1 tokens are banned; n counts the new token too.": banned(
            lambda row, token: tuple([*row, token][-n - 1 :]) in runs(row, n + 1)
        ),
        "runs of n - 1 tokens are banned.": banned(
            lambda row, token: n > 1 and tuple([*row, token][1 - n :]) in runs(row, n - 1)
        ),
        "the bans and the rest are swapped.": original.masked_fill(expected > -INF, -INF),
        "only the first run that begins in the same way counts; all of them do.": banned(only(0)),
        "only the last run that begins in the same way counts; all of them do.": banned(only(-1)),
    }
    with unchanged("ban_repeated_ngrams", logits=logits, tokens=tokens):
        actual = fn(logits, tokens, n)
    label = f"ban_repeated_ngrams with n = {n}, tokens {rows}"
    compare(label, actual, expected, LOGITS, _distinct(mistakes, expected))


def _distinct(mistakes: Mapping[str, Tensor], expected: Tensor) -> Mistakes:
    """Without those that come to the right answer here, or to the same as one before."""
    kept: dict[str, Tensor] = {}
    for hint, answer in mistakes.items():
        if not any(identical(answer, other) for other in (expected, *kept.values())):
            kept[hint] = answer
    return kept


# -------------------------------------------------------------------------------------------------------- beam search

TINY = replace(CFG, d_vocab=5, n_ctx=9, n_layers=2)
WRONG = {
    "the log probabilities of earlier steps are forgotten: add them up.": {"forgets": True},
    "probabilities are added up; add their logarithms.": {"adds": "probabilities"},
    "logits are added up; take the log-softmax first.": {"adds": "logits"},
    "every beam keeps its own best extension; choose among the extensions of all beams together.": {"per_beam": True},
    "only the likeliest is kept on the way, as in greedy search.": {"width": 1},
    "a finished beam is extended; it should stay as it is.": {"extends_finished": True},
    "finished beams are dropped; they stay candidates.": {"drops_finished": True},
    "finished beams are kept apart, beside n_beams others; they take part in the choice.": {"apart": True},
    "an eos in the prompt finishes the beam; only what it produces counts.": {"prompt_counts": True},
    "nothing is banned: `no_repeat_ngram` is ignored.": {"no_bans": True},
    "another beam's n-grams are banned too; each beam has its own.": {"shared_bans": True},
    "only n-grams after the prompt are banned; those of the prompt count too.": {"prompt_free": True},
    "the probabilities of what is not banned are brought back to a sum of 1; leave them as the model said.": {
        "renormalises": True
    },
}


def check_beam_search(fn: Callable[..., Any]) -> None:
    """A toy model with a vocabulary of 5: first the search through everything, then the definition, step by step."""
    prompt = torch.tensor([[3, 0, 4]])
    _check_beams(fn, prompt, n_beams=125, n_new=3)
    _check_beams(fn, prompt, n_beams=200, n_new=3, eos=1)
    for n_beams in (1, 2, 4):
        _check_beams(fn, prompt, n_beams, n_new=4)
        _check_beams(fn, prompt, n_beams, n_new=4, eos=2)
    _check_beams(fn, torch.tensor([[1, 3, 1, 0]]), 3, n_new=5, eos=1)
    _check_beams(fn, torch.tensor([[0, 2]]), 3, n_new=4, eos=0)
    _check_beams(fn, prompt, 3, n_new=20)  # n_ctx is 9
    _check_beams(fn, prompt, 3, n_new=0)
    _check_beams(fn, torch.tensor([[2, 0, 2]]), 4, n_new=6, no_repeat_ngram=2)
    _check_beams(fn, torch.tensor([[2, 3, 2, 3, 0, 2, 3]]), 3, n_new=2, no_repeat_ngram=2)
    _check_beams(fn, torch.tensor([[4, 1, 4]]), 3, n_new=6, no_repeat_ngram=3, eos=2)
    _check_beams(fn, prompt, 3, n_new=4, no_repeat_ngram=1)  # after two tokens there is none left
    for n_beams in (0, -2):
        try:
            fn(ToyModel(TINY, "beam_search"), prompt, n_beams, 2)
        except ValueError:
            continue
        raise CheckFailed(f"beam_search: n_beams = {n_beams} should raise ValueError.\n  Next: test it at the start.")
    two = prompt.repeat(2, 1)
    must_raise("beam_search", ValueError, "two rows of tokens", partial(fn, ToyModel(TINY, "beam_search"), two, 3, 2))
    model, cache = ToyModel(TINY, "beam_search", scale=2.0), make_cache(fn, TINY, batch=1)
    with torch.no_grad():
        model(prompt[:, :2], cache)
    actual = fn(model, prompt, 3, 2, cache=cache)
    judge_beams("beam_search with a cache that holds 2 positions", actual, search(model, prompt, 3, 2), {}, 3)
    refuses_used_cache("beam_search", TINY, prompt, lambda *given: fn(*given[:2], 2, 2, cache=given[2]), fn)


def _check_beams(fn: Callable[..., Any], prompt: Tensor, n_beams: int, n_new: int, **options: Any) -> None:
    """Without a cache and with one."""
    model = ToyModel(TINY, "beam_search", scale=2.0)
    model.train()
    if n_beams > 100:
        expected = exhaustive(model, prompt, n_new, options.get("eos"))
    else:
        expected = search(model, prompt, n_beams, n_new, **options)
    wrong = {hint: partial(search, model, prompt, n_beams, n_new, **options, **how) for hint, how in WRONG.items()}
    label = f"beam_search with n_beams = {n_beams}, n_new = {n_new}" + "".join(
        f", {k} = {v}" for k, v in options.items()
    )
    case = f"{label}, prompt {prompt[0].tolist()}, n_ctx = {TINY.n_ctx}"
    with unchanged("beam_search", tokens=prompt):
        actual = fn(model, prompt, n_beams, n_new, **options)
    judge_beams(case, actual, expected, wrong, prompt.shape[1])
    if model.recorded:
        raise CheckFailed(
            "beam_search: gradients are recorded, which fills the memory step by step.\n"
            "  Next: run the search under torch.no_grad()."
        )
    if not torch.is_grad_enabled():
        raise CheckFailed("beam_search: gradients stay switched off afterwards.\n  Next: use `with torch.no_grad():`.")
    if not model.training:
        raise CheckFailed("beam_search: it left the model in evaluation mode.\n  Next: leave the mode alone.")
    if n_beams > 100:
        return
    n_calls = len(model.widths)
    model, cache = ToyModel(TINY, "beam_search", scale=2.0), make_cache(fn, TINY, batch=1)
    name = f"{label} and a key-value cache"
    with during("with a key-value cache"):
        actual = fn(model, prompt, n_beams, n_new, **options, cache=cache)
    if n_new:
        judge_widths(name, model.widths, [prompt.shape[1], *[1] * (n_calls - 1)], cache)
    judge_beams(f"{name} (without one it is right)", actual, expected, {}, prompt.shape[1])
