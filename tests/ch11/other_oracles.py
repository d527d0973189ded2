"""Chapter 11 in another style: right answers that share nothing with the reference."""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_utils.data.questions import BALANCED, PLACEHOLDER, oracle_row
from course_utils.hooks import hooks, run_with_cache


def point(model: Any, layer: int) -> str:
    """The hook point of the stream after `layer` blocks; 0 is what the first one reads."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


@torch.no_grad()
def harvest_windows(model: Any, tokens: Tensor, ends: Tensor, layer: int, width: int, batch_size: int = 256) -> Tensor:
    parts = []
    for start in range(0, len(tokens), batch_size):
        _, cache = run_with_cache(model, tokens[start : start + batch_size], names=[point(model, layer)])
        here = cache[point(model, layer)]
        parts += [row[end - width + 1 : end + 1] for row, end in zip(here, ends[start:].tolist(), strict=False)]
    return torch.stack(parts)


def shuffle_windows(windows: Tensor, generator: torch.Generator) -> Tensor:
    n, width = windows.shape[:2]
    order = torch.randperm(n, generator=generator)
    where = torch.argsort(order)  # the place of each row in the ring
    donors = order[(where[:, None] - torch.arange(1, width + 1)) % n].to(windows.device)
    return windows[donors, torch.arange(width, device=windows.device)]


def inject(stream: Tensor, vectors: Tensor, places: Tensor) -> Tensor:
    added = torch.zeros_like(stream).masked_scatter(
        places[..., None], nn.functional.normalize(vectors, dim=-1, eps=1e-30)
    )
    return stream + stream.norm(dim=-1, keepdim=True) * added


def run_oracle(oracle: Any, tokens: Tensor, vectors: Tensor, layer: int = 1) -> Tensor:
    with hooks(oracle, {point(oracle, layer): lambda resid, hook: inject(resid, vectors, tokens.eq(PLACEHOLDER))}):
        return oracle(tokens)


def oracle_examples(
    known: Any, wordings: Any, n: int, rng: random.Random, balanced: Any = BALANCED
) -> tuple[Tensor, Tensor, Tensor]:
    everything = [(w, q) for w, questions in enumerate(known) for q in questions if wordings.get(q.type)]
    kinds = list(dict.fromkeys(q.type for _, q in everything))
    rows = []
    for _ in range(n):
        kind = kinds[rng.randrange(len(kinds))]
        pool = [(w, q) for w, q in everything if q.type == kind]
        if kind in balanced:
            answers = list({q.answer for _, q in pool})
            answer = answers[rng.randrange(len(answers))]
            pool = [(w, q) for w, q in pool if q.answer == answer]
        window, question = pool[rng.randrange(len(pool))]
        wording = wordings[kind][rng.randrange(len(wordings[kind]))]
        rows.append([window, question.answer, *oracle_row(wording, question.about)])
    table = torch.tensor(rows)
    return table[:, 0], table[:, 2:], table[:, 1]


def oracle_loss(logits: Tensor, tokens: Tensor, is_answer: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    weights = is_answer[:, 1:].to(log_p)
    return -(log_p * weights).sum() / weights.sum()


class LoRALinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.rank, self.alpha = linear, rank, alpha
        for parameter in linear.parameters():
            parameter.requires_grad = False
        n_out, n_in = linear.weight.shape
        self.A = nn.Parameter(torch.empty(rank, n_in, dtype=linear.weight.dtype))
        nn.init.normal_(self.A, std=n_in**-0.5, generator=generator)
        self.B = nn.Parameter(torch.zeros(n_out, rank, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        return self.linear(x) + low * self.alpha / self.rank

    def merged(self) -> nn.Linear:
        n_out, n_in = self.linear.weight.shape
        plain = nn.Linear(n_in, n_out, bias=self.linear.bias is not None, dtype=self.linear.weight.dtype)
        plain.load_state_dict(self.linear.state_dict())
        plain.weight.data.addmm_(self.B.data, self.A.data, alpha=self.alpha / self.rank)
        return plain


class Sum(nn.Module):
    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.A, self.B, alpha=self.scale)


def add_adapters(model: Any, rank: int, alpha: float, generator: torch.Generator) -> list[nn.Parameter]:
    for parameter in model.parameters():
        parameter.requires_grad = False
    for block in model.blocks:
        for name, W in [("W_in", block.mlp.W_in), ("W_out", block.mlp.W_out)]:
            A = torch.randn(W.shape[0], rank, generator=generator) * W.shape[0] ** -0.5
            change = Sum(A, torch.zeros(rank, W.shape[1]), alpha / rank)
            parametrize.register_parametrization(block.mlp, name, change)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def accuracy_by_type(types: Any, predicted: Tensor, answers: Tensor) -> dict[str, tuple[float, float, int]]:
    rows: dict[str, list[tuple[int, int]]] = {}
    for kind, p, a in zip(types, predicted.tolist(), answers.tolist(), strict=True):
        rows.setdefault(kind, []).append((p, a))
    table = {}
    for kind, pairs in rows.items():
        right = [answer for _, answer in pairs]
        most = max(right.count(answer) for answer in right)
        table[kind] = (sum(p == a for p, a in pairs) / len(pairs), most / len(pairs), len(pairs))
    return table


def reliability(probabilities: Tensor, answers: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    best = probabilities.argmax(-1)
    sure = probabilities.gather(1, best[:, None])[:, 0]
    which = torch.floor(sure * n_bins).long().clamp(0, n_bins - 1)
    means = []
    for values in (sure, (best == answers).to(sure)):
        per_bin = [values[which == b] for b in range(n_bins)]
        means.append(torch.stack([part.mean() if len(part) else part.sum() for part in per_bin]))
    return means[0], means[1], torch.bincount(which, minlength=n_bins)


def expected_calibration_error(probabilities: Tensor, answers: Tensor, n_bins: int) -> Tensor:
    sure, right, counts = reliability(probabilities, answers, n_bins)
    return ((sure - right).abs() * counts / counts.sum()).sum()


def contradiction_rate(first: Tensor, second: Tensor, yes: int, no: int) -> Tensor:
    options = torch.tensor([yes, no], device=first.device)
    both = torch.isin(first, options) & torch.isin(second, options)
    if both.sum() == 0:
        raise ValueError("nothing to compare")
    return (first[both] == second[both]).sum() / both.sum()


def mirror(x: Tensor, direction: Tensor, bias: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(direction)
    unit = direction / length
    return x - torch.outer(2 * (x @ unit + bias / length), unit)


@torch.no_grad()
def patchscope(
    model: Any,
    source: Tensor,
    source_at: Tensor,
    source_layer: int,
    target: Tensor,
    target_at: Tensor,
    target_layer: int,
) -> Tensor:
    vectors = harvest_windows(model, source, source_at, source_layer, 1)

    def put(resid: Tensor, hook: Any) -> Tensor:
        here = torch.arange(resid.shape[1], device=resid.device) == target_at[:, None]
        return torch.where(here[..., None], vectors, resid)

    with hooks(model, {point(model, target_layer): put}):
        return model(target)
