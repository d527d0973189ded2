"""Checks of chapter 10: the model with patterns and scales frozen, and what one latent does to another in it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch10.small import (
    D_MODEL,
    D_VOCAB,
    KINDS,
    N_LATENTS,
    Fn,
    Sparse,
    added_by,
    by_weights,
    latents_in,
    model_of,
    run_of,
    tokens_of,
    transcoders_of,
    written_in,
)
from course_utils.checks.ch10.transcoders import refuses
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.hooks import ActivationCache, HookPoint, run_with_hooks

# ---------------------------------------------------------------------------------------------------------- frozen_run


def frozen(
    places: Sequence[str] = ("*hook_pattern", "*hook_scale"),
    start: bool = True,
    mlps: Callable[[Tensor, int], Tensor | None] = lambda written, layer: written[1 + layer],
    read: str = "*ln2.hook_normalized",
    detach: bool = False,
) -> Fn:
    """frozen_run by hooks, with something else put back."""

    def frozen_run(model: Any, tokens: Tensor, cache: ActivationCache, written: Tensor) -> Any:
        if model.cfg.attn_only or model.cfg.normalization == "none":
            raise ValueError("frozen_run: no norm")
        seen: list[Tensor] = []
        written = written.detach() if detach else written
        fns: list[tuple[str, Any]] = [(place, lambda activation, hook: cache[hook.name]) for place in places]
        if start:
            fns.append(("blocks.0.hook_resid_pre", lambda resid, hook: written[0]))

        def write(activation: Tensor, hook: HookPoint) -> Tensor | None:
            return mlps(written, int(hook.name.split(".")[1]))

        fns += [("*hook_mlp_out", write), (read, lambda x, hook: seen.append(x))]
        return seen, run_with_hooks(model, tokens, hooks=fns)

    return frozen_run


@known_mistakes(
    {
        "the attention patterns follow the stream; put back those of the cache.": frozen(places=("*hook_scale",)),
        "the scales of the norms follow the stream; put back those of the cache.": frozen(places=("*hook_pattern",)),
        "the scale of the final norm is not frozen.": frozen(
            places=("*hook_pattern", "*ln1.hook_scale", "*ln2.hook_scale")
        ),
        "only the scales in front of MLPs are frozen; those in front of attention are scales, too.": frozen(
            places=("*hook_pattern", "*ln2.hook_scale", "ln_final.hook_scale")
        ),
        "nothing is frozen.": frozen(places=()),
        "the stream begins with the tokens' own embeddings, not with written[0].": frozen(start=False),
        "MLPs write what they like, not what `written` says.": frozen(mlps=lambda written, layer: None),
        "the MLP of layer l writes written[l]; row 0 is the stream's beginning.": frozen(
            mlps=lambda written, layer: written[layer]
        ),
        "every MLP writes the last row; a function made in a loop sees the loop's last value.": frozen(
            mlps=lambda written, layer: written[-1]
        ),
        "what attention reads is noted, not what MLPs read.": frozen(read="*ln1.hook_normalized"),
        "the stream in front of the norms is noted; MLPs read ln2.hook_normalized.": frozen(read="*hook_resid_mid"),
    }
)
def check_frozen_run(fn: Fn) -> None:
    """Against the weights, where what is written is not the model's own; three kinds of models; gradients; refusals."""
    name = "frozen_run"
    for kind, n_batch in (("GPT-2", 2), ("Pythia", 1), ("Llama", 2)):
        model, tokens = model_of(kind), tokens_of(n_batch)
        cache = run_of(model, tokens)
        written = written_in(cache) + noise(4, n_batch, 5, D_MODEL, seed=8)
        _frozen_as(f"{name} of a {kind}", fn, model, tokens, cache, written)
    model, tokens = model_of(n_layers=1), tokens_of(3, seed=2)
    cache = run_of(model, tokens)
    with nothing_left_behind(name, model):
        _frozen_as(f"{name} of one layer, as it was cached", fn, model, tokens, cache, written_in(cache))
    double = copy.deepcopy(model).double()
    cache = run_of(double, tokens)
    _frozen_as(f"{name} in float64", fn, double, tokens, cache, written_in(cache) * 2)
    written = written_in(cache).requires_grad_()
    reads, logits = fn(double, tokens, cache, written)
    for what, tensor, n_below in (("what MLPs read", reads[0], 1), ("the logits", logits, len(written))):
        found = torch.zeros_like(written)
        if tensor.requires_grad:
            (found,) = torch.autograd.grad(tensor.square().sum(), written, retain_graph=True)
        if missing := [writer for writer in range(n_below) if not found[writer].any()]:
            raise CheckFailed(
                f"{name}: no gradient flows from {what} to written[{missing[0]}].\n"
                "  Next: look for .detach() or torch.no_grad."
            )
    refuses(name, lambda model: fn(model, tokens, cache, written))


