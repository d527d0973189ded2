"""Right answers to chapter 03's exercises on cost, written another way: by going through the parts of a real model."""

import copy
import functools
import operator

import torch
from torch import Tensor

from course_utils.config import TransformerConfig
from solutions.ch02_transformer import Transformer


def flops_per_token(cfg: TransformerConfig, n_ctx: int) -> int:
    """From the model's own matrices, and attention head by head."""
    total = 0
    for name, parameter in Transformer(cfg).named_parameters():
        symbol = name.rsplit(".", 1)[-1]
        if symbol.startswith("W_") and symbol not in ("W_E", "W_pos"):
            total += 6 * parameter.numel()
    for _layer in range(cfg.n_layers):
        for _head in range(cfg.n_heads):
            scores = mixture = 2 * cfg.d_head * n_ctx
            total += 3 * (scores + mixture)
    return total


def memory_bytes(cfg: TransformerConfig, batch: int, n_ctx: int, dtype: torch.dtype) -> dict[str, float]:
    """By asking a model of this dtype; the few numbers that the statement leaves out are counted too."""
    model = Transformer(cfg).to(dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    vectors = {"normalised": 0, "streams": 0, "heads": 0, "neurons": 0, "scales": 0}
    for _layer in range(cfg.n_layers):
        for _read in range(1 if cfg.attn_only else 2):
            vectors["streams"] += cfg.d_model
            if cfg.normalization == "LN":
                vectors["normalised"] += cfg.d_model
                vectors["scales"] += 2
        vectors["heads"] += 4 * cfg.n_heads * cfg.d_head
        vectors["neurons"] += 0 if cfg.attn_only else 2 * cfg.d_mlp
    vectors["streams"] += cfg.d_model * (2 if cfg.normalization == "LN" else 1)
    numbers = sum(vectors.values()) + cfg.d_vocab
    size = torch.finfo(dtype).bits / 8
    return {
        "activations": numbers * batch * n_ctx * size,
        "optimizer": weights * 2.0,
        "gradients": weights,
        "weights": weights,
    }


def average_gradients(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Add and divide, then copy."""
    if len({frozenset(grads) for grads in grads_per_rank}) != 1:
        raise ValueError("ranks must agree")
    n = len(grads_per_rank)
    mean = {key: functools.reduce(operator.add, (g[key] for g in grads_per_rank)) / n for key in grads_per_rank[0]}
    return [copy.deepcopy(mean) for _ in range(n)]
