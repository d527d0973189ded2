"""Chapter 00: is each tensor right, whatever way it was made?

Oracles are loops that spell the definition out, torch's own functions, and autograd. Sizes are odd and all different,
but for a few cases in which equal sizes, or a batch of one, let a mistake through that is refused elsewhere.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind, strided
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed

Fn = Callable[..., Any]
RESID, LOGITS, HEADS = "batch pos d_model", "batch pos d_vocab", "batch pos head d_head"
INF = torch.inf
ALL = slice(None)


def follows_both(name: str, fn: Fn, inputs: tuple[Any, ...], axes: str) -> None:
    """Dtype and device come from the inputs; how they lie in memory makes no difference."""
    follows_input(name, fn, inputs, axes)
    follows_every_kind(name, fn, inputs, axes)


# ------------------------------------------------------------------------------------------------------ broadcasting


def difference(n_pos: int) -> Tensor:
    """query - key, by broadcasting."""
    return torch.arange(n_pos)[:, None] - torch.arange(n_pos)


@known_mistakes(
    {
        "it is key - query; the past should be positive.": lambda n: -difference(n),
        "the sign is lost.": lambda n: difference(n).abs(),
        "the future is set to 0; it should be negative.": lambda n: difference(n).clamp(min=0),
        "query and key are added, not subtracted.": lambda n: torch.arange(n)[:, None] + torch.arange(n),
    }
)
def check_relative_positions(fn: Fn) -> None:
    """Every pair of positions, one by one."""
    for n_pos in (5, 1, 4):
        expected = torch.tensor([[query - key for key in range(n_pos)] for query in range(n_pos)])
        compare(f"relative_positions with n_pos = {n_pos}", fn(n_pos), expected, "query key")


def centred(resid: Tensor, axes: int | tuple[int, ...] = -1) -> Tensor:
    return resid - resid.mean(axes, keepdim=True)


@known_mistakes(
    {
        "the mean runs over the positions; each vector has its own, over d_model.": lambda r: centred(r, 1),
        "the mean runs over the batch; each vector has its own, over d_model.": lambda r: centred(r, 0),
        "one mean is taken of the whole tensor; each vector has its own.": lambda r: r - r.mean(),
        "one mean is taken per text; each position has its own.": lambda r: centred(r, (1, 2)),
        "the means themselves are returned; subtract them.": lambda r: r.mean(-1, True).expand_as(r),
        "the mean is added; subtract it.": lambda r: r + r.mean(-1, keepdim=True),
        "the first text's means are used for all.": lambda r: r - r[:1].mean(-1, keepdim=True),
        "the vectors are divided by their deviation as well, as LayerNorm does; only centre them.": lambda r: (
            centred(r) / r.std(-1, correction=0, keepdim=True)
        ),
        "nothing is subtracted.": lambda r: r,
    }
)
def check_centre_vectors(fn: Fn) -> None:
    """Vectors that lie around different places, so that every wrong axis shows."""
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7) + 2 * noise(n_batch, n_pos, 1, seed=1) + noise(7, seed=2)
        expected = resid.clone()
        for row in range(n_batch):
            for pos in range(n_pos):
                expected[row, pos] -= math.fsum(resid[row, pos].tolist()) / 7
        compare("centre_vectors", fn(resid), expected, RESID, inputs={"resid": resid})
    follows_both("centre_vectors", fn, (noise(2, 5, 7),), RESID)


@known_mistakes(
    {
        "numbers are added; multiply them.": lambda a, b: a[:, :, None] + b[:, None, :],
        "the first item's numbers are used for the whole batch.": (
            lambda a, b: (a[:1, :, None] * b[:1, None, :]).expand(len(a), -1, -1)
        ),
        "rows and columns are swapped: `a` chooses the row.": lambda a, b: b[:, :, None] * a[:, None, :],
        "the products are summed over the batch.": lambda a, b: a.T @ b,
        "every item of `a` meets every item of `b`; keep to the same item of the batch.": (
            lambda a, b: torch.einsum("ir,jc->ijrc", a, b)
        ),
        "the batch of `b` is lined up with the rows of `a`; it needs an axis of size 1 for the rows.": lambda a, b: (
            a[:, :, None] * b
        ),
        "the batch of `a` is lined up with the rows; it needs an axis of size 1 for the columns.": lambda a, b: (
            a * b[:, None, :]
        ),
    }
)
def check_batched_outer(fn: Fn) -> None:
    """Three times the same size, where axes that are lined up wrongly go through without an error; then others."""
    axes = "batch row column"
    for n_batch, n_row, n_column in [(3, 3, 3), (2, 3, 5), (1, 4, 2)]:
        a, b = noise(n_batch, n_row, seed=1), noise(n_batch, n_column, seed=2)
        expected = torch.empty(n_batch, n_row, n_column)
        for batch in range(n_batch):
            for row in range(n_row):
                for column in range(n_column):
                    expected[batch, row, column] = a[batch, row] * b[batch, column]
        case = f"with batch {n_batch}, {n_row} rows and {n_column} columns"
        compare(f"batched_outer {case}", fn(a, b), expected, axes)
    follows_both("batched_outer", fn, (noise(2, 3, seed=1), noise(2, 5, seed=2)), axes)


# ---------------------------------------------------------------------------------------------------------- indexing


@known_mistakes(
    {
        "the last position is read, padding or not.": lambda x, lengths: x[:, -1],
        "all texts are read where the first one ends.": lambda x, lengths: x[:, lengths[0] - 1],
        "every row is of the first text.": lambda x, lengths: x[0, lengths - 1],
        "every text is read at the ends of all; pair each row with its own position.": (
            lambda x, lengths: x[:, lengths - 1]
        ),
        "it is counted from the end of the padding.": lambda x, lengths: x[torch.arange(len(lengths)), -lengths],
        "the first position is read.": lambda x, lengths: x[:, 0],
        "it is one position too far: a text of length 3 ends at position 2.": (
            lambda x, lengths: x[torch.arange(len(lengths)), lengths]
        ),
    }
)
def check_logits_at_end(fn: Fn) -> None:
    """Texts of different lengths, one of a single token, one without padding; a token that is forbidden."""
    for lengths, forbidden in [([3, 4, 1], []), ([2, 5, 1], [6]), ([4], [0])]:
        logits, ends = noise(len(lengths), 5, 7), torch.tensor(lengths)
        logits[:, :, forbidden] = -INF
        expected = torch.stack([logits[row, length - 1] for row, length in enumerate(lengths)])
        compare("logits_at_end", fn(logits, ends), expected, "batch d_vocab")
    follows_both("logits_at_end", fn, (noise(3, 5, 7), torch.tensor([3, 4, 1])), "batch d_vocab")


def picked(values: Tensor, tokens: Tensor) -> Tensor:
    """values[batch, pos, tokens[batch, pos]], one after the other."""
    rows = zip(values.tolist(), tokens.tolist(), strict=True)
    return values.new_tensor([[vector[token] for vector, token in zip(*row, strict=True)] for row in rows])


@known_mistakes(
    {
        "the tokens are shifted by one position; they are aligned already.": lambda lp, t: picked(lp, t.roll(-1, 1)),
        "the first text's tokens are looked up in all.": lambda lp, t: picked(lp, t[:1].expand_as(t)),
        "probabilities are returned, not their logarithms.": lambda lp, t: picked(lp, t).exp(),
        "the sign is changed; log-probabilities are negative.": lambda lp, t: -picked(lp, t),
        "the largest is taken at each position, whatever the token.": lambda lp, t: lp.amax(-1),
        "an axis of size 1 is left at the end.": lambda lp, t: lp.gather(-1, t[..., None]),
        "`squeeze()` is given no axis: it removes every axis of size 1, the batch too.": (
            lambda lp, t: picked(lp, t).squeeze()
        ),
        "every token is looked up at every position; each belongs to one.": lambda lp, t: lp[:, :, t],
        "the log-probabilities are multiplied by 0 and 1: 0 times -inf is NaN. Look up the one that is asked for.": (
            lambda lp, t: (lp * one_hot(lp, t)).sum(-1)
        ),
    }
)
def check_gather_logprobs(fn: Fn) -> None:
    """Tokens that come twice, token 0, a batch of one, a single position; tokens of probability 0, asked for or not."""
    tokens = torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]])
    for rows, n_pos, forbidden in [(2, 5, []), (1, 4, []), (2, 1, []), (2, 5, [1, 8])]:
        logits = noise(rows, n_pos, 9)  # the last tokens, 7 and 8, are never asked for
        logits[:, :, forbidden] = -INF
        ids, logprobs = tokens[:rows, :n_pos], logits.log_softmax(-1)
        compare("gather_logprobs", fn(logprobs, ids), picked(logprobs, ids), "batch pos", inputs={"token": ids})
    follows_both("gather_logprobs", fn, (noise(2, 5, 7).log_softmax(-1), tokens), "batch pos")


def mean_of_kept(values: Tensor, mask: Tensor) -> Tensor:
    return values.where(mask, 0.0).sum(-1) / mask.sum(-1)


@known_mistakes(
    {
        "the sum is divided by the number of positions, not by how many are kept.": (
            lambda v, m: v.where(m, 0.0).mean(-1)
        ),
        "the sum is not divided by how many are kept.": lambda v, m: v.where(m, 0.0).sum(-1),
        "one mean is taken over all texts.": lambda v, m: v[m].mean().expand(len(v)),
        "the mean is taken where the mask is False.": lambda v, m: mean_of_kept(v, ~m),
        "the mask is ignored.": lambda v, m: v.mean(-1),
        "the first text's mask is used for all.": lambda v, m: mean_of_kept(v, m[:1].expand_as(m)),
        "the mean runs over the texts, not over the positions.": lambda v, m: mean_of_kept(v.T, m.T),
        "the values are multiplied by the mask: 0 times inf, or NaN, is NaN. Leave them out instead.": (
            lambda v, m: (v * m).sum(-1) / m.sum(-1)
        ),
    }
)
def check_mean_where(fn: Fn) -> None:
    """As many True values in no two rows; then padding that holds inf and NaN; then inf among what is kept."""
    mask = torch.tensor([[True, False, True, True, False], [False, False, False, True, False]])
    spoiled = noise(2, 5, seed=3).masked_fill(~mask, INF)
    spoiled[1, 4] = torch.nan
    infinite = noise(2, 5, seed=4)
    infinite[0, 2] = INF
    for case, values, kept in [
        ("mean_where", noise(2, 5) + 1, mask),
        ("mean_where with inf and NaN in the padding", spoiled, mask),
        ("mean_where with inf among the values that are kept", infinite, mask),
        ("mean_where with one text", noise(1, 3), torch.tensor([[True, True, True]])),
    ]:
        rows = zip(values.tolist(), kept.tolist(), strict=True)
        inside = [[value for value, keep in zip(*row, strict=True) if keep] for row in rows]
        expected = torch.tensor([math.fsum(chosen) / len(chosen) for chosen in inside])
        compare(case, fn(values, kept), expected, "batch")
    follows_both("mean_where", fn, (noise(2, 5), mask), "batch")


def with_vectors(resid: Tensor, place: Any, vectors: Tensor) -> Tensor:
    """A copy of the stream in which these vectors stand at that place."""
    copy = resid.clone()
    copy[place] = vectors
    return copy


@known_mistakes(
    {
        "the direction is added at every position.": lambda r, d, pos: r + d,
        "the direction takes the place of the vectors; add it to them.": (
            lambda r, d, pos: with_vectors(r, (ALL, pos), d)
        ),
        "the direction is subtracted.": lambda r, d, pos: with_vectors(r, (ALL, pos), r[:, pos] - d),
        "only the first text gets the direction.": lambda r, d, pos: with_vectors(r, (0, pos), r[0, pos] + d),
        "`pos` chooses a text: the first axis is the batch.": lambda r, d, pos: with_vectors(r, pos, r[pos] + d),
        "nothing is added; `pos` may be negative and count from the end.": lambda r, d, pos: (
            r + (torch.arange(r.shape[1]) == pos)[:, None] * d
        ),
        "only the vectors at that position are returned, not the whole stream.": lambda r, d, pos: r[:, pos] + d,
    }
)
def check_add_at_position(fn: Fn) -> None:
    """A position in the middle, the first, the last counted from the end."""
    direction = noise(7, seed=1)
    for n_batch, n_pos, pos in [(2, 5, 1), (2, 5, 0), (2, 5, -1), (2, 5, -5), (2, 1, 0), (1, 4, -3)]:
        resid = noise(n_batch, n_pos, 7)
        expected = resid.clone()
        for row in range(n_batch):
            expected[row, pos % n_pos] = resid[row, pos % n_pos] + direction
        actual = fn(resid, direction, pos)
        compare(f"add_at_position with pos = {pos}", actual, expected, RESID, inputs={"resid": resid})
    follows_both("add_at_position", fn, (noise(2, 5, 7), direction, 1), RESID)


def diagonal(pattern: Tensor, offset: int) -> Tensor:
    return pattern.diagonal(offset, -2, -1)


@known_mistakes(
    {
        "the other side's diagonal is read: key = query + offset, so that -1 is below the main one.": (
            lambda p, k: diagonal(p, -k).mean(-1)
        ),
        "the main diagonal is read, whatever the offset.": lambda p, k: diagonal(p, 0).mean(-1),
        "the sum is divided by the number of queries, not by the length of the diagonal.": lambda p, k: (
            diagonal(p, k).sum(-1) / p.shape[-2]
        ),
        "the sum is divided by the number of keys, not by the length of the diagonal.": lambda p, k: (
            diagonal(p, k).sum(-1) / p.shape[-1]
        ),
        "the weights are summed; take their mean.": lambda p, k: diagonal(p, k).sum(-1),
        "the mean is over the whole pattern.": lambda p, k: p.mean((-2, -1)),
        "one mean is taken over everything; each pattern has its own.": lambda p, k: diagonal(p, k).mean(),
        "the weights themselves are returned; take their mean.": diagonal,
        "the diagonal runs through the first two axes; query and key are the last two.": (
            lambda p, k: p.diagonal(k).mean(-1)
        ),
    }
)
def check_diagonal_mean(fn: Fn) -> None:
    """Both sides of the diagonal, patterns that are not square, and no, one or two axes before query and key."""
    square, wide = (2, 3, 5, 5), (3, 4, 6)
    for shape, offset in [(wide, -2), (square, -1), (square, 0), (wide, 2), ((5, 5), -3), ((1, 1, 4, 4), -3)]:
        pattern = noise(*shape).exp()
        pattern[pattern < 0.5] = 0.0  # weights may well be 0, also on the diagonal
        n_query, n_key = shape[-2:]
        places = [(q, k) for q in range(n_query) for k in range(n_key) if k == q + offset]
        total = sum((pattern[..., q, k] for q, k in places), start=torch.zeros(shape[:-2]))
        axes = " ".join(["batch", "head"][2 - len(shape[:-2]) :])
        case = f"with offset {offset} on {n_query} queries and {n_key} keys"
        compare(f"diagonal_mean {case}", fn(pattern, offset), total / len(places), axes)
    follows_both("diagonal_mean", fn, (noise(2, 3, 5, 5), -1), "batch head")


# ------------------------------------------------------------------------------------------------------------ einops


def heads_first(resid: Tensor, n_heads: int) -> Tensor:
    """The view that mixes positions and heads."""
    batch, pos, d_model = resid.shape
    return resid.reshape(batch, n_heads, pos, d_model // n_heads)


@known_mistakes(
    {
        "head 0 gets every n_heads-th number; its piece should be in one stretch.": lambda r, n: (
            r.unflatten(-1, (-1, n)).mT
        ),
        "the view is (batch, head, pos, d_head), which mixes positions and heads; cut d_model alone.": (
            lambda r, n: heads_first(r, n).transpose(1, 2)
        ),
        "the view is (batch, head, pos, d_head). The heads stand first, and it mixes positions and heads; "
        "cut d_model alone.": heads_first,
        "the heads stand before the positions; here they come after.": (
            lambda r, n: r.unflatten(-1, (n, -1)).transpose(1, 2)
        ),
    }
)
def check_split_heads(fn: Fn) -> None:
    """Every number is another one, so that any of them at a wrong place shows."""
    for n_batch, n_pos, n_heads, d_head in [(2, 5, 3, 4), (1, 4, 2, 3), (2, 3, 1, 5), (1, 1, 12, 1), (2, 3, 2, 4)]:
        resid = torch.arange(float(n_batch * n_pos * n_heads * d_head)).reshape(n_batch, n_pos, n_heads * d_head) / 8
        pieces = [resid[:, :, head * d_head : (head + 1) * d_head] for head in range(n_heads)]
        case = f"with n_heads = {n_heads} and d_model = {n_heads * d_head}"
        compare(f"split_heads {case}", fn(resid, n_heads), torch.stack(pieces, dim=2), HEADS)
    follows_both("split_heads", fn, (resid, n_heads), HEADS)


@known_mistakes(
    {
        "positions and heads are mixed: the axes were moved before the last two were joined.": (
            lambda z: z.transpose(1, 2).reshape(*z.shape[:2], -1)
        ),
        "the heads' numbers take turns; each head's piece should be in one stretch.": lambda z: z.mT.flatten(2),
        "the heads are summed; put them side by side.": lambda z: z.sum(2),
        "the heads are averaged; put them side by side.": lambda z: z.mean(2),
        "positions are joined with the heads.": lambda z: z.flatten(1, 2),
    }
)
def check_merge_heads(fn: Fn) -> None:
    """The same numbers the other way."""
    for n_batch, n_pos, n_heads, d_head in [(2, 5, 3, 4), (1, 4, 2, 3), (1, 3, 1, 5), (2, 1, 3, 2), (2, 3, 2, 4)]:
        z = torch.arange(float(n_batch * n_pos * n_heads * d_head)).reshape(n_batch, n_pos, n_heads, d_head) / 8
        compare("merge_heads", fn(z), torch.cat([z[:, :, head] for head in range(n_heads)], dim=-1), RESID)
    follows_both("merge_heads", fn, (z,), RESID)


@known_mistakes(
    {
        "the whole batch is repeated: prompt 0, prompt 1, prompt 0, ...; copies should stand together.": (
            lambda t, n: t.repeat(n, 1)
        ),
        "only the first prompt is repeated.": lambda t, n: t[:1].repeat(n * len(t), 1),
        "the prompts grow longer instead of more.": lambda t, n: t.repeat(1, n),
        "every token is repeated within its prompt.": lambda t, n: t.repeat_interleave(n, 1),
        "the copies have an axis of their own; join it with the batch.": lambda t, n: t[:, None].repeat(1, n, 1),
    }
)
def check_repeat_prompts(fn: Fn) -> None:
    """Prompts that differ, more than one of them; then a single one, with which every order is right."""
    tokens = torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]])
    for prompts, n_samples in [(tokens, 3), (tokens[:1, :4], 2), (tokens, 1)]:
        expected = torch.tensor([prompt for prompt in prompts.tolist() for _ in range(n_samples)])
        compare(f"repeat_prompts with n_samples = {n_samples}", fn(prompts, n_samples), expected, "row pos")
    follows_both("repeat_prompts", fn, (tokens, 3), "row pos")


# ------------------------------------------------------------------------------------------------------------ einsum


def mixed(pattern: Tensor, v: Tensor) -> Tensor:
    """A head's values, weighted by its pattern; either may be of one text or head for all."""
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


