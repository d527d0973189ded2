"""Chapter 06: more features than dimensions, and dictionaries that take them apart again."""

from collections.abc import Callable
from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from solutions.ch03_training import AdamW, cosine_schedule

# --------------------------------------------------------------------------------------------------------- toy models


def sample_features(
    n_batch: int, probability: Float[Tensor, "instance feature"], generator: torch.Generator
) -> Float[Tensor, "batch instance feature"]:
    """Draw inputs of which we know the features, because each coordinate is one.

    A feature is active with its `probability`, independently of all other features, instances and rows of the batch.
    An active feature has a value drawn uniformly from [0, 1]; the others are 0. Every random number comes from
    `generator`; the result is on its device, and has the dtype of `probability`.
    Source: Elhage et al. 2022, "Demonstrating superposition".
    """
    shape = (n_batch, *probability.shape)
    options: dict[str, Any] = {"device": generator.device, "dtype": probability.dtype}
    values = torch.rand(shape, generator=generator, **options)
    is_active = torch.rand(shape, generator=generator, **options) < probability
    return values * is_active


class ToyModel(nn.Module):
    """Press `n_features` into `d_hidden` dimensions and read them out again: x' = relu(Wᵀ W x + b).

    There are `n_instances` models side by side, which share nothing: instance i has the matrix W[i], of shape
    [d_hidden, feature], and the bias b[i]. Column f of W[i] is the direction in which that model stores feature f. The
    same matrix, transposed, reads the features out. The relu comes last, after the bias.
    Source: Elhage et al. 2022, "The ReLU output model".
    """

    def __init__(self, n_instances: int, n_features: int, d_hidden: int, generator: torch.Generator) -> None:  # given
        super().__init__()
        scale = (2 / (n_features + d_hidden)) ** 0.5
        W = torch.randn(n_instances, d_hidden, n_features, generator=generator, device=generator.device)
        self.W = nn.Parameter(scale * W)
        self.b = nn.Parameter(torch.zeros(n_instances, n_features, device=generator.device))

    def forward(self, x: Float[Tensor, "batch instance feature"]) -> Float[Tensor, "batch instance feature"]:
        """Return the reconstruction x' of each instance's own inputs."""
        hidden = einops.einsum(
            x, self.W, "batch instance feature, instance d_hidden feature -> batch instance d_hidden"
        )
        out = einops.einsum(
            hidden, self.W, "batch instance d_hidden, instance d_hidden feature -> batch instance feature"
        )
        return (out + self.b).relu()


def importance_weighted_loss(
    reconstruction: Float[Tensor, "batch instance feature"],
    x: Float[Tensor, "batch instance feature"],
    importance: Float[Tensor, "..."],
) -> Float[Tensor, ""]:
    """Measure how badly `x` was reconstructed, where some features matter more than others.

    The squared error of each feature is multiplied by its importance, which has the shape [feature], or
    [instance, feature] where instances differ. Then take the mean over the batch and over the features, and the sum
    over the instances: so the gradient of each instance is what it would be if that instance were trained alone.
    Source: Elhage et al. 2022, "Loss", there with the sum over features.
    """
    error = importance * (x - reconstruction).square()
    return einops.reduce(error, "batch instance feature -> instance", "mean").sum()


