"""Checks of chapter 04, causal evidence: what a model loses when heads no longer speak about their own text."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.leftovers import Stop, assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks

Fn = Callable[..., Any]
Heads = Sequence[tuple[int, int]]
StandIn = Callable[[Tensor, Tensor], Tensor]  # (z of the run, z of the reference run) -> what stands there instead
LOGITS = "batch pos d_vocab"

# n_layers, n_heads and all other sizes differ; layer 1 reads what layer 0 writes.
CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=4, d_mlp=11)
ATTENTION_ONLY = TransformerConfig(
    d_vocab=11, n_ctx=10, n_layers=3, n_heads=2, d_model=5, d_head=3, attn_only=True, normalization="none"
)
ONE_LAYER = TransformerConfig(d_vocab=11, n_ctx=9, n_layers=1, n_heads=2, d_model=5, d_head=3, attn_only=True)
TWELVE_LAYERS = TransformerConfig(d_vocab=11, n_ctx=5, n_layers=12, n_heads=1, d_model=5, d_head=3, attn_only=True)
KINDS: dict[str, StandIn] = {
    "zero": lambda z, reference: torch.zeros_like(z),
    "mean": lambda z, reference: reference.mean(0, keepdim=True),
    "resample": lambda z, reference: reference,
}


def heads_of(cfg: TransformerConfig) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]


def _run(model: SmallModel, tokens: Tensor, replaced: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The logits while `replaced(layer, z)` stands in for each layer's z, by PyTorch's own forward hooks."""

    def hook(layer: int) -> Callable[[Any, Any, Tensor], Tensor]:
        return lambda module, inputs, z: replaced(layer, z)

    handles = [block.attn.hook_z.register_forward_hook(hook(layer)) for layer, block in enumerate(model.blocks)]
    with torch.no_grad():
        logits = model(tokens)
    for handle in handles:
        handle.remove()
    return logits


def _zs(model: SmallModel, tokens: Tensor) -> list[Tensor]:
    """Each layer's z."""
    seen: list[Tensor] = []

    def note(layer: int, z: Tensor) -> Tensor:
        seen.append(z)
        return z

    _run(model, tokens, note)
    return seen


def ablated(
    model: SmallModel,
    tokens: Tensor,
    heads: Heads,
    kind: str,
    reference: Tensor | None = None,
    chosen: Callable[[TransformerConfig, Heads], Heads] = lambda cfg, heads: heads,
    stand_ins: Mapping[str, StandIn] = KINDS,
    where: StandIn = lambda z, instead: instead,
    of: Callable[[Tensor, Tensor], Tensor] = lambda tokens, reference: reference,
) -> Tensor:
    """The definition: in each layer, the vectors of the chosen heads are exchanged, one head after the other.

    With switches for what people get wrong: which heads are `chosen`, what stands in for z, at which places (`where`),
    and `of` which text that is.
    """
    zs = None if reference is None or kind == "zero" else _zs(model, of(tokens, reference))

    def replaced(layer: int, z: Tensor) -> Tensor:
        others = where(z, stand_ins[kind](z, z if zs is None else zs[layer]).expand_as(z))
        z = z.clone()
        for chosen_layer, head in chosen(model.cfg, heads):
            if chosen_layer == layer:
                z[:, :, head] = others[:, :, head]
        return z

    return _run(model, tokens, replaced)


def where_rows_fit(stand_in: StandIn) -> StandIn:
    """The mean, but `stand_in` where the reference has as many rows as z."""
    return lambda z, other: stand_in(z, other) if len(other) == len(z) else KINDS["mean"](z, other)


