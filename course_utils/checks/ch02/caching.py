"""A key-value cache from both sides: is it used as it should, and does a model with it compute what it did without?"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import compare
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.cache import make_cache
from course_utils.checks.standins.known_logits import ToyModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig


def judge_widths(name: str, given: Sequence[int], wanted: Sequence[int], cache: Any) -> None:
    """The model was handed the cache, and only what the cache did not hold yet."""
    if not cache.appended:
        raise CheckFailed(
            f"{name}: the model was not given the cache.\n  Next: pass it on, as in `model(unread, cache)`."
        )
    if list(given) != list(wanted):
        raise CheckFailed(
            f"{name}: expected the model to be given {', '.join(map(str, wanted))} new positions in its "
            f"{len(wanted)} calls, got {', '.join(map(str, given))}.\n"
            "  Next: give it the tokens that the cache does not hold yet: those from position `cache.length` on."
        )


def greedily(logits: Tensor) -> Tensor:
    """The most likely token of each row."""
    return logits.argmax(-1)


def judge_cached_generation(fn: Callable[..., Any], cfg: TransformerConfig, prompt: Tensor) -> None:
    """`generate` from an empty cache, and from one that holds the beginning of the prompt: the tokens are the same."""
    model = ToyModel(cfg)
    expected = prompt
    for _ in range(4):
        expected = torch.cat([expected, model.logits(expected)[:, -1].argmax(-1)[:, None]], dim=1)
    for n_read in (0, 2):
        name = "generate with a key-value cache" + (f" that holds {n_read} positions" if n_read else "")
        model, cache = ToyModel(cfg), make_cache(fn, cfg, batch=len(prompt))
        with torch.no_grad():
            if n_read:
                model(prompt[:, :n_read], cache)
        cache.appended.clear()
        model.widths.clear()
        with during("with a key-value cache"):
            actual = fn(model, prompt, 4, greedily, cache=cache)
        judge_widths(name, model.widths, [prompt.shape[1] - n_read, 1, 1, 1], cache)
        compare(name, actual, expected, "batch pos")
    refuses_used_cache("generate", cfg, prompt, lambda *given: fn(*given[:2], 2, greedily, cache=given[2]), fn)


def refuses_used_cache(name: str, cfg: TransformerConfig, prompt: Tensor, run: Callable[..., Any], owner: Any) -> None:
    """`run(model, prompt, cache)` must raise ValueError if the cache holds all of the prompt already, or more."""
    for n_read in (prompt.shape[1], prompt.shape[1] + 1):
        model, cache = ToyModel(cfg), make_cache(owner, cfg, batch=len(prompt))
        with torch.no_grad():
            model(torch.cat([prompt, prompt], dim=1)[:, :n_read], cache)
        call = f"with a cache that holds {n_read} positions, a prompt of {prompt.shape[1]}"
        must_raise(name, ValueError, call, partial(run, model, prompt, cache))


def attend(weights: Tensor, resid: Tensor, layer: int, cache: Any) -> Tensor:
    """One layer of plain attention, [q k v] with weights [3 head d_model d_head], whose output joins the stream."""
    q, k, v = torch.einsum("bpm,thmd->tbphd", resid, weights)
    if cache is not None:
        k, v = cache.append(layer, k, v)
    n_query, n_key = q.shape[1], k.shape[1]
    past = torch.arange(n_key) <= torch.arange(n_key - n_query, n_key)[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(~past, -torch.inf)
    return resid + torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def judge_every_split(cls: Any, cfg: TransformerConfig) -> None:
    """A small model reads a text in two parts, wherever one cuts it: what comes out is what it gave in one part."""
    batch, n_pos, d_model = 2, 5, cfg.n_heads * cfg.d_head
    shape = (3, cfg.n_heads, d_model, cfg.d_head)
    weights = [noise(*shape, seed=layer, scale=0.2).requires_grad_() for layer in range(cfg.n_layers)]
    resid = noise(batch, n_pos, d_model, seed=20)

    def run(part: Tensor, cache: Any = None) -> Tensor:
        for layer, layer_weights in enumerate(weights):
            part = attend(layer_weights, part, layer, cache)
        return part

    expected = run(resid)
    for cut in range(1, n_pos):
        cache = cls(cfg, batch)
        with during(f"in a model that reads {cut} positions, then {n_pos - cut}"):
            actual = torch.cat([run(resid[:, :cut], cache), run(resid[:, cut:], cache)], dim=1)
        name = f"KVCache in a small model that reads {cut} positions, then {n_pos - cut}"
        compare(name, actual, expected, "batch pos d_model", rtol=1e-5, atol=1e-5)
