"""What the checks of the frozen model in chapter 10 cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch10_circuits as ref
from course_utils.checks.ch10.linear import connected, frozen, l2l, l2logit, to_latent
from course_utils.checks.ch10.small import KINDS, model_of, run_of, tokens_of, transcoders_of, written_in
from course_utils.checks.modules import noise
from course_utils.hooks import add_hook
from tests.ch10 import other_circuits as other

SECRETS = ("autograd.grad(", "hook_scale", "W_enc[:, latent]", "gradient[1")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 -> -1",  # the only prompt
    "written_to_stream(cache).detach() -> written_to_stream(cache)",  # the models here have no gradients
    "-1 -> 1",  # the last of two axes
    "model.cfg.normalization == 'LN' -> model.cfg.normalization <= 'LN'",  # the other word comes later
}


def leaves_its_hook(model: Any, tokens: Any, cache: Any, written: Any) -> Any:
    answer = other.frozen_run(model, tokens, cache, written)
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return answer


def detaches_mlps(model: Any, tokens: Any, cache: Any, written: Any) -> Any:
    return other.frozen_run(model, tokens, cache, torch.cat([written[:1], written[1:].detach()]))


def hangs_on_the_transcoders(name: str) -> Any:
    return lambda *args: getattr(other, name)(*args) + 0 * args[1][0].W_dec.sum()


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "frozen_run": [
        ("a hook is left behind", leaves_its_hook),
        ("no gradient flows", frozen(detach=True)),
        ("to written[1]", detaches_mlps),
        ("expected a list", lambda *args: other.frozen_run(*args)[1]),
        ("tensors for", lambda *args: (other.frozen_run(*args)[0][:-1], other.frozen_run(*args)[1])),
        ("values are wrong", frozen(places=("*hook_pattern", "*ln1.hook_scale", "ln_final.hook_scale"))),
    ],
    "token_to_latent": [
        ("values are wrong", to_latent(vector=lambda start, pos: start[pos] - start.mean(0))),
        ("wrong shape", lambda *args: other.token_to_latent(*args)[None]),
        ("has a graph", lambda *args: other.token_to_latent(*args).requires_grad_()),
    ],
    "latent_to_latent": [
        ("values are wrong", l2l(active=torch.square)),
        ("wrong shape", lambda *args: other.latent_to_latent(*args).T),
        ("has a graph", lambda *args: other.latent_to_latent(*args).requires_grad_()),
        ("has a graph", hangs_on_the_transcoders("latent_to_latent")),
    ],
    "latent_to_logit": [
        ("values are wrong", l2logit(at=-2)),
        ("wrong shape", lambda *args: other.latent_to_logit(*args).T),
        ("has a graph", lambda *args: other.latent_to_logit(*args).requires_grad_()),
        ("has a graph", hangs_on_the_transcoders("latent_to_logit")),
    ],
    "feature_connections": [
        ("should raise ValueError", connected(refuse=lambda source, target: target < source)),
        ("should raise ValueError", connected(refuse=lambda source, target: target == source)),
        ("wrong shape", connected(layers=lambda source, target: (source, 2))),
        ("wrong shape", lambda *args: other.feature_connections(*args)[1:]),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("kind", KINDS)
def test_with_what_the_model_wrote_the_frozen_run_is_the_models_own(kind: str) -> None:
    model, tokens = model_of(kind), tokens_of(2)
    cache = run_of(model, tokens)
    reads, logits = ref.frozen_run(model, tokens, cache, written_in(cache))
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(reads), cache.stack("ln2.normalized"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_run_is_linear_up_to_a_constant(kind: str) -> None:
    model, tokens = model_of(kind), tokens_of(2)
    cache = run_of(model, tokens)
    first, second = noise(2, 4, 2, 5, 6, seed=3)
    zero, one, other_, both = (
        ref.frozen_run(model, tokens, cache, written)[1] for written in (0 * first, first, second, first + second)
    )
    torch.testing.assert_close(both - zero, (one - zero) + (other_ - zero), rtol=1e-3, atol=1e-4)


def test_latents_of_a_layer_do_not_reach_the_layer_itself() -> None:
    found = ref.latent_to_latent(model_of(), transcoders_of(), tokens_of(), 1, (1, 4, 2))
    assert not found.any()
