# ruff: noqa: N802 (check_ToyModel is named after its exercise)
"""Checks of chapter 06, toy models: inputs with known features, the model, its loss, and how it is trained.

Oracles count what was drawn, go through the instances one by one, and spell Adam out.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch06.toy_models import active_values, by_hand, draws, near, side_by_side, together
from course_utils.checks.comparing import carries_gradient, compare, compare_kind, follows_input
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, with_forwards
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.toy_superposition import SmallToy

Fn = Callable[..., Any]

# --------------------------------------------------------------------------------------------------- sample_features


def drawing(
    value: Callable[[Tensor, Tensor], Tensor] = lambda value, chance: value,
    active: Callable[[Tensor, Tensor], Tensor] = lambda chance, probability: chance < probability,
    shared: tuple[int, ...] = (),
    one_value: tuple[int, ...] = (),
) -> Fn:
    """Features with other values, another rule for what is active, or one draw for all along some axes.

    Along `shared` one number decides what is active, along `one_value` all have one value.
    """

    def sample_features(n_batch: int, probability: Tensor, generator: torch.Generator) -> Tensor:
        shape = [n_batch, *probability.shape]

        def draw(alike: tuple[int, ...]) -> Tensor:
            sizes = [1 if i in alike else size for i, size in enumerate(shape)]
            return torch.rand(sizes, generator=generator).expand(shape)

        values, chances = draw(one_value), draw(shared)
        return value(values, chances) * active(chances, probability)

    return sample_features


@known_mistakes(
    {
        "a feature is active with a chance of 1 - probability.": drawing(active=lambda chance, p: chance > p),
        "every feature is active; `probability` is not used.": drawing(active=lambda chance, p: chance <= 1),
        "the values of active features are all 1; they are uniform in [0, 1].": drawing(
            value=lambda value, chance: torch.ones_like(value)
        ),
        "one random number says both whether a feature is active and how much.": drawing(
            value=lambda value, chance: chance
        ),
        "the values run from -1 to 1; they are uniform in [0, 1].": drawing(value=lambda value, chance: 2 * value - 1),
        "the values run from 0 to 1/2.": drawing(value=lambda value, chance: value / 2),
        "one draw decides for all features of an instance.": drawing(shared=(2,)),
        "one draw decides for all instances.": drawing(shared=(1,)),
        "one draw decides for the whole batch.": drawing(shared=(0,)),
        "all active features of a sample have one value; each has its own.": drawing(one_value=(2,)),
        "a feature has one value in all instances; each instance has its own.": drawing(one_value=(1,)),
    }
)
def check_sample_features(fn: Fn) -> None:
    """The form of a small batch; then what a large one says about the chances; then the dtype."""
    name, axes = "sample_features", "batch instance feature"
    small = torch.tensor([[0.5, 0.2, 0.9, 0.4, 0.6]] * 3)
    draws(name, f"{name}(7, probability, generator)", lambda generator: fn(7, small, generator), (7, 3, 5), axes)

    probability = torch.tensor([[0.1, 0.3, 0.75], [1.0, 0.0, 0.3]])
    x = draws(name, f"{name}(4000, ...)", lambda generator: fn(4000, probability, generator), (4000, 2, 3), axes)
    draw_each = "draw for every feature of every instance and row by itself."
    share = (x > 0).float().mean(0)
    near(name, "how often a feature is active", share, probability, 0.05, "instance feature", draw_each)
    mean, square = active_values(x)
    is_drawn = (probability > 0).float()  # five standard errors of the rarest feature are 0.08
    uniform = "draw the values of active features with torch.rand, apart from which are active."
    near(name, "the mean of active values", mean, 0.5 * is_drawn, 0.09, "instance feature", uniform)
    near(name, "the mean square of active values", square, is_drawn / 3, 0.09, "instance feature", uniform)
    flat = probability.flatten()
    chance = (flat[:, None] * flat).fill_diagonal_(0.0)
    both = together(x).fill_diagonal_(0.0)
    near(name, "how often two features are active together", both, chance, 0.05, "feature feature", draw_each)
    halves = (x[:2000] > 0).float().flatten(1).T @ (x[2000:] > 0).float().flatten(1) / 2000
    near(name, "how often two rows agree", halves, flat[:, None] * flat, 0.07, "feature feature", draw_each)

    often = fn(2000, torch.full((2, 3), 0.9), torch.Generator().manual_seed(3)).flatten(1)
    products = (often.T @ often / len(often)).fill_diagonal_(0.0)
    expected = torch.full((6, 6), (0.9 / 2) ** 2).fill_diagonal_(0.0)
    what = "the mean product of two features"
    near(f"{name} at 0.9", what, products, expected, 0.03, "feature feature", "draw a value for every feature.")

    double = fn(5, small.double(), torch.Generator().manual_seed(1))
    compare_kind(f"{name} with a probability in float64", double, torch.zeros((), dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------- ToyModel


def one_toy(weights: dict[str, Tensor], x: Tensor, i: int) -> Tensor:
    """What instance i makes of its inputs, feature by feature."""
    W, b = weights["W"][i], weights["b"][i]
    hidden = sum(x[:, [f]] * W[:, f] for f in range(W.shape[1]))
    return torch.stack([((hidden * W[:, f]).sum(-1) + b[f]).clamp(min=0) for f in range(W.shape[1])], dim=1)


def through(self: Any, x: Tensor, *, W_in: Tensor | None = None, relu: bool = False) -> Tensor:
    """The output without bias and relu; with another matrix on the way in, or a relu on the hidden layer."""
    hidden = torch.einsum("bif,ihf->bih", x, self.W if W_in is None else W_in)
    return torch.einsum("bih,ihf->bif", hidden.relu() if relu else hidden, self.W)


@known_mistakes(
    with_forwards(
        SmallToy,
        {
            "the relu comes before the bias.": lambda self, x: through(self, x).relu() + self.b,
            "the relu is missing.": lambda self, x: through(self, x) + self.b,
            "the bias is missing.": lambda self, x: through(self, x).relu(),
            "the bias is subtracted.": lambda self, x: (through(self, x) - self.b).relu(),
            "the hidden layer has a relu, too.": lambda self, x: (through(self, x, relu=True) + self.b).relu(),
            "`W` is reshaped where it has to be transposed.": lambda self, x: (
                through(self, x, W_in=self.W.reshape(len(self.W), -1, self.W.shape[1]).mT) + self.b
            ).relu(),
            "every instance reads with the matrix of instance 0.": lambda self, x: (
                through(self, x, W_in=self.W[:1].expand_as(self.W)) + self.b
            ).relu(),
            "the instances are added up in the hidden layer.": lambda self, x: (
                torch.einsum("bif,ihf,jhg->bjg", x, self.W, self.W) + self.b
            ).relu(),
            "each feature is read out alone; the hidden layer holds the sum of all.": lambda self, x: (
                x * self.W.square().sum(1) + self.b
            ).relu(),
        },
    )
)
def check_ToyModel(cls: Any) -> None:
    """Three instances of seven features in two dimensions, with random weights and biases."""
    side_by_side("ToyModel", cls, (3, 7, 2), {"W": (3, 2, 7), "b": (3, 7)}, one_toy)


# ----------------------------------------------------------------------------------------- importance_weighted_loss


def weighing(
    error: Callable[[Tensor, Tensor], Tensor] = lambda difference, weight: weight * difference.square(),
    total: Callable[[Tensor], Tensor] = lambda error: error.mean((0, 2)).sum(),
) -> Fn:
    """The loss with another error of each feature, or summed up otherwise."""

    def importance_weighted_loss(reconstruction: Tensor, x: Tensor, importance: Tensor) -> Tensor:
        return total(error(reconstruction - x, importance))

    return importance_weighted_loss


@known_mistakes(
    {
        "it is the mean over the instances, so that each one's gradient depends on how many there are.": weighing(
            total=lambda error: error.mean()
        ),
        "features are added up; take their mean.": weighing(total=lambda error: error.mean(0).sum()),
        "the batch is added up; take its mean.": weighing(total=lambda error: error.mean(2).sum()),
        "the importance is squared, too: it multiplies the error before the square.": weighing(
            lambda difference, weight: (weight * difference).square()
        ),
        "the importance goes with the instances; its last axis is that of the features.": weighing(
            lambda difference, weight: (
                (weight[:, None] if weight.dim() == 1 else weight.T) * difference.square()
                if difference.shape[1] == difference.shape[2]
                else weight * difference.square()
            )
        ),
        "all features count the same; `importance` is not used.": weighing(
            lambda difference, weight: difference.square()
        ),
        "the errors are not squared.": weighing(lambda difference, weight: weight * difference.abs()),
        "the errors are divided by their importance.": weighing(
            lambda difference, weight: difference.square() / weight
        ),
        "the weights are scaled to a sum of 1.": weighing(
            lambda difference, weight: weight / weight.sum(-1, keepdim=True) * difference.square()
        ),
        "it is the root of the mean square.": weighing(total=lambda error: error.mean((0, 2)).sqrt().sum()),
    }
)
def check_importance_weighted_loss(fn: Fn) -> None:
    """Importances of features, of instances and features, and as many instances as features."""
    name = "importance_weighted_loss"
    cases = {"of shape [feature]": (5, 3, 4, False), "of shape [instance, feature]": (4, 2, 3, True)}
    cases |= {"of shape [feature], four instances": (3, 4, 4, False), "of shape [4, 4]": (2, 4, 4, True)}
    for what, (n_batch, n_instances, n_features, each) in cases.items():
        x, out = (noise(n_batch, n_instances, n_features, seed=seed) for seed in (1, 2))
        importance = noise(*([n_instances] if each else []), n_features, seed=3).abs() + 0.3
        total = torch.zeros(())
        for i in range(n_instances):
            for f in range(n_features):
                weight = importance[i, f] if each else importance[f]
                total = total + weight * (out[:, i, f] - x[:, i, f]).square().sum()
        expected = total / (n_batch * n_features)
        compare(f"{name} with importance {what}", fn(out, x, importance), expected, "")
    follows_input(name, fn, (out, x, importance), "")
    carries_gradient(name, lambda reconstruction: fn(reconstruction, x, importance), (out,))


# --------------------------------------------------------------------------------------------------------- train_toy


class Scaled(nn.Module):
    """A model of two parameters, nothing like a toy model: the loop must not know what it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(noise(3, seed=5) + 1.5)
        self.shift = nn.Parameter(noise(2, 1, seed=6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def asymmetric(out: Tensor, x: Tensor) -> Tensor:
    """A loss that is another one if its arguments are exchanged."""
    return (out - 2 * x).square().mean() + 0.1 * out.abs().mean()


def rate_of(step: int, steps: int, peak: float, ahead: int = 0, warmup: int | None = None) -> float:
    """Chapter 03's schedule, for a floor of 0."""
    warmup, step = steps // 20 if warmup is None else warmup, step + ahead
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / (steps - warmup))
    return peak * (1 + math.cos(math.pi * share)) / 2


def training(
    rate: Callable[[int, int, float], float] = rate_of,
    decay: Callable[[float], float] = lambda weight_decay: weight_decay,
    loss: Callable[[Fn, Fn, Tensor], Tensor] = lambda loss_of, model, x: loss_of(model(x), x),
    betas: tuple[float, float] = (0.9, 0.999),
    **wrong: Any,
) -> Fn:
    """The loop with switches for what people get wrong."""

    def train_toy(model: Any, draw: Fn, loss_of: Fn, steps: int, peak: float, weight_decay: float = 0.0) -> list[float]:
        names = [name for name, _ in model.named_parameters()]
        parameters = dict(model.named_parameters())
        batches = [draw() for _ in range(1 if wrong.get("one_batch") else steps)]
        total = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}

        def value(current: dict[str, Tensor], step: int) -> Tensor:
            run = partial(torch.func.functional_call, model, current)
            now = loss(loss_of, lambda x: run((x,)), batches[0 if wrong.get("one_batch") else step])
            if wrong.get("adds_up"):
                for name, grad in zip(names, torch.autograd.grad(now, list(current.values())), strict=True):
                    total[name] += grad
                return now.detach() + sum((total[n] * (current[n] - current[n].detach())).sum() for n in names)
            if wrong.get("goes_on") and step == 0:
                return now + sum((total[n] * (current[n] - current[n].detach())).sum() for n in names)
            if wrong.get("coupled"):
                penalty = sum(tensor.square().sum() for tensor in current.values()) * weight_decay / 2
                return now + penalty - penalty.detach()
            return now

        after, losses = by_hand(
            parameters, value, steps, lambda step: rate(step, steps, peak), decay(weight_decay), betas
        )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(after[name])
        if wrong.get("afterwards"):
            losses = [*losses[1:], loss_of(model(batches[-1]), batches[-1]).item()]
        return losses

    return train_toy


