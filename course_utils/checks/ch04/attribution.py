"""Checks of chapter 04, direct logit attribution: the stream as a sum, and what each part says to the logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree
from course_utils.checks.standins.transformer_end import End
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache

Fn = Callable[..., Any]
N_BATCH, N_POS, N_HEADS, D_MODEL, D_VOCAB = 2, 5, 3, 7, 13


def activations(
    n_layers: int, mlp: bool, n_batch: int = N_BATCH, n_pos: int = N_POS, learned: bool = True, norm: str = "LN"
) -> dict[str, Tensor]:
    """What a transformer's hook points see, but for the sizes of heads: random parts, and their true sums.

    Without `learned` positions nothing sees them, and where `norm` is "none" there is no scale.
    """
    shape = (n_batch, n_pos, D_MODEL)
    seen = {"hook_embed": noise(*shape, seed=1) + 0.4}
    if learned:
        seen["hook_pos_embed"] = noise(*shape, seed=2) - 0.2
    resid = sum(seen.values(), torch.zeros(shape))
    for layer in range(n_layers):
        result = noise(n_batch, n_pos, N_HEADS, D_MODEL, seed=10 + layer) + 0.3
        attn_out = result.sum(2) + noise(D_MODEL, seed=20 + layer)
        seen |= {f"blocks.{layer}.hook_resid_pre": resid, f"blocks.{layer}.attn.hook_result": result}
        seen[f"blocks.{layer}.hook_attn_out"] = attn_out
        resid = resid + attn_out
        if mlp:
            seen[f"blocks.{layer}.hook_resid_mid"] = resid
            seen[f"blocks.{layer}.hook_mlp_out"] = noise(*shape, seed=30 + layer) + 0.1
            resid = resid + seen[f"blocks.{layer}.hook_mlp_out"]
        seen[f"blocks.{layer}.hook_resid_post"] = resid
    if norm == "none":
        return seen
    centred = resid - resid.mean(-1, keepdim=True) if norm == "LN" else resid
    scale = (centred.square().mean(-1, keepdim=True) + 0.2).sqrt()
    return seen | {"ln_final.hook_scale": scale, "ln_final.hook_normalized": centred / scale}


def components(cache: ActivationCache) -> tuple[list[str], Tensor]:
    """The definition, part by part, at all positions: labels and [component batch pos d_model]."""
    labels = [label for label in ("embed", "pos_embed") if f"hook_{label}" in cache]
    parts = [cache[f"hook_{label}"] for label in labels]
    for layer in range(cache.n_layers):
        bias = cache[f"blocks.{layer}.hook_attn_out"]
        for head in range(N_HEADS):
            result = cache[f"blocks.{layer}.attn.hook_result"][:, :, head]
            labels, parts, bias = [*labels, f"head {layer}.{head}"], [*parts, result], bias - result
        labels, parts = [*labels, f"bias {layer}"], [*parts, bias]
        if f"blocks.{layer}.hook_mlp_out" in cache:
            labels, parts = [*labels, f"mlp {layer}"], [*parts, cache[f"blocks.{layer}.hook_mlp_out"]]
    return labels, torch.stack(parts)


def at(cache: ActivationCache, pos: int) -> tuple[list[str], Tensor]:
    labels, parts = components(cache)
    return labels, parts[:, :, pos]


def with_biases(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Fn:
    """Components where `change` says what stands for the heads of a layer, and for the bias after them."""

    def wrong(cache: ActivationCache, pos: int) -> tuple[list[str], Tensor]:
        labels, vectors = at(cache, pos)
        for row in (row for row, label in enumerate(labels) if label.startswith("bias")):
            heads, bias = change(vectors[row - N_HEADS : row].clone(), vectors[row].clone())
            vectors[row - N_HEADS : row], vectors[row] = heads, bias
        return labels, vectors

    return wrong


def of_first_text(cache: ActivationCache, pos: int) -> tuple[list[str], Tensor]:
    labels, vectors = at(cache, pos)
    return labels, vectors[:, :1].expand_as(vectors)


@known_mistakes(
    {
        "pos is ignored: these are the vectors at the last position.": lambda cache, pos: at(cache, -1),
        "pos is ignored: these are the vectors at position 0.": lambda cache, pos: at(cache, 0),
        "the biases hold all of attention's output; the heads are in it too, and must be taken off.": with_biases(
            lambda heads, bias: (heads, bias + heads.sum(0))
        ),
        "the biases are left at 0; they are what attn_out has over the sum of the heads.": with_biases(
            lambda heads, bias: (heads, 0 * bias)
        ),
        "the biases are spread over the heads; they stand apart.": with_biases(
            lambda heads, bias: (heads + bias / N_HEADS, 0 * bias)
        ),
        "the vectors are those of the first text only.": of_first_text,
        "the sign of the biases is wrong.": with_biases(lambda heads, bias: (heads, -bias)),
    }
)
def check_residual_components(fn: Fn) -> None:
    """With MLPs and without, twelve layers, no table of positions; several places; labels, and each vector."""
    name, axes = "residual_components", "component batch d_model"
    for n_layers, mlp, n_batch, learned in [
        (2, False, 2, True),
        (3, True, 2, True),
        (12, False, 1, True),
        (1, True, 2, False),
    ]:
        cache = ActivationCache(activations(n_layers, mlp, n_batch, learned=learned), n_layers)
        labels, everything = components(cache)
        for pos in (1, -1, 0):
            case = f"{'with' if mlp else 'without'} MLPs{'' if learned else ', rotary positions'}, pos={pos}"
            with during(case):
                returned = fn(cache, pos)
            if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], list)):
                what = "None" if returned is None else f"a {type(returned).__name__}"
                raise CheckFailed(
                    f"{name}: expected a list of labels and a tensor, got {what}.\n  Next: return labels, vectors."
                )
            _compare_labels(f"{name} {case}", returned[0], labels)
            compare(f"{name} {case}", returned[1], everything[:, :, pos], axes)
    _follows(name, fn, axes)


def _compare_labels(name: str, actual: list[Any], labels: list[str]) -> None:
    if sorted(map(str, actual)) == sorted(labels) and actual != labels:
        place = next(i for i, (got, want) in enumerate(zip(actual, labels, strict=True)) if got != want)
        raise CheckFailed(
            f"{name}: the labels are all there, in another order.\n"
            f"  first at [{place}]: expected {labels[place]!r}, got {actual[place]!r}\n"
            "  Next: the embeddings; then for each layer the heads, the bias, and the MLP if there is one."
        )
    agree(f"{name}: the labels", "the first of what it returns", actual, labels)


def _follows(name: str, fn: Fn, axes: str) -> None:
    seen = activations(2, True)

    def vectors(*moved: Tensor) -> Tensor:
        return fn(ActivationCache(dict(zip(seen, moved, strict=True)), 2), 1)[1]

    follows_input(name, vectors, tuple(seen.values()), axes)


def config(n_layers: int, mlp: bool, learned: bool = True, norm: Any = "LN") -> TransformerConfig:
    size: dict[str, Any] = {"d_mlp": 11} if mlp else {"attn_only": True}
    size |= {} if learned else {"positions": "rotary", "rotary_dim": 4}
    return TransformerConfig(
        d_vocab=D_VOCAB,
        n_ctx=9,
        n_layers=n_layers,
        n_heads=N_HEADS,
        d_model=D_MODEL,
        d_head=6,
        normalization=norm,
        layer_norm_eps=0.2,
        **size,
    )


def attribution(parts: Tensor, model: Any, scale: Tensor, targets: Tensor, **wrong: Any) -> Tensor:
    """Entry by entry; switches for what people get wrong. `targets` are [batch pos], one for each position."""
    n_parts, n_batch, n_pos, _ = parts.shape
    w, W_U = model.ln_final.w.detach(), model.unembed.W_U.detach()
    out = torch.empty(n_parts, n_batch, n_pos)
    subtracts = wrong.get("always_centred") or (model.cfg.normalization == "LN" and not wrong.get("uncentred"))
    centred = parts - parts.mean(-1, keepdim=True) if subtracts else parts
    if wrong.get("alone"):
        divisor = (centred.square().mean(-1, keepdim=True) + 0.2).sqrt()
    else:
        divisor = (torch.ones_like(scale) if wrong.get("unscaled") else scale).expand_as(parts[..., :1])
    scaled = centred / divisor * (1 if wrong.get("no_w") else w)
    for row in range(n_batch):
        for pos in range(n_pos):
            out[:, row, pos] = scaled[:, row, pos] @ W_U[:, targets[row, pos]]
    return out


def attributed(
    cache: ActivationCache,
    model: Any,
    tokens: Tensor,
    parts: Fn = lambda parts: parts[:, :, :-1],
    scale: Fn = lambda scale: scale[:, :-1],
    targets: Fn = lambda tokens: tokens[:, 1:],
    end: Fn = lambda entries, b, b_U: entries,
    **wrong: Any,
) -> Tensor:
    """The right answer, or what comes of other components, scales or targets; `end` may bring the constants in."""
    asked, W_U = targets(tokens), model.unembed.W_U.detach()
    if model.cfg.normalization in ("none", wrong.get("taken_for_none")):  # only the last step is left
        vectors = parts(components(cache)[1])
        return end((vectors * W_U.T[asked]).sum(-1), torch.zeros(()), model.unembed.b_U.detach()[asked])
    entries = attribution(parts(components(cache)[1]), model, scale(cache["ln_final.hook_scale"]), asked, **wrong)
    b = model.ln_final.b.detach() @ W_U if model.cfg.normalization == "LN" else torch.zeros(D_VOCAB)
    return end(entries, b[asked], model.unembed.b_U.detach()[asked])


def first_text(tensor: Tensor, batch_axis: int = 0) -> Tensor:
    return tensor.narrow(batch_axis, 0, 1).expand_as(tensor)


@known_mistakes(
    {
        "the final LayerNorm's scale is left out.": partial(attributed, unscaled=True),
        "the final LayerNorm's `w` is left out.": partial(attributed, no_w=True),
        "a component's own mean is not subtracted; LayerNorm centres the sum, and so each part.": partial(
            attributed, uncentred=True
        ),
        "the final LayerNorm is left out.": partial(attributed, unscaled=True, uncentred=True, no_w=True),
        "the mean is subtracted where normalization is 'RMS'; an RMSNorm subtracts none.": partial(
            attributed, always_centred=True
        ),
        "the scale and `w` are left out where normalization is 'RMS'; only the mean is.": partial(
            attributed, taken_for_none="RMS"
        ),
        "each component is divided by a scale of its own; use the scale of the whole stream.": partial(
            attributed, alone=True
        ),
        "the scale comes from another position; use the position of the logits.": partial(
            attributed, scale=lambda scale: scale[:, 1:]
        ),
        "every position is divided by the scale of the last.": partial(
            attributed, scale=lambda scale: scale[:, -1:].expand_as(scale)[:, :-1]
        ),
        "every text is divided by the scale of the first.": partial(
            attributed, scale=lambda scale: first_text(scale)[:, :-1]
        ),
        "it is the logit of the token at p itself; the logits at p are about the next one.": partial(
            attributed, targets=lambda tokens: tokens[:, :-1]
        ),
        "the components are those of the position after: the one where the token stands.": partial(
            attributed, parts=lambda parts: parts[:, :, 1:]
        ),
        "every text is asked about the tokens of the first.": partial(
            attributed, targets=lambda tokens: first_text(tokens)[:, 1:]
        ),
        "the components of the first text are used for all.": partial(
            attributed, parts=lambda parts: first_text(parts, 1)[:, :, :-1]
        ),
        "`b_U` is added to every component.": partial(attributed, end=lambda entries, b, b_U: entries + b_U),
        "`ln_final.b` and `b_U` are added to every component; they belong to none.": partial(
            attributed, end=lambda entries, b, b_U: entries + b + b_U
        ),
        "`ln_final.b` is added to every component.": partial(attributed, end=lambda entries, b, b_U: entries + b),
        "`ln_final.b` and `b_U` are spread over the components: the sums are right, the entries are not.": partial(
            attributed, end=lambda entries, b, b_U: entries + (b + b_U) / len(entries)
        ),
        "each component gets an equal share of the logit: the sums are right, the entries are not.": partial(
            attributed, end=lambda entries, b, b_U: ((entries.sum(0) + b + b_U) / len(entries)).expand_as(entries)
        ),
    }
)
def check_logit_attribution(fn: Fn) -> None:
    """Every entry, so that no right sum can hide a wrong part; with MLPs and without, in every family."""
    name, axes = "logit_attribution", "component batch next"
    for n_layers, mlp, n_batch, n_pos, *kind in [
        (2, False, 2, 5),
        (2, True, 1, 3, True, "none"),
        (2, True, 2, 3, False, "RMS"),
        (12, False, 1, 3, False, "LN"),
        (1, True, 3, 4),
    ]:
        seen, model = activations(n_layers, mlp, n_batch, n_pos, *kind), End(config(n_layers, mlp, *kind))
        tokens = torch.randint(D_VOCAB, (n_batch, n_pos), generator=torch.Generator().manual_seed(6))
        cache = ActivationCache(seen, n_layers)
        right = attributed(cache, model, tokens)
        logits = attributed(cache, model, tokens, end=lambda entries, b, b_U: entries.sum(0) + b + b_U)
        with during(f"for {model.cfg.positions} positions, normalization {model.cfg.normalization!r}"):
            actual = fn(cache, model, tokens)
        full = right.shape[0], right.shape[1], right.shape[2] + 1
        if isinstance(actual, Tensor) and tuple(actual.shape) == full:
            raise CheckFailed(
                f"{name}: wrong shape.\n  expected (component={full[0]}, batch={full[1]}, next={full[2] - 1})\n"
                f"  got      {full}\n  Next: after the last token nothing comes; leave the last position out."
            )
        try:
            compare(name, actual.detach() if isinstance(actual, Tensor) else actual, right, axes)
        except CheckFailed as failure:
            if not isinstance(actual, Tensor) or (actual.shape, actual.dtype) != (right.shape, right.dtype):
                raise
            if actual.device != right.device:
                raise
            if not any(torch.allclose(actual.sum(0), total, rtol=1e-4, atol=1e-4) for total in (right.sum(0), logits)):
                raise
            moved = "  The sums over the components are right: something was moved from one to another."
            raise CheckFailed(failure.message, evidence=failure.evidence, advice=f"{moved}\n{failure.advice}") from None

    def moved_attribution(model: Any, tokens: Tensor, *moved: Tensor) -> Tensor:
        return fn(ActivationCache(dict(zip(seen, moved, strict=True)), 1), model, tokens).detach()

    follows_input(name, moved_attribution, (model, tokens, *seen.values()), axes)
