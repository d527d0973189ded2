"""What the checks of quality in chapter 09 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch09_dictionaries as ref
from course_utils.checks.ch09.quality import left_over, rates, recovering, splicing, stays_spliced
from tests.ch09 import other_dictionaries as other

SECRETS = ("torch.cat([activation", "masked_lm_loss(")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    # There are two words, and this is the first of the alphabet.
    "baseline == 'mean' -> baseline <= 'mean'",
}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "firing_rates": [
        ("wrong", rates(lambda chunks: (torch.cat(chunks) > 0.5).to(chunks[0]).mean(0))),
        ("wrong shape", lambda chunks: ref.firing_rates(chunks).sum()),
    ],
    "explained_variance": [
        ("is wrong", left_over(lambda x, r: 1 - (x - r).square().sum() / (x - x.mean(0)).square().sum() * 1.1)),
        ("expected a Tensor", lambda x, r: float(ref.explained_variance(x, r))),
    ],
    "splice": [
        ("a hook is left behind", stays_spliced),
        ("values are wrong", splicing(lambda d, x, edit, error: 0 * x)),
        ("expected something that `with` can open", lambda *args, **kwargs: None),
    ],
    "loss_recovered": [
        ("wrong answer", recovering(of=lambda clean, spliced, ablated: 0.5)),
        ("should raise ValueError", recovering(refuses=False)),
        ("expected a dict", lambda *args, **kwargs: ref.loss_recovered(*args, **kwargs)["recovered"]),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
