"""What the checks of meaning in chapter 09 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch09_dictionaries as ref
from course_utils.checks.ch09.meaning import counting, sorting, straight, without_each
from tests.ch09 import other_dictionaries as other

SECRETS = ("topk(", "bucketize(", "einsum(")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # One pair is kept, and all lists are as long as each other.
    "0 -> -1",
    "True -> False",
    "zip(*kept, (chunk, here), strict=True) -> zip(*kept, (chunk, here))",
    # The last axis of a matrix.
    "-1 -> 1",
    # Capitals come first.
    "model.cfg.normalization != 'none' -> model.cfg.normalization < 'none'",
    "model.cfg.normalization == 'LN' -> model.cfg.normalization <= 'LN'",
    # More is kept than is needed, until the function ends.
    "run_with_cache(model, tokens[None], names=[pattern, v]) -> run_with_cache(model, tokens[None])",
}


def keeps_everything(chunks: Any, k: int) -> Any:
    return ref.top_examples([torch.cat(list(chunks))], k)


def counts_at_the_end(chunks: Any, edges: Any) -> Any:
    return ref.activation_histogram([torch.cat(list(chunks))], edges)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "top_examples": [
        ("it keeps the chunks", keeps_everything),
        ("values are wrong", sorting(number=lambda chunk, row, before: before + row + 1)),
        ("expected a tuple", lambda chunks, k: ref.top_examples(chunks, k)[0]),
        ("expected dtype", lambda chunks, k: ref.top_examples(chunks, k)[::-1]),
    ],
    "activation_histogram": [
        ("it keeps the chunks", counts_at_the_end),
        ("wrong", counting(lambda value, edges: 0)),
        ("expected dtype", lambda chunks, edges: ref.activation_histogram(chunks, edges) / 11),
    ],
    "logit_effect": [
        ("values are wrong", lambda model, directions: -straight()(model, directions)),
        ("wrong shape", lambda model, directions: straight()(model, directions)[0]),
    ],
    "direct_feature_attribution": [
        ("wrong", lambda *args: 2 * without_each()(*args)),
        ("wrong shape", lambda *args: without_each()(*args).sum(0)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_contributions_add_up_to_the_pre_activation() -> None:
    """Less what is there without any value."""
    from course_utils.checks.ch09.small import ATTN_OUT, D_MODEL, held, padded, small_model
    from course_utils.checks.standins.small_dictionary import SmallDictionary

    model, dictionary, tokens = small_model(), SmallDictionary(ATTN_OUT, D_MODEL), padded((6,))[0][0]
    written = held(model, tokens[None], ATTN_OUT)[0]
    for query in range(6):
        parts = ref.direct_feature_attribution(model, dictionary, tokens, 2, query)
        pre = dictionary.sae.pre_activations(dictionary.scale * written[query])[2]
        nothing = dictionary.sae.pre_activations(dictionary.scale * model.blocks[1].attn.b_O)[2]
        torch.testing.assert_close(parts.sum(), (pre - nothing).detach())
        assert not parts[:, query + 1 :].any()
