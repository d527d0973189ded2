"""A transformer with hook points for checks that need one: the course's interface, in as few lines as possible.

Checks may not borrow the learner's or the reference's class; what this one computes is compared with `by_loops` in the
suite.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.modules import randomise
from course_utils.checks.transformer_interface import (
    ATTENTION_HOOKS,
    ROTARY_HOOKS,
    Shapes,
    attention_parameters,
    mlp_hooks,
    mlp_parameters,
    norm_hooks,
    norm_parameters,
    unembed_parameters,
)
from course_utils.config import TransformerConfig
from course_utils.hooks import HookPoint


class Part(nn.Module):
    """Parameters and hook points by name."""

    def __init__(self, shapes: Shapes, hooks: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        for name in hooks:
            setattr(self, name, HookPoint(on_request=name == "hook_result"))


class Norm(Part):
    """LayerNorm, RMSNorm, or nothing at all where the configuration says so."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(norm_parameters(cfg), norm_hooks(cfg))
        self.cfg = cfg

    def forward(self, resid: Tensor) -> Tensor:
        if self.cfg.normalization == "none":
            return resid
        if self.cfg.normalization == "RMS":
            scale = self.hook_scale((resid.square().mean(-1, keepdim=True) + self.cfg.layer_norm_eps).sqrt())
            return self.hook_normalized(resid / scale) * self.w
        scale = self.hook_scale((resid.var(-1, correction=0, keepdim=True) + self.cfg.layer_norm_eps).sqrt())
        return self.hook_normalized((resid - resid.mean(-1, keepdim=True)) / scale) * self.w + self.b


class Embed(Part):
    """A row of W_E for each token."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__({"W_E": (cfg.d_vocab, cfg.d_model)})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.W_E[tokens]


class PosEmbed(Part):
    """The first rows of W_pos, for every sequence."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__({"W_pos": (cfg.n_ctx, cfg.d_model)})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.W_pos[: tokens.shape[1]].expand(*tokens.shape, -1)


class NoPosEmbed(Part):
    """No table, and so nothing to add."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__({})

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(())


def turned(x: Tensor, cfg: TransformerConfig) -> Tensor:
    """Each pair of coordinates as a complex number, turned by an angle that grows with the position."""
    if cfg.positions == "learned":
        return x
    turning, still = x[..., : cfg.rotary_dim].unflatten(-1, (2, -1)), x[..., cfg.rotary_dim :]
    steps = cfg.rotary_base ** (-torch.arange(0, cfg.rotary_dim, 2, dtype=torch.float64) / cfg.rotary_dim)
    angles = torch.arange(x.shape[1])[:, None, None] * steps
    pairs = torch.complex(turning[..., 0, :], turning[..., 1, :]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag, still], -1).to(x.dtype)


class Attention(Part):
    """Multi-head causal attention, spelled out."""

    def __init__(self, cfg: TransformerConfig) -> None:
        rotary = ROTARY_HOOKS if cfg.positions == "rotary" else ()
        super().__init__(attention_parameters(cfg), ATTENTION_HOOKS + rotary)
        self.cfg = cfg

    def forward(self, resid: Tensor) -> Tensor:
        q, k, v = (
            getattr(self, f"hook_{letter}")(
                torch.einsum("bpm,hmd->bphd", resid, getattr(self, f"W_{letter.upper()}"))
                + getattr(self, f"b_{letter.upper()}", 0)
            )
            for letter in "qkv"
        )
        if self.cfg.positions == "rotary":
            q, k = self.hook_rot_q(turned(q, self.cfg)), self.hook_rot_k(turned(k, self.cfg))
        k, v = (shared.repeat_interleave(q.shape[2] // shared.shape[2], dim=2) for shared in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(future, -torch.inf)).softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O)).sum(2) + getattr(self, "b_O", 0)


class MLP(Part):
    """Two maps with cfg.act between them; or three, where one of them is a gate."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(mlp_parameters(cfg), mlp_hooks(cfg))
        self.gated = cfg.gated
        self.act = {"gelu_new": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}[cfg.act]

    def forward(self, resid: Tensor) -> Tensor:
        if self.gated:
            neurons = F.silu(self.hook_pre(resid @ self.W_gate)) * self.hook_pre_linear(resid @ self.W_in)
            return self.hook_post(neurons) @ self.W_out
        return self.hook_post(self.act(self.hook_pre(resid @ self.W_in + self.b_in))) @ self.W_out + self.b_out


class Block(nn.Module):
    """Attention, and an MLP where there is one; each reads the normalised stream and adds to it.

    In parallel the MLP reads the stream as the block found it.
    """

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.ln1, self.attn = Norm(cfg), Attention(cfg)
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        if not cfg.attn_only:
            self.ln2, self.mlp = Norm(cfg), MLP(cfg)
            self.hook_mlp_out = HookPoint()
            self.hook_resid_mid = nn.Identity() if cfg.parallel else HookPoint()

    def forward(self, resid: Tensor) -> Tensor:
        found = resid = self.hook_resid_pre(resid)
        resid = resid + self.hook_attn_out(self.attn(self.ln1(resid)))
        if not self.cfg.attn_only:
            resid = self.hook_resid_mid(resid)
            resid = resid + self.hook_mlp_out(self.mlp(self.ln2(found if self.cfg.parallel else resid)))
        return self.hook_resid_post(resid)


class Unembed(Part):
    """From the stream to logits."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(unembed_parameters(cfg))

    def forward(self, resid: Tensor) -> Tensor:
        return resid @ self.W_U + getattr(self, "b_U", 0)


class TiedUnembed(nn.Module):
    """From the stream to logits, by the embedding's own matrix."""

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.embed = [embed]  # no submodule: it is one of the model already

    @property
    def W_U(self) -> Tensor:  # noqa: N802 (a weight's name)
        W_E: Tensor = self.embed[0].get_parameter("W_E")
        return W_E.T

    def forward(self, resid: Tensor) -> Tensor:
        return resid @ self.W_U


def some_tokens(cfg: TransformerConfig, n_batch: int, n_pos: int, seed: int) -> Tensor:
    """Random tokens for a model to run on."""
    return torch.randint(cfg.d_vocab, (n_batch, n_pos), generator=torch.Generator().manual_seed(seed))


class SmallModel(nn.Module):
    """The names, shapes and hook points of the course's `Transformer`; every parameter random, biases included."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed, self.hook_embed = Embed(cfg), HookPoint()
        rotary = cfg.positions == "rotary"
        self.pos_embed = NoPosEmbed(cfg) if rotary else PosEmbed(cfg)
        self.hook_pos_embed = nn.Identity() if rotary else HookPoint()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = Norm(cfg)
        self.unembed = TiedUnembed(self.embed) if cfg.tied else Unembed(cfg)
        randomise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        resid = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(self.pos_embed(tokens))
        for block in self.blocks:
            resid = block(resid)
        return self.unembed(self.ln_final(resid))
