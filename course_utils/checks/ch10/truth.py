"""Checks of chapter 10: what a graph predicts, and what happens."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch10.graph import GRAPHS, ToyGraph, toy_graph
from course_utils.checks.ch10.small import Fn, model_of, run_of, tokens_of, transcoders_of
from course_utils.checks.ch10.transcoders import missed
from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.hooks import HookPoint, run_with_hooks

# ------------------------------------------------------------------------------------------------------- total effects


def effects(
    fraction: Callable[[float, float], float] = lambda entry, activation: entry / activation,
    longest: int = 99,
    direct: bool = True,
    size: Callable[[float], float] = float,
) -> Fn:
    """Node by node, from the last back to the first: what the targets lose without it."""

    def total_effects(graph: Any) -> Tensor:
        table = [[size(entry) for entry in row] for row in graph.adjacency.tolist()]
        activations, first = graph.activations.tolist(), graph.latents.start
        rows = []
        for target in range(graph.targets.start, len(table)):

            def lost(node: int, n_edges: int, target: int = target) -> float:
                own = table[target][node] if direct or n_edges else 0.0
                if n_edges + 1 >= longest:
                    return own
                return own + sum(
                    fraction(table[latent][node], activations[latent - first]) * lost(latent, n_edges + 1)
                    for latent in range(first, graph.targets.start)
                    if table[latent][node]
                )

            rows.append([lost(node, 0) for node in range(len(table))])
        return torch.tensor(rows, dtype=graph.adjacency.dtype, device=graph.adjacency.device)

    return total_effects


@known_mistakes(
    {
        "only direct edges count; paths through other latents do, too.": effects(longest=1),
        "only paths through one latent at most count.": effects(longest=2),
        "edges into latents are not divided by the latent's activation.": effects(
            fraction=lambda entry, activation: entry
        ),
        "edges into latents are multiplied by the latent's activation.": effects(
            fraction=lambda entry, activation: entry * activation
        ),
        "signs are lost.": effects(size=abs),
        "the direct edge into the target is left out.": effects(direct=False),
    }
)
def check_total_effects(fn: Fn) -> None:
    """Three graphs with one to three targets."""
    name = "total_effects"
    for sizes in GRAPHS:
        graph = toy_graph(*sizes)
        with unchanged(name, adjacency=graph.adjacency, activations=graph.activations):
            actual = fn(graph)
        compare(f"{name} of {len(graph.adjacency)} nodes", actual, effects()(graph), "target node", rtol=1e-3)
    double = ToyGraph(graph.adjacency.double(), graph.features, graph.activations.double(), graph.n_layers, graph.n_pos)
    compare(f"{name} in float64", fn(double), effects()(double), "target node")


# ------------------------------------------------------------------------------------------------------- interventions


def ablating(
    own_values: bool = False,
    places: Sequence[str] = ("*hook_pattern", "*hook_scale"),
    errors: Callable[[Tensor], Tensor] = lambda errors: errors,
    minus: Callable[[Any, Tensor], Tensor] = lambda transcoder, gone: gone @ transcoder.W_dec,
    at: Callable[[Tensor], Tensor] = lambda features: features,
    flags: Callable[[bool, bool], tuple[bool, bool]] = lambda frozen, replaced: (frozen, replaced),
    together: bool = True,
    all_positions: bool = False,
    keep: bool = False,
) -> Fn:
    """One set after the other, each in a run of its own."""

    @torch.no_grad()
    def ablate_latents(
        model: Any, transcoders: Sequence[Any], tokens: Tensor, sets: Sequence[Tensor], frozen: bool, replaced: bool
    ) -> Tensor:
        frozen, replaced = flags(frozen, replaced)
        cache = run_of(model, tokens)
        missing = errors(missed()(model, transcoders, tokens)) if replaced else None
        answers = []
        for features in sets:
            features = features if together else features[:1]
            listed = {tuple(row) for row in at(features).tolist()}
            reads: dict[int, Tensor] = {}

            def note(x: Tensor, hook: HookPoint, reads: dict[int, Tensor] = reads) -> None:
                reads[int(hook.name.split(".")[1])] = x

            def write(
                mlp_out: Tensor, hook: HookPoint, reads: dict[int, Tensor] = reads, listed: set[Any] = listed
            ) -> Tensor:
                layer = int(hook.name.split(".")[1])
                transcoder = transcoders[layer]
                x = cache["ln2.normalized", layer] if own_values else reads[layer]
                latents = transcoder.encode(x)[0]
                is_listed = torch.zeros_like(latents, dtype=torch.bool)
                for place in (latents + 1).nonzero().tolist():
                    same = any((layer, place[0], place[1]) == row for row in listed)
                    anywhere = all_positions and any((layer, place[1]) == (row[0], row[2]) for row in listed)
                    is_listed[tuple(place)] = same or anywhere
                gone = (latents * (is_listed ^ keep))[None]
                whole = mlp_out if missing is None else transcoder(reads[layer]) + missing[layer]
                return whole - minus(transcoder, gone)

            fns: list[tuple[str, Any]] = [("*ln2.hook_normalized", note), ("*hook_mlp_out", write)]
            if frozen:
                fns += [(place, lambda activation, hook: cache[hook.name]) for place in places]
            answers.append(run_with_hooks(model, tokens, hooks=fns)[0])
        return torch.stack(answers)

    return ablate_latents


def with_bias(transcoder: Any, gone: Tensor) -> Tensor:
    return transcoder.decode(gone)


@known_mistakes(
    {
        "the decoder's bias goes as well; only the latent's row of W_dec does.": ablating(minus=with_bias),
        "nothing is ablated.": ablating(minus=lambda transcoder, gone: 0 * gone @ transcoder.W_dec),
        "the latent's row is added; it is to be taken away.": ablating(
            minus=lambda transcoder, gone: -gone @ transcoder.W_dec
        ),
        "only the first latent of a set is ablated; all are, together.": ablating(together=False),
        "a latent is ablated at every position; only at the one that is listed.": ablating(all_positions=True),
        "the latents that are listed are kept, and all others ablated.": ablating(keep=True),
        "the errors are forgotten where transcoders write.": ablating(errors=torch.zeros_like),
        "`frozen` is ignored: nothing is frozen.": ablating(flags=lambda frozen, replaced: (False, replaced)),
        "`frozen` is ignored: patterns and scales are always frozen.": ablating(
            flags=lambda frozen, replaced: (True, replaced)
        ),
        "`replaced` is ignored: transcoders never write.": ablating(flags=lambda frozen, replaced: (frozen, False)),
        "`replaced` is ignored: transcoders always write.": ablating(flags=lambda frozen, replaced: (frozen, True)),
        "patterns are frozen and scales are not.": ablating(places=("*hook_pattern",)),
        "scales are frozen and patterns are not.": ablating(places=("*hook_scale",)),
        "a latent's activation is that of the model's own run; take it in this very run.": ablating(own_values=True),
    }
)
def check_ablate_latents(fn: Fn) -> None:
    """All three ways, and the fourth; sets of none, one and three latents; two kinds of models; float64."""
    name, axes = "ablate_latents", "ablation pos d_vocab"
    for kind, ways in (("GPT-2", ((True, True), (True, False), (False, False))), ("Llama", ((False, True),))):
        model, transcoders, tokens = model_of(kind, 2), transcoders_of(2), tokens_of(seed=5)
        sets = [features.clone() for features in ablated_sets(kind)]
        for frozen, replaced in ways:
            with unchanged(name, tokens=tokens, first=sets[0], last=sets[-1]):
                actual = fn(model, transcoders, tokens, sets, frozen, replaced)
            right = right_without(kind, frozen, replaced)
            compare(f"{name} in a {kind} with frozen={frozen}, replaced={replaced}", actual, right, axes)
    double, doubled = doubles(kind)
    with nothing_left_behind(name, double.requires_grad_()):
        actual = fn(double, doubled, tokens, sets, True, True)
    if isinstance(actual, Tensor) and actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")
    compare(f"{name} in float64", actual, right_without(kind, True, True, in_double=True), axes)


def doubles(kind: str) -> tuple[Any, list[Any]]:
    """Copies of the model and its transcoders in float64."""
    return copy.deepcopy(model_of(kind, 2)).double(), [copy.deepcopy(part).double() for part in transcoders_of(2)]


@cache
def ablated_sets(kind: str) -> list[Tensor]:
    """The sets of `check_ablate_latents`: the model runs once for them, not once a check."""
    return some_sets(model_of(kind, 2), transcoders_of(2), tokens_of(seed=5))


@cache
def right_without(kind: str, frozen: bool, replaced: bool, in_double: bool = False) -> Tensor:
    """What `ablate_latents` is compared with: the same for every answer, and a run of the model for each set."""
    model, transcoders = doubles(kind) if in_double else (model_of(kind, 2), transcoders_of(2))
    answer: Tensor = ablating()(model, transcoders, tokens_of(seed=5), ablated_sets(kind), frozen, replaced)
    return answer


def some_sets(model: Any, transcoders: Sequence[Any], tokens: Tensor) -> list[Tensor]:
    """Sets of latents that fire, by layer, position and number: one of each layer, three together, none."""
    cache = run_of(model, tokens)
    latents = torch.stack(
        [transcoder.encode(cache["ln2.normalized", i])[0] for i, transcoder in enumerate(transcoders)]
    )
    features = latents.nonzero()
    upper = int((features[:, 0] == 0).sum())
    return [features[3:4], features[upper + 1 : upper + 2], features[[1, 6, upper + 4]], features[:0]]


def swapping(
    value: Callable[[Tensor, Tensor], Tensor] = lambda before, after: after - before,
    runs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda base, source: (base, source),
    only: Callable[[Tensor], Tensor] = lambda features: features,
    row: Callable[[Any, int], Tensor] = lambda transcoder, latent: transcoder.W_dec[latent],
    everywhere: bool = False,
) -> Fn:
    """Latent by latent, added to what MLPs write by PyTorch's own hooks."""

    @torch.no_grad()
    def swap_latents(model: Any, transcoders: Sequence[Any], base: Tensor, source: Tensor, features: Tensor) -> Tensor:
        into, other = runs(base, source)
        own, theirs = run_of(model, into), run_of(model, other)
        added = torch.zeros(len(transcoders), *own["mlp_out", 0].shape, dtype=own["mlp_out", 0].dtype)
        for layer, pos, latent in only(features).tolist():
            before, after = (transcoders[layer].encode(cache["ln2.normalized", layer])[0] for cache in (own, theirs))
            change = value(before, after)
            for place in range(len(change)) if everywhere else [pos]:
                added[layer, 0, place] += change[place, latent] * row(transcoders[layer], latent)
        handles = [
            model.get_submodule(f"blocks.{layer}.hook_mlp_out").register_forward_hook(
                lambda module, inputs, output, layer=layer: output + added[layer]
            )
            for layer in range(len(transcoders))
        ]
        logits: Tensor = model(into)
        for handle in handles:
            handle.remove()
        return logits

    return swap_latents


