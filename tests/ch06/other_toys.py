"""The first half of chapter 06 in another style: loops, matrix products, other draws."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def sample_features(n_batch: Any, probability: Any, generator: Any) -> Any:
    rows = []
    for _ in range(n_batch):
        is_active = torch.bernoulli(probability.cpu(), generator=generator).bool()
        values = torch.rand(probability.shape, generator=generator, dtype=probability.dtype)
        rows.append(torch.where(is_active, values, 0.0))
    return torch.stack(rows)


class ToyModel(nn.Module):
    def __init__(self, n_instances: int, n_features: int, d_hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(n_instances, n_features))
        self.W = nn.Parameter(torch.randn(n_instances, d_hidden, n_features, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        there = x.transpose(0, 1) @ self.W.transpose(1, 2)
        return torch.clamp(torch.baddbmm(self.b[:, None], there, self.W), min=0).transpose(0, 1)


class NeuronModel(ToyModel):
    def forward(self, x: Tensor) -> Tensor:
        there = torch.relu(x.transpose(0, 1) @ self.W.transpose(1, 2))
        return torch.relu(there @ self.W + self.b[:, None]).transpose(0, 1)


class AbsModel(nn.Module):
    def __init__(self, n_instances: int, n_features: int, n_neurons: int, generator: torch.Generator) -> None:
        super().__init__()
        self.W_out = nn.Parameter(torch.randn(n_instances, n_features, n_neurons, generator=generator))
        self.W_in = nn.Parameter(torch.randn(n_instances, n_neurons, n_features, generator=generator))
        self.b = nn.Parameter(torch.zeros(n_instances, n_features))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for W_in, W_out, b, inputs in zip(self.W_in, self.W_out, self.b, x.unbind(1), strict=True):
            out.append(torch.relu(nn.functional.linear(torch.relu(inputs @ W_in.T), W_out, b)))
        return torch.stack(out, 1)


def importance_weighted_loss(reconstruction: Any, x: Any, importance: Any) -> Any:
    n_batch, _, n_features = x.shape
    squares = (reconstruction - x) ** 2 * importance
    return squares.sum() / (n_batch * n_features)


def train_toy(model: Any, draw: Any, loss_of: Any, steps: Any, peak: Any, weight_decay: Any = 0.0) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=weight_decay)
    warmup = steps // 20

    def factor(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for _ in range(steps):
        x = draw()
        optimizer.zero_grad()
        loss = loss_of(model(x), x)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
    return losses


def feature_norms(W: Any) -> Any:
    return (W**2).sum(1).sqrt()


def interference(W: Any) -> Any:
    gram = W.mT @ W
    own = gram.diagonal(dim1=-2, dim2=-1)
    others = (gram**2).sum(-1) - own**2
    return torch.where(own > 0, others / torch.where(own > 0, own, 1.0), 0.0)


def feature_dimensionality(W: Any) -> Any:
    gram = W.mT @ W
    own = gram.diagonal(dim1=-2, dim2=-1)
    return torch.nan_to_num(own**2 / (gram**2).sum(-1))


def losses_by_hand(probability: Any, importance: Any) -> Any:
    out = probability.new_zeros(3, len(importance), len(probability))
    for i, weight in enumerate(importance):
        for j, p in enumerate(probability):
            variance = p * (1 - p) * 0.25 + p / 12  # of the mean of the two cases, and within the one
            out[:, i, j] = torch.stack([weight * variance, variance, (1 + weight) * p * p / 6]) / 2
    return out


def phase_diagram(W: Any, losses: Any) -> Any:
    rows = torch.arange(losses.shape[0])[:, None]
    columns = torch.arange(losses.shape[1])
    weights = W[rows, columns, losses.min(dim=-1).indices, 0]
    a, b = weights[..., 0], weights[..., 1]
    size_a, size_b = a.abs() > 0.5, b.abs() > 0.5
    only_b, both = torch.where(size_b & ~size_a, 1, 3), size_a & size_b & (a.sign() != b.sign())
    return torch.where(both, 2, torch.where(size_a & ~size_b, 0, only_b))


def sample_pairs(n_batch: Any, n_instances: Any, n_pairs: Any, probability: Any, kind: Any, generator: Any) -> Any:
    if kind == "correlated":
        active = torch.rand(n_batch, n_instances, n_pairs, generator=generator) < probability
        mask = active.repeat_interleave(2, dim=-1)
    elif kind == "anticorrelated" and probability <= 0.5:
        some = torch.rand(n_batch, n_instances, n_pairs, generator=generator) < 2 * probability
        first = torch.rand(n_batch, n_instances, n_pairs, generator=generator) < 0.5
        mask = torch.zeros(n_batch, n_instances, 2 * n_pairs, dtype=torch.bool)
        mask[..., 0::2] = some & first
        mask[..., 1::2] = some & ~first
    else:
        raise ValueError(f"{kind} at {probability}")
    return torch.rand(n_batch, n_instances, 2 * n_pairs, generator=generator).masked_fill(~mask, 0.0)


def train_on_fixed_data(
    n_samples: Any, n_instances: Any, n_features: Any, d_hidden: Any, probability: Any, steps: Any, generator: Any
) -> Any:
    model = ToyModel(n_instances, n_features, d_hidden, generator)
    samples = sample_features(n_samples, torch.full((n_instances, n_features), probability), generator)
    lengths = samples.square().sum(-1, keepdim=True).sqrt()
    samples = torch.where(lengths > 0, samples / lengths.clamp(min=1e-20), samples)

    def draw() -> Tensor:
        rows = torch.randint(n_samples, (300,), generator=generator) if n_samples > 300 else slice(None)
        return samples[rows].clone()

    train_toy(model, draw, lambda out, x: (out - x).square().mean((0, 2)).sum(), steps, 0.02, 0.01)
    return model, samples


def worst_case_gain(model: Any, x: Any, epsilon: Any, n_steps: Any, generator: Any) -> Any:
    before = model(x).detach()
    direction = torch.rand(x.shape, generator=generator).to(x) - 0.5
    push = (direction * epsilon / direction.norm(dim=-1, keepdim=True)).detach()
    for _ in range(n_steps):
        leaf = push.clone().requires_grad_(True)
        gradient = torch.autograd.grad(((model(x + leaf) - before) ** 2).sum(), leaf)[0]
        scaled = torch.nan_to_num(gradient / gradient.norm(dim=-1, keepdim=True)) * epsilon
        push = torch.where((gradient == 0).all(-1, keepdim=True), push, scaled)
    change = model(x + push).detach() - before
    return (change.norm(dim=-1) / epsilon).mean(0)
