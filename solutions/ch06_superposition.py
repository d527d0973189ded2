"""Chapter 06: more features than dimensions, and dictionaries that take them apart again."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
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
    """Compute with features in superposition: an MLP that is to return |x|, y = relu(W_out relu(W_in x) + b).

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


# ------------------------------------------------------------------------------------------------------ dictionaries


def relu_latents(pre: Float[Tensor, "batch *instance latent"]) -> Float[Tensor, "batch *instance latent"]:
    """The latents of a plain sparse autoencoder: a positive pre-activation counts, a negative one is 0.

    Source: Bricken et al. 2023, "Sparse Autoencoder Setup"; Cunningham et al. 2023, section 2.
    """
    return pre.relu()


def topk_latents(pre: Float[Tensor, "batch *instance latent"], k: int) -> Float[Tensor, "batch *instance latent"]:
    """Keep the k largest pre-activations of each row; all others become 0.

    A row is one sample of one instance. A negative pre-activation becomes 0 even if it is among the k largest, so a
    row may keep fewer than k. If there are no more than k latents, all of them are kept. The gradient flows through
    what is kept, and nowhere else.
    Source: Gao et al. 2024, section 2.3; they, too, put a ReLU behind the k largest.
    """
    largest = pre.topk(min(k, pre.shape[-1]), dim=-1)
    return torch.zeros_like(pre).scatter_(-1, largest.indices, largest.values.relu())


def batch_topk_latents(
    pre: Float[Tensor, "batch *instance latent"], k: int | float
) -> tuple[Float[Tensor, "batch *instance latent"], Float[Tensor, "*instance"]]:
    """Keep the largest pre-activations of the whole batch, k for each sample on average; all others become 0.

    Of each instance, the n = round(k * batch) largest pre-activations are kept, wherever in the batch they are: one
    sample may have many and another none. `k` need not be a whole number. If there are no more than n in all, all of
    them are kept. Negative ones become 0, as in `topk_latents`.
    Also returns the threshold of each instance: the smallest pre-activation that was kept, or 0 if that is negative.
    It is what a sample needs that comes alone, without a batch to compare it with. No gradient flows through it.
    Source: Bussmann et al. 2024, section 3; their threshold is its mean over many batches.
    """
    flat = einops.rearrange(pre, "batch ... latent -> ... (batch latent)")
    n_kept = min(round(k * len(pre)), flat.shape[-1])
    largest = flat.topk(n_kept, dim=-1)
    kept = torch.zeros_like(flat).scatter(-1, largest.indices, largest.values.relu())
    latents = einops.rearrange(kept, "... (batch latent) -> batch ... latent", batch=len(pre))
    return latents, largest.values[..., -1].relu().detach()


def gated_latents(
    projected: Float[Tensor, "batch *instance latent"],
    b_gate: Float[Tensor, "*instance latent"],
    r_mag: Float[Tensor, "*instance latent"],
    b_mag: Float[Tensor, "*instance latent"],
) -> tuple[Float[Tensor, "batch *instance latent"], Float[Tensor, "batch *instance latent"]]:
    """Decide with one affine function whether a latent is active, and with another how active it is.

    `projected` is the input (less the decoder bias) times the encoder's weights, which both share. The gate is
    projected + b_gate. The magnitude is relu(exp(r_mag) * projected + b_mag): the same weights, stretched by a factor
    of each latent's own. A latent is its magnitude if its gate is above 0, otherwise 0. Returns (latents, gate); the
    gate as it is, positive or not, for the losses.
    Source: Rajamanoharan et al. 2024a, section 3.2.
    """
    gate = projected + b_gate
    magnitude = (projected * r_mag.exp() + b_mag).relu()
    return torch.where(gate > 0, magnitude, 0.0), gate


