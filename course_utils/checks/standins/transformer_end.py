"""The end of a transformer, from the last residual stream to logits: all that attribution asks of a model."""

from torch import nn

from course_utils.checks.modules import noise
from course_utils.config import TransformerConfig


class End(nn.Module):
    """Its configuration, `ln_final` and `unembed`; every parameter random."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ln_final, self.unembed = nn.Module(), nn.Module()
        if cfg.normalization != "none":
            self.ln_final.w = nn.Parameter(noise(cfg.d_model, seed=41))
        if cfg.normalization == "LN":
            self.ln_final.b = nn.Parameter(noise(cfg.d_model, seed=42))
        self.unembed.W_U = nn.Parameter(noise(cfg.d_model, cfg.d_vocab, seed=43))
        self.unembed.b_U = nn.Parameter(noise(cfg.d_vocab, seed=44))