@known_mistakes(
    {
        "the sum runs over the queries; each query gathers from the keys.": lambda p, v: mixed(p.mT, v),
        "the keys all get the same weight; the pattern is ignored.": (
            lambda p, v: v.mean(1, True).expand(-1, p.shape[2], -1, -1)
        ),
        "the sum is divided by the number of keys as well; the weights sum to 1 already.": lambda p, v: (
            mixed(p, v) / v.shape[1]
        ),
        "the softmax is taken once more; the pattern is one already.": lambda p, v: mixed(p.softmax(-1), v),
        "every head uses the mean of all patterns.": lambda p, v: mixed(p.mean(1, True).expand_as(p), v),
        "every head uses the first head's pattern.": lambda p, v: mixed(p[:, :1].expand_as(p), v),
        "the first text's pattern is used for all.": lambda p, v: mixed(p[:1].expand_as(p), v),
        "the first text's values are used for all.": lambda p, v: mixed(p, v[:1].expand_as(v)),
        "the heads are summed; each keeps its own result.": lambda p, v: mixed(p, v).sum(2),
        "the values of all heads are summed before they are weighted.": (
            lambda p, v: mixed(p, v.sum(2, True).expand_as(v))
        ),
    }
)
def check_average_values(fn: Fn) -> None:
    """Square patterns, where queries and keys can be taken for each other, and others."""
    axes = "batch query head d_head"
    for n_batch, n_heads, n_query, n_key in [(2, 3, 5, 5), (2, 3, 4, 6), (1, 1, 1, 5), (2, 3, 2, 4)]:
        pattern = noise(n_batch, n_heads, n_query, n_key).softmax(-1)
        v = noise(n_batch, n_key, n_heads, 7, seed=1)
        expected = torch.zeros(n_batch, n_query, n_heads, 7)
        for batch in range(n_batch):
            for query in range(n_query):
                for head in range(n_heads):
                    for key in range(n_key):
                        expected[batch, query, head] += pattern[batch, head, query, key] * v[batch, key, head]
        compare(f"average_values with {n_query} queries and {n_key} keys", fn(pattern, v), expected, axes)
    follows_both("average_values", fn, (pattern, v), axes)


