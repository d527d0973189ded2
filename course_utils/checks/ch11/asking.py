"""Checks of chapter 11, asking: vectors injected into a stream, and an oracle that reads them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch11.small import Fn, clamped, demand, logits_with, small_model
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.data.questions import D_VOCAB, PLACEHOLDER

AXES = "batch pos d_model"
PLACES = torch.tensor([[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()

Put = Callable[[Tensor, Tensor], Tensor]  # (what is there, the vector) -> what is there afterwards


def length(vector: Tensor) -> Tensor:
    return vector.square().sum().sqrt()


def unit(vector: Tensor, divisor: Tensor | None = None) -> Tensor:
    return vector / (length(vector) if divisor is None else divisor) if vector.any() else vector


def scaled(there: Tensor, vector: Tensor) -> Tensor:
    return there + length(there) * unit(vector)


def injecting(
    put: Put = scaled,
    where: Callable[[list[int], int], list[int]] = lambda places, n_pos: places,
    order: int = 1,
    whole: bool = False,
) -> Fn:
    """inject, place by place; with another step, what people write instead."""

    def inject(stream: Tensor, vectors: Tensor, places: Tensor) -> Tensor:
        rows = []
        for row in range(len(stream)):
            at = where(places[row].nonzero().flatten().tolist(), stream.shape[1])
            new = list(stream[row])
            for slot, pos in enumerate(at):
                vector = vectors[row, ::order][slot] if order > 0 else vectors[row].flip(0)[slot]
                new[pos] = put(stream[row] if whole else new[pos], vector)
            rows.append(torch.stack(new))
        return torch.stack(rows)

    return inject


MISSES: dict[str, Put] = {
    "the vectors are not scaled: each is added as it is, h + v.": lambda there, vector: there + vector,
    "each vector has length 1; scale it to the length of what is there.": lambda there, vector: there + unit(vector),
    "the vector replaces what is there; it is added.": lambda there, vector: length(there) * unit(vector),
    "the vector is added twice.": lambda there, vector: there + 2 * length(there) * unit(vector),
    "the vector is multiplied by |h|, and not divided by its own length.": lambda there, vector: (
        there + length(there) * vector
    ),
    "the two lengths have changed places: |v| h / |h| is what is there, and not what is added.": lambda there, vector: (
        there + length(vector) * unit(there)
    ),
}
ELSEWHERE: dict[str, Callable[[list[int], int], list[int]]] = {
    "the vectors stand one position too late.": lambda places, n_pos: [(pos + 1) % n_pos for pos in places],
    "the vectors go to the places where `places` is False: to the question.": lambda places, n_pos: [
        pos for pos in range(n_pos) if pos not in places
    ][: len(places)],
    "the vectors go to the first positions, whatever `places` says.": lambda places, n_pos: list(range(len(places))),
    "only the first vector of each row is added.": lambda places, n_pos: places[:1],
}


@known_mistakes(
    {sentence: injecting(put) for sentence, put in MISSES.items()},
    {sentence: injecting(where=where) for sentence, where in ELSEWHERE.items()},
    {
        "the slots are taken backwards; the first goes to the first place.": injecting(order=-1),
        "the length of what is there is detached: no gradient gets to it.": injecting(
            lambda there, vector: there + length(there).detach() * unit(vector)
        ),
        "the vector's own length is detached: the gradient pulls at its length, which has no effect.": injecting(
            lambda there, vector: there + length(there) * unit(vector, length(vector).detach())
        ),
        "a vector of zeros is divided by its own length, 0; nothing is added for it.": injecting(
            lambda there, vector: there + length(there) * vector / length(vector)
        ),
    },
)
def check_inject(fn: Fn) -> None:
    """Places that differ from row to row, a vector of zeros, one slot and three; every kind of input, gradients."""
    name = "inject"
    stream, vectors = noise(4, 6, 5, seed=1), 3 * noise(4, 2, 5, seed=2)
    vectors[2, 1] = 0
    compare(name, fn(stream, vectors, PLACES), injecting()(stream, vectors, PLACES), AXES)
    one = torch.arange(6).expand(4, 6) == torch.tensor([[5], [0], [3], [2]])
    compare(f"{name} with one slot", fn(stream, vectors[:, :1], one), injecting()(stream, vectors[:, :1], one), AXES)
    long, three = 1e3 * noise(2, 4, 3, seed=3), 1e-3 * noise(2, 3, 3, seed=4)
    at = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    compare(f"{name} of tiny vectors", fn(long, three, at), injecting()(long, three, at), AXES)
    follows_every_kind(name, fn, (stream, vectors, PLACES), AXES, graph=True)
    follows_input(name, lambda s, v: fn(s, v, PLACES.to(s.device)), (stream, vectors), AXES, gradient=True)
    _gradients(name, fn, 2 * noise(2, 3, 4, seed=5), 3 * noise(2, 1, 4, seed=6))


def _gradients(name: str, fn: Fn, stream: Tensor, vectors: Tensor) -> None:
    """Those of the loop, for the stream and for the vectors; and none is NaN where a vector is zero."""
    places = torch.tensor([[0, 1, 0], [0, 0, 1]]).bool()
    found = []
    for function in (fn, injecting()):
        leaves = stream.clone().requires_grad_(), vectors.clone().requires_grad_()
        found.append(torch.autograd.grad(function(*leaves, places).pow(3).sum(), leaves, allow_unused=True))
    for what, axes, actual, expected in zip(("stream", "vectors"), (AXES, "batch slot d_model"), *found, strict=True):
        actual = torch.zeros_like(expected) if actual is None else actual
        compare(f"{name}, the gradient for `{what}`", actual, expected, axes)
    nothing = torch.zeros_like(vectors).requires_grad_()
    (gradient,) = torch.autograd.grad(fn(stream, nothing, places).sum(), nothing)
    demand(
        bool(gradient.isfinite().all()),
        name,
        "gradient of zeros",
        "where a vector is zero, its gradient is NaN.",
        "never divide by zero, not even where the result is thrown away: choose the divisor with torch.where.",
    )


# ------------------------------------------------------------------------------------------------------- the whole run


def rows_of_tokens() -> Tensor:
    """Placeholders at different places, and other tokens."""
    tokens = torch.randint(PLACEHOLDER - 9, D_VOCAB, (4, 6), generator=torch.Generator().manual_seed(3))
    tokens[tokens == PLACEHOLDER] = 7
    return tokens.masked_fill(PLACES, PLACEHOLDER)


def running(inject: Fn = injecting(), layer: Callable[[int], int] = lambda layer: layer) -> Fn:  # noqa: B008
    """run_oracle by a forward hook of PyTorch."""

    def run_oracle(oracle: Any, tokens: Tensor, vectors: Tensor, layer_asked: int = 1) -> Tensor:
        places = tokens == PLACEHOLDER
        return logits_with(oracle, tokens, layer(layer_asked), lambda stream: inject(stream, vectors, places))

    return run_oracle


@known_mistakes(
    {
        "the vectors come one block too early: `layer` says after how many blocks.": running(
            layer=lambda layer: clamped(layer - 1)
        ),
        "the vectors come one block too late: `layer` says after how many blocks.": running(
            layer=lambda layer: clamped(layer + 1)
        ),
        "`layer` is ignored.": running(layer=lambda layer: 1),
        "no vector is injected.": running(inject=lambda stream, vectors, places: stream),
        "the vectors are added at the question instead of the placeholders.": running(
            injecting(where=ELSEWHERE["the vectors go to the places where `places` is False: to the question."])
        ),
        "the vectors are added without `inject`'s scale.": running(injecting(lambda there, vector: there + vector)),
        "the vectors are injected twice.": running(
            lambda stream, vectors, places: injecting()(injecting()(stream, vectors, places), vectors, places)
        ),
    }
)
def check_run_oracle(fn: Fn) -> None:
    """After 1, 0, 2 and 3 blocks; another precision; hooks of others stay, none of one's own; gradients get through."""
    name, axes = "run_oracle", "batch pos d_vocab"
    oracle, tokens, vectors = small_model(D_VOCAB), rows_of_tokens(), 3 * noise(4, 2, 7, seed=2)
    right = running()
    with nothing_left_behind(name, oracle):
        compare(name, fn(oracle, tokens, vectors), right(oracle, tokens, vectors), axes)
    for layer in (2, 0, 3):
        actual = fn(oracle, tokens, vectors, layer)
        compare(f"{name}(layer={layer})", actual, right(oracle, tokens, vectors, layer), axes)
    follows_input(name, lambda moved, v: fn(moved, tokens.to(v.device), v, 2), (oracle, vectors), axes)
    leaf = vectors.clone().requires_grad_()
    actual = fn(oracle, tokens, leaf)
    missing = [
        what
        for what, start in (("the vectors", leaf), ("the oracle's weights", oracle.blocks[0].mlp.W_in))
        if not actual.requires_grad or torch.autograd.grad(actual.sum(), start, retain_graph=True, allow_unused=True)[0]
        is None
    ]  # fmt: skip
    demand(not missing, name, "gradients", f"no gradient gets to {' and '.join(missing)}.", "leave gradients on.")
