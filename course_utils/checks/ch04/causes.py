"""Checks of chapter 04, causal evidence: what a model loses when heads no longer speak about their own text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points

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
KINDS: dict[str, StandIn] = {
    "zero": lambda z, reference: torch.zeros_like(z),
    "mean": lambda z, reference: reference.mean(0, keepdim=True).expand_as(z),
    "resample": lambda z, reference: reference,
}


def some_tokens(cfg: TransformerConfig, n_batch: int, n_pos: int, seed: int) -> Tensor:
    return torch.randint(cfg.d_vocab, (n_batch, n_pos), generator=torch.Generator().manual_seed(seed))


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
    heads: Iterable[tuple[int, int]],
    stand_in: StandIn,
    reference: Sequence[Tensor] | None = None,
) -> Tensor:
    """The definition: in each layer, the vectors of the chosen heads are exchanged, one head after the other."""

    def replaced(layer: int, z: Tensor) -> Tensor:
        z, others = z.clone(), stand_in(z, z if reference is None else reference[layer])
        for chosen, head in heads:
            if chosen == layer:
                z[:, :, head] = others[:, :, head]
        return z

    return _run(model, tokens, replaced)


@contextmanager
def nothing_left_behind(name: str, model: SmallModel) -> Iterator[None]:
    """Hooks of others stay, and no hook of the learner's does; the weights are what they were."""
    seen: list[str] = []
    own = [point.add(lambda activation, hook: seen.append(hook.name)) for point in hook_points(model).values()]
    before = {place: list(point._fns.values()) for place, point in hook_points(model).items()}
    with unchanged(name, **dict(model.named_parameters())):
        yield
    for place, point in hook_points(model).items():
        now = list(point._fns.values())
        if len(now) + len(point._forward_hooks) + len(point._forward_pre_hooks) > len(before[place]):
            raise CheckFailed(
                f"{name}: a hook is left behind at `{place}`.\n"
                "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away what they attached."
            )
        if now != before[place]:
            raise CheckFailed(
                f"{name}: hooks that others had attached at `{place}` are gone.\n"
                "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away only their own."
            )
    for handle in own:
        handle.remove()


def _wrong_heads(cfg: TransformerConfig, heads: Heads) -> dict[str, list[tuple[int, int]]]:
    """Other heads than those asked for, each as a mistake that chooses them."""
    layers = {layer for layer, _ in heads}
    wrong = {
        "all heads of the layer are ablated, not only those in `heads`.": [
            (layer, head) for layer, head in heads_of(cfg) if layer in layers
        ],
        "the heads are ablated in another layer.": [((layer + 1) % cfg.n_layers, head) for layer, head in heads],
        "these heads are ablated in every layer.": [
            (layer, head) for layer in range(cfg.n_layers) for _, head in heads
        ],
        "all heads but those in `heads` are ablated.": [pair for pair in heads_of(cfg) if pair not in heads],
        "layer and head are swapped: the pairs in `heads` are (layer, head).": [
            (head % cfg.n_layers, layer) for layer, head in heads
        ],
        "only the first pair in `heads` is ablated.": heads[:1],
        "only the last pair in `heads` is ablated.": heads[-1:],
        "nothing is ablated: what the hook function returns is thrown away, or it returns None.": [],
    }
    return {hint: list(pairs) for hint, pairs in wrong.items() if set(pairs) != set(heads)}