def gated_auxiliary_loss(
    x: Float[Tensor, "batch *instance d_in"],
    gate: Float[Tensor, "batch *instance latent"],
    W_dec: Float[Tensor, "*instance latent d_in"],
    b_dec: Float[Tensor, "*instance d_in"],
) -> Float[Tensor, "*instance"]:
    """How badly the open gates alone reconstruct the input: what teaches the gates which latents are needed.

    Reconstruct x from relu(gate) as the decoder does, with relu(gate) W_dec + b_dec, and take the squared error: summed
    over d_in, averaged over the batch, for each instance. The gradient reaches the gate, but neither W_dec nor b_dec:
    here they are constants.
    Source: Rajamanoharan et al. 2024a, section 3.2.
    """
    weights, bias = W_dec.detach(), b_dec.detach()
    reconstruction = einops.einsum(gate.relu(), weights, "... latent, ... latent d_in -> ... d_in") + bias
    return (x - reconstruction).square().sum(dim=-1).mean(dim=0)


class Heaviside(torch.autograd.Function):
    """A step: 1 if a pre-activation is above its threshold, otherwise 0, with a gradient that is made up.

    `Heaviside.apply(pre, threshold, bandwidth)`, with pre [batch *instance latent], threshold [*instance latent] and a
    number for the bandwidth, has the dtype of pre. The true gradient is 0 everywhere, which teaches nothing. Backward
    pretends that the step is a ramp from threshold - bandwidth/2 to threshold + bandwidth/2, for the threshold alone:

        d/d threshold = -1/bandwidth if |pre - threshold| < bandwidth/2, otherwise 0

    times the gradient that comes from above, summed over the batch. `pre` and `bandwidth` get None.
    Source: Rajamanoharan et al. 2024b, section 4 and appendix J (a rectangle as kernel).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """The step; keep in `ctx` what backward needs."""
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        """The gradients of the three arguments of forward, in their order."""
        pre, threshold = ctx.saved_tensors
        is_near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, (-grad * is_near / ctx.bandwidth).sum(dim=0), None


class JumpReLU(torch.autograd.Function):
    """A ReLU with a jump: a pre-activation passes unchanged if it is above its threshold; otherwise 0 comes out.

    `JumpReLU.apply(pre, threshold, bandwidth)`, with shapes as for `Heaviside`. The gradient of `pre` is the true one:
    1 above the threshold, 0 elsewhere. The gradient of the threshold is made up as in `Heaviside`: the jump is as high
    as the threshold, so it is

        d/d threshold = -threshold/bandwidth if |pre - threshold| < bandwidth/2, otherwise 0

    times the gradient that comes from above, summed over the batch. `bandwidth` gets None.
    Source: Rajamanoharan et al. 2024b, section 4 and appendix J.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        """What passes; keep in `ctx` what backward needs."""
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of the three arguments of forward, in their order."""
        pre, threshold = ctx.saved_tensors
        is_near = (pre - threshold).abs() < ctx.bandwidth / 2
        return grad * (pre > threshold), (-grad * is_near * threshold / ctx.bandwidth).sum(dim=0), None


class SparseAutoencoder(nn.Module):
    """Latents that an input is written with, few at a time, and the directions that they stand for.

    `kind` is "relu", "topk", "batch_topk", "gated" or "jumprelu"; `k` belongs to the second and the third,
    the `bandwidth` and the first `threshold` to the last. Rows of `W_dec` are the directions. With `n_instances`,
    that many autoencoders are trained side by side, each with weights of its own: every parameter gets an axis
    `instance` in front, and every input and output has one behind the batch.

    - pre-activations: (x - b_dec) W_enc + b_enc
    - latents: what `activate` makes of the pre-activations
    - reconstruction: latents W_dec + b_dec

    The decoder bias is subtracted before and added after, so that x is seen from the same origin on both sides.
    """

    def __init__(  # given
        self,
        d_in: int,
        d_sae: int,
        kind: str,
        n_instances: int | None = None,
        k: int | float = 1,
        threshold: float = 0.1,
        bandwidth: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        kinds = ("relu", "topk", "batch_topk", "gated", "jumprelu")
        if kind not in kinds:
            raise ValueError(f"SparseAutoencoder: there is no kind {kind!r}; choose one of {', '.join(kinds)}.")
        self.kind, self.k, self.bandwidth = kind, k, bandwidth
        instances = () if n_instances is None else (n_instances,)
        directions = normalise_decoder(torch.randn(*instances, d_sae, d_in, generator=generator))
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.transpose(-1, -2).clone())
        self.b_enc = nn.Parameter(torch.zeros(*instances, d_sae))
        self.b_dec = nn.Parameter(torch.zeros(*instances, d_in))
        if kind == "gated":
            self.r_mag = nn.Parameter(torch.zeros(*instances, d_sae))
            self.b_mag = nn.Parameter(torch.zeros(*instances, d_sae))
        if kind == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((*instances, d_sae), math.log(threshold)))
        if kind == "batch_topk":
            self.register_buffer("threshold", torch.zeros(instances))

    def activate(  # given
        self, pre: Float[Tensor, "batch *instance latent"]
    ) -> Float[Tensor, "batch *instance latent"]:
        """What the kind makes of the pre-activations. Batch top-k alone behaves differently in evaluation mode."""
        if self.kind == "topk":
            return topk_latents(pre, int(self.k))
        if self.kind == "batch_topk" and self.training:
            latents, threshold = batch_topk_latents(pre, self.k)
            self.threshold.lerp_(threshold, 0.02)  # its mean over the last batches, about fifty
            return latents
        if self.kind == "batch_topk":
            return pre * (pre > self.threshold[..., None])
        if self.kind == "gated":
            return gated_latents(pre - self.b_enc, self.b_enc, self.r_mag, self.b_mag)[0]
        if self.kind == "jumprelu":
            return JumpReLU.apply(pre, self.log_threshold.exp(), self.bandwidth)
        return relu_latents(pre)

    def pre_activations(self, x: Float[Tensor, "batch *instance d_in"]) -> Float[Tensor, "batch *instance latent"]:
        """How much of each latent's direction is found in the input, before anything is cut off."""
        return einops.einsum(x - self.b_dec, self.W_enc, "... d_in, ... d_in latent -> ... latent") + self.b_enc

    def encode(self, x: Float[Tensor, "batch *instance d_in"]) -> Float[Tensor, "batch *instance latent"]:
        """The latents of an input."""
        return self.activate(self.pre_activations(x))

    def decode(self, latents: Float[Tensor, "batch *instance latent"]) -> Float[Tensor, "batch *instance d_in"]:
        """The input that these latents stand for."""
        return einops.einsum(latents, self.W_dec, "... latent, ... latent d_in -> ... d_in") + self.b_dec

    def forward(
        self, x: Float[Tensor, "batch *instance d_in"]
    ) -> tuple[Float[Tensor, "batch *instance d_in"], Float[Tensor, "batch *instance latent"]]:
        """The pair (reconstruction, latents)."""
        latents = self.encode(x)
        return self.decode(latents), latents


