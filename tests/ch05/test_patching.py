"""What the checks of this section cannot know: see tests/test_checks.py. Then the reference, on a real model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch05_patching as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch05 import patching
from course_utils.checks.ch05.patching import batched, first, going_on, put, streams, sweep
from course_utils.hooks import run_with_cache, run_with_hooks
from tests.ch05 import other_patching as other
from tests.ch05 import subtle, unusual
from tests.ch05.conftest import TOKENS, metric, source_run
from tests.ch05.spoiling import added, clearing_hooks, leaving_a_hook, mean_of_prompts, with_a_graph, zero

ALL = slice(None)
SECRETS = ("einsum(", ".repeat(", "slice(None), *index")


def into_the_source(activation: Any, source: Any, index: Any) -> Any:
    source[(ALL, *index)] = activation[(ALL, *index)]
    return source


def transposed(activation: Any, source: Any, index: Any) -> Any:
    return put(activation, source.mT if source.shape[-1] == source.shape[-2] else source, index)


def with_rows(rows: Callable[[int, int], int]) -> Callable[..., Any]:
    """A batched_sweep that takes another number of rows."""
    return lambda model, tokens, cache, metric, patches, max_rows: batched()(
        model, tokens, cache, metric, patches, rows(max_rows, len(tokens))
    )


def all_logits_at_once(model: Any, tokens: Any, source_cache: Any, metric: Any, patches: Any, max_rows: int) -> Any:
    return metric(model(torch.cat([tokens, tokens])))


def plus_the_stream(blocks: list[Any], layer: int) -> list[Any]:
    return [lambda resid, block=block: block(resid) + resid for block in blocks[layer:]]


GRIDS = {
    "patch_residual_stream": streams,
    "patch_components": patching.outputs,
    "patch_heads": patching.heads,
    "patch_heads_by_position": patching.places,
    "patch_head_inputs": patching.heads,
}


@torch.no_grad()
def writing_into_the_activation(model: Any, tokens: Any, source_cache: Any, name: str, index: Any) -> Any:
    def patch(activation: Any, hook: Any) -> Any:
        activation[(slice(None), *index)] = source_cache[name][(slice(None), *index)]
        return activation

    return run_with_hooks(model, tokens, hooks={name: patch})


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "run_patched": [
        ("it changed `cache['blocks.1.hook_resid_pre']` in place", patching.patching(into_the_source)),
        ("it changed `model.pos_embed.W_pos` in place", writing_into_the_activation),
        ("your hook writes into the activation that it was given", writing_into_the_activation),
        ("a hook is left behind", leaving_a_hook(ref.run_patched)),
        ("hooks that others had attached", clearing_hooks(ref.run_patched)),
        ("gradients are recorded", with_a_graph(ref.run_patched)),
        ("values are wrong", patching.patching(added)),
        ("values are wrong", patching.patching(zero)),
        ("values are wrong", patching.patching(mean_of_prompts)),
        ("values are wrong", patching.patching(transposed)),
    ],
    "run_from": [
        ("values are wrong", going_on(plus_the_stream)),
        ("values are wrong", lambda model, resid, layer: ref.run_from(model, resid, layer).log_softmax(-1)),
    ],
    "batched_sweep": [
        ("values are wrong", batched(repeat=lambda tensor, times: tensor.repeat_interleave(times, 0))),
        ("the metric was given logits", all_logits_at_once),
        ("one forward had", with_rows(lambda max_rows, n_batch: max_rows * n_batch)),
        ("are enough, and one without a patch", with_rows(lambda max_rows, n_batch: 1)),
        ("times through a layer", batched(layer=lambda name, n_layers: -1)),
        ("times through a layer", batched(sort=lambda name, number: number)),
        ("values are wrong", batched(streams=lambda own, source: source)),
    ],
}
for exercise, grid in GRIDS.items():
    SURPRISES[exercise] = [
        ("it changed `source_cache[", sweep(grid, put=into_the_source)),
        ("a hook is left behind", leaving_a_hook(getattr(ref, exercise))),
        ("wrong", sweep(grid, put=zero)),
        ("wrong", sweep(grid, reduce=torch.median)),
        ("gradients are recorded", with_a_graph(getattr(ref, exercise))),
    ]

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "activation.clone() -> activation",  # the run's own activation may be changed, the cache's may not
    "True -> False",  # strict=
    "layer == -1 -> layer <= -1",  # there is nothing below -1
    "zip(group, logits.split(n_batch), strict=True) -> zip(group, logits.split(n_batch))",
    "run_with_cache(model, tokens, names='*.hook_resid_*') -> run_with_cache(model, tokens)",  # keeps more
}
ONLY_ON_GPU = "device"


@pytest.mark.parametrize(
    ("exercise", "sentence", "answer"),
    [
        ("patch_residual_stream", "`resid_post` or `resid_mid`", sweep(partial(streams, place="resid_mid"))),
        ("batched_sweep", "nothing is patched", batched(layer=lambda name, n: min(first(name, n) + 1, n))),
    ],
)
def test_a_mistake_made_in_another_way_has_the_same_cause(exercise: str, sentence: str, answer: Any) -> None:
    with pytest.raises(CheckFailed, match=f"This is what you get if {sentence}"):
        run_check(getattr(patching, f"check_{exercise}"), answer)


# ---------------------------------------------------------------------------------- the reference, on a real model

SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])


@SOLUTIONS
def test_everything_patched_is_the_source_run(module: Any, model: nn.Module) -> None:
    """At depth 0 the whole stream decides, and at the end the last position alone does."""
    logits, cache = source_run(model)
    patched_logits = module.run_patched(model, TOKENS[0], cache, "blocks.0.hook_resid_pre", (ALL,))
    torch.testing.assert_close(patched_logits, logits, rtol=1e-4, atol=1e-4)
    streams = module.patch_residual_stream(model, TOKENS[0], cache, metric)
    torch.testing.assert_close(streams[-1, -1], metric(logits).mean(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        base = metric(model(TOKENS[0])).mean()
    torch.testing.assert_close(streams[-1, :-1], base.expand(5), rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_one_by_one_and_together_agree(module: Any, model: nn.Module) -> None:
    _, cache = source_run(model)
    patches = [(f"blocks.{layer}.attn.hook_z", (ALL, head)) for layer in range(2) for head in range(3)]
    one_by_one = module.patch_heads(model, TOKENS[0], cache, metric)
    for max_rows in (1, 7, 64):
        together = module.batched_sweep(model, TOKENS[0], cache, metric, patches, max_rows)
        torch.testing.assert_close(together, one_by_one.flatten(), rtol=1e-5, atol=1e-5)


@SOLUTIONS
def test_the_rest_of_a_run_is_that_of_the_run(module: Any, model: nn.Module) -> None:
    with torch.no_grad():
        logits, cache = run_with_cache(model, TOKENS[0])
        for layer, resid in enumerate(ref.accumulated_residual(cache)):
            torch.testing.assert_close(module.run_from(model, resid, layer), logits, rtol=1e-5, atol=1e-5)
