"""What the checks of this section cannot know: see tests/test_checks.py. Then the reference, on a real model."""

from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch05_patching as ref
from course_utils.checks.ch05.attribution import estimating, stepping
from course_utils.hooks import ActivationCache, run_with_cache
from tests.ch05 import other_patching as other
from tests.ch05 import subtle, unusual
from tests.ch05.conftest import TOKENS, metric

SECRETS = ("einsum(", ".repeat(", "autograd.grad(metric")


def by_backward(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
    logits, cache = run_with_cache(model, tokens, names=names)
    metric(logits).sum().backward()
    return {name: cache.grad(name) * (source_cache[name] - cache[name]).detach() for name in names}


def with_its_graph(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
    logits, cache = run_with_cache(model, tokens, names=names)
    gradients = torch.autograd.grad(metric(logits).sum(), [cache[name] for name in names])
    return {name: slope * (source_cache[name] - cache[name]) for name, slope in zip(names, gradients, strict=True)}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "attribution_patching": [
        ("it changed `model.embed.W_E.grad`", by_backward),
        ("still has its graph", with_its_graph),
        ("values are wrong", estimating(lambda slope, source, own: slope * (source - own).abs())),
        ("wrong shape", estimating(lambda slope, source, own: (slope * (source - own)).sum(-1))),
        ("expected a dictionary", lambda m, t, c, metric, names: ref.attribution_patching(m, t, c, metric, names[:2])),
    ],
    "integrated_attribution": [
        ("values are wrong", stepping(here=True)),
        ("values are wrong", stepping(lambda step, steps: 0.5 if steps > 1 else 0.4)),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "True -> False",  # strict=
    "zip(names, gradients, activations, strict=True) -> zip(names, gradients, activations)",
    "zip(names, gradients, strict=True) -> zip(names, gradients)",
    "run_with_cache(model, tokens, names=names) -> run_with_cache(model, tokens)",  # keeps more
    "run_with_cache(model, tokens, names=[*names, 'hook_embed']) -> run_with_cache(model, tokens)",
}
ONLY_ON_GPU = "device"


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_attribution_is_exact_for_a_small_step(module: Any, model: nn.Module) -> None:
    with torch.no_grad():
        _, own = run_with_cache(model, TOKENS[0])
    name = "blocks.1.attn.hook_z"
    nearby = ActivationCache({**dict(own), name: own[name] + 1e-3})
    estimate = module.attribution_patching(model, TOKENS[0], nearby, metric, [name])[name].sum((1, 3)).mean(0)
    with torch.no_grad():
        base = metric(model(TOKENS[0])).mean()
    real = module.patch_heads(model, TOKENS[0], nearby, metric)[1] - base
    torch.testing.assert_close(estimate, real, rtol=0.05, atol=2e-5)
