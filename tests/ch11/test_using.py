"""What the checks of using in chapter 11 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch11_oracles as ref
from course_utils.checks.ch11.small import small_model
from course_utils.checks.ch11.using import mirroring, scoping
from course_utils.checks.standins.transformer import some_tokens
from course_utils.hooks import add_hook
from tests.ch11 import other_oracles as other

SECRETS = ("(direction @ direction)", "[rows, source_at]")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "stream.clone() -> stream",  # written in place: nobody else reads it
    "run_with_cache(model, source, names=name) -> run_with_cache(model, source)",  # the cache may hold more
}


def leaves_its_hook(model: Any, *arguments: Any) -> Any:
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return other.patchscope(model, *arguments)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "mirror": [
        ("it changed `x`", lambda x, d, b: x.copy_(other.mirror(x, d, b))),
        ("values are wrong", mirroring(times=3.0)),
        ("values are wrong", lambda x, d, b: -x),
        ("wrong shape", lambda x, d, b: other.mirror(x, d, b)[0]),
    ],
    "patchscope": [
        ("a hook is left behind", leaves_its_hook),
        ("wrong shape", lambda *arguments: other.patchscope(*arguments)[:, -1]),
        ("values are wrong", scoping(put=lambda there, vector: (there + vector) / 2)),
        ("values are wrong", scoping(put=lambda there, vector: there)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_mirrored_twice_is_as_before() -> None:
    x, direction = torch.randn(7, 5).double(), torch.randn(5).double()
    bias = torch.tensor(0.3).double()
    once = ref.mirror(x, direction, bias)
    torch.testing.assert_close(once @ direction + bias, -(x @ direction + bias))
    torch.testing.assert_close(ref.mirror(once, direction, bias), x)


def test_a_patchscope_of_a_text_on_itself_changes_nothing() -> None:
    model = small_model()
    tokens, at = some_tokens(model.cfg, 3, 6, seed=1), torch.tensor([1, 5, 0])
    with torch.no_grad():
        torch.testing.assert_close(ref.patchscope(model, tokens, at, 2, tokens, at, 2), model(tokens))
