"""A model with known logits, for checks of how text is drawn from one."""

from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.outcomes import CheckFailed
from course_utils.config import TransformerConfig


class ToyModel(nn.Module):
    """A model whose logits are known: a hash of all tokens so far.

    With a key-value cache it remembers the tokens there, as keys, and nowhere else. `widths` notes how many positions
    each call was given.
    """

    def __init__(self, cfg: TransformerConfig, name: str = "generate", scale: float = 1.0) -> None:
        super().__init__()
        self.cfg, self.name = cfg, name
        self.scale = nn.Parameter(torch.tensor(scale))
        self.widths: list[int] = []
        self.recorded = False  # whether a call came with gradients switched on

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        n_new = tokens.shape[1]
        self.widths.append(n_new)
        self.recorded |= torch.is_grad_enabled()
        if cache is not None:
            tokens = self._remembered(tokens, cache)
        elif n_new > self.cfg.n_ctx:
            raise CheckFailed(
                f"{self.name}: the model was given {n_new} positions, but n_ctx is {self.cfg.n_ctx}.\n"
                "  Next: stop when the sequence is n_ctx long."
            )
        return (self.logits(tokens) * self.scale)[:, -n_new:]

    def _remembered(self, tokens: Tensor, cache: Any) -> Tensor:
        """All tokens so far, by the cache."""
        marks = tokens.to(self.scale.dtype)[:, :, None, None].expand(-1, -1, self.cfg.n_heads, self.cfg.d_head)
        known = next(iter(cache.contents.values()))[0] if getattr(cache, "contents", None) else marks
        if len(known) != len(marks):
            raise CheckFailed(
                f"{self.name} with a key-value cache: the model was given {len(marks)} rows while the cache holds "
                f"{len(known)}.\n  Next: `cache.select` makes its rows follow the beams; call it in every step."
            )
        for layer in range(self.cfg.n_layers):
            keys, _ = cache.append(layer, marks, marks)
        return keys[:, :, 0, 0].round().long()

    def logits(self, tokens: Tensor) -> Tensor:
        """Different at every position, for every history."""
        position = torch.arange(1, tokens.shape[1] + 1)
        history = ((tokens + 1) * position).cumsum(1)[..., None]
        return torch.sin(history * torch.arange(1, self.cfg.d_vocab + 1) * 0.37)
