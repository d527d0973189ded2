"""Checks of chapter 10: the attribution graph, what matters in it, and what of it can go."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch10.linear import frozen
from course_utils.checks.ch10.small import (
    D_VOCAB,
    KINDS,
    Fn,
    by_weights,
    latents_in,
    model_of,
    run_of,
    tokens_of,
    transcoders_of,
    without,
    written_in,
)
from course_utils.checks.ch10.transcoders import missed
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree


@dataclass(frozen=True)
class ToyGraph:
    """What the lesson's `Graph` has, for checks."""

    adjacency: Tensor
    features: Tensor
    activations: Tensor
    n_layers: int
    n_pos: int

    @property
    def errors(self) -> slice:
        return slice(self.n_pos, self.n_pos + self.n_layers * self.n_pos)

    @property
    def latents(self) -> slice:
        return slice(self.errors.stop, self.errors.stop + len(self.features))

    @property
    def targets(self) -> slice:
        return slice(self.latents.stop, len(self.adjacency))

    @property
    def weights(self) -> Tensor:
        is_target = torch.arange(len(self.adjacency)) >= self.latents.stop
        return is_target.to(self.adjacency) / is_target.sum()


def toy_graph(n_pos: int, counts: Sequence[int], n_targets: int, seed: int) -> ToyGraph:
    """A random graph with `counts[layer]` latents in each layer; some edges are missing, and some latents have none."""
    n_layers, n_latents = len(counts), sum(counts)
    features = [(layer, i % n_pos, 7 * i + layer) for layer, n in enumerate(counts) for i in range(n)]
    n_fixed = n_pos * (1 + n_layers)
    size = n_fixed + n_latents + n_targets
    stage = [0] * n_pos + [1 + layer for layer in range(n_layers) for _ in range(n_pos)]
    stage += [1 + layer for layer, _, _ in features] + [n_layers + 1] * n_targets
    adjacency = noise(size, size, seed=seed) * (noise(size, size, seed=seed + 1) > -0.6)
    possible = torch.tensor(stage)[:, None] > torch.tensor(stage)
    possible[:n_fixed] = False
    possible[n_fixed + 1] = False  # a latent into which nothing comes
    possible[:, n_fixed + n_latents - 1] = False  # and one out of which nothing comes
    activations = 0.3 + noise(n_latents, seed=seed + 2).abs()
    return ToyGraph(adjacency * possible, torch.tensor(features), activations, n_layers, n_pos)


GRAPHS = ((3, (4, 2), 1, 5), (2, (3, 3, 4), 2, 21), (4, (5,), 3, 37))

# ------------------------------------------------------------------------------------------------- attribution_graph


