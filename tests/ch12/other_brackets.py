"""Right answers of chapter 12 in another style: loops for tensors, tensors for loops, other libraries' functions."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.data.brackets import (
    BALANCED,
    CLOSE,
    END,
    KINDS,
    OPEN,
    PAD,
    SHARES,
    START,
    UNBALANCED,
    random_balanced,
)
from course_utils.hooks import hooks, run_with_cache


def is_balanced(text: str) -> bool:
    waiting: list[str] = []
    for bracket in text:
        if bracket == "(":
            waiting.append(bracket)
        elif bracket != ")":
            raise ValueError(bracket)
        elif waiting:
            waiting.pop()
        else:
            waiting.append("too early")
            break
    if set(text) - set("()"):
        raise ValueError(text)
    return not waiting


def elevation(tokens: Tensor) -> Tensor:
    step = {OPEN: 1, CLOSE: -1}
    return torch.tensor([list(accumulate(step.get(token, 0) for token in row)) for row in tokens.tolist()])


def failures(tokens: Tensor) -> tuple[Tensor, Tensor]:
    height = elevation(tokens)
    return (tokens == OPEN).sum(1).ne((tokens == CLOSE).sum(1)), height.amin(1).lt(0)


def is_balanced_batch(tokens: Tensor) -> Tensor:
    height = elevation(tokens)
    return (height[:, -1] == 0) & (height.min(dim=1).values >= 0)


def bracket_dataset(n: int, n_ctx: int, generator: torch.Generator, shares: Sequence[float] = SHARES) -> Any:
    most = (n_ctx - 2) // 2
    if n > sum(2 ** (2 * pairs) for pairs in range(1, most + 1)):
        raise ValueError("not so many")
    rows: dict[tuple[int, ...], int] = {}  # a dict keeps its order
    while len(rows) < n:
        kind = int(torch.multinomial(torch.tensor(shares), 1, generator=generator))
        pairs = int(torch.randint(most, (), generator=generator)) + 1
        text = random_balanced(1, pairs, generator)[0]
        if KINDS[kind] == "random":
            text = torch.randint(2, (2 * pairs,), generator=generator)
        elif KINDS[kind] == "shuffled":
            text = text[torch.randperm(2 * pairs, generator=generator)]
        elif KINDS[kind] == "flipped":
            text[torch.randint(2 * pairs, (), generator=generator)] ^= 1
        elif KINDS[kind] == "swapped":
            for places in [(text == token).nonzero().flatten() for token in (OPEN, CLOSE)]:
                text[places[torch.randint(pairs, (), generator=generator)]] ^= 1
        row = F.pad(
            torch.cat([torch.tensor([START]), text, torch.tensor([END])]), (0, n_ctx - 2 - 2 * pairs), value=PAD
        )
        rows.setdefault(tuple(row.tolist()), kind)
    return torch.tensor(list(rows)), torch.tensor(list(rows.values()))


def at_end(values: Tensor, tokens: Tensor) -> Tensor:
    """What stands at END, by a mask."""
    return values[tokens == END]


def unbalanced_scores(model: Any, tokens: Tensor) -> Tensor:
    logits = at_end(model(tokens), tokens)
    return (
        logits
        @ torch.eye(5, dtype=logits.dtype, device=logits.device)[[UNBALANCED, BALANCED]].T
        @ torch.tensor([1.0, -1.0], dtype=logits.dtype, device=logits.device)
    )


def layer_norm_fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    solution = torch.linalg.pinv(wide) @ y
    return solution[:-1], 1 - (y - wide @ solution).pow(2).sum() / (y.var(0, correction=0).sum() * len(y))


def pre_norm_direction(model: Any, resid: Tensor) -> Tensor:
    with torch.no_grad():
        scores = model.ln_final(resid.unsqueeze(0))[0] @ model.unembed.W_U
        scores = scores[:, UNBALANCED] - scores[:, BALANCED]
        centred = resid - resid.mean(0)
        return torch.linalg.pinv(centred) @ (scores - scores.mean())


def component_contributions(cache: Any, tokens: Tensor, direction: Tensor) -> tuple[list[str], Tensor]:
    found = {label: at_end(cache[label], tokens) for label in ("embed", "pos_embed") if label in cache}
    for layer in range(cache.n_layers):
        result = at_end(cache["result", layer], tokens)
        found |= {f"head {layer}.{head}": result[:, head] for head in range(result.shape[1])}
        found[f"bias {layer}"] = at_end(cache["attn_out", layer], tokens) - result.sum(1)
        if ("mlp_out", layer) in cache:
            found[f"mlp {layer}"] = at_end(cache["mlp_out", layer], tokens)
    return list(found), torch.stack([vectors @ direction for vectors in found.values()])


def attention_by_position(pattern: Tensor, tokens: Tensor) -> Tensor:
    is_end = (tokens == END).to(pattern.dtype)
    return torch.einsum("bhqk,bq->hk", pattern, is_end) / len(tokens)


def neuron_contributions(model: Any, cache: Any, tokens: Tensor, direction: Tensor, layer: int) -> Tensor:
    return torch.einsum(
        "bn,nd,d->bn", at_end(cache["post", layer], tokens), model.blocks[layer].mlp.W_out, direction
    ).detach()


def probe_r2(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
    wide, test = (torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in (x_train, x_test))
    guess = test @ (torch.linalg.pinv(wide) @ y_train)
    return 1 - F.mse_loss(guess, y_test) / y_test.var(correction=0)


def corrupted_pairs(tokens: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind not in {"total", "order"}:
        raise ValueError(kind)
    out = tokens.clone()
    for row, height in zip(out, elevation(tokens), strict=True):
        first = 0
        closes = (row == CLOSE).nonzero().flatten()
        if kind == "order":
            opens = ((row == OPEN) & (height == 1)).nonzero().flatten()
            first = int(opens[torch.randint(len(opens), (), generator=generator)])
            row[first] = CLOSE
        closes = closes[closes > first]
        row[closes[torch.randint(len(closes), (), generator=generator)]] = OPEN
    return out


@torch.no_grad()
def scores_with_patch(model: Any, clean: Tensor, corrupted: Tensor, component: str, mask: Tensor) -> Tensor:
    kind, number = component.split()
    if kind == "mlp":
        name, chosen = f"blocks.{number}.hook_mlp_out", mask[:, :, None]
    else:
        layer, head = map(int, number.split("."))
        name = f"blocks.{layer}.attn.hook_result"
        is_head = torch.arange(model.cfg.n_heads) == head
        chosen = (mask[:, :, None] & is_head)[..., None]
    _, cache = run_with_cache(model, corrupted, names=[name])
    with hooks(model, {name: lambda own, hook: torch.where(chosen, cache[name], own)}):
        return unbalanced_scores(model, clean)


def flip_effects(model: Any, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []

    def keep(embedded: Tensor, hook: Any) -> Tensor:
        found.append(embedded.detach().requires_grad_())
        return found[0]

    with hooks(model, {"hook_embed": keep}):
        scores = unbalanced_scores(model, tokens)
    (gradient,) = torch.autograd.grad(scores, found[0], torch.ones_like(scores))
    W_E = model.embed.W_E.detach()
    other = torch.tensor([CLOSE, OPEN, START, END, PAD])[tokens]
    return (gradient * (W_E[other] - W_E[tokens])).sum(-1)


def hill_climb(model: Any, tokens: Tensor, generator: torch.Generator, steps: int) -> Tensor:
    best = tokens.clone()
    with torch.no_grad():
        for _ in range(steps):
            tried = best.clone()
            for row in tried:
                places = (row <= CLOSE).nonzero().flatten()
                row[places[torch.randperm(len(places), generator=generator)[:2]]] ^= 1
            helps = unbalanced_scores(model, tried) < unbalanced_scores(model, best)
            allowed = torch.from_numpy(~np.asarray(is_balanced_batch(tried)))
            best[helps & allowed] = tried[helps & allowed]
    return best
