"""The oracle of path patching: spelled out on a toy transformer, with switches for what people get wrong."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.patching import put
from course_utils.checks.standins.toy_transformer import ToyTransformer

Head = tuple[int, int]
Receiver = tuple[str, int | None]
FINAL: Receiver = ("final", None)
ALL = slice(None)


def z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def over_paths(
    model: ToyTransformer,
    tokens: Tensor,
    fixed: Mapping[str, Tensor],
    receivers: Sequence[Receiver],
    *,
    part: Callable[[int | None], tuple[Any, ...]] = lambda head: (ALL,) if head is None else (ALL, head),
    put: Callable[[Tensor, Tensor, Any], Tensor] = put,
    held: bool = False,
    final: str = "hook_resid_post",
) -> Tensor:
    """The logits of a run whose receivers get what they would get if `fixed` stood where it says.

    The switches: `part` says which part of an activation is a head's, `put` how it is patched; with `held`, `fixed`
    stands in the second run too; `final` is where the last layer is read.
    """
    last = f"blocks.{len(model.blocks) - 1}.{final}"
    places = [(last if name == "final" else name, head) for name, head in receivers]
    noted: dict[str, Tensor] = {}

    def first(name: str, activation: Tensor) -> Tensor:
        noted[name] = fixed.get(name, activation)
        return noted[name]

    def second(name: str, activation: Tensor) -> Tensor:
        if held:
            activation = fixed.get(name, activation)
        for place, head in places:
            if place == name:
                activation = put(activation, noted[name], part(head))
        return activation

    with torch.no_grad():
        model.compute(tokens, first)
        return model.compute(tokens, second)


def fix(
    model: ToyTransformer,
    clean: Tensor,
    corrupted: Tensor,
    senders: Sequence[Head],
    freeze_mlps: bool,
    *,
    whole_layers: bool = False,
    loose: bool = False,
    others: bool = False,
) -> dict[str, Tensor]:
    """What stands still in the first run: all z, the senders' from the source; and the MLPs where they are frozen.

    The switches: `whole_layers` send; `loose`, heads that send nothing are not held; `others`, they are held, but at
    what they are in the source's run.
    """
    own, source = model.seen(clean), model.seen(corrupted)
    fixed = {}
    for layer, block in enumerate(model.blocks):
        numbers = [head for at, head in senders if at == layer]
        if numbers or not loose:
            fixed[z(layer)] = (source if others else own)[z(layer)].clone()
            for head in range(model.cfg.n_heads) if numbers and whole_layers else numbers:
                fixed[z(layer)][:, :, head] = source[z(layer)][:, :, head]
        if freeze_mlps and hasattr(block, "mlp"):
            name = f"blocks.{layer}.hook_mlp_out"
            fixed[name] = own[name]
    return fixed


def path_scores(
    model: ToyTransformer,
    clean: Tensor,
    corrupted: Tensor,
    senders: Sequence[Head],
    receivers: Sequence[Receiver],
    metric: Callable[[Tensor], Tensor],
    freeze_mlps: bool = True,
    fixing: Mapping[str, bool] | None = None,
    **wrong: Any,
) -> Tensor:
    """The metric of each prompt, with senders' information on direct paths only; `fixing` holds switches of `fix`."""
    fixed = fix(model, clean, corrupted, senders, freeze_mlps, **(fixing or {}))
    return metric(over_paths(model, clean, fixed, receivers, **wrong))


class Prompts:
    """As much of an `IOIDataset` as signals need: tokens, labels, places, and `flipped`; the end differs by prompt."""

    def __init__(self, tokens: Tensor, io: Tensor, s: Tensor) -> None:
        n_pos = tokens.shape[1]
        rows = torch.arange(len(tokens), device=tokens.device)
        self.tokens, self.io, self.s = tokens, io, s
        self.positions = {"IO": rows % 2, "S1": rows % 2 + 1, "S2": rows % 2 + 2, "END": n_pos - 1 - rows % 2}

    def __len__(self) -> int:
        return len(self.tokens)

    def flipped(self, kind: str) -> "Prompts":
        """Other tokens and other labels, for each kind its own; the kinds add up in either order."""
        step = {"names": 3, "order": 4, "abc": 2}[kind]
        return Prompts((self.tokens + step) % 11, (self.io + step) % 11, (self.s + step) % 11)
