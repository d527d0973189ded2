"""Right answers of chapter 13 in another style: loops for tensors, complex numbers for waves."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.hooks import hooks


def modular_addition_dataset(p: int, share: float, generator: torch.Generator, together: bool = False) -> Any:
    if int(share * p * p) not in range(1, p * p):
        raise ValueError("an empty side")
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    is_train = torch.zeros(p * p, dtype=torch.bool)
    for place in torch.rand(p * p, generator=generator, dtype=torch.float64).argsort().tolist():
        if int(is_train.sum()) >= int(share * p * p):
            break
        row, column = divmod(place, p)
        if not together:
            is_train[place] = True
        elif row <= column:
            is_train[[place, column * p + row]] = True
    return torch.stack([a, b, torch.full((p * p,), p)], dim=1), torch.remainder(a + b, p), is_train


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    wide = logits.to(torch.float64)
    right = wide.take_along_dim(answers.unsqueeze(-1), -1)
    return torch.logsumexp(wide - right, dim=-1).mean().type_as(logits)


def tabulated_logits(model: Any, tokens: Tensor) -> Tensor:
    attn, mlp, p = model.blocks[0].attn, model.blocks[0].mlp, model.embed.W_E.shape[0] - 1
    numbers, equals = model.embed.W_E[:p], model.embed.W_E[p]
    a, b = tokens[:, 0], tokens[:, 1]
    third = equals + model.pos_embed.W_pos[2]
    out = third + attn.b_O
    for head in range(len(attn.W_Q)):
        query = third @ attn.W_Q[head] + attn.b_Q[head]
        keys, values = [], []
        for rows in (numbers + model.pos_embed.W_pos[0], numbers + model.pos_embed.W_pos[1], third[None]):
            keys.append((rows @ attn.W_K[head] + attn.b_K[head]) @ query / math.sqrt(len(query)))
            values.append(rows @ attn.W_V[head] + attn.b_V[head])
        weights = [keys[0][a].exp(), keys[1][b].exp(), keys[2].exp().expand(len(a))]
        total = weights[0] + weights[1] + weights[2]
        mixed = weights[0][:, None] * values[0][a] + weights[1][:, None] * values[1][b]
        out = out + (mixed + weights[2][:, None] * values[2]) / total[:, None] @ attn.W_O[head]
    out = out + F.relu(out @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
    return (out @ model.unembed.W_U + model.unembed.b_U)[:, :p]


def fourier_basis(n: int) -> Tensor:
    """Row by row."""
    x = torch.arange(n, dtype=torch.float64) / n
    rows = [torch.ones_like(x)]
    for k in range(1, (n + 1) // 2):
        rows += [torch.cos(2 * torch.pi * k * x), torch.sin(2 * torch.pi * k * x)]
    if n % 2 == 0:
        rows.append((-1.0) ** torch.arange(n))
    return F.normalize(torch.stack(rows), dim=1).to(torch.float32)


def fft1d(values: Tensor) -> Tensor:
    return torch.einsum("...x,wx->...w", values, fourier_basis(values.shape[-1]).to(values))


def fourier_2d_basis_term(i: int, j: int, n: int) -> Tensor:
    return fourier_basis(n)[i].unsqueeze(1) * fourier_basis(n)[j].unsqueeze(0)


def fft2d(grid: Tensor) -> Tensor:
    along_b = fft1d(grid.movedim(1, -1)).movedim(-1, 1)
    return fft1d(along_b.movedim(0, -1)).movedim(-1, 0)


def frequency_norms(vectors: Tensor) -> Tensor:
    found = torch.fft.rfft(vectors, dim=0, norm="ortho").abs().pow(2).sum(1)
    n = len(vectors)
    twice = torch.tensor([1 if k in (0, n / 2) else 2 for k in range(n // 2 + 1)]).to(found)
    return (found * twice).sqrt()


def key_frequencies(W_E: Tensor, n: int) -> Tensor:
    norms = frequency_norms(W_E).tolist()
    return torch.tensor(sorted(range(1, len(norms)), key=norms.__getitem__, reverse=True)[:n], device=W_E.device)


def neuron_frequencies(activations: Tensor) -> tuple[Tensor, Tensor]:
    n = len(activations)
    power = fft2d(activations).pow(2)
    power[0, 0] = 0
    shares = []
    for k in range(n // 2 + 1):
        own = [number for number in range(n) if (number + 1) // 2 in (0, k)]
        shares.append(power[own][:, own].sum(dim=(0, 1)) / power.sum(dim=(0, 1)).clamp(min=1e-30))
    value, index = torch.stack(shares).max(dim=0)
    return index, value


def effective_unembedding(model: Any) -> Tensor:
    p = model.unembed.W_U.shape[1] - 1
    return (model.unembed.W_U.T[:p] @ model.blocks[-1].mlp.W_out.T).T.detach()


def sum_waves(n: int, frequency: int) -> Tensor:
    if 2 * frequency == n:
        x = torch.arange(n)
        return torch.stack([(-1.0) ** (x[:, None] + x) / n, torch.zeros(n, n)])
    x = torch.arange(n, dtype=torch.float64) * 2 * torch.pi * frequency / n
    cos_a, cos_b, sin_a, sin_b = x.cos()[:, None], x.cos(), x.sin()[:, None], x.sin()
    return torch.stack([cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b]).mul(2**0.5 / n).float()


def trig_directions(W_L: Tensor, frequency: int) -> Tensor:
    n = W_L.shape[1]
    if frequency < 1 or 2 * frequency >= n:
        raise ValueError(frequency)
    turning = torch.polar(torch.ones(n), 2 * torch.pi * frequency * torch.arange(n) / n)
    waves = torch.view_as_real(turning).to(W_L) * (2 / n) ** 0.5
    return (W_L @ waves).T


def logit_fit(logits: Tensor, frequencies: Sequence[int]) -> tuple[Tensor, Tensor]:
    n = len(logits)
    centred = logits - logits.mean(-1, keepdim=True)
    x = torch.arange(n, device=logits.device)
    distance = torch.remainder(x[:, None, None] + x[:, None] - x, n)
    by_distance = torch.stack([centred[distance == d].mean() for d in range(n)])
    found, shares = [], []
    for k in frequencies:
        row = torch.cos(2 * torch.pi * k * torch.arange(n) / n).to(logits)
        found.append(by_distance @ row / (row @ row))
        shares.append(n * n * (found[-1] * row).square().sum() / centred.square().sum())
    return torch.stack(found), torch.stack(shares)


def sum_part(grid: Tensor, frequencies: Sequence[int]) -> Tensor:
    waves = [torch.full_like(grid[..., 0] if grid.dim() > 2 else grid, 1 / len(grid))]
    while waves[0].dim() > 2:
        waves[0] = waves[0][..., 0]
    for frequency in frequencies:
        waves += list(sum_waves(len(grid), frequency).to(grid))
    rows = torch.stack(waves).flatten(1)
    flat = grid.flatten(0, 1)
    return torch.tensordot(rows.T, torch.tensordot(rows, flat, 1), 1).reshape(grid.shape)


def restricted_loss(logits: Tensor, frequencies: Sequence[int], answers: Tensor) -> Tensor:
    kept = sum_part(logits, frequencies)
    return F.cross_entropy(kept.double().flatten(0, 1), answers.flatten()).to(logits.dtype)


def excluded_loss(logits: Tensor, frequencies: Sequence[int], answers: Tensor, is_train: Tensor) -> Tensor:
    for frequency in frequencies:
        for wave in sum_waves(len(logits), frequency).to(logits):
            logits = logits - wave[..., None] * (wave[..., None] * logits).sum(dim=(0, 1))
    rows = is_train.flatten().nonzero().flatten()
    return answer_loss(logits.flatten(0, 1)[rows], answers.flatten()[rows])


def gini(values: Tensor) -> Tensor:
    return (values[:, None] - values).abs().mean() / (2 * values.mean())


def loss_with_frequencies(model: Any, tokens: Tensor, answers: Tensor, frequencies: Sequence[int]) -> Tensor:
    with torch.no_grad():
        W_E = model.embed.W_E.clone()
        p = len(W_E) - 1
        spectrum = torch.fft.rfft(W_E[:p].double(), dim=0)
        gone = [k for k in range(1, p // 2 + 1) if k not in list(frequencies)]
        spectrum[gone] = 0
        W_E[:p] = torch.fft.irfft(spectrum, n=p, dim=0).to(W_E)
        with hooks(model, {"hook_embed": lambda activation, hook: W_E[tokens]}):
            logits = model(tokens)
    return answer_loss(logits[:, 2, :p], answers)


def gradient_symmetry(
    logits_of: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, answers: Tensor
) -> Tensor:
    cosines = []
    for one, other, answer in zip(first, second, answers, strict=True):
        x, y = one[None].detach().requires_grad_(), other[None].detach().requires_grad_()
        by_x, by_y = torch.autograd.grad(logits_of(x, y)[0, answer], (x, y))
        cosines.append((by_x * by_y).sum() / by_x.norm() / by_y.norm())
    return torch.stack(cosines).mean()


def primitive_powers(p: int) -> Tensor:
    for g in range(1, p):
        found = [pow(g, k, p) for k in range(p - 1)]
        if len(set(found) - {0}) == p - 1:
            return torch.tensor(found)
    raise ValueError(p)
