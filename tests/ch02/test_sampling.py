"""Drawing text: mistakes that the checks do not know, and right answers in another style."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import solutions.ch02_transformer as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch02.sampling import check_sample, continued, counts, draw
from tests.ch02 import other_transformer as other

INF = torch.inf
SECRETS = ("masked_fill(", "scatter_add", "topk(", "multinomial(")
ONLY_ON_GPU = "device="

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the last
    "logits.topk(min(k, logits.shape[-1]), dim=-1) -> logits.topk(min(k, logits.shape[-1]))",
    "logits.sort(dim=-1, descending=True) -> logits.sort(descending=True)",
    "p < 1 -> p != 1",  # above 1 it has been refused
    "torch.zeros_like(dropped) -> dropped",  # all of it is overwritten
    "finished | (new == eos) -> new == eos",  # what is finished goes on with eos
}


def positive(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError("not positive")
    return temperature


def above(threshold: Callable[[Any, int], Any], fill: float = -INF) -> Callable[[Any, int], Any]:
    """A keep_top_k that keeps what is not below `threshold(logits, k)`."""

    def keep(logits: Any, k: int) -> Any:
        if k < 1:
            raise ValueError("k")
        return logits.masked_fill(logits < threshold(logits, k), fill)

    return keep


def kth(logits: Any, k: int) -> Any:
    return logits.topk(min(k, logits.shape[-1])).values[:, -1:]


def with_another_p(change: Callable[[float], float]) -> Callable[..., Any]:
    """A keep_top_p that goes by another number than `p`."""

    def keep(logits: Any, p: float, min_tokens_to_keep: int = 1) -> Any:
        return ref.keep_top_p(logits, change(p) if 0 < p <= 1 else p, min_tokens_to_keep)

    return keep


def inverse(logits: Any, generator: Any, rows: int | None) -> Any:
    """Draw by the inverse of the distribution function, with one random number for so many rows, or for all."""
    uniform = torch.rand(-(-len(logits) // rows) if rows else 1, 1, generator=generator)
    uniform = uniform.repeat_interleave(rows, 0)[: len(logits)] if rows else uniform
    return (logits.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=4)


@torch.no_grad()
def endless(model: Any, tokens: Any, n_new: int, pick: Any, eos: int | None = None, cache: Any = None) -> Any:
    """Goes on beyond n_ctx."""
    for _ in range(n_new):
        tokens = torch.cat([tokens, pick(model(tokens)[:, -1])[:, None]], dim=1)
    return tokens


def in_evaluation_mode(model: Any, tokens: Any, n_new: int, pick: Any, eos: int | None = None) -> Any:
    model.eval()
    return ref.generate(model, tokens, n_new, pick, eos)


def with_cache(unread: Callable[[Any, Any], Any], hands_on: bool = True) -> Callable[..., Any]:
    """A generate that is right without a cache, and with one gives `unread(tokens, cache)` to the model."""

    def generate(model: Any, tokens: Any, n_new: int, pick: Any, eos: int | None = None, cache: Any = None) -> Any:
        if cache is None:
            return ref.generate(model, tokens, n_new, pick, eos)
        with torch.no_grad():
            for _ in range(n_new):
                logits = model(unread(tokens, cache), cache) if hands_on else model(tokens)
                tokens = torch.cat([tokens, pick(logits[:, -1])[:, None]], 1)
        return tokens

    return generate


def by_exponentials(logits: torch.Tensor, p: float, min_tokens_to_keep: int = 1) -> torch.Tensor:
    """Overflows for logits of 89 and more, and loses those below -104."""
    ordered, order = logits.sort(-1, descending=True)
    chances = ordered.exp() / ordered.exp().sum(-1, keepdim=True)
    dropped = chances.cumsum(-1) - chances >= p
    dropped[:, :min_tokens_to_keep] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "greedy": [
        ("values are wrong", lambda logits: logits.sort(-1).indices[:, -2]),
        ("first at [batch=1]", lambda logits: logits.relu().argmax(-1)),
        ("first at [batch=0]", lambda logits: logits.sort(-1, descending=True).indices.argmin(-1)),
        ("on inputs that require a gradient", lambda logits: torch.from_numpy(logits.numpy().argmax(-1))),
    ],
    "apply_temperature": [
        ("temperature 0.0 should raise ValueError", lambda logits, t: logits / t),
        ("temperature -0.5 should raise ValueError", lambda logits, t: logits / (t if t else positive(t))),
        ("Every value is 0.6325 times", lambda logits, t: logits / positive(t) ** 0.5),
        ("values are wrong", lambda logits, t: (logits - logits.mean(-1, True)) / positive(t)),
        ("it changed `logits` in place", lambda logits, t: logits.div_(positive(t))),
    ],
    "apply_frequency_penalty": [
        ("values are wrong", lambda logits, tokens, p: logits - p * counts(logits, tokens) ** 2),
        ("values are wrong", lambda logits, tokens, p: logits - p * counts(logits, tokens[:, 1:])),
        ("values are wrong", lambda logits, tokens, p: logits * (1 - p * counts(logits, tokens))),
        ("it changed `logits` in place", lambda logits, tokens, p: logits.sub_(p * counts(logits, tokens))),
    ],
    "keep_top_k": [
        ("k = 0 should raise ValueError", lambda logits, k: ref.keep_top_k(logits, max(k, 1))),
        ("expected -inf", above(lambda logits, k: logits.mean(-1, True))),
        ("expected -inf, got -1e+04", above(kth, fill=-1e4)),
        ("values are wrong", lambda logits, k: ref.keep_top_k(logits, k).log_softmax(-1)),
        (
            "k = 20 and a vocabulary of 13: selected index k out of range",
            above(lambda logits, k: logits.topk(k).values[:, -1:]),
        ),
    ],
    "keep_top_p": [
        (
            "p = 0.0 should raise ValueError",
            lambda logits, p, min_tokens_to_keep=1: ref.keep_top_p(logits, min(max(p, 0.1), 1.0), min_tokens_to_keep),
        ),
        ("values are wrong", with_another_p(lambda p: p / 2)),
        ("values are wrong", by_exponentials),
        ("values are wrong", with_another_p(lambda p: p**0.5)),
        (
            "with p = 0.3 and min_tokens_to_keep = 4",
            lambda logits, p, min_tokens_to_keep=1: ref.keep_top_p(logits, p, max(min_tokens_to_keep - 1, 1)),
        ),
    ],
    "sample": [
        (
            "it drew from torch's global",
            lambda logits, generator: torch.distributions.Categorical(logits=logits).sample(),
        ),
        ("whose logit is -inf", lambda logits, generator: draw(logits.clamp(min=-3).softmax(-1), generator)),
        (
            "it left `generator` as it was",
            lambda logits, generator: ref.sample(logits, torch.Generator().manual_seed(3)),
        ),
        ("two seeds gave the same", lambda logits, generator: ref.sample(logits, generator.manual_seed(3))),
        ("should be drawn with probability", lambda logits, generator: ref.sample(logits / 2, generator)),
        ("should be drawn with probability", lambda logits, generator: inverse(logits, generator, rows=None)),
        ("rows depend on each other", lambda logits, generator: inverse(logits, generator, rows=2)),
        (
            "your code raised RuntimeError",
            lambda logits, generator: draw(logits.exp() / logits.exp().sum(-1, True), generator),
        ),
        (
            "should be drawn",
            lambda logits, generator: draw((logits - logits.amax(-1, True)).exp() ** 2, generator),
        ),
    ],
    "generate": [
        ("gradients are recorded", inspect.unwrap(ref.generate)),
        (
            "with a cache that holds 3 positions, a prompt of 3 should raise ValueError",
            lambda model, tokens, n_new, pick, eos=None, cache=None: ref.generate(
                model, tokens, n_new, pick, eos, cache if cache and cache.length < tokens.shape[1] else None
            ),
        ),
        ("stop when n_ctx is reached", endless),
        (
            "generate with eos = 0",
            lambda model, tokens, n_new, pick, eos=None: ref.generate(model, tokens, n_new, pick, eos or None),
        ),
        (
            "All of the wrong values are at batch=1",
            lambda model, tokens, n_new, pick, eos=None: ref.generate(
                model, tokens, n_new, lambda logits: pick(logits)[:1].expand(len(logits)), eos
            ),
        ),
        ("it left `model` in evaluation mode", in_evaluation_mode),
        ("expected 6, got 11", continued(fill=11)),
        ("what `pick` gets in step 0", continued(position=1)),
        ("from position `cache.length` on", with_cache(lambda tokens, cache: tokens)),
        ("from position `cache.length` on", with_cache(lambda tokens, cache: tokens[:, -1:])),
        ("got 3, 2, 1, 1", with_cache(lambda tokens, cache: tokens[:, max(cache.length - 1, 0) :])),
        (
            "that holds 2 positions",
            with_cache(lambda tokens, cache: tokens if cache.length < 3 else tokens[:, -1:]),
        ),
        ("the model was not given the cache", with_cache(lambda tokens, cache: tokens, hands_on=False)),
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}


def test_a_mistake_is_recognised_however_it_draws() -> None:
    """By the Gumbel-max trick, with random numbers unlike those of the known mistake."""

    def twice(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return other.sample(logits.softmax(-1), generator)

    with pytest.raises(CheckFailed, match="This is what you get if the softmax is taken twice"):
        run_check(check_sample, twice)
