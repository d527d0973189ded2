"""What the checks of chapter 11 share: a small model, its streams by PyTorch's own hooks, and a demand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig

Fn = Callable[..., Any]
N_LAYERS = 3


def small_model(d_vocab: int = 13, n_layers: int = N_LAYERS) -> Any:
    """A model with random parameters, biases included."""
    return SmallModel(
        TransformerConfig(d_vocab=d_vocab, n_ctx=9, n_layers=n_layers, n_heads=2, d_model=7, d_head=4, d_mlp=6)
    )


def place(model: Any, layer: int) -> nn.Module:
    """The hook point of the stream after `layer` blocks."""
    return model.blocks[layer].hook_resid_pre if layer < len(model.blocks) else model.blocks[-1].hook_resid_post


def logits_with(model: Any, tokens: Tensor, layer: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits where `change` is applied to the stream after `layer` blocks, by a forward hook of PyTorch."""
    handle = place(model, layer).register_forward_hook(lambda module, inputs, stream: change(stream))
    try:
        return model(tokens)
    finally:
        handle.remove()


@torch.no_grad()
def stream(model: Any, tokens: Tensor, layer: int) -> Tensor:
    """The stream after `layer` blocks."""
    seen: list[Tensor] = []

    def note(found: Tensor) -> Tensor:
        seen.append(found.clone())
        return found

    logits_with(model, tokens, layer, note)
    return seen[0]


def clamped(layer: int) -> int:
    """A layer that there is."""
    return min(max(layer, 0), N_LAYERS)


def demand(holds: bool, name: str, place: str, message: str, advice: str) -> None:
    """Raise CheckFailed unless it holds; who fails at the same place has the same cause."""
    if not holds:
        raise CheckFailed(f"{name}: {message}", evidence=Evidence(f"{name}: {place}", True), advice=f"  Next: {advice}")


def same_seed_twice(name: str, draw: Callable[[int], Tensor]) -> None:
    """One seed, one answer; several seeds, several answers."""
    first, again, others = draw(5), draw(5), [draw(seed) for seed in (6, 7, 8)]
    demand(torch.equal(first, again), name, "seeds", "one seed gave two answers.", "draw from the generator only.")
    demand(
        not all(torch.equal(first, other) for other in others),
        name,
        "no draw",
        "several seeds gave the same answer.",
        "draw from the generator that is handed in.",
    )