def sae_loss(
    x: Float[Tensor, "batch *instance d_in"],
    reconstruction: Float[Tensor, "batch *instance d_in"],
    latents: Float[Tensor, "batch *instance latent"],
    W_dec: Float[Tensor, "*instance latent d_in"],
    sparsity: int | float | Float[Tensor, "*instance"],
    active: Float[Tensor, "batch *instance latent"] | None = None,
) -> dict[str, Tensor]:
    """What a sparse autoencoder minimises, and the parts that it is made of.

    - "reconstruction", for each instance: the squared error, summed over d_in and averaged over the batch.
    - "sparsity", for each instance: the sum of the latents, each times the norm of its decoder row, averaged over the
      batch (L1). With the norms it cannot be made smaller by shrinking latents and stretching rows. Latents are never
      negative. If there is `active` (1 for each latent that fires, 0 for the others), the mean number of active latents
      (L0) takes its place.
    - "total", one number: reconstruction + `sparsity` times the sparsity, summed over the instances. As a sum, it gives
      each instance the gradient that it would have alone. `sparsity` is a number, or one for each instance.

    Source: Conerly et al. 2024 (decoder norms); Rajamanoharan et al. 2024b (L0).
    """
    error = (x - reconstruction).square().sum(dim=-1).mean(dim=0)
    counted = latents * W_dec.norm(dim=-1) if active is None else active
    amount = counted.sum(dim=-1).mean(dim=0)
    return {"reconstruction": error, "sparsity": amount, "total": (error + sparsity * amount).sum()}