def _wrong_stand_ins(kind: str, same_batch: bool) -> dict[str, StandIn]:
    """Other tensors than the one asked for, for each kind of ablation."""
    wrong: dict[str, StandIn] = {
        f"a head's z is replaced as in {other} ablation.": stand_in
        for other, stand_in in KINDS.items()
        if other != kind and kind != "zero" and (other != "resample" or same_batch)
    }
    if kind == "mean":
        wrong |= {
            "the mean is taken over batch and positions; each position has its own.": lambda z, r: r.mean((0, 1))[
                None, None
            ].expand_as(z),
            "the mean is taken over the heads; take it over the batch.": lambda z, r: r.mean((0, 2))[
                None, :, None
            ].expand_as(z),
            "the rows of the reference are summed; take their mean.": lambda z, r: r.sum(0, keepdim=True).expand_as(z),
            "only the first row of the reference is used; take the mean over its rows.": lambda z, r: r[:1].expand_as(
                z
            ),
        }
        if same_batch:
            wrong["the mean is taken over the positions; take it over the batch, at each position."] = lambda z, r: (
                r.mean(1, keepdim=True).expand_as(z)
            )
    if kind == "resample":
        wrong |= {
            "every row gets the first row of the reference.": lambda z, r: r[:1].expand_as(z),
            "the rows of the reference come in another order; row i gets row i.": lambda z, r: r.flip(0),
            "the positions of the reference are shifted by one.": lambda z, r: r.roll(1, 1),
        }
    wrong |= {
        "only the last position is ablated.": lambda z, r: torch.cat([z[:, :-1], KINDS[kind](z, r)[:, -1:]], 1),
        "the first position is left as it is.": lambda z, r: torch.cat([z[:, :1], KINDS[kind](z, r)[:, 1:]], 1),
        "only the first text of the batch is ablated.": lambda z, r: torch.cat([KINDS[kind](z, r)[:1], z[1:]]),
    }
    return wrong


# (kind, heads, rows of the reference)
CASES: list[tuple[str, Heads, int]] = [
    ("zero", [(0, 1)], 0),
    ("mean", [(1, 2), (0, 0)], 3),
    ("mean", [(0, 2)], 2),
    ("resample", [(0, 1), (1, 0), (1, 1)], 2),
]


def check_ablate_heads(fn: Fn) -> None:
    """Every kind, in one layer and in two, with a reference of as many rows and of more; then what must be refused."""
    name = "ablate_heads"
    model = SmallModel(CFG)
    tokens = some_tokens(CFG, 2, 5, seed=1)
    with torch.no_grad():
        for kind, heads, n_rows in CASES:
            reference = some_tokens(CFG, n_rows, 5, seed=2) if n_rows else None
            inputs = {"tokens": tokens} | ({} if reference is None else {"reference": reference})
            with unchanged(name, **inputs), nothing_left_behind(name, model):
                actual = fn(model, tokens, list(heads), kind, *([] if reference is None else [reference]))
            zs = None if reference is None else _zs(model, reference)
            expected = ablated(model, tokens, heads, KINDS[kind], zs)
            mistakes = _ablation_mistakes(model, tokens, heads, kind, reference, zs)
            compare(f"{name} ({kind}, heads {list(heads)})", actual, expected, LOGITS, mistakes)
        _check_no_heads(name, fn, model, tokens)
        reference = some_tokens(CFG, 2, 5, seed=2)
        follows_input(
            name, lambda moved: fn(moved, tokens.to(moved.embed.W_E.device), [(1, 0)], "zero"), (model,), LOGITS
        )
        with nothing_left_behind(name, model):
            _check_refusals(name, fn, model, tokens)


def _ablation_mistakes(
    model: SmallModel,
    tokens: Tensor,
    heads: Heads,
    kind: str,
    reference: Tensor | None,
    zs: list[Tensor] | None,
) -> dict[str, Callable[[], Tensor]]:
    run = partial(ablated, model, tokens)
    mistakes: dict[str, Callable[[], Tensor]] = {
        hint: partial(run, others, KINDS[kind], zs) for hint, others in _wrong_heads(CFG, heads).items()
    }
    same_batch = reference is not None and len(reference) == len(tokens)
    mistakes |= {
        hint: partial(run, heads, stand_in, zs) for hint, stand_in in _wrong_stand_ins(kind, same_batch).items()
    }
    if kind == "mean":
        hint = "the mean is that of `tokens`; take it over `reference`."
        mistakes[hint] = lambda: run(heads, KINDS[kind], _zs(model, tokens))
    return mistakes


