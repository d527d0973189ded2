"""Chapter 10: circuits made of features. Transcoders in the place of MLPs, and graphs of what their latents do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from course_utils.families import refuse_without_mlp_norm
from course_utils.hooks import ActivationCache, HookPoint, run_with_cache, run_with_hooks
from solutions.ch06_superposition import normalise_decoder, topk_latents

# -------------------------------------------------------------------------------------------------------- transcoders


class Transcoder(nn.Module):
    """A sparse stand-in for one MLP: it reads what the MLP reads, and writes what the MLP writes.

    It reads x, the normalised stream in front of the MLP (`ln2.hook_normalized`), and goes through a few latents:

    - pre-activations: x W_enc + b_enc
    - latents: the k largest pre-activations of each position, as in chapter 06's `topk_latents`; all others are 0
    - output: latents W_dec + b_dec, which is to be `mlp_out`

    Unlike an autoencoder it does not subtract b_dec from what it reads: input and output are different things here.
    Source: Dunefsky et al. 2024, section 3.
    """

    def __init__(  # given
        self, d_model: int, n_latents: int, k: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(torch.randn(d_model, n_latents, generator=generator) / d_model**0.5)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(normalise_decoder(torch.randn(n_latents, d_model, generator=generator)))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos latent"]:
        """The latents of what an MLP reads."""
        return topk_latents(x @ self.W_enc + self.b_enc, self.k)

    def decode(self, latents: Float[Tensor, "*batch pos latent"]) -> Float[Tensor, "*batch pos d_model"]:
        """What these latents write into the stream, the bias included."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """What is written in the place of `mlp_out`."""
        return self.decode(self.encode(x))


def transcoder_loss(
    transcoder: Any,
    x: Float[Tensor, "batch pos d_model"],
    y: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """The share of the variance of an MLP's output that its transcoder misses.

    `x` is what the MLP read and `y` what it wrote. The squared errors of `transcoder(x)`, summed over everything, are
    divided by the sum of the squared distances of y from its mean over the tokens: 0 is perfect, and 1 is as good as
    always writing the mean. Only tokens where `mask` is True count, in the errors and in the mean: padding does not.
    Gradients flow to the transcoder.
    """
    target, output = y[mask], transcoder(x)[mask]
    return (output - target).square().sum() / (target - target.mean(dim=0)).square().sum()


@torch.no_grad()
def mlp_errors(
    model: Any, transcoders: Sequence[Any], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "layer batch pos d_model"]:
    """What each MLP writes and its transcoder does not: `mlp_out` minus its output, in the model's own run.

    A transcoder reads `ln2.hook_normalized` of its layer, as the MLP itself left it. No gradients are recorded.
    """
    _, cache = run_with_cache(model, tokens, names=["*ln2.hook_normalized", "*hook_mlp_out"])
    return torch.stack(
        [
            cache["mlp_out", layer] - transcoder(cache["ln2.normalized", layer])
            for layer, transcoder in enumerate(transcoders)
        ]
    )


def run_replaced(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "batch pos"],
    errors: Float[Tensor, "layer batch pos d_model"] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits of the model when transcoders write in the place of all MLPs, plus the `errors`, if there are any.

    A transcoder reads what its MLP would read in this very run (`ln2.hook_normalized`), after the transcoders below it
    have written. With the errors of `mlp_errors` on the same tokens, the logits are the model's own. Gradients flow
    to all transcoders, also through what those above them read.
    Raises ValueError for a model in which no norm stands before the MLPs, or that has no MLPs.
    Source: Ameisen et al. 2025, "From cross-layer transcoder to replacement model".
    """
    refuse_without_mlp_norm("run_replaced", model)
    reads: dict[int, Tensor] = {}
    fns: dict[str, Any] = {}
    for layer, transcoder in enumerate(transcoders):

        def note(x: Tensor, hook: HookPoint, layer: int = layer) -> None:
            reads[layer] = x

        def write(mlp_out: Tensor, hook: HookPoint, layer: int = layer, transcoder: Any = transcoder) -> Tensor:
            written: Tensor = transcoder(reads[layer])
            return written if errors is None else written + errors[layer]

        fns[f"blocks.{layer}.ln2.hook_normalized"], fns[f"blocks.{layer}.hook_mlp_out"] = note, write
    return run_with_hooks(model, tokens, hooks=fns)


