"""What the checks of toy models cannot know: see tests/test_checks.py."""

from typing import Any

import torch
from torch import Tensor, nn

import solutions.ch06_superposition as ref
from course_utils.checks.ch06.toys import drawing, training, weighing
from course_utils.checks.modules import with_methods
from tests.ch06 import other_toys as other

SECRETS = ("instance d_hidden feature ->", "is_active", "optimizer.step()")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "torch.rand(shape, generator=generator, **options) -> torch.rand(shape, generator=generator)",  # to decide only
    "torch.rand(shape, generator=generator, **options) < probability -> "
    "torch.rand(shape, generator=generator, **options) <= probability",  # hardly ever equal
}


def seeded_anew(n_batch: int, probability: Tensor, generator: torch.Generator) -> Tensor:
    return ref.sample_features(n_batch, probability, torch.Generator().manual_seed(generator.initial_seed()))


def globally(n_batch: int, probability: Tensor, generator: torch.Generator) -> Tensor:
    torch.rand(1, generator=generator)
    return torch.rand(n_batch, *probability.shape) * (torch.rand(n_batch, *probability.shape) < probability)


def so_many(n_batch: int, probability: Tensor, generator: torch.Generator) -> Tensor:
    """As many features of each sample as are active on average."""
    shape = (n_batch, *probability.shape)
    rank = torch.rand(shape, generator=generator).argsort(-1).argsort(-1)
    return torch.rand(shape, generator=generator, dtype=probability.dtype) * (rank < probability.sum(-1, keepdim=True))


def toy(forward: Any) -> type:
    return with_methods(ref.ToyModel, "ToyModel", forward=forward)


class SmallMatrix(nn.Module):
    """Made anew, with W transposed."""

    def __init__(self, n_instances: int, n_features: int, d_hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(n_instances, n_features, d_hidden))
        self.b = nn.Parameter(torch.zeros(n_instances, n_features))


SmallMatrix.__name__ = "ToyModel"


def without_gradient_of_bias(self: Any, x: Tensor) -> Tensor:
    hidden = torch.einsum("bif,ihf->bih", x, self.W)
    return (torch.einsum("bih,ihf->bif", hidden, self.W) + self.b.detach()).relu()


def half_of_the_gradient(self: Any, x: Tensor) -> Tensor:
    hidden = torch.einsum("bif,ihf->bih", x, self.W.detach())
    return (torch.einsum("bih,ihf->bif", hidden, self.W) + self.b).relu()


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "sample_features": [
        ("it left `generator` as it was", seeded_anew),
        ("it drew from torch's global random numbers", globally),
        ("wrong shape", lambda n, p, generator: ref.sample_features(n, p, generator).transpose(1, 2)),
        ("values lie between", drawing(value=lambda value, chance: 3 * value)),
        ("expected dtype float64", lambda n, p, generator: ref.sample_features(n, p.float(), generator)),
        ("the mean of active values", drawing(value=lambda value, chance: value**2)),
        ("how often a feature is active", drawing(active=lambda chance, p: chance < p**2)),
        ("the mean of active values", drawing(one_value=(0,))),
        ("how often a feature is active", so_many),
    ],
    "ToyModel": [
        ("expected a parameter `W` of shape (3, 2, 7)", SmallMatrix),
        ("no gradient reaches `b`", toy(without_gradient_of_bias)),
        ("the gradient of `W`", toy(half_of_the_gradient)),
        ("values are wrong", toy(lambda self, x: ref.ToyModel.forward(self, x).clamp(max=1))),
        ("values are wrong", toy(lambda self, x: ref.ToyModel.forward(self, x.clamp(min=0)))),
        ("expected a class that inherits from nn.Module", lambda *sizes: ref.ToyModel(*sizes)),
        ("in float64", toy(lambda self, x: ref.ToyModel.forward(self, x).float())),
    ],
    "importance_weighted_loss": [
        ("wrong shape", weighing(total=lambda error: error.mean((0, 2)))),
        (
            "no gradient gets through it",
            lambda out, x, importance: ref.importance_weighted_loss(out, x, importance).data,
        ),
        ("no gradient gets through it", lambda out, *given: ref.importance_weighted_loss(out.detach(), *given)),
        ("values is wrong", weighing(total=lambda error: error.mean((0, 2)).amax())),
        ("expected a Tensor, got a float", lambda *given: ref.importance_weighted_loss(*given).item()),
    ],
    "train_toy": [
        ("expected a list of plain numbers", lambda *given: torch.tensor(ref.train_toy(*given))),
        ("expected a list of plain numbers, got None", lambda *given: [ref.train_toy(*given), None][1]),
        ("`draw` was called", lambda model, draw, *rest: [ref.train_toy(model, draw, *rest), draw()][0]),
        ("values is wrong", training(betas=(0.5, 0.999))),
        ("wrong shape", lambda *given: ref.train_toy(*given)[1:]),
        ("values is wrong", training(rate=lambda step, steps, peak: peak * (1 - step / steps))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_an_instance_learns_the_same_in_company_and_alone() -> None:
    """The reason for a sum over instances."""
    torch.manual_seed(0)
    batches = torch.rand(20, 8, 3, 4)
    importance = torch.rand(3, 4)

    def trained(which: list[int]) -> Tensor:
        model = ref.ToyModel(3, 4, 2, torch.Generator().manual_seed(1))
        model.W, model.b = nn.Parameter(model.W.detach()[which]), nn.Parameter(model.b.detach()[which])
        rows = iter(batches[:, :, which])
        ref.train_toy(
            model,
            lambda: next(rows),
            lambda out, x: ref.importance_weighted_loss(out, x, importance[which]),
            steps=20,
            peak=0.01,
        )
        return model.W.detach()

    torch.testing.assert_close(trained([0, 1, 2])[1:2], trained([1]))
