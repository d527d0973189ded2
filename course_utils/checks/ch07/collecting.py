"""Checks of chapter 07, collecting: one vector for each text, whatever pads it and on whichever side."""

import gc
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch07.small import Fn
from course_utils.checks.comparing import compare, compare_kind, follows_input
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks

CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=3, n_heads=2, d_model=8, d_head=3, d_mlp=5)
AXES = "layer batch d_model"
# A text without padding, with some behind it, with some in front, with a single token, and with some on both sides.
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
).bool()
PLACES = torch.tensor([3, 0, 5, 4, 2])


def streams(model: SmallModel, tokens: Tensor) -> Tensor:
    """The stream after 0, 1, ... n_layers layers, by PyTorch's own forward hooks: [layer batch pos d_model]."""
    seen: list[Tensor] = []

    def note(module: Any, inputs: Any, stream: Tensor) -> None:
        seen.append(stream.detach().clone())

    points = [block.hook_resid_pre for block in model.blocks] + [model.blocks[-1].hook_resid_post]
    handles = [point.register_forward_hook(note) for point in points]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def last_of(mask: Tensor) -> Tensor:
    """Row by row, the last place that is True."""
    return torch.tensor([max((place for place, real in enumerate(row) if real), default=0) for row in mask.tolist()])


def averaged(found: Tensor, mask: Tensor) -> Tensor:
    """Row by row, the mean over the places that are True."""
    return torch.stack([found[:, row, mask[row]].mean(1) for row in range(len(mask))], 1)


def collecting(
    last: Callable[[Tensor], Tensor] = last_of,
    mean: Callable[[Tensor, Tensor], Tensor] = averaged,
    given: Callable[[Tensor], Tensor] = lambda places: places,
    layer: Callable[[int, int], int] = lambda layer, n_layers: layer,
    end: Callable[[Tensor], Tensor] = lambda found: found,
    size: Callable[[int], int] = lambda batch_size: batch_size,
    rows: slice = slice(None),
) -> Fn:
    """extract_activations from whole streams, with something else in one of its parts."""

    def extract_activations(
        model: Any,
        tokens: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        position: str | Tensor,
        batch_size: int = 64,
    ) -> Tensor:
        if isinstance(position, str) and (position not in ("last", "mean") or not mask.any(1).all()):
            raise ValueError(position)
        everything = torch.cat([streams(model, part) for part in tokens.split(size(batch_size))], 1)
        found = everything[[layer(number, len(everything) - 1) for number in layers]]
        if isinstance(position, str) and position == "mean":
            return end(mean(found, mask))
        places = last(mask) if isinstance(position, str) else given(position)
        return end(found[:, torch.arange(len(tokens)), places])[:, rows]

    return extract_activations