# ----------------------------------------------------------------------------------------------------- a linear model


def written_to_stream(cache: ActivationCache) -> Float[Tensor, "writer batch pos d_model"]:
    """What embeddings (row 0) and MLPs (row 1 + layer) write into the stream; attention only moves it around."""
    return torch.cat([cache["resid_pre", 0][None], cache.stack("mlp_out")])


def frozen_run(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    cache: ActivationCache,
    written: Float[Tensor, "writer batch pos d_model"],
) -> tuple[list[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_vocab"]]:
    """Run the model with its attention patterns and norms frozen: (a list of what each MLP reads, the logits).

    In this run all patterns (`hook_pattern`) and all scales of norms (`hook_scale`, of `ln_final` too) are those of
    `cache`, whatever the stream is. The stream before layer 0 is `written[0]`, and the MLP of layer l writes
    `written[1 + l]`. What an MLP reads is `ln2.hook_normalized`. So everything that comes out is linear in `written`,
    up to a constant, and gradients flow to it. With `written_to_stream(cache)` it is the run that was cached.
    Raises ValueError for a model in which no norm stands before the MLPs, or that has no MLPs.
    """
    refuse_without_mlp_norm("frozen_run", model)
    reads: list[Tensor] = []

    def put_back(activation: Tensor, hook: HookPoint) -> Tensor:
        return cache[hook.name]

    fns: dict[str, Any] = {
        "*hook_pattern": put_back,
        "*hook_scale": put_back,
        "*ln2.hook_normalized": lambda x, hook: reads.append(x),
        "blocks.0.hook_resid_pre": lambda resid, hook: written[0],
    }
    for layer, mlp_out in enumerate(written[1:]):
        fns[f"blocks.{layer}.hook_mlp_out"] = lambda activation, hook, mlp_out=mlp_out: mlp_out
    logits = run_with_hooks(model, tokens, hooks=fns)
    return reads, logits


def token_to_latent(
    model: Any, transcoders: Sequence[Any], tokens: Int[Tensor, "1 pos"], target: tuple[int, int, int]
) -> Float[Tensor, " pos"]:
    """How much the embedding at each position adds to the pre-activation of one latent, by attention alone.

    `target` is (layer, position, latent). In `frozen_run` a pre-activation is linear in what is written: what a vector
    adds to it is the gradient there times the vector. This is asked of the stream before layer 0, `written[0]`: token
    and position together. What has gone through an MLP does not count here. No graph is returned.
    """
    layer, pos, latent = target
    _, cache = run_with_cache(model, tokens)
    written = written_to_stream(cache).detach().requires_grad_()
    reads, _ = frozen_run(model, tokens, cache, written)
    (gradient,) = torch.autograd.grad(reads[layer][0, pos] @ transcoders[layer].W_enc[:, latent], written)
    return (gradient * written)[0, 0].sum(dim=-1).detach()


def latent_to_latent(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "1 pos"],
    source_layer: int,
    target: tuple[int, int, int],
) -> Float[Tensor, "pos latent"]:
    """How much each latent of one layer adds to the pre-activation of a `target` (layer, position, latent) above it.

    That is, for each position and latent of `source_layer`: its activation, times what its row of W_dec adds to the
    pre-activation of the target in `frozen_run`. It is 0 for a latent that does not fire. The latents' activations are
    those of the model's own run, and decoder biases belong to no latent. What goes through another MLP on the way does
    not count. No graph is returned.
    Source: Marks et al. 2024; Dunefsky et al. 2024, section 4.
    """
    layer, pos, latent = target
    _, cache = run_with_cache(model, tokens)
    written = written_to_stream(cache).detach().requires_grad_()
    reads, _ = frozen_run(model, tokens, cache, written)
    (gradient,) = torch.autograd.grad(reads[layer][0, pos] @ transcoders[layer].W_enc[:, latent], written)
    source = transcoders[source_layer]
    latents = source.encode(cache["ln2.normalized", source_layer])[0]
    return (latents * (gradient[1 + source_layer, 0] @ source.W_dec.T)).detach()


def latent_to_logit(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "1 pos"],
    source_layer: int,
    weights: Float[Tensor, " d_vocab"],
) -> Float[Tensor, "pos latent"]:
    """How much each latent of one layer adds, directly, to a sum of the logits at the last position.

    `weights` says which sum: 1 for one token and -1 for another give a logit difference. Otherwise as
    `latent_to_latent`: activation times W_dec times gradient, with patterns and scales frozen, that of the final norm
    included.
    """
    _, cache = run_with_cache(model, tokens)
    written = written_to_stream(cache).detach().requires_grad_()
    _, logits = frozen_run(model, tokens, cache, written)
    (gradient,) = torch.autograd.grad(logits[0, -1] @ weights, written)
    source = transcoders[source_layer]
    latents = source.encode(cache["ln2.normalized", source_layer])[0]
    return (latents * (gradient[1 + source_layer, 0] @ source.W_dec.T)).detach()


