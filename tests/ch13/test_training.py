"""What the checks of training in chapter 13 cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch13_grokking as ref
from course_utils.checks.ch13.training import dataset, drawn, losses, small_loss
from tests.ch13 import other_grokking as other

SECRETS = ("kthvalue(", "argsort(", "double().log_softmax", "einsum(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 < n_train < p ** 2 -> 0 != n_train < p ** 2",  # no share is negative
    "order.argsort() -> order",  # the inverse of a random order is as random
    "0 -> -1",  # the only layer
    "zip(scores, rows, strict=True) -> zip(scores, rows)",
    "zip(values, rows, strict=True) -> zip(values, rows)",
    "True -> False",  # strict=
}


def never_doubles(p: int, n: int, generator: torch.Generator, together: bool) -> list[tuple[int, int]]:
    """No pair (a, a) is for training as long as there are others."""
    return sorted(drawn(p, p * p, generator, together), key=lambda pair: pair[0] == pair[1])[: n + (together and n % 2)]


def doubles_first(p: int, n: int, generator: torch.Generator, together: bool) -> list[tuple[int, int]]:
    """With `together`, every pair (a, a) is for training, and then mirror images until there are enough."""
    pairs = drawn(p, p * p, generator, together)
    if not together:
        return pairs[:n]
    doubles = [pair for pair in pairs if pair[0] == pair[1]][:n]
    rest = [pair for pair in pairs if pair[0] != pair[1]]
    missing = n - len(doubles)
    return doubles + rest[: missing + missing % 2]


def from_global(p: int, share: float, generator: torch.Generator, together: bool = False) -> Any:
    seed = int(torch.randint(99, ()))
    torch.rand(1, generator=generator)
    return ref.modular_addition_dataset(p, share, torch.Generator().manual_seed(seed), together)


def from_a_copy(p: int, share: float, generator: torch.Generator, together: bool = False) -> Any:
    copied = torch.Generator()
    copied.set_state(generator.get_state())
    return ref.modular_addition_dataset(p, share, copied, together)


def every_pair(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """For all pairs there are, whatever was asked."""
    p = len(model.embed.W_E) - 1
    everything = torch.cartesian_prod(torch.arange(p), torch.arange(p), torch.tensor([p]))
    return other.tabulated_logits(model, everything)[: len(tokens)]


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "modular_addition_dataset": [
        ("is for training in 0% of", dataset(draw=never_doubles)),
        ("is for training in 100% of", dataset(draw=doubles_first)),
        ("it drew from torch's global", from_global),
        ("it left `generator` as it was", from_a_copy),
        ("expected tokens, answers and is_train", lambda *args: ref.modular_addition_dataset(*args)[:2]),
        ("expected dtype bool", lambda *args: (*ref.modular_addition_dataset(*args)[:2], dataset()(*args)[2].long())),
    ],
    "answer_loss": [
        ("wrong shape", lambda logits, answers: other.answer_loss(logits, answers)[None]),
        ("no gradient gets through", lambda logits, answers: other.answer_loss(logits, answers).detach()),
        ("expected a Tensor", lambda logits, answers: float(other.answer_loss(logits, answers))),
        ("value", losses(small_loss, over=max)),
    ],
    "tabulated_logits": [
        ("values are wrong", lambda model, tokens: other.tabulated_logits(model, tokens).log_softmax(-1)),
        ("no gradient gets through", lambda model, tokens: other.tabulated_logits(model, tokens).detach()),
        ("values are wrong", every_pair),
    ],
}


ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("together", [False, True])
def test_no_pair_is_on_both_sides(together: bool) -> None:
    tokens, answers, is_train = ref.modular_addition_dataset(11, 0.4, torch.Generator().manual_seed(0), together)
    sides = [set(map(tuple, tokens[mask, :2].tolist())) for mask in (is_train, ~is_train)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 121
    assert torch.equal(answers, tokens[:, :2].sum(1) % 11)
    mirrored = {(b, a) for a, b in sides[0]} & sides[1]
    assert bool(mirrored) is not together


def test_tables_give_what_the_model_gives() -> None:
    import solutions.ch02_transformer as ch02
    from solutions.recipes.modular_addition import CFG

    model = ch02.Transformer(CFG)
    ch02.init_weights(model, 0.3, torch.Generator().manual_seed(0))
    tokens = ref.modular_addition_dataset(59, 0.4, torch.Generator().manual_seed(0))[0][::37]
    with torch.no_grad():
        torch.testing.assert_close(ref.tabulated_logits(model, tokens), model(tokens)[:, -1, :-1], rtol=1e-4, atol=1e-3)


def test_training_memorises_first() -> None:
    """Ten numbers, few steps: the training loss falls, the other rises, and what `watch` says is kept."""
    import solutions.ch02_transformer as ch02
    from course_utils.config import TransformerConfig

    cfg = TransformerConfig(11, 3, 1, 2, 16, 8, d_mlp=32, act="relu", normalization="none")
    model = ch02.Transformer(cfg)
    ch02.init_weights(model, 0.25, torch.Generator().manual_seed(0))
    data = ref.modular_addition_dataset(10, 0.5, torch.Generator().manual_seed(0))
    history = ref.fit_modular(model, *data, steps=200, every=100, watch=lambda step: {"twice": 2.0 * step})
    assert [entry["step"] for entry in history] == [0, 100, 200]
    assert history[-1]["train"] < history[0]["train"] / 2
    assert history[-1]["held_out"] > 2 * history[0]["held_out"]
    assert history[-1]["twice"] == 400
