"""What the checks of chapter 12 share: a small model with random parameters, and texts that end at different places."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig
from course_utils.data.brackets import CLOSE, END, OPEN, encode
from course_utils.hooks import ActivationCache, run_with_cache

Fn = Callable[..., Any]
N_CTX, D_MODEL = 11, 7
TEXTS = ("(())()", ")(", "(()())))(", "())(", "((()")
OTHERS = ("()()()", "()", "((()))(((", "(())", "())(")  # of the same lengths


def small_model(n_layers: int = 2, n_heads: int = 3, **kind: Any) -> Any:
    """A model for rows of eleven tokens; smooth, so that slopes can be measured. `kind` makes it of another kind."""
    size = {"d_vocab": 5, "n_ctx": N_CTX, "n_layers": n_layers, "n_heads": n_heads, "d_model": D_MODEL, "d_head": 4}
    return SmallModel(TransformerConfig(**size, d_mlp=6, act="gelu", **kind))


def texts(n: int = 5, others: bool = False) -> Tensor:
    """Rows of tokens, not contiguous."""
    return encode((OTHERS if others else TEXTS)[:n], N_CTX).T.contiguous().T


def everything(model: Any, tokens: Tensor) -> ActivationCache:
    """A cache with each head's result."""
    with torch.no_grad():
        return run_with_cache(model, tokens, names="*")[1]


def is_bracket(tokens: Tensor) -> Tensor:
    """Where OPEN or CLOSE stands, and no other number."""
    return (tokens == OPEN) | (tokens == CLOSE)


def ends(tokens: Tensor) -> list[int]:
    """Where each text ends, by a loop."""
    return [row.index(END) for row in tokens.tolist()]


At = Callable[[Tensor], list[int]]  # where each text is read
PLACES: dict[str, At] = {  # where people read it instead, and in which words
    "it reads the last position; a text is read at its own END.": lambda tokens: [tokens.shape[1] - 1] * len(tokens),
    "it reads START, which sees no bracket; a text is read at END.": lambda tokens: [0] * len(tokens),
    "it reads the last bracket, one before END.": lambda tokens: [end - 1 for end in ends(tokens)],
    "every text is read where the first one ends.": lambda tokens: [ends(tokens)[0]] * len(tokens),
}
