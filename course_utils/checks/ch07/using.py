"""Checks of chapter 07, "Is it used?": a vector added at one place, how far a metric moves, and erasing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch07.small import Fn, Probe, compare_parts, parts_of_every_kind, two_classes
from course_utils.checks.comparing import compare, follows_input, parts
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Stop
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks

CFG = TransformerConfig(d_vocab=11, n_ctx=8, n_layers=2, n_heads=2, d_model=6, d_head=3, d_mlp=5)
LOGITS = "batch pos d_vocab"
PLACES = torch.tensor([3, 0, 2])

# --------------------------------------------------------------------------------------------------------- run_steered


def steering(
    change: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda stream, places, vector: place_by_place(
        stream, places, vector
    ),
    layers: Callable[[int, int], list[int]] = lambda layer, n_layers: [layer],
) -> Fn:
    """run_steered by PyTorch's own hooks; `change` gets stream, positions and a vector for each text."""

    def run_steered(model: Any, tokens: Tensor, layer: int, positions: Tensor, vector: Tensor) -> Tensor:
        points = [block.hook_resid_pre for block in model.blocks] + [model.blocks[-1].hook_resid_post]
        each = vector.expand(len(tokens), -1)
        handles = [
            points[number].register_forward_hook(lambda module, inputs, stream: change(stream, positions, each))
            for number in layers(layer, len(model.blocks))
        ]
        with torch.no_grad():
            logits: Tensor = model(tokens)
        for handle in handles:
            handle.remove()
        return logits

    return run_steered


def place_by_place(
    stream: Tensor, places: Tensor, vector: Tensor, put: Callable[[Tensor, Tensor], Tensor] = torch.add
) -> Tensor:
    """A copy of the stream, changed in one place of each text."""
    changed = stream.clone()
    for row, place in enumerate(places.tolist()):
        changed[row, place] = put(stream[row, place], vector[row])
    return changed


@known_mistakes(
    {
        "the vector is added at every position.": steering(lambda stream, places, vector: stream + vector[:, None]),
        "the vector is added at the last position of the batch, whatever `positions` says.": steering(
            lambda stream, places, vector: place_by_place(stream, places * 0 - 1, vector)
        ),
        "the positions of all texts are changed in every text: index rows and positions together.": steering(
            lambda stream, places, vector: torch.stack(
                [
                    stream[row]
                    + torch.zeros_like(stream[row]).index_copy(0, places, vector[row].expand(len(places), -1))
                    for row in range(len(stream))
                ]
            )
        ),
        "the vector takes the place of what was there; add it.": steering(
            lambda stream, places, vector: place_by_place(stream, places, vector, lambda old, new: new)
        ),
        "the vector is subtracted.": steering(
            lambda stream, places, vector: place_by_place(stream, places, vector, torch.sub)
        ),
        "the vector is scaled to length 1 first.": steering(
            lambda stream, places, vector: place_by_place(stream, places, F.normalize(vector, dim=-1))
        ),
        "it is added one layer too late: layer 0 is what the first block reads.": steering(
            layers=lambda layer, n_layers: [min(layer + 1, n_layers)] if layer < n_layers else []
        ),
        "it is added again in every later layer.": steering(
            layers=lambda layer, n_layers: [*range(layer, n_layers), n_layers] if layer < n_layers else [layer]
        ),
        "nothing is added: what the hook function returns is thrown away, or it returns None.": steering(
            lambda stream, places, vector: stream
        ),
    }
)
def check_run_steered(fn: Fn) -> None:
    """Every layer; one vector for all texts, and one for each; nothing left behind, also after a run that fails."""
    name, model, right = "run_steered", SmallModel(CFG), steering()
    tokens = some_tokens(CFG, 3, 5, seed=4)
    for layer in range(CFG.n_layers + 1):
        for vector, words in ((noise(6, seed=40), "one vector"), (noise(3, 6, seed=41), "a vector for each text")):
            with nothing_left_behind(name, model):
                logits = fn(model, tokens, layer, PLACES, vector)
            compare(f"{name} at layer {layer}, {words}", logits, right(model, tokens, layer, PLACES, vector), LOGITS)
    if logits.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    follows_input(
        name,
        lambda moved, pushed: fn(moved, *(t.to(pushed.device) for t in (tokens,)), 1, PLACES.to(pushed.device), pushed),
        (model, noise(6, seed=42)),
        LOGITS,
    )

    def stop(activation: Tensor, hook: Any) -> None:
        raise Stop

    when = f"{name} after a run that ended in an exception"
    with nothing_left_behind(when, model), hooks(model, {"blocks.1.hook_resid_post": stop}):
        assert_stops(name, lambda: fn(model, tokens, 0, PLACES, noise(6, seed=43)), "the model")