def _frozen_as(name: str, fn: Fn, model: Any, tokens: Tensor, cache: ActivationCache, written: Tensor) -> None:
    with unchanged(name, tokens=tokens, written=written):
        answer = fn(model, tokens, cache, written)
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], list):
        raise CheckFailed(f"{name}: expected a list and the logits.\n  Next: return reads, logits.")
    right, logits = by_weights(model, cache, written)
    if len(answer[0]) != len(right):
        raise CheckFailed(f"{name}: {len(answer[0])} tensors for {len(right)} MLPs.\n  Next: one for each layer.")
    for layer, (actual, expected) in enumerate(zip(answer[0], right, strict=True)):
        compare(f"{name}: what MLP {layer} reads", actual, expected, "batch pos d_model")
    compare(f"{name}: the logits", answer[1], logits, "batch pos d_vocab")


# -------------------------------------------------------------------------------------------------------- one target

End = Callable[[list[Tensor], Tensor], Tensor]  # from what the vectors add to reads and logits to what is asked


def of_latent(transcoders: Sequence[Any], target: tuple[int, int, int]) -> End:
    layer, pos, latent = target
    return lambda reads, logits: reads[layer][:, pos] @ transcoders[layer].W_enc[:, latent]


def of_logits(weights: Tensor) -> End:
    return lambda reads, logits: logits[:, -1] @ weights


def from_tokens(model: Any, tokens: Tensor, end: End, vector: Callable[[Tensor, int], Tensor]) -> Tensor:
    cache = run_of(model, tokens)
    start = cache["resid_pre", 0][0]
    return end(*added_by(model, cache, [(0, pos, vector(start, pos)) for pos in range(len(start))]))


def to_latent(
    vector: Callable[[Tensor, int], Tensor] = lambda start, pos: start[pos],
    change: Callable[[Tensor], Tensor] = lambda found: found,
    target_of: Callable[[tuple[int, int, int]], tuple[int, int, int]] = lambda target: target,
) -> Fn:
    def token_to_latent(model: Any, transcoders: Sequence[Any], tokens: Tensor, target: Any) -> Tensor:
        return change(from_tokens(model, tokens, of_latent(transcoders, target_of(target)), vector))

    return token_to_latent


def by_autograd(
    run: Fn,
    what: Callable[[Tensor, Tensor], Tensor] = lambda gradient, written: (gradient * written)[0, 0].sum(-1),
    bias: bool = False,
) -> Fn:
    """Gradient times what is written, in a run that may not be frozen as it should be."""

    def token_to_latent(model: Any, transcoders: Sequence[Any], tokens: Tensor, target: Any) -> Tensor:
        cache = run_of(model, tokens)
        written = written_in(cache).requires_grad_()
        layer, pos, latent = target
        reads, _ = run(model, tokens, cache, written)
        value = reads[layer][0, pos] @ transcoders[layer].W_enc[:, latent]
        return what(torch.autograd.grad(value, written)[0], written).detach()

    return token_to_latent


TARGETS = ((2, 4, 1), (0, 3, 6), (1, 2, 0), (2, 1, 5))


