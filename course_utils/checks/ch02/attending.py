"""Attention in a few lines of einsum, with its hook points, a key-value cache, and switches for what goes wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare
from course_utils.checks.modules import noise, watch

INF = torch.inf

Remember = Callable[[Any, Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]]


def later(scores: Tensor, shift: int = 1) -> Tensor:
    """Which keys lie after which query, where the last query stands at the last key's position."""
    n_query, n_key = scores.shape[-2:]
    return torch.ones(n_query, n_key, dtype=torch.bool, device=scores.device).triu(n_key - n_query + shift)


def from_first_key(scores: Tensor) -> Tensor:
    """Which keys lie after which query, if the first query stood at the first key's position."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def remember(module: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values of all positions so far."""
    return (q, *cache.append(module.layer, k, v)) if cache is not None else (q, k, v)


def attend(module: Any, resid: Tensor, cache: Any = None, *, remember: Remember = remember, **wrong: Any) -> Tensor:
    """What attention adds to the stream; `remember` turns vectors, where that is done, and fills the cache."""
    q, k, v = (_view(module, resid, letter, **wrong) for letter in "QKV")
    q, k, v = remember(module, q, k, v, cache)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / wrong.get("divisor", q.shape[-1] ** 0.5)
    hidden = wrong.get("hidden", later)(scores)
    if wrong.get("mask_after_softmax"):
        pattern = scores.softmax(-1) * ~hidden
    elif wrong.get("mask_after_hook"):
        pattern = module.hook_attn_scores(scores).masked_fill(hidden, -INF).softmax(-1)
    else:
        pattern = module.hook_attn_scores(scores.masked_fill(hidden, -INF)).softmax(wrong.get("axis", -1))
    z = module.hook_z(torch.einsum("bhqk,bkhd->bqhd", module.hook_pattern(pattern), v))
    result = torch.einsum("bphd,hdm->bphm", z, module.W_O)
    if module.hook_result.is_watched:
        result = module.hook_result(result)
    n_biases = 0 if "b_O" in wrong.get("without", ()) else wrong.get("n_biases", 1)
    return result.sum(2) + n_biases * getattr(module, "b_O", 0) + (resid if wrong.get("adds_resid") else 0)


def _view(module: Any, resid: Tensor, letter: str, **wrong: Any) -> Tensor:
    """Every head's queries, keys or values."""
    W = getattr(module, f"W_{wrong.get('reads', {}).get(letter, letter)}")
    bias, hook = f"b_{letter}", getattr(module, f"hook_{letter.lower()}")
    b = 0 if bias in wrong.get("without", ()) else getattr(module, bias, 0)
    vectors = torch.einsum("bpm,hmd->bphd", resid, W)
    if bias in wrong.get("after_hook", ()):
        return hook(vectors) + b
    return hook(wrong.get("before_hook", {}).get(letter.lower(), lambda vectors: vectors)(vectors + b))


def judge_large_scores(name: str, module: nn.Module, oracle: Callable[[Tensor], dict[str, Tensor]]) -> None:
    """Scores beyond 100 and below -100, whose exponentials are inf and 0 in float32; fused, and step by step."""
    resid = noise(1, 5, module.get_parameter("W_O").shape[-1], seed=27, scale=8.0)
    expected = oracle(resid)["output"]
    with torch.no_grad():
        watched, _ = watch(name, module, (resid,), ["hook_attn_scores", "hook_pattern"])
        for actual in (module(resid), watched):
            compare(f"{name} with large scores", actual, expected, "batch pos d_model", rtol=1e-3, atol=1e-3)
