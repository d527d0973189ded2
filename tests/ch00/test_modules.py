"""What the check of chapter 00's module cannot know: see tests/test_checks.py."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import solutions.ch00_tensors as ref

SECRETS: tuple[str, ...] = ("self.table[tokens]", "torch.zeros(")
STILL_RIGHT: set[str] = set()


def like(**methods: Any) -> type:
    """The reference with methods of its own."""
    return type("Bigram", (ref.Bigram,), methods)


def begins(make: Any) -> type:
    """The reference with another `__init__`: `make(module, d_vocab)` gives it what it needs."""

    def init(self: Any, d_vocab: int) -> None:
        nn.Module.__init__(self)
        make(self, d_vocab)

    return like(__init__=init)


def buffered(module: Any, n: int) -> None:
    module.register_buffer("table", torch.zeros(n, n))


def plain(module: Any, n: int) -> None:
    module.table = torch.zeros(n, n, requires_grad=True)


def embedding(module: Any, n: int) -> None:
    module.table = nn.Embedding(n, n)


def random(module: Any, n: int) -> None:
    module.table = nn.Parameter(torch.randn(n, n))


def frozen(module: Any, n: int) -> None:
    module.table = nn.Parameter(torch.zeros(n, n), requires_grad=False)


def biased(module: Any, n: int) -> None:
    module.table, module.bias = nn.Parameter(torch.zeros(n, n)), nn.Parameter(torch.zeros(n))


def of_fixed_size(module: Any, n: int) -> None:
    module.table = nn.Parameter(torch.zeros(7, 7))


def registered(module: Any, n: int) -> None:
    module.register_parameter("table", nn.Parameter(torch.empty(n, n).fill_(0.0)))


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "Bigram": [
        ("is there, but it is not a parameter", begins(plain)),
        ("is there, but it is not a parameter", begins(buffered)),
        ("the parameter `table` is missing", begins(embedding)),
        ("`table` at the start", begins(random)),
        ("`table` records no gradient", begins(frozen)),
        ("`bias` is among its weights", begins(biased)),
        ("with d_vocab = 5: wrong shape", begins(of_fixed_size)),
        ("no gradient reaches `table`", like(forward=lambda self, tokens: self.table.detach()[tokens])),
        ("expected dtype float64", like(forward=lambda self, tokens: self.table.float()[tokens])),
        ("inherits from nn.Module", lambda d_vocab: ref.Bigram(d_vocab)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {
    "Bigram": [
        begins(registered),
        like(forward=lambda self, tokens: F.embedding(tokens, self.table)),
        like(forward=lambda self, tokens: F.one_hot(tokens, len(self.table)).to(self.table) @ self.table),
        like(forward=lambda self, tokens: self.table.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)),
    ],
}
