"""A small model with hook points as a learner writes them, and the simplest such hook point."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from course_utils.checks.leftovers import Stop
from course_utils.checks.modules import noise


class MyHookPoint(nn.Module):
    """An identity layer that shows what comes through to its functions, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.fns: list[Callable[[Tensor], Tensor | None]] = []

    @property
    def is_watched(self) -> bool:
        return bool(self.fns)

    def forward(self, activation: Tensor) -> Tensor:
        for fn in self.fns:
            left = fn(activation)
            activation = activation if left is None else left
        return activation


class Part(nn.Module):
    """A piece of a small model: it reads through one hook point, and writes through another."""

    def __init__(self, point: Callable[[], nn.Module], slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.hook_in, self.hook_out = point(), point()

    def forward(self, resid: Tensor) -> Tensor:
        return resid + self.hook_out(torch.sin(self.slope * self.hook_in(resid) + 0.3))


class Watched(nn.Module):
    """A small model full of hook points of any class; a token 0 makes it fail half-way."""

    def __init__(self, point: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.runs = 0
        self.table = nn.Parameter(noise(11, 3, seed=1))
        self.hook_start, self.between, self.hook_end = point(), nn.Identity(), point()
        self.blocks = nn.ModuleList([Part(point, 1.3), Part(point, 0.7)])

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        resid = self.hook_start(self.table[tokens])
        for block in self.blocks:
            if block is self.blocks[1] and (tokens == 0).any():
                raise Stop
            resid = self.between(block(resid))
        return self.hook_end(resid)
