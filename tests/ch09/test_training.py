"""What the checks of training in chapter 09 cannot know: see tests/test_checks.py."""

from typing import Any

from course_utils.checks.ch09.training import loop
from tests.ch09 import other_dictionaries as other

SECRETS = ("backward()", "optimizer.step")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # The progress bar.
    "100 -> 101",
    "100 -> 99",
    "False -> True",
    "steps < 100 -> steps != 100",
    "steps < 100 -> steps <= 100",
    "steps < 100 -> steps == 100",
    "steps < 100 -> steps > 100",
    "steps < 100 -> steps >= 100",
    "tqdm(range(steps), leave=False, disable=steps < 100) -> range(steps)",
    "tqdm(range(steps), leave=False, disable=steps < 100) -> tqdm(range(steps), disable=steps < 100)",
    "tqdm(range(steps), leave=False, disable=steps < 100) -> tqdm(range(steps), leave=False)",
    # Latents are never negative, and neither are steps.
    "now.latents.amax(dim=0) > 0 -> now.latents.amax(dim=0) != 0",
    "step == 0 -> step <= 0",
    # The auxiliary loss is 0, or counts 0 times: leaving it out saves time.
    "auxiliary and dead.any() -> auxiliary",
    "auxiliary and dead.any() -> dead.any()",
    # No gradient is taken of what is done to gradients.
    "sae.W_dec.detach() -> sae.W_dec",
}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "fit_dictionary": [
        ("wrong", loop(lambda step, steps, peak, warm_up: 2 * peak)),
        ("returned None", lambda *args, **kwargs: None),
        ("a list", lambda sae, batch, steps, *args, **kwargs: shorter(sae, batch, steps, *args, **kwargs)),
    ],
}


def shorter(sae: Any, batch: Any, steps: int, *args: Any, **kwargs: Any) -> Any:
    fit = loop()(sae, batch, steps, *args, **kwargs)
    fit.losses = fit.losses[:-1]
    return fit


ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