def length(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1, keepdim=True)


def products(vectors: Tensor) -> Tensor:
    """The dot product of every two."""
    return vectors @ vectors.T


@known_mistakes(
    {
        "a vector of zeros is divided by its length, and 0/0 is NaN.": lambda v: products(v / length(v)),
        "the dot products are not divided by the lengths.": products,
        "the dot products are divided by one of the two lengths only.": lambda v: products(v) / length(v),
        "the dot products are divided by one of the two lengths only: the other one's.": lambda v: (
            products(v) / length(v).T
        ),
        "the lengths lack their root.": lambda v: products(v / length(v) ** 2),
        "each coordinate is divided by its length over the vectors; divide each vector by its own.": (
            lambda v: products(F.normalize(v, dim=0))
        ),
        "one length is taken of all vectors together.": lambda v: products(v / v.norm()),
        "each vector is centred first; that is their correlation.": lambda v: products(F.normalize(centred(v), dim=-1)),
        "the sign is lost.": lambda v: products(F.normalize(v, dim=-1)).abs(),
        "coordinates are compared, not vectors: the product is the other way round.": (
            lambda v: products(F.normalize(v, dim=0).T)
        ),
    }
)
def check_cosine_similarity_matrix(fn: Fn) -> None:
    """Vectors of very different lengths; then one of zeros among them."""
    name, axes = "cosine_similarity_matrix", "vector other"
    sizes = torch.tensor([[3.0], [1e-5], [1.0], [200.0], [7.0]])
    with_zero = noise(4, 3, seed=2) + 0.5
    with_zero[1] = 0.0
    for case, vectors in [(name, (noise(5, 7) + 0.3) * sizes), (f"{name} with a vector of zeros", with_zero)]:
        rows = vectors.tolist()
        lengths = [math.hypot(*row) for row in rows]
        expected = torch.zeros(len(rows), len(rows))
        for i, first in enumerate(rows):
            for j, second in enumerate(rows):
                if lengths[i] and lengths[j]:
                    dot = math.fsum(x * y for x, y in zip(first, second, strict=True))
                    expected[i, j] = dot / (lengths[i] * lengths[j])
        compare(case, fn(vectors), expected, axes)
    follows_both(name, fn, (vectors,), axes)