def train_toy(
    model: nn.Module,
    draw: Callable[[], Float[Tensor, "batch instance feature"]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    peak: float,
    weight_decay: float = 0.0,
) -> list[float]:
    """Train a model, in place, and return the loss of every step, measured before the step changes the weights.

    Every step calls `draw()` once for a batch x, and minimises `loss_of(model(x), x)`, with gradients of this batch
    alone. The optimizer is chapter 03's `AdamW` (or torch's) with betas (0.9, 0.999), eps 1e-8 and `weight_decay`. The
    learning rate of step s, the first of which is 0, is chapter 03's `cosine_schedule(s, steps // 20, steps, peak, 0)`.
    """
    optimizer = AdamW(model.parameters(), weight_decay=weight_decay)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, steps // 20, steps, peak, 0.0)
        x = draw()
        loss = loss_of(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ----------------------------------------------------------------------------------------------------------- geometry


def feature_norms(W: Float[Tensor, "instance d_hidden feature"]) -> Float[Tensor, "instance feature"]:
    """How strongly each feature is stored: the length |W_f| of its direction. 0 means that it is not stored at all."""
    return W.norm(dim=1)


def interference(W: Float[Tensor, "instance d_hidden feature"]) -> Float[Tensor, "instance feature"]:
    """How much the other features of its instance disturb each feature: the sum over g ≠ f of (Ŵ_f · W_g)².

    Ŵ_f is W_f divided by its length. So a feature that is orthogonal to all others has 0. A feature that is not stored,
    with a length of 0, also has 0, not NaN.
    Source: Elhage et al. 2022, "Demonstrating superposition", where this is the colour of each feature's bar.
    """
    dots = einops.einsum(
        nn.functional.normalize(W, dim=1), W, "instance d_hidden f, instance d_hidden g -> instance f g"
    )
    itself = torch.eye(W.shape[-1], dtype=torch.bool, device=W.device)
    return dots.square().masked_fill(itself, 0.0).sum(dim=-1)


def feature_dimensionality(W: Float[Tensor, "instance d_hidden feature"]) -> Float[Tensor, "instance feature"]:
    """Which share of a dimension each feature has: D_f = |W_f|² / Σ_g (Ŵ_f · W_g)², where the sum includes g = f.

    Ŵ_f is W_f divided by its length. A feature that has a dimension to itself gives 1, two features in opposite
    directions give 1/2 each. A feature that is not stored, with a length of 0, has 0, not NaN.
    Source: Elhage et al. 2022, "The geometry of superposition".
    """
    squares = feature_norms(W).square()
    shared = squares + interference(W)
    return torch.where(shared > 0, squares / shared, 0.0)


def losses_by_hand(
    probability: Float[Tensor, " probability"], importance: Float[Tensor, " importance"]
) -> Float[Tensor, "solution importance probability"]:
    """What three ways of keeping two features in one dimension cost, worked out by hand: nothing is trained.

    Both features are drawn as `sample_features` does, with the same `probability`. Feature 0 has importance 1, and
    feature 1 has `importance`. Each probability is combined with each importance. Along the first axis:

    0: feature 0 is stored and comes back perfectly; for feature 1 the model always guesses the mean of feature 1.
    1: the same with the features exchanged.
    2: superposition: W = [1, -1] and b = 0, so that the output is relu(x_0 - x_1) and relu(x_1 - x_0).

    Each is the expected value of `importance_weighted_loss` for one instance: importance times squared error, the mean
    over the two features.
    Source: Elhage et al. 2022, "Superposition as a phase change".
    """
    importance = importance[:, None]
    variance = probability / 3 - probability.square() / 4
    both = probability.square() / 6  # the error is min(x_0, x_1), for either feature
    return torch.stack([importance * variance, variance.expand(len(importance), -1), (1 + importance) * both]) / 2


def phase_diagram(
    W: Float[Tensor, "importance probability copy 1 2"], losses: Float[Tensor, "importance probability copy"]
) -> Int[Tensor, "importance probability"]:
    """Say what models with two features and one dimension have learned, the best of several copies for each case.

    The best copy is the one with the smallest loss. A feature counts as stored if its weight is larger than 0.5 in
    absolute value. The result is

    0: only feature 0 is stored, 1: only feature 1 is stored,
    2: superposition: both are stored, with weights of opposite signs,
    3: anything else (neither is stored, or both with the same sign).
    """
    best = losses.argmin(dim=-1)[..., None, None].expand(*losses.shape[:2], 1, 2)
    weights = W.squeeze(3).gather(2, best).squeeze(2)
    first, second = (weights.abs() > 0.5).unbind(dim=-1)
    is_opposite = weights.prod(dim=-1) < 0
    phase = torch.full(losses.shape[:2], 3, device=W.device)
    return (
        phase.masked_fill(first & ~second, 0)
        .masked_fill(second & ~first, 1)
        .masked_fill(first & second & is_opposite, 2)
    )


def sample_pairs(
    n_batch: int, n_instances: int, n_pairs: int, probability: float, kind: str, generator: torch.Generator
) -> Float[Tensor, "batch instance feature"]:
    """Draw features that come in pairs: features 0 and 1 are partners, then 2 and 3, up to 2 n_pairs features.

    - "correlated": the partners are active together, with `probability`, or both are 0.
    - "anticorrelated": at most one of the partners is active. Each is active with `probability`, so that one of the
      two is in a share of 2 `probability` of the samples.

    In both kinds each feature by itself is active as often as in `sample_features`. Values of active features are drawn
    uniformly from [0, 1], independently of the partner's. Pairs, instances and rows are independent of each other.
    Every random number comes from `generator`; the result is on its device, in float32.
    Raises ValueError for another kind, and for anticorrelated features with a probability above 1/2.
    Source: Elhage et al. 2022, "Correlated features".
    """
    if kind not in ("correlated", "anticorrelated"):
        raise ValueError(f'sample_pairs: kind must be "correlated" or "anticorrelated", got {kind!r}.')
    if kind == "anticorrelated" and probability > 0.5:
        raise ValueError(f"sample_pairs: two features of which one excludes the other cannot both have {probability}.")
    shape, device = (n_batch, n_instances, n_pairs), generator.device
    chance = torch.rand(shape, generator=generator, device=device)
    if kind == "correlated":
        is_active = (chance < probability)[..., None]  # for both of them
    else:
        is_active = torch.stack([chance < probability, chance > 1 - probability], dim=-1)
    values = torch.rand((*shape, 2), generator=generator, device=device)
    return (values * is_active).flatten(-2)


# ------------------------------------------------------------------------------------------------------------ neurons


class NeuronModel(ToyModel):
    """A toy model whose hidden layer consists of neurons: h = relu(W x), x' = relu(Wᵀ h + b).

    Weights and instances are those of `ToyModel`. The relu on the hidden layer has no bias. Row n of W[i] says which
    features neuron n of instance i reads, and writes.
    Source: Elhage et al. 2022, "Superposition in a privileged basis".
    """

    def forward(self, x: Float[Tensor, "batch instance feature"]) -> Float[Tensor, "batch instance feature"]:
        """Return the reconstruction x' of each instance's own inputs."""
        neurons = einops.einsum(
            x, self.W, "batch instance feature, instance neuron feature -> batch instance neuron"
        ).relu()
        out = einops.einsum(neurons, self.W, "batch instance neuron, instance neuron feature -> batch instance feature")
        return (out + self.b).relu()


class AbsModel(nn.Module):
    """Compute with features in superposition: an MLP that shall return |x|, y = relu(W_out relu(W_in x) + b).

    There are `n_instances` models side by side, which share nothing. Instance i has W_in[i] of shape [neuron, feature],
    W_out[i] of shape [feature, neuron] and b[i] of shape [feature]. Reading and writing weights are different matrices
    here: |x| = relu(x) + relu(-x) takes two neurons, which read with opposite signs and write with the same.
    Source: Elhage et al. 2022, "Computation in superposition".
    """

    def __init__(self, n_instances: int, n_features: int, n_neurons: int, generator: torch.Generator) -> None:  # given
        super().__init__()
        scale = (2 / (n_features + n_neurons)) ** 0.5
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        self.W_in = nn.Parameter(scale * torch.randn(n_instances, n_neurons, n_features, **options))
        self.W_out = nn.Parameter(scale * torch.randn(n_instances, n_features, n_neurons, **options))
        self.b = nn.Parameter(torch.zeros(n_instances, n_features, device=generator.device))

    def forward(self, x: Float[Tensor, "batch instance feature"]) -> Float[Tensor, "batch instance feature"]:
        """Return each instance's guess of |x|, for x of either sign."""
        neurons = einops.einsum(
            x, self.W_in, "batch instance feature, instance neuron feature -> batch instance neuron"
        ).relu()
        out = einops.einsum(
            neurons, self.W_out, "batch instance neuron, instance feature neuron -> batch instance feature"
        )
        return (out + self.b).relu()


# --------------------------------------------------------------------------------------------------------- memorising


def train_on_fixed_data(
    n_samples: int,
    n_instances: int,
    n_features: int,
    d_hidden: int,
    probability: float,
    steps: int,
    generator: torch.Generator,
) -> tuple[ToyModel, Float[Tensor, "sample instance feature"]]:
    """Train toy models on a data set that ends, and return the models and their samples.

    Each instance has `n_samples` of its own, drawn once by `sample_features` with `probability` for every feature, and
    then scaled: every sample is divided by its length. A sample in which nothing is active stays 0. The `ToyModel` is
    trained by `train_toy`, in `steps` steps, with `importance_weighted_loss` and importance 1, a peak of 0.02 and a
    weight decay of 0.01. A step sees all samples; if there are more than 300, it sees 300 of them, drawn at random with
    replacement, in all instances the same rows. Every random number comes from `generator`.
    Source: Henighan et al. 2023.
    """
    chances = torch.full((n_instances, n_features), probability, device=generator.device)
    samples = nn.functional.normalize(sample_features(n_samples, chances, generator), dim=-1)
    model = ToyModel(n_instances, n_features, d_hidden, generator)

    def draw() -> Float[Tensor, "batch instance feature"]:
        if n_samples <= 300:
            return samples
        return samples[torch.randint(n_samples, (300,), generator=generator, device=generator.device)]

    importance = torch.ones(n_features, device=generator.device)
    train_toy(model, draw, lambda out, x: importance_weighted_loss(out, x, importance), steps, 0.02, weight_decay=0.01)
    return model, samples


def worst_case_gain(
    model: nn.Module,
    x: Float[Tensor, "batch instance feature"],
    epsilon: float,
    n_steps: int,
    generator: torch.Generator,
) -> Float[Tensor, " instance"]:
    """How many times longer a push on the input can become on its way through a model f, averaged over the batch.

    For each sample and instance look for the push δ of length `epsilon` with the largest |f(x + δ) - f(x)|. Begin with
    a random direction from `generator`, then `n_steps` times replace δ by the gradient of |f(x + δ) - f(x)|² with
    respect to δ, scaled to length `epsilon`; where that gradient is 0, δ stays as it is. The gain is the final
    |f(x + δ) - f(x)| / `epsilon`. A model that passes its input on has a gain of 1. The model's `.grad` stays as it is.
    Source: Elhage et al. 2022, "Superposition and adversarial robustness", there with the loss.
    """
    with torch.no_grad():
        before = model(x)
    push = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    push = epsilon * nn.functional.normalize(push, dim=-1)
    for _ in range(n_steps):
        push.requires_grad_()
        change = (model(x + push) - before).square().sum()
        (gradient,) = torch.autograd.grad(change, push)
        length = gradient.norm(dim=-1, keepdim=True)
        push = torch.where(length > 0, epsilon * gradient / length, push).detach()
    with torch.no_grad():
        return (model(x + push) - before).norm(dim=-1).mean(dim=0) / epsilon
