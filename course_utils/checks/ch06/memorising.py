"""Checks of chapter 06, memorising: training on data that ends, and pushes that grow on their way through a model.

The oracle trains from the learner's own starting point, with Adam spelled out; gains are singular values.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch06.toy_models import by_hand, near
from course_utils.checks.ch06.toys import rate_of
from course_utils.checks.comparing import compare
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.standins.toy_superposition import SmallToy
from course_utils.checks.translating import during

Fn = Callable[..., Any]

# ------------------------------------------------------------------------------------------------ train_on_fixed_data

SAMPLES = "sample instance feature"


def squared_error(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The loss of all instances, with importance 1."""
    W, b = weights["W"], weights["b"]
    out = (torch.einsum("bif,ihf,ihg->big", x, W, W) + b).relu()
    return (out - x).square().mean((0, 2)).sum()


def fixed_data(
    scaled: Callable[[Tensor], Tensor] = lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12),
    active: Callable[[float], float] = lambda probability: probability,
    most: int = 300,
    peak: float = 0.02,
    decay: float = 0.01,
    **wrong: Any,
) -> Fn:
    """Training on samples that are drawn, scaled or used otherwise."""

    def train_on_fixed_data(
        n_samples: int,
        n_instances: int,
        n_features: int,
        d_hidden: int,
        probability: float,
        steps: int,
        generator: torch.Generator,
    ) -> Any:
        def new(n: int) -> Tensor:
            shape = (n, 1 if wrong.get("shared") else n_instances, n_features)
            values, chances = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
            return scaled(values * (chances < active(probability))).expand(n, n_instances, n_features).clone()

        samples = new(n_samples)
        model = SmallToy(n_instances, n_features, d_hidden, generator)
        batches = [new(n_samples) for _ in range(steps)] if wrong.get("fresh") else None
        drawn = torch.randint(n_samples, (max(steps, 1), most), generator=generator)
        rows = wrong.get("rows", lambda drawn: drawn)(drawn)

        def loss_of(weights: dict[str, Tensor], step: int) -> Tensor:
            if batches:
                return squared_error(weights, batches[step])
            return squared_error(weights, samples if n_samples <= most else samples[rows[step]])

        after, _ = by_hand(
            dict(model.named_parameters()), loss_of, steps, lambda step: rate_of(step, steps, peak), decay
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(after[name])
        return model, samples

    return train_on_fixed_data


@known_mistakes(
    {
        "the samples are not divided by their length.": fixed_data(scaled=lambda x: x),
        "a sample in which nothing is active gives NaN: it is divided by its length of 0.": fixed_data(
            scaled=lambda x: x / x.norm(dim=-1, keepdim=True)
        ),
        "the samples are divided by their sum; their length is the root of the sum of squares.": fixed_data(
            scaled=lambda x: x / x.sum(-1, keepdim=True).clamp(min=1e-12)
        ),
        "the samples of all instances are divided by one length.": fixed_data(
            scaled=lambda x: x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        ),
        "each feature is divided by its length over all samples; divide each sample by its own.": fixed_data(
            scaled=lambda x: x / x.norm(dim=0, keepdim=True).clamp(min=1e-12)
        ),
        "all instances have the same samples; each has its own.": fixed_data(shared=True),
        "features are active with 1 - probability.": fixed_data(active=lambda probability: 1 - probability),
        "new samples are drawn at every step: this data has no end.": fixed_data(fresh=True),
        "there is no weight decay.": fixed_data(decay=0.0),
        "the peak of the learning rate is 0.01; it is 0.02.": fixed_data(peak=0.01),
    }
)
def check_train_on_fixed_data(fn: Fn) -> None:
    """The samples; then the training, from where it began, with as many samples as fit into a batch and one more."""
    name = "train_on_fixed_data"
    _, samples = _made(name, fn, 300, 0)
    compare(f"{name}: the length of the samples", samples.norm(dim=-1), (samples != 0).any(-1).float(), SAMPLES[:15])
    share, advice = (samples > 0).float().mean(0), "draw them with sample_features."
    near(name, "how often a feature is active", share, torch.full((2, 6), 0.3), 0.14, "instance feature", advice)
    if torch.equal(samples[:, 0], samples[:, 1]):
        raise CheckFailed(
            f"{name}: two instances have the same samples.",
            evidence=Evidence(f"{name}: the same samples", True),
            advice="  Next: draw for every instance.",
        )
    for n_samples, steps in ((4, 21), (300, 2)):
        start, samples = _made(name, fn, n_samples, 0)
        model, again = _made(name, fn, n_samples, steps)
        if not torch.equal(samples, again):
            raise CheckFailed(
                f"{name}: the same seed gave other samples when there were more steps.\n  {_call(n_samples, steps)}\n"
                "  Next: draw the samples first, once, and take every random number from `generator`."
            )
        after = _after(start, samples, steps)
        for label, axes in (("W", "instance d_hidden feature"), ("b", "instance feature")):
            got = getattr(model, label).detach()
            try:
                compare(f"{name} in {steps} steps on {n_samples} samples: `{label}`", got, after[label], axes)
            except CheckFailed as failure:
                failure.evidence = _training_of(name, got, label, start, samples, steps) or failure.evidence
                raise
    start, samples = _made(name, fn, 301, 0)
    model, _ = _made(name, fn, 301, 4)
    not_drawn = {
        "it was not trained": start.W.detach(),
        "every step saw all": _after(start, samples, 4)["W"],
        "every step saw the first 300": _after(start, samples[:300], 4)["W"],
    }
    for wrong, W in not_drawn.items():
        if torch.allclose(model.W, W, rtol=1e-5, atol=1e-6):
            raise CheckFailed(
                f"{name} on 301 samples: {wrong}.\n  {_call(301, 4)}\n"
                "  Next: if there are more than 300, draw 300 rows for each step."
            )
    states = []
    for steps in (4, 5):
        generator = torch.Generator().manual_seed(7)
        fn(301, 2, 6, 3, 0.3, steps, generator)
        states.append(generator.get_state())
    if torch.equal(*states):
        raise CheckFailed(
            f"{name} on 301 samples: a step more draws no more random numbers.\n  {_call(301, 5)}\n"
            "  Next: draw 300 rows anew at each step, from `generator`."
        )


def _call(n_samples: int, steps: int) -> str:
    return f"train_on_fixed_data({n_samples}, 2, 6, 3, 0.3, {steps}, generator)"


def _training_of(name: str, got: Tensor, label: str, start: nn.Module, samples: Tensor, steps: int) -> Evidence | None:
    """Which wrong training leads here: samples and model may be drawn in either order, so values alone do not tell."""
    for wrong in ({"decay": 0.0}, {"peak": 0.01}):
        if torch.allclose(got, _after(start, samples, steps, **wrong)[label], rtol=1e-4, atol=1e-5):
            return Evidence(f"{name}: {wrong}", True)
    return None


def _after(start: nn.Module, samples: Tensor, steps: int, peak: float = 0.02, decay: float = 0.01) -> dict[str, Tensor]:
    """Where training on all samples at every step leads from this starting point."""

    def loss_of(weights: dict[str, Tensor], step: int) -> Tensor:
        return squared_error(weights, samples)

    return by_hand(dict(start.named_parameters()), loss_of, steps, partial(rate_of, steps=steps, peak=peak), decay)[0]


def _made(name: str, fn: Fn, n_samples: int, steps: int) -> tuple[Any, Tensor]:
    """What the learner's function returns for two instances of six features in three dimensions, of the right form."""
    call = _call(n_samples, steps)
    with during(call):
        made = fn(n_samples, 2, 6, 3, 0.3, steps, torch.Generator().manual_seed(7))
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        got = "None" if made is None else f"a {type(made).__name__}"
        raise CheckFailed(f"{name}: expected the model and the samples, got {got}.\n  {call}\n  Next: return both.")
    model, samples = made
    if not isinstance(samples, Tensor) or tuple(samples.shape) != (n_samples, 2, 6):
        got = str(tuple(samples.shape)) if isinstance(samples, Tensor) else type(samples).__name__
        raise CheckFailed(
            f"{name}: the samples should have shape ({n_samples}, 2, 6), [sample, instance, feature], got {got}.\n"
            f"  {call}\n  Next: return what sample_features gave, scaled."
        )
    if samples.isnan().any():
        raise CheckFailed(
            f"{name}: some samples are NaN.\n  {call}",
            evidence=Evidence(f"{name}: NaN", True),
            advice="  Next: what is the length of a sample in which nothing is active?",
        )
    return model, samples


# ---------------------------------------------------------------------------------------------------- worst_case_gain


class Stretching(nn.Module):
    """A linear map for each instance, three times as strong where the input's first feature is above 2."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.einsum("bif,igf->big", x, self.A)
        return out * (1 + 2 * (x[..., :1].detach() > 2))


class Squaring(nn.Module):
    """Twice the square of every number: a push away from 0 changes more than one towards it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x**2


def pushing(
    start: Callable[[Tensor, float], Tensor] = lambda push, epsilon: epsilon * push / push.norm(dim=-1, keepdim=True),
    scaled: Callable[[Tensor, float], Tensor] = lambda gradient, epsilon: (
        epsilon * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    ),
    gain: Callable[[Tensor, float], Tensor] = lambda change, epsilon: change.norm(dim=-1).mean(0) / epsilon,
    **wrong: Any,
) -> Fn:
    """The search with other lengths, another direction, or another result."""

    def worst_case_gain(model: Any, x: Tensor, epsilon: float, n_steps: int, generator: torch.Generator) -> Tensor:
        base = x if wrong.get("from_input") else model(x).detach()
        push = start(torch.randn(x.shape, generator=generator), epsilon)
        for _ in range(min(n_steps, 1) if wrong.get("once") else n_steps):
            push = push.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((model(x + push) - base).square().sum(), push)
            still = (gradient == 0).all(-1, keepdim=True) & (not wrong.get("nan"))
            next_push = scaled(-gradient if wrong.get("down") else gradient, epsilon)
            next_push = next_push + push.detach() if wrong.get("added") else next_push
            push = torch.where(still, push.detach(), next_push)
        return gain(model(x + push.detach()).detach() - base, epsilon)

    return worst_case_gain


@known_mistakes(
    {
        "the length of the change is not divided by epsilon.": pushing(
            gain=lambda change, epsilon: change.norm(dim=-1).mean(0)
        ),
        "it is the square of the change, over epsilon.": pushing(
            gain=lambda change, epsilon: change.square().sum(-1).mean(0) / epsilon
        ),
        "it is the largest gain in the batch; take the mean.": pushing(
            gain=lambda change, epsilon: change.norm(dim=-1).amax(0) / epsilon
        ),
        "the output is compared with the input x; compare it with f(x).": pushing(from_input=True),
        "one length is taken of all pushes together; each sample and instance has its own.": pushing(
            scaled=lambda gradient, epsilon: epsilon * gradient / gradient.norm()
        ),
        "one length is taken of the pushes of all instances together.": pushing(
            scaled=lambda gradient, epsilon: epsilon * gradient / gradient.norm(dim=(1, 2), keepdim=True)
        ),
        "the push has a length of 1, and not epsilon.": pushing(
            lambda push, epsilon: push / push.norm(dim=-1, keepdim=True),
            lambda gradient, epsilon: gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30),
        ),
        "the random direction is not scaled to length epsilon.": pushing(start=lambda push, epsilon: push),
        "the random direction has no negative numbers (torch.rand): it points in few of all directions.": pushing(
            start=lambda push, epsilon: epsilon * push.abs() / push.norm(dim=-1, keepdim=True)
        ),
        "where the gradient is 0 it is divided by its length, which gives NaN.": pushing(
            scaled=lambda gradient, epsilon: epsilon * gradient / gradient.norm(dim=-1, keepdim=True), nan=True
        ),
        "there is one step, whatever `n_steps` says.": pushing(once=True),
        "each step is added to the push, which gets longer and longer; it takes the push's place.": pushing(added=True),
        "each step goes against the gradient, to a smaller change.": pushing(down=True),
        "the gradient's sign is taken, which makes a push of another length.": pushing(
            scaled=lambda gradient, epsilon: epsilon * gradient.sign()
        ),
    }
)
def check_worst_case_gain(fn: Fn) -> None:
    """Linear models, whose largest singular value is the gain; one in which the length matters; and no steps at all."""
    name, seed = "worst_case_gain", partial(torch.Generator().manual_seed, 3)
    A = noise(3, 5, 5, seed=1)
    A[1] = 0
    x = noise(4, 3, 5, seed=2).abs()
    x[..., 0] = torch.tensor([1.0, 3.0, 0.5, 4.0])[:, None] + 0.1 * x[..., 0]
    stretch = (1 + 2 * (x[..., 0] > 2)).float().mean(0)
    expected = torch.stack([torch.linalg.matrix_norm(a, 2) for a in A]) * stretch
    compare(f"{name} of linear models", fn(Stretching(A), x, 0.2, 60, seed()), expected, "instance", rtol=2e-3)

    turned = 1.5 * torch.linalg.qr(noise(2, 4, 4, seed=6))[0]
    x = noise(3, 2, 4, seed=7).clamp(max=1.5)
    for n_steps in (0, 1):
        actual = fn(Stretching(turned), x, 0.1, n_steps, seed())
        expected = torch.full((2,), 1.5)
        compare(f"{name} of rotations, with n_steps={n_steps}", actual, expected, "instance", rtol=1e-3)
    flat = torch.ones(1, 4, 4) / 4  # keeps what lies along (1, 1, 1, 1), which is 4 / (3 pi) of a random direction
    actual = fn(Stretching(flat), torch.zeros(500, 1, 4), 0.1, 0, seed())
    advice = "begin with torch.randn, for every sample by itself."
    what = f"{name} of a model that keeps one direction"
    near(what, "the mean gain of random pushes", actual, torch.tensor([4 / 3 / math.pi]), 0.08, "instance", advice)
    x = torch.full((6, 1, 1), 0.3)
    for epsilon in (0.4, 0.5):
        expected = torch.tensor([2 * ((0.3 + epsilon) ** 2 - 0.3**2) / epsilon])
        compare(
            f"{name} of 2 x² at 0.3, with epsilon={epsilon}",
            fn(Squaring(), x, epsilon, 2, seed()),
            expected,
            "instance",
        )