@known_mistakes(
    {
        "the padding is taken for the last token: -1 is the last place, not the last token of the text.": collecting(
            last=lambda mask: torch.full((len(mask),), mask.shape[1] - 1)
        ),
        "the number of tokens minus 1 is taken for the last place; with padding in front it is not.": collecting(
            last=lambda mask: mask.sum(1) - 1
        ),
        'with "last" it is the first token of the text.': collecting(last=lambda mask: mask.int().argmax(1)),
        "the mean is taken over the padding, too.": collecting(mean=lambda found, mask: found.mean(2)),
        "the sum over the text is divided by the number of all places; divide by its number of tokens.": collecting(
            mean=lambda found, mask: (found * mask[..., None]).mean(2)
        ),
        "the vectors of the text are summed; take their mean.": collecting(
            mean=lambda found, mask: (found * mask[..., None]).sum(2)
        ),
        "each layer is one too late: layer 0 is the stream that the first block reads.": collecting(
            layer=lambda layer, n_layers: min(layer + 1, n_layers)
        ),
        "each layer is one too early.": collecting(layer=lambda layer, n_layers: max(layer - 1, 0)),
        "the axes are (batch, layer, d_model); layers come first.": collecting(end=lambda found: found.transpose(0, 1)),
        "only the last batch comes back; join them along the axis of the texts.": collecting(rows=slice(-1, None)),
    }
)
def check_extract_activations(fn: Fn) -> None:
    """The last token, given places, the mean; layers in any order; in batches, and nothing left behind."""
    name = "extract_activations"
    model, tokens, right = SmallModel(CFG), some_tokens(CFG, 5, 6, seed=1), collecting()
    layers = [3, 0, 2]
    for position in ("last", PLACES, "mean"):
        words = f"{name}({position!r})" if isinstance(position, str) else f"{name}(a position for each text)"
        with nothing_left_behind(name, model):
            actual = fn(model, tokens, MASK, layers, position)
        compare(words, actual, right(model, tokens, MASK, layers, position), AXES)
    compare(f"{name}(one layer)", fn(model, tokens, MASK, [1], "last"), right(model, tokens, MASK, [1], "last"), AXES)
    if actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    _check_batches(name, fn, model, tokens, right(model, tokens, MASK, layers, "last"))
    follows_input(
        name,
        lambda moved: fn(moved, *(t.to(moved.embed.W_E.device) for t in (tokens, MASK)), layers, "mean"),
        (model,),
        AXES,
    )
    for position, mask, words in (
        ("first", MASK, '"first"'),
        ("last", MASK & (torch.arange(5) != 3)[:, None], '"last"'),
        ("mean", MASK & (torch.arange(5) != 3)[:, None], '"mean"'),
    ):
        call = f"{name}(model, tokens, mask, [0], {words})" + ("" if mask is MASK else " with a text of padding only")
        must_raise(name, ValueError, call, partial(fn, model, tokens, mask, [0], position))
    nothing = torch.zeros_like(MASK)  # a given place needs no mask
    compare(f"{name} at given places, all masked", fn(model, tokens, nothing, layers, PLACES),
            right(model, tokens, nothing, layers, PLACES), AXES)  # fmt: skip


def _check_batches(name: str, fn: Fn, model: SmallModel, tokens: Tensor, expected: Tensor) -> None:
    """Every row once, two at a time."""
    sizes: list[int] = []
    seen: dict[int, list[weakref.ref[Tensor]]] = {}
    held: list[Tensor] = []

    def begin(module: Any, inputs: Any, out: Tensor) -> None:
        sizes.append(len(out))
        if len(sizes) == 3 and _alive(seen[1]):
            gc.collect()  # what is only held by a cycle is not kept
            held.extend(_alive(seen[1]))

    def note(activation: Tensor, hook: Any) -> None:
        seen.setdefault(len(sizes), []).append(weakref.ref(activation))

    handle = model.embed.register_forward_hook(begin)
    try:  # all but the streams is of no use to anybody
        with hooks(model, {lambda place: "attn" in place or "mlp" in place or "mid" in place: note}):
            actual = fn(model, tokens, MASK, [3, 0, 2], "last", 2)
    finally:
        handle.remove()
    compare(f"{name} with batch_size=2", actual, expected, AXES)
    if max(sizes, default=0) > 2 or sum(sizes) != len(tokens):
        raise CheckFailed(
            f"{name} with batch_size=2: the model ran on batches of {sizes} texts for {len(tokens)} texts.\n"
            "  Next: cut the texts into groups of `batch_size`, and run the model once on each."
        )
    if held:
        raise CheckFailed(
            f"{name} with batch_size=2: while the third batch ran, {len(held)} activations of the first one were still "
            "held, which are no streams.\n"
            "  Next: take what you need from a cache before the next batch, or cache only `names=...`."
        )
    compare_kind(name, actual, expected)


def _alive(references: list["weakref.ref[Tensor]"]) -> list[Tensor]:
    return [tensor for reference in references if (tensor := reference()) is not None]
