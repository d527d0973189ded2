"""Checks of chapter 04, direct logit attribution: the stream as a sum, and what each part says to the logits."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache

Fn = Callable[..., Any]
N_BATCH, N_POS, N_HEADS, D_MODEL, D_VOCAB = 2, 5, 3, 7, 13


def activations(n_layers: int, mlp: bool, n_batch: int = N_BATCH, n_pos: int = N_POS) -> dict[str, Tensor]:
    """What a transformer's hook points see, but for the sizes of heads: random parts, and their true sums."""
    shape = (n_batch, n_pos, D_MODEL)
    seen = {"hook_embed": noise(*shape, seed=1) + 0.4, "hook_pos_embed": noise(*shape, seed=2) - 0.2}
    resid = seen["hook_embed"] + seen["hook_pos_embed"]
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
    centred = resid - resid.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 0.2).sqrt()
    return seen | {"ln_final.hook_scale": scale, "ln_final.hook_normalized": centred / scale}


def components(seen: dict[str, Tensor], n_layers: int, mlp: bool) -> tuple[list[str], Tensor]:
    """The definition, part by part, at all positions: labels and [component batch pos d_model]."""
    labels, parts = ["embed", "pos_embed"], [seen["hook_embed"], seen["hook_pos_embed"]]
    for layer in range(n_layers):
        bias = seen[f"blocks.{layer}.hook_attn_out"]
        for head in range(N_HEADS):
            result = seen[f"blocks.{layer}.attn.hook_result"][:, :, head]
            labels, parts, bias = [*labels, f"head {layer}.{head}"], [*parts, result], bias - result
        labels, parts = [*labels, f"bias {layer}"], [*parts, bias]
        if mlp:
            labels, parts = [*labels, f"mlp {layer}"], [*parts, seen[f"blocks.{layer}.hook_mlp_out"]]
    return labels, torch.stack(parts)


def check_residual_components(fn: Fn) -> None:
    """With MLPs and without; first, middle and last positions; labels, each vector, and where the rest went."""
    name, axes = "residual_components", "component batch d_model"
    for n_layers, mlp in [(2, False), (3, True)]:
        seen = activations(n_layers, mlp)
        labels, everything = components(seen, n_layers, mlp)
        biases = [row for row, label in enumerate(labels) if label.startswith("bias")]
        for pos in (1, -1, 0):
            case = f"{'with' if mlp else 'without'} MLPs, pos={pos}"
            with unchanged(name, **{key.replace(".", "_"): value for key, value in seen.items()}), during(case):
                returned = fn(ActivationCache(seen, n_layers), pos)
            if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], list)):
                what = "None" if returned is None else f"a {type(returned).__name__}"
                raise CheckFailed(
                    f"{name}: expected a list of labels and a tensor, got {what}.\n  Next: return labels, vectors."
                )
            expected = everything[:, :, pos]
            _compare_labels(f"{name} {case}", returned[0], labels)
            last = {"pos is ignored: these are the vectors at the last position.": everything[:, :, -1]}
            last |= {"pos is ignored: these are the vectors at position 0.": everything[:, :, 0]}
            last = {hint: answer for hint, answer in last.items() if not torch.equal(answer, expected)}
            whole, zero, folded = expected.clone(), expected.clone(), expected.clone()
            for layer, row in enumerate(biases):
                whole[row] = seen[f"blocks.{layer}.hook_attn_out"][:, pos]
                zero[row] = 0
                folded[row] = 0
                folded[row - N_HEADS : row] += expected[row] / N_HEADS
            mistakes = last | {
                "the biases hold all of attention's output; the heads are in it too, and must be taken off.": whole,
                "the biases are left at 0; they are what attn_out has over the sum of the heads.": zero,
                "the biases are spread over the heads; they stand apart.": folded,
                "the vectors are those of the first text only.": expected[:, :1].expand_as(expected),
                "the sign of the biases is wrong.": _negated(expected, biases),
            }
            compare(f"{name} {case}", returned[1], expected, axes, mistakes)
    _follows(name, fn, axes)


def _negated(vectors: Tensor, rows: Sequence[int]) -> Tensor:
    signs = torch.ones(len(vectors))
    signs[list(rows)] = -1
    return vectors * signs[:, None, None]


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


class End(nn.Module):
    """The end of a transformer, which is all that attribution asks of a model."""

    def __init__(self, n_layers: int, mlp: bool) -> None:
        super().__init__()
        size = {"d_mlp": 11} if mlp else {"attn_only": True}
        self.cfg = TransformerConfig(
            d_vocab=D_VOCAB,
            n_ctx=9,
            n_layers=n_layers,
            n_heads=N_HEADS,
            d_model=D_MODEL,
            d_head=6,
            layer_norm_eps=0.2,
            **size,
        )
        self.ln_final, self.unembed = nn.Module(), nn.Module()
        self.ln_final.w, self.ln_final.b = nn.Parameter(noise(D_MODEL, seed=41)), nn.Parameter(noise(D_MODEL, seed=42))
        self.unembed.W_U = nn.Parameter(noise(D_MODEL, D_VOCAB, seed=43))
        self.unembed.b_U = nn.Parameter(noise(D_VOCAB, seed=44))