def normalise_decoder(W_dec: Float[Tensor, "*instance latent d_in"]) -> Float[Tensor, "*instance latent d_in"]:
    """The same directions, each with a norm of 1. A row of zeros stays as it is."""
    norm = W_dec.norm(dim=-1, keepdim=True)
    return W_dec / norm.where(norm > 0, 1.0)


def remove_parallel_gradient(
    W_dec: Float[Tensor, "*instance latent d_in"], grad: Float[Tensor, "*instance latent d_in"]
) -> Float[Tensor, "*instance latent d_in"]:
    """The gradient without its part along each decoder row, which would only change the row's norm.

    Rows of `W_dec` may have any norm. For a row of zeros the gradient stays as it is.
    Source: Bricken et al. 2023, "Sparse Autoencoder Setup" (advice for training).
    """
    direction = normalise_decoder(W_dec)
    return grad - (grad * direction).sum(dim=-1, keepdim=True) * direction


# ------------------------------------------------------------------------------------------------------- dead latents


def auxiliary_topk_loss(
    x: Float[Tensor, "batch *instance d_in"],
    reconstruction: Float[Tensor, "batch *instance d_in"],
    pre: Float[Tensor, "batch *instance latent"],
    dead: Bool[Tensor, "*instance latent"],
    W_dec: Float[Tensor, "*instance latent d_in"],
    k: int,
) -> Float[Tensor, "*instance"]:
    """How badly the dead latents explain what the living ones leave over: a gradient for latents that never fire.

    The target is the error x - reconstruction, as a constant. Of the dead latents alone, the k largest pre-activations
    of each row become latents (`topk_latents`), and these times `W_dec`, without a bias, are the guess at the error.
    The loss is its squared difference from the target, summed over d_in and averaged over the batch, for each instance.
    It is 0 for an instance in which no latent is dead. If fewer than k are dead, all of those count.
    Source: Gao et al. 2024, appendix A.2.
    """
    error = (x - reconstruction).detach()
    latents = topk_latents(pre.where(dead, -torch.inf), k)
    guess = einops.einsum(latents, W_dec, "... latent, ... latent d_in -> ... d_in")
    return (error - guess).square().sum(dim=-1).mean(dim=0) * dead.any(dim=-1)


