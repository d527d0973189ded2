"""What the checks of the graph in chapter 10 cannot know: see tests/test_checks.py."""

from dataclasses import replace
from typing import Any

import torch

import solutions.ch10_circuits as ref
from course_utils.checks.ch10.graph import completing, graphed, grouped, paths, pruning, replacing, shared, toy_graph
from course_utils.checks.ch10.small import KINDS, by_weights, model_of, run_of, tokens_of, transcoders_of, written_in
from course_utils.checks.modules import noise
from tests.ch10 import other_circuits as other

SECRETS = ("is_grads_batched", "linalg.solve", "largest_part(", "abs()")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "features.tolist() -> features",  # rows of numbers, as tensors
    "0 -> -1",  # the only prompt
    "x.detach() -> x",  # detached in the end
    "written_to_stream(cache).detach() -> written_to_stream(cache)",  # the models here have no gradients
    "int(here.sum()) -> here.sum()",
    "16 -> 17",  # how many at a time
    "16 -> 15",
    "total > 0 -> total != 0",  # a sum of absolute values
    "1 -> 2",  # what nothing is divided by
    "graph.adjacency * nodes * nodes[:, None] -> graph.adjacency * nodes",  # nothing leaves nodes that are gone
}


def without_idle_targets(graph: Any, node_share: float, edge_share: float) -> Any:
    nodes, edges = other.prune(graph, node_share, edge_share)
    nodes[graph.targets] &= edges[graph.targets].any(dim=1)
    return nodes, edges


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "attribution_graph": [
        ("values are wrong", graphed(change=lambda adjacency: 2 * adjacency)),
        ("values are wrong", graphed(at=-2)),
        ("expected a Graph", lambda *args: other.attribution_graph(*args).adjacency),
        ("features", lambda *args: replace(other.attribution_graph(*args), features=torch.zeros(1, 3))),
        ("n_pos", lambda *args: replace(other.attribution_graph(*args), n_pos=4)),
    ],
    "normalised_adjacency": [
        ("values are wrong", lambda adjacency: adjacency.abs().softmax(1)),
        ("values are wrong", lambda adjacency: adjacency.abs() / (adjacency.abs().sum(1, keepdim=True) + 1e-2)),
        ("wrong shape", lambda adjacency: shared()(adjacency)[1:]),
    ],
    "influence": [
        ("wrong", paths(most=3)),
        ("wrong", paths(weigh=lambda share, weight: share + weight)),
        ("wrong", lambda shares, weights: paths()(shares, weights.abs())),
        ("wrong shape", lambda shares, weights: paths()(shares, weights)[None]),
    ],
    "replacement_score": [
        ("plain number", lambda graph: torch.tensor(other.replacement_score(graph))),
        ("wrong answer", replacing(score=lambda tokens, errors: tokens / (tokens + 2 * errors))),
    ],
    "completeness_score": [
        ("plain number", lambda graph: torch.tensor(other.completeness_score(graph))),
        ("wrong answer", completing(matter=lambda graph, found: found + 2 * graph.weights)),
    ],
    "prune": [
        ("expected nodes and edges", lambda *args: other.prune(*args)[0]),
        ("nodes", without_idle_targets),
        ("wrong", lambda graph, node_share, edge_share: pruning()(graph, edge_share, node_share)),
        ("expected dtype bool", lambda *args: tuple(mask.long() for mask in other.prune(*args))),
    ],
    "supernode_edges": [
        ("values", grouped(weigh=lambda graph, found: (found + graph.weights) ** 2)),
        ("wrong shape", lambda *args: other.supernode_edges(*args)[:, 1:]),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_rows_and_the_share_of_biases_sum_to_what_they_stand_for() -> None:
    """What is left is what the frozen run gives if embeddings, latents and errors write nothing: biases alone."""
    for kind in KINDS:
        model, transcoders, tokens, targets = model_of(kind), transcoders_of(), tokens_of(), noise(2, 11, seed=1)
        graph = ref.attribution_graph(model, transcoders, tokens, targets)
        cache = run_of(model, tokens)
        biases = torch.zeros_like(written_in(cache))
        for layer, transcoder in enumerate(transcoders):
            biases[1 + layer] = transcoder.b_dec
        whole, alone = (by_weights(model, cache, written)[1][0, -1] for written in (written_in(cache), biases))
        sums = graph.adjacency.sum(dim=1)
        torch.testing.assert_close(sums[graph.targets], targets @ (whole - alone), rtol=1e-3, atol=1e-4)
        assert not sums[: graph.latents.start].any()


def test_influence_is_the_sum_of_powers_and_begins_and_ends_somewhere() -> None:
    graph = toy_graph(3, (4, 2), 1, 5)
    shares = ref.normalised_adjacency(graph.adjacency)
    found = ref.influence(shares, graph.weights)
    series = sum(graph.weights @ torch.linalg.matrix_power(shares, n) for n in range(1, 6))
    torch.testing.assert_close(found, series)
    into = shares.sum(dim=1) > 0
    begins = found[~into].sum()  # what nothing comes into
    torch.testing.assert_close(begins, torch.tensor(1.0))  # all of the target's weight is traced back to a beginning


def test_pruning_with_nearly_everything_keeps_what_leads_somewhere() -> None:
    graph = toy_graph(3, (4, 2), 1, 5)
    nodes, edges = ref.prune(graph, 0.9999, 0.9999)
    found = ref.influence(ref.normalised_adjacency(graph.adjacency), graph.weights)
    middle = torch.arange(graph.n_pos, graph.targets.start)
    assert not (nodes[middle] & (found[middle] == 0)).any()
    assert not edges[~nodes].any()
    assert not edges[:, ~nodes].any()