@known_mistakes(
    {
        "gradients go through the attention patterns; they are to be frozen.": by_autograd(
            frozen(places=("*hook_scale",))
        ),
        "gradients go through the scales of the norms; they are to be frozen.": by_autograd(
            frozen(places=("*hook_pattern",))
        ),
        "it is the gradient's sum; multiply with what is written first.": by_autograd(
            frozen(), what=lambda gradient, written: gradient[0, 0].sum(-1)
        ),
        "it is the length of the gradient.": by_autograd(
            frozen(), what=lambda gradient, written: gradient[0, 0].norm(dim=-1)
        ),
        "what MLPs write is added; only the embeddings are asked for.": by_autograd(
            frozen(), what=lambda gradient, written: (gradient * written)[:, 0].sum((0, -1))
        ),
        "it is the sum over all positions, at each of them.": to_latent(
            change=lambda found: found.sum().expand_as(found).clone()
        ),
        "it is the absolute value; give it with its sign.": to_latent(change=torch.abs),
        "the sign is wrong.": to_latent(change=torch.neg),
        "the target's layer is ignored: it is a latent of layer 0.": to_latent(
            target_of=lambda target: (0, *target[1:])
        ),
        "the target's position is ignored: it is the last one.": to_latent(
            target_of=lambda target: (target[0], 4, target[2])
        ),
    }
)
def check_token_to_latent(fn: Fn) -> None:
    """Against runs without one embedding; four targets, three kinds of models."""
    name, transcoders = "token_to_latent", transcoders_of()
    for kind, target in zip(("GPT-2", *KINDS), TARGETS, strict=True):
        model, tokens = model_of(kind), tokens_of(seed=target[1])
        with unchanged(name, tokens=tokens):
            actual = fn(model, transcoders, tokens, target)
        right = to_latent()(model, transcoders, tokens, target)
        compare(f"{name} of {target} in a {kind}", actual, right, "pos")
    _ends(name, fn, transcoders, (1, 2, 3), "pos", to_latent())


def _ends(name: str, fn: Fn, transcoders: Sequence[Any], last: Any, axes: str, oracle: Fn) -> None:
    """No graph, no hook, and float64."""
    model, tokens = model_of(n_layers=2), tokens_of(seed=6)
    learning = copy.deepcopy(model).requires_grad_()
    own = [copy.deepcopy(part).requires_grad_() for part in transcoders[:2]]
    arguments = last if isinstance(last, list) else [last]
    with nothing_left_behind(name, learning):
        actual = fn(learning, own, tokens, *arguments)
    if any(parameter.grad is not None for part in (learning, *own) for parameter in part.parameters()):
        raise CheckFailed(f"{name}: parameters have a .grad afterwards.\n  Next: torch.autograd.grad leaves none.")
    if actual.requires_grad:
        raise CheckFailed(f"{name}: its result has a graph.\n  Next: `.detach()` it.")
    compare(f"{name} in a model of two layers", actual, oracle(model, transcoders[:2], tokens, *arguments), axes)
    double, doubled = copy.deepcopy(model).double(), [copy.deepcopy(part).double() for part in transcoders[:2]]
    wide = [part.double() if isinstance(part, Tensor) else part for part in arguments]
    compare(f"{name} in float64", fn(double, doubled, tokens, *wide), oracle(double, doubled, tokens, *wide), axes)


def from_latents(
    model: Any,
    transcoders: Sequence[Any],
    tokens: Tensor,
    source_layer: int,
    end: End,
    row: Callable[[Any, int], Tensor] = lambda transcoder, latent: transcoder.W_dec[latent],
    active: Callable[[Tensor], Tensor] = lambda latents: latents,
    writer: int = 1,
) -> Tensor:
    cache = run_of(model, tokens)
    source = transcoders[source_layer]
    latents = active(latents_in(cache, transcoders, source_layer))
    vectors = [
        (writer + source_layer, pos, latents[pos, latent] * row(source, latent))
        for pos in range(latents.shape[0])
        for latent in range(latents.shape[1])
    ]
    return end(*added_by(model, cache, vectors)).reshape(latents.shape)


def l2l(change: Callable[[Tensor], Tensor] = lambda found: found, **options: Any) -> Fn:
    def latent_to_latent(
        model: Any, transcoders: Sequence[Any], tokens: Tensor, source_layer: int, target: Any
    ) -> Tensor:
        end = of_latent(transcoders, target)
        return change(from_latents(model, transcoders, tokens, source_layer, end, **options))

    return latent_to_latent


