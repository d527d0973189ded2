"""What the checks of breaking the model in chapter 12 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch12_brackets as ref
from course_utils.checks.ch12.breaking import broken, climbing, sloping
from course_utils.checks.ch12.small import texts
from course_utils.data.brackets import CLOSE, END, PAD, encode
from tests.ch12 import other_brackets as other
from tests.ch12 import third_style as third
from tests.ch12.test_reading import small

SECRETS = ("multinomial(", "autograd.grad(scores", "torch.where(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "tokens == END -> tokens >= END",  # END comes before PAD, and argmax takes the first
    "tokens == OPEN -> tokens <= OPEN",  # no token is smaller
    "OPEN + CLOSE -> CLOSE",  # OPEN is 0
    "best == OPEN -> best <= OPEN",
    "best == CLOSE -> best <= CLOSE",  # OPEN counts already
    "tokens.clone() -> tokens",  # nothing is written into it
    # It may come with a graph, and the cache may hold more than is needed.
    "((tokens == OPEN) * to_close - (tokens == CLOSE) * to_close).detach()"
    " -> (tokens == OPEN) * to_close - (tokens == CLOSE) * to_close",
    "cache['embed'].detach() -> cache['embed']",
    "run_with_cache(model, tokens, names='hook_embed') -> run_with_cache(model, tokens)",
}


def backward(model: Any, tokens: Any) -> Any:
    """The right numbers, by a backward pass that goes through the weights as well."""
    effects = other.flip_effects(model, tokens)
    ref.unbalanced_scores(model, tokens).sum().backward()
    return effects


def ends_moved(model: Any, tokens: Any, generator: Any, steps: int) -> Any:
    out = other.hill_climb(model, tokens, generator, steps)
    return out.masked_fill(out == END, PAD) if steps else out


@torch.no_grad()
def with_replacement(model: Any, tokens: Any, generator: Any, steps: int) -> Any:
    """The same bracket may be drawn twice, and is then as before."""
    best = tokens.clone()
    for _ in range(steps):
        chosen = torch.multinomial((best <= CLOSE).float(), 2, replacement=True, generator=generator)
        tried = best ^ torch.nn.functional.one_hot(chosen, best.shape[1]).sum(1) % 2
        helps = ref.unbalanced_scores(model, tried) < ref.unbalanced_scores(model, best)
        best = torch.where((helps & ~ref.is_balanced_batch(tried))[:, None], tried, best)
    return best


@torch.no_grad()
def neighbours(model: Any, tokens: Any, generator: Any, steps: int) -> Any:
    """A bracket and the next one are turned."""
    best = tokens.clone()
    for _ in range(steps):
        first = torch.multinomial((best[:, 1:] <= CLOSE).float()[:, 1:], 1, generator=generator) + 1
        tried = best.scatter(1, first, 1 - best.gather(1, first))
        tried = tried.scatter(1, first + 1, 1 - tried.gather(1, first + 1))
        helps = ref.unbalanced_scores(model, tried) < ref.unbalanced_scores(model, best)
        best = torch.where((helps & ~ref.is_balanced_batch(tried))[:, None], tried, best)
    return best


def one_step_only(model: Any, tokens: Any, generator: Any, steps: int) -> Any:
    return other.hill_climb(model, tokens, generator, min(steps, 1))


def from_global(model: Any, tokens: Any, generator: Any, steps: int) -> Any:
    return other.hill_climb(model, tokens, None, steps)


def in_place(model: Any, tokens: Any, generator: Any, steps: int) -> Any:
    tokens.copy_(other.hill_climb(model, tokens, generator, steps))
    return tokens


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "flip_effects": [
        ("it changed `model.embed.W_E.grad`", backward),
        ("values are wrong", lambda model, tokens: other.flip_effects(model, tokens).abs()),
        ("wrong shape", lambda model, tokens: other.flip_effects(model, tokens)[:, 1:-1]),
        (
            "values are wrong",
            sloping(lambda W_E, token: 2 * (W_E[1 - token] - W_E[token]) if token < 2 else 0 * W_E[0]),
        ),
    ],
    "hill_climb": [
        ("START, END or PAD changed", ends_moved),
        (
            "came where a bracket stood",
            lambda model, tokens, generator, steps: tokens.masked_fill(tokens == CLOSE, -1) if steps else tokens,
        ),
        ("it drew from torch's global", from_global),
        ("it changed", in_place),
        ("changed in one step", with_replacement),
        ("none became", neighbours),
        ("after 30 steps", one_step_only),
        ("none became", climbing(lambda new, old, first, text: new < old - 1.2 and broken(text))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), getattr(third, name)] for name in SURPRISES}


def test_first_order_is_the_limit_of_small_moves() -> None:
    """A model in which the two brackets have nearly the same embedding: a flip is a small move."""
    model, tokens = small().double(), texts()
    with torch.no_grad():
        W_E = model.embed.W_E
        W_E[CLOSE] = W_E[0] + 1e-5 * torch.arange(8.0).double()
    effects = ref.flip_effects(model, tokens)
    turned = tokens.clone()
    turned[:, 2] = 1 - tokens[:, 2]
    with torch.no_grad():
        true = ref.unbalanced_scores(model, turned) - ref.unbalanced_scores(model, tokens)
    torch.testing.assert_close(effects[:, 2], true, rtol=1e-2, atol=1e-7)


def test_climbing_ends_lower_and_never_balanced() -> None:
    model = small()
    tokens = encode(["())(()", "((()", "))))))))"] * 4, 11)
    found = ref.hill_climb(model, tokens, torch.Generator().manual_seed(0), 30)
    with torch.no_grad():
        assert (ref.unbalanced_scores(model, found) <= ref.unbalanced_scores(model, tokens)).all()
    assert not ref.is_balanced_batch(found).any()
