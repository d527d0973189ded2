# ruff: noqa: N802 (check_Bigram is named after its exercise)
"""Chapter 00: is the learner's module one that can be trained, saved and loaded?"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from course_utils.checks.comparing import compare
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import always, check_module, randomise, weights_of, with_forwards
from course_utils.checks.outcomes import CheckFailed


class Bigram(nn.Module):
    """What the mistakes are made of."""

    def __init__(self, d_vocab: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(d_vocab, d_vocab))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.table[tokens]


@known_mistakes(
    with_forwards(
        Bigram,
        {
            "a column is read; the row of a token says what follows it.": lambda m, tokens: m.table.T[tokens],
            "the rows are made into probabilities; logits are wanted.": lambda m, tokens: m.table[tokens].softmax(-1),
            "the rows are made into log-probabilities; return them as they are.": (
                lambda m, tokens: m.table[tokens].log_softmax(-1)
            ),
            "each position reads the row of the token before it; read the row of its own token.": (
                lambda m, tokens: m.table[tokens.roll(1, 1)]
            ),
            "every text gets the rows of the first text's tokens.": lambda m, tokens: m.table[
                tokens[:1].expand_as(tokens)
            ],
            "the tokens are ignored: row 0 is read everywhere.": lambda m, tokens: m.table[tokens * 0],
        },
    )
)
def check_Bigram(cls: Any) -> None:
    """One parameter of zeros; then random numbers in it, looked up one by one."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed("Bigram: expected a class that inherits from nn.Module.\n  Next: `class Bigram(nn.Module):`.")
    _is_of_its_size(cls(5), 5)
    module = cls(7)
    _is_of_its_size(module, 7)
    randomise(module)
    table = weights_of(module)["table"]
    for tokens in (torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]]), torch.tensor([[4, 6, 2]])):
        expected = torch.stack([torch.stack([table[token] for token in row]) for row in tokens])
        check_module("Bigram", module, (tokens,), always({"output": expected}), "batch pos d_vocab")


def _is_of_its_size(module: nn.Module, d_vocab: int) -> None:
    """Raise CheckFailed unless `table` is the one parameter, of zeros, and can be trained."""
    parameters = dict(module.named_parameters())
    if "table" not in parameters:
        there = isinstance(getattr(module, "table", None), Tensor)
        what = "`table` is there, but it is not a parameter" if there else "the parameter `table` is missing"
        raise CheckFailed(
            f"Bigram: {what}. Only parameters are trained and saved.\n"
            "  Next: in `__init__`, after `super().__init__()`, set `self.table` to an nn.Parameter."
        )
    extra = [name for name in module.state_dict() if name != "table"]
    if extra:
        raise CheckFailed(f"Bigram: `{extra[0]}` is among its weights.\n  Next: keep `table` alone.")
    start = parameters["table"]
    compare(
        f"Bigram: `table` at the start, with d_vocab = {d_vocab}", start, torch.zeros(d_vocab, d_vocab), "token next"
    )
    if not start.requires_grad:
        raise CheckFailed("Bigram: `table` records no gradient.\n  Next: leave `requires_grad` of nn.Parameter alone.")
