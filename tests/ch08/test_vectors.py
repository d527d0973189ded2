"""What the checks of extracting vectors cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch08_function_vectors as ref
from course_utils.checks.ch08.small import dataset, small_model, tokens_of
from course_utils.checks.ch08.vectors import drawing, effects, outputs, residuals, summing
from course_utils.hooks import add_hook, run_with_cache
from tests.ch08 import other_function_vectors as other

SECRETS = ("einsum(", "topk(", "argsort(", "randperm(")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    # more is kept than is read
    "run_with_cache(model, tokens, names='*hook_resid_post') -> run_with_cache(model, tokens)",
    "run_with_cache(model, tokens, names='*hook_z') -> run_with_cache(model, tokens)",
    "-1 -> 1",  # of two axes, the second is the last
    # only the shape is taken from it; written into itself, each entry has been read before
    "0 -> 1",
    "0 -> -1",
    "torch.zeros_like(outputs[..., 0]) -> outputs[..., 0]",
    "result.clone() -> result",  # nobody else reads it
    # on a GPU
    "torch.randperm(len(others), generator=generator, device=generator.device) -> "
    "torch.randperm(len(others), generator=generator)",
    "torch.arange(len(corrupted.tokens), device=corrupted.tokens.device) -> torch.arange(len(corrupted.tokens))",
}


def leaves_a_hook(model: Any, clean: Any, corrupted: Any) -> Any:
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return effects()(model, clean, corrupted)


def neighbours(pool: list[int], n: int, generator: torch.Generator) -> list[int]:
    """Each head is as likely as any other, but the next ones come with it."""
    first = int(torch.randint(len(pool), (), generator=generator))
    return [pool[(first + step) % len(pool)] for step in range(n)]


def with_graph(model: Any, tokens: Any) -> Any:
    return torch.stack(
        [run_with_cache(model, tokens)[1]["resid_post", layer][:, -1].mean(0) for layer in range(len(model.blocks))]
    )


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "mean_last_residual": [
        ("gradients are recorded", with_graph),
        ("wrong shape", residuals(reduce=lambda resid: resid[:, -1])),
        ("values are wrong", residuals(reduce=lambda resid: resid[:, -1].median(0).values)),
    ],
    "mean_head_outputs": [
        ("values are wrong", lambda model, tokens: outputs()(model, tokens).flip(1)),
        ("wrong shape", lambda model, tokens: outputs()(model, tokens).sum(1)),
    ],
    "causal_head_scores": [
        ("a hook is left behind", leaves_a_hook),
        ("values are wrong", lambda model, clean, corrupted: effects()(model, clean, corrupted).abs()),
        ("wrong shape", lambda model, clean, corrupted: effects()(model, clean, corrupted).flatten()),
    ],
    "function_vector": [
        ("values are wrong", lambda outputs, scores, n: summing()(outputs * scores[..., None], scores, n)),
        ("wrong shape", lambda outputs, scores, n: outputs.flatten(0, 1)[scores.flatten().topk(n).indices]),
    ],
    "random_head_vector": [
        ("is not the sum of 3 different heads", drawing(end=lambda total, like: total + like)),
        ("its norm is", drawing(end=lambda total, like: 2 * total * like.norm() / total.norm())),
        ("times a negative number", drawing(end=lambda total, like: -total * like.norm() / total.norm())),
        ("different sets of 3 heads", drawing(draw=neighbours)),
        (
            "expected about",  # from the better half
            drawing(draw=lambda pool, n, generator: [pool[i] for i in torch.randperm(4, generator=generator)[:n]]),
        ),
        (
            "it drew from torch's global random numbers",
            lambda outputs, scores, n, generator: drawing()(outputs, scores, n, torch.default_generator),
        ),
    ],
}  # fmt: skip

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_head_outputs_and_the_bias_sum_to_what_attention_writes() -> None:
    model, tokens = small_model(), tokens_of(4, 5)
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens)
    for layer, heads in enumerate(ref.mean_head_outputs(model, tokens)):
        wanted = cache["attn_out", layer][:, -1].mean(0) - model.blocks[layer].attn.b_O
        torch.testing.assert_close(heads.sum(0), wanted)


def test_a_head_that_says_the_same_everywhere_has_no_effect() -> None:
    model, clean = small_model(2), dataset(1, 5)
    scores = ref.causal_head_scores(model, clean, clean)
    torch.testing.assert_close(scores, torch.zeros_like(scores))
