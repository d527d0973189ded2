"""A transformer of which a check needs the attention patterns only."""

import weakref

import torch
from torch import Tensor, nn

from course_utils.checks.leftovers import Stop
from course_utils.config import TransformerConfig
from course_utils.hooks import HookPoint


class ToyPatterns(nn.Module):
    """A transformer that has nothing but attention patterns; it notes which of them outlive the run."""

    def __init__(self, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.cfg = TransformerConfig(
            d_vocab=19, n_ctx=20, n_layers=n_layers, n_heads=n_heads, d_model=7, d_head=6, attn_only=True
        )
        self.slope = nn.Parameter(torch.ones(()))
        self.runs, self.outlived, self.fails = 0, 0, False
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            block = nn.Module()
            block.attn, block.hook_resid_post = nn.Module(), HookPoint()
            block.attn.hook_attn_scores, block.attn.hook_pattern = HookPoint(), HookPoint()
            self.blocks.append(block)

    def scores(self, tokens: Tensor, layer: int) -> Tensor:
        """Different at every place, for every text."""
        heads, places = torch.arange(self.cfg.n_heads)[:, None, None], torch.arange(tokens.shape[1])
        query, key = tokens[:, None, :, None] + places[:, None] * 0.37, tokens[:, None, None, :] + places * 0.61
        scores = 3 * torch.sin(query * (heads + 1.3) + key * (layer + 0.7) * 1.9) * self.slope
        return scores.masked_fill(places[:, None] < places, -torch.inf)

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        living = []
        for layer, block in enumerate(self.blocks):
            scores = block.attn.hook_attn_scores(self.scores(tokens, layer))
            pattern = scores.softmax(-1)
            living.append(weakref.ref(pattern))
            pattern = block.attn.hook_pattern(pattern)
            if self.fails:
                raise Stop
            resid = block.hook_resid_post(pattern.sum(1)[..., :1].expand(-1, -1, 7))
        del scores, pattern
        self.outlived = sum(pattern() is not None for pattern in living)
        return resid

    def patterns(self, tokens: Tensor) -> list[Tensor]:
        """What the hook points will see."""
        return [self.scores(tokens, layer).softmax(-1).detach() for layer in range(self.cfg.n_layers)]
