"""Chapter 03: a training loop written line by line, a circuit read in full, and what training costs."""

import torch
from torch import Tensor

from course_utils.config import TransformerConfig

# ------------------------------------------------------------------------------------------- a first complete circuit

# ----------------------------------------------------------------------------------------------------------- the loop

# ------------------------------------------------------------------------------------------------------ what it costs


def flops_per_token(cfg: TransformerConfig, n_ctx: int) -> int:
    """The arithmetic that one token costs in training, in sequences of `n_ctx` tokens.

    A product and the sum it goes into are two operations, so a vector times a matrix [rows columns] costs
    2 rows columns. Count every product with a weight matrix, the unembedding included, and attention's scores (query
    times key) and mixtures (pattern times value), over all `n_ctx` keys: the masked ones are computed too. Backward
    costs twice what forward does, since each product needs the gradients of both its factors. Looking up an embedding,
    adding a bias, LayerNorm, softmax and the non-linearity count as nothing.
    Source: Kaplan et al. 2020, section 2.1; its 6 N is the same count, but for the attention.
    """
    width = cfg.n_heads * cfg.d_head
    per_layer = 4 * cfg.d_model * width + 2 * n_ctx * width
    if not cfg.attn_only:
        per_layer += 2 * cfg.d_model * cfg.d_mlp
    multiply_adds = cfg.n_layers * per_layer + cfg.d_model * cfg.d_vocab
    return 3 * 2 * multiply_adds


def memory_bytes(cfg: TransformerConfig, batch: int, n_ctx: int, dtype: torch.dtype) -> dict[str, int]:
    """What a step of training keeps in memory, in bytes: "weights", "gradients", "optimizer" and "activations".

    Every number has the size of `dtype` (`dtype.itemsize` bytes). Weights are all parameters of chapter 02's
    `Transformer`, `cfg.n_ctx` position embeddings among them. The optimizer is AdamW: two numbers per parameter.
    Activations are what forward must keep for backward, for `batch` rows of `n_ctx` tokens, with PyTorch's own
    LayerNorm, fused attention and GELU. Of each token: the input and the output of every LayerNorm (`ln_final` too;
    without normalisation there is one vector instead of two), q, k, v and z in each layer, the neurons of each
    MLP before and after the non-linearity, and the log-probabilities of the vocabulary. The pattern is not kept:
    fused attention works it out again. A few numbers per token, such as LayerNorm's scale, are left out.
    Source: Korthikanti et al. 2022, section 4.1, for other kernels.
    """
    width = cfg.n_heads * cfg.d_head
    is_normalised = cfg.normalization == "LN"
    norm = 2 * cfg.d_model if is_normalised else 0
    n_parameters = (cfg.d_vocab + cfg.n_ctx) * cfg.d_model + norm + (cfg.d_model + 1) * cfg.d_vocab
    n_parameters += cfg.n_layers * (norm + 4 * cfg.d_model * width + 3 * width + cfg.d_model)
    read = 2 * cfg.d_model if is_normalised else cfg.d_model
    per_layer = read + 4 * width
    if not cfg.attn_only:
        n_parameters += cfg.n_layers * (norm + 2 * cfg.d_model * cfg.d_mlp + cfg.d_mlp + cfg.d_model)
        per_layer += read + 2 * cfg.d_mlp
    per_token = cfg.n_layers * per_layer + read + cfg.d_vocab
    counts = {
        "weights": n_parameters,
        "gradients": n_parameters,
        "optimizer": 2 * n_parameters,
        "activations": batch * n_ctx * per_token,
    }
    return {what: count * dtype.itemsize for what, count in counts.items()}


# ---------------------------------------------------------------------------------------------- more than one machine


def average_gradients(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What every process has after the exchange: the mean, over the processes, of each parameter's gradient.

    `grads_per_rank[r]` holds the gradients by parameter name that rank r worked out from its share of the batch; all
    shares are of one size. The result has the same form, in the same order. Each rank owns its tensors: writing into
    one changes no other rank's, and no input. Raises ValueError if there are no ranks, or if their parameter names
    differ.
    """
    if not grads_per_rank or any(grads.keys() != grads_per_rank[0].keys() for grads in grads_per_rank):
        raise ValueError("average_gradients: it needs at least one rank, and the same parameters in each.")
    means = {name: torch.stack([grads[name] for grads in grads_per_rank]).mean(dim=0) for name in grads_per_rank[0]}
    return [{name: mean.clone() for name, mean in means.items()} for _ in grads_per_rank]
