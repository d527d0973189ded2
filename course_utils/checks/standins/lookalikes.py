"""A model that computes nothing: parameters whose names resemble each other, with values that arithmetic loses."""

import torch
from torch import nn

from course_utils.checks.modules import noise


class Part(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.W_O = nn.Parameter(noise(3, 2, 5, seed=seed))
        self.b_O = nn.Parameter(noise(5, seed=seed + 1))


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn, self.mlp = Part(seed), nn.Module()
        self.mlp.W_out = nn.Parameter(noise(7, 5, seed=seed + 2))


class Lookalikes(nn.Module):
    """Something with parameters whose names resemble each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(10 * layer) for layer in range(2))
        self.W_O = nn.Parameter(noise(4, 5, seed=30))
        self.register_buffer("seen", noise(3, seed=31))
        with torch.no_grad():  # values that arithmetic does not bring back: W - W + W, or W * 0 / 0
            self.blocks[1].attn.W_O[0, 0] = torch.tensor([1 / 3, -0.0, 1e30, torch.inf, 1e-30])
