"""Checks of chapter 07, attention probes: where it looks, and what it makes of that, text by text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, randomise, with_methods
from course_utils.checks.outcomes import CheckFailed

SHAPES = {"query": (4,), "W": (4, 3), "b": (3,)}
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0]]
).bool()


def weights_by_text(query: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Position by position, the exponential of its score over the sum of those that count."""
    out = torch.zeros(x.shape[:2]).to(x)
    for row, text in enumerate(x):
        places = [place for place in range(len(text)) if mask[row, place]]
        sizes = [math.exp(float((text[place] * query).sum()) / math.sqrt(len(query))) for place in places]
        for place, size in zip(places, sizes, strict=True):
            out[row, place] = size / sum(sizes)
    return out


class Stand(nn.Module):
    """The parameters that were given, with methods of its own."""

    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d_model))
        self.W, self.b = nn.Parameter(torch.zeros(d_model, n_classes)), nn.Parameter(torch.zeros(n_classes))

    def pattern(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ self.query / x.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.pattern(x, mask)[..., None] * x).sum(1) @ self.W + self.b


def looking(pattern: Callable[[Any, Tensor, Tensor], Tensor]) -> type:
    return with_methods(Stand, "AttentionProbe", pattern=pattern)


def reading(forward: Callable[[Any, Tensor, Tensor], Tensor]) -> type:
    return with_methods(Stand, "AttentionProbe", forward=forward)


@known_mistakes(
    {
        "padding gets weight: the mask is not used.": looking(
            lambda self, x, mask: (x @ self.query / x.shape[-1] ** 0.5).softmax(-1)
        ),
        "the mask is turned round: True is a token that counts.": looking(
            lambda self, x, mask: (
                (x @ self.query / x.shape[-1] ** 0.5).masked_fill(mask, -torch.inf).softmax(-1).nan_to_num()
            )
        ),
        "padding is scored 0, which is exp(0) = 1 in the softmax.": looking(
            lambda self, x, mask: (x @ self.query / x.shape[-1] ** 0.5 * mask).softmax(-1)
        ),
        "padding is set to 0 after the softmax, so that the weights do not sum to 1.": looking(
            lambda self, x, mask: (x @ self.query / x.shape[-1] ** 0.5).softmax(-1) * mask
        ),
        "scores are not divided by sqrt(d_model).": looking(
            lambda self, x, mask: (x @ self.query).masked_fill(~mask, -torch.inf).softmax(-1)
        ),
        "scores are divided by d_model; take the root.": looking(
            lambda self, x, mask: (x @ self.query / x.shape[-1]).masked_fill(~mask, -torch.inf).softmax(-1)
        ),
        "the softmax runs over the batch; it should run over the positions.": looking(
            lambda self, x, mask: (x @ self.query / x.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(0)
        ),
        "forward takes the mean over the text; weight it by the pattern.": reading(
            lambda self, x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) @ self.W + self.b
        ),
        "forward leaves out `b`.": reading(
            lambda self, x, mask: (self.pattern(x, mask)[..., None] * x).sum(1) @ self.W
        ),
        "forward takes the one vector with the largest weight.": reading(
            lambda self, x, mask: x[torch.arange(len(x)), self.pattern(x, mask).argmax(1)] @ self.W + self.b
        ),
    }
)
def check_AttentionProbe(cls: Any) -> None:  # noqa: N802 (named after its exercise)
    """As it begins, and with random parameters: where it looks, then its scores; gradients reach all three."""
    name = "AttentionProbe"
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed(f"{name}: expected a class that inherits from nn.Module.\n  Next: keep its first line.")
    probe = cls(4, 3)
    shapes = {label: tuple(parameter.shape) for label, parameter in probe.named_parameters()}
    if shapes != SHAPES:
        raise CheckFailed(f"{name}: its parameters are {shapes}, not {SHAPES}.\n  Next: keep the `__init__` given.")
    x = noise(5, 6, 4, seed=60)
    for words in ("with random parameters", "as it begins"):
        probe = cls(4, 3)
        if words != "as it begins":
            randomise(probe)
        weights = weights_by_text(probe.query.detach(), x, MASK)
        compare(f"{name}.pattern {words}", probe.pattern(x, MASK), weights, "batch pos")
        pooled = torch.stack(
            [sum(w * row for w, row in zip(*each, strict=True)) for each in zip(weights, x, strict=True)]
        )
        compare(f"{name} {words}", probe(x, MASK), pooled @ probe.W.detach() + probe.b.detach(), "batch n_class")
    randomise(probe)
    follows_input(
        name, lambda moved, rows: moved(rows, MASK.to(rows.device)), (probe, x), "batch n_class", gradient=True
    )
    probe(x, MASK).square().sum().backward()
    for label, parameter in probe.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            raise CheckFailed(f"{name}: no gradient reaches `{label}`.\n  Next: use it, without .detach() or no_grad.")
