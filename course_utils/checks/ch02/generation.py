# ruff: noqa: N802 (check_KVCache is named after its exercise)
"""Chapter 02: is text written sooner with a key-value cache, and is what beam search finds the likeliest there is?

Oracles are the whole sequences out of which a cache gets its parts, a search over plain lists, and the search through
all texts that there are. Sizes are odd and all different.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch02.beams import Found, exhaustive, judge_beams, search
from course_utils.checks.ch02.caching import judge_every_split, judge_widths, refuses_used_cache
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.cache import ToyCache, make_cache
from course_utils.checks.standins.known_logits import ToyModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig

CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=4, n_heads=3, d_model=7, d_head=5, d_mlp=11)
HEADS = "batch key head d_head"
LOGITS = "batch d_vocab"
INF = torch.inf


# -------------------------------------------------------------------------------------------------- the key-value cache


class LimitedCache(ToyCache):
    """Lists, with the limits that the statement asks for."""

    def __init__(self, cfg: TransformerConfig, batch: int) -> None:
        super().__init__(cfg, batch)
        self.batch, self.n_ctx = batch, cfg.n_ctx

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n_stored = self.contents[layer][0].shape[1] if layer in self.contents else 0
        if len(k) != self.batch or n_stored + k.shape[1] > self.n_ctx:
            raise ValueError("It does not fit.")
        return super().append(layer, k, v)

    def select(self, rows: Tensor) -> None:
        self.batch = len(rows)
        super().select(rows)


def wrong_cache(**methods: Any) -> type:
    """A KVCache with other methods."""
    return type("KVCache", (LimitedCache,), methods)


def stores(joined: Callable[[Tensor, Tensor], Tensor]) -> type:
    """A KVCache that makes `joined(old, new)` of what it holds (at first nothing: no positions) and what is new."""

    def append(self: Any, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        old = self.contents.get(layer, (k[:, :0], v[:, :0]))
        self.contents[layer] = tuple(joined(*pair) for pair in zip(old, (k, v), strict=True))
        return self.contents[layer]

    return wrong_cache(append=append)


def returns(changed: Callable[[Any, tuple[Tensor, Tensor], int], tuple[Tensor, ...]]) -> type:
    """A KVCache that stores what it should, and returns `changed(cache, keys and values, layer)`."""
    return wrong_cache(append=lambda self, layer, k, v: changed(self, LimitedCache.append(self, layer, k, v), layer))


def counts(length: Callable[[list[int], int], int]) -> type:
    """A KVCache whose `length` is `length(how many positions each layer has, the newest of the last layer)`."""

    def number(self: Any) -> int:
        layers = range(self.n_layers)
        n_positions = [self.contents[layer][0].shape[1] if layer in self.contents else 0 for layer in layers]
        return length(n_positions, dict(self.appended).get(self.n_layers - 1, 0))

    return wrong_cache(length=property(number))


def padded(part: Tensor, n: int) -> Tensor:
    """With `n` empty positions at the end."""
    return F.pad(part, (0, 0, 0, 0, 0, n))


class SharedCache(LimitedCache):
    """A KVCache whose contents belong to the class; a new one empties them for all."""

    everything: ClassVar[dict[int, tuple[Tensor, Tensor]]] = {}

    def __init__(self, cfg: TransformerConfig, batch: int) -> None:
        super().__init__(cfg, batch)
        self.contents = self.everything
        self.contents.clear()


@known_mistakes(
    {
        "keys and values are swapped.": returns(lambda cache, pair, layer: pair[::-1]),
        "all of the n_ctx positions are returned; return those that are in use.": returns(
            lambda cache, pair, layer: tuple(padded(part, cache.n_ctx - part.shape[1]) for part in pair)
        ),
        "another layer's are returned: each layer has its own.": returns(
            lambda cache, pair, layer: cache.contents[max(layer - 1, 0)]
        ),
        "all layers are stored in one sequence; each has its own.": wrong_cache(
            append=lambda self, layer, k, v: ToyCache.append(self, 0, k, v)
        ),
        "only the new positions are returned; the old ones belong in front of them.": stores(lambda old, new: new),
        "the new positions are not stored.": stores(lambda old, new: old if old.shape[1] else new),
        "the new positions stand before the old ones.": stores(lambda old, new: torch.cat([new, old], dim=1)),
        "the new positions are written over the first ones.": stores(
            lambda old, new: torch.cat([new, old[:, new.shape[1] :]], dim=1)
        ),
        "the new positions are written over the first ones, with room for all.": stores(
            lambda old, new: torch.cat([new, padded(old, new.shape[1])[:, new.shape[1] :]], dim=1)
        ),
        "they are stored one position too early, over the last old one.": stores(
            lambda old, new: torch.cat([old[:, :-1], new], dim=1)
        ),
        "they are stored one position too early, over the last old one, and a position stays empty.": stores(
            lambda old, new: padded(torch.cat([old[:, :-1], new], dim=1), min(old.shape[1], 1))
        ),
        "they are stored one position too late, behind an empty one.": stores(
            lambda old, new: torch.cat([padded(old, 1), new], dim=1)[:, :-1] if old.shape[1] else new
        ),
        "the first layer's number is taken; the other layers have not got there.": counts(lambda n, newest: n[0]),
        "the position after the next is counted.": counts(lambda n, newest: min(n) + (min(n) > 0)),
        "the last position is not counted.": counts(lambda n, newest: max(min(n) - 1, 0)),
        "the layers are added up.": counts(lambda n, newest: min(n) * len(n)),
        "only the newest are counted.": counts(lambda n, newest: newest),
        "the caches share.": SharedCache,
        "the rows are not selected: the cache is as it was.": wrong_cache(
            select=lambda self, rows: setattr(self, "batch", len(rows))
        ),
        "the stored positions are lost.": wrong_cache(select=lambda self, rows: self.contents.clear()),
    }
)
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
    returned = cache.append(layer, k, v)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        got = f"{len(returned)} values" if isinstance(returned, tuple | list) else f"a {type(returned).__name__}"
        raise CheckFailed(
            f"{name}: append should return two tensors, all keys and all values; got {got}.\n"
            "  Next: return the pair, the keys first."
        )
    return returned[0], returned[1]


def _check_length(name: str, cache: Any, expected: int, when: str) -> None:
    length = cache.length
    if callable(length):
        raise CheckFailed(f"{name}: `length` is a method.\n  Next: keep `@property` above it, so that it is a number.")
    if not isinstance(length, Integral):
        kind = type(length).__name__
        raise CheckFailed(f"{name}: `length` should be a whole number, got a {kind}.\n  Next: count positions.")
    if length != expected:
        raise CheckFailed(
            f"{name}: {when}, `length` should be {expected}, got {length}.",
            evidence=Evidence(f"length {when}", length),
            advice="  Next: count the positions that all layers have stored; before anything is stored that is 0.",
        )


def _check_appends(cls: Any) -> None:
    """Three parts, layer after layer as a model does it."""
    whole, cache, other = _sequences(2), cls(CFG, 2), cls(CFG, 2)
    _check_length("KVCache", cache, 0, "in a new cache")
    start = 0
    for end in (3, 5, 6):
        for layer in range(CFG.n_layers):
            name = f"KVCache after append of positions {start} to {end - 1} to layer {layer}"
            new = whole[layer, :, :, start:end]
            k, v = _appended(name, cache, layer, *new)
            for what, got, index in (("keys", k, 0), ("values", v, 1)):
                compare(f"{name}: the {what}", got, whole[layer, index, :, :end], HEADS)
            if layer < CFG.n_layers - 1:
                ahead = f"layers 0 to {layer} have" if layer else "layer 0 has"
                when = f"when {ahead} {end} positions and the others {start}"
                _check_length("KVCache", cache, start, when)
        _check_length("KVCache", cache, end, f"when every layer has {end} positions")
        start = end
    _check_length("KVCache", other, 0, "in a second cache, to which nothing was appended")


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
                f'KVCache: {what} should raise ValueError, and not a RuntimeError of torch ("{error}").\n'
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
    _check_length("KVCache", cache, CFG.n_ctx, f"when all of the {CFG.n_ctx} positions are taken")


def _check_select(cls: Any) -> None:
    """Rows in another order, one of them twice, with a batch that grows and shrinks; then each goes on by itself.

    Also before anything is stored: then it is the number of rows that changes.
    """
    several = [([1, 0], 4), ([1, 1, 0], 4), ([1], 4), ([1, 1, 0], 0)]
    for rows, n_stored in [(torch.tensor(rows), n_stored) for rows, n_stored in several]:
        cache, before = cls(CFG, 2), _sequences(2, n_pos=n_stored)
        for layer in range(CFG.n_layers if n_stored else 0):
            cache.append(layer, *before[layer])
        cache.select(rows)
        _check_length("KVCache", cache, n_stored, "after `select`")
        then = _sequences(len(rows), n_pos=2, seed=1)
        for layer in range(CFG.n_layers):
            label = f"KVCache after select({rows.tolist()})" + (f", layer {layer}" if n_stored else " in a new cache")
            for position in range(2):
                new = then[layer, :, :, position : position + 1]
                try:
                    returned = _appended(label, cache, layer, *new)
                except ValueError as error:
                    raise CheckFailed(
                        f'{label}: append refused {len(rows)} row{"s" * (len(rows) > 1)}, with the words "{error}".\n'
                        "  Next: let `select` change the number of rows, even where nothing is stored yet."
                    ) from None
                for what, got, index in (("keys", returned[0], 0), ("values", returned[1], 1)):
                    old, late = before[layer, index], then[layer, index, :, : position + 1]
                    expected = torch.cat([torch.stack([old[row] for row in rows.tolist()]), late], dim=1)
                    compare(f"{label}: the {what}", got, expected, HEADS)


# -------------------------------------------------------------------------------------------------- repeated n-grams


def banned(logits: Tensor, tokens: Tensor, n: int, **wrong: Any) -> Tensor:
    """Bans by lists of runs, with switches for what people get wrong."""
    rows, out = tokens.tolist(), logits.clone()
    runs = [[row[start : start + n] for start in range(len(row) - n + 1)] for row in rows]
    for index, row in enumerate(rows):
        known = [run for own in runs for run in own] if wrong.get("pooled") else runs[index]
        begun = row[-(n - 1) :] if wrong.get("negative_index") else row[len(row) - n + 1 :]
        followers = [run[-1] for run in known if run[:-1] == begun]
        out[slice(None) if wrong.get("for_all") else index, followers[wrong.get("which", slice(None))]] = -INF
    return out


@known_mistakes(
    {
        "nothing is banned.": lambda logits, tokens, n: logits.clone(),
        "another row's runs count too; each row has its own.": partial(banned, pooled=True),
        "every row gets the bans of all rows.": partial(banned, for_all=True),
        "the banned logits are 0; softmax gives them exp(0) = 1.": lambda logits, tokens, n: logits.masked_fill(
            banned(logits, tokens, n) == -INF, 0.0
        ),
        "every token of the row is banned.": lambda logits, tokens, n: banned(logits, tokens, 1),
        "runs of n + 1 tokens are banned; n counts the new token too.": lambda logits, tokens, n: banned(
            logits, tokens, n + 1
        ),
        "runs of n - 1 tokens are banned.": lambda logits, tokens, n: banned(logits, tokens, max(n - 1, 1)),
        "the bans and the rest are swapped.": lambda logits, tokens, n: logits.masked_fill(
            banned(logits, tokens, n) > -INF, -INF
        ),
        "the last n - 1 tokens are taken by a negative index; for n = 1, `row[-0:]` is the whole row.": partial(
            banned, negative_index=True
        ),
        "only the first run that begins in the same way counts; all of them do.": partial(banned, which=slice(1)),
        "only the last run that begins in the same way counts; all of them do.": partial(banned, which=slice(-1, None)),
    }
)
def check_ban_repeated_ngrams(fn: Callable[..., Any]) -> None:
    """Every token is tried: does the run that it would complete stand in the row?"""
    long = [[3, 1, 5, 3, 1, 4, 3, 1, 0, 3, 1], [6, 2, 6, 2, 6, 2, 6, 2, 6, 2, 6], [0, 12, 7, 3, 1, 9, 5, 12, 3, 1, 7]]
    cases = [(long, 3), (long, 2), (long, 1), ([[1, 2, 1, 7, 7, 7], [3, 5, 2, 0, 3, 5]], 3), ([[6, 3, 6, 3]], 4)]
    glued = [[1, 12, 5, 11], [11, 2, 7, 1]]  # written without spaces, 1 12 is 11 2
    for rows, n in [*cases, ([[4], [8]], 2), ([[4], [8]], 3), (glued, 2)]:
        _check_bans(fn, rows, n)
    for n in (0, -1):
        try:
            fn(noise(1, 13), torch.tensor([[3, 1]]), n)
        except ValueError:
            continue
        raise CheckFailed(
            f"ban_repeated_ngrams: n = {n} should raise ValueError.\n  Next: test n before anything else."
        )
    given = (noise(3, 13), torch.tensor(long), 2)
    follows_input("ban_repeated_ngrams", fn, given, LOGITS)
    follows_every_kind("ban_repeated_ngrams", fn, given, LOGITS)


def _check_bans(fn: Callable[..., Any], rows: list[list[int]], n: int) -> None:
    tokens, logits = torch.tensor(rows), noise(len(rows), 13, seed=n)
    logits[0, 12] = -INF  # banned before
    expected = logits.clone()
    for index, row in enumerate(rows):
        runs = [row[start : start + n] for start in range(len(row) - n + 1)]
        for token in range(13):
            if [*row, token][-n:] in runs:
                expected[index, token] = -INF
    compare(f"ban_repeated_ngrams with n = {n}, tokens {rows}", fn(logits, tokens, n), expected, LOGITS)


# -------------------------------------------------------------------------------------------------------- beam search

TINY = replace(CFG, d_vocab=5, n_ctx=9, n_layers=2)


def searching(
    returned: Callable[[Found, int], Found] = lambda found, n_prompt: found, **wrong: Any
) -> Callable[..., list[tuple[float, Tensor]]]:
    """A beam search without a cache that does something differently, on the way or with what it returns."""

    def beam_search(model: ToyModel, tokens: Tensor, n_beams: int, n_new: int, **options: Any) -> Any:
        found = search(model, tokens, n_beams, n_new, **options, **wrong)
        return [(total, torch.tensor(row)) for total, row in returned(found, tokens.shape[1])]

    return beam_search


def by_length(found: Found, n_prompt: int) -> Found:
    """Log probabilities divided by the number of new tokens, best first."""
    return sorted(((total / max(len(row) - n_prompt, 1), row) for total, row in found), key=lambda beam: -beam[0])


@known_mistakes(
    {
        "the log probabilities of earlier steps are forgotten: add them up.": searching(forgets=True),
        "probabilities are added up; add their logarithms.": searching(adds="probabilities"),
        "logits are added up; take the log-softmax first.": searching(adds="logits"),
        "every beam keeps its own best extension; choose among the extensions of all beams together.": searching(
            per_beam=True
        ),
        "only the likeliest is kept on the way, as in greedy search.": searching(width=1),
        "a finished beam is extended; it should stay as it is.": searching(extends_finished=True),
        "finished beams are dropped; they stay candidates.": searching(drops_finished=True),
        "finished beams are kept apart, beside n_beams others; they take part in the choice.": searching(apart=True),
        "an eos in the prompt finishes the beam; only what it produces counts.": searching(prompt_counts=True),
        "nothing is banned: `no_repeat_ngram` is ignored.": searching(no_bans=True),
        "another beam's n-grams are banned too; each beam has its own.": searching(shared_bans=True),
        "only n-grams after the prompt are banned; those of the prompt count too.": searching(prompt_free=True),
        "what is not banned is scaled to sum to 1 again; leave the log p as the model gave them.": (
            searching(renormalises=True)
        ),
        "the worst stands first.": searching(lambda found, n_prompt: found[::-1]),
        "only the new tokens are returned; put the prompt in front.": searching(
            lambda found, n_prompt: [(total, row[n_prompt:]) for total, row in found]
        ),
        "probabilities are returned; return their logarithms.": searching(
            lambda found, n_prompt: [(math.exp(total), row) for total, row in found]
        ),
        "the log probability is divided by the number of new tokens.": searching(by_length),
        "only the best beam is returned.": searching(lambda found, n_prompt: found[:1]),
    }
)
def check_beam_search(fn: Callable[..., Any]) -> None:
    """A toy model with a vocabulary of 5: first the search through everything, then the definition, step by step."""
    start = [3, 0, 4]
    everything = [Search(start, 125, 3), Search(start, 200, 3, {"eos": 1})]
    cases = [
        *(Search(start, n_beams, 4, options) for n_beams in (1, 2, 4) for options in ({}, {"eos": 2})),
        Search([1, 3, 1, 0], 3, 5, {"eos": 1}),
        Search([0, 2], 3, 4, {"eos": 0}),
        Search(start, 3, 20),  # n_ctx is 9
        Search(start, 3, 0),
        Search(start, 25, 2, scale=150.0),  # many a token is less likely than the smallest number in float32
        Search([2, 0, 2], 4, 6, {"no_repeat_ngram": 2}),
        Search([2, 3, 2, 3, 0, 2, 3], 3, 2, {"no_repeat_ngram": 2}),
        Search([4, 1, 4], 3, 6, {"no_repeat_ngram": 3, "eos": 2}),
        Search(start, 3, 4, {"no_repeat_ngram": 1}),  # after two tokens there is none left
    ]
    n_calls = [_check_beams(fn, case) for case in [*everything, *cases]][len(everything) :]
    for case, n in zip(cases, n_calls, strict=True):
        _check_beams_with_cache(fn, case, n)
    for n_beams in (0, -2):
        try:
            Search(start, n_beams, 2).ask(fn, ToyModel(TINY, "beam_search"))
        except ValueError:
            continue
        raise CheckFailed(f"beam_search: n_beams = {n_beams} should raise ValueError.\n  Next: test it at the start.")
    prompt = torch.tensor([start])
    two = prompt.repeat(2, 1)
    must_raise("beam_search", ValueError, "two rows of tokens", partial(fn, ToyModel(TINY, "beam_search"), two, 3, 2))
    model, cache = ToyModel(TINY, "beam_search", scale=2.0), make_cache(fn, TINY, batch=1)
    with torch.no_grad():
        model(prompt[:, :2], cache)
    actual = fn(model, prompt, 3, 2, cache=cache)
    judge_beams("beam_search with a cache that holds 2 positions", actual, search(model, prompt, 3, 2))
    refuses_used_cache("beam_search", TINY, prompt, lambda *given: fn(*given[:2], 2, 2, cache=given[2]), fn)


@dataclass(frozen=True)
class Search:
    """A beam search that is asked for, and what it finds."""

    tokens: list[int]
    n_beams: int
    n_new: int
    options: dict[str, int] = field(default_factory=dict)
    scale: float = 2.0  # of the logits

    def __str__(self) -> str:
        settings = {"n_beams": self.n_beams, "n_new": self.n_new, **self.options}
        return "beam_search with " + ", ".join(f"{name} = {value}" for name, value in settings.items())

    def ask(self, fn: Callable[..., Any], model: ToyModel, **cache: Any) -> Any:
        """The learner's answer."""
        return fn(model, torch.tensor([self.tokens]), self.n_beams, self.n_new, **self.options, **cache)

    @cached_property
    def expected(self) -> Found:
        """All texts there are, where there is room for them; otherwise the definition."""
        model, prompt = ToyModel(TINY, scale=self.scale), torch.tensor([self.tokens])
        if self.n_beams > 100:
            return exhaustive(model, prompt, self.n_new, self.options.get("eos"))
        return search(model, prompt, self.n_beams, self.n_new, **self.options)


def _check_beams(fn: Callable[..., Any], case: Search) -> int:
    """Without a cache: how often the model was called."""
    model = ToyModel(TINY, "beam_search", scale=case.scale)
    model.train()
    judge_beams(f"{case}, prompt {case.tokens}, n_ctx = {TINY.n_ctx}", case.ask(fn, model), case.expected)
    if model.recorded:
        raise CheckFailed(
            "beam_search: gradients are recorded, which fills the memory step by step.\n"
            "  Next: run the search under torch.no_grad()."
        )
    return len(model.widths)


def _check_beams_with_cache(fn: Callable[..., Any], case: Search, n_calls: int) -> None:
    """The same beams; the model reads each position once."""
    model, cache = ToyModel(TINY, "beam_search", scale=case.scale), make_cache(fn, TINY, batch=1)
    name = f"{case} and a key-value cache"
    with during("with a key-value cache"):
        actual = case.ask(fn, model, cache=cache)
    if case.n_new:
        judge_widths(name, model.widths, [len(case.tokens), *[1] * (n_calls - 1)], cache)
    judge_beams(f"{name} (without one it is right)", actual, case.expected)
