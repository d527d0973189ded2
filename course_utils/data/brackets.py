"""Texts of brackets as tokens: the vocabulary, the way to write a text as a row, and balanced texts drawn fairly."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

OPEN, CLOSE, START, END, PAD = range(5)
D_VOCAB = 5
SYMBOLS = ("(", ")", "START", "END", "PAD")
N_CTX = 42  # START, at most forty brackets, END
KINDS = ("random", "balanced", "swapped", "flipped", "shuffled")  # how a text of the data set is made
SHARES = (0.1, 0.35, 0.1, 0.25, 0.2)  # the chance of each kind
WITHOUT_FLIPPED = (0.2, 0.35, 0.1, 0.0, 0.35)  # the same for a data set that lacks texts which just miss the total
UNBALANCED, BALANCED = 0, 1  # the two columns of the logits at END that are the answer; the other three are not used


def encode(texts: Sequence[str], n_ctx: int = N_CTX) -> Int[Tensor, "batch n_ctx"]:
    """One row for each text: START, its brackets, END, and PAD up to `n_ctx`.

    Raises ValueError for a text that does not fit, or that holds anything but brackets.
    """
    rows = []
    for text in texts:
        if set(text) - {"(", ")"}:
            raise ValueError(f"encode: {text!r} holds something that is no bracket.")
        if len(text) > n_ctx - 2:
            raise ValueError(f"encode: {text!r} has {len(text)} brackets, and a row has room for {n_ctx - 2}.")
        row = [START, *(SYMBOLS.index(bracket) for bracket in text), END]
        rows.append(row + [PAD] * (n_ctx - len(row)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), n_ctx)


def decode(tokens: Int[Tensor, "batch pos"]) -> list[str]:
    """The brackets of each row as a text."""
    return ["".join(SYMBOLS[token] for token in row if token in (OPEN, CLOSE)) for row in tokens.tolist()]


def random_balanced(n: int, n_pairs: int, generator: torch.Generator) -> Int[Tensor, "batch bracket"]:
    """`n` balanced texts of `n_pairs` pairs, each of them equally likely; OPEN and CLOSE only.

    The cycle lemma: of all rotations of a text with one closing bracket too many, exactly one stays at zero or above
    until its last bracket. So shuffle, rotate to that one, and drop the last bracket.
    Source: Dvoretzky and Motzkin 1947.
    """
    device, length = generator.device, 2 * n_pairs + 1
    brackets = torch.arange(length, device=device) >= n_pairs  # False opens, True closes
    order = torch.rand(n, length, generator=generator, device=device).argsort(dim=1)
    shuffled = brackets.long()[order]
    lowest = (1 - 2 * shuffled).cumsum(dim=1).argmin(dim=1)  # the first place of the lowest elevation
    places = (lowest[:, None] + 1 + torch.arange(length - 1, device=device)) % length
    return shuffled.gather(1, places)