# --------------------------------------------------------------------------------------------------- normalised_effect


@known_mistakes(
    {
        "the ratio of every text is averaged; divide one mean by the other.": lambda steered, before, target: (
            (steered - before) / (target.mean() - before)
        ).mean(),
        "nothing is subtracted: it is steered over target.": lambda steered, before, target: (
            steered.mean() / target.mean()
        ),
        "`before` is subtracted from `steered` only.": lambda steered, before, target: (
            (steered.mean() - before.mean()) / target.mean()
        ),
        "the way that is left is measured: 1 is then where nothing has moved.": lambda steered, before, target: (
            (target.mean() - steered.mean()) / (target.mean() - before.mean())
        ),
        "the sign is lost; an effect may be negative.": lambda steered, before, target: (
            (steered.mean() - before.mean()) / (target.mean() - before.mean())
        ).abs(),
        "it is cut to between 0 and 1; an effect may go further.": lambda steered, before, target: (
            (steered.mean() - before.mean()) / (target.mean() - before.mean())
        ).clamp(0, 1),
        "sums are compared; there may be more texts on one side. Compare means.": lambda steered, before, target: (
            (steered.sum() - before.sum()) / (target.sum() - before.sum())
        ),
    }
)
def check_normalised_effect(fn: Fn) -> None:
    """Part of the way, further than that, and the wrong way; from above; nowhere to go."""
    name = "normalised_effect"
    before, target = torch.tensor([-1.0, -2.0, -4.0, 0.5]), torch.tensor([3.0, 2.0, 4.5])
    start, goal = sum(before.tolist()) / 4, sum(target.tolist()) / 3
    for steered in (before + torch.tensor([1.0, 0.5, 4.0, 0.0]), before * 0 + 5.0, before - 1.0):
        right = (sum(steered.tolist()) / 4 - start) / (goal - start)
        compare(name, fn(steered, before, target), torch.tensor(right), "")
    for steered in (target - 1.0, target + 0.5):  # the way back, from three texts to four
        right = (sum(steered.tolist()) / 3 - goal) / (start - goal)
        compare(f"{name} with a target below", fn(steered, target, before), torch.tensor(right), "")
    follows_input(name, fn, (before + 1, before, target), "")
    follows_every_kind(name, fn, (before + 1, before, target), "")
    call = f"{name}(steered, before, before)"
    must_raise(name, ValueError, call, partial(fn, before + 1, before, before))


# -------------------------------------------------------------------------------------------------- activation_pattern


def pattern_by(
    centre: bool = True, end: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda together, var, w: together / var
) -> Fn:
    """Sums over the rows; `end` gets covariance with the scores, variance of the scores, and the direction."""

    def activation_pattern(x: Tensor, direction: Tensor) -> Tensor:
        mean = x.mean(0) if centre else torch.zeros_like(x[0])
        together, variance = torch.zeros_like(direction), torch.zeros(()).to(direction)
        for row in x:
            score = ((row - mean) * direction).sum()
            together, variance = together + score * (row - mean) / len(x), variance + score**2 / len(x)
        return end(together, variance, direction)

    return activation_pattern


@known_mistakes(
    {
        "the rows are not centred.": pattern_by(centre=False),
        "the covariance is not divided by the variance of the scores.": pattern_by(
            end=lambda together, var, w: together
        ),
        "it is divided by the standard deviation of the scores; divide by the variance.": pattern_by(
            end=lambda together, var, w: together / var.sqrt()
        ),
        "it is the direction itself.": lambda x, direction: direction.clone(),
        "the direction is multiplied by the inverse covariance; it should be by the covariance.": lambda x, direction: (
            torch.linalg.solve(torch.cov(x.T, correction=0), direction)
        ),
        "it is scaled to length 1.": pattern_by(end=lambda together, var, w: F.normalize(together, dim=0)),
    }
)
def check_activation_pattern(fn: Fn) -> None:
    """Two directions, and one that is longer."""
    name, axes = "activation_pattern", "d_model"
    x = two_classes(44)[0]
    for direction in (noise(4, seed=45), noise(4, seed=46) * 7):
        compare(name, fn(x, direction), pattern_by()(x, direction), axes)
    follows_input(name, fn, (x, direction), axes)
    follows_every_kind(name, fn, (x, direction), axes)


# --------------------------------------------------------------------------------------------------------------- erase

ERASER = {"matrix": "d_model d_model", "bias": "d_model"}


def moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance, and covariance with the classes, row by row in float64."""
    wide, classes = x.double(), sorted(set(y.tolist()))
    mean = wide.mean(dim=0)
    covariance = torch.stack([torch.outer(row - mean, row - mean) for row in wide]).sum(0) / len(wide)
    columns = []
    for kind in classes:
        hit = (y == kind).double()
        columns.append(sum((h - hit.mean()) * (row - mean) for h, row in zip(hit, wide, strict=True)) / len(wide))
    return mean, covariance, torch.stack(columns, 1)


def oblique(covariance: Tensor, cross: Tensor) -> Tensor:
    """The part that is removed, by another formula: along C, and blind to what is uncorrelated with the classes."""
    inverse = torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True)
    correlations = cross.T @ inverse @ cross  # squared; with equal means they are 0 but for what is rounded off
    return cross @ torch.linalg.pinv(correlations, rtol=1e-9, atol=1e-12, hermitian=True) @ cross.T @ inverse


def orthogonal(covariance: Tensor, cross: Tensor) -> Tensor:
    return cross @ torch.linalg.pinv(cross, rtol=1e-9)


def erasing(
    removed: Callable[[Tensor, Tensor], Tensor] = oblique,
    bias: Callable[[Tensor, Tensor], Tensor] = lambda removed, mean: removed @ mean,
    matrix: Callable[[Tensor], Tensor] = lambda removed: torch.eye(len(removed)).double() - removed,
) -> Fn:
    """erase with something else in one of its steps."""

    def erase(x: Tensor, y: Tensor) -> Probe:
        mean, covariance, cross = moments(x, y)
        gone = removed(covariance, cross)
        return matrix(gone).to(x), bias(gone, mean).to(x)

    return erase


@known_mistakes(
    {
        "only the difference of the means is projected out, as if the covariance were white.": erasing(orthogonal),
        "the matrix is transposed: whitening and its inverse are swapped.": erasing(
            lambda covariance, cross: oblique(covariance, cross).T
        ),
        "there is no bias: the mean of the rows moves.": erasing(bias=lambda removed, mean: 0 * mean),
        "the bias is the mean itself.": erasing(bias=lambda removed, mean: mean),
        "the sign of the bias is turned round.": erasing(bias=lambda removed, mean: -removed @ mean),
        "the matrix is what is removed; subtract it from the identity.": erasing(matrix=lambda removed: removed),
        "only the first class is told from the others; with three there are two directions.": erasing(
            lambda covariance, cross: oblique(covariance, cross[:, :1])
        ),
        "everything in which the rows vary is removed.": erasing(
            lambda covariance, cross: torch.linalg.pinv(covariance) @ covariance
        ),
        "nothing is removed.": erasing(lambda covariance, cross: 0 * covariance),
    }
)
def check_erase(fn: Fn) -> None:
    """Two classes, three, unlike coordinates, rows that fill only a plane, equal means; then the means; long rows."""
    name = "erase"
    x, two = two_classes(47, n_batch=13)
    three = torch.tensor([5, 1, 1, 8, 5, 1, 8, 8, 1, 5, 5, 1, 1])
    plane = two_classes(48, n_batch=13, d_model=3)[0] @ noise(3, 5, seed=49) + 2.0
    eighths = (8 * x[:8]).round() / 8  # no sum of theirs is rounded, on any machine, so the means are equal exactly
    balanced = torch.cat([eighths, eighths]), torch.arange(16) // 8
    for rows, y, words in (
        (x, two.long(), "two classes"),
        (x, three, "three classes"),
        (x * torch.tensor([1.0, 0.01, 3.0, 0.1]), two.long(), "coordinates of different sizes"),
        (plane, two.long(), "rows in a subspace"),
        (*balanced, "classes with equal means"),
    ):
        answer = parts(f"{name}, {words}", fn(rows, y), *ERASER)
        compare_parts(f"{name}, {words}", answer, erasing()(rows, y), ERASER, rtol=1e-3, atol=1e-4)
        erased = rows @ answer[0].T + answer[1]
        means = torch.stack([erased[y == kind].mean(0) for kind in y.unique()])
        compare(f"{name}, {words}: means of the erased classes", means, erased.mean(0).expand_as(means),
                "n_class d_model", atol=1e-3)  # fmt: skip
    long = parts(name, fn(4096 * plane, two.long()), *ERASER)[0]  # what is rounded off is longer, too
    compare(f"{name}, rows in a subspace, 4096 times as long: the matrix", long, erasing()(plane, two.long())[0],
            ERASER["matrix"], rtol=1e-3, atol=1e-4)  # fmt: skip
    parts_of_every_kind(name, fn, (x, three), ERASER)