def unfrozen_latents(places: Sequence[str], to_logits: bool = False) -> Fn:
    """Gradients that go where they should not."""

    def answer(model: Any, transcoders: Sequence[Any], tokens: Tensor, source_layer: int, last: Any) -> Tensor:
        cache = run_of(model, tokens)
        written = written_in(cache).requires_grad_()
        reads, logits = frozen(places)(model, tokens, cache, written)
        value = (
            logits[0, -1] @ last if to_logits else reads[last[0]][0, last[1]] @ transcoders[last[0]].W_enc[:, last[2]]
        )
        gradient = torch.autograd.grad(value, written)[0][1 + source_layer, 0]
        return latents_in(cache, transcoders, source_layer) * (gradient @ transcoders[source_layer].W_dec.T)

    return answer


ROWS: dict[str, dict[str, Any]] = {
    "the decoder's bias is counted with each latent; it belongs to none.": {
        "row": lambda transcoder, latent: transcoder.W_dec[latent] + transcoder.b_dec
    },
    "what a latent writes is taken from its encoder; it is its row of W_dec.": {
        "row": lambda transcoder, latent: transcoder.W_enc[:, latent]
    },
    "the activation is left out: every latent counts as if it were 1.": {"active": torch.ones_like},
    "the activation is left out, but for whether it fires.": {"active": lambda latents: (latents > 0).to(latents)},
    "the gradient is that of the layer below: row 1 + layer is what the MLP writes.": {"writer": 0},
}


@known_mistakes(
    {sentence: l2l(**options) for sentence, options in ROWS.items()},
    {
        "gradients go through the attention patterns; they are to be frozen.": unfrozen_latents(("*hook_scale",)),
        "gradients go through the scales of the norms; they are to be frozen.": unfrozen_latents(("*hook_pattern",)),
        "it is summed over the positions; give it for each.": l2l(change=lambda found: found.sum(0)),
        "the sign is wrong.": l2l(change=torch.neg),
    },
)
def check_latent_to_latent(fn: Fn) -> None:
    """Against runs without one latent; three pairs of layers, three kinds of models."""
    name, transcoders = "latent_to_latent", transcoders_of()
    for kind, source_layer, target in (
        ("GPT-2", 0, (2, 4, 1)), ("GPT-2", 1, (2, 3, 7)), ("Pythia", 0, (1, 3, 2)), ("Llama", 0, (2, 4, 6)),
    ):  # fmt: skip
        model, tokens = model_of(kind), tokens_of(seed=target[1] + source_layer)
        with unchanged(name, tokens=tokens):
            actual = fn(model, transcoders, tokens, source_layer, target)
        right = l2l()(model, transcoders, tokens, source_layer, target)
        compare(f"{name} from layer {source_layer} to {target} in a {kind}", actual, right, "pos latent")
    _ends(name, fn, transcoders, [0, (1, 3, 4)], "pos latent", l2l())


def l2logit(change: Callable[[Tensor], Tensor] = lambda found: found, at: int = -1, **options: Any) -> Fn:
    def latent_to_logit(
        model: Any, transcoders: Sequence[Any], tokens: Tensor, source_layer: int, weights: Tensor
    ) -> Tensor:
        def end(reads: list[Tensor], logits: Tensor) -> Tensor:
            return logits[:, at] @ weights

        return change(from_latents(model, transcoders, tokens, source_layer, end, **options))

    return latent_to_logit


