"""The one configuration of every model in the course."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer: GPT-2, the models that ship, and toy models alike.

    `d_head * n_heads` is usually `d_model`, but need not be. Raises ValueError, naming the field, for a size that is
    not a positive integer or an unknown choice.
    """

    d_vocab: int
    n_ctx: int  # the longest sequence that has position embeddings
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int = 0  # 0 only where attn_only
    attn_only: bool = False  # blocks without an MLP
    act: Literal["gelu_new", "relu"] = "gelu_new"
    normalization: Literal["LN", "none"] = "LN"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ["d_vocab", "n_ctx", "n_layers", "n_heads", "d_model", "d_head"] + ["d_mlp"] * (not self.attn_only)
        for field in sizes:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TransformerConfig: {field} must be a positive integer, got {value!r}.")
        for field, choices in {"act": ("gelu_new", "relu"), "normalization": ("LN", "none")}.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"TransformerConfig: {field} must be one of {choices}, got {getattr(self, field)!r}.")
