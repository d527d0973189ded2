"""Right answers of chapter 12 in a third style: numpy and lists, one row at a time, or by a longer way round."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from course_utils.data.brackets import (
    BALANCED,
    CLOSE,
    END,
    KINDS,
    OPEN,
    SHARES,
    UNBALANCED,
    decode,
    encode,
    random_balanced,
)
from course_utils.hooks import hooks, run_with_cache


def is_balanced(text: str) -> bool:
    if text.strip("()"):
        raise ValueError("only brackets")
    shorter = text.replace("()", "")
    return not text if shorter == text else is_balanced(shorter)


def elevation(tokens: Tensor) -> Tensor:
    steps = torch.tensor([1, -1, 0, 0, 0], device=tokens.device)[tokens]
    return torch.stack([steps[:, : pos + 1].sum(1) for pos in range(tokens.shape[1])], 1)


def failures(tokens: Tensor) -> tuple[Tensor, Tensor]:
    texts = decode(tokens)
    totals = [text.count("(") != text.count(")") for text in texts]
    dips = [any(text[:end].count(")") > text[:end].count("(") for end in range(len(text) + 1)) for text in texts]
    return torch.tensor(totals, dtype=torch.bool), torch.tensor(dips, dtype=torch.bool)


def is_balanced_batch(tokens: Tensor) -> Tensor:
    return torch.tensor([is_balanced(text) for text in decode(tokens)], dtype=torch.bool)


def bracket_dataset(n: int, n_ctx: int, generator: torch.Generator, shares: Sequence[float] = SHARES) -> Any:
    most = (n_ctx - 2) // 2
    if n > (4 ** (most + 1) - 4) // 3:
        raise ValueError("too many")
    chance = np.random.default_rng(int(torch.randint(2**40, (), generator=generator)))
    texts: list[str] = []
    kinds: list[int] = []
    seen = set()
    while len(texts) < n:
        kind = KINDS[chance.choice(5, p=np.array(shares) / sum(shares))]
        pairs = int(chance.integers(1, most + 1))
        text = random_balanced(1, pairs, generator)[0].numpy()
        if kind == "random":
            text = chance.integers(2, size=2 * pairs)
        elif kind == "shuffled":
            text = chance.permutation([OPEN, CLOSE] * pairs)
        elif kind == "flipped":
            text[chance.integers(2 * pairs)] ^= 1
        elif kind == "swapped":
            first, second = chance.choice(np.flatnonzero(text == OPEN)), chance.choice(np.flatnonzero(text == CLOSE))
            text[[first, second]] = text[[second, first]]
        written = "".join("()"[bracket] for bracket in text)
        if written not in seen:
            seen.add(written)
            texts.append(written)
            kinds.append(KINDS.index(kind))
    return encode(texts, n_ctx), torch.tensor(kinds)


def place_of_end(tokens: Tensor) -> list[int]:
    return (tokens == END).nonzero()[:, 1].tolist()


def unbalanced_scores(model: Any, tokens: Tensor) -> Tensor:
    """What follows END is cut off."""
    scores = []
    for row, end in zip(tokens, place_of_end(tokens), strict=True):
        said = model(row[None, : end + 1])[0, -1].log_softmax(-1)
        scores.append(said[UNBALANCED] - said[BALANCED])
    return torch.stack(scores)


def layer_norm_fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Covariances; the share of the variance that the fitted values have."""
    x, y = x - x.mean(0), y - y.mean(0)
    matrix = torch.linalg.solve(x.T @ x, x.T @ y)
    return matrix, (x @ matrix).square().sum() / y.square().sum()


def pre_norm_direction(model: Any, resid: Tensor) -> Tensor:
    with torch.no_grad():
        wide = torch.cat([resid, resid.new_ones(len(resid), 1)], 1)
        matrix = torch.linalg.lstsq(wide, model.ln_final(resid[None])[0]).solution[:-1]
        through = matrix @ model.unembed.W_U
        return through[:, UNBALANCED] - through[:, BALANCED]


def component_contributions(cache: Any, tokens: Tensor, direction: Tensor) -> tuple[list[str], Tensor]:
    labels: list[str] = []
    columns = []
    for row, end in enumerate(place_of_end(tokens)):
        parts = {name: cache[name][row, end] for name in ("embed", "pos_embed") if name in cache}
        for layer in range(cache.n_layers):
            heads = cache["result", layer][row, end]
            parts |= {f"head {layer}.{number}": head for number, head in enumerate(heads)}
            parts[f"bias {layer}"] = cache["attn_out", layer][row, end] - sum(heads)
            if ("mlp_out", layer) in cache:
                parts[f"mlp {layer}"] = cache["mlp_out", layer][row, end]
        labels = list(parts)
        columns.append(torch.stack([torch.dot(part, direction) for part in parts.values()]))
    return labels, torch.stack(columns, 1)


