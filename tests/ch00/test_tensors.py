"""Chapter 00's checks against mistakes that learners make, and right answers written another way.

Each mistake returns the right type, shape and dtype (or a wrong shape whose cause is known), and must be refused with
its promised words. Those marked `surprise` are absent from the check's own list of known mistakes.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import solutions.ch00_tensors as ref
from course_utils.checks import CheckFailed, find_checks, run_check
from course_utils.checks.running import run_once
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_refused
from tests.support.mutation import survivors

CHECKS = find_checks()["00"]
INF = torch.inf


MISTAKES: list[Mistake] = []
ALSO_RIGHT: dict[str, dict[str, Callable[..., Any]]] = {}


def mistake(exercise: str, words: str, answer: Callable[..., Any], surprise: bool = False) -> None:
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


def also_right(exercise: str, how: str, answer: Callable[..., Any]) -> None:
    ALSO_RIGHT.setdefault(exercise, {})[how] = answer


# ------------------------------------------------------------------------------------------------------ broadcasting

place = torch.arange
mistake("relative_positions", "it is key - query", lambda n: place(n) - place(n)[:, None])
mistake("relative_positions", "the sign is lost", lambda n: (place(n)[:, None] - place(n)).abs())
mistake("relative_positions", "the future is set to 0", lambda n: (place(n)[:, None] - place(n)).relu())
mistake("relative_positions", "values are wrong", lambda n: place(n)[:, None] - place(n) + 1, surprise=True)
mistake("relative_positions", "expected dtype int64, got float32", lambda n: (place(n)[:, None] - place(n)).float())
mistake("relative_positions", "wrong shape", lambda n: place(n) - place(n))
also_right("relative_positions", "meshgrid", lambda n: torch.sub(*torch.meshgrid(place(n), place(n), indexing="ij")))
also_right("relative_positions", "rows", lambda n: torch.stack([query - place(n) for query in range(n)]))

mistake("centre_vectors", "the mean runs over the positions", lambda resid: resid - resid.mean(1, keepdim=True))
mistake("centre_vectors", "the mean runs over the batch", lambda resid: resid - resid.mean(0))
mistake("centre_vectors", "one mean is taken of the whole tensor", lambda resid: resid - resid.mean())
mistake("centre_vectors", "one mean is taken per text", lambda resid: resid - resid.mean((1, 2), keepdim=True))
mistake("centre_vectors", "divided by their deviation", lambda resid: F.layer_norm(resid, resid.shape[-1:], eps=0.0))
mistake("centre_vectors", "the first text's means", lambda resid: resid - resid[:1].mean(-1, keepdim=True))
mistake(
    "centre_vectors",
    "values are wrong",
    lambda resid: resid - resid.median(-1, keepdim=True).values,
    surprise=True,
)
mistake(
    "centre_vectors",
    "values are wrong",
    lambda resid: resid - resid.sum(-1, keepdim=True) / (resid.shape[-1] - 1),
    surprise=True,
)
also_right("centre_vectors", "einops", lambda resid: resid - einops.reduce(resid, "b p d -> b p 1", "mean"))
also_right(
    "centre_vectors",
    "a projection",
    lambda resid: resid @ (torch.eye(resid.shape[-1]) - 1 / resid.shape[-1]).to(resid),
)

mistake("batched_outer", "numbers are added", lambda a, b: a[:, :, None] + b[:, None])
mistake(
    "batched_outer",
    "the first item's numbers",
    lambda a, b: (a[:1, :, None] * b[:1, None]).expand(len(a), -1, -1),
)
mistake("batched_outer", "rows and columns are swapped", lambda a, b: b[:, :, None] * a[:, None])
mistake("batched_outer", "summed over the batch", lambda a, b: a.T @ b)
mistake("batched_outer", "every item of `a` meets every item of `b`", lambda a, b: torch.einsum("ir,jc->ijrc", a, b))
mistake(
    "batched_outer",
    "the batch of `b` is lined up with the rows of `a`",
    lambda a, b: a[:, :, None] * (b if a.shape == b.shape else b[:, None]),  # as it is: an error elsewhere
)
mistake(
    "batched_outer",
    "All of the wrong values are at batch=1",
    lambda a, b: a[:, :, None] * torch.cat([b[:1], b[1:].flip(1)])[:, None],
    surprise=True,
)
mistake("batched_outer", "values are wrong", lambda a, b: a[:, :, None] * b[:, None].softmax(-1), surprise=True)
also_right("batched_outer", "einsum", lambda a, b: torch.einsum("br,bc->brc", a, b))
also_right("batched_outer", "matmul", lambda a, b: a.unsqueeze(-1) @ b.unsqueeze(-2))
also_right("batched_outer", "a loop", lambda a, b: torch.stack([torch.outer(x, y) for x, y in zip(a, b, strict=True)]))

# ---------------------------------------------------------------------------------------------------------- indexing

mistake("logits_at_end", "the last position is read", lambda logits, lengths: logits[:, -1])
mistake(
    "logits_at_end",
    "one position too far",
    lambda logits, lengths: logits[place(len(lengths)), lengths.clamp(max=logits.shape[1] - 1)],
)
mistake("logits_at_end", "where the first one ends", lambda logits, lengths: logits[:, lengths[0] - 1])
mistake("logits_at_end", "every row is of the first text", lambda logits, lengths: logits[0, lengths - 1])
mistake("logits_at_end", "pair each row with its own position", lambda logits, lengths: logits[:, lengths - 1])
mistake(
    "logits_at_end",
    "All of the wrong values are at batch=2",
    lambda logits, lengths: logits[place(len(lengths)), (lengths - 1).clamp(min=1)],
    surprise=True,
)
mistake(
    "logits_at_end",
    "values are wrong",
    lambda logits, lengths: torch.stack([row[:n].mean(0) for row, n in zip(logits, lengths, strict=True)]),
    surprise=True,
)
also_right(
    "logits_at_end",
    "a loop",
    lambda logits, lengths: torch.stack([row[n - 1] for row, n in zip(logits, lengths.tolist(), strict=True)]),
)
also_right(
    "logits_at_end",
    "gather",
    lambda logits, lengths: logits.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, logits.shape[-1])).squeeze(1),
)


def gathered(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[..., None])[..., 0]


mistake("gather_logprobs", "shifted by one position", lambda lp, tokens: gathered(lp, tokens.roll(-1, 1)))
mistake("gather_logprobs", "the first text's tokens", lambda lp, tokens: gathered(lp, tokens[:1].expand_as(tokens)))
mistake("gather_logprobs", "probabilities are returned", lambda lp, tokens: gathered(lp, tokens).exp())
mistake("gather_logprobs", "the largest is taken", lambda lp, tokens: lp.max(-1).values)
mistake(
    "gather_logprobs", "removes every axis of size 1", lambda lp, tokens: lp.gather(-1, tokens[..., None]).squeeze()
)
mistake("gather_logprobs", "an axis of size 1 is left", lambda lp, tokens: lp.gather(-1, tokens[..., None]))
mistake("gather_logprobs", "every token is looked up at every position", lambda lp, tokens: lp[:, :, tokens])
mistake(
    "gather_logprobs",
    "values are wrong",
    lambda lp, tokens: lp.gather(1, (tokens % tokens.shape[1])[..., None]).squeeze(-1),  # the positions' axis
    surprise=True,
)
mistake(
    "gather_logprobs",
    "All of the wrong values are at batch=1",
    lambda lp, tokens: gathered(lp[:1].expand_as(lp), tokens),
    surprise=True,
)
also_right(
    "gather_logprobs",
    "one-hot",
    lambda lp, tokens: (lp * F.one_hot(tokens, lp.shape[-1])).sum(-1),
)
also_right(
    "gather_logprobs",
    "three indices",
    lambda lp, tokens: lp[place(len(tokens))[:, None], place(tokens.shape[1]), tokens],
)

mistake("mean_where", "divided by the number of positions", lambda values, mask: values.where(mask, 0.0).mean(-1))
mistake("mean_where", "not divided", lambda values, mask: values.where(mask, 0.0).sum(-1))
mistake("mean_where", "one mean is taken over all texts", lambda values, mask: values[mask].mean().expand(len(values)))
mistake("mean_where", "the mask is ignored", lambda values, mask: values.mean(-1))
mistake("mean_where", "where the mask is False", lambda values, mask: ref.mean_where(values, ~mask))
mistake("mean_where", "0 times inf", lambda values, mask: (values * mask).sum(-1) / mask.sum(-1))
mistake("mean_where", "the mean runs over the texts", lambda values, mask: ref.mean_where(values.T, mask.T))
mistake(
    "mean_where",
    "mean_where: 2 of 2 values are wrong",
    lambda values, mask: values.where(mask, 0.0).sum(-1) / mask.sum() * len(mask),  # as many in each text
    surprise=True,
)
mistake(
    "mean_where",
    "All of the wrong values are at batch=0",
    lambda values, mask: values.where(mask, -INF).amax(-1),
    surprise=True,
)
also_right("mean_where", "nanmean", lambda values, mask: values.masked_fill(~mask, torch.nan).nanmean(-1))
also_right(
    "mean_where",
    "a loop",
    lambda values, mask: torch.stack([row[kept].mean() for row, kept in zip(values, mask, strict=True)]),
)


def at_one(resid: Tensor, pos: int) -> Tensor:
    """[pos 1], 1 at the position."""
    return F.one_hot(torch.tensor(pos % resid.shape[1]), resid.shape[1])[:, None].to(resid)


def add_in_place(resid: Tensor, direction: Tensor, pos: int) -> Tensor:
    view = resid[:, pos]
    view += direction
    return resid


def add_to_row(resid: Tensor, direction: Tensor, pos: int) -> Tensor:
    steered = resid.clone()
    steered[pos % len(resid)] += direction
    return steered


mistake("add_at_position", "it changed `resid` in place", add_in_place)
mistake("add_at_position", "at every position", lambda resid, direction, pos: resid + direction)
mistake("add_at_position", "takes the place", lambda r, d, pos: r * (1 - at_one(r, pos)) + at_one(r, pos) * d)
mistake("add_at_position", "is subtracted", lambda r, d, pos: r - at_one(r, pos) * d)
mistake("add_at_position", "`pos` chooses a text", add_to_row)
mistake(
    "add_at_position",
    "nothing is added; `pos` may be negative",
    lambda r, d, pos: r + (place(r.shape[1]) == pos)[:, None] * d,
)
mistake("add_at_position", "only the vectors at that position", lambda r, d, pos: r[:, pos] + d)
mistake("add_at_position", "values are wrong", lambda r, d, pos: r + at_one(r, pos).cumsum(0) * d, surprise=True)
mistake(
    "add_at_position",
    "values are wrong",
    lambda r, d, pos: r + at_one(r, pos - 1) * d,
    surprise=True,
)
also_right("add_at_position", "one-hot", lambda r, d, pos: r + at_one(r, pos) * d)
also_right(
    "add_at_position",
    "index_add",
    lambda r, d, pos: r.index_add(1, torch.tensor([pos % r.shape[1]]), d.expand(len(r), 1, -1)),
)


def on_diagonal(pattern: Tensor, offset: int) -> Tensor:
    n_query, n_key = pattern.shape[-2:]
    return place(n_key) == place(n_query)[:, None] + offset


mistake("diagonal_mean", "the other side's diagonal", lambda p, offset: ref.diagonal_mean(p, -offset))
mistake("diagonal_mean", "the other side's diagonal", lambda p, offset: ref.diagonal_mean(p.mT, offset))
mistake("diagonal_mean", "the main diagonal is read", lambda p, offset: ref.diagonal_mean(p, 0))
mistake(
    "diagonal_mean",
    "divided by the number of queries",
    lambda p, offset: (p * on_diagonal(p, offset)).sum(-1).mean(-1),
)
mistake(
    "diagonal_mean",
    "take their mean",
    lambda p, offset: (p * on_diagonal(p, offset)).sum((-1, -2)),
)
mistake("diagonal_mean", "the mean is over the whole pattern", lambda p, offset: p.mean((-1, -2)))
mistake("diagonal_mean", "each pattern has its own", lambda p, offset: ref.diagonal_mean(p, offset).mean())
mistake("diagonal_mean", "query and key are the last two", lambda p, offset: p.diagonal(offset).mean(-1))
mistake("diagonal_mean", "the weights themselves", lambda p, offset: p.diagonal(offset, dim1=-2, dim2=-1))
mistake("diagonal_mean", "values are wrong", lambda p, offset: ref.diagonal_mean(p, offset - 1), surprise=True)
mistake(
    "diagonal_mean",
    "values are wrong",
    lambda p, offset: ref.diagonal_mean(p.flip(-1), offset),  # the anti-diagonal
    surprise=True,
)
mistake(
    "diagonal_mean",
    "values are wrong",
    lambda p, offset: ref.diagonal_mean(p[..., :-1, :-1], offset),  # as if the last entry did not count
    surprise=True,
)
also_right(
    "diagonal_mean",
    "a table of booleans",
    lambda p, offset: (p * on_diagonal(p, offset)).sum((-1, -2)) / on_diagonal(p, offset).sum(),
)
also_right(
    "diagonal_mean",
    "a loop over entries",
    lambda p, offset: torch.stack(
        [p[..., q, q + offset] for q in range(p.shape[-2]) if 0 <= q + offset < p.shape[-1]]
    ).mean(0),
)

# ------------------------------------------------------------------------------------------------------------ einops


def cut(resid: Tensor, n_heads: int) -> Tensor:
    """The view that mixes positions and heads."""
    batch, pos, d_model = resid.shape
    return resid.reshape(batch, n_heads, pos, d_model // n_heads)


mistake("split_heads", "mixes positions and heads", lambda resid, n: cut(resid, n).transpose(1, 2))
mistake("split_heads", "mixes positions and heads", cut)
mistake("split_heads", "every n_heads-th number", lambda r, n: einops.rearrange(r, "b p (d h) -> b p h d", h=n))
mistake("split_heads", "the heads stand before the positions", lambda r, n: ref.split_heads(r, n).transpose(1, 2))
mistake("split_heads", "values are wrong", lambda r, n: ref.split_heads(r, n).flip(2), surprise=True)
mistake(
    "split_heads",
    "values are wrong",
    lambda r, n: einops.rearrange(r, "b p m -> p b m").reshape(*r.shape[:2], n, -1),
    surprise=True,
)
mistake("split_heads", "expected (batch=2, pos=5, head=3, d_head=4)", lambda r, n: r.unflatten(-1, (-1, n)))
also_right("split_heads", "a view", lambda r, n: r.view(*r.shape[:2], n, r.shape[-1] // n))
also_right("split_heads", "slices", lambda r, n: torch.stack(r.chunk(n, dim=-1), dim=-2))

mistake("merge_heads", "positions and heads are mixed", lambda z: z.transpose(1, 2).reshape(*z.shape[:2], -1))
mistake("merge_heads", "take turns", lambda z: einops.rearrange(z, "b p h d -> b p (d h)"))
mistake("merge_heads", "the heads are summed", lambda z: z.sum(2))
mistake("merge_heads", "positions are joined with the heads", lambda z: z.flatten(1, 2))
mistake("merge_heads", "values are wrong", lambda z: z.flip(2).flatten(2), surprise=True)
mistake("merge_heads", "All of the wrong values are at batch=1", lambda z: z[:1].expand_as(z).flatten(2), surprise=True)
also_right("merge_heads", "a view", lambda z: z.reshape(*z.shape[:2], -1))
also_right("merge_heads", "cat", lambda z: torch.cat(z.unbind(2), dim=-1))

mistake("repeat_prompts", "the whole batch is repeated", lambda tokens, n: tokens.repeat(n, 1))
mistake("repeat_prompts", "only the first prompt", lambda tokens, n: tokens[:1].repeat(n * len(tokens), 1))
mistake("repeat_prompts", "grow longer", lambda tokens, n: tokens.repeat(1, n))
mistake("repeat_prompts", "every token is repeated", lambda tokens, n: tokens.repeat_interleave(n, dim=1))
mistake("repeat_prompts", "an axis of their own", lambda tokens, n: tokens[:, None].repeat(1, n, 1))
mistake(
    "repeat_prompts",
    "values are wrong",
    lambda tokens, n: tokens.flip(0).repeat_interleave(n, dim=0),
    surprise=True,
)
mistake(
    "repeat_prompts",
    "values are wrong",
    lambda tokens, n: torch.cat([tokens, tokens[-1:].repeat((n - 1) * len(tokens), 1)]),
    surprise=True,
)
also_right("repeat_prompts", "repeat_interleave", lambda tokens, n: tokens.repeat_interleave(n, dim=0))
also_right("repeat_prompts", "expand", lambda tokens, n: tokens[:, None].expand(-1, n, -1).flatten(0, 1))

# ------------------------------------------------------------------------------------------------------------ einsum


def mixed(pattern: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


mistake(
    "average_values",
    "the sum runs over the queries",
    lambda pattern, v: mixed(pattern.mT if pattern.shape[-1] == pattern.shape[-2] else pattern, v),
)
mistake("average_values", "divided by the number of keys", lambda pattern, v: mixed(pattern, v) / v.shape[1])
mistake("average_values", "the softmax is taken once more", lambda pattern, v: mixed(pattern.softmax(-1), v))
mistake(
    "average_values",
    "the pattern is ignored",
    lambda pattern, v: v.mean(1, True).expand(-1, pattern.shape[2], -1, -1),
)
mistake("average_values", "the heads are summed", lambda pattern, v: torch.einsum("bhqk,bkhd->bqd", pattern, v))
mistake(
    "average_values",
    "the values of all heads are summed",
    lambda pattern, v: torch.einsum("bhqk,bkgd->bqhd", pattern, v),  # g: a letter too many
)
mistake("average_values", "in another order: (batch, head, query, d_head)", lambda p, v: p @ v.transpose(1, 2))
mistake("average_values", "values are wrong", lambda p, v: mixed(p.flip(1), v), surprise=True)
mistake("average_values", "values are wrong", lambda p, v: mixed(p.tril(), v), surprise=True)
also_right("average_values", "matmul", lambda pattern, v: (pattern @ v.transpose(1, 2)).transpose(1, 2))
also_right(
    "average_values",
    "broadcasting",
    lambda pattern, v: (pattern.permute(0, 2, 3, 1)[..., None] * v[:, None]).sum(2),
)


def scaled(vectors: Tensor, by: Tensor) -> Tensor:
    return (vectors / by) @ (vectors / by).T


mistake("cosine_similarity_matrix", "not divided by the lengths", lambda v: v @ v.T)
mistake("cosine_similarity_matrix", "one of the two lengths only", lambda v: v @ F.normalize(v, dim=-1).T)
mistake(
    "cosine_similarity_matrix", "lack their root", lambda v: v / v.pow(2).sum(1, True) @ (v / v.pow(2).sum(1, True)).T
)
mistake("cosine_similarity_matrix", "over the vectors", lambda v: F.normalize(v, dim=0) @ F.normalize(v, dim=0).T)
mistake("cosine_similarity_matrix", "one length is taken of all", lambda v: v / v.norm() @ (v / v.norm()).T)
mistake("cosine_similarity_matrix", "that is their correlation", lambda v: torch.corrcoef(v))
mistake(
    "cosine_similarity_matrix",
    "0/0 is NaN",
    lambda v: v / v.norm(dim=1, keepdim=True) @ (v / v.norm(dim=1, keepdim=True)).T,
)
mistake("cosine_similarity_matrix", "the sign is lost", lambda v: ref.cosine_similarity_matrix(v).abs())
mistake(
    "cosine_similarity_matrix",
    "values are wrong",
    lambda v: F.normalize(v, dim=-1, p=1) @ F.normalize(v, dim=-1, p=1).T,  # lengths as sums of sizes
    surprise=True,
)
mistake(
    "cosine_similarity_matrix",
    "1 of 16 values is wrong",
    lambda v: ref.cosine_similarity_matrix(v).fill_diagonal_(1.0),  # a vector of zeros is like itself
    surprise=True,
)
mistake(
    "cosine_similarity_matrix",
    "values are wrong",
    lambda v: F.normalize(v, dim=-1, eps=1.0) @ F.normalize(v, dim=-1, eps=1.0).T,  # short vectors stay short
    surprise=True,
)
also_right("cosine_similarity_matrix", "torch's own", lambda v: F.cosine_similarity(v[:, None], v[None], dim=-1))
also_right(
    "cosine_similarity_matrix",
    "nan_to_num",
    lambda v: (v @ v.T / (v.norm(dim=1) * v.norm(dim=1)[:, None])).nan_to_num(),
)

# ---------------------------------------------------------------------------------------------- numbers that overflow


def naive(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(-1, keepdim=True).log()


mistake("log_softmax", "exp overflows to inf", naive)
mistake("log_softmax", "exp overflows before the quotient", lambda x: (x.exp() / x.exp().sum(-1, keepdim=True)).log())
mistake("log_softmax", "small probabilities are rounded to 0", lambda logits: logits.softmax(-1).log())
mistake("log_softmax", "each position has its own maximum", lambda logits: naive(logits - logits.max()))
mistake("log_softmax", "runs over the positions", lambda logits: logits.log_softmax(max(-2, -logits.ndim)))
mistake("log_softmax", "runs over the batch", lambda logits: logits.log_softmax(0))
mistake("log_softmax", "these are probabilities", lambda logits: logits.softmax(-1))
mistake("log_softmax", "the mean of exp", lambda logits: logits - logits.exp().mean(-1, keepdim=True).log())
mistake("log_softmax", "base 2", lambda logits: logits.log_softmax(-1) / torch.tensor(2.0).log())
mistake("log_softmax", "not brought back by a logarithm", lambda logits: logits - logits.exp().sum(-1, keepdim=True))
mistake(
    "log_softmax",
    "of logits up to 1000",
    lambda logits: naive(logits.clamp(-80, 80)),
    surprise=True,
)
mistake("log_softmax", "of logits 1000 apart", lambda logits: (logits.softmax(-1) + 1e-30).log(), surprise=True)
mistake(
    "log_softmax",
    "with -inf among the logits",
    lambda logits: logits.nan_to_num(neginf=-1e4).log_softmax(-1),
    surprise=True,
)
also_right("log_softmax", "logsumexp", lambda logits: logits - logits.logsumexp(-1, keepdim=True))
also_right("log_softmax", "torch's own", lambda logits: torch.log_softmax(logits, dim=-1))
also_right("log_softmax", "the mean is no maximum, but float64", lambda x: naive(x.double() - x.amax(-1, True)).to(x))


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return -gathered(logits.log_softmax(-1), targets)


mistake("cross_entropy", "the losses are summed; take", lambda logits, targets: losses(logits, targets).sum())
mistake("cross_entropy", "summed over each text", lambda logits, targets: losses(logits, targets).sum(1).mean())
mistake("cross_entropy", "the minus is left out", lambda logits, targets: -losses(logits, targets).mean())
mistake("cross_entropy", "each text has a mean of its own", lambda logits, targets: losses(logits, targets).mean(-1))
mistake("cross_entropy", "each position has a mean of its own", lambda x, t: losses(x, t).mean(0))
mistake("cross_entropy", "over the whole vocabulary", lambda logits, targets: -logits.log_softmax(-1).mean())
mistake(
    "cross_entropy", "the softmax is taken twice", lambda logits, targets: losses(logits.softmax(-1), targets).mean()
)
mistake("cross_entropy", "without a softmax", lambda logits, targets: -gathered(logits, targets).mean())
mistake("cross_entropy", "the softmax runs over the positions", lambda x, t: -gathered(x.log_softmax(1), t).mean())
mistake("cross_entropy", "before the logarithm", lambda x, t: -gathered(x.softmax(-1), t).mean().log())
mistake("cross_entropy", "aligned already", lambda x, t: losses(x[:, :-1], t[:, 1:]).mean())
mistake("cross_entropy", "only the first text counts", lambda x, t: losses(x[:1], t[:1]).mean())
mistake("cross_entropy", "exp overflows", lambda x, t: -gathered(naive(x), t).mean())
mistake("cross_entropy", "small probabilities are rounded to 0", lambda x, t: -gathered(x.softmax(-1).log(), t).mean())
mistake("cross_entropy", "no gradient reaches `logits`", lambda x, t: losses(x.data, t).mean(), surprise=True)
mistake("cross_entropy", "expected", lambda x, t: losses(x, t).median(), surprise=True)
mistake("cross_entropy", "expected", lambda x, t: losses(x, t)[:, 1:].mean(), surprise=True)
mistake("cross_entropy", "of logits up to 1000", lambda x, t: losses(x.clamp(-90, 90), t).mean(), surprise=True)
also_right("cross_entropy", "torch's own", lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten()))
also_right("cross_entropy", "torch's own, moved axes", lambda x, t: F.cross_entropy(x.transpose(1, 2), t))
also_right("cross_entropy", "logsumexp", lambda x, t: (x.logsumexp(-1) - gathered(x, t)).mean())

# ---------------------------------------------------------------------------------------------------------- gradients


def hot(logits: Tensor, targets: Tensor) -> Tensor:
    return F.one_hot(targets, logits.shape[-1]).to(logits)


def slope(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.softmax(-1) - hot(logits, targets)


mistake("cross_entropy_gradient", "not divided by the number of targets", slope)
mistake("cross_entropy_gradient", "divided by the number of texts", lambda x, t: slope(x, t) / len(x))
mistake("cross_entropy_gradient", "divided by the number of positions", lambda x, t: slope(x, t) / x.shape[1])
mistake("cross_entropy_gradient", "divided by the number of logits", lambda x, t: slope(x, t) / x.numel())
mistake("cross_entropy_gradient", "the sign is changed", lambda x, t: -slope(x, t) / t.numel())
mistake("cross_entropy_gradient", "nothing is subtracted", lambda x, t: x.softmax(-1) / t.numel())
mistake("cross_entropy_gradient", "not made into probabilities", lambda x, t: (x - hot(x, t)) / t.numel())
mistake("cross_entropy_gradient", "after the division", lambda x, t: x.softmax(-1) / t.numel() - hot(x, t))
mistake("cross_entropy_gradient", "over the positions", lambda x, t: (x.softmax(1) - hot(x, t)) / t.numel())
mistake(
    "cross_entropy_gradient",
    "expected",
    lambda x, t: (x.exp() / x.exp().sum(-1, keepdim=True) - hot(x, t)) / t.numel(),
    surprise=True,
)
mistake(
    "cross_entropy_gradient",
    "values are wrong",
    lambda x, t: slope(x, t) * (1 - hot(x, t)) / t.numel(),  # nothing at the targets
    surprise=True,
)
also_right(
    "cross_entropy_gradient",
    "autograd",
    lambda x, t: torch.func.grad(lambda y: F.cross_entropy(y.flatten(0, 1), t.flatten()))(x),
)
also_right(
    "cross_entropy_gradient",
    "a copy written into",
    lambda x, t: x.softmax(-1).scatter_add(-1, t[..., None], -torch.ones_like(x[..., :1])) / t.numel(),
)


def on_itself(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at.requires_grad_()
    fn(at).backward()
    assert at.grad is not None
    return at.grad


def reused(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Its own leaf, but in the place of the one that came."""
    leaf = at if at.requires_grad else at.clone().requires_grad_()
    fn(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad.clone()


def copied(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor | None:
    """A copy of what records gradients: no leaf, so that its `.grad` stays empty."""
    copy = at.clone().requires_grad_()
    fn(copy).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.grad


def put_back(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The right answer, and `.grad` thrown away."""
    answer = ref.gradient_by_backward(fn, at)
    at.grad = None
    return answer


def with_history(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(fn(leaf), leaf, create_graph=True)
    return gradient


def by_differences(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    step = 0.1 * torch.eye(at.numel()).to(at).reshape(-1, *at.shape)
    return torch.stack([(fn(at + s) - fn(at)) / 0.1 for s in step]).reshape(at.shape).detach()


mistake("gradient_by_backward", "`at` itself records gradients afterwards", on_itself)
mistake("gradient_by_backward", "backward adds to it", reused)
mistake("gradient_by_backward", "that was changed", put_back)
mistake("gradient_by_backward", "cut the history before", copied)
mistake("gradient_by_backward", "the answer records gradients itself", with_history)
mistake("gradient_by_backward", "its sign is changed", lambda fn, at: -ref.gradient_by_backward(fn, at))
mistake("gradient_by_backward", "the value of the function", lambda fn, at: fn(at))
mistake(
    "gradient_by_backward",
    "the sum became a mean",
    lambda fn, at: ref.gradient_by_backward(fn, at) / at.numel(),
)
mistake("gradient_by_backward", "values are wrong", by_differences, surprise=True)
mistake(
    "gradient_by_backward",
    "values are wrong",
    lambda fn, at: F.normalize(ref.gradient_by_backward(fn, at), dim=-1),
    surprise=True,
)
also_right("gradient_by_backward", "torch.func", lambda fn, at: torch.func.grad(fn)(at.detach()))
also_right(
    "gradient_by_backward",
    "autograd.grad",
    lambda fn, at: torch.autograd.grad(fn(leaf := at.clone().detach().requires_grad_()), leaf)[0],
)


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(
        CHECKS[mistake.exercise],
        mistake,
        secrets=("your code raised", "einsum(", "rearrange(", "gather("),
    )


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize(
    ("exercise", "how"), [(exercise, how) for exercise, answers in ALSO_RIGHT.items() for how in answers]
)
def test_another_right_answer_passes(exercise: str, how: str) -> None:
    run_check(CHECKS[exercise], ALSO_RIGHT[exercise][how])


def test_every_exercise_has_another_right_answer() -> None:
    assert set(ALSO_RIGHT) == set(CHECKS)


def spoils(exercise: str) -> dict[str, Callable[..., Any]]:
    """The reference, with something wrong about what it returns or leaves behind; by the words of the refusal."""
    right = getattr(ref, exercise)

    def writes(*inputs: Any) -> Any:
        answer = right(*(value.clone() if isinstance(value, Tensor) else value for value in inputs)).clone()
        first = next(value for value in inputs if isinstance(value, Tensor))
        with torch.no_grad():
            first += 1
        return answer

    spoiled = {
        "returned None": lambda *inputs: None,
        "expected a Tensor, got a list": lambda *inputs: right(*inputs).tolist() or [],
        "wrong shape": lambda *inputs: right(*inputs)[None],
        "expected dtype": lambda *inputs: right(*inputs).to(torch.float16),
        "in place": writes,
    }
    if exercise == "relative_positions":
        del spoiled["in place"]
    if exercise == "cross_entropy":  # a bare number
        spoiled["expected a Tensor, got a float"] = spoiled.pop("expected a Tensor, got a list")
    return spoiled


@pytest.mark.parametrize("exercise", CHECKS)
def test_what_is_wrong_everywhere(exercise: str) -> None:
    for words, answer in spoils(exercise).items():
        with pytest.raises(CheckFailed, match=words):
            run_once(CHECKS[exercise], answer)


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    answer = getattr(ref, exercise)
    run_check(CHECKS[exercise], answer)  # torch warms up
    start = time.perf_counter()
    run_check(CHECKS[exercise], answer)
    assert time.perf_counter() - start < 1.0  # 50 ms is the aim; machines that run the suite are busy


# ------------------------------------------------------------------------------- the reference, from other sides


@settings(max_examples=50, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), seed=st.integers(0, 99))
def test_heads_are_merged_as_they_were_split(sizes: tuple[int, int, int, int], seed: int) -> None:
    z = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ref.split_heads(ref.merge_heads(z), sizes[2]), z)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
def test_log_softmax_sums_to_one_and_does_not_mind_a_shift(shift: float, seed: int) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs = ref.log_softmax(logits + shift)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(logprobs, ref.log_softmax(logits), rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 99))
def test_the_two_gradients_agree(sizes: tuple[int, int, int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(sizes, generator=rng, dtype=torch.float64)
    targets = torch.randint(sizes[-1], sizes[:2], generator=rng)
    by_backward = ref.gradient_by_backward(lambda at: ref.cross_entropy(at, targets), logits)
    torch.testing.assert_close(ref.cross_entropy_gradient(logits, targets), by_backward)


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {"-1 -> 1"}  # of two axes, the last


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device=") <= STILL_RIGHT