# ---------------------------------------------------------------------------------------------- numbers that overflow


def by_formula(logits: Tensor) -> Tensor:
    """The formula as it stands, which is wrong for logits that are large or far apart."""
    return logits - logits.exp().sum(-1, keepdim=True).log()


CARELESS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp overflows to inf, or underflows to 0, before the logarithm can bring it back.": by_formula,
    "small probabilities are rounded to 0 before the logarithm; stay with logarithms throughout.": (
        lambda x: x.softmax(-1).log()
    ),
}


@known_mistakes(
    {
        "the logarithm is left out: these are probabilities.": lambda x: x.softmax(-1),
        "the logarithm has base 2; use the natural one.": lambda x: x.log_softmax(-1) / math.log(2),
        "the sum of exp is not brought back by a logarithm: log(sum(exp)).": lambda x: x - x.exp().sum(-1, True),
        "the largest logit is subtracted, and nothing else.": lambda x: x - x.amax(-1, keepdim=True),
        "the mean of exp is taken, not the sum.": lambda x: x - x.exp().mean(-1, keepdim=True).log(),
        "the sum runs over everything; each position has its own.": lambda x: x - x.exp().sum().log(),
        "the sign is changed.": lambda x: -x.log_softmax(-1),
        "nothing is subtracted.": lambda x: x,
        "the softmax runs over the positions; for each position the tokens compete.": lambda x: x.log_softmax(-2),
        "the softmax runs over the batch; for each position the tokens compete.": lambda x: x.log_softmax(0),
        "exp overflows before the quotient is taken.": lambda x: (x.exp() / x.exp().sum(-1, keepdim=True)).log(),
        "one number is subtracted from the whole tensor; each position has its own maximum.": (
            lambda x: by_formula(x - x.max())
        ),
        "the forbidden tokens get a finite number; log(0) is -inf.": lambda x: x.log_softmax(-1).clamp(min=-1e9),
    },
    CARELESS,
)
def check_log_softmax(fn: Fn) -> None:
    """Usual logits, then huge, tiny, far apart and forbidden ones."""
    name = "log_softmax"
    for shape in [(2, 5, 7), (3, 4), (6,)]:
        logits = noise(*shape, scale=2.0)
        expected = logits.double().log_softmax(-1).float()
        axes = " ".join(["batch", "pos", "d_vocab"][3 - len(shape) :])
        compare(name, fn(logits), expected, axes, inputs={"logit": logits})
    follows_both(name, fn, (noise(2, 5, 7),), LOGITS)
    forbidden = noise(2, 5, 7)
    forbidden[:, ::2, 3] = -INF
    for case, logits in [*_hard_logits().items(), ("with -inf among the logits", forbidden)]:
        expected = logits.double().log_softmax(-1).float()
        # what is right to the last digit at a logit of 1000 is right to 1e-4
        compare(f"{name} {case}", fn(logits), expected, LOGITS, inputs={"logit": logits}, atol=1e-3)


