"""The oracle of path patching: spelled out on the toy model of `patching`, with switches for what people get wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case

Head = tuple[int, int]
Receiver = tuple[str, int | None]
Held = Mapping[str, Tensor]

ALL = slice(None)


def z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def last_of(case: Case) -> str:
    """Where the final stream is seen."""
    return f"blocks.{case.n_layers - 1}.hook_resid_post"


def over_paths(case: Case, fixed: Held, receivers: Sequence[Receiver], **wrong: Any) -> Tensor:
    """The logits of a run whose receivers get what they would get if `fixed` stood where it says.

    `wrong` may hold: `tokens`, to run on others; `pos`, the only positions patched; `all_heads`, whole layers receive;
    `still`, what stays fixed in the second run too; `by_position`, a receiver's number is taken for a position;
    `final`, another place for the final stream.
    """
    tokens = wrong.get("tokens", case.tokens)
    final = wrong.get("final", last_of(case))
    places = [(final if name == "final" else name, head) for name, head in receivers]
    noted: dict[str, Tensor] = {}

    def first(name: str, activation: Tensor) -> Tensor:
        noted[name] = fixed.get(name, activation)
        return noted[name]

    def second(name: str, activation: Tensor) -> Tensor:
        if name in wrong.get("still", {}):
            activation = fixed[name]
        for place, head in places:
            if place == name:
                activation = activation.clone()
                index: tuple[Any, ...] = (ALL, wrong.get("pos", ALL))
                if head is not None and wrong.get("by_position"):
                    index = (ALL, head)
                elif head is not None and not wrong.get("all_heads"):
                    index = (*index, head)
                activation[index] = noted[name][index]
        return activation

    with torch.no_grad():
        case.model.compute(tokens, first)
        return case.model.compute(tokens, second)


def fix(case: Case, senders: Sequence[Head], freeze_mlps: bool, **wrong: Any) -> dict[str, Tensor]:
    """What stands still in the first run: all z, the senders' from the source; and the MLPs where they are frozen.

    `wrong` may hold: `backwards`, the two runs change places; `pos`, the only positions sent; `whole_layers`;
    `loose`, heads that send nothing are not held; `others`, they are held, but at what they are in the source's run.
    """
    own, source = (case.source, case.seen) if wrong.get("backwards") else (case.seen, case.source)
    fixed = {}
    for layer in range(case.n_layers):
        numbers = [head for at, head in senders if at == layer]
        if numbers or not wrong.get("loose"):
            base, sent = (source, own) if wrong.get("others") else (own, source)
            fixed[z(layer)] = base[z(layer)].clone()
            for head in range(case.n_heads) if numbers and wrong.get("whole_layers") else numbers:
                index = (ALL, wrong.get("pos", ALL), head)
                fixed[z(layer)][index] = (source if wrong.get("others") else sent)[z(layer)][index]
        if freeze_mlps and not case.model.cfg.attn_only:
            name = f"blocks.{layer}.hook_mlp_out"
            fixed[name] = own[name]
    return fixed


def path_scores(
    case: Case, senders: Sequence[Head], receivers: Sequence[Receiver], freeze_mlps: bool = True, **wrong: Any
) -> Tensor:
    """The metric of each prompt, with the senders' news on direct paths only."""
    fixed = fix(case, senders, freeze_mlps, **wrong.pop("fix", {}))
    return case.metric(over_paths(case, fixed, receivers, **wrong))


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
