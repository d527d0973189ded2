"""A small sparse autoencoder, and a dictionary made of it, with the interface of chapters 06 and 09."""

from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.modules import noise


class SmallSAE(nn.Module):
    """Random weights of every kind; latents are worked out apart from the reference."""

    def __init__(self, d_in: int, d_sae: int, kind: str, k: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.kind, self.k, self.bandwidth = kind, k, 0.4
        rows = noise(d_sae, d_in, seed=seed + 1)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(noise(d_in, d_sae, seed=seed + 2, scale=0.6))
        self.b_enc = nn.Parameter(noise(d_sae, seed=seed + 3, scale=0.3))
        self.b_dec = nn.Parameter(noise(d_in, seed=seed + 4))
        if kind == "gated":
            self.r_mag = nn.Parameter(noise(d_sae, seed=seed + 5, scale=0.3))
            self.b_mag = nn.Parameter(noise(d_sae, seed=seed + 6, scale=0.3))
        if kind == "jumprelu":
            self.log_threshold = nn.Parameter(noise(d_sae, seed=seed + 7, scale=0.3) - 1)
        if kind == "batch_topk":
            self.register_buffer("threshold", torch.tensor(0.25))

    def pre_activations(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre: Tensor) -> Tensor:
        if self.kind == "topk":
            order = pre.argsort(dim=-1, descending=True).argsort(dim=-1)
            return pre.relu() * (order < self.k)
        if self.kind == "gated":
            return ((pre - self.b_enc) * self.r_mag.exp() + self.b_mag).relu() * (pre > 0)
        if self.kind == "jumprelu":
            return pre * (pre > self.log_threshold.exp())
        if self.kind == "batch_topk":
            return pre * (pre > self.threshold)
        return pre.relu()

    def encode(self, x: Tensor) -> Tensor:
        return self.activate(self.pre_activations(x))

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.encode(x)
        return self.decode(latents), latents


class SmallDictionary(nn.Module):
    """A small autoencoder at a hook point, its inputs multiplied by `scale`."""

    def __init__(self, hook_name: str, d_in: int, d_sae: int = 6, kind: str = "relu", scale: float = 0.7) -> None:
        super().__init__()
        self.sae: Any = SmallSAE(d_in, d_sae, kind)
        self.hook_name, self.scale = hook_name, scale

    def encode(self, activation: Tensor) -> Tensor:
        return self.sae.encode(activation * self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        return self.sae.decode(latents) / self.scale
