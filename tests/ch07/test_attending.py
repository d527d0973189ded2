"""What the checks of attention probes cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch07_probes as ref
from course_utils.checks.ch07.attending import Stand, looking, reading
from tests.ch07 import other_probes as other

SECRETS = ("masked_fill(~mask", "batch pos, batch pos d_model")
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {"-1 -> 1"}  # of two axes; where it is the length of `x`, see the last surprise

SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "AttentionProbe": [
        (
            "its parameters are",
            type("AttentionProbe", (Stand,), {"__init__": lambda self, d, n: Stand.__init__(self, n, d)}),
        ),
        ("values are wrong", looking(lambda self, x, mask: Stand.pattern(self, x, mask) + 1e-3 * mask)),
        ("values are wrong", reading(lambda self, x, mask: Stand.forward(self, x, mask) - 0.1 * self.b)),
        ("no gradient gets through it", reading(lambda self, x, mask: Stand.forward(self, x, mask).detach())),
        (
            "values are wrong",
            looking(
                lambda self, x, mask: (x @ self.query / x.shape[1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
            ),
        ),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {"AttentionProbe": [other.AttentionProbe, Stand]}


def test_it_begins_as_a_probe_on_the_mean() -> None:
    probe, x = ref.AttentionProbe(4, 2), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 4 + [True]])
    torch.testing.assert_close(probe.pattern(x, mask), mask / mask.sum(1, keepdim=True))
