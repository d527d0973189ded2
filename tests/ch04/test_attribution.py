"""What the checks of direct logit attribution cannot know: see tests/test_checks.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import solutions.ch04_induction as ref
from course_utils.checks.ch04.attribution import attributed, components, with_biases
from course_utils.hooks import run_with_cache
from tests.ch04 import other_induction as other

SECRETS = ("einsum(",)
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "model.cfg.normalization == 'LN' -> model.cfg.normalization <= 'LN'",  # LN is the least
    "model.cfg.normalization != 'none' -> model.cfg.normalization < 'none'",  # none is the largest
}


def reordered(order: Callable[[list[str]], list[str]]) -> Any:
    """The right vectors, but those whose label stands elsewhere in `order(labels)`."""

    def residual_components(cache: Any, pos: int) -> Any:
        labels, vectors = ref.residual_components(cache, pos)
        return labels, vectors[[labels.index(label) for label in order(labels)]]

    return residual_components


def relabelled(change: Callable[[list[str]], list[str]]) -> Any:
    def residual_components(cache: Any, pos: int) -> Any:
        labels, vectors = ref.residual_components(cache, pos)
        return change(labels), vectors

    return residual_components


def swapped(first: str, second: str) -> Any:
    return reordered(lambda labels: [{first: second, second: first}.get(label, label) for label in labels])


def one_bias(cache: Any, pos: int) -> Any:
    labels, vectors = ref.residual_components(cache, pos)
    first, second = labels.index("bias 0"), labels.index("bias 1")
    vectors[first] += vectors[second]
    vectors[second] = 0
    return labels, vectors


def by_size(cache: Any, model: Any, tokens: Any) -> Any:
    """The logit is shared out by the lengths of the components."""
    entries, sizes = attributed(cache, model, tokens), components(cache)[1][:, :, :-1].norm(dim=-1)
    return entries.sum(0) * sizes / sizes.sum(0)


def layers_as_text(cache: Any, pos: int) -> Any:
    """Layers in the order of their names: 0, 1, 10, 11, 2, ..."""
    labels, vectors = ref.residual_components(cache, pos)

    def place(row: int) -> tuple[str, int]:
        return labels[row].partition(" ")[2].partition(".")[0], row

    order = sorted(range(len(labels)), key=place)
    return [labels[row] for row in order], vectors[order]


def squeezed(answer: Any) -> Any:
    return answer[0], answer[1].squeeze()


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "residual_components": [
        ("in another order", relabelled(sorted)),
        ("in another order", layers_as_text),
        ("wrong shape", lambda cache, pos: squeezed(ref.residual_components(cache, pos))),
        ("the labels", relabelled(lambda labels: [label.replace("head ", "L") for label in labels])),
        ("values are wrong", swapped("head 0.0", "head 1.0")),
        ("values are wrong", swapped("embed", "pos_embed")),
        ("values are wrong", with_biases(lambda heads, bias: (heads.mean(0).expand_as(heads), bias))),  # right sums
        ("values are wrong", one_bias),
        ("expected a list of labels and a tensor", lambda cache, pos: ref.residual_components(cache, pos)[1]),
    ],
    "logit_attribution": [
        (
            "The sums over the components are right",
            lambda cache, model, tokens: attributed(cache, model, tokens).roll(1, 0),
        ),
        ("The sums over the components are right", by_size),
        (
            "values are wrong",  # the texts of the batch are averaged
            lambda cache, model, tokens: attributed(
                cache, model, tokens, end=lambda entries, b, b_U: entries.mean(1, keepdim=True).expand_as(entries)
            ),
        ),
        (
            "leave the last position out",
            lambda cache, model, tokens: nn.functional.pad(ref.logit_attribution(cache, model, tokens), (0, 1)),
        ),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_components_sum_to_the_stream_and_attributions_to_the_logits(module: Any, model: Any, tokens: Any) -> None:
    names = ["hook_embed", "hook_pos_embed", "*hook_result", "*hook_attn_out", "*hook_mlp_out", "ln_final.*"]
    logits, cache = run_with_cache(model, tokens, names=[*names, "*hook_resid_post"])
    labels, vectors = module.residual_components(cache, 5)
    assert len(labels) == 2 + 3 * (4 + 1 + 1)
    torch.testing.assert_close(vectors.sum(0), cache["resid_post", -1][:, 5], rtol=1e-4, atol=1e-4)
    bias = vectors[labels.index("bias 1")]
    torch.testing.assert_close(bias, model.blocks[1].attn.b_O.expand(2, -1), rtol=1e-3, atol=1e-4)
    sums = module.logit_attribution(cache, model, tokens).sum(0)
    targets = tokens[:, 1:]
    constant = (model.ln_final.b @ model.unembed.W_U + model.unembed.b_U)[targets]
    expected = logits[:, :-1].gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(sums + constant, expected, rtol=1e-3, atol=1e-3)