def pick_worst(
    x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"], n: int, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Draw n rows of a batch, badly reconstructed ones with preference; return their indices.

    The loss of a row is its squared error, summed over d_in. A row is drawn with a probability in proportion to the
    *square* of its loss. The draws are independent, so a row may come several times. All random numbers come from
    `generator`, which may be on another device than x.
    Source: Bricken et al. 2023, "Neuron Resampling".
    """
    loss = (x - reconstruction).square().sum(dim=-1)
    chances = loss.square().to(generator.device)
    return torch.multinomial(chances, n, replacement=True, generator=generator).to(x.device)


@torch.no_grad()
def resample_dead(
    sae: Any, optimizer: Any, dead: Bool[Tensor, "*instance latent"], directions: Float[Tensor, "*instance latent d_in"]
) -> None:
    """Give every dead latent a new start, in place, in the direction that `directions` has at its place.

    For the dead latents of `sae`, and for no other:

    - the row of `W_dec` becomes the direction, with a norm of 1;
    - the column of `W_enc` becomes the same direction, with 0.2 times the mean norm that the columns of the living
      latents of its instance have (if none is alive, that mean counts as 1): small, so that it disturbs little;
    - `b_enc` becomes 0;
    - in the optimizer, everything that is remembered of these numbers becomes 0: every tensor in
      `optimizer.state[parameter]` that has the parameter's shape (torch's Adam: "exp_avg", "exp_avg_sq"; chapter 03's
      AdamW: "m", "v").

    All other parameters stay. Rows of `directions` that belong to living latents are not used.
    Source: Bricken et al. 2023, "Neuron Resampling".
    """
    unit = normalise_decoder(directions)
    alive = ~dead
    norms = sae.W_enc.norm(dim=-2)
    mean = (norms * alive).sum(dim=-1) / alive.sum(dim=-1).clamp(min=1)
    length = 0.2 * mean.where(alive.any(dim=-1), 1.0)[..., None, None]
    new = {
        sae.W_dec: (dead[..., :, None], unit),
        sae.W_enc: (dead[..., None, :], length * unit.transpose(-1, -2)),
        sae.b_enc: (dead, torch.zeros_like(sae.b_enc)),
    }
    for parameter, (where, value) in new.items():
        parameter.copy_(value.where(where, parameter))
        for remembered in optimizer.state[parameter].values():
            if isinstance(remembered, Tensor) and remembered.shape == parameter.shape:
                remembered.masked_fill_(where, 0.0)


# ------------------------------------------------------------------------------------------------ judged by the truth


def best_assignment(gain: Float[Tensor, "row column"]) -> Int[Tensor, " row"]:
    """Give each row a column of its own so that the gains add up to as much as possible; return the columns.

    No column is given twice; some may be left over. Taking the largest gain first is not optimal: it may force another
    row to take a bad column. Trying every assignment is no way either: forty rows and eighty columns should take about
    a second. Raises ValueError if there are more rows than columns.
    Source: Kuhn 1955 (the Hungarian method), as a search for the best chain of exchanges.
    """
    n_rows, n_columns = gain.shape
    if n_rows > n_columns:
        raise ValueError(f"best_assignment: {n_rows} rows cannot have a column each, there are only {n_columns}.")
    table = gain.detach().double().cpu()
    owner = [-1] * n_columns
    for row in range(n_rows):
        # What the row and a chain of exchanges gain in all if the chain ends at a column, and the column before it.
        reached, via = table[row].clone(), [-1] * n_columns
        improved = True
        while improved:
            improved = False
            for column in (column for column in range(n_columns) if owner[column] >= 0):
                onwards = reached[column] - table[owner[column], column] + table[owner[column]]
                for other in (onwards > reached + 1e-9).nonzero().flatten().tolist():
                    reached[other], via[other], improved = onwards[other], column, True
        is_taken = torch.tensor([who >= 0 for who in owner])
        column = int(reached.masked_fill(is_taken, -torch.inf).argmax())
        while via[column] >= 0:
            owner[column] = owner[via[column]]
            column = via[column]
        owner[column] = row
    return torch.tensor([owner.index(row) for row in range(n_rows)], device=gain.device)


def match_features(
    W_dec: Float[Tensor, "latent d_in"], truth: Float[Tensor, "feature d_in"]
) -> tuple[Int[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Which latent stands for which feature, and how well: the assignment with the largest sum of cosines.

    The gain of a pair is the cosine of the decoder row with the feature's direction; neither needs a norm of 1, and a
    row of zeros has a cosine of 0. Each feature gets a latent of its own (`best_assignment`, with its ValueError).
    Returns (the latent of each feature, the cosine of each feature with its latent). No gradient flows.
    """
    cosine = (normalise_decoder(truth) @ normalise_decoder(W_dec).T).detach()
    assignment = best_assignment(cosine)
    return assignment, cosine.gather(-1, assignment[:, None])[:, 0]


