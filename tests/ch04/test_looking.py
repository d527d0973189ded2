"""What the checks of attention by kind, induction and predictions cannot know: see tests/test_checks.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch04_induction as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch04.looking import (
    check_repeated_tokens,
    looking_back,
    mean,
    rows,
    scored,
    to_previous,
)
from course_utils.hooks import hooks, reset_hooks, run_with_cache, run_with_hooks
from tests.ch04 import other_induction as other

SECRETS = ("einsum(", "diagonal(", "randint(", ".gather(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-2 -> 2",  # of four axes
    "1 -> 0",  # of one axis, the last is the first
    "logits.topk(k).indices.tolist() -> logits.topk(k).indices",
}


def score_surprises(pairs: Callable[[int], Any], *more: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Scores of the right pairs, but transposed, with heads in reverse, medians, or every second query."""
    return [
        ("The axes are all there, in another order: (head, layer)", scored(pairs, lambda found, n: mean(found).T)),
        ("values are wrong", scored(pairs, lambda found, n: mean(found).flip(1))),
        ("values are wrong", scored(pairs, lambda found, n: found.median(-1).values.mean(1))),
        ("values are wrong", scored(pairs, lambda found, n: mean(found[..., ::2]))),
        ("wrong shape", scored(pairs, lambda found, n: mean(found).squeeze())),
        ("in float64", scored(pairs, lambda found, n: mean(found.float()).to(found.dtype))),
        ("numpy", scored(pairs, lambda found, n: torch.from_numpy(found.numpy().mean((1, 3))))),
        *more,
    ]


def by_hook(model: Any, tokens: Any, n_half: int, **wrong: Any) -> Any:
    """induction_scores_by_hook with switches for what people get wrong."""
    kept: list[Any] = []

    def reduce(pattern: Any) -> Any:
        return mean(second_half(pattern)[None])[0]

    def second_half(pattern: Any) -> Any:
        return pattern.diagonal(offset=1 - n_half, dim1=-2, dim2=-1)[..., -n_half:]

    def look(pattern: Any, hook: Any) -> None:
        kept.append(wrong.get("keep", reduce)(pattern))

    points = [block.attn.hook_pattern for block in model.blocks]
    with torch.set_grad_enabled(bool(wrong.get("gradients"))):
        if wrong.get("by_hand"):
            handles = [point.add(look) for point in points]
            model(tokens)
            for handle in handles if wrong["by_hand"] == "cleans" else []:
                handle.remove()
            if wrong["by_hand"] == "resets":
                reset_hooks(model)
        elif wrong.get("per_layer"):
            for layer in range(len(points)):
                run_with_hooks(model, tokens, hooks={f"blocks.{layer}.attn.hook_pattern": look})
        else:
            with hooks(model, {f"blocks.*.attn.{wrong.get('place', 'hook_pattern')}": look}):
                model(tokens)
    finish = {"whole": reduce, "half": lambda half: mean(half[None])[0]}.get(wrong.get("later", ""), lambda row: row)
    return torch.stack([finish(row) for row in kept])


def hooking(**wrong: Any) -> Any:
    return lambda model, tokens, n_half: by_hook(model, tokens, n_half, **wrong)


def from_a_cache(model: Any, tokens: Any, n_half: int) -> Any:
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_pattern")
    model.holder = [cache]  # a cache that outlives the run, as one in a notebook does
    return ref.induction_scores(cache, n_half)


def repeating(draw: Callable[..., Any]) -> Any:
    """`draw(n_batch, n_half, d_vocab, generator)` gives the half; `bos` and the repetition are right."""

    def repeated_tokens(n_batch: int, n_half: int, d_vocab: int, generator: Any, bos: int) -> Any:
        half = draw(n_batch, n_half, d_vocab, generator)
        return torch.cat([torch.full((n_batch, 1), bos), half, half], 1)

    return repeated_tokens


def drawn_anew(n_batch: int, n_half: int, d_vocab: int, generator: Any, bos: int) -> Any:
    whole = torch.randint(d_vocab, (n_batch, 2 * n_half), generator=generator)
    return torch.cat([torch.full((n_batch, 1), bos), whole], 1)


def draw(b: int, n: int, v: int, g: Any) -> Any:
    return torch.randint(v, (b, n), generator=g)


