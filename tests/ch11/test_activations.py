"""What the checks of activations in chapter 11 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch11_oracles as ref
from course_utils.checks.ch11.activations import from_rows, harvesting, ring
from course_utils.hooks import add_hook
from tests.ch11 import other_oracles as other

SECRETS = ("torch.arange(1 - width", "order.roll(")
ONLY_ON_GPU = "device"
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "True -> False",  # both have the same number of parts
    "zip(tokens.split(batch_size), places.split(batch_size), strict=True)"
    " -> zip(tokens.split(batch_size), places.split(batch_size))",
    "run_with_cache(model, rows, names=name) -> run_with_cache(model, rows)",  # the cache may hold more than is needed
}


def leaves_its_hook(model: Any, *arguments: Any) -> Any:
    answer = other.harvest_windows(model, *arguments)
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return answer


def all_at_once(model: Any, tokens: Any, ends: Any, layer: int, width: int, batch_size: int = 256) -> Any:
    return other.harvest_windows(model, tokens, ends, layer, width)


def weak_ring(windows: Any, generator: torch.Generator) -> Any:
    """A ring of the rows in their order, from a random place: row 0 always takes from the same side."""
    n, width = windows.shape[:2]
    shift = int(torch.randint(1, 3, (1,), generator=generator))
    return from_rows(lambda n, width, _: [[(row + shift + slot) % n for slot in range(width)] for row in range(n)])(
        windows, generator
    ) if n > width + 2 else other.shuffle_windows(windows, generator)  # fmt: skip


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "harvest_windows": [
        ("a hook is left behind", leaves_its_hook),
        ("the model ran on batches of", all_at_once),
        (
            "values are wrong",
            harvesting(lambda end, width, n_pos: range(max(end - width, 0), max(end, width))),
        ),
        ("wrong shape", lambda *arguments: other.harvest_windows(*arguments)[:, -1]),
    ],
    "shuffle_windows": [
        ("came from rows", weak_ring),
        ("there are vectors that stand nowhere", lambda w, g: 2 * other.shuffle_windows(w, g)),
        ("a vector stands in another slot", lambda w, g: other.shuffle_windows(w, g).flip(1)),
        ("wrong shape", lambda w, g: other.shuffle_windows(w, g)[1:]),
        ("drew from torch's global", lambda w, g: from_rows(ring)(w, None)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
ALSO_RIGHT["shuffle_windows"].append(from_rows(ring))


def test_alike_windows_come_from_nearly_the_same_position() -> None:
    """Each vector holds its row's end, so the distance can be read off; and the rules of `shuffle_windows` hold."""
    ends = torch.randint(5, 60, (300,), generator=torch.Generator().manual_seed(0))
    windows = torch.stack([ends, torch.arange(300)], 1).float()[:, None].expand(300, 4, 2).clone()
    shuffled = ref.shuffle_alike(windows, ends, torch.Generator().manual_seed(1))
    assert (shuffled[..., 0] - ends[:, None]).abs().max() < 25
    assert (shuffled[..., 1] != torch.arange(300)[:, None]).all()
    plain = ref.shuffle_windows(windows, torch.Generator().manual_seed(1))
    assert (plain[..., 0] - ends[:, None]).abs().mean() > 2 * (shuffled[..., 0] - ends[:, None]).abs().mean()
