"""Right answers of chapter 10 in another style: loops for tensors, and derivatives instead of gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.ch10.graph import ToyGraph
from course_utils.hooks import hooks, run_with_cache


class Transcoder(nn.Module):
    def __init__(self, d_model: int, n_latents: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.k = k
        self.b_dec, self.b_enc = nn.Parameter(torch.zeros(d_model)), nn.Parameter(torch.zeros(n_latents))
        self.W_enc = nn.Parameter(torch.zeros(d_model, n_latents))
        self.W_dec = nn.Parameter(torch.zeros(n_latents, d_model))

    def encode(self, x: Tensor) -> Tensor:
        pre = F.linear(x, self.W_enc.T, self.b_enc).relu()
        rank = pre.argsort(dim=-1, descending=True).argsort(dim=-1)
        return torch.where(rank < self.k, pre, 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        return F.linear(latents, self.W_dec.T, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def transcoder_loss(transcoder: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(y.dtype)
    mean = (weights * y).sum((0, 1)) / weights.sum()
    return (weights * (transcoder(x) - y) ** 2).sum() / (weights * (y - mean) ** 2).sum()


@torch.no_grad()
def mlp_errors(model: Any, transcoders: Sequence[Any], tokens: Tensor) -> Tensor:
    _, cache = run_with_cache(model, tokens)
    return cache.stack("mlp_out") - torch.stack(
        [part(x) for part, x in zip(transcoders, cache.stack("ln2.normalized"), strict=True)]
    )


def refuse(model: Any) -> None:
    if model.cfg.attn_only or model.cfg.normalization not in ("LN", "RMS"):
        raise ValueError("there is nothing to read")


def run_replaced(model: Any, transcoders: Sequence[Any], tokens: Tensor, errors: Tensor | None = None) -> Tensor:
    refuse(model)
    seen: list[Tensor] = []  # in a run, layers come in order

    def write(mlp_out: Tensor, hook: Any) -> Tensor:
        layer = len(seen) - 1
        out = transcoders[layer](seen[layer])
        return out if errors is None else out + errors[layer]

    with hooks(model, [("*ln2.hook_normalized", lambda x, hook: seen.append(x)), ("*hook_mlp_out", write)]):
        return model(tokens)


def frozen_run(model: Any, tokens: Tensor, cache: Any, written: Tensor) -> tuple[list[Tensor], Tensor]:
    refuse(model)
    fns = [(name, lambda _, hook: cache[hook.name]) for name in cache if name.endswith(("hook_pattern", "hook_scale"))]
    fns += [(f"blocks.{i}.hook_mlp_out", lambda _, hook, i=i: written[i + 1]) for i in range(model.cfg.n_layers)]
    fns.append(("blocks.0.hook_resid_pre", lambda _, hook: written[0]))
    with hooks(model, fns):
        logits, seen = run_with_cache(model, tokens, names="*ln2.hook_normalized")
    return list(seen.values()), logits


def derivative(model: Any, tokens: Tensor, writer: int, pos: int, vector: Tensor) -> tuple[Tensor, ...]:
    """What a vector adds, by a forward derivative."""
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens)
        written = torch.cat([cache["resid_pre", 0][None], cache.stack("mlp_out")])
        direction = torch.zeros_like(written)
        direction[writer, 0, pos] = vector

        def along(written: Tensor) -> Any:
            reads, logits = frozen_run(model, tokens, cache, written)
            return (*reads, logits)

        found: tuple[Tensor, ...] = torch.func.jvp(along, (written,), (direction,))[1]
        return found


def token_to_latent(model: Any, transcoders: Sequence[Any], tokens: Tensor, target: tuple[int, int, int]) -> Tensor:
    layer, pos, latent = target
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens)
        parts = [
            derivative(model, tokens, 0, source, cache["resid_pre", 0][0, source])[layer][0, pos]
            for source in range(tokens.shape[1])
        ]
        return torch.stack(parts) @ transcoders[layer].W_enc[:, latent]


@torch.no_grad()
def from_latents(model: Any, transcoders: Sequence[Any], tokens: Tensor, source_layer: int, end: Any) -> Tensor:
    _, cache = run_with_cache(model, tokens)
    source = transcoders[source_layer]
    latents = source.encode(cache["ln2.normalized", source_layer])[0]
    out = torch.zeros_like(latents)
    for pos, latent in latents.nonzero().tolist():
        vector = latents[pos, latent] * source.W_dec[latent]
        out[pos, latent] = end(derivative(model, tokens, 1 + source_layer, pos, vector))
    return out


def latent_to_latent(
    model: Any, transcoders: Sequence[Any], tokens: Tensor, source_layer: int, target: tuple[int, int, int]
) -> Tensor:
    layer, pos, latent = target
    column = transcoders[layer].W_enc[:, latent].detach()
    return from_latents(model, transcoders, tokens, source_layer, lambda found: found[layer][0, pos] @ column)


def latent_to_logit(
    model: Any, transcoders: Sequence[Any], tokens: Tensor, source_layer: int, weights: Tensor
) -> Tensor:
    return from_latents(model, transcoders, tokens, source_layer, lambda found: found[-1][0, -1] @ weights)


def feature_connections(model: Any, transcoders: Sequence[Any], source_layer: int, target_layer: int) -> Tensor:
    if not source_layer < target_layer:
        raise ValueError("the wrong way round")
    columns = transcoders[target_layer].W_enc
    if model.cfg.normalization == "LN":
        columns = columns - columns.mean(0)
    return torch.einsum("sd,dt->st", transcoders[source_layer].W_dec, columns)


def attribution_graph(model: Any, transcoders: Sequence[Any], tokens: Tensor, targets: Tensor) -> ToyGraph:
    """One backward pass for each row."""
    _, cache = run_with_cache(model, tokens)
    written = torch.cat([cache["resid_pre", 0][None], cache.stack("mlp_out")]).detach().requires_grad_()
    reads, logits = frozen_run(model, tokens, cache, written)
    n_layers, n_pos = len(transcoders), tokens.shape[1]
    latents = [part.encode(x[0]).detach() for part, x in zip(transcoders, reads, strict=True)]
    features = [(layer, *place) for layer in range(n_layers) for place in latents[layer].nonzero().tolist()]
    values = [reads[layer][0, pos] @ transcoders[layer].W_enc[:, latent] for layer, pos, latent in features]
    values += [logits[0, -1] @ target for target in targets]
    fixed = torch.cat([written[:1].detach(), mlp_errors(model, transcoders, tokens)])[:, 0]
    rows = []
    for value in values:
        (gradient,) = torch.autograd.grad(value, written, retain_graph=True)
        row = (gradient[:, 0] * fixed).sum(-1).flatten().tolist()
        for layer, pos, latent in features:
            written_by = latents[layer][pos, latent] * transcoders[layer].W_dec[latent]
            row.append((gradient[1 + layer, 0, pos] * written_by).sum().item())
        rows.append(row + [0.0] * len(targets))
    n_fixed = n_pos * (1 + n_layers)
    adjacency = torch.tensor([[0.0] * len(rows[0])] * n_fixed + rows, dtype=written.dtype)
    activations = torch.stack([latents[layer][pos, latent] for layer, pos, latent in features])
    return ToyGraph(adjacency, torch.tensor(features), activations, n_layers, n_pos)


def normalised_adjacency(adjacency: Tensor) -> Tensor:
    return F.normalize(adjacency.abs(), p=1, dim=1, eps=1e-30)


def influence(shares: Tensor, weights: Tensor) -> Tensor:
    total, step = torch.zeros_like(weights), weights
    for _ in range(len(weights)):
        step = shares.T @ step
        total = total + step
    return total


def replacement_score(graph: Any) -> float:
    found = influence(normalised_adjacency(graph.adjacency), graph.weights)
    tokens = float(found[: graph.n_pos].sum())
    return tokens / (tokens + float(found[graph.errors].sum()))


def completeness_score(graph: Any) -> float:
    shares = normalised_adjacency(graph.adjacency)
    matter = graph.weights + influence(shares, graph.weights)
    lost = float(matter @ shares[:, graph.errors].sum(1))
    return 1 - lost / float(matter.sum())


def _largest(values: Tensor, share: float) -> Tensor:
    flat = values.flatten()
    order = flat.argsort(descending=True)
    before = flat[order].cumsum(0) - flat[order]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order] = before < share * flat.sum()
    return kept.reshape(values.shape)


def prune(graph: Any, node_share: float, edge_share: float) -> tuple[Tensor, Tensor]:
    fixed = torch.arange(len(graph.adjacency))
    fixed = (fixed < graph.n_pos) | (fixed >= graph.targets.start)
    nodes = fixed | _largest(influence(normalised_adjacency(graph.adjacency), graph.weights), node_share)
    shares = normalised_adjacency(graph.adjacency * torch.outer(nodes, nodes))
    edges = _largest((influence(shares, graph.weights) + graph.weights)[:, None] * shares, edge_share)
    is_latent = torch.zeros_like(fixed)
    is_latent[graph.latents] = True
    while True:
        edges = edges & torch.outer(nodes, nodes)
        useless = nodes & ~fixed & (~edges.any(0) | (is_latent & ~edges.any(1)))
        if not useless.any():
            return nodes, edges
        nodes = nodes & ~useless


def total_effects(graph: Any) -> Tensor:
    """By powers."""
    parts = graph.adjacency.clone()
    parts[graph.latents] = parts[graph.latents] / graph.activations[:, None]
    parts[graph.targets] = 0
    step = graph.adjacency[graph.targets]
    total = step
    for _ in range(graph.n_layers):
        step = step @ parts
        total = total + step
    return total


@torch.no_grad()
def ablate_latents(
    model: Any, transcoders: Sequence[Any], tokens: Tensor, sets: Sequence[Tensor], frozen: bool, replaced: bool
) -> Tensor:
    """One run for each set."""
    _, cache = run_with_cache(model, tokens)
    answers = []
    for features in sets:
        seen: list[Tensor] = []

        def write(mlp_out: Tensor, hook: Any, seen: list[Tensor] = seen, features: Tensor = features) -> Tensor:
            layer = len(seen) - 1
            transcoder = transcoders[layer]
            latents, kept = transcoder.encode(seen[layer]), transcoder.encode(seen[layer])
            for row in features.tolist():
                if row[0] == layer:
                    kept[0, row[1], row[2]] = 0
            own = cache["mlp_out", layer] - transcoder(cache["ln2.normalized", layer])
            if replaced:
                return transcoder.decode(kept) + own
            return mlp_out + (kept - latents) @ transcoder.W_dec

        fns: list[Any] = [("*ln2.hook_normalized", lambda x, hook, seen=seen: seen.append(x)), ("*hook_mlp_out", write)]
        if frozen:
            fns.append((["*hook_pattern", "*hook_scale"], lambda _, hook: cache[hook.name]))
        names = [(name, fn) for names, fn in fns for name in ([names] if isinstance(names, str) else names)]
        with hooks(model, names):
            answers.append(model(tokens))
    return torch.cat(answers)


@torch.no_grad()
def swap_latents(model: Any, transcoders: Sequence[Any], base: Tensor, source: Tensor, features: Tensor) -> Tensor:
    caches = [run_with_cache(model, tokens)[1] for tokens in (base, source)]
    changes = torch.zeros_like(caches[0].stack("mlp_out"))
    for layer, pos, latent in features.tolist():
        own, other = (transcoders[layer].encode(cache["ln2.normalized", layer][0])[pos, latent] for cache in caches)
        changes[layer, 0, pos] += (other - own) * transcoders[layer].W_dec[latent]

    def add(mlp_out: Tensor, hook: Any, layer: int) -> Tensor:
        return mlp_out + changes[layer]

    fns = {f"blocks.{layer}.hook_mlp_out": partial(add, layer=layer) for layer in range(len(transcoders))}
    with hooks(model, fns):
        return model(base)


def supernode_edges(graph: Any, groups: Sequence[Tensor]) -> Tensor:
    shares = normalised_adjacency(graph.adjacency)
    matter = graph.weights + influence(shares, graph.weights)
    member = torch.stack([torch.isin(torch.arange(len(matter)), group) for group in groups]).to(shares.dtype)
    weighted = member * matter
    total = weighted.sum(1, keepdim=True)
    return weighted / total.where(total > 0, 1) @ shares @ member.T