def table(**wrong: Any) -> Any:
    return lambda logits, tokenizer, k: rows(logits, tokenizer, k, **wrong)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "previous_token_scores": score_surprises(to_previous),
    "induction_scores": score_surprises(
        looking_back(1), ("values are wrong", scored(looking_back(1), lambda found, n: found.amax(-1).mean(1)))
    ),
    "duplicate_token_scores": score_surprises(
        looking_back(), ("values are wrong", scored(looking_back(), lambda found, n: found.amax(-1).mean(1)))
    ),
    "induction_scores_by_hook": [
        ("gradients are recorded", hooking(gradients=True)),
        ("it ran the model 3 times", hooking(per_layer=True)),
        ("a hook is left behind at `blocks.0.attn.hook_pattern`", hooking(by_hand="leaves")),
        ("after an error half-way, a hook is left behind", hooking(by_hand="cleans")),
        ("hooks that others had attached", hooking(by_hand="resets")),
        ("values are wrong", hooking(place="hook_attn_scores")),
        ("3 of 3 patterns were still in memory", hooking(keep=lambda pattern: pattern, later="whole")),
        (
            "patterns were still in memory",  # of which it keeps views
            lambda model, tokens, n: by_hook(
                model, tokens, n, keep=lambda p: p.diagonal(1 - n, -2, -1)[..., -n:], later="half"
            ),
        ),
        ("patterns were still in memory", from_a_cache),
    ],
    "repeated_tokens": [
        ("the second half is not the first one again", drawn_anew),
        ("all rows are the same", repeating(lambda b, n, v, g: draw(1, n, v, g).expand(b, n))),
        ("it drew from torch's global random numbers", repeating(lambda b, n, v, g: torch.randint(v, (b, n)))),
        (
            "the second batch from one generator is the first again",
            repeating(lambda b, n, v, g: draw(b, n, v, g.manual_seed(g.initial_seed()))),
        ),
        (
            "it left `generator` as it was",
            repeating(lambda b, n, v, g: draw(b, n, v, torch.Generator().manual_seed(0))),
        ),
        ("the random tokens go from 1 to 6", repeating(lambda b, n, v, g: torch.randint(1, v, (b, n), generator=g))),
        ("the random tokens go from 0 to 5", repeating(lambda b, n, v, g: draw(b, n, v - 1, g))),
        ("the random tokens go from 0 to 7", repeating(lambda b, n, v, g: draw(b, n, v + 1, g))),
        (
            "not drawn independently",
            repeating(lambda b, n, v, g: torch.stack([torch.randperm(n, generator=g) for _ in range(b)]) % v),
        ),
        ("not drawn independently", repeating(lambda b, n, v, g: (torch.rand(b, n, generator=g) ** 1.5 * v).long())),
    ],
    "top_predictions": [
        ("the tokens: wrong answer", table(text=lambda tokenizer, token: tokenizer.decode([token]).strip())),
        ("the tokens", table(text=lambda tokenizer, token: token)),
        ("values are wrong", table(number=lambda logits, best: logits[best].round(decimals=1))),
        ("the probabilities", table(chance=lambda logits, best: logits.softmax(-1)[best] / 2)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_scores_by_hook_are_those_of_the_cache(module: Any, model: nn.Module, tokens: Any) -> None:
    _, cache = run_with_cache(model, tokens)
    expected = module.induction_scores(cache, 6)
    torch.testing.assert_close(module.induction_scores_by_hook(model, tokens, 6), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cause", "second"),
    [
        ("the second half is the first one backwards", lambda half: half.flip(1)),
        ("the second half comes from another row", lambda half: half.roll(-1, 0)),
        ("the tokens come only once", lambda half: half[:, :0]),
    ],
)
def test_the_cause_does_not_depend_on_the_tokens_that_were_drawn(cause: str, second: Any) -> None:
    def repeated_tokens(n_batch: int, n_half: int, d_vocab: int, generator: Any, bos: int) -> Any:
        half = (torch.rand(n_batch, n_half, generator=generator) * d_vocab).long()
        return torch.cat([torch.full((n_batch, 1), bos), half, second(half)], 1)

    with pytest.raises(CheckFailed, match=f"This is what you get if {cause}"):
        run_check(check_repeated_tokens, repeated_tokens)
