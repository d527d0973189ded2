"""What the checks of reading the model in chapter 12 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch02_transformer as ch02
import solutions.ch12_brackets as ref
from course_utils.checks.ch12.reading import attended, contributed, fitted, probed, regressed, verdicts
from course_utils.checks.ch12.small import texts
from course_utils.checks.modules import randomise
from course_utils.config import TransformerConfig
from course_utils.data.brackets import END
from course_utils.hooks import run_with_cache
from tests.ch12 import other_brackets as other
from tests.ch12 import third_style as third

SECRETS = ("pinv(", "W_out @", "@ direction")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "tokens == END -> tokens >= END",  # END comes before PAD, and argmax takes the first
    "0 -> -1",  # the only column
    "y_train - mean_y -> y_train",  # a constant has no slope: x is centred
    "y_train - mean_y -> y_train + mean_y",
}


def relabelled(cache: Any, tokens: Any, direction: Any) -> Any:
    labels, values = other.component_contributions(cache, tokens, direction)
    return [label.upper() for label in labels], values


def reordered(cache: Any, tokens: Any, direction: Any) -> Any:
    labels, values = other.component_contributions(cache, tokens, direction)
    order = sorted(range(len(labels)), key=labels.__getitem__)
    return [labels[row] for row in order], values[order]


def with_a_place_for_positions(cache: Any, tokens: Any, direction: Any) -> Any:
    """Labels as with learned positions, whether there are any or not."""
    labels, values = other.component_contributions(cache, tokens, direction)
    if "pos_embed" not in labels:
        labels, values = [labels[0], "pos_embed", *labels[1:]], torch.cat([values[:1], 0 * values[:1], values[1:]])
    return labels, values


def only_y_centred(x: Any, y: Any) -> Any:
    y = y - y.mean(0)
    matrix = torch.linalg.pinv(x) @ y
    return matrix, 1 - (y - x @ matrix).square().sum() / y.square().sum()


def centred_stream(model: Any, resid: Any) -> Any:
    """The stream loses its mean before the fit, which does this already."""
    return other.pre_norm_direction(model, resid - resid.mean(1, keepdim=True))


def summed_over_positions(model: Any, cache: Any, tokens: Any, direction: Any, layer: int) -> Any:
    return cache["post", layer].sum(1) * (model.blocks[layer].mlp.W_out.detach() @ direction)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "unbalanced_scores": [
        ("values are wrong", verdicts(end=lambda row: row[2] - row[3])),
        ("wrong", verdicts(at=lambda tokens: tokens.argmax(1).tolist())),  # PAD is the largest token
        ("wrong shape", lambda model, tokens: other.unbalanced_scores(model, tokens)[:, None]),
        ("no gradient gets through", lambda model, tokens: other.unbalanced_scores(model, tokens).detach()),
        ("Tensor, got a list", lambda model, tokens: other.unbalanced_scores(model, tokens).tolist()),
    ],
    "layer_norm_fit": [
        ("expected a matrix and r2", lambda x, y: ref.layer_norm_fit(x, y)[0]),
        ("wrong shape", lambda x, y: (torch.cat([ref.layer_norm_fit(x, y)[0]] * 2), ref.layer_norm_fit(x, y)[1])),
        ("expected a Tensor", lambda x, y: (ref.layer_norm_fit(x, y)[0], float(ref.layer_norm_fit(x, y)[1]))),
        ("wrong", only_y_centred),
        ("wrong", fitted(share=lambda y, guess: 1 - (y - guess).square().mean(0).sum() / y.var(0).sum())),
        ("wrong", fitted(share=lambda y, guess: 1 - (y - guess).abs().sum() / (y - y.mean(0)).abs().sum())),
    ],
    "pre_norm_direction": [
        ("values are wrong", lambda model, resid: regressed(model, resid) - regressed(model, resid).mean()),
        ("wrong shape", lambda model, resid: regressed(model, resid)[:, None]),
        ("values are wrong", lambda model, resid: regressed(model, resid[: len(resid) // 2])),
        ("values are wrong", centred_stream),
    ],
    "component_contributions": [
        ("the labels", relabelled),
        ("the labels", reordered),
        ("the labels", with_a_place_for_positions),
        ("expected labels and a tensor", lambda *args: other.component_contributions(*args)[1]),
        ("values are wrong", contributed(change=lambda label, part, cache: part.abs())),
    ],
    "attention_by_position": [
        ("wrong", attended(over=lambda found: found.median(0).values)),
        ("wrong", attended(over=lambda found: found.mean(0).flip(1))),
        ("wrong shape", attended(over=lambda found: found.mean(0)[:, 1:])),
    ],
    "neuron_contributions": [
        ("values are wrong", lambda *args: other.neuron_contributions(*args).abs()),
        ("values are wrong", summed_over_positions),
        ("in another order", lambda *args: other.neuron_contributions(*args).T),
        ("wrong shape", lambda *args: other.neuron_contributions(*args).sum(1)),
    ],
    "probe_r2": [
        ("wrong", probed(share=lambda errors, distances: 1 - errors.abs().sum() / distances.sqrt())),
        ("Tensor", lambda *args: float(other.probe_r2(*args))),
        ("wrong shape", lambda *args: other.probe_r2(*args)[None]),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), getattr(third, name)] for name in SURPRISES}

TINY = TransformerConfig(d_vocab=5, n_ctx=11, n_layers=2, n_heads=2, d_model=8, d_head=4, d_mlp=10, act="relu")


def small() -> Any:
    model = ch02.Transformer(TINY)
    randomise(model)
    return model


def test_contributions_sum_to_the_streams_own() -> None:
    model, tokens, direction = small(), texts(), torch.arange(8.0)
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*")
        _, parts = ref.component_contributions(cache, tokens, direction)
    torch.testing.assert_close(parts.sum(0), cache["resid_post", -1][tokens == END] @ direction)


def test_neurons_sum_to_their_mlp() -> None:
    model, tokens, direction = small(), texts(), torch.arange(8.0)
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*")
        labels, parts = ref.component_contributions(cache, tokens, direction)
        for layer in range(2):
            neurons = ref.neuron_contributions(model, cache, tokens, direction, layer).sum(1)
            whole = neurons + model.blocks[layer].mlp.b_out @ direction
            torch.testing.assert_close(whole, parts[labels.index(f"mlp {layer}")])


def test_attention_sums_to_one() -> None:
    model, tokens = small(), texts()
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_pattern")
    torch.testing.assert_close(ref.attention_by_position(cache["pattern", 1], tokens).sum(1), torch.ones(2))


def test_padding_does_not_change_a_verdict() -> None:
    model, tokens = small(), texts(1)
    with torch.no_grad():
        short = ref.unbalanced_scores(model, tokens[:, :8])
        torch.testing.assert_close(ref.unbalanced_scores(model, tokens), short)