def _hard_logits() -> dict[str, Tensor]:
    """Logits with which the formula as it stands goes wrong, and such with which a sound softmax is not enough."""
    level = torch.tensor([1000.0, 0.0, -1000.0, 200.0, -90.0])[:, None]
    apart = torch.tensor([0.0, 150.0, 3.0, 1000.0, 90.0, 0.0, 2.0])
    return {"of logits up to 1000": noise(2, 5, 7) + level, "of logits 1000 apart": noise(1, 5, 7) - apart}


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss at every position."""
    return -picked(logits.log_softmax(-1), targets)


def mean_loss(log_softmax: Callable[[Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """The loss with another function in the place of log_softmax."""
    return -picked(log_softmax(logits), targets).mean()


@known_mistakes(
    {
        "the losses are summed; take their mean.": lambda x, t: losses(x, t).sum(),
        "the losses are summed over each text, then averaged over the texts; take one mean.": lambda x, t: (
            losses(x, t).sum(1).mean()
        ),
        "the minus is left out: a loss is positive.": lambda x, t: -losses(x, t).mean(),
        "each text has a mean of its own; take one over all texts.": lambda x, t: losses(x, t).mean(1),
        "each position has a mean of its own; take one over all positions.": lambda x, t: losses(x, t).mean(0),
        "the losses themselves are returned; take their mean.": losses,
        "the mean runs over the whole vocabulary, not over the targets.": lambda x, t: -x.log_softmax(-1).mean(),
        "the loss is in bits; use the natural logarithm.": lambda x, t: losses(x, t).mean() / math.log(2),
        "the loss is raised to a perplexity.": lambda x, t: losses(x, t).mean().exp(),
        "the softmax is taken twice.": partial(mean_loss, lambda x: x.softmax(-1).log_softmax(-1)),
        "the logits are used as they are, without a softmax.": partial(mean_loss, lambda x: x),
        "the softmax runs over the positions; for each position the tokens compete.": (
            partial(mean_loss, lambda x: x.log_softmax(1))
        ),
        "the softmax runs over the batch; for each position the tokens compete.": (
            partial(mean_loss, lambda x: x.log_softmax(0))
        ),
        "the mean is taken of the probabilities, before the logarithm.": lambda x, t: (
            -(-losses(x, t)).exp().mean().log()
        ),
        "the targets are shifted by one position; they are aligned already.": (
            lambda x, t: losses(x[:, :-1], t[:, 1:]).mean()
        ),
        "only the first text counts.": lambda x, t: losses(x[:1], t[:1]).mean(),
    },
    {sentence: partial(mean_loss, careless) for sentence, careless in CARELESS.items()},
    {
        "the log-probabilities are multiplied by 0 and 1: 0 times -inf is NaN. Look up the target's.": lambda x, t: (
            -(x.log_softmax(-1) * one_hot(x, t)).sum(-1).mean()
        )
    },
)
def check_cross_entropy(fn: Fn) -> None:
    """A single number; every other way to sum or average gives another one."""
    name = "cross_entropy"
    tokens = torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]])
    for rows, n_pos in [(2, 5), (1, 3)]:
        logits, targets = noise(rows, n_pos, 7, scale=2.0), tokens[:rows, :n_pos]
        expected = -picked(logits.double().log_softmax(-1).float(), targets).mean()
        compare(name, fn(logits, targets), expected, "")
    follows_both(name, fn, (noise(2, 5, 7, scale=2.0), tokens), "")
    forbidden = noise(2, 5, 9)
    forbidden[:, :, 8] = -INF  # the last token, which is no target
    for case, logits in [*_hard_logits().items(), ("with -inf among the logits", forbidden)]:
        targets = tokens[: len(logits)]
        expected = -picked(logits.double().log_softmax(-1).float(), targets).mean()
        compare(f"{name} {case}", fn(logits, targets), expected, "", atol=1e-3)
    leaf = noise(2, 5, 7).requires_grad_()
    loss = fn(leaf, tokens)
    if loss.requires_grad:
        loss.backward()
    if leaf.grad is None:
        raise CheckFailed(
            f"{name}: no gradient reaches `logits`, so nothing could be trained with it.\n"
            "  Next: look for torch.no_grad, .detach(), .data or .item() on the way from the logits to the loss."
        )
    expected = slope(leaf.detach(), tokens) / tokens.numel()
    compare(f"{name}, the gradient that reaches `logits`", leaf.grad, expected, LOGITS)


# ---------------------------------------------------------------------------------------------------------- gradients


def one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return F.one_hot(targets, logits.shape[-1]).to(logits)


def slope(logits: Tensor, targets: Tensor, axis: int = -1) -> Tensor:
    """The gradient of the sum of the losses."""
    return logits.softmax(axis) - one_hot(logits, targets)


@known_mistakes(
    {
        "it is not divided by the number of targets; the loss is a mean.": slope,
        "it is divided by the number of texts, not by the number of targets.": lambda x, t: slope(x, t) / len(t),
        "it is divided by the number of positions, not by the number of targets.": lambda x, t: (
            slope(x, t) / t.shape[1]
        ),
        "it is divided by the number of logits, not by the number of targets.": lambda x, t: slope(x, t) / x.numel(),
        "the sign is changed: it points to where the loss falls.": lambda x, t: -slope(x, t) / t.numel(),
        "nothing is subtracted at the targets.": lambda x, t: x.softmax(-1) / t.numel(),
        "the probabilities are left out.": lambda x, t: -one_hot(x, t) / t.numel(),
        "the logits are not made into probabilities.": lambda x, t: (x - one_hot(x, t)) / t.numel(),
        "log-probabilities are used; use probabilities.": lambda x, t: (x.log_softmax(-1) - one_hot(x, t)) / t.numel(),
        "1 is subtracted everywhere; subtract it at the targets only.": lambda x, t: (x.softmax(-1) - 1) / t.numel(),
        "1 is added at the targets; subtract it.": lambda x, t: (x.softmax(-1) + one_hot(x, t)) / t.numel(),
        "1 is subtracted after the division: that, too, is divided.": lambda x, t: (
            x.softmax(-1) / t.numel() - one_hot(x, t)
        ),
        "the softmax runs over the positions; for each position the tokens compete.": lambda x, t: (
            slope(x, t, axis=1) / t.numel()
        ),
        "the first text's targets are used for all.": lambda x, t: slope(x, t[:1].expand_as(t)) / t.numel(),
    }
)
def check_cross_entropy_gradient(fn: Fn) -> None:
    """What autograd says about torch's own loss."""
    name = "cross_entropy_gradient"
    tokens = torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]])
    large, few = f"{name} of large logits", f"{name} with a last token that is no target"
    for case, rows, n_pos, n_vocab, scale in [
        (name, 2, 5, 7, 2.0),
        (name, 1, 3, 7, 1.0),
        (large, 2, 5, 7, 700.0),
        (few, 2, 5, 9, 1.0),
    ]:
        logits, targets = noise(rows, n_pos, n_vocab, scale=scale), tokens[:rows, :n_pos]
        leaf = logits.clone().requires_grad_()
        F.cross_entropy(leaf.flatten(0, 1), targets.flatten()).backward()
        assert leaf.grad is not None
        given = {"probability": logits.softmax(-1), "target": one_hot(logits, targets).long()}
        compare(case, fn(logits, targets), leaf.grad, LOGITS, inputs=given)
    follows_both(name, fn, (noise(2, 5, 7), tokens), LOGITS)