def attention_by_position(pattern: Tensor, tokens: Tensor) -> Tensor:
    total = torch.zeros_like(pattern[0, :, 0])
    for row, end in enumerate(place_of_end(tokens)):
        total = total + pattern[row, :, end] / len(tokens)
    return total


def neuron_contributions(model: Any, cache: Any, tokens: Tensor, direction: Tensor, layer: int) -> Tensor:
    with torch.no_grad():
        rows = model.blocks[layer].mlp.W_out
        active = torch.stack([cache["post", layer][row, end] for row, end in enumerate(place_of_end(tokens))])
        return (active[:, :, None] * rows * direction).sum(-1)


def probe_r2(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor) -> Tensor:
    wide, test = (np.column_stack([x.numpy(), np.ones(len(x))]) for x in (x_train, x_test))
    weights, *_ = np.linalg.lstsq(wide, y_train.numpy(), rcond=None)
    known = y_test.numpy()
    return torch.tensor(1 - np.sum((known - test @ weights) ** 2) / (len(known) * np.var(known)), dtype=x_train.dtype)


def corrupted_pairs(tokens: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    def one_of(places: list[int]) -> int:
        return places[int(torch.rand((), generator=generator) * len(places))]

    def spoiled(text: str) -> str:
        brackets, first = list(text), -1
        if kind == "order":
            first = one_of([place for place in range(len(text)) if is_balanced(text[:place]) and text[place] == "("])
            brackets[first] = ")"
        brackets[one_of([place for place in range(first + 1, len(text)) if text[place] == ")"])] = "("
        return "".join(brackets)

    if kind != "total" and kind != "order":
        raise ValueError(kind)
    return encode([spoiled(text) for text in decode(tokens)], tokens.shape[1])


@torch.no_grad()
def scores_with_patch(model: Any, clean: Tensor, corrupted: Tensor, component: str, mask: Tensor) -> Tensor:
    """A head is exchanged where its z stands: W_O does the same to both."""
    kind, number = component.split()
    layer = int(number.split(".")[0])
    name = f"blocks.{layer}.hook_mlp_out" if kind == "mlp" else f"blocks.{layer}.attn.hook_z"
    _, cache = run_with_cache(model, corrupted)

    def patch(activation: Tensor, hook: Any) -> Tensor:
        out = activation.clone()
        part = out if kind == "mlp" else out[:, :, int(number.split(".")[1])]
        source = cache[name] if kind == "mlp" else cache[name][:, :, int(number.split(".")[1])]
        part[mask] = source[mask]
        return out

    with hooks(model, {name: patch}):
        return at_end(model(clean), clean)


def at_end(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack(
        [row[end, UNBALANCED] - row[end, BALANCED] for row, end in zip(logits, place_of_end(tokens), strict=True)]
    )


def flip_effects(model: Any, tokens: Tensor) -> Tensor:
    """The gradient at the stream before the first block is the same: what was added does not matter."""
    found = {}

    def keep(stream: Tensor, hook: Any) -> Tensor:
        found["stream"] = stream.detach().requires_grad_()
        return found["stream"]

    with hooks(model, {"blocks.0.hook_resid_pre": keep}):
        scores = at_end(model(tokens), tokens)
    gradients = [torch.autograd.grad(score, found["stream"], retain_graph=True)[0] for score in scores]
    effects = torch.zeros(tokens.shape, dtype=scores.dtype)
    W_E = model.embed.W_E.detach()
    for row in range(len(tokens)):
        for pos, token in enumerate(tokens[row].tolist()):
            if token in (OPEN, CLOSE):
                effects[row, pos] = gradients[row][row, pos] @ (W_E[1 - token] - W_E[token])
    return effects


@torch.no_grad()
def hill_climb(model: Any, tokens: Tensor, generator: torch.Generator, steps: int) -> Tensor:
    """The two brackets with the highest of random numbers are turned."""
    texts = decode(tokens)
    scores = at_end(model(tokens), tokens).tolist()
    for _ in range(steps):
        tried = []
        for text in texts:
            chosen = torch.rand(len(text), generator=generator).topk(2).indices.tolist()
            tried.append("".join("()"[(bracket == "(") ^ (place not in chosen)] for place, bracket in enumerate(text)))
        rows = encode(tried, tokens.shape[1])
        for number, score in enumerate(at_end(model(rows), rows).tolist()):
            if score < scores[number] and not is_balanced(tried[number]):
                texts[number], scores[number] = tried[number], score
    return encode(texts, tokens.shape[1])
