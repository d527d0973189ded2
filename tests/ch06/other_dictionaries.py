"""The second half of chapter 06 in another style: sorting, masks, loops, matrices; no einsum, no scatter."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def relu_latents(pre: Tensor) -> Tensor:
    return (pre + pre.abs()) / 2


def topk_latents(pre: Tensor, k: int) -> Tensor:
    rank = pre.argsort(dim=-1, descending=True).argsort(dim=-1)
    return torch.where((rank < k) & (pre > 0), pre, torch.zeros_like(pre))


def batch_topk_latents(pre: Tensor, k: int | float) -> tuple[Tensor, Tensor]:
    rows = pre[:, None] if pre.dim() == 2 else pre
    latents, thresholds = torch.zeros_like(rows), []
    for instance in range(rows.shape[1]):
        own = rows[:, instance]
        n = min(int(k * len(pre) + 0.5), own.numel())
        lowest = own.detach().flatten().sort(descending=True).values[n - 1].clamp(min=0)
        keep = own > 0 if lowest == 0 else own >= lowest
        latents = latents.index_add(1, torch.tensor([instance]), torch.where(keep, own, 0.0)[:, None])
        thresholds.append(lowest)
    if pre.dim() == 2:
        return latents[:, 0], thresholds[0]
    return latents, torch.stack(thresholds)


def gated_latents(projected: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.add(projected, b_gate)
    magnitude = F.relu(torch.exp(r_mag) * projected + b_mag)
    return torch.heaviside(gate, torch.zeros((), dtype=gate.dtype)).detach() * magnitude, gate


def products(values: Tensor, matrix: Tensor) -> Tensor:
    """Every row times the matrix of its instance."""
    if matrix.dim() == 2:
        return values @ matrix
    return torch.bmm(values.transpose(0, 1), matrix).transpose(0, 1)


def gated_auxiliary_loss(x: Tensor, gate: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    with torch.no_grad():
        weights, bias = W_dec * 1, b_dec * 1
    return ((products(gate.clamp(min=0), weights) + bias - x) ** 2).mean(0).sum(-1)


class Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        return torch.where(pre > threshold, 1.0, 0.0).type_as(pre)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pre, threshold, ctx.width = inputs
        ctx.save_for_backward(pre - threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (distance,) = ctx.saved_tensors
        ramp = torch.where((distance > -ctx.width / 2) & (distance < ctx.width / 2), 1 / ctx.width, 0.0)
        return torch.zeros_like(grad), -(grad * ramp.type_as(grad)).sum(0), None


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(z, theta, torch.tensor(eps, dtype=torch.float64))
        return z.masked_fill(z <= theta, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, theta, eps = ctx.saved_tensors
        inside = 2 * (z - theta).abs() < eps
        slope = torch.where(inside, -grad, torch.zeros_like(grad)).sum(0) * theta / eps.item()
        return grad.masked_fill(z <= theta, 0.0), slope, None


class SparseAutoencoder(nn.Module):
    def __init__(self, d_in: int, d_sae: int, kind: str, n_instances: int | None = None, **options: Any) -> None:
        super().__init__()
        lead = [] if n_instances is None else [n_instances]
        self.b_dec = nn.Parameter(torch.zeros(*lead, d_in))
        self.b_enc = nn.Parameter(torch.zeros(*lead, d_sae))
        self.W_enc = nn.Parameter(torch.randn(*lead, d_in, d_sae))
        self.W_dec = nn.Parameter(torch.randn(*lead, d_sae, d_in))

    def activate(self, pre: Tensor) -> Tensor:
        return F.relu(pre)

    def pre_activations(self, x: Tensor) -> Tensor:
        shift = products(self.b_dec[None], self.W_enc)
        return products(x, self.W_enc) - shift + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        return self.activate(self.pre_activations(x))

    def decode(self, latents: Tensor) -> Tensor:
        return self.b_dec + products(latents, self.W_dec)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(self.encode(x)), self.encode(x)


def sae_loss(
    x: Tensor, reconstruction: Tensor, latents: Tensor, W_dec: Tensor, sparsity: Any, active: Tensor | None = None
) -> dict[str, Tensor]:
    error = ((reconstruction - x) ** 2).mean(0).sum(-1)
    counted = latents * W_dec.square().sum(-1).sqrt() if active is None else active
    amount = counted.mean(0).sum(-1)
    return {"total": error.sum() + (amount * sparsity).sum(), "sparsity": amount, "reconstruction": error}


def normalise_decoder(W_dec: Tensor) -> Tensor:
    return F.normalize(W_dec, dim=-1, eps=1e-30)


def remove_parallel_gradient(W_dec: Tensor, grad: Tensor) -> Tensor:
    square = (W_dec * W_dec).sum(-1, keepdim=True)
    share = (grad * W_dec).sum(-1, keepdim=True) / torch.where(square == 0, torch.ones_like(square), square)
    return grad - share * W_dec


def auxiliary_topk_loss(x: Tensor, reconstruction: Tensor, pre: Tensor, dead: Tensor, W_dec: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        error = x - reconstruction
        height = torch.where(dead, pre, torch.full_like(pre, -1e9))
        best = height.argsort(-1, descending=True).argsort(-1) < k
    latents = torch.where(best & dead, F.relu(pre), torch.zeros_like(pre))
    loss = ((error - products(latents, W_dec)) ** 2).sum(-1).mean(0)
    return torch.where(dead.any(-1), loss, torch.zeros_like(loss))


def pick_worst(x: Tensor, reconstruction: Tensor, n: int, generator: torch.Generator) -> Tensor:
    loss = ((x - reconstruction) ** 2).sum(-1)
    edges = (loss**2).cumsum(0) / (loss**2).sum()
    return torch.searchsorted(edges, torch.rand(n, generator=generator)).clamp(max=len(x) - 1)


def resample_dead(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor) -> None:
    unit = directions / directions.norm(dim=-1, keepdim=True)
    lengths = sae.W_enc.detach().norm(dim=-2)
    mean = torch.where(dead, torch.nan, lengths).nanmean(-1).nan_to_num(nan=1.0)
    sae.W_dec.data[dead] = unit[dead]
    sae.b_enc.data[dead] = 0
    columns = sae.W_enc.data.transpose(-1, -2)  # a view: what is written goes into W_enc
    columns[dead] = (0.2 * mean[..., None, None] * unit)[dead]
    for parameter, turn in ((sae.W_dec, False), (sae.b_enc, False), (sae.W_enc, True)):
        for key in optimizer.state[parameter].keys() & {"m", "v", "exp_avg", "exp_avg_sq"}:
            kept = optimizer.state[parameter][key]
            (kept.transpose(-1, -2) if turn else kept)[dead] = 0


def best_assignment(gain: Tensor) -> Tensor:
    """By subsets: the best way for the first rows to use a set of columns."""
    rows, columns = gain.shape
    if columns < rows:
        raise ValueError("more rows than columns")
    best: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {frozenset(): (0.0, ())}
    for row in gain.double().tolist():
        onward: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {}
        for used, (total, way) in best.items():
            for column in set(range(columns)) - used:
                candidate = total + row[column], (*way, column)
                key = used | {column}
                onward[key] = max(onward.get(key, candidate), candidate)
        best = onward
    return torch.tensor(max(best.values())[1], device=gain.device)


def match_features(W_dec: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        cosine = F.cosine_similarity(truth[:, None], W_dec[None], dim=-1, eps=1e-12)
        found = best_assignment(cosine)
        return found, cosine[range(len(truth)), found]


def recovery(W_dec: Tensor, truth: Tensor, threshold: float) -> float:
    cosine = match_features(W_dec, truth)[1].tolist()
    return len([value for value in cosine if value > threshold]) / len(cosine)


def firing_scores(latents: Tensor, features: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
    fires = latents.index_select(1, assignment).gt(0).to(latents)
    there = features.gt(0).to(latents)
    both = (fires * there).sum(0)
    return (both / fires.sum(0)).nan_to_num(nan=0.0), (both / there.sum(0)).nan_to_num(nan=0.0)


def shrinkage(x: Tensor, reconstruction: Tensor) -> Tensor:
    moved = [tensor.movedim(0, -1).flatten(-2) for tensor in (x, reconstruction)]
    return (moved[1] ** 2).mean(-1) / (moved[0] * moved[1]).mean(-1)


def absorption_rate(latents: Tensor, features: Tensor, assignment: Tensor, parent: Tensor) -> Tensor:
    rates = torch.zeros(features.shape[1], dtype=latents.dtype)
    for child, above in itertools.compress(enumerate(parent.tolist()), (parent >= 0).tolist()):
        counted = (features[:, child] > 0) & (latents[:, assignment[child]] > 0)
        silent = latents[counted][:, assignment[above]] == 0
        rates[child] = silent.to(latents).mean() if len(silent) else 0.0
    return rates


def matryoshka_loss(x: Tensor, latents: Tensor, W_dec: Tensor, b_dec: Tensor, prefixes: Sequence[int]) -> Tensor:
    place = torch.arange(W_dec.shape[-2])
    return sum((((x - b_dec) - products(latents * (place < m), W_dec)) ** 2).sum(-1).mean(0) for m in prefixes)  # type: ignore[return-value]