def cubes(at: Tensor) -> Tensor:
    return (at**3).sum() / 3


def twice_used(at: Tensor) -> Tensor:
    return (at * at.sin()).sum() + at.flatten()[0]


def gradient(fn: Fn, at: Tensor) -> Tensor:
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(leaf), leaf)[0]


@known_mistakes(
    {
        "the value of the function is returned, not its gradient.": lambda fn, at: fn(at),
        "the gradient points downhill: its sign is changed.": lambda fn, at: -gradient(fn, at),
        "the gradient is divided by the number of numbers: the sum became a mean.": lambda fn, at: (
            gradient(fn, at) / at.numel()
        ),
        "what stood in `at.grad` before is part of the answer: backward adds to it.": lambda fn, at: (
            gradient(fn, at) + (0 if at.grad is None else at.grad)
        ),
    }
)
def check_gradient_by_backward(fn: Fn) -> None:
    """Functions whose derivatives are known; tensors that record gradients already, or hold some from before."""
    name, axes = "gradient_by_backward", "row column"
    at = noise(2, 5) + 0.5
    first = torch.zeros(2, 5)
    first[0, 0] = 1.0
    for function, expected in [(cubes, at**2), (twice_used, at.sin() + at * at.cos() + first)]:
        compare(name, fn(function, at), expected, axes, inputs={"at": at})
        if at.requires_grad or at.grad is not None:
            raise CheckFailed(
                f"{name}: `at` itself records gradients afterwards; it should be as before.\n"
                "  Next: work on a tensor of your own, which holds the same numbers and has no history."
            )
    where = f"{name} on a tensor that is not contiguous"
    compare(where, fn(cubes, strided(at)), at**2, axes)
    exact = at.double()
    compare(f"{name} in float64", fn(cubes, exact), exact**2, axes, rtol=1e-12, atol=1e-12)
    _check_leaf_with_gradient(name, fn, axes)
    _check_result_of_others(name, fn, axes)
    actual = fn(cubes, at)
    if actual.requires_grad:
        raise CheckFailed(
            f"{name}: the answer records gradients itself.\n  Next: return the bare numbers that backward left."
        )
    compare(f"{name} at a single number", fn(cubes, torch.tensor(3.0)), torch.tensor(9.0), "")
    follows_input(name, lambda moved: fn(cubes, moved), (at,), axes)


