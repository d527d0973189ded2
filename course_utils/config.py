"""The one configuration of every model in the course."""

from dataclasses import dataclass
from typing import Literal

CHOICES = {
    "act": ("gelu_new", "gelu", "relu"),
    "normalization": ("LN", "RMS", "none"),
    "positions": ("learned", "rotary"),
}


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a transformer: GPT-2, Pythia, Llama, the models that ship, and toy models alike.

    `d_head * n_heads` is usually `d_model`, but need not be. Raises ValueError, naming the field, for a size that is
    not a positive integer, an unknown choice, or fields that do not go together.
    """

    d_vocab: int
    n_ctx: int  # the longest sequence: so many position embeddings there are, or room in a key-value cache
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int = 0  # 0 only where attn_only
    attn_only: bool = False  # blocks without an MLP
    act: Literal["gelu_new", "gelu", "relu"] = "gelu_new"  # "gelu" is the exact one
    normalization: Literal["LN", "RMS", "none"] = "LN"  # "RMS", Llama's, subtracts no mean and has no `b`
    layer_norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"  # a table added to the embeddings, or turned queries and keys
    rotary_dim: int = 0  # how many coordinates of a query or key are turned; 0 only where positions are learned
    rotary_base: float = 10000.0
    parallel: bool = False  # attention and MLP of a block read the same stream, as in Pythia
    # How many heads there are for keys and values, as in Llama: each serves n_heads / n_kv_heads heads of queries, and
    # neither attention nor the unembedding has biases. None: every head has its own, and there are biases.
    n_kv_heads: int | None = None
    gated: bool = False  # the MLP has a gate with a SiLU instead of `act`, and no biases, as in Llama
    tied: bool = False  # the unembedding is the embedding's transpose, not a parameter; only with n_kv_heads

    def __post_init__(self) -> None:
        sizes = ["d_vocab", "n_ctx", "n_layers", "n_heads", "d_model", "d_head"] + ["d_mlp"] * (not self.attn_only)
        for field in sizes:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TransformerConfig: {field} must be a positive integer, got {value!r}.")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"TransformerConfig: {field} must be one of {choices}, got {getattr(self, field)!r}.")
        self._check_rotary()
        self._check_llama()
        if self.parallel and self.attn_only:
            raise ValueError("TransformerConfig: parallel is about attention and MLP, and attn_only has no MLP.")

    def _check_rotary(self) -> None:
        n_turned = self.rotary_dim
        if self.positions == "learned":
            if n_turned:
                raise ValueError(f'TransformerConfig: rotary_dim {n_turned} needs positions="rotary".')
            return
        whole = isinstance(n_turned, int) and not isinstance(n_turned, bool)
        if not whole or n_turned % 2 or not 0 < n_turned <= self.d_head:
            raise ValueError(
                f"TransformerConfig: rotary_dim must be even, above 0 and at most d_head = {self.d_head}, "
                f"got {n_turned!r}."
            )
        if not self.rotary_base > 0:
            raise ValueError(f"TransformerConfig: rotary_base must be positive, got {self.rotary_base!r}.")

    def _check_llama(self) -> None:
        n_kv = self.n_kv_heads
        if n_kv is None:
            if self.tied:
                raise ValueError("TransformerConfig: tied needs n_kv_heads; else the unembedding has a bias.")
        elif not isinstance(n_kv, int) or isinstance(n_kv, bool) or n_kv < 1 or self.n_heads % n_kv:
            raise ValueError(f"TransformerConfig: n_kv_heads must divide n_heads = {self.n_heads}, got {n_kv!r}.")
        elif self.positions != "rotary":
            raise ValueError('TransformerConfig: n_kv_heads needs positions="rotary".')
        if self.gated and self.attn_only:
            raise ValueError("TransformerConfig: gated is about the MLP, and attn_only has none.")