def feature_connections(
    model: Any, transcoders: Sequence[Any], source_layer: int, target_layer: int
) -> Float[Tensor, "source target"]:
    """How strongly each latent of one layer would excite each latent of a later one at its own position, on any input.

    The weight of a pair is the source's row of W_dec times the target's column of W_enc: what a source of activation 1
    adds to the pre-activation if the scale of the norm is 1 and nothing comes between. A LayerNorm first subtracts the
    row's own mean; an RMSNorm (`model.cfg.normalization` is "RMS") does not.
    Raises ValueError unless the target's layer is above the source's.
    Source: Dunefsky et al. 2024, section 4.1.
    """
    if target_layer <= source_layer:
        raise ValueError(f"feature_connections: layer {target_layer} does not read what layer {source_layer} writes.")
    directions = transcoders[source_layer].W_dec
    if model.cfg.normalization == "LN":
        directions = directions - directions.mean(dim=-1, keepdim=True)
    return directions @ transcoders[target_layer].W_enc


# -------------------------------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class Graph:
    """What made each latent of one prompt as active as it is, and the targets as large as they are.

    The nodes, in this order: the embedding of each position; the error of each layer and position (all positions of
    layer 0 first); the active latents, `features`, with their `activations`; the targets. Entry [t, s] of `adjacency`
    is what node s adds to the pre-activation of latent t, or to target t, without going through another node.
    """

    adjacency: Float[Tensor, "node node"]
    features: Int[Tensor, "feature 3"]  # layer, position, latent; layer by layer, position by position
    activations: Float[Tensor, " feature"]
    n_layers: int
    n_pos: int

    @property
    def errors(self) -> slice:
        """Which nodes are errors; those before them are embeddings."""
        return slice(self.n_pos, self.n_pos * (1 + self.n_layers))

    @property
    def latents(self) -> slice:
        """Which nodes are active latents."""
        return slice(self.errors.stop, self.errors.stop + len(self.features))

    @property
    def targets(self) -> slice:
        """Which nodes are targets."""
        return slice(self.latents.stop, len(self.adjacency))

    @property
    def weights(self) -> Float[Tensor, " node"]:
        """How much each node counts as an end: the targets share 1 evenly, and all others have 0."""
        weights = self.adjacency.new_zeros(len(self.adjacency))
        weights[self.targets] = 1 / (self.targets.stop - self.targets.start)
        return weights


def active_latents(
    transcoders: Sequence[Any], reads: Sequence[Float[Tensor, "1 pos d_model"]]
) -> tuple[Int[Tensor, "feature 3"], Float[Tensor, " feature"]]:
    """Which latents fire when the MLPs read this: (layers, positions and numbers, in order; how active they are)."""
    latents = torch.stack([transcoder.encode(x[0]) for transcoder, x in zip(transcoders, reads, strict=True)])
    return latents.nonzero(), latents[latents != 0]


