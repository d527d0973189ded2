"""What the checks of neurons cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch06_superposition as ref
from course_utils.checks.modules import with_methods
from tests.ch06 import other_toys as other

SECRETS = ("instance neuron feature ->",)
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = set()


def neuron(forward: Any) -> type:
    return with_methods(ref.NeuronModel, "NeuronModel", forward=forward)


def absolute(forward: Any) -> type:
    return with_methods(ref.AbsModel, "AbsModel", forward=forward)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "NeuronModel": [
        ("no gradient reaches `W`", neuron(lambda self, x: ref.NeuronModel.forward(self, x).detach() + 0 * self.b)),
        ("values are wrong", neuron(lambda self, x: ref.NeuronModel.forward(self, x) * 0.99)),
        ("the gradient of `W`", neuron(lambda self, x: _written(self, x, self.W.detach()))),
        ("wrong shape", neuron(lambda self, x: ref.NeuronModel.forward(self, x).mean(1))),
    ],
    "AbsModel": [
        ("values are wrong", absolute(lambda self, x: x.abs())),
        ("no gradient reaches `b`", absolute(lambda self, x: _with_bias(self, x, self.b.detach()))),
        ("wrong shape", absolute(lambda self, x: ref.AbsModel.forward(self, x).transpose(0, 1))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def _written(self: Any, x: torch.Tensor, W_out: torch.Tensor) -> torch.Tensor:
    hidden = torch.einsum("bif,inf->bin", x, self.W).relu()
    return (torch.einsum("bin,inf->bif", hidden, W_out) + self.b).relu()


def _with_bias(self: Any, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    hidden = torch.einsum("bif,inf->bin", x, self.W_in).relu()
    return (torch.einsum("bin,ifn->bif", hidden, self.W_out) + b).relu()


def test_two_neurons_make_an_absolute_value() -> None:
    model = ref.AbsModel(1, 1, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.W_in.copy_(torch.tensor([[[1.0], [-1.0]]]))
        model.W_out.copy_(torch.tensor([[[1.0, 1.0]]]))
    x = torch.linspace(-1, 1, 9)[:, None, None]
    torch.testing.assert_close(model(x), x.abs())