def graphed(
    errors: Callable[[Tensor], Tensor] = lambda errors: errors,
    row: Callable[[Any, int], Tensor] = lambda transcoder, latent: transcoder.W_dec[latent],
    change: Callable[[Tensor], Tensor] = lambda adjacency: adjacency,
    at: int = -1,
    places: Sequence[str] | None = None,
    active: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Fn:
    """An attribution graph by taking out one node after the other; with gradients only where `places` says what is
    frozen."""

    def attribution_graph(model: Any, transcoders: Sequence[Any], tokens: Tensor, targets: Tensor) -> ToyGraph:
        cache = run_of(model, tokens)
        n_layers, n_pos = len(transcoders), tokens.shape[1]
        latents = torch.stack([latents_in(cache, transcoders, layer) for layer in range(n_layers)])
        features = latents.nonzero()
        missing = errors(missed()(model, transcoders, tokens)[:, 0])
        vectors = [(0, pos, cache["resid_pre", 0][0, pos]) for pos in range(n_pos)]
        vectors += [(1 + layer, pos, missing[layer, pos]) for layer in range(n_layers) for pos in range(n_pos)]
        vectors += [
            (1 + layer, pos, active(latents)[layer, pos, latent] * row(transcoders[layer], latent))
            for layer, pos, latent in features.tolist()
        ]
        written = written_in(cache)
        if places is None:
            reads, logits = by_weights(model, cache, without(written, vectors))
            differences = [x[:1] - x[1:] for x in reads], logits[:1] - logits[1:]
        else:
            differences = _by_gradients(model, tokens, cache, written, vectors, places)
        rows = [
            differences[0][layer][:, pos] @ transcoders[layer].W_enc[:, latent]
            for layer, pos, latent in features.tolist()
        ]
        rows += [differences[1][:, at] @ target for target in targets]
        size = len(vectors) + len(targets)
        adjacency = written.new_zeros(size, size)
        adjacency[size - len(rows) :, : len(vectors)] = torch.stack(rows)
        activations = latents[latents != 0]
        return ToyGraph(change(adjacency), features, activations, n_layers, n_pos)

    return attribution_graph


def _by_gradients(
    model: Any,
    tokens: Tensor,
    cache: Any,
    written: Tensor,
    vectors: Sequence[tuple[int, int, Tensor]],
    places: Sequence[str],
) -> tuple[list[Tensor], Tensor]:
    """The same by forward differences of the derivative, for a run that is not linear."""

    def along(change: Tensor) -> Any:
        reads, logits = frozen(places)(model, tokens, cache, written + change)
        return (*reads, logits)

    found = []
    for writer, pos, vector in vectors:
        direction = torch.zeros_like(written)
        direction[writer, 0, pos] = vector
        found.append(torch.func.jvp(along, (torch.zeros_like(written),), (direction,))[1])
    stacked = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return stacked[:-1], stacked[-1]


def swapped_blocks(adjacency: Tensor) -> Tensor:
    """Errors before embeddings; for graphs of five positions and three layers."""
    order = [*range(5, 20), *range(5), *range(20, len(adjacency))]
    return adjacency[:, order]


def by_position(adjacency: Tensor) -> Tensor:
    """Errors by position, and by layer within it; for graphs of five positions and three layers."""
    order = [5 + 5 * layer + pos for pos in range(5) for layer in range(3)]
    return adjacency[:, [*range(5), *order, *range(20, len(adjacency))]]


@known_mistakes(
    {
        "the error nodes are forgotten: their columns are 0.": graphed(errors=torch.zeros_like),
        "the errors have the wrong sign: it is what the MLP writes minus what the transcoder writes.": graphed(
            errors=torch.neg
        ),
        "errors of layer 0 stand at every layer.": graphed(errors=lambda errors: errors[:1].expand_as(errors)),
        "the decoder's bias is counted with each latent; it belongs to none.": graphed(
            row=lambda transcoder, latent: transcoder.W_dec[latent] + transcoder.b_dec
        ),
        "the activation is left out: edges are gradients times W_dec.": graphed(active=torch.ones_like),
        "gradients go through the attention patterns; they are to be frozen.": graphed(places=("*hook_scale",)),
        "gradients go through the scales of the norms; they are to be frozen.": graphed(places=("*hook_pattern",)),
        "the adjacency is transposed: rows are where edges go.": graphed(
            change=lambda adjacency: adjacency.T.contiguous()
        ),
        "edges have lost their signs.": graphed(change=torch.abs),
        "targets are read at the first position; it is the last one.": graphed(at=0),
        "errors come before embeddings; embeddings are the first nodes.": graphed(change=swapped_blocks),
        "errors are in order of position; all positions of layer 0 come first.": graphed(change=by_position),
    }
)
def check_attribution_graph(fn: Fn) -> None:
    """Against runs without one node; three kinds of models, one to three targets."""
    name = "attribution_graph"
    for n_targets, kind in enumerate(KINDS, start=1):
        n_layers = 3 if n_targets == 1 else 2
        model, transcoders, tokens = model_of(kind, n_layers), transcoders_of(n_layers), tokens_of(seed=n_targets)
        targets = noise(n_targets, D_VOCAB, seed=n_targets)
        with unchanged(name, tokens=tokens, targets=targets):
            graph = fn(model, transcoders, tokens, targets)
        _is_graph(f"{name} of a {kind}", graph, graphed()(model, transcoders, tokens, targets))
    learning = copy.deepcopy(model_of(n_layers=1)).requires_grad_()
    own = [copy.deepcopy(transcoders_of()[1]).requires_grad_()]
    with nothing_left_behind(name, learning):
        graph = fn(learning, own, tokens, targets)
    if graph.adjacency.requires_grad or graph.activations.requires_grad:
        raise CheckFailed(f"{name}: the graph hangs on a graph of autograd.\n  Next: `.detach()` what is kept.")
    double, doubled = copy.deepcopy(learning).double(), [copy.deepcopy(own[0]).double()]
    arguments = (double.requires_grad_(False), [doubled[0].requires_grad_(False)], tokens, targets.double())
    _is_graph(f"{name} in float64", fn(*arguments), graphed()(*arguments))


def _is_graph(name: str, graph: Any, right: ToyGraph) -> None:
    if not hasattr(graph, "adjacency"):
        got = "None" if graph is None else f"a {type(graph).__name__}"
        raise CheckFailed(f"{name}: expected a Graph, got {got}.\n  Next: return Graph(adjacency, features, ...).")
    compare(f"{name}: features", graph.features, right.features, "feature 3")
    compare(f"{name}: activations", graph.activations, right.activations, "feature")
    compare(f"{name}: adjacency", graph.adjacency, right.adjacency, "target source", rtol=1e-3, atol=1e-4)
    agree(name, "graph.n_layers, graph.n_pos", (graph.n_layers, graph.n_pos), (right.n_layers, right.n_pos))


# ------------------------------------------------------------------------------------------------------ shares, paths


def shared(size: Callable[[float], float] = abs, along: str = "row", empty: float = 0.0, of_sums: bool = False) -> Fn:
    def normalised_adjacency(adjacency: Tensor) -> Tensor:
        table = [[size(entry) for entry in row] for row in adjacency.tolist()]
        lines = table if along == "row" else [list(column) for column in zip(*table, strict=True)]
        totals = [sum(line) for line in lines] if not of_sums else [max(line) for line in lines]
        shares = [
            [entry / total if total else empty for entry in line] for line, total in zip(lines, totals, strict=True)
        ]
        out = torch.tensor(shares, dtype=adjacency.dtype, device=adjacency.device)
        return out if along == "row" else out.T

    return normalised_adjacency


@known_mistakes(
    {
        "columns sum to 1: it is what goes out that is shared, not what comes in.": shared(along="column"),
        "signs are kept; take absolute values first.": shared(size=float),
        "a row of zeros becomes NaN.": shared(empty=float("nan")),
        "rows are divided by their largest entry; divide by their sum.": shared(of_sums=True),
        "squares are shared; take absolute values.": shared(size=lambda entry: entry**2),
        "nothing is divided.": lambda adjacency: adjacency.abs(),
    }
)
def check_normalised_adjacency(fn: Fn) -> None:
    """Three graphs, with rows of zeros and rows of very small numbers."""
    name = "normalised_adjacency"
    for n_pos, counts, n_targets, seed in GRAPHS:
        adjacency = toy_graph(n_pos, counts, n_targets, seed).adjacency
        adjacency[-1] *= 1e-6
        with unchanged(name, adjacency=adjacency):
            compare(f"{name} of {len(adjacency)} nodes", fn(adjacency), shared()(adjacency), "target source")
    follows_input(name, fn, (adjacency,), "target source")
    follows_every_kind(name, fn, (noise(4, 4, seed=2),), "target source")


def paths(
    most: int | None = None,
    fewest: int = 1,
    forwards: bool = False,
    weigh: Callable[[float, float], float] = lambda share, weight: share * weight,
) -> Fn:
    """The sum over paths, one path after the other."""

    def influence(shares: Tensor, weights: Tensor) -> Tensor:
        table, ends = shares.tolist(), weights.tolist()
        if forwards:
            table = [list(column) for column in zip(*table, strict=True)]

        def onwards(node: int, n_edges: int) -> float:
            """All paths that go on from here, with so many edges behind them."""
            found = ends[node] if n_edges >= fewest else 0.0
            if most is not None and n_edges >= most:
                return found
            return found + sum(
                weigh(table[target][node], onwards(target, n_edges + 1))
                for target in range(len(table))
                if table[target][node]
            )

        answers = [onwards(node, 0) for node in range(len(table))]
        return torch.tensor(answers, dtype=shares.dtype, device=shares.device)

    return influence


def small_shares(n: int, seed: int) -> Tensor:
    """Shares of a graph whose nodes are in an order."""
    below = noise(n, n, seed=seed).abs().tril(-1)
    return below / below.sum(1, keepdim=True).clamp(min=1e-9)


@known_mistakes(
    {
        "only direct edges count; paths of any length do.": paths(most=1),
        "only paths of one or two edges count.": paths(most=2),
        "a path of no edge counts: the ends have their own weight.": paths(fewest=0),
        "edges are followed the other way; rows are where edges go.": paths(forwards=True),
        "only paths of two edges or more count.": paths(fewest=2),
    }
)
def check_influence(fn: Fn) -> None:
    """Against a sum over all paths; nodes in order and not; shares that do not sum to 1; weights anywhere."""
    name = "influence"
    for n, seed in ((5, 1), (7, 2), (3, 3)):
        shares, weights = small_shares(n, seed) * 0.9, noise(n, seed=seed + 5)
        weights[0], weights[1] = 0, -0.7
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for what, table, ends in (
            ("in order", shares, weights),
            ("in any order", shares[order][:, order], weights[order]),
        ):
            with unchanged(name, shares=table, weights=ends):
                compare(f"{name} of {n} nodes {what}", fn(table, ends), paths()(table, ends), "node")
    follows_input(name, fn, (shares, weights), "node")
    follows_every_kind(name, fn, (shares, weights), "node")


# -------------------------------------------------------------------------------------------------------------- scores


def reach(graph: Any, normalise: Fn | None = None) -> Tensor:
    """The influence of each node, by powers of the shares."""
    shares = (normalise or shared())(graph.adjacency)
    found, step = torch.zeros_like(graph.weights), graph.weights
    for _ in range(graph.n_layers + 2):
        step = step @ shares
        found = found + step
    return found


def raw(adjacency: Tensor) -> Tensor:
    return adjacency


def replacing(
    normalise: Fn | None = None,
    score: Callable[[Any, Any], float] = lambda tokens, errors: tokens / (tokens + errors),
    reached: Callable[[Any], Tensor] = lambda graph: reach(graph),
) -> Fn:
    def replacement_score(graph: Any) -> float:
        found = reach(graph, normalise) if normalise else reached(graph)
        return float(score(sum(found[: graph.n_pos].tolist()), sum(found[graph.errors].tolist())))

    return replacement_score


@known_mistakes(
    {
        "the adjacency is not normalised.": replacing(normalise=raw),
        "it is the share of the errors.": replacing(score=lambda tokens, errors: errors / (tokens + errors)),
        "errors count as lost only once against all nodes; compare tokens with tokens and errors.": replacing(
            score=lambda tokens, errors: 1 - errors
        ),
        "it is the influence of the tokens, not their share.": replacing(score=lambda tokens, errors: tokens),
        "only edges that go straight into targets count; paths of any length do.": replacing(
            reached=lambda graph: graph.weights @ shared()(graph.adjacency)
        ),
    }
)
def check_replacement_score(fn: Fn) -> None:
    """Three graphs; one without errors, one whose errors do not matter."""
    name = "replacement_score"
    for graph in _graphs():
        agree_closely(name, f"{name} of {len(graph.adjacency)} nodes", fn(graph), replacing()(graph))


def _graphs() -> list[ToyGraph]:
    graphs = [toy_graph(*sizes) for sizes in GRAPHS]
    graphs[0].adjacency[:, graphs[0].errors] *= 0.1
    fewer = toy_graph(2, (3, 2), 1, 50)
    fewer.adjacency[:, fewer.errors] = 0
    return [*graphs, fewer]


def agree_closely(name: str, call: str, actual: object, expected: float) -> None:
    """A plain number, to five digits."""
    if isinstance(actual, Tensor):
        raise CheckFailed(f"{name}: expected a plain number, got a Tensor.\n  {call}\n  Next: `.item()`.")
    agree(name, call, round(actual, 5) + 0.0 if isinstance(actual, float) else actual, round(expected, 5) + 0.0)


def completing(
    normalise: Fn | None = None,
    matter: Callable[[Any, Tensor], Tensor] = lambda graph, found: found + graph.weights,
    explained: Callable[[Any, Tensor], Tensor] = lambda graph, shares: 1 - shares[:, graph.errors].sum(1),
) -> Fn:
    def completeness_score(graph: Any) -> float:
        shares = (normalise or shared())(graph.adjacency)
        weights = matter(graph, reach(graph, normalise))
        return float((weights * explained(graph, shares)).sum() / weights.sum())

    return completeness_score


@known_mistakes(
    {
        "the adjacency is not normalised.": completing(normalise=raw),
        "the targets do not count with their own weight.": completing(matter=lambda graph, found: found),
        "every node counts the same; the ones that matter count more.": completing(
            matter=lambda graph, found: torch.ones_like(found)
        ),
        "only the targets count; every node does, as much as it matters.": completing(
            matter=lambda graph, found: graph.weights
        ),
        "it is the share that comes from errors.": completing(
            explained=lambda graph, shares: shares[:, graph.errors].sum(1)
        ),
        "what counts as explained is what comes from tokens; what comes from latents does, too.": completing(
            explained=lambda graph, shares: shares[:, : graph.n_pos].sum(1)
        ),
        "embeddings and errors count as not explained: nothing comes into them.": completing(
            explained=lambda graph, shares: shares.sum(1) - shares[:, graph.errors].sum(1)
        ),
    }
)
def check_completeness_score(fn: Fn) -> None:
    """Three graphs, and one without errors."""
    name = "completeness_score"
    for graph in _graphs():
        agree_closely(name, f"{name} of {len(graph.adjacency)} nodes", fn(graph), completing()(graph))


# ------------------------------------------------------------------------------------------------------------- pruning


def part(values: Tensor, share: float) -> Tensor:
    """The fewest largest values with this share, one after the other."""
    numbers = values.flatten().tolist()
    kept: set[int] = set()
    reached = 0.0
    for i in sorted(range(len(numbers)), key=lambda i: -numbers[i]):
        if kept and reached >= share * sum(numbers):
            break
        kept.add(i)
        reached += numbers[i]
    return torch.tensor([i in kept for i in range(len(numbers))]).reshape(values.shape)


def pruning(
    always: Callable[[Any, int], bool] = lambda graph, node: node < graph.n_pos or node >= graph.targets.start,
    again: bool = True,
    edges_first: bool = False,
    weigh: Callable[[Any, Tensor], Tensor] = lambda graph, shares: powers(shares, graph.weights) + graph.weights,
    tidy: bool = True,
    once: bool = False,
    normalise: Fn | None = None,
    errors_need_more: bool = False,
) -> Fn:
    """Pruning node by node, with a step replaced."""
    divide = normalise or shared()

    def prune(graph: Any, node_share: float, edge_share: float) -> tuple[Tensor, Tensor]:
        size = len(graph.adjacency)
        every = torch.ones(size, dtype=torch.bool)
        before = divide(graph.adjacency)

        def choose_edges(shares: Tensor) -> Tensor:
            return part(shares * weigh(graph, shares)[:, None], edge_share)

        if edges_first:
            allowed = choose_edges(before)
            nodes = part(powers(divide(graph.adjacency * allowed), graph.weights), node_share)
        else:
            allowed = torch.ones(size, size, dtype=torch.bool)
            nodes = part(powers(before, graph.weights), node_share)
        nodes = nodes | torch.tensor([always(graph, node) for node in range(size)])
        kept = nodes[:, None] & nodes & allowed
        edges = kept if edges_first else choose_edges(divide(graph.adjacency * kept) if again else before * kept)
        while tidy:
            gone = [
                node
                for node in range(graph.n_pos, graph.targets.start)
                if nodes[node]
                and (
                    not edges[:, node].any()
                    or ((node >= graph.latents.start or errors_need_more) and not edges[node].any())
                )
            ]
            for node in gone:
                nodes[node] = edges[node] = edges[:, node] = False
            if not gone or once:
                break
        return nodes & every, edges

    return prune


def powers(shares: Tensor, weights: Tensor) -> Tensor:
    found, step = torch.zeros_like(weights), weights
    for _ in range(6):
        step = step @ shares
        found = found + step
    return found


@known_mistakes(
    {
        "edges are pruned before nodes.": pruning(edges_first=True),
        "embeddings are pruned, too; they are kept in any case.": pruning(
            always=lambda graph, node: node >= graph.targets.start
        ),
        "targets are pruned, too; they are kept in any case.": pruning(always=lambda graph, node: node < graph.n_pos),
        "errors are kept in any case; only embeddings and targets are.": pruning(
            always=lambda graph, node: node < graph.latents.start or node >= graph.targets.start
        ),
        "the adjacency is not normalised anew after nodes have gone.": pruning(again=False),
        "the adjacency is not normalised.": pruning(normalise=raw),
        "an edge counts its share alone; it also matters where it goes.": pruning(
            weigh=lambda graph, shares: torch.ones(len(shares))
        ),
        "edges into targets count nothing: the weight of their end is missing.": pruning(
            weigh=lambda graph, shares: powers(shares, graph.weights)
        ),
        "latents that lead nowhere stay.": pruning(tidy=False),
        "latents that lead nowhere go once; what led only to them has to go then.": pruning(once=True),
        "errors go because nothing comes into them; nothing ever does.": pruning(errors_need_more=True),
    }
)
def check_prune(fn: Fn) -> None:
    """Three graphs with three pairs of shares each; one in which a latent loses all edges out before those into it."""
    name = "prune"
    narrow = toy_graph(2, (2, 5, 3), 1, 1)
    narrow.adjacency[narrow.latents.start : narrow.latents.start + 2] = 0
    narrow.adjacency[narrow.latents.start : narrow.latents.start + 2, 0] = 1
    cases = []
    for sizes in ((2, (5, 4, 6), 2, 21), (4, (7,), 3, 37), (3, (4, 6), 1, 5)):
        cases.append((toy_graph(*sizes), ((0.9, 0.7), (0.8, 0.8), (0.5, 0.98))))
    few_edges = toy_graph(4, (7,), 3, 37), ((0.8, 0.2),)  # a target loses all its edges
    for graph, pairs in [*cases, (narrow, ((0.9, 0.5),)), few_edges]:
        for node_share, edge_share in pairs:
            call = f"{name}(graph of {len(graph.adjacency)} nodes, {node_share}, {edge_share})"
            answer = fn(graph, node_share, edge_share)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise CheckFailed(f"{name}: expected nodes and edges.\n  {call}\n  Next: return nodes, edges.")
            nodes, edges = pruning()(graph, node_share, edge_share)
            compare(f"{call}: edges", answer[1], edges, "target source")
            compare(f"{call}: nodes", answer[0], nodes, "node")


# ---------------------------------------------------------------------------------------------------------- supernodes


def grouped(
    weigh: Callable[[Any, Tensor], Tensor] = lambda graph, found: found + graph.weights,
    total: bool = False,
    average_sources: bool = False,
    normalise: Fn | None = None,
    transposed: bool = False,
) -> Fn:
    def supernode_edges(graph: Any, groups: Sequence[Tensor]) -> Tensor:
        shares = (normalise or shared())(graph.adjacency)
        matter = weigh(graph, reach(graph)).tolist()
        table = [
            [_between(shares, target.tolist(), source.tolist(), matter, total, average_sources) for source in groups]
            for target in groups
        ]
        out = torch.tensor(table, dtype=graph.adjacency.dtype)
        return out.T.contiguous() if transposed else out

    return supernode_edges


def _between(
    shares: Tensor, target: list[int], source: list[int], matter: list[float], total: bool, average_sources: bool
) -> float:
    found = sum(matter[t] * float(shares[t, s]) for t in target for s in source)
    weight = sum(matter[t] for t in target)
    found = found if total else (found / weight if weight > 0 else 0.0)
    return found / len(source) if average_sources else found


@known_mistakes(
    {
        "the shares of a group's nodes are averaged evenly; they count as much as they matter.": grouped(
            weigh=lambda graph, found: torch.ones_like(found)
        ),
        "the shares of a group's nodes are added up; take their mean.": grouped(total=True),
        "what comes from a group is averaged over its nodes; add it up.": grouped(average_sources=True),
        "the adjacency is not normalised.": grouped(normalise=raw),
        "targets have no weight of their own.": grouped(weigh=lambda graph, found: found),
        "the table is transposed: rows are where edges go.": grouped(transposed=True),
    }
)
def check_supernode_edges(fn: Fn) -> None:
    """Groups of one to four nodes, of all kinds; one that does not matter."""
    name = "supernode_edges"
    for sizes in GRAPHS[:2]:
        graph = toy_graph(*sizes)
        n_fixed, end = graph.latents.start, graph.targets.start
        groups = [
            torch.arange(graph.n_pos),
            torch.tensor([n_fixed, n_fixed + 2]),
            torch.tensor([end - 2, n_fixed + 3, n_fixed + 1]),
            torch.arange(end, len(graph.adjacency)),
            torch.tensor([end - 1]),
        ]
        right = grouped()(graph, groups)
        compare(f"{name} of {len(graph.adjacency)} nodes", fn(graph, groups), right, "target source")
        one = fn(graph, groups[1:2])
        compare(f"{name} of one group", one, grouped()(graph, groups[1:2]), "target source")
    double = ToyGraph(graph.adjacency.double(), graph.features, graph.activations.double(), graph.n_layers, graph.n_pos)
    compare(f"{name} in float64", fn(double, groups), grouped()(double, groups), "target source")
