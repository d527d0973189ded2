"""What the checks of dead latents cannot know: see tests/test_checks.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import solutions.ch06_superposition as ref
from course_utils.checks.ch06 import resampling as known
from solutions.ch03_training import AdamW
from tests.ch06 import other_dictionaries as other

SECRETS = ("einsum(", "masked_fill", "multinomial(", "torch.where(", "keepdim=True")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the second is the last
    "1 -> 0",  # the mean over no living latents is replaced afterwards
    "alive.sum(dim=-1).clamp(min=1) -> alive.sum(dim=-1)",
    "remembered.shape == parameter.shape -> remembered.shape >= parameter.shape",  # optimizers keep no larger ones
}


def afterwards(change: Callable[..., None]) -> Any:
    """The reference, and then something more in place."""

    def resample_dead(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor) -> None:
        ref.resample_dead(sae, optimizer, dead, directions)
        with torch.no_grad():
            change(sae, optimizer, dead)

    return resample_dead


def replaced(sae: Any, optimizer: Any, dead: Tensor) -> None:
    sae.b_enc = torch.nn.Parameter(sae.b_enc.clone())


def counters(sae: Any, optimizer: Any, dead: Tensor) -> None:
    optimizer.state[sae.W_dec]["step"] = optimizer.state[sae.W_dec]["step"] * 0


def drawn(change: Callable[[Tensor, Tensor, int, torch.Generator], Tensor]) -> Any:
    return lambda x, reconstruction, n, generator: change(x, reconstruction, n, generator)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "auxiliary_topk_loss": [
        ("with no latent dead", lambda *given: ref.auxiliary_topk_loss(*given) + (~given[3].any(-1)) * 0.1),
        ("values", lambda *given: ref.auxiliary_topk_loss(*given) * 2),
        ("the gradient of `pre`", lambda x, r, pre, *rest: ref.auxiliary_topk_loss(x, r, pre.detach(), *rest)),
        (
            "raised RuntimeError",
            lambda x, r, pre, dead, W, k: pre.topk(k).values.sum() * 0 + ref.auxiliary_topk_loss(x, r, pre, dead, W, k),
        ),
    ],
    "pick_worst": [
        ("wrong shape", drawn(lambda x, r, n, g: ref.pick_worst(x, r, n, g)[:, None])),
        ("expected dtype int64", drawn(lambda x, r, n, g: ref.pick_worst(x, r, n, g).float())),
        (
            "do not come from `generator`",
            drawn(lambda x, r, n, g: ref.pick_worst(x, r, n, torch.Generator().manual_seed(0))),
        ),
        (
            "two draws from one generator are the same",
            drawn(lambda x, r, n, g: ref.pick_worst(x, r, n, g.manual_seed(g.initial_seed()))),
        ),
        ("not that of a row", drawn(lambda x, r, n, g: ref.pick_worst(x, r, n, g) + 1)),
        ("not independent of each other", drawn(lambda x, r, n, g: ref.pick_worst(x, r, n, g).sort().values)),
    ],
    "resample_dead": [
        ("`b_enc` is another parameter than before", afterwards(replaced)),
        ('"step" of `W_dec` should stay', afterwards(counters)),
        ("`log_threshold`", afterwards(lambda sae, optimizer, dead: sae.log_threshold.masked_fill_(dead, 0.0))),
        ("`b_dec`", afterwards(lambda sae, optimizer, dead: sae.b_dec.zero_())),
        ("`W_enc`", afterwards(lambda sae, optimizer, dead: sae.W_enc.mul_(1.01))),
        ("with no latent dead", afterwards(lambda sae, optimizer, dead: sae.b_enc.add_(0.1 * (~dead.any())))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_the_optimizer_of_chapter_03_forgets() -> None:
    sae = ref.SparseAutoencoder(5, 7, "relu", 2)
    optimizer = AdamW(sae.parameters(), lr=0.1)
    sae(torch.randn(11, 2, 5))[0].square().sum().backward()
    optimizer.step()
    before = {name: dict(optimizer.state[p]) for name, p in sae.named_parameters()}
    dead = torch.tensor([[True] + [False] * 6, [False, True, True] + [False] * 4])
    ref.resample_dead(sae, optimizer, dead, torch.randn(2, 7, 5))
    assert not optimizer.state[sae.W_dec]["m"][dead].any()
    assert not optimizer.state[sae.W_enc]["v"].transpose(-1, -2)[dead].any()
    assert optimizer.state[sae.W_dec]["m"][~dead].any()
    assert before["W_dec"]["step"] == 1


def test_a_latent_with_a_low_bias_gets_no_help_from_the_auxiliary_loss() -> None:
    """What the lesson says: through a ReLU that is never open no gradient flows."""
    x, pre = torch.randn(11, 5), -torch.rand(11, 7)
    pre.requires_grad_()
    W_dec = torch.randn(7, 5)
    loss = ref.auxiliary_topk_loss(x, torch.zeros_like(x), pre, torch.ones(7, dtype=torch.bool), W_dec, 3)
    (slope,) = torch.autograd.grad(loss, pre)
    assert not slope.any()


def test_the_draws_of_the_check_are_not_that_rare() -> None:
    """Right answers pass the statistics of the check with other seeds as well."""
    x, reconstruction = torch.randn(4, 5), torch.randn(4, 5)
    loss = (x - reconstruction).square().sum(-1).square()
    for seed in range(20):
        many = ref.pick_worst(x, reconstruction, known.N_DRAWS, torch.Generator().manual_seed(seed))
        found = torch.bincount(many, minlength=4) / known.N_DRAWS
        assert (found - loss / loss.sum()).abs().max() < 0.04
