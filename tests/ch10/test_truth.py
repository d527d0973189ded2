"""What the checks of predictions and interventions in chapter 10 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch10_circuits as ref
from course_utils.checks.ch10.small import D_VOCAB, model_of, tokens_of, transcoders_of
from course_utils.checks.ch10.truth import ablating, effects, some_sets, swapping
from course_utils.checks.modules import noise
from course_utils.hooks import add_hook
from tests.ch10 import other_circuits as other

SECRETS = ("linalg.solve", "@ transcoder", "expand(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 -> -1",  # the only prompt
    "run_with_cache(model, tokens, names=names) -> run_with_cache(model, tokens)",  # more is kept than is needed
}


def leaves_its_hook(model: Any, *args: Any) -> Any:
    answer = other.swap_latents(model, *args)
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return answer


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "total_effects": [
        ("values are wrong", effects(fraction=lambda entry, activation: entry / (activation + 1))),
        ("values are wrong", lambda graph: -other.total_effects(graph)),
        ("wrong shape", lambda graph: other.total_effects(graph)[:, 1:]),
    ],
    "ablate_latents": [
        ("values are wrong", ablating(errors=lambda errors: errors.flip(0))),
        ("values are wrong", ablating(at=lambda features: features[:, [0, 1, 2]] + torch.tensor([0, 1, 0]))),
        ("gradients are recorded", lambda *args: other.ablate_latents(*args).requires_grad_()),
        ("wrong shape", lambda *args: other.ablate_latents(*args)[:, -1]),
    ],
    "swap_latents": [
        ("a hook is left behind", leaves_its_hook),
        ("values are wrong", swapping(value=lambda before, after: 2 * (after - before))),
        ("gradients are recorded", lambda *args: other.swap_latents(*args).requires_grad_()),
        ("wrong shape", lambda *args: other.swap_latents(*args)[0]),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_where_all_is_linear_the_prediction_is_exact() -> None:
    """Ablated in the replacement model with all frozen, a latent of the last layer has its direct effect alone."""
    model, transcoders, tokens, targets = model_of(), transcoders_of(), tokens_of(seed=5), noise(2, D_VOCAB, seed=2)
    graph = ref.attribution_graph(model, transcoders, tokens, targets)
    last = (graph.features[:, 0] == 2).nonzero()[:, 0]
    sets = [graph.features[i][None] for i in last]
    with torch.no_grad():
        whole = model(tokens)[0, -1]
    lost = (whole - ref.ablate_latents(model, transcoders, tokens, sets, True, True)[:, -1]) @ targets.T
    predicted = ref.total_effects(graph)[:, graph.latents][:, last]
    torch.testing.assert_close(lost.T, predicted, rtol=1e-3, atol=1e-4)


def test_swapping_a_prompt_with_itself_changes_nothing() -> None:
    model, transcoders, tokens = model_of(), transcoders_of(), tokens_of(seed=5)
    features = torch.cat(some_sets(model, transcoders, tokens))
    torch.testing.assert_close(ref.swap_latents(model, transcoders, tokens, tokens, features), model(tokens))