def recovery(W_dec: Float[Tensor, "latent d_in"], truth: Float[Tensor, "feature d_in"], threshold: float) -> float:
    """The share of features whose latent (`match_features`) has a cosine above `threshold`, as a plain number."""
    return (match_features(W_dec, truth)[1] > threshold).float().mean().item()


def firing_scores(
    latents: Float[Tensor, "batch latent"],
    features: Float[Tensor, "batch feature"],
    assignment: Int[Tensor, " feature"],
) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Does a latent fire when its feature is there? Returns (precision, recall), both for each feature.

    A latent fires, and a feature is there, if it is above 0. The precision is the share of samples with the feature
    among those in which its latent fires; the recall is the share of samples in which the latent fires among those with
    the feature. A share of no samples counts as 0. Both have the dtype of `latents`.
    """
    fires, there = latents[:, assignment] > 0, features > 0
    both = (fires & there).sum(dim=0).to(latents.dtype)
    return both / fires.sum(dim=0).clamp(min=1), both / there.sum(dim=0).clamp(min=1)


def shrinkage(
    x: Float[Tensor, "batch *instance d_in"], reconstruction: Float[Tensor, "batch *instance d_in"]
) -> Float[Tensor, "*instance"]:
    """The relative reconstruction bias of each instance: below 1 if its reconstructions are too short.

    It is the number γ for which reconstruction/γ is closest to x, in squared error over the batch. Work out where the
    derivative is zero: γ = Σ |reconstruction|² / Σ (reconstruction · x), both sums over the batch. A γ of 0.8 says
    that the reconstructions would fit best if they were 1/0.8 = 1.25 times as long.
    Source: Rajamanoharan et al. 2024a, section 4.2.
    """
    return reconstruction.square().sum(dim=(0, -1)) / (reconstruction * x).sum(dim=(0, -1))


def absorption_rate(
    latents: Float[Tensor, "batch latent"],
    features: Float[Tensor, "batch feature"],
    assignment: Int[Tensor, " feature"],
    parent: Int[Tensor, " feature"],
) -> Float[Tensor, " feature"]:
    """How often a feature's latent fires in the place of its parent's, although the parent is there.

    `parent` holds the parent of each feature, which is there whenever the feature is; -1 if it has none. Of the samples
    in which the feature is there and its latent fires, this is the share in which the parent's latent is silent. 0 for
    a feature without a parent, and if there are no such samples. The result has the dtype of `latents`.
    Source: Chanin et al. 2024, in the simple form that known features allow.
    """
    fires, there = latents[:, assignment] > 0, features > 0
    stands_in = fires & there & (parent >= 0)
    alone = stands_in & ~fires[:, parent]
    return alone.sum(dim=0).to(latents.dtype) / stands_in.sum(dim=0).clamp(min=1)


def matryoshka_loss(
    x: Float[Tensor, "batch *instance d_in"],
    latents: Float[Tensor, "batch *instance latent"],
    W_dec: Float[Tensor, "*instance latent d_in"],
    b_dec: Float[Tensor, "*instance d_in"],
    prefixes: Sequence[int],
) -> Float[Tensor, "*instance"]:
    """The squared error of several nested dictionaries at once: each of the first m latents, for each m in `prefixes`.

    For each m, reconstruct x from the first m latents and the decoder bias alone, and take the squared error, summed
    over d_in and averaged over the batch. The loss of an instance is the sum over `prefixes`.
    Source: Bussmann et al. 2025, section 3.
    """
    losses = []
    for m in prefixes:
        first = einops.einsum(latents[..., :m], W_dec[..., :m, :], "... latent, ... latent d_in -> ... d_in")
        losses.append((x - first - b_dec).square().sum(dim=-1).mean(dim=0))
    return torch.stack(losses).sum(dim=0)