@known_mistakes(
    {
        "nothing is swapped.": swapping(value=lambda before, after: 0 * after),
        "the latents are ablated; they take the source's activation.": swapping(value=lambda before, after: -before),
        "the source's activation comes on top of the base's own.": swapping(value=lambda before, after: after),
        "base and source are swapped: the run is on the base.": swapping(runs=lambda base, source: (source, base)),
        "the difference has the wrong sign: it is the source's activation minus the base's.": swapping(
            value=lambda before, after: before - after
        ),
        "only the first latent is swapped.": swapping(only=lambda features: features[:1]),
        "a latent is swapped at every position; only at the one that is listed.": swapping(everywhere=True),
        "the decoder's bias comes with each latent.": swapping(
            row=lambda transcoder, latent: transcoder.W_dec[latent] + transcoder.b_dec
        ),
    }
)
def check_swap_latents(fn: Fn) -> None:
    """Latents of the base and of the source; two kinds of models; none at all; float64."""
    name, axes = "swap_latents", "1 pos d_vocab"
    for kind in ("GPT-2", "Llama"):
        model, transcoders = model_of(kind, 2), transcoders_of(2)
        base, source = tokens_of(seed=5), tokens_of(seed=9)
        features = torch.cat([some_sets(model, transcoders, tokens)[2] for tokens in (base, source)]).unique(dim=0)
        for some in (features, features[-1:], features[:0]) if kind == "GPT-2" else (features[2:],):
            with unchanged(name, base=base, source=source, features=some):
                actual = fn(model, transcoders, base, source, some)
            right = swapping()(model, transcoders, base, source, some)
            compare(f"{name} of {len(some)} latents in a {kind}", actual, right, axes)
    learning = copy.deepcopy(model).requires_grad_()
    with nothing_left_behind(name, learning):
        if fn(learning, transcoders, base, source, features).requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")
    double, doubled = copy.deepcopy(model).double(), [copy.deepcopy(part).double() for part in transcoders]
    right = swapping()(double, doubled, base, source, features)
    compare(f"{name} in float64", fn(double, doubled, base, source, features), right, axes)