def attribution_graph(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "1 pos"],
    targets: Float[Tensor, "target d_vocab"],
) -> Graph:
    """The attribution graph of one prompt: what each active latent owes to what is written below it.

    Each row of `targets` says which sum of the logits at the last position is a target. Row t of the adjacency comes
    from one gradient in `frozen_run`, of a latent's pre-activation or of a target. It is taken with respect to
    everything that is written, and multiplied by what each node writes there:

    - an embedding: the stream before layer 0 at its position;
    - an error: its part of `mlp_errors`;
    - an active latent: its activation times its row of W_dec.

    So a row sums to the pre-activation, or to the target, but for the share of the biases, which are no nodes. Rows of
    embeddings and errors are 0. Many gradients can be taken in one call, some sixteen at a time. Nothing that is
    returned has a graph of autograd.
    Source: Ameisen et al. 2025, "Constructing an attribution graph for a prompt".
    """
    _, cache = run_with_cache(model, tokens)
    written = written_to_stream(cache).detach().requires_grad_()
    reads, logits = frozen_run(model, tokens, cache, written)
    features, activations = active_latents(transcoders, [x.detach() for x in reads])
    layers, places, _ = features.T
    encoders = torch.stack([transcoders[layer].W_enc[:, latent] for layer, _, latent in features.tolist()])
    directions = torch.stack([transcoders[layer].W_dec[latent] for layer, _, latent in features.tolist()])
    vectors = torch.cat([written[:1, 0], mlp_errors(model, transcoders, tokens)[:, 0]])
    ends = [(logits, logits.new_zeros(len(targets), *logits.shape))]
    ends[0][1][:, 0, -1] = targets
    for layer in reversed(range(len(reads))):
        here = layers == layer
        seeds = written.new_zeros(int(here.sum()), *reads[layer].shape)
        seeds[torch.arange(len(seeds)), 0, places[here]] = encoders[here]
        ends.insert(0, (reads[layer], seeds))
    rows = []
    for output, seeds in ends:
        for some in seeds.split(16):
            (gradient,) = torch.autograd.grad(output, written, some, is_grads_batched=True, retain_graph=True)
            to_vectors = einops.einsum(gradient[:, :, 0], vectors, "end writer pos d, writer pos d -> end writer pos")
            to_latents = einops.einsum(
                gradient[:, 1 + layers, 0, places], directions, "end feature d, feature d -> end feature"
            )
            rows.append(torch.cat([to_vectors.flatten(1), activations * to_latents], dim=1))
    below = torch.cat(rows)  # the columns lie in the order of the nodes; nothing comes out of a target
    adjacency = below.new_zeros(below.shape[1] + len(targets), below.shape[1] + len(targets))
    adjacency[len(adjacency) - len(below) :, : below.shape[1]] = below
    return Graph(adjacency.detach(), features, activations.detach(), len(transcoders), tokens.shape[1])


def normalised_adjacency(adjacency: Float[Tensor, "node node"]) -> Float[Tensor, "node node"]:
    """Which share of all that comes into a node each other node has: absolute values, divided by their row's sum.

    A row of zeros stays as it is.
    Source: Ameisen et al. 2025, "Pruning".
    """
    sizes = adjacency.abs()
    total = sizes.sum(dim=1, keepdim=True)
    return sizes / total.where(total > 0, 1)


