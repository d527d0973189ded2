"""Checks of chapter 11, activations: windows of a stream, and windows that belong to no text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch11.small import Fn, clamped, demand, same_seed_twice, small_model, stream
from course_utils.checks.comparing import compare, compare_kind, follows_input
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.transformer import some_tokens

AXES = "batch slot d_model"
ENDS = torch.tensor([6, 2, 7, 4, 3])


def harvesting(
    at: Callable[[int, int, int], range] = lambda end, width, n_pos: range(end - width + 1, end + 1),
    layer: Callable[[int], int] = lambda layer: layer,
    part: slice = slice(None),
) -> Fn:
    """harvest_windows, position by position; with other positions or another layer, what people write instead."""

    def harvest_windows(
        model: Any, tokens: Tensor, ends: Tensor, layer_asked: int, width: int, batch_size: int = 256
    ) -> Tensor:
        found = stream(model, tokens, layer(layer_asked))
        n_pos = tokens.shape[1]
        rows = [
            torch.stack([found[row, pos % n_pos] for pos in at(end, width, n_pos)])
            for row, end in enumerate(ends.tolist())
        ]
        return torch.stack(rows)[part]

    return harvest_windows


@known_mistakes(
    {
        "every window is taken one position late: `ends` is its last position.": harvesting(
            lambda end, width, n_pos: range(end - width + 2, end + 2)
        ),
        "every window ends before `ends`; it includes that position.": harvesting(
            lambda end, width, n_pos: range(end - width, end)
        ),
        "the slots run backwards; they are in the order of the text.": harvesting(
            lambda end, width, n_pos: range(end, end - width, -1)
        ),
        "the windows stand at the end of each row of tokens, whatever `ends` says.": harvesting(
            lambda end, width, n_pos: range(n_pos - width, n_pos)
        ),
        "the windows begin at `ends`; they end there.": harvesting(lambda end, width, n_pos: range(end, end + width)),
        "the stream is that of one block too many: `layer` says after how many blocks.": harvesting(
            layer=lambda layer: clamped(layer + 1)
        ),
        "the stream is that of one block too few: `layer` says after how many blocks.": harvesting(
            layer=lambda layer: clamped(layer - 1)
        ),
        "only the last batch comes back.": harvesting(part=slice(-1, None)),
    }
)
def check_harvest_windows(fn: Fn) -> None:
    """Three layers, two widths, batches of two, another precision; nothing left behind, no gradients."""
    name = "harvest_windows"
    model = small_model()
    tokens = some_tokens(model.cfg, 5, 8, seed=1)
    right = harvesting()
    for layer, width in ((2, 3), (0, 1), (3, 2)):
        with nothing_left_behind(name, model):
            actual = fn(model, tokens, ENDS, layer, width)
        compare(f"{name}(layer={layer}, width={width})", actual, right(model, tokens, ENDS, layer, width), AXES)
    if actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    sizes: list[int] = []
    handle = model.embed.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    actual = fn(model, tokens, ENDS, 1, 2, 2)
    handle.remove()
    compare(f"{name} with batch_size=2", actual, right(model, tokens, ENDS, 1, 2), AXES)
    demand(
        max(sizes) <= 2 and sum(sizes) == len(tokens),
        name,
        "batches",
        f"with batch_size=2 the model ran on batches of {sizes} texts for {len(tokens)} texts.",
        "cut the texts into groups of `batch_size`, and run the model once on each.",
    )
    follows_input(
        name,
        lambda moved: fn(moved, *(t.to(moved.embed.W_E.device) for t in (tokens, ENDS)), 2, 3),
        (model,),
        AXES,
    )


# ------------------------------------------------------------------------------------------------- belonging to no text


def from_rows(donors: Callable[[int, int, torch.Generator], list[list[int]]], mixed: bool = False) -> Fn:
    """shuffle_windows with `donors(n, width, generator)[row][slot]`; `mixed` moves slots within their row."""

    def shuffled(windows: Tensor, generator: torch.Generator) -> Tensor:
        n, width = windows.shape[:2]
        chosen = donors(n, width, generator)
        return torch.stack(
            [
                torch.stack([windows[row, chosen[row][slot]] if mixed else windows[chosen[row][slot], slot]
                             for slot in range(width)])
                for row in range(n)
            ]
        )  # fmt: skip

    return shuffled


def ring(n: int, width: int, generator: torch.Generator) -> list[list[int]]:
    """All rows in a random ring: slot s comes from s + 1 further on."""
    order = torch.randperm(n, generator=generator).tolist()
    at = {row: place for place, row in enumerate(order)}
    return [[order[(at[row] + slot + 1) % n] for slot in range(width)] for row in range(n)]


def one_row(n: int, width: int, generator: torch.Generator) -> list[list[int]]:
    return [[donors[0]] * width for donors in ring(n, 1, generator)]


def permutations(n: int, width: int, generator: torch.Generator) -> list[list[int]]:
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(width)], 1).tolist()


def rings(n: int, width: int, generator: torch.Generator) -> list[list[int]]:
    """A ring for each slot: never its own row, but two slots may meet."""
    found = [ring(n, 1, generator) for _ in range(width)]
    return [[one[row][0] for one in found] for row in range(n)]


def any_others(n: int, width: int, generator: torch.Generator) -> list[list[int]]:
    """For each row, different others, drawn apart from all other rows."""
    found = []
    for row in range(n):
        others = [other for other in torch.randperm(n, generator=generator).tolist() if other != row]
        found.append(others[:width])
    return found


@known_mistakes(
    {
        "all slots of a row come from one other row: that is a window of another text.": from_rows(one_row),
        "the slots change places within their row: all of it is still of one text.": from_rows(
            lambda n, width, generator: [
                [(slot + 1 + int(torch.randint(width - 1, (1,), generator=generator))) % width for slot in range(width)]
                for _ in range(n)
            ],
            mixed=True,
        ),
        "a slot can stay in its own row.": from_rows(permutations),
        "two slots of a row can come from the same row.": from_rows(rings),
        "some rows are used more often than others; for each slot, each is used once.": from_rows(any_others),
        "nothing is drawn: each slot comes from the same number of rows further on, whatever the generator.": from_rows(
            lambda n, width, generator: [[(row + slot + 1) % n for slot in range(width)] for row in range(n)]
        ),
    }
)
def check_shuffle_windows(fn: Fn) -> None:
    """Many rows and few, several seeds: where each slot comes from is read off its numbers."""
    name = "shuffle_windows"
    for n, width in ((41, 3), (5, 4), (3, 2)):
        windows = noise(n, width, 6, seed=n)
        for seed in range(6):
            actual = fn(windows, torch.Generator().manual_seed(seed))
            if not isinstance(actual, Tensor) or actual.shape != windows.shape:
                compare(name, actual, windows, AXES)
            compare_kind(name, actual, windows)
            _where_from(name, windows, actual)
    windows = noise(9, 3, 2, seed=1)
    same_seed_twice(name, lambda seed: fn(windows, torch.Generator().manual_seed(seed)))
    doubles = fn(windows.double(), torch.Generator().manual_seed(5))
    compare(f"{name} in float64", doubles, fn(windows, torch.Generator().manual_seed(5)).double(), AXES)
    donors = {_donors(windows, fn(windows, torch.Generator().manual_seed(seed)))[0][0] for seed in range(60)}
    demand(
        donors == set(range(1, 9)),
        name,
        "which rows",
        f"in 60 seeds the first slot of row 0 came from rows {sorted(donors)} only.",
        "every other row must have its chance.",
    )


def _donors(windows: Tensor, actual: Tensor) -> list[list[int]]:
    """From which row each slot is; -1 for what stands at that slot in no row."""
    same = (actual[:, None] == windows[None]).all(-1)  # row, donor, slot
    found = same.int().argmax(1)
    return torch.where(same.any(1), found, -torch.ones_like(found)).tolist()


def _where_from(name: str, windows: Tensor, actual: Tensor) -> None:
    donors = _donors(windows, actual)
    known = {tuple(vector) for vector in windows.flatten(0, 1).tolist()}
    demand(
        all(tuple(vector) in known for vector in actual.flatten(0, 1).tolist()),
        name,
        "new vectors",
        "there are vectors that stand nowhere in `windows`.",
        "only move vectors.",
    )
    own = [{tuple(vector) for vector in row} for row in windows.tolist()]
    demand(
        not all(tuple(vector) in own[row] for row, its in enumerate(actual.tolist()) for vector in its),
        name,
        "only own rows",
        "every vector comes from its own row, from whatever slot.",
        "slots keep their places; rows change.",
    )
    demand(
        all(donor >= 0 for row in donors for donor in row),
        name,
        "other slots",
        "a vector stands in another slot than before.",
        "every slot keeps its place; only the row changes.",
    )
    demand(
        not all(len(set(row)) == 1 for row in donors),
        name,
        "one row",
        f"all slots of row 0 come from row {donors[0][0]}.",
        "draw for each slot.",
    )
    for row, its in enumerate(donors):
        demand(row not in its, name, "own row", f"row {row} keeps a slot of its own.", "see the docstring.")
    n_used = [sorted(row[slot] for row in donors) for slot in range(len(donors[0]))]
    twice = any(len(set(row)) < len(row) for row in donors)
    once = all(used == list(range(len(donors))) for used in n_used)
    demand(once, name, "not once", "for one slot, some rows are used twice and others never.", "use each row once.")
    demand(not twice, name, "twice", "two slots of a row come from the same row.", "see the docstring.")