def attribution(parts: Tensor, model: Any, scale: Tensor, targets: Tensor, **wrong: Any) -> Tensor:
    """Entry by entry; switches for what people get wrong. `targets` are [batch pos], one for each position."""
    n_parts, n_batch, n_pos, _ = parts.shape
    w, W_U = model.ln_final.w.detach(), model.unembed.W_U.detach()
    out = torch.empty(n_parts, n_batch, n_pos)
    centred = parts if wrong.get("uncentred") else parts - parts.mean(-1, keepdim=True)
    if wrong.get("alone"):
        divisor = (centred.square().mean(-1, keepdim=True) + 0.2).sqrt()
    else:
        divisor = (torch.ones_like(scale) if wrong.get("unscaled") else scale).expand_as(parts[..., :1])
    scaled = centred / divisor * (1 if wrong.get("no_w") else w)
    for row in range(n_batch):
        for pos in range(n_pos):
            out[:, row, pos] = scaled[:, row, pos] @ W_U[:, targets[row, pos]]
    return out


def check_logit_attribution(fn: Fn) -> None:
    """Every entry, so that no right sum can hide a wrong part; with MLPs and without."""
    name, axes = "logit_attribution", "component batch next"
    for n_layers, mlp, n_batch, n_pos in [(2, False, 2, 5), (1, True, 3, 4)]:
        seen, model = activations(n_layers, mlp, n_batch, n_pos), End(n_layers, mlp)
        tokens = torch.randint(D_VOCAB, (n_batch, n_pos), generator=torch.Generator().manual_seed(6))
        parts = components(seen, n_layers, mlp)[1]
        before, scale, targets = parts[:, :, :-1], seen["ln_final.hook_scale"], tokens[:, 1:]
        at = SimpleNamespace(model=model, scale=scale[:, :-1], targets=targets)

        def variant(at: SimpleNamespace = at, parts: Tensor = before, **wrong: Any) -> Tensor:
            return attribution(parts, at.model, wrong.pop("scale", at.scale), wrong.pop("targets", at.targets), **wrong)

        right = variant()
        W_U, b_U = model.unembed.W_U.detach(), model.unembed.b_U.detach()
        constant = (model.ln_final.b.detach() @ W_U + b_U)[targets]
        logits = right.sum(0) + constant
        mistakes = {
            "the final LayerNorm's scale is left out.": variant(unscaled=True),
            "the final LayerNorm's `w` is left out.": variant(no_w=True),
            "a component's own mean is not subtracted; LayerNorm centres the sum, and so each part.": variant(
                uncentred=True
            ),
            "the final LayerNorm is left out.": variant(unscaled=True, uncentred=True, no_w=True),
            "each component is divided by a scale of its own; use that of the whole stream.": variant(alone=True),
            "the scale is that of another position: it should be that of the logits' own.": variant(scale=scale[:, 1:]),
            "every position is divided by the scale of the last.": variant(
                scale=scale[:, -1:].expand_as(scale)[:, :-1]
            ),
            "every text is divided by the scale of the first.": variant(scale=scale[:1, :-1].expand_as(scale[:, :-1])),
            "it is the logit of the token at p itself; the logits at p are about the next one.": variant(
                targets=tokens[:, :-1]
            ),
            "the components are those of the position after: the one where the token stands.": variant(
                parts=parts[:, :, 1:]
            ),
            "every text is asked about the tokens of the first.": variant(targets=targets[:1].expand_as(targets)),
            "the components of the first text are used for all.": variant(parts=before[:, :1].expand_as(before)),
            "`b_U` is added to every component.": right + b_U[targets],
            "`ln_final.b` and `b_U` are added to every component; they belong to none.": right + constant,
            "`ln_final.b` is added to every component.": right + (model.ln_final.b.detach() @ W_U)[targets],
            "`ln_final.b` and `b_U` are spread over the components: the sums are right, the entries are not.": right
            + constant / len(parts),
            "each component gets an equal share of the logit: the sums are right, the entries are not.": (
                logits / len(parts)
            ).expand_as(right),
        }
        with unchanged(name, tokens=tokens, **{key.replace(".", "_"): value for key, value in seen.items()}):
            actual = fn(ActivationCache(seen, n_layers), model, tokens)
        full = right.shape[0], right.shape[1], right.shape[2] + 1
        if isinstance(actual, Tensor) and tuple(actual.shape) == full:
            raise CheckFailed(
                f"{name}: wrong shape.\n  expected (component={full[0]}, batch={full[1]}, next={full[2] - 1})\n"
                f"  got      {full}\n  Next: after the last token nothing comes; leave the last position out."
            )
        try:
            compare(name, actual.detach() if isinstance(actual, Tensor) else actual, right, axes, mistakes)
        except CheckFailed as failure:
            sums = isinstance(actual, Tensor) and actual.shape == right.shape
            if (
                sums
                and "This is what" not in str(failure)
                and any(torch.allclose(actual.sum(0), total, rtol=1e-4, atol=1e-4) for total in (right.sum(0), logits))
            ):
                lines = str(failure).splitlines()
                lines.insert(2, "  The sums over the components are right: something was moved from one to another.")
                raise CheckFailed("\n".join(lines)) from None
            raise

    def moved_attribution(model: nn.Module, tokens: Tensor, *moved: Tensor) -> Tensor:
        return fn(ActivationCache(dict(zip(seen, moved, strict=True)), 1), model, tokens).detach()

    follows_input(name, moved_attribution, (model, tokens, *seen.values()), axes)