def influence(shares: Float[Tensor, "node node"], weights: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
    """How much each node matters for the ends of a graph: the sum over all paths from it to a node with a weight.

    `shares` is a normalised adjacency A, rows are where edges go, and it has no cycles. A path counts the product of
    the shares along it, times the weight of the node where it ends. So the result is weights (A + A² + A³ + ...): a
    path has one edge at least. The series ends by itself, and is what weights ((1 - A)⁻¹ - 1) gives at once.
    """
    identity = torch.eye(len(shares), dtype=shares.dtype, device=shares.device)
    return torch.linalg.solve(identity - shares.T, weights) - weights


def replacement_score(graph: Any) -> float:
    """Which share of the influence that begins anywhere begins at tokens, and not at errors.

    The influence of all embeddings, over that of all embeddings and all errors, both by `influence` of the normalised
    adjacency on `graph.weights`. 1 says that every path from the targets back ends at a token: the graph has errors
    that do not matter. A plain number.
    Source: Ameisen et al. 2025, "Quantitative evaluation of graphs".
    """
    reached = influence(normalised_adjacency(graph.adjacency), graph.weights)
    tokens, errors = reached[: graph.n_pos].sum(), reached[graph.errors].sum()
    return (tokens / (tokens + errors)).item()


def completeness_score(graph: Any) -> float:
    """Which share of what comes into a node does not come from errors, on average over the nodes.

    A node counts as much as its influence, and a target also as much as its weight. Embeddings and errors, into which
    nothing comes, count as well, with a share of 1. A plain number.
    Source: Ameisen et al. 2025, "Quantitative evaluation of graphs".
    """
    shares = normalised_adjacency(graph.adjacency)
    matter = influence(shares, graph.weights) + graph.weights
    explained = 1 - shares[:, graph.errors].sum(dim=1)
    return ((matter * explained).sum() / matter.sum()).item()


def largest_part(values: Float[Tensor, "..."], share: float) -> Bool[Tensor, "..."]:
    """Where the fewest largest values stand that have this share of the sum of all; none of them is negative."""
    ordered, order = values.flatten().sort(descending=True)
    n_kept = int((ordered.cumsum(dim=0) < share * ordered.sum()).sum()) + 1
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:n_kept]] = True
    return kept.reshape(values.shape)


def prune(graph: Any, node_share: float, edge_share: float) -> tuple[Bool[Tensor, " node"], Bool[Tensor, "node node"]]:
    """Keep the nodes, and then the edges, that carry most of the influence on the targets: (nodes, edges).

    First the nodes: the `largest_part` of the influence, with `node_share`; embeddings and targets are kept in any
    case. Edges of other nodes go, and the adjacency of what is left is normalised anew. Then the edges: an edge carries
    its share of what comes into its end, times the influence (by the new shares) plus the weight of that end, and the
    `largest_part` with `edge_share` is kept. In the end, latents and errors without an edge out of them go, latents
    without an edge into them go, with the edges that they have, until none is left of either kind.
    Source: Ameisen et al. 2025, "Pruning".
    """
    weights, first, last = graph.weights, graph.n_pos, graph.targets.start
    nodes = largest_part(influence(normalised_adjacency(graph.adjacency), weights), node_share)
    nodes[:first] = nodes[last:] = True
    shares = normalised_adjacency(graph.adjacency * nodes * nodes[:, None])
    edges = largest_part(shares * (influence(shares, weights) + weights)[:, None], edge_share)
    while True:
        stays = nodes.clone()
        stays[first:last] &= edges.any(dim=0)[first:last]
        stays[graph.latents] &= edges.any(dim=1)[graph.latents]
        edges = edges & stays & stays[:, None]
        if torch.equal(stays, nodes):
            return nodes, edges
        nodes = stays


# ------------------------------------------------------------------------------------------------------ is it true?


def total_effects(graph: Any) -> Float[Tensor, "target node"]:
    """How much the graph says that each target would lose without a node, along all paths together; with signs.

    An edge into a latent says which part of its activation comes from the source: the entry of the adjacency, over the
    activation. If the source goes, the latent loses this part, and all that it writes gets smaller by this part. So
    a path counts the product of these parts, times the last edge, which goes into the target as it stands.
    """
    parts = torch.zeros_like(graph.adjacency)
    parts[graph.latents] = graph.adjacency[graph.latents] / graph.activations[:, None]
    identity = torch.eye(len(parts), dtype=parts.dtype, device=parts.device)
    return torch.linalg.solve(identity - parts, graph.adjacency[graph.targets], left=False)


