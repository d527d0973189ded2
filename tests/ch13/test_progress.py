"""What the checks of progress in chapter 13 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch13_grokking as ref
from course_utils.checks.ch13.progress import averaged, excluded, filtered, restricted
from tests.ch13 import other_grokking as other

SECRETS = ("einsum(", ".sort()", "isin(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = set()


def leaves_a_hook(model: Any, tokens: Any, answers: Any, frequencies: Any) -> Any:
    model.hook_embed.add(lambda activation, hook: None)
    return other.loss_with_frequencies(model, tokens, answers, frequencies)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "sum_part": [
        ("values are wrong", averaged(kinds=("sin",))),
        ("wrong shape", lambda grid, wanted: other.sum_part(grid, wanted)[:, 0]),
    ],
    "restricted_loss": [
        ("value", restricted(averaged(inside=lambda a, b: a + 2 * b))),
        ("expected a Tensor", lambda *args: float(other.restricted_loss(*args))),
        ("wrong shape", lambda *args: other.restricted_loss(*args)[None]),
    ],
    "excluded_loss": [
        ("value", excluded(averaged(kinds=("sin",)))),
        ("expected a Tensor", lambda *args: float(other.excluded_loss(*args))),
    ],
    "gini": [
        ("value", lambda values: values.std(correction=0) / values.mean()),
        ("expected a Tensor", lambda values: float(other.gini(values))),
        ("wrong shape", lambda values: other.gini(values)[None]),
    ],
    "loss_with_frequencies": [
        ("a hook is left behind", leaves_a_hook),
        (
            "value",
            filtered(lambda wanted, n: [0, *(row for k in wanted[:1] for row in (2 * k - 1, 2 * k)[: n - 2 * k + 1])]),
        ),
        ("expected a Tensor", lambda *args: float(other.loss_with_frequencies(*args))),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_logits_that_depend_on_the_sum_only_are_kept_whole() -> None:
    x = torch.arange(9)
    by_sum = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    grid = by_sum[(x[:, None] + x) % 9]
    torch.testing.assert_close(ref.sum_part(grid, [1, 2, 3, 4]), grid)


def test_restricted_and_excluded_parts_make_the_whole() -> None:
    """With all frequencies in one of them the losses are those of the whole and of the means."""
    x = torch.arange(7)
    answers = (x[:, None] + x) % 7
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))[answers]
    everything = torch.ones_like(answers, dtype=torch.bool)
    torch.testing.assert_close(ref.restricted_loss(logits, [1, 2, 3], answers), ref.answer_loss(logits, answers))
    means = logits.mean(dim=(0, 1)).expand_as(logits)
    torch.testing.assert_close(
        ref.excluded_loss(logits, [1, 2, 3], answers, everything), ref.answer_loss(means, answers)
    )


def test_all_frequencies_are_the_model_itself() -> None:
    from course_utils.checks.ch13.small import small_model, sums

    model, tokens = small_model(7), sums(7)
    answers = tokens[:, :2].sum(1) % 7
    with torch.no_grad():
        whole = ref.answer_loss(model(tokens)[:, -1, :-1], answers)
    torch.testing.assert_close(ref.loss_with_frequencies(model, tokens, answers, [1, 2, 3]), whole)
