"""What the checks of chapter 10 share: small models and transcoders, and a frozen run worked out from the weights."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.modules import noise
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache

Fn = Callable[..., Any]
N_LAYERS, N_POS, D_MODEL, N_LATENTS, D_VOCAB = 3, 5, 6, 8, 11
ROTARY: dict[str, Any] = {"positions": "rotary", "rotary_dim": 2}
KINDS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "Pythia": {"parallel": True, **ROTARY},
    "Llama": {"normalization": "RMS", "gated": True, "n_kv_heads": 2, "tied": True, **ROTARY},
}


@cache
def model_of(kind: str = "GPT-2", n_layers: int = N_LAYERS) -> Any:
    """A small model with random parameters; smooth, so that slopes can be measured."""
    sizes = {"d_vocab": D_VOCAB, "n_ctx": 7, "n_layers": n_layers, "n_heads": 4, "d_model": D_MODEL, "d_head": 2}
    return SmallModel(TransformerConfig(**sizes, d_mlp=9, act="gelu", **KINDS[kind])).requires_grad_(False)


def tokens_of(n_batch: int = 1, seed: int = 1, n_pos: int = N_POS) -> Tensor:
    return some_tokens(model_of().cfg, n_batch, n_pos, seed)


class Sparse(nn.Module):
    """A transcoder with random weights, in which the k largest are found by sorting."""

    def __init__(self, seed: int, n_latents: int = N_LATENTS, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(noise(D_MODEL, n_latents, seed=seed))
        self.b_enc = nn.Parameter(0.3 * noise(n_latents, seed=seed + 1))
        self.W_dec = nn.Parameter(0.5 * noise(n_latents, D_MODEL, seed=seed + 2))
        self.b_dec = nn.Parameter(0.5 * noise(D_MODEL, seed=seed + 3))
        self.requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        pre = x @ self.W_enc + self.b_enc
        threshold = pre.sort(-1, descending=True).values[..., self.k - 1 : self.k]
        return pre.clamp(min=0) * (pre >= threshold)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


@cache
def transcoders_of(n_layers: int = N_LAYERS, seed: int = 500) -> list[Any]:
    return [Sparse(seed + 10 * layer) for layer in range(n_layers)]


def run_of(model: Any, tokens: Tensor) -> ActivationCache:
    with torch.no_grad():
        return run_with_cache(model, tokens)[1]


def written_in(cache: ActivationCache) -> Tensor:
    """The embeddings' stream, then what each MLP writes."""
    return torch.stack([cache["resid_pre", 0], *(cache["mlp_out", layer] for layer in range(cache.n_layers))])


def norm(resid: Tensor, scale: Tensor, cfg: Any) -> Tensor:
    return (resid if cfg.normalization == "RMS" else resid - resid.mean(-1, keepdim=True)) / scale


def affine(normalised: Tensor, layer: Any) -> Tensor:
    return normalised * layer.w + getattr(layer, "b", 0)


def by_weights(model: Any, cache: ActivationCache, written: Tensor) -> tuple[list[Tensor], Tensor]:
    """The frozen run, head by head from the weights; without hooks. The batch may be larger than the cache's."""
    stream, reads = written[0], []
    for layer, block in enumerate(model.blocks):
        own = affine(norm(stream, cache["ln1.scale", layer], model.cfg), block.ln1)
        attn_out = torch.zeros_like(stream) + getattr(block.attn, "b_O", 0)
        n_heads, n_shared = len(block.attn.W_O), len(block.attn.W_V)
        for head in range(n_heads):
            which = head * n_shared // n_heads
            value = own @ block.attn.W_V[which]
            if hasattr(block.attn, "b_V"):
                value = value + block.attn.b_V[which]
            attn_out = attn_out + cache["pattern", layer][:, head] @ value @ block.attn.W_O[head]
        seen = stream if model.cfg.parallel else stream + attn_out
        reads.append(norm(seen, cache["ln2.scale", layer], model.cfg))
        stream = stream + attn_out + written[1 + layer]
    logits = affine(norm(stream, cache["ln_final.scale"], model.cfg), model.ln_final) @ model.unembed.W_U
    return reads, logits + getattr(model.unembed, "b_U", 0)


def without(written: Tensor, vectors: Sequence[tuple[int, int, Tensor]]) -> Tensor:
    """Copies of what is written to one prompt: the first whole, each other without one vector (writer, pos, vector)."""
    copies = written.expand(-1, 1 + len(vectors), -1, -1).clone()
    for row, (writer, pos, vector) in enumerate(vectors, start=1):
        copies[writer, row, pos] -= vector
    return copies


def added_by(
    model: Any, cache: ActivationCache, vectors: Sequence[tuple[int, int, Tensor]], written: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """What each vector adds to what MLPs read [vector pos d_model] and to the logits: the run, less that without it."""
    reads, logits = by_weights(model, cache, without(written_in(cache) if written is None else written, vectors))
    return [x[:1] - x[1:] for x in reads], logits[:1] - logits[1:]


def latents_in(cache: ActivationCache, transcoders: Sequence[Any], layer: int) -> Tensor:
    """How active the latents of one layer are in the model's own run on one prompt, [pos latent]."""
    return transcoders[layer].encode(cache["ln2.normalized", layer])[0]
