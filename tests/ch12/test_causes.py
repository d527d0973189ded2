"""What the checks of causes in chapter 12 cannot know: see tests/test_checks.py."""

from itertools import count
from typing import Any

import torch

import solutions.ch12_brackets as ref
from course_utils.checks.ch12.causes import grounded, order, patching, places_of, spoiling, turn
from course_utils.checks.ch12.small import texts
from course_utils.checks.ch12.texts import without_pairs
from course_utils.data.brackets import CLOSE, END
from course_utils.hooks import add_hook, run_with_cache
from tests.ch12 import other_brackets as other
from tests.ch12 import third_style as third
from tests.ch12.test_reading import small

SECRETS = ("multinomial(", ".clone()", "grounded")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "activation.clone() -> activation",  # written in place: nobody else reads it
    "clean == END -> clean >= END",  # END comes before PAD, and argmax takes the first
    "kind == 'mlp' -> kind >= 'mlp'",  # a head comes earlier in the alphabet
    "0 -> -1",  # the only column
    "1 -> 2",  # one more is drawn, and the first is taken
    "elevation(tokens) == 1 -> elevation(tokens) <= 1",  # after an OPEN of a balanced text it is 1 at least
    "kind == 'order' -> kind <= 'order'",  # the other word comes later in the alphabet
    "places > opens[:, None] -> places >= opens[:, None]",  # no CLOSE stands where an OPEN does
    "tokens == OPEN -> tokens <= OPEN",  # no token is smaller
}


def end_lost(tokens: Any, kind: str, generator: torch.Generator) -> Any:
    out = other.corrupted_pairs(tokens, kind, generator)
    return out.masked_fill(out == END, CLOSE)


def leaves_its_hook(model: Any, clean: Any, corrupted: Any, component: str, mask: Any) -> Any:
    answer = other.scores_with_patch(model, clean, corrupted, component, mask)
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return answer


def its_own_partner(text: str, choose: Any) -> str:
    """The OPEN and the CLOSE that belongs to it."""
    first = choose(grounded(text))
    return turn(text, first, next(end for end in range(first, len(text)) if without_pairs(text[first : end + 1])))


TURNS = count()  # every second draw is fair


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "corrupted_pairs": [
        ("expected about", spoiling(pick=lambda places, drawn: drawn if next(TURNS) % 2 else 0)),
        ("is no longer START, brackets, END, PAD", end_lost),
        ("none became", spoiling(order=its_own_partner)),
        ("is no longer START, brackets, END, PAD", lambda tokens, kind, g: tokens.masked_fill(tokens == CLOSE, -1)),
        ("it drew from torch's global", lambda tokens, kind, g: other.corrupted_pairs(tokens, kind, None)),
        (
            "should raise ValueError",
            lambda tokens, kind, g: other.corrupted_pairs(tokens, "total" if kind == "total" else "order", g),
        ),
        (
            "became",
            spoiling(order=lambda text, choose: turn(order(text, choose), *places_of(text, ")")[-1:])),
        ),
    ],
    "scores_with_patch": [
        ("a hook is left behind", leaves_its_hook),
        ("values are wrong", patching(write=lambda own, source: (own + source) / 2)),
        ("values are wrong", patching(component_of=lambda component: component[:8])),  # one digit for the head
        ("values are wrong", patching(where=lambda mask: mask & (mask.cumsum(1) == mask.sum(1, keepdim=True)))),
        (
            "gradients are recorded",
            lambda *args: other.scores_with_patch(*args).requires_grad_(),
        ),
        ("wrong shape", lambda *args: other.scores_with_patch(*args)[None]),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), getattr(third, name)] for name in SURPRISES}


def test_spoiled_texts_fail_in_one_way_only() -> None:
    tokens, _ = ref.bracket_dataset(200, 42, torch.Generator().manual_seed(0), (0.0, 1.0, 0.0, 0.0, 0.0))
    for kind, expected in (("total", (True, False)), ("order", (False, True))):
        corrupted = ref.corrupted_pairs(tokens, kind, torch.Generator().manual_seed(1))
        assert [bool(part.all()) for part in ref.failures(corrupted)] == list(expected)
        assert [bool(part.any()) for part in ref.failures(corrupted)] == list(expected)
        assert set((corrupted != tokens).sum(1).tolist()) == {1 if kind == "total" else 2}


def test_all_components_of_a_layer_patched_at_once_give_the_corrupted_run() -> None:
    """In a model of one layer, a patch of its only MLP at END leaves the rest of END's stream."""
    model, clean, corrupted = small(), texts(), texts(others=True)
    with torch.no_grad():
        _, cache = run_with_cache(model, corrupted)
        _, own = run_with_cache(model, clean)
    patched = ref.scores_with_patch(model, clean, corrupted, "mlp 1", clean == END)
    stream = own["resid_mid", 1] + cache["mlp_out", 1]
    with torch.no_grad():
        logits = model.unembed(model.ln_final(stream))[clean == END]
    torch.testing.assert_close(patched, logits[:, 0] - logits[:, 1])
