# ruff: noqa: N802 (check_NeuronModel and check_AbsModel are named after their exercises)
"""Checks of chapter 06, neurons: the models whose hidden coordinates are special. Oracles go neuron by neuron."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch06.toy_models import side_by_side
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import with_forwards
from course_utils.checks.standins.toy_superposition import SmallAbs, SmallNeurons

Forward = Callable[[Any, Tensor], Tensor]


def one_layer(W_in: Tensor, W_out: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """An MLP without a bias on its neurons, one neuron after the other; W_in [neuron, feature], W_out likewise."""
    total = b.expand(len(x), -1)
    for reads, writes in zip(W_in, W_out, strict=True):
        total = total + (x @ reads).clamp(min=0)[:, None] * writes
    return total.clamp(min=0)


# -------------------------------------------------------------------------------------------------------- NeuronModel


def neurons(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("bif,inf->bin", x, self.W)


def written(self: Any, hidden: Tensor) -> Tensor:
    return torch.einsum("bin,inf->bif", hidden, self.W)


@known_mistakes(
    with_forwards(
        SmallNeurons,
        {
            "the relu on the hidden layer is missing: that is a ToyModel.": lambda self, x: (
                written(self, neurons(self, x)) + self.b
            ).relu(),
            "the relu on the output is missing.": lambda self, x: written(self, neurons(self, x).relu()) + self.b,
            "the output's relu comes before the bias.": lambda self, x: (
                written(self, neurons(self, x).relu()).relu() + self.b
            ),
            "the bias is missing.": lambda self, x: written(self, neurons(self, x).relu()).relu(),
            "the inputs go through a relu, and not the hidden layer.": lambda self, x: (
                written(self, neurons(self, x.relu())) + self.b
            ).relu(),
            "the relu goes on the weights: every neuron reads positive weights only.": lambda self, x: (
                torch.einsum("bif,inf,ing->big", x, self.W.relu(), self.W) + self.b
            ).relu(),
            "the neurons have an absolute value for a relu.": lambda self, x: (
                written(self, neurons(self, x).abs()) + self.b
            ).relu(),
            "every instance has the matrix of instance 0.": lambda self, x: (
                (x @ self.W[0].T).relu() @ self.W[0] + self.b
            ).relu(),
        },
    )
)
def check_NeuronModel(cls: Any) -> None:
    """Three instances of seven features and four neurons, with random weights and biases."""

    def each(weights: dict[str, Tensor], x: Tensor, i: int) -> Tensor:
        return one_layer(weights["W"][i], weights["W"][i], weights["b"][i], x)

    side_by_side("NeuronModel", cls, (3, 7, 4), {"W": (3, 4, 7), "b": (3, 7)}, each)


# ----------------------------------------------------------------------------------------------------------- AbsModel


def absolute(
    W_in: Callable[[Any], Tensor] = lambda self: self.W_in,
    W_out: Callable[[Any], Tensor] = lambda self: self.W_out,
    hidden: Callable[[Tensor], Tensor] = torch.relu,
    end: Callable[[Tensor, Tensor], Tensor] = lambda out, b: (out + b).relu(),
    enter: Callable[[Tensor], Tensor] = lambda x: x,
) -> Forward:
    """The forward with other matrices, or other functions between them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        before = torch.einsum("bif,inf->bin", enter(x), W_in(self))
        return end(torch.einsum("bin,ifn->bif", hidden(before), W_out(self)), self.b)

    return forward


@known_mistakes(
    with_forwards(
        SmallAbs,
        {
            "the relu on the neurons is missing.": absolute(hidden=lambda before: before),
            "the relu on the output is missing.": absolute(end=lambda out, b: out + b),
            "the output's relu comes before the bias.": absolute(end=lambda out, b: out.relu() + b),
            "the bias is missing.": absolute(end=lambda out, b: out.relu()),
            "the features are written by `W_in`, transposed; the model has a matrix for it.": absolute(
                W_out=lambda self: self.W_in.mT
            ),
            "the features are read by `W_out`, transposed; the model has a matrix for it.": absolute(
                W_in=lambda self: self.W_out.mT
            ),
            "`W_out` is reshaped where it has to be transposed.": absolute(
                W_out=lambda self: self.W_out.reshape(self.W_in.shape).mT
            ),
            "it is computed from |x|: the model has to find the absolute value itself.": absolute(enter=torch.abs),
            "every instance has the matrices of instance 0.": absolute(
                lambda self: self.W_in[:1].expand_as(self.W_in), lambda self: self.W_out[:1].expand_as(self.W_out)
            ),
        },
    )
)
def check_AbsModel(cls: Any) -> None:
    """Three instances of seven features and four neurons, with random weights and biases, and inputs of both signs."""

    def each(weights: dict[str, Tensor], x: Tensor, i: int) -> Tensor:
        return one_layer(weights["W_in"][i], weights["W_out"][i].T, weights["b"][i], x)

    side_by_side("AbsModel", cls, (3, 7, 4), {"W_in": (3, 4, 7), "W_out": (3, 7, 4), "b": (3, 7)}, each)
