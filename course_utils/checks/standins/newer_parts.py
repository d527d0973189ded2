"""Parts of newer models than GPT-2, as shells for a `forward`: their parameters, their hook points, nothing more."""

from course_utils.checks.standins.transformer import Attention, Block, Part
from course_utils.checks.transformer_interface import NORM_HOOKS
from course_utils.config import TransformerConfig


class RotaryAttention(Attention):
    """Attention with hook points for turned queries and keys."""


class GroupedQueryAttention(Attention):
    """Attention with fewer heads of keys and values than of queries, and no biases."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        self.layer, self.rotary_dim, self.rotary_base = 0, cfg.rotary_dim, cfg.rotary_base


class ParallelBlock(Block):
    """A block without a stream between attention and MLP."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        del self.hook_resid_mid


class RMSNorm(Part):
    """A norm that scales and does not shift."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__({"w": (cfg.d_model,)}, NORM_HOOKS)
        self.eps = cfg.layer_norm_eps


class GatedMLP(Part):
    """An MLP with a gate, and no biases."""

    def __init__(self, cfg: TransformerConfig) -> None:
        up = (cfg.d_model, cfg.d_mlp)
        super().__init__({"W_gate": up, "W_in": up, "W_out": up[::-1]}, ("hook_pre", "hook_pre_linear", "hook_post"))