@torch.no_grad()
def ablate_latents(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Int[Tensor, "1 pos"],
    sets: Sequence[Int[Tensor, "_ 3"]],
    frozen: bool,
    replaced: bool,
) -> Float[Tensor, "ablation pos d_vocab"]:
    """The logits of a prompt without some latents: for each set in `sets`, all of its latents are ablated together.

    A set lists latents by layer, position and number. A latent that is ablated is 0, so that its row of W_dec is not
    written; the decoder's bias stays. What follows from it follows:

    - replaced: transcoders write in the place of MLPs, with the errors of `mlp_errors` fixed; latents that are not
      ablated are worked out anew.
    - not replaced: the MLPs themselves write, and the latent's activation (as its transcoder sees it in this very run)
      times its row is subtracted from that.
    - frozen: patterns and scales are those of the model's own run on the prompt. Not frozen: they follow as well.
    """
    _, cache = run_with_cache(model, tokens)
    errors = mlp_errors(model, transcoders, tokens)
    reads: dict[int, Tensor] = {}

    def note(x: Tensor, hook: HookPoint) -> None:
        reads[int(hook.name.split(".")[1])] = x

    def write(mlp_out: Tensor, hook: HookPoint) -> Tensor:
        layer = int(hook.name.split(".")[1])
        transcoder = transcoders[layer]
        latents = transcoder.encode(reads[layer])
        gone = torch.zeros_like(latents)
        for row, features in enumerate(sets):
            _, places, numbers = features[features[:, 0] == layer].T
            gone[row, places, numbers] = latents[row, places, numbers]
        whole = transcoder.decode(latents) + errors[layer] if replaced else mlp_out
        return whole - gone @ transcoder.W_dec

    fns: dict[str, Any] = {"*ln2.hook_normalized": note, "*hook_mlp_out": write}
    if frozen:
        fns |= dict.fromkeys(
            ["*hook_pattern", "*hook_scale"], lambda activation, hook: cache[hook.name].expand_as(activation)
        )
    return run_with_hooks(model, tokens.expand(len(sets), -1), hooks=fns)


@torch.no_grad()
def swap_latents(
    model: Any,
    transcoders: Sequence[Any],
    base: Int[Tensor, "1 pos"],
    source: Int[Tensor, "1 pos"],
    features: Int[Tensor, "n 3"],
) -> Float[Tensor, "1 pos d_vocab"]:
    """The logits of the model on `base`, when some latents are as active as they are on `source`.

    Both prompts have the same length. For each of the `features` (layer, position, latent) the difference of the two
    activations, each from the model's own run on its prompt, times the latent's row of W_dec, is added to what the MLP
    writes at that position. Nothing is frozen or replaced.
    """
    names = "*ln2.hook_normalized"
    own, other = (run_with_cache(model, tokens, names=names)[1] for tokens in (base, source))

    def write(mlp_out: Tensor, hook: HookPoint) -> Tensor:
        layer = int(hook.name.split(".")[1])
        transcoder = transcoders[layer]
        _, places, numbers = features[features[:, 0] == layer].T
        before, after = (transcoder.encode(cache["ln2.normalized", layer])[0] for cache in (own, other))
        change = torch.zeros_like(before)
        change[places, numbers] = (after - before)[places, numbers]
        return mlp_out + change @ transcoder.W_dec

    return run_with_hooks(model, base, hooks={"*hook_mlp_out": write})


def supernode_edges(graph: Any, groups: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, "group group"]:
    """The edges between groups of nodes that are read as one: [t, s] is which share of what comes into t is from s.

    A group lists nodes by their number in the graph. The share that a node gets from a group is the sum of its
    normalised edges from the group's nodes. The share of a group is the mean over its nodes, each weighted by its
    influence on the targets plus its weight. A group whose nodes do not matter at all has a row of zeros.
    Source: Ameisen et al. 2025, appendix on supernodes.
    """
    shares = normalised_adjacency(graph.adjacency)
    matter = influence(shares, graph.weights) + graph.weights
    rows = []
    for group in groups:
        weights = matter[group] / matter[group].sum().clamp(min=torch.finfo(matter.dtype).tiny)
        rows.append(torch.stack([weights @ shares[group][:, others].sum(dim=1) for others in groups]))
    return torch.stack(rows)
