"""Checks of chapter 11, using: a vector carried across a probe's boundary, and a model that reads itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch11.small import Fn, clamped, logits_with, small_model, stream
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.transformer import some_tokens


def mirroring(
    times: float = 2.0,
    with_bias: Callable[[Tensor], Tensor] = lambda bias: bias,
    scale: Callable[[Tensor], Tensor] = lambda direction: direction.square().sum(),
    sign: float = -1.0,
) -> Fn:
    """mirror, vector by vector."""

    def mirror(x: Tensor, direction: Tensor, bias: Tensor) -> Tensor:
        rows = []
        for vector in x:
            score = sum(a * b for a, b in zip(vector, direction, strict=True)) + with_bias(bias)
            rows.append(vector + sign * times * score / scale(direction) * direction)
        return torch.stack(rows)

    return mirror


@known_mistakes(
    {
        "the vectors end on the boundary, with a score of 0; go as far again.": mirroring(times=1.0),
        "the bias is forgotten: this mirrors at the origin.": mirroring(with_bias=lambda bias: 0 * bias),
        "the direction's length counts: divide by its square.": mirroring(scale=lambda d: torch.ones_like(d[0])),
        "it is divided by the direction's length; divide by its square.": mirroring(
            scale=lambda d: d.square().sum().sqrt()
        ),
        "the vectors move away from the boundary.": mirroring(sign=1.0),
        "the bias has the wrong sign.": mirroring(with_bias=lambda bias: -bias),
    }
)
def check_mirror(fn: Fn) -> None:
    """Rows on both sides, a direction that has not length 1, a single row; every kind of input."""
    name = "mirror"
    direction, bias = 3 * noise(6, seed=2), torch.tensor(1.7)
    for n in (5, 1):
        x = noise(n, 6, seed=n)
        compare(f"{name} of {n} row{'s' * (n > 1)}", fn(x, direction, bias), mirroring()(x, direction, bias), "batch d")
    x, short = noise(4, 6, seed=4), 0.2 * direction
    compare(f"{name} along a short direction", fn(x, short, bias), mirroring()(x, short, bias), "batch d")
    follows_every_kind(name, fn, (x, direction, bias), "batch d", graph=True)
    follows_input(name, fn, (x, direction, bias), "batch d", gradient=True)


# ---------------------------------------------------------------------------------------------------------- patchscopes

SOURCE_AT, TARGET_AT = torch.tensor([5, 2, 6, 0]), torch.tensor([3, 4, 0, 1])


def scoping(
    source_layer: Callable[[int, int], int] = lambda source, target: source,
    target_layer: Callable[[int, int], int] = lambda source, target: target,
    put: Callable[[Tensor, Tensor], Tensor] = lambda there, vector: vector,
    at: Callable[[int, int], list[int]] = lambda place, n_pos: [place],
    taken: Callable[[int, int, int], int] = lambda source_at, target_at, n_pos: source_at,
    own: bool = False,
    row: Callable[[int], int] = lambda row: row,
) -> Fn:
    """patchscope by a forward hook of PyTorch, place by place."""

    @torch.no_grad()
    def patchscope(
        model: Any,
        source: Tensor,
        source_at: Tensor,
        source_layer_asked: int,
        target: Tensor,
        target_at: Tensor,
        target_layer_asked: int,
    ) -> Tensor:
        asked = source_layer_asked, target_layer_asked
        found = stream(model, target if own else source, source_layer(*asked))

        def change(resid: Tensor) -> Tensor:
            out = resid.clone()
            for number, (there, here) in enumerate(zip(source_at.tolist(), target_at.tolist(), strict=True)):
                vector = found[row(number), taken(there, here, found.shape[1]) % found.shape[1]]
                for pos in at(here, out.shape[1]):
                    out[number, pos] = put(out[number, pos], vector)
            return out

        return logits_with(model, target, target_layer(*asked), change)

    return patchscope


@known_mistakes(
    {
        "the vector is added to what is there; it takes its place.": scoping(put=lambda there, vector: there + vector),
        "source and target layer have changed places.": scoping(
            source_layer=lambda source, target: target, target_layer=lambda source, target: source
        ),
        "the vector is put back into the layer that it comes from, whatever `target_layer` says.": scoping(
            target_layer=lambda source, target: source
        ),
        "the vector comes from the target's layer, whatever `source_layer` says.": scoping(
            source_layer=lambda source, target: target
        ),
        "the vector comes from the target's own run.": scoping(own=True),
        "the vector is taken at `target_at`.": scoping(taken=lambda there, here, n_pos: here),
        "the vector is taken at the last position of the source.": scoping(taken=lambda there, here, n_pos: n_pos - 1),
        "every position of the target is replaced.": scoping(at=lambda place, n_pos: list(range(n_pos))),
        "all rows take the vector of the first one.": scoping(row=lambda row: 0),
        "the layers are one too late: they are numbered as in chapter 07.": scoping(
            source_layer=lambda source, target: clamped(source + 1),
            target_layer=lambda source, target: clamped(target + 1),
        ),
    }
)
def check_patchscope(fn: Fn) -> None:
    """Texts of different lengths, four pairs of layers, one row; nothing left behind, no gradients, float64."""
    name, axes = "patchscope", "batch target_pos d_vocab"
    model = small_model()
    source, target = some_tokens(model.cfg, 4, 7, seed=1), some_tokens(model.cfg, 4, 5, seed=2)
    for layers in ((1, 2), (2, 0), (3, 1), (0, 3)):
        arguments = (source, SOURCE_AT, layers[0], target, TARGET_AT, layers[1])
        with nothing_left_behind(name, model):
            actual = fn(model, *arguments)
        compare(f"{name}, layer {layers[0]} to {layers[1]}", actual, scoping()(model, *arguments), axes)
    if actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    one = (source[:1], SOURCE_AT[:1], 2, target[:1], TARGET_AT[:1], 1)
    compare(f"{name} of one row", fn(model, *one), scoping()(model, *one), axes)

    def moved(other: Any) -> Tensor:
        device = other.embed.W_E.device
        return fn(other, source.to(device), SOURCE_AT.to(device), 2, target.to(device), TARGET_AT.to(device), 1)

    follows_input(name, moved, (model,), axes)