WRONG_HEADS: dict[str, Callable[[TransformerConfig, Heads], Heads]] = {
    "all heads of the layer are ablated, not only those in `heads`.": lambda cfg, heads: [
        (layer, head) for layer in {layer for layer, _ in heads} for head in range(cfg.n_heads)
    ],
    "the heads are ablated in another layer.": lambda cfg, heads: [
        ((layer + 1) % cfg.n_layers, head) for layer, head in heads
    ],
    "these heads are ablated in every layer.": lambda cfg, heads: [
        (layer, head) for layer in range(cfg.n_layers) for _, head in heads
    ],
    "all heads but those in `heads` are ablated.": lambda cfg, heads: [
        pair for pair in heads_of(cfg) if pair not in heads
    ],
    "layer and head are swapped: the pairs in `heads` are (layer, head).": lambda cfg, heads: [
        (head % cfg.n_layers, layer) for layer, head in heads
    ],
    "only the first pair in `heads` is ablated.": lambda cfg, heads: heads[:1],
    "only the last pair in `heads` is ablated.": lambda cfg, heads: heads[-1:],
    "nothing is ablated: what the hook function returns is thrown away, or it returns None.": lambda cfg, heads: [],
}
WRONG_MEANS: dict[str, StandIn] = {
    "in mean ablation a head's z is replaced as in zero ablation.": KINDS["zero"],
    "in mean ablation a head's z is replaced as in resample ablation.": where_rows_fit(KINDS["resample"]),
    "the mean is taken over batch and positions; each position has its own.": lambda z, other: other.mean(
        (0, 1), keepdim=True
    ),
    "the mean is taken over the heads; take it over the batch.": lambda z, other: other.mean((0, 2), keepdim=True),
    "the mean is taken over the positions; take it over the batch, at each position.": where_rows_fit(
        lambda z, other: other.mean(1, keepdim=True)
    ),
    "the rows of the reference are summed; take their mean.": lambda z, other: other.sum(0, keepdim=True),
    "only the first row of the reference is used; take the mean over its rows.": lambda z, other: other[:1],
}
WRONG_SAMPLES: dict[str, StandIn] = {
    "in resample ablation a head's z is replaced as in zero ablation.": KINDS["zero"],
    "in resample ablation a head's z is replaced as in mean ablation.": KINDS["mean"],
    "every row gets the first row of the reference.": lambda z, other: other[:1],
    "the rows of the reference come in another order; row i gets row i.": lambda z, other: other.flip(0),
    "the positions of the reference are shifted by one.": lambda z, other: other.roll(1, 1),
}
WRONG_PLACES: dict[str, StandIn] = {
    "only the last position is ablated.": lambda z, other: torch.cat([z[:, :-1], other[:, -1:]], 1),
    "the first position is left as it is.": lambda z, other: torch.cat([z[:, :1], other[:, 1:]], 1),
    "only the first text of the batch is ablated.": lambda z, other: torch.cat([other[:1], z[1:]]),
}

# (kind, heads, rows of the reference)
CASES: list[tuple[str, Heads, int]] = [
    ("zero", [(0, 1)], 0),
    ("mean", [(1, 2), (0, 0)], 3),
    ("mean", [(0, 2)], 2),
    ("mean", [(1, 1)], 1),
    ("resample", [(0, 1), (1, 0), (1, 1)], 2),
]


@known_mistakes(
    {hint: partial(ablated, chosen=chosen) for hint, chosen in WRONG_HEADS.items()},
    {hint: partial(ablated, stand_ins={**KINDS, "mean": wrong}) for hint, wrong in WRONG_MEANS.items()},
    {hint: partial(ablated, stand_ins={**KINDS, "resample": wrong}) for hint, wrong in WRONG_SAMPLES.items()},
    {hint: partial(ablated, where=where) for hint, where in WRONG_PLACES.items()},
    {
        "the mean is taken over `tokens`; take it over `reference`.": partial(
            ablated, of=lambda tokens, reference: tokens
        ),
    },
)
def check_ablate_heads(fn: Fn) -> None:
    """Every kind, in one layer and in two, with a reference of as many rows and of more; a run that fails; refusals."""
    name = "ablate_heads"
    model = SmallModel(CFG)
    tokens = some_tokens(CFG, 2, 5, seed=1)
    with torch.no_grad():
        for kind, heads, n_rows in CASES:
            reference = some_tokens(CFG, n_rows, 5, seed=2) if n_rows else None
            with nothing_left_behind(name, model):
                actual = fn(model, tokens, list(heads), kind, *([] if reference is None else [reference]))
            expected = ablated(model, tokens, heads, kind, reference)
            compare(f"{name} ({kind}, heads {list(heads)})", actual, expected, LOGITS)
        compare(f"{name} with no heads", fn(model, tokens, [], "zero"), model(tokens), LOGITS)
        follows_input(
            name, lambda moved: fn(moved, tokens.to(moved.embed.W_E.device), [(1, 0)], "zero"), (model,), LOGITS
        )
        with nothing_left_behind(name, model):
            _check_refusals(name, fn, model, tokens)
        _check_a_run_that_fails(name, fn, model, tokens)
        deep, short = SmallModel(TWELVE_LAYERS), some_tokens(TWELVE_LAYERS, 1, 4, seed=1)
        heads, ignored = ((1, 0),), some_tokens(TWELVE_LAYERS, 3, 2, seed=2)  # "blocks.1" also begins "blocks.10"
        with during(f'with "zero" and a reference of another shape, which is to be ignored, and {heads = }'):
            actual = fn(deep, short, heads, "zero", ignored)
        compare(f"{name} of twelve layers, {heads}", actual, ablated(deep, short, heads, "zero"), LOGITS)