def _check_no_heads(name: str, fn: Fn, model: SmallModel, tokens: Tensor) -> None:
    compare(f"{name} with no heads", fn(model, tokens, [], "zero"), model(tokens), LOGITS)


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


def check_ablation_scores(fn: Fn) -> None:
    """Two models; texts whose second half repeats the first, and each kind of ablation."""
    name = "ablation_scores"
    for cfg, n_batch, n_half, kind in [
        (CFG, 2, 3, "zero"),
        (ATTENTION_ONLY, 3, 2, "mean"),
        (ONE_LAYER, 1, 4, "resample"),
    ]:
        model = SmallModel(cfg)
        halves = (some_tokens(cfg, n_batch, n_half, seed=seed) for seed in (5, 6))
        bos = torch.zeros(n_batch, 1, dtype=torch.long)
        tokens, reference = (torch.cat([bos, half, half], 1) for half in halves)
        with unchanged(name, tokens=tokens, reference=reference), nothing_left_behind(name, model):
            actual = fn(model, tokens, n_half, kind, **({} if kind == "zero" else {"reference": reference}))
        zs = _zs(model, reference)
        changed = [ablated(model, tokens, [pair], KINDS[kind], zs) for pair in heads_of(cfg)]
        table = _table(cfg, tokens, model(tokens).detach(), changed)
        mistakes, expected = _score_mistakes(table, n_half)
        compare(f"{name} ({kind})", actual, expected, "layer head", mistakes)
        if actual.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")


def _table(cfg: TransformerConfig, tokens: Tensor, usual: Tensor, changed: Sequence[Tensor]) -> Callable[..., Tensor]:
    """How to make the table, given how losses [batch, pos - 1] become one number."""

    def losses(logits: Tensor) -> Tensor:
        flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return flat.reshape(len(tokens), -1)

    def table(reduce: Callable[[Tensor], Tensor], subtract: bool = True) -> Tensor:
        start = reduce(losses(usual)) if subtract else torch.zeros(())
        return torch.stack([reduce(losses(logits)) - start for logits in changed]).reshape(cfg.n_layers, cfg.n_heads)

    return table


def _score_mistakes(table: Callable[..., Tensor], n: int) -> tuple[dict[str, Tensor | Callable[[], Tensor]], Tensor]:
    """The answers of common mistakes, and the right one."""
    right = table(lambda losses: losses[:, -n:].mean())
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "the loss is taken over the whole text; only its second half counts.": lambda losses: losses.mean(),
        "the loss is that of the first half.": lambda losses: losses[:, :n].mean(),
        "the losses are summed; take their mean.": lambda losses: losses[:, -n:].sum(),
        "the texts of the batch are summed; take the mean over them too.": lambda losses: losses[:, -n:].mean(1).sum(),
        "only the first text of the batch is looked at.": lambda losses: losses[:1, -n:].mean(),
        "the last loss is left out.": lambda losses: losses[:, -n:-1].mean(),
        "the first loss of the second half is left out; the statement counts all n_half.": lambda losses: losses[
            :, 1 - n :
        ].mean(),
        "the loss before the second half is counted too.": lambda losses: losses[:, -n - 1 :].mean(),
        "only the last loss counts; take the mean over the second half.": lambda losses: losses[:, -1].mean(),
    }
    mistakes: dict[str, Tensor | Callable[[], Tensor]] = {
        "the sign is turned round: it is the usual loss minus the loss without the head.": -right,
        "it is the loss without the head; subtract the usual one.": lambda: table(
            lambda losses: losses[:, -n:].mean(), subtract=False
        ),
        "layers and heads are mixed up: a transpose became a reshape.": right.T.reshape(right.shape),
        **{hint: partial(table, reduce) for hint, reduce in others.items()},
    }
    return mistakes, right