@may_change("model")
@known_mistakes(
    {
        "gradients of earlier steps are still there and are added to: `zero_grad` is missing.": training(adds_up=True),
        "the gradient that the model had before is added to that of the first batch: `zero_grad` comes too late.": (
            training(goes_on=True)
        ),
        "the learning rate stays at the peak.": training(rate=lambda step, steps, peak: peak),
        "there is no warm-up of steps // 20 steps.": training(rate=partial(rate_of, warmup=0)),
        "the schedule is one step ahead: the first step is number 0.": training(rate=partial(rate_of, ahead=1)),
        "the learning rate is set after the step, so that each step has the rate of the one before.": training(
            rate=lambda step, steps, peak: 1e-3 if step == 0 else rate_of(step - 1, steps, peak)
        ),
        "the weight decay is not used.": training(decay=lambda weight_decay: 0.0),
        "the weight decay is always AdamW's default, 0.01.": training(decay=lambda weight_decay: 0.01),
        "the weight decay goes through the gradient, as in Adam; AdamW's is apart from it.": training(
            coupled=True, decay=lambda weight_decay: 0.0
        ),
        "the arguments of `loss_of` are exchanged: first the output, then x.": training(
            loss=lambda loss_of, model, x: loss_of(x, model(x))
        ),
        "one batch is drawn, and used at every step.": training(one_batch=True),
        "the losses are measured after each step.": training(afterwards=True),
        "the betas are (0.9, 0.98).": training(betas=(0.9, 0.98)),
    }
)
def check_train_toy(fn: Fn) -> None:
    """Few steps without a warm-up; more, with a warm-up; and with weight decay, from a model that has gradients."""
    name = "train_toy"
    for steps, peak, decay in ((3, 0.05, 0.0), (39, 0.03, 0.0), (41, 0.03, 0.2)):
        batches = [noise(4, 2, 3, seed=10 + step) for step in range(steps)]
        model, left = Scaled(), list(batches)
        for parameter in model.parameters():
            parameter.grad = 5 * torch.ones_like(parameter) if decay else None
        drawn: list[int] = []

        def draw(left: list[Tensor] = left, drawn: list[int] = drawn) -> Tensor:
            drawn.append(len(drawn))
            return left[min(len(drawn), len(left)) - 1].clone()

        def value(current: dict[str, Tensor], step: int, batches: list[Tensor] = batches) -> Tensor:
            return asymmetric(batches[step] * current["scale"] + current["shift"], batches[step])

        rate = partial(rate_of, steps=steps, peak=peak)
        after, expected = by_hand(dict(model.named_parameters()), value, steps, rate, decay)
        where = f"{name} in {steps} steps" + (f" with weight_decay={decay}" if decay else "")
        losses = fn(model, draw, asymmetric, steps, peak, decay) if decay else fn(model, draw, asymmetric, steps, peak)
        if not isinstance(losses, list) or not all(type(loss) is float for loss in losses):
            kind = "None" if losses is None else f"a {type(losses).__name__}"
            raise CheckFailed(
                f"{where}: expected a list of plain numbers, got {kind}.\n  Next: collect `loss.item()` of every step."
            )
        compare(f"{where}: the losses", torch.tensor(losses), torch.tensor(expected), "step")
        for label, parameter in sorted(model.named_parameters()):
            axes = "row column" if parameter.dim() == 2 else "feature"
            compare(f"{where}: `{label}`", parameter.detach(), after[label], axes)
        if len(drawn) != steps:
            raise CheckFailed(f"{where}: `draw` was called {len(drawn)} times.\n  Next: one batch for every step.")