def _check_a_run_that_fails(name: str, fn: Fn, model: SmallModel, tokens: Tensor) -> None:
    """Somebody else's hook raises: the exception comes out, and nothing stays attached."""

    def stop(activation: Tensor, hook: Any) -> None:
        raise Stop

    when = f"{name} after a run that ended in an exception"
    with nothing_left_behind(when, model), hooks(model, {"blocks.1.hook_resid_post": stop}):
        assert_stops(name, lambda: fn(model, tokens, [(0, 1)], "zero"), "the model")


def _check_refusals(name: str, fn: Fn, model: SmallModel, tokens: Tensor) -> None:
    """Each of these must raise ValueError."""

    def refused(kind: str, reference: Tensor | None, words: str) -> None:
        call = f'ablate_heads(model, tokens, [(0, 1)], "{kind}", {words})'
        must_raise(name, ValueError, call, lambda: fn(model, tokens, [(0, 1)], kind, reference))

    refused("median", some_tokens(CFG, 2, 5, seed=3), "reference)")
    refused("mean", None, "None")
    refused("resample", None, "None")
    refused("mean", some_tokens(CFG, 2, 6, seed=3), "a reference with more positions")
    refused("mean", some_tokens(CFG, 2, 1, seed=3), "a reference with one position")
    refused("resample", some_tokens(CFG, 2, 1, seed=3), "a reference with one position")
    refused("resample", some_tokens(CFG, 3, 5, seed=3), "a reference with more rows")
    refused("resample", some_tokens(CFG, 1, 5, seed=3), "a reference with one row")


def scores(
    model: SmallModel,
    tokens: Tensor,
    n_half: int,
    kind: str,
    reference: Tensor | None = None,
    reduce: Callable[[Tensor, int], Tensor] = lambda losses, n: losses[:, 1 - n :].mean(),
    end: Callable[[Tensor, Tensor], Tensor] = lambda without, usual: without - usual,
    **wrong: Any,
) -> Tensor:
    """The table, where `reduce` makes one number of the losses [batch, pos - 1], and `end` a score of two numbers."""

    def loss(logits: Tensor) -> Tensor:
        flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return reduce(flat.reshape(len(tokens), -1), n_half)

    without = [loss(ablated(model, tokens, [pair], kind, reference, **wrong)) for pair in heads_of(model.cfg)]
    table = torch.stack(without).reshape(model.cfg.n_layers, model.cfg.n_heads)
    return end(table, loss(model(tokens).detach()))


@known_mistakes(
    {
        "the sign is turned round: it is the usual loss minus the loss without the head.": partial(
            scores, end=lambda without, usual: usual - without
        ),
        "it is the loss without the head; subtract the usual one.": partial(scores, end=lambda without, usual: without),
        "layers and heads are mixed up: a transpose became a reshape.": partial(
            scores, end=lambda without, usual: (without - usual).T.reshape(without.shape)
        ),
    },
    {
        hint: partial(scores, reduce=reduce)
        for hint, reduce in {
            "the loss is taken over the whole text; only its second half counts.": lambda losses, n: losses.mean(),
            "it is the loss on the first half.": lambda losses, n: losses[:, :n].mean(),
            "the losses are summed; take their mean.": lambda losses, n: losses[:, 1 - n :].sum(),
            "the texts of the batch are summed; take the mean over them too.": lambda losses, n: (
                losses[:, 1 - n :].mean(1).sum()
            ),
            "only the first text of the batch is looked at.": lambda losses, n: losses[:1, 1 - n :].mean(),
            "the last loss is left out.": lambda losses, n: losses[:, 1 - n : -1].mean(),
            "the first token of the second half is counted; nobody can predict it.": lambda losses, n: losses[
                :, -n:
            ].mean(),
            "the first two tokens of the second half are left out; leave out one.": lambda losses, n: losses[
                :, 2 - n :
            ].mean(),
            "only the last loss counts; take the mean over the second half.": lambda losses, n: losses[:, -1].mean(),
        }.items()
    },
)
def check_ablation_scores(fn: Fn) -> None:
    """Two models; texts whose second half repeats the first, and each kind of ablation."""
    name = "ablation_scores"
    for cfg, n_batch, n_half, kind in [
        (CFG, 2, 4, "zero"),
        (ATTENTION_ONLY, 3, 3, "mean"),
        (ONE_LAYER, 1, 4, "resample"),
    ]:
        model = SmallModel(cfg)
        halves = (some_tokens(cfg, n_batch, n_half, seed=seed) for seed in (5, 6))
        bos = torch.zeros(n_batch, 1, dtype=torch.long)
        tokens, reference = (torch.cat([bos, half, half], 1) for half in halves)
        with nothing_left_behind(name, model):
            actual = fn(model, tokens, n_half, kind, **({} if kind == "zero" else {"reference": reference}))
        compare(f"{name} ({kind})", actual, scores(model, tokens, n_half, kind, reference), "layer head")
        if actual.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")
