"""What the checks of collecting in chapter 09 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch09_dictionaries as ref
from course_utils.checks.ch09.collecting import buffer, but_first, by_mask, scaled_by
from tests.ch09 import other_dictionaries as other

SECRETS = ("run_with_cache(", "randperm(")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # More is kept than is needed, until the function ends.
    "run_with_cache(model, tokens, names=hook_name) -> run_with_cache(model, tokens)",
    # The last axis of a matrix.
    "-1 -> 1",
}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "token_activations": [
        ("values are wrong", by_mask(but_first, lambda rows: rows - rows.mean(0))),
        ("wrong shape", by_mask(but_first, lambda rows: rows[None])),
    ],
    "norm_scale": [
        ("wrong answer", scaled_by(lambda x: x.shape[1] / x.norm(dim=1).sum())),
        ("expected a number", lambda activations: torch.tensor(ref.norm_scale(activations))),
    ],
    "ActivationBuffer": [
        ("values are wrong", buffer(scaled=lambda self, batch: -batch * self.scale)),
        ("is to return", buffer(next=lambda self, n: None)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
