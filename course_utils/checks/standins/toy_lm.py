"""A language model of two tables that notes who calls it, when and how: what the checks of a training loop train."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.modules import noise


class ToyLM(nn.Module):
    """Logits that depend on this token and the one before it, and on the mode of the model.

    `seen` holds, for each forward pass, the rows and the mode; `events` holds what happened, in order.
    """

    def __init__(self, d_vocab: int = 7) -> None:
        super().__init__()
        self.here = nn.Parameter(noise(d_vocab, d_vocab, seed=11))
        self.before = nn.Parameter(noise(d_vocab, d_vocab, seed=12))
        self.events: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.here.register_hook(lambda grad: self.events.append("backward"))

    def forward(self, tokens: Tensor) -> Tensor:
        self.events.append("forward")
        self.seen.append({"rows": len(tokens), "training": self.training, "graph": torch.is_grad_enabled()})
        return self.logits(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """What forward returns, without a note of it."""
        earlier = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)
        return (self.here[tokens] + self.before[earlier]) * (0.5 if self.training else 1.0)


def toy_tokens(n_rows: int, n_pos: int, seed: int = 0) -> Tensor:
    return torch.randint(7, (n_rows, n_pos), generator=torch.Generator().manual_seed(seed))


def toy_gradient(model: ToyLM, tokens: Tensor) -> tuple[float, list[Tensor]]:
    """The loss on these tokens in the model's mode and its gradient, without a trace in the model."""
    n_events = len(model.events)
    loss = F.cross_entropy(model.logits(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:])
    pieces = torch.autograd.grad(loss, list(model.parameters()))
    del model.events[n_events:]
    return loss.item(), list(pieces)
