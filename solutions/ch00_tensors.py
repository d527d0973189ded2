"""Chapter 00: tensors with the shapes that transformers have, a few lines at a time."""

from collections.abc import Callable

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def relative_positions(n_pos: int) -> Int[Tensor, "query key"]:
    """How far each key lies before each query: entry [query, key] is query - key.

    0 on the diagonal, positive below it (the past), negative above it (the future). Whole numbers (int64).
    """
    positions = torch.arange(n_pos)
    return positions[:, None] - positions


def centre_vectors(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """Subtract from every vector the mean of its own d_model numbers; other positions and texts play no part."""
    return resid - resid.mean(dim=-1, keepdim=True)


def batched_outer(a: Float[Tensor, "batch row"], b: Float[Tensor, "batch column"]) -> Float[Tensor, "batch row column"]:
    """Every number of `a` times every number of `b`, for each item of the batch on its own.

    Entry [batch, row, column] is a[batch, row] * b[batch, column].
    """
    return a[:, :, None] * b[:, None, :]


def logits_at_end(
    logits: Float[Tensor, "batch pos d_vocab"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_vocab"]:
    """The logits at the last token of each text; what follows it is padding.

    `lengths` counts the tokens of each text, from 1 up to pos: a text of length 3 has its last token at position 2.
    """
    rows = torch.arange(len(lengths), device=logits.device)
    return logits[rows, lengths - 1]


def gather_logprobs(
    logprobs: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """The log-probability that was given to each token: entry [batch, pos] is logprobs[batch, pos, tokens[batch, pos]].

    `logprobs` and `tokens` are aligned already: to ask about the *next* token, shift before the call.
    """
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def mean_where(values: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """For each text, the mean of the values where the mask is True; every text has at least one.

    The other values do not matter, whatever they are: padding may hold inf or NaN.
    """
    return values.masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1)


def add_at_position(
    resid: Float[Tensor, "batch pos d_model"], direction: Float[Tensor, " d_model"], pos: int
) -> Float[Tensor, "batch pos d_model"]:
    """A residual stream with `direction` added at one position, in every text; everything else is as in `resid`.

    `pos` may be negative: -1 is the last position. `resid` itself is left unchanged.
    """
    steered = resid.clone()
    steered[:, pos] += direction
    return steered


def diagonal_mean(pattern: Float[Tensor, "... query key"], offset: int) -> Float[Tensor, "..."]:
    """The mean weight on one diagonal of every attention pattern: over all [query, key] with key = query + offset.

    Offset 0 is the main diagonal (each position looks at itself), -1 the one below it (each looks at the position
    before). The mean is over the entries that exist: a 5 by 5 pattern has four at offset -1.
    """
    return pattern.diagonal(offset, dim1=-2, dim2=-1).mean(dim=-1)


def split_heads(resid: Float[Tensor, "batch pos d_model"], n_heads: int) -> Float[Tensor, "batch pos head d_head"]:
    """Cut every vector into `n_heads` equal pieces: head 0 gets its first d_head numbers, head 1 the next, and so on.

    `n_heads` divides d_model, and d_head is the quotient.
    """
    return einops.rearrange(resid, "batch pos (head d_head) -> batch pos head d_head", head=n_heads)


def merge_heads(z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
    """Put the heads' pieces side by side again, head 0 first: what `split_heads` cut, this joins."""
    return einops.rearrange(z, "batch pos head d_head -> batch pos (head d_head)")


def repeat_prompts(tokens: Int[Tensor, "batch pos"], n_samples: int) -> Int[Tensor, "row pos"]:
    """Every prompt `n_samples` times, so that several stories can be drawn from each.

    The copies of one prompt stand together: first all of prompt 0, then all of prompt 1, and so on.
    """
    return einops.repeat(tokens, "batch pos -> (batch sample) pos", sample=n_samples)


def average_values(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """What each head gathers for each query: the sum of its values over all keys, each times its weight in the pattern.

    The weights of a query already sum to 1, so the sum is a weighted mean.
    """
    return einops.einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")


def cosine_similarity_matrix(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector other"]:
    """The cosine of the angle between every two vectors: their dot product, divided by both of their lengths.

    A vector of zeros has no direction: its cosine with every vector, itself included, is 0.
    """
    lengths = vectors.norm(dim=-1, keepdim=True)
    directions = vectors / lengths.clamp(min=1e-12)
    return directions @ directions.T


def log_softmax(logits: Float[Tensor, "... d_vocab"]) -> Float[Tensor, "... d_vocab"]:
    """The logarithm of the softmax over the vocabulary: logits - log(sum(exp(logits))), for each position on its own.

    Right for logits of any size: exp(1000) is inf, and exp(-1000) is 0, but neither may spoil the result. A logit of
    -inf (a token that is forbidden) gives -inf; at least one logit of each position is finite.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def cross_entropy(logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """The loss of a language model: the mean of -log p(target) over all positions of all texts, in nats.

    `logits` and `targets` are aligned: targets[batch, pos] is the token that the logits at [batch, pos] should predict.
    """
    return -gather_logprobs(log_softmax(logits), targets).mean()


def cross_entropy_gradient(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """The gradient of `cross_entropy` with respect to the logits, by its formula, without autograd.

    The probability of each token, minus 1 where that token is the target; all of it divided by the number of targets,
    since the loss is a mean over them.
    """
    is_target = nn.functional.one_hot(targets, logits.shape[-1])
    return (logits.softmax(dim=-1) - is_target) / targets.numel()


def gradient_by_backward(fn: Callable[[Tensor], Tensor], at: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """How fast fn(at), a single number, changes with each of the numbers in `at`; worked out by `backward`.

    `at` stays as it is in every respect: if it did not record gradients, it does not do so afterwards, and its own
    `.grad`, if it has one, is neither changed nor part of the answer. The answer records no gradients.
    """
    leaf = at.detach().requires_grad_()
    fn(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


class Bigram(nn.Module):
    """A language model that looks at one token: the logits of the next token depend on the current one alone.

    Its one parameter is `table`, with d_vocab rows and d_vocab columns: row i holds the logits of what follows token i.
    It starts as zeros, so that no token is preferred.
    """

    def __init__(self, d_vocab: int) -> None:
        """Call `super().__init__()`, then make the parameter."""
        super().__init__()
        self.table = nn.Parameter(torch.zeros(d_vocab, d_vocab))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits after each token; not probabilities. Dtype and device are the parameter's."""
        return self.table[tokens]
