"""A small transformer for the checks of patching, and the same computation spelled out without hooks.

`compute` knows nothing of hook points: it walks through the model and asks, at each named place, a plain function what
to go on with. So a patch there is a replacement in a computation that stands on the page.
"""

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from course_utils.checks.modules import noise
from course_utils.config import TransformerConfig
from course_utils.hooks import HookPoint

See = Callable[[str, Tensor], Tensor]  # (place, activation) -> what to go on with


class ToyNorm(nn.Module):
    """Mean 0, size 1, then scaled and shifted."""

    def __init__(self, d_model: int, seed: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(1 + noise(d_model, seed=seed, scale=0.3)), nn.Parameter(noise(d_model, seed=9))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def scale(self, resid: Tensor) -> Tensor:
        return (resid.var(-1, correction=0, keepdim=True) + 0.1).sqrt()

    def forward(self, resid: Tensor) -> Tensor:
        scale = self.hook_scale(self.scale(resid))
        return self.hook_normalized((resid - resid.mean(-1, keepdim=True)) / scale) * self.w + self.b


class ToyBlock(nn.Module):
    """Attention, and an MLP where there is one; both read the stream as it is."""

    def forward(self, resid: Tensor) -> Tensor:
        return self.compute(resid, lambda place, activation: attrgetter(place)(self)(activation))

    def compute(self, resid: Tensor, see: See) -> Tensor:
        """The stream after this block; `see(place, activation)` is asked at every place in it."""
        attn, n_pos = self.attn, resid.shape[1]
        resid = see("hook_resid_pre", resid)
        read = torch.tanh(resid)[:, :, None, None]
        q, k, v = (
            see(f"attn.hook_{letter.lower()}", (read @ getattr(attn, f"W_{letter}")).squeeze(3)) for letter in "QKV"
        )
        future = torch.ones(n_pos, n_pos, dtype=torch.bool, device=resid.device).triu(1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(future, -torch.inf)
        pattern = see("attn.hook_pattern", scores.softmax(-1))
        z = see("attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        resid = resid + see("hook_attn_out", torch.einsum("bqhd,hdm->bqm", z, attn.W_O) + attn.b_O)
        if hasattr(self, "mlp"):
            resid = see("hook_resid_mid", resid)
            resid = resid + see("hook_mlp_out", torch.sin(resid @ self.mlp.W))
        return see("hook_resid_post", resid)


class ToyUnembed(nn.Module):
    """From the stream to logits."""

    def forward(self, resid: Tensor) -> Tensor:
        return resid @ self.W_U + self.b_U


class ToyTransformer(nn.Module):
    """Small, causal and smooth; its hook points, parameters and parts have the names of a `Transformer`'s.

    It counts how often it comes to logits (`runs`), and the rows that go through its blocks (`rows`, a row once for
    each block); and it notes the largest number of rows in one block (`most_rows`).
    """

    def __init__(self, n_layers: int, n_heads: int, attn_only: bool = False, seed: int = 0) -> None:
        super().__init__()
        d_model, d_head, d_vocab = 8, 3, 11
        self.cfg = TransformerConfig(
            d_vocab=d_vocab, n_ctx=9, n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head, d_mlp=6,
            attn_only=attn_only,
        )  # fmt: skip
        self.embed, self.pos_embed, self.unembed = nn.Module(), nn.Module(), ToyUnembed()
        self.embed.W_E = nn.Parameter(noise(d_vocab, d_model, seed=seed + 1))
        self.pos_embed.W_pos = nn.Parameter(noise(9, d_model, seed=seed + 2, scale=0.5))
        self.unembed.W_U = nn.Parameter(noise(d_model, d_vocab, seed=seed + 3))
        self.unembed.b_U = nn.Parameter(noise(d_vocab, seed=seed + 4))
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList()
        for layer in range(n_layers):
            block, at = ToyBlock(), seed + 10 * layer
            block.attn = nn.Module()
            for i, letter in enumerate("QKV"):
                setattr(block.attn, f"W_{letter}", nn.Parameter(noise(n_heads, d_model, d_head, seed=at + 20 + i)))
            block.attn.W_O = nn.Parameter(noise(n_heads, d_head, d_model, seed=at + 23))
            block.attn.b_O = nn.Parameter(noise(d_model, seed=at + 24))
            for letter in ("q", "k", "v", "pattern", "z"):
                setattr(block.attn, f"hook_{letter}", HookPoint())
            block.hook_resid_pre, block.hook_attn_out, block.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
            if not attn_only:
                block.mlp = nn.Module()
                block.mlp.W = nn.Parameter(noise(d_model, d_model, seed=at + 25, scale=0.5))
                block.hook_resid_mid, block.hook_mlp_out = HookPoint(), HookPoint()
            block.register_forward_pre_hook(self._count_rows)
            self.blocks.append(block)
        self.ln_final = ToyNorm(d_model, seed + 5)
        self.runs, self.rows, self.most_rows = 0, 0, 0
        self.unembed.register_forward_pre_hook(self._count_run)

    def _count_rows(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows, self.most_rows = self.rows + len(inputs[0]), max(self.most_rows, len(inputs[0]))

    def _count_run(self, unembed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.runs += 1

    def forward(self, tokens: Tensor) -> Tensor:
        embed = self.hook_embed(self.embed.W_E[tokens])
        resid = embed + self.hook_pos_embed(self.pos_embed.W_pos[: tokens.shape[1]].expand_as(embed))
        for block in self.blocks:
            resid = block(resid)
        return self.unembed(self.ln_final(resid))

    def compute(self, tokens: Tensor, see: See) -> Tensor:
        """The logits; `see(name, activation)` is asked at every place, and what it returns is used from there on."""
        embed = see("hook_embed", self.embed.W_E[tokens])
        resid = embed + see("hook_pos_embed", self.pos_embed.W_pos[: tokens.shape[1]].expand_as(embed))
        for layer, block in enumerate(self.blocks):
            resid = block.compute(resid, lambda place, part, layer=layer: see(f"blocks.{layer}.{place}", part))
        final = self.ln_final
        centred = (resid - resid.mean(-1, keepdim=True)) / see("ln_final.hook_scale", final.scale(resid))
        resid = see("ln_final.hook_normalized", centred) * final.w + final.b
        return resid @ self.unembed.W_U + self.unembed.b_U

    def seen(self, tokens: Tensor) -> dict[str, Tensor]:
        """What every place sees in a run on these tokens."""
        found: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor) -> Tensor:
            found[name] = activation
            return activation

        with torch.no_grad():
            self.compute(tokens, keep)
        return {name: activation.clone() for name, activation in found.items()}