@known_mistakes(
    {sentence: l2logit(**options) for sentence, options in ROWS.items()},
    {
        "gradients go through the attention patterns; they are to be frozen.": unfrozen_latents(("*hook_scale",), True),
        "gradients go through the scales of the norms; they are to be frozen.": unfrozen_latents(
            ("*hook_pattern",), True
        ),
        "the scale of the final norm is not frozen.": unfrozen_latents(
            ("*hook_pattern", "*ln1.hook_scale", "*ln2.hook_scale"), True
        ),
        "the logits of the first position are read; it is the last one.": l2logit(at=0),
        "the sign is wrong.": l2logit(change=torch.neg),
    },
)
def check_latent_to_logit(fn: Fn) -> None:
    """Against runs without one latent; every layer, three kinds of models."""
    name, transcoders = "latent_to_logit", transcoders_of()
    for source_layer, kind in enumerate(KINDS):
        model, tokens, weights = model_of(kind), tokens_of(seed=source_layer), noise(D_VOCAB, seed=source_layer + 3)
        with unchanged(name, tokens=tokens, weights=weights):
            actual = fn(model, transcoders, tokens, source_layer, weights)
        right = l2logit()(model, transcoders, tokens, source_layer, weights)
        compare(f"{name} from layer {source_layer} in a {kind}", actual, right, "pos latent")
    _ends(name, fn, transcoders, [1, noise(D_VOCAB, seed=9)], "pos latent", l2logit())


# --------------------------------------------------------------------------------------------------------- on any input


def connected(
    centre: Callable[[Tensor, Any], Tensor] = lambda row, cfg: row - row.mean() if cfg.normalization == "LN" else row,
    write: Callable[[Any], Tensor] = lambda transcoder: transcoder.W_dec,
    read: Callable[[Any], Tensor] = lambda transcoder: transcoder.W_enc,
    change: Callable[[Tensor], Tensor] = lambda table: table,
    layers: Callable[[int, int], tuple[int, int]] = lambda source, target: (source, target),
    refuse: Callable[[int, int], bool] = lambda source, target: target <= source,
) -> Fn:
    """Pair by pair."""

    def feature_connections(model: Any, transcoders: Sequence[Any], source_layer: int, target_layer: int) -> Tensor:
        if refuse(source_layer, target_layer):
            raise ValueError("feature_connections")
        below, above = layers(source_layer, target_layer)
        rows = [centre(row, model.cfg) for row in write(transcoders[below])]
        columns = list(read(transcoders[above]).T)
        return change(torch.stack([torch.stack([row @ column for column in columns]) for row in rows]))

    return feature_connections


@known_mistakes(
    {
        "the mean is not subtracted: a LayerNorm does.": connected(centre=lambda row, cfg: row),
        "the mean is subtracted in a model with RMSNorm, which leaves it.": connected(
            centre=lambda row, cfg: row - row.mean()
        ),
        "rows are scaled to length 1; a source of activation 1 writes its row as it is.": connected(
            change=lambda table: torch.nn.functional.normalize(table, dim=1)
        ),
        "the table is transposed: rows are the sources.": connected(change=lambda table: table.T.contiguous()),
        "it compares decoders; the target reads with W_enc.": connected(read=lambda transcoder: transcoder.W_dec.T),
        "it compares encoders; the source writes with W_dec.": connected(write=lambda transcoder: transcoder.W_enc.T),
        "the layers are swapped.": connected(layers=lambda source, target: (target, source)),
        "the bias of the target's encoder is added; it is no connection.": lambda model, transcoders, below, above: (
            connected()(model, transcoders, below, above) + transcoders[above].b_enc
        ),
    }
)
def check_feature_connections(fn: Fn) -> None:
    """Two kinds of norm, two pairs of layers; dictionaries of two sizes; refusals."""
    name = "feature_connections"
    transcoders = [*transcoders_of()[:2], Sparse(77, n_latents=N_LATENTS + 2)]
    for kind in KINDS:
        for below, above in ((0, 2), (1, 2), (0, 1)):
            actual = fn(model_of(kind), transcoders, below, above)
            right = connected()(model_of(kind), transcoders, below, above)
            compare(f"{name} from layer {below} to {above} of a {kind}", actual, right, "source target")
    for below, above in ((1, 1), (2, 0)):
        call = f"{name}(model, transcoders, {below}, {above})"
        must_raise(name, ValueError, call, lambda below=below, above=above: fn(model_of(), transcoders, below, above))  # type: ignore[misc]

    def of_two(lower: Any, upper: Any) -> Any:
        return fn(model_of(), [lower, upper], 0, 1)

    follows_input(name, of_two, (transcoders[0], transcoders[2]), "source target")