def _check_leaf_with_gradient(name: str, fn: Fn, axes: str) -> None:
    """`backward` adds to what is in `.grad`: neither the answer nor `at.grad` may show that."""
    leaf = noise(2, 5, seed=1).requires_grad_()
    leaf.grad = torch.full((2, 5), 10.0)
    case = f"{name} where `at.grad` holds something already"
    actual = fn(cubes, leaf)
    if actual is None:
        raise CheckFailed(
            f"{case}: returned None.\n"
            "  A copy of a tensor that records gradients has a history, and `backward` leaves its `.grad` empty.\n"
            "  Next: cut the history before you switch gradients on."
        )
    compare(case, actual, leaf.detach() ** 2, axes)
    if leaf.grad is None or not torch.equal(leaf.grad, torch.full((2, 5), 10.0)) or not leaf.requires_grad:
        raise CheckFailed(
            f"{case}: that was changed.\n"
            "  Next: work on a tensor of your own, which holds the same numbers and has no history."
        )


def _check_result_of_others(name: str, fn: Fn, axes: str) -> None:
    """`at` as something that was computed: what it was computed from gets no gradient."""
    leaf = noise(2, 5, seed=2).requires_grad_()
    at = leaf + 1
    case = f"{name} where `at` was computed from a tensor that records gradients"
    actual = fn(cubes, at)
    if leaf.grad is not None:
        raise CheckFailed(
            f"{case}: the gradient went on into that tensor's `.grad`.\n"
            "  Next: work on a tensor of your own, which holds the same numbers and has no history."
        )
    compare(case, actual, at.detach() ** 2, axes)
