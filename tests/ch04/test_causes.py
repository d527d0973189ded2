"""What the checks of causal evidence cannot know: see tests/test_checks.py."""

from functools import partial
from typing import Any

import torch

import solutions.ch04_induction as ref
from course_utils.checks.ch04.causes import CFG, KINDS, ablated, heads_of, scores
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.hooks import add_hook, hooks, reset_hooks
from tests.ch04 import other_weights as other

SECRETS = ("expand_as", "mean(dim", "[:, :, head]")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "kind != 'zero' -> kind < 'zero'",  # of the three words, in the order of the alphabet
    "kind == 'resample' -> kind >= 'resample'",
    "kind == 'mean' -> kind <= 'mean'",
    "run_with_cache(model, reference, names=names) -> run_with_cache(model, reference)",
    "tuple(reference.shape) -> reference.shape",
    "tuple(tokens.shape) -> tokens.shape",
    "z.clone() -> z",  # nobody else reads that tensor
    "1 - n_half -> 1 + n_half",  # there are 2 n_half losses
}


def lenient(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    return ablated(model, tokens, heads, kind if kind in KINDS else "zero", reference)


def any_rows(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    if kind == "resample" and reference is not None and reference.shape[1] == tokens.shape[1]:
        reference = reference[torch.arange(len(tokens)) % len(reference)]
    return ref.ablate_heads(model, tokens, heads, kind, reference)


def with_hooks(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    """Right, by a hook that stays."""
    logits = ref.ablate_heads(model, tokens, heads, kind, reference)
    add_hook(model, "blocks.0.attn.hook_z", lambda z, hook: None)
    return logits


def resetting(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    reset_hooks(model)
    return ref.ablate_heads(model, tokens, heads, kind, reference)


def references_replaced(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    """What comes from the reference was computed with the heads ablated."""
    if kind == "zero":
        return ref.ablate_heads(model, tokens, heads, kind)
    zs: list[Any] = []
    with hooks(model, {"*hook_z": lambda z, hook: zs.append(z)}):
        ref.ablate_heads(model, reference, heads, "zero")
    layers = iter(zs)
    stand_ins = {**KINDS, kind: lambda z, other: KINDS[kind](z, next(layers))}
    return ablated(model, tokens, heads, kind, reference, stand_ins=stand_ins)


def weights_zeroed(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    """Ablates by writing into W_O, for good."""
    if kind != "zero":
        return ref.ablate_heads(model, tokens, heads, kind, reference)
    with torch.no_grad():
        for layer, head in heads:
            model.blocks[layer].attn.W_O[head] = 0
    return model(tokens)


def with_gradients(model: Any, tokens: Any, n_half: int, kind: str, reference: Any = None) -> Any:
    return ref.ablation_scores(model, tokens, n_half, kind, reference) + 0 * model.embed.W_E.sum()


def instead(kind: str, stand_in: Any) -> Any:
    return partial(ablated, stand_ins={**KINDS, kind: stand_in})


def layers_by_how_they_begin(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    """Layer 1 is taken for 10 and 11, too."""
    layers = range(model.cfg.n_layers)
    struck = [(layer, head) for begin, head in heads for layer in layers if str(layer).startswith(str(begin))]
    return ref.ablate_heads(model, tokens, struck, kind, reference)


def refusing_what_is_to_be_ignored(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    if reference is not None and reference.shape[1] != tokens.shape[1]:
        raise ValueError("shapes")
    return ref.ablate_heads(model, tokens, heads, kind, reference)


def without_finally(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    if kind != "zero":
        return ref.ablate_heads(model, tokens, heads, kind, reference)
    handle = model.blocks[0].attn.hook_z.add(lambda z, hook: None)
    logits = ref.ablate_heads(model, tokens, heads, kind)
    handle.remove()
    return logits


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "ablate_heads": [
        ("a hook is left behind", with_hooks),
        ("hooks that others had attached", resetting),
        ("should raise ValueError", lenient),
        ("should raise ValueError", any_rows),
        ("values are wrong", instead("mean", lambda z, other: other.median(0, keepdim=True).values)),
        ("values are wrong", instead("mean", lambda z, other: other.mean((0, 3), keepdim=True))),
        ("values are wrong", instead("resample", lambda z, other: other.mean(1, keepdim=True))),
        (
            "values are wrong",
            partial(ablated, chosen=lambda cfg, heads: [(layer, (head + 1) % 3) for layer, head in heads]),
        ),
        ("values are wrong", references_replaced),
        ("in place", weights_zeroed),
        ("of twelve layers", layers_by_how_they_begin),
        ("to be ignored", refusing_what_is_to_be_ignored),
        ("after an error half-way, a hook is left behind", without_finally),
    ],
    "ablation_scores": [
        ("expected (layer=2, head=3)", partial(scores, end=lambda without, usual: (without - usual).T)),
        ("gradients are recorded", with_gradients),
        ("values are wrong", partial(scores, chosen=lambda cfg, heads: [h for h in heads_of(cfg) if h <= heads[0]])),
        ("values are wrong", partial(scores, stand_ins=dict.fromkeys(KINDS, KINDS["zero"]))),
        ("values are wrong", partial(scores, reduce=lambda losses, n: losses[:, 1 - n :].median())),
        ("values are wrong", partial(scores, of=lambda tokens, reference: tokens)),
        ("values are wrong", partial(scores, end=lambda without, usual: (without - usual) / usual)),
        ("values are wrong", partial(scores, end=lambda without, usual: (without - usual).abs())),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_zero_ablation_is_what_zeros_in_w_o_give() -> None:
    """An identity that needs no hooks."""
    model, tokens = SmallModel(CFG), some_tokens(CFG, 2, 6, seed=11)
    logits = ref.ablate_heads(model, tokens, [(0, 2), (1, 0)], "zero")
    with torch.no_grad():
        model.blocks[0].attn.W_O[2] = 0
        model.blocks[1].attn.W_O[0] = 0
    torch.testing.assert_close(logits, model(tokens))


def test_resampling_from_itself_changes_nothing() -> None:
    model, tokens = SmallModel(CFG), some_tokens(CFG, 2, 6, seed=11)
    torch.testing.assert_close(ref.ablate_heads(model, tokens, [(0, 2), (1, 0)], "resample", tokens), model(tokens))
