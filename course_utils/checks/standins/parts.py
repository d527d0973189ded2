"""Parts of a transformer whose answers are known: they stand in for the real ones while the whole is checked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.outcomes import CheckFailed


class Toy(nn.Module):
    """A part with a known answer, which stands in for a real one while the whole is checked."""

    def __init__(self, whole: str, part: str, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.whole, self.part, self.answer = whole, part, answer
        self.caches: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("w", "b") or name.startswith(("W_", "b_", "hook_")):
            raise CheckFailed(
                f"{self.whole}: it reads `{self.part}.{name}` directly.\n  Next: call the part, self.{self.part}(...)."
            )
        return super().__getattr__(name)

    def forward(self, resid: Tensor) -> Tensor:
        return self.answer(resid)


class ToyWithCache(Toy):
    """Stands in for attention, or for a block."""

    def forward(self, resid: Tensor, cache: Any = None) -> Tensor:
        self.caches.append(cache)
        return self.answer(resid)


class ToyEmbed(Toy):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(tokens)


class ToyPosEmbed(Toy):
    def forward(self, tokens: Tensor, offset: int = 0) -> Tensor:
        return self.answer(tokens, offset)


def wave(slope: float, shift: float) -> Callable[[Tensor], Tensor]:
    """A function of a vector, element by element, unlike the others of its kind."""
    return lambda resid: torch.sin(slope * resid + shift)
