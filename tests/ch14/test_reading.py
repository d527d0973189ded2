"""What the checks of reading the model in chapter 14 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch14_othello as ref
from course_utils.checks.ch14.reading import angles, directed, fitting, losing, scoring
from tests.ch14 import other_othello as other

SECRETS = ("einsum(", "normalize(", ".unbind(", "cross_entropy(scores")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # the last of two axes; and columns that are never looked at
    "logits.shape[-1] - legal.shape[-1] -> logits.shape[-1]",  # more columns than needed
    "logits.shape[-1] - legal.shape[-1] -> legal.shape[-1]",
    "logits.shape[-1] - legal.shape[-1] -> logits.shape[-1] + legal.shape[-1]",
    "0 -> -1",  # the only column
    "1 -> 2",  # as many more columns of False as there are positions
    "labels != 0 -> labels > 0",  # no label is smaller
    "nn.functional.normalize(a, dim=-1) -> nn.functional.normalize(a)",  # of two axes, the last is the default
    "nn.functional.normalize(b, dim=-1) -> nn.functional.normalize(b)",
}

SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "illegal_rate": [
        ("wrong", lambda *args: ref.illegal_rate(*args).cumsum(0)),
        ("wrong shape", lambda *args: ref.illegal_rate(*args).mean()),
        ("wrong", lambda *args: 100 * ref.illegal_rate(*args)),
    ],
    "probe_loss": [
        ("wrong", losing(loss=lambda losses: losses.median())),
        ("wrong", losing(loss=lambda losses: losses[:, 0].mean())),
        ("no gradient gets through", lambda *args: ref.probe_loss(*args).detach()),
        ("no gradient gets through to b", lambda W, b, x, labels: ref.probe_loss(W, b.detach(), x, labels)),
    ],
    "train_probe": [
        ("wrong", fitting(betas=(0.9, 0.98))),
        ("wrong", fitting(corrected=False)),
        ("expected a tuple", lambda *args: ref.train_probe(*args)[0]),
        ("still has a graph", lambda *args: tuple(part.requires_grad_() for part in ref.train_probe(*args))),
    ],
    "probe_accuracy": [
        ("wrong", scoring(guess=lambda scores: 1 if scores[1] > scores[2] else 2)),
        ("expected a tuple", lambda *args: ref.probe_accuracy(*args)[0]),
        ("wrong shape", lambda *args: tuple(part[None] for part in ref.probe_accuracy(*args))),
    ],
    "probe_directions": [
        ("wrong", directed(emptiness=lambda W: W[..., 0] - W.mean(-1))),
        ("expected a tuple", lambda W: ref.probe_directions(W)[0]),
        ("in another order", lambda W: tuple(part.T for part in ref.probe_directions(W))),
    ],
    "cosine_similarities": [
        ("in another order", lambda a, b: ref.cosine_similarities(a, b).T),
        ("wrong", angles(length=lambda v: v.abs().max())),
        ("wrong", lambda a, b: ref.cosine_similarities(a, b).clamp(min=0)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_a_probe_finds_what_is_there() -> None:
    """Squares that are a function of one coordinate each, and one that is noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 5, generator=generator)
    labels = torch.bucketize(x[:, :4], torch.tensor([-0.5, 0.5]))
    labels[:, 3] = torch.randint(3, (2000,), generator=generator)
    W, b = ref.train_probe(x, labels, 300, 0.05, generator)
    right = [(x @ W[square] + b[square]).argmax(1).eq(labels[:, square]).double().mean() for square in range(4)]
    assert min(right[:3]) > 0.9
    assert right[3] < 0.45
