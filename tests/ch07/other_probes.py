"""The exercises of chapter 07 in another style: loops, other formulas, other ways to the minimum."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.hooks import hooks, run_with_cache


def extract_activations(model: Any, tokens: Any, mask: Any, layers: Any, position: Any, batch_size: int = 64) -> Any:
    """One text at a time."""
    if isinstance(position, str) and position not in {"last", "mean"}:
        raise ValueError(position)
    columns = []
    for row in range(len(tokens)):
        real = mask[row].nonzero()[:, 0]
        if isinstance(position, str) and not len(real):
            raise ValueError("empty")
        with torch.no_grad():
            _, cache = run_with_cache(model, tokens[row : row + 1])
        stream = torch.stack(
            [cache["resid_pre", n] if n < model.cfg.n_layers else cache["resid_post", n - 1] for n in layers]
        )[:, 0]
        if not isinstance(position, str):
            columns.append(stream[:, position[row]])
        elif position == "last":
            columns.append(stream[:, real[-1]])
        else:
            columns.append(stream[:, real].mean(1))
    return torch.stack(columns, 1)


def standardise(x: Any, reference: Any) -> Any:
    apart = reference - reference.mean(0)
    scale = apart.square().mean(0).sqrt()
    constant = reference.amax(0) == reference.amin(0)
    return torch.where(constant, x - reference.mean(0), (x - reference.mean(0)) / scale.clamp(min=1e-30))


def pca(x: Any, k: int) -> Any:
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    rows = vectors.T.flip(0)[:k]
    signs = torch.tensor([1.0 if row[row.abs().argmax()] > 0 else -1.0 for row in rows]).to(x)
    return rows * signs[:, None], (values.flip(0) / values.sum())[:k]


def both(y: Any) -> None:
    if len(y.unique()) < 2:
        raise ValueError("one class")


def mean_difference_probe(x: Any, y: Any) -> Any:
    both(y)
    yes, no = y.to(x) @ x / y.sum(), (~y).to(x) @ x / (~y).sum()
    w = yes - no
    return w, (no.square().sum() - yes.square().sum()) / 2


def mass_mean_probe(x: Any, y: Any, shrinkage: float = 1e-3) -> Any:
    w, _ = mean_difference_probe(x, y)
    parts = [x[y] - x[y].mean(0), x[~y] - x[~y].mean(0)]
    cov = torch.cov(torch.cat(parts).T, correction=0)
    cov = cov + torch.eye(len(w)).to(x) * (shrinkage * torch.trace(cov) / len(w))
    direction = torch.linalg.inv(cov) @ w
    return direction, -(direction @ x[y].mean(0) + direction @ x[~y].mean(0)) / 2


def by_lbfgs(loss: Any, parameters: list[Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)


def logistic_probe(x: Any, y: Any, l2: float) -> Any:
    both(y)
    wide, sign = x.double(), y.double() * 2 - 1
    w, b = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64)
    b.requires_grad_()
    by_lbfgs(lambda: -F.logsigmoid(sign * (wide @ w + b)).mean() + l2 / 2 * w @ w, [w, b])
    return w.detach().to(x), b.detach().to(x)


def softmax_probe(x: Any, y: Any, n_classes: int, l2: float) -> Any:
    wide = x.double()
    W = torch.zeros(x.shape[1], n_classes, dtype=torch.float64, requires_grad=True)
    b = torch.ones(n_classes, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(len(x))
    by_lbfgs(lambda: -(wide @ W + b).log_softmax(1)[rows, y].mean() + l2 / 2 * (W**2).sum(), [W, b])
    return W.detach().to(x), (b - b.mean()).detach().to(x)


def ridge_probe(x: Any, numbers: Any, l2: float) -> Any:
    wide = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    penalty = torch.diag(torch.tensor([l2] * x.shape[1] + [0.0])).to(x)
    theta = torch.linalg.solve(wide.T @ wide / len(x) + penalty, wide.T @ numbers / len(x))
    return theta[:-1], theta[-1]


def auroc(scores: Any, labels: Any) -> Any:
    """By ranks; rows that tie share the mean of theirs."""
    both(labels)
    _, which, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(scores)
    ranks = (last - (counts - 1) / 2)[which]
    n_yes = labels.sum()
    return (ranks[labels].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * (~labels).sum())


def hold_out(types: Any, share: float, generator: Any) -> Any:
    known = list(dict.fromkeys(types.tolist()))
    n_out = max(1, min(round(share * len(known)), len(known) - 1))
    keys = torch.rand(len(known), generator=generator).tolist()
    out = [kind for _, kind in sorted(zip(keys, known, strict=True))][:n_out]
    return torch.stack([types == kind for kind in out]).any(0)


def control_task(types: Any, n_classes: int, generator: Any) -> Any:
    known = list(dict.fromkeys(types.tolist()))
    while True:
        drawn = {kind: int(torch.randint(n_classes, (), generator=generator)) for kind in known}
        if len(set(drawn.values())) == n_classes or len(known) < n_classes:
            return torch.tensor([drawn[kind] for kind in types.tolist()])


def judge(probe: Any, x: Any, y: Any) -> Any:
    return torch.eq(x @ probe[0] + probe[1] > 0, y).float().mean().to(x)


def selectivity(fit: Any, x: Any, y: Any, types: Any, train: Any, generator: Any, n_controls: int = 5) -> Any:
    tasks = [control_task(types, 2, generator) == 1 for _ in range(n_controls)]
    found = [judge(fit(x[train], labels[train]), x[~train], labels[~train]) for labels in [*tasks, y]]
    return found[-1], found[-1] - sum(found[:-1]) / n_controls


def generalisation_matrix(fit: Any, sets: Any) -> Any:
    names = list(sets)
    table = torch.zeros(len(names), len(names))
    for i, first in enumerate(names):
        x, y, train = sets[first]
        probe = fit(x[train], y[train])
        for j, second in enumerate(names):
            u, v, t = sets[second]
            table[i, j] = judge(probe, u[~t], v[~t])
    return table


def run_steered(model: Any, tokens: Any, layer: int, positions: Any, vector: Any) -> Any:
    one_hot = F.one_hot(positions, tokens.shape[1])[..., None]
    at = min(layer, model.cfg.n_layers - 1)
    name = f"blocks.{at}.hook_resid_{'pre' if layer == at else 'post'}"
    push = vector if vector.dim() == 2 else vector[None]
    with torch.no_grad(), hooks(model, {name: lambda stream, hook: stream + one_hot * push[:, None]}):
        return model(tokens)


def normalised_effect(steered: Any, before: Any, target: Any) -> Any:
    if before.mean() == target.mean():
        raise ValueError("nowhere to go")
    return (steered - before).mean() / (target.mean() - before.mean())


def activation_pattern(x: Any, direction: Any) -> Any:
    covariance = torch.cov(x.T, correction=0)
    return covariance @ direction / (direction @ covariance @ direction)


def erase(x: Any, y: Any) -> Any:
    """By the formula of an oblique projection."""
    wide = x.double()
    apart = wide - wide.mean(0)
    kinds = torch.stack([(y == kind).double() for kind in y.unique()], 1)
    cross = apart.T @ (kinds - kinds.mean(0))
    inverse = torch.linalg.pinv(apart.T @ apart, rtol=1e-9, hermitian=True)
    middle = torch.linalg.pinv(cross.T @ inverse @ cross, rtol=1e-9, hermitian=True)
    gone = cross @ middle @ cross.T @ inverse
    return (torch.eye(x.shape[1]).double() - gone).to(x), (gone @ wide.mean(0)).to(x)


class AttentionProbe(nn.Module):
    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(d_model))
        self.W = nn.Parameter(torch.zeros(d_model, n_classes))
        self.b = nn.Parameter(torch.zeros(n_classes))

    def pattern(self, x: Any, mask: Any) -> Any:
        sizes = (torch.einsum("bpd,d->bp", x, self.query) * len(self.query) ** -0.5).exp() * mask
        return sizes / sizes.sum(1, keepdim=True)

    def forward(self, x: Any, mask: Any) -> Any:
        return ((x @ self.W) * self.pattern(x, mask)[..., None]).sum(1) + self.b
