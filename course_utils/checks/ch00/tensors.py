"""Chapter 00: is each tensor right, whatever way it was made?

Oracles are loops that spell the definition out, torch's own functions, and autograd. Sizes are odd and all different,
but for a few cases in which equal sizes, or a batch of one, let a mistake through that is refused elsewhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.comparing import Mistakes, compare, follows_input, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed

Fn = Callable[..., Any]
RESID, LOGITS, HEADS = "batch pos d_model", "batch pos d_vocab", "batch pos head d_head"
INF = torch.inf


def _judge(
    name: str,
    fn: Fn,
    inputs: Mapping[str, Any],
    expected: Tensor,
    axes: str,
    mistakes: Mistakes,
    given: Mapping[str, Tensor] | None = None,
    case: str = "",
    atol: float = 1e-5,
) -> None:
    """Call the learner's function, see that it wrote into no input, and compare what it returned."""
    tensors = {label: value for label, value in inputs.items() if isinstance(value, Tensor)}
    with unchanged(name, **tensors):
        actual = fn(*inputs.values())
    compare(f"{name} {case}".strip(), actual, expected, axes, mistakes, inputs=given, atol=atol)


# ------------------------------------------------------------------------------------------------------ broadcasting


def check_relative_positions(fn: Fn) -> None:
    """Every pair of positions, one by one."""
    for n_pos in (5, 1, 4):
        expected = torch.tensor([[query - key for key in range(n_pos)] for query in range(n_pos)])
        mistakes = {
            "it is key - query; the past is to be positive.": -expected,
            "the sign is lost.": expected.abs(),
            "the future is set to 0; it should be negative.": expected.clamp(min=0),
            "query and key are added, not subtracted.": torch.arange(n_pos)[:, None] + torch.arange(n_pos),
        }
        _judge(
            "relative_positions", fn, {"n_pos": n_pos}, expected, "query key", mistakes, case=f"with n_pos = {n_pos}"
        )


def check_centre_vectors(fn: Fn) -> None:
    """Vectors that lie around different places, so that every wrong axis shows."""
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7) + 2 * noise(n_batch, n_pos, 1, seed=1) + noise(7, seed=2)
        expected = resid.clone()
        for row in range(n_batch):
            for pos in range(n_pos):
                expected[row, pos] -= math.fsum(resid[row, pos].tolist()) / 7
        means = resid.mean(-1, keepdim=True)
        mistakes = {
            "the mean runs over the positions; each vector has its own, over d_model.": resid - resid.mean(1, True),
            "the mean runs over the batch; each vector has its own, over d_model.": resid - resid.mean(0, True),
            "one mean is taken of the whole tensor; each vector has its own.": resid - resid.mean(),
            "one mean is taken per text; each position has its own.": resid - resid.mean((1, 2), keepdim=True),
            "the means themselves are returned; subtract them.": means.expand_as(resid),
            "the mean is added; subtract it.": resid + means,
            "the first text's means are used for all.": resid - means[:1],
            "the vectors are divided by their deviation as well, as LayerNorm does; only centre them.": expected
            / resid.std(-1, correction=0, keepdim=True),
            "nothing is subtracted.": resid,
        }
        _judge("centre_vectors", fn, {"resid": resid}, expected, RESID, mistakes, {"resid": resid})
    follows_input("centre_vectors", fn, (resid,), RESID)


def check_batched_outer(fn: Fn) -> None:
    """Different sizes, and three times the same, where axes that are lined up wrongly go through without an error."""
    axes = "batch row column"
    for n_batch, n_row, n_column in [(2, 3, 5), (3, 3, 3), (1, 4, 2)]:
        a, b = noise(n_batch, n_row, seed=1), noise(n_batch, n_column, seed=2)
        expected = torch.empty(n_batch, n_row, n_column)
        for batch in range(n_batch):
            for row in range(n_row):
                for column in range(n_column):
                    expected[batch, row, column] = a[batch, row] * b[batch, column]
        mistakes = {
            "numbers are added; multiply them.": a[:, :, None] + b[:, None, :],
            "the first item's numbers are used for the whole batch.": expected[:1].expand_as(expected),
            "rows and columns are swapped: `a` chooses the row.": expected.mT,
            "the products are summed over the batch.": expected.sum(0),
            "every item of `a` meets every item of `b`; keep to the same item of the batch.": torch.einsum(
                "ir,jc->ijrc", a, b
            ),
        }
        if n_batch == n_row == n_column:
            mistakes["the batch of `b` is lined up with the rows of `a`; it needs an axis of size 1 for the rows."] = (
                a[:, :, None] * b
            )
            mistakes["the batch of `a` is lined up with the rows; it needs an axis of size 1 for the columns."] = (
                a * b[:, None, :]
            )
        case = f"with batch {n_batch}, {n_row} rows and {n_column} columns"
        _judge("batched_outer", fn, {"a": a, "b": b}, expected, axes, mistakes, case=case)
    follows_input("batched_outer", fn, (a, b), axes)


# ---------------------------------------------------------------------------------------------------------- indexing


def check_logits_at_end(fn: Fn) -> None:
    """Texts of different lengths, one of a single token, one without padding."""
    axes = "batch d_vocab"
    for lengths in ([3, 4, 1], [2, 5, 1], [4]):
        logits, ends = noise(len(lengths), 5, 7), torch.tensor(lengths)
        expected = torch.stack([logits[row, length - 1] for row, length in enumerate(lengths)])
        mistakes = {
            "the last position is read, padding or not.": logits[:, -1],
            "all texts are read where the first one ends.": logits[:, lengths[0] - 1],
            "every row is of the first text.": torch.stack([logits[0, length - 1] for length in lengths]),
            "every text is read at the ends of all; pair each row with its own position.": logits[:, ends - 1],
            "it is counted from the end of the padding.": torch.stack(
                [logits[row, -length] for row, length in enumerate(lengths)]
            ),
            "the first position is read.": logits[:, 0],
        }
        if max(lengths) < 5:
            mistakes["it is one position too far: a text of length 3 ends at position 2."] = torch.stack(
                [logits[row, length] for row, length in enumerate(lengths)]
            )
        _judge("logits_at_end", fn, {"logits": logits, "lengths": ends}, expected, axes, mistakes)
    follows_input("logits_at_end", fn, (logits, ends), axes)


def _picked(values: Tensor, tokens: Tensor) -> Tensor:
    """values[batch, pos, tokens[batch, pos]], one after the other."""
    rows = zip(values.tolist(), tokens.tolist(), strict=True)
    return torch.tensor([[vector[token] for vector, token in zip(*row, strict=True)] for row in rows])


def check_gather_logprobs(fn: Fn) -> None:
    """Tokens that come twice, token 0, a batch of one, a single position."""
    tokens = torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]])
    for rows, n_pos in [(2, 5), (1, 4), (2, 1)]:
        ids, logprobs = tokens[:rows, :n_pos], noise(rows, n_pos, 7).log_softmax(-1)
        expected = _picked(logprobs, ids)
        mistakes = {
            "the tokens are shifted by one position; they are aligned already.": _picked(logprobs, ids.roll(-1, 1)),
            "the first text's tokens are looked up in all.": _picked(logprobs, ids[:1].expand_as(ids)),
            "probabilities are returned, not their logarithms.": expected.exp(),
            "the sign is changed; log-probabilities are negative.": -expected,
            "the largest is taken at each position, whatever the token.": logprobs.amax(-1),
            "an axis of size 1 is left at the end.": expected[..., None],
            "`squeeze()` is given no axis: it removes every axis of size 1, the batch too.": expected.squeeze(),
            "every token is looked up at every position; each belongs to one.": logprobs[:, :, ids],
        }
        inputs = {"logprobs": logprobs, "tokens": ids}
        _judge("gather_logprobs", fn, inputs, expected, "batch pos", mistakes, {"token": ids})
    follows_input("gather_logprobs", fn, (noise(2, 5, 7).log_softmax(-1), tokens), "batch pos")


def check_mean_where(fn: Fn) -> None:
    """As many True values in no two rows; then padding that holds inf and NaN."""
    name = "mean_where"
    mask = torch.tensor([[True, False, True, True, False], [False, False, False, True, False]])
    spoiled = noise(2, 5, seed=3).masked_fill(~mask, INF)
    spoiled[1, 4] = torch.nan
    hidden = "the values are multiplied by the mask: 0 times inf, or NaN, is NaN. Leave them out instead."
    for case, values, kept in [
        ("", noise(2, 5) + 1, mask),
        ("with inf and NaN in the padding", spoiled, mask),
        ("with one text", noise(1, 3), torch.tensor([[True, True, True]])),
    ]:
        rows = zip(values.tolist(), kept.tolist(), strict=True)
        inside = [[value for value, keep in zip(*row, strict=True) if keep] for row in rows]
        expected = torch.tensor([math.fsum(chosen) / len(chosen) for chosen in inside])
        clean = values.where(kept, 0.0)
        mistakes = {
            "the sum is divided by the number of positions, not by how many are kept.": clean.mean(-1),
            "the sum is not divided by how many are kept.": clean.sum(-1),
            "one mean is taken over all texts.": values[kept].mean().expand(len(values)),
            "the mean is taken where the mask is False.": values.where(~kept, 0.0).sum(-1) / (~kept).sum(-1),
            "the mask is ignored.": values.mean(-1),
            "the first text's mask is used for all.": values.where(kept[:1], 0.0).sum(-1) / kept[0].sum(),
            "the mean runs over the texts, not over the positions.": clean.sum(0) / kept.sum(0),
        }
        if not values.isfinite().all():
            mistakes = {hidden: (values * kept).sum(-1) / kept.sum(-1)}
        _judge(name, fn, {"values": values, "mask": kept}, expected, "batch", mistakes, case=case)
    follows_input(name, fn, (noise(2, 5), mask), "batch")


def check_add_at_position(fn: Fn) -> None:
    """A position in the middle, the first, the last counted from the end; and what was handed in stays as it was."""
    name, direction = "add_at_position", noise(7, seed=1)
    for n_batch, n_pos, pos in [(2, 5, 1), (2, 5, 0), (2, 5, -1), (1, 4, -3)]:
        resid = noise(n_batch, n_pos, 7)
        expected = resid.clone()
        for row in range(n_batch):
            expected[row, pos % n_pos] = resid[row, pos % n_pos] + direction
        replaced, subtracted, first = resid.clone(), resid.clone(), resid.clone()
        replaced[:, pos], subtracted[:, pos], first[0, pos] = direction, resid[:, pos] - direction, expected[0, pos]
        by_number = resid.clone()
        if pos < n_batch:  # as an index of the batch; -1 is its last row
            by_number[pos % n_batch] = resid[pos % n_batch] + direction
        mistakes = {
            "the direction is added at every position.": resid + direction,
            "the direction takes the place of the vectors; add it to them.": replaced,
            "the direction is subtracted.": subtracted,
            "only the first text gets the direction.": first,
            "`pos` chooses a text: the first axis is the batch.": by_number,
            "nothing is added; `pos` may be negative and count from the end.": resid,
            "only the vectors at that position are returned, not the whole stream.": expected[:, pos],
        }
        if n_batch == 1:
            del mistakes["only the first text gets the direction."]
        inputs = {"resid": resid, "direction": direction, "pos": pos}
        _judge(name, fn, inputs, expected, RESID, mistakes, {"resid": resid}, case=f"with pos = {pos}")
    follows_input(name, fn, (resid, direction, 1), RESID)


def check_diagonal_mean(fn: Fn) -> None:
    """Both sides of the diagonal, patterns that are not square, and no, one or two axes before query and key."""
    name = "diagonal_mean"
    for shape, offset in [((2, 3, 5, 5), -1), ((2, 3, 5, 5), 0), ((3, 4, 6), 2), ((3, 4, 6), -2), ((5, 5), -3)]:
        pattern = noise(*shape).exp()
        n_query, n_key = shape[-2:]
        places = [(q, k) for q in range(n_query) for k in range(n_key) if k == q + offset]
        total = sum((pattern[..., q, k] for q, k in places), start=torch.zeros(shape[:-2]))
        mistakes = {
            "the other side's diagonal is read: key = query + offset, so that -1 is below the main one.": (
                pattern.diagonal(-offset, -2, -1).mean(-1)
            ),
            "the main diagonal is read, whatever the offset.": pattern.diagonal(0, -2, -1).mean(-1),
            "the sum is divided by the number of queries, not by the length of the diagonal.": total / n_query,
            "the sum is divided by the number of keys, not by the length of the diagonal.": total / n_key,
            "the weights are summed; take their mean.": total,
            "the mean is over the whole pattern.": pattern.mean((-2, -1)),
            "one mean is taken over everything; each pattern has its own.": (total / len(places)).mean(),
            "the weights themselves are returned; take their mean.": pattern.diagonal(offset, -2, -1),
            "the diagonal runs through the first two axes; query and key are the last two.": (
                pattern.diagonal(offset, 0, 1).mean(-1)
            ),
        }
        if n_query == n_key:  # then the two are one
            del mistakes["the sum is divided by the number of keys, not by the length of the diagonal."]
        if len(shape) == 2:
            del mistakes["the diagonal runs through the first two axes; query and key are the last two."]
            del mistakes["one mean is taken over everything; each pattern has its own."]
        axes = " ".join(["batch", "head"][2 - len(shape[:-2]) :])
        case = f"with offset {offset} on {n_query} queries and {n_key} keys"
        inputs = {"pattern": pattern, "offset": offset}
        _judge(name, fn, inputs, total / len(places), axes, mistakes, case=case)
    follows_input(name, fn, (noise(2, 3, 5, 5), -1), "batch head")


# ------------------------------------------------------------------------------------------------------------ einops


def check_split_heads(fn: Fn) -> None:
    """Every number is another one, so that any of them at a wrong place shows."""
    name = "split_heads"
    for n_batch, n_pos, n_heads, d_head in [(2, 5, 3, 4), (1, 4, 2, 3), (2, 3, 1, 5)]:
        resid = torch.arange(float(n_batch * n_pos * n_heads * d_head)).reshape(n_batch, n_pos, n_heads * d_head) / 8
        pieces = [resid[:, :, head * d_head : (head + 1) * d_head] for head in range(n_heads)]
        expected = torch.stack(pieces, dim=2)
        across = resid.reshape(n_batch, n_heads, n_pos, d_head)
        mistakes: dict[str, Tensor] = {
            "head 0 gets every n_heads-th number; its piece should be in one stretch.": resid.reshape(
                n_batch, n_pos, d_head, n_heads
            ).mT
        }
        if n_heads > 1:
            mixed = "the view is (batch, head, pos, d_head), which mixes positions and heads; cut d_model alone."
            mistakes[mixed] = across.transpose(1, 2)
            mistakes[mixed.replace(", which", ". The heads stand first, and it")] = across
            mistakes["the heads stand before the positions; here they come after."] = expected.transpose(1, 2)
        case = f"with n_heads = {n_heads} and d_model = {n_heads * d_head}"
        _judge(name, fn, {"resid": resid, "n_heads": n_heads}, expected, HEADS, mistakes, case=case)
    follows_input(name, fn, (resid, n_heads), HEADS)


def check_merge_heads(fn: Fn) -> None:
    """The same numbers the other way."""
    for n_batch, n_pos, n_heads, d_head in [(2, 5, 3, 4), (1, 4, 2, 3), (2, 1, 3, 2)]:
        z = torch.arange(float(n_batch * n_pos * n_heads * d_head)).reshape(n_batch, n_pos, n_heads, d_head) / 8
        expected = torch.cat([z[:, :, head] for head in range(n_heads)], dim=-1)
        mistakes = {
            "positions and heads are mixed: the axes were moved before the last two were joined.": z.transpose(
                1, 2
            ).reshape(expected.shape),
            "the heads' numbers take turns; each head's piece should be in one stretch.": z.mT.flatten(2),
            "the heads are summed; put them side by side.": z.sum(2),
            "the heads are averaged; put them side by side.": z.mean(2),
            "positions are joined with the heads.": z.flatten(1, 2),
        }
        _judge("merge_heads", fn, {"z": z}, expected, RESID, mistakes)
    follows_input("merge_heads", fn, (z,), RESID)


def check_repeat_prompts(fn: Fn) -> None:
    """Prompts that differ, more than one of them; then a single one, with which every order is right."""
    tokens = torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]])
    for prompts, n_samples in [(tokens, 3), (tokens[:1, :4], 2), (tokens, 1)]:
        expected = torch.tensor([prompt for prompt in prompts.tolist() for _ in range(n_samples)])
        mistakes = {
            "the whole batch is repeated: prompt 0, prompt 1, prompt 0, ...; copies should stand together.": torch.cat(
                [prompts] * n_samples
            ),
            "only the first prompt is repeated.": prompts[:1].expand_as(expected),
            "the prompts grow longer instead of more.": prompts.repeat(1, n_samples),
            "every token is repeated within its prompt.": prompts.repeat_interleave(n_samples, 1),
            "the copies have an axis of their own; join it with the batch.": torch.stack([prompts] * n_samples, dim=1),
        }
        case = f"with n_samples = {n_samples}"
        inputs = {"tokens": prompts, "n_samples": n_samples}
        _judge("repeat_prompts", fn, inputs, expected, "row pos", mistakes, case=case)
    follows_input("repeat_prompts", fn, (tokens, 3), "row pos")


# ------------------------------------------------------------------------------------------------------------ einsum


def check_average_values(fn: Fn) -> None:
    """Square patterns, where queries and keys can be taken for each other, and others."""
    name, axes = "average_values", "batch query head d_head"
    for n_batch, n_query, n_key in [(2, 5, 5), (2, 4, 6), (1, 1, 5)]:
        pattern = noise(n_batch, 3, n_query, n_key).softmax(-1)
        v = noise(n_batch, n_key, 3, 7, seed=1)
        expected = torch.zeros(n_batch, n_query, 3, 7)
        for batch in range(n_batch):
            for query in range(n_query):
                for head in range(3):
                    for key in range(n_key):
                        expected[batch, query, head] += pattern[batch, head, query, key] * v[batch, key, head]

        def mixed(weights: Tensor, v: Tensor = v) -> Tensor:
            return torch.einsum("bhqk,bkhd->bqhd", weights, v)

        mistakes = {
            "the keys all get the same weight; the pattern is ignored.": v.mean(1, True).expand_as(expected),
            "the sum is divided by the number of keys as well; the weights sum to 1 already.": expected / n_key,
            "the softmax is taken once more; the pattern is one already.": mixed(pattern.softmax(-1)),
            "every head uses the mean of all patterns.": mixed(pattern.mean(1, True).expand_as(pattern)),
            "every head uses the first head's pattern.": mixed(pattern[:, :1].expand_as(pattern)),
            "the first text's pattern is used for all.": mixed(pattern[:1].expand_as(pattern)),
            "the first text's values are used for all.": mixed(pattern, v[:1].expand_as(v)),
            "the heads are summed; each keeps its own result.": expected.sum(2),
            "the values of all heads are summed before they are weighted.": mixed(pattern, v.sum(2, True).expand_as(v)),
        }
        if n_query == n_key:
            mistakes["the sum runs over the queries; each query gathers from the keys."] = mixed(pattern.mT)
        if n_batch == 1:
            mistakes = {hint: wrong for hint, wrong in mistakes.items() if "first text" not in hint}
        case = f"with {n_query} queries and {n_key} keys"
        _judge(name, fn, {"pattern": pattern, "v": v}, expected, axes, mistakes, case=case)
    follows_input(name, fn, (pattern, v), axes)


def check_cosine_similarity_matrix(fn: Fn) -> None:
    """Vectors of very different lengths; then one of zeros among them."""
    name, axes = "cosine_similarity_matrix", "vector other"
    sizes = torch.tensor([[3.0], [0.01], [1.0], [200.0], [7.0]])
    with_zero = noise(4, 3, seed=2) + 0.5
    with_zero[1] = 0.0
    for case, vectors in [("", (noise(5, 7) + 0.3) * sizes), ("with a vector of zeros", with_zero)]:
        rows = vectors.tolist()
        lengths = [math.hypot(*row) for row in rows]
        expected = torch.zeros(len(rows), len(rows))
        for i, first in enumerate(rows):
            for j, second in enumerate(rows):
                if lengths[i] and lengths[j]:
                    dot = math.fsum(x * y for x, y in zip(first, second, strict=True))
                    expected[i, j] = dot / (lengths[i] * lengths[j])
        dots, norm = vectors @ vectors.T, vectors.norm(dim=-1, keepdim=True)
        centred = vectors - vectors.mean(-1, keepdim=True)
        columns = F.normalize(vectors, dim=0)
        mistakes: dict[str, Tensor] = {
            "a vector of zeros is divided by its length, and 0/0 is NaN.": dots / norm / norm.T,
            "the dot products are not divided by the lengths.": dots,
            "the dot products are divided by one of the two lengths only.": dots / norm,
            "the dot products are divided by one of the two lengths only: the other one's.": dots / norm.T,
            "the lengths lack their root.": dots / norm**2 / norm.T**2,
            "each coordinate is divided by its length over the vectors; divide each vector by its own.": columns
            @ columns.T,
            "one length is taken of all vectors together.": dots / vectors.norm() ** 2,
            "each vector is centred first; that is their correlation.": F.normalize(centred, dim=-1)
            @ F.normalize(centred, dim=-1).T,
            "the sign is lost.": expected.abs(),
            "coordinates are compared, not vectors: the product is the other way round.": columns.T @ columns,
        }
        _judge(name, fn, {"vectors": vectors}, expected, axes, mistakes, case=case)
    follows_input(name, fn, (vectors,), axes)


# ---------------------------------------------------------------------------------------------- numbers that overflow


def check_log_softmax(fn: Fn) -> None:
    """Usual logits, then huge, tiny, far apart and forbidden ones."""
    name = "log_softmax"
    for shape in [(2, 5, 7), (3, 4), (6,)]:
        logits = noise(*shape, scale=2.0)
        expected = logits.double().log_softmax(-1).float()
        mistakes = {
            "the logarithm is left out: these are probabilities.": expected.exp(),
            "the logarithm has base 2; use the natural one.": expected / math.log(2),
            "the sum of exp is not brought back by a logarithm: log(sum(exp)).": logits - logits.exp().sum(-1, True),
            "the largest logit is subtracted, and nothing else.": logits - logits.amax(-1, keepdim=True),
            "the mean of exp is taken, not the sum.": expected + math.log(shape[-1]),
            "the sum runs over everything; each position has its own.": logits - logits.exp().sum().log(),
            "the sign is changed.": -expected,
            "nothing is subtracted.": logits,
        }
        if len(shape) > 1:
            mistakes["the softmax runs over the positions; for each position the tokens compete."] = logits.log_softmax(
                -2
            )
        else:
            del mistakes["the sum runs over everything; each position has its own."]
        if len(shape) > 2:
            mistakes["the softmax runs over the batch; for each position the tokens compete."] = logits.log_softmax(0)
        axes = " ".join(["batch", "pos", "d_vocab"][3 - len(shape) :])
        _judge(name, fn, {"logits": logits}, expected, axes, mistakes, {"logit": logits})
    follows_input(name, fn, (noise(2, 5, 7),), LOGITS)
    forbidden = noise(2, 5, 7)
    forbidden[:, ::2, 3] = -INF
    for case, logits in [*_hard_logits().items(), ("with -inf among the logits", forbidden)]:
        expected = logits.double().log_softmax(-1).float()
        mistakes = _careless(logits)
        if not logits.isfinite().all():
            mistakes = {"the forbidden tokens get a finite number; log(0) is -inf.": expected.clamp(min=-1e9)}
        elif len(logits) > 1:
            one, exps = logits - logits.max(), logits.exp()
            mistakes["exp overflows before the quotient is taken."] = (exps / exps.sum(-1, keepdim=True)).log()
            mistakes["one number is subtracted from the whole tensor; each position has its own maximum."] = (
                one - one.exp().sum(-1, keepdim=True).log()
            )
        # what is right to the last digit at a logit of 1000 is right to 1e-4
        _judge(name, fn, {"logits": logits}, expected, LOGITS, mistakes, {"logit": logits}, case, atol=1e-3)


def _hard_logits() -> dict[str, Tensor]:
    """Logits with which the formula as it stands goes wrong, and such with which a sound softmax is not enough."""
    level = torch.tensor([1000.0, 0.0, -1000.0, 200.0, -90.0])[:, None]
    apart = torch.tensor([0.0, 150.0, 3.0, 1000.0, 90.0, 0.0, 2.0])
    return {"of logits up to 1000": noise(2, 5, 7) + level, "of logits 1000 apart": noise(1, 5, 7) - apart}


def _careless(logits: Tensor) -> dict[str, Tensor]:
    """Log-probabilities as they come out without care."""
    if logits.max() < 10:
        hint = "small probabilities are rounded to 0 before the logarithm; stay with logarithms throughout."
        return {hint: logits.softmax(-1).log()}
    formula = logits - logits.exp().sum(-1, keepdim=True).log()
    return {"exp overflows to inf, or underflows to 0, before the logarithm can bring it back.": formula}


def check_cross_entropy(fn: Fn) -> None:
    """A single number; every other way to sum or average gives another one."""
    name = "cross_entropy"
    tokens = torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]])
    for rows, n_pos in [(2, 5), (1, 3)]:
        logits, targets = noise(rows, n_pos, 7, scale=2.0), tokens[:rows, :n_pos]
        logprobs = logits.double().log_softmax(-1).float()
        losses = -_picked(logprobs, targets)
        expected = losses.mean()
        mistakes = {
            "the losses are summed; take their mean.": losses.sum(),
            "the losses are summed over each text, then averaged over the texts; take one mean.": losses.sum(1).mean(),
            "the minus is left out: a loss is positive.": -expected,
            "each text has a mean of its own; take one over all texts.": losses.mean(1),
            "each position has a mean of its own; take one over all positions.": losses.mean(0),
            "the losses themselves are returned; take their mean.": losses,
            "the mean runs over the whole vocabulary, not over the targets.": -logprobs.mean(),
            "the loss is in bits; use the natural logarithm.": expected / math.log(2),
            "the loss is raised to a perplexity.": expected.exp(),
            "the softmax is taken twice.": -_picked(logprobs.exp().log_softmax(-1), targets).mean(),
            "the logits are used as they are, without a softmax.": -_picked(logits, targets).mean(),
            "the softmax runs over the positions; for each position the tokens compete.": -_picked(
                logits.log_softmax(1), targets
            ).mean(),
            "the softmax runs over the batch; for each position the tokens compete.": -_picked(
                logits.log_softmax(0), targets
            ).mean(),
            "the mean is taken of the probabilities, before the logarithm.": -(-losses).exp().mean().log(),
            "the targets are shifted by one position; they are aligned already.": -_picked(
                logprobs[:, :-1], targets[:, 1:]
            ).mean(),
            "only the first text counts.": losses[0].mean(),
        }
        if rows == 1:
            del mistakes["only the first text counts."]
        _judge(name, fn, {"logits": logits, "targets": targets}, expected, "", mistakes)
    follows_input(name, fn, (logits, targets), "")
    for case, logits in _hard_logits().items():
        targets = tokens[: len(logits)]
        expected = -_picked(logits.double().log_softmax(-1).float(), targets).mean()
        mistakes = {hint: -_picked(wrong, targets).mean() for hint, wrong in _careless(logits).items()}
        _judge(name, fn, {"logits": logits, "targets": targets}, expected, "", mistakes, case=case, atol=1e-3)
    leaf = noise(2, 5, 7).requires_grad_()
    loss = fn(leaf, tokens)
    if loss.requires_grad:
        loss.backward()
    if leaf.grad is None:
        raise CheckFailed(
            f"{name}: no gradient reaches `logits`, so nothing could be trained with it.\n"
            "  Next: look for torch.no_grad, .detach(), .data or .item() on the way from the logits to the loss."
        )


# ---------------------------------------------------------------------------------------------------------- gradients


def check_cross_entropy_gradient(fn: Fn) -> None:
    """What autograd says about torch's own loss."""
    name = "cross_entropy_gradient"
    tokens = torch.tensor([[3, 0, 6, 3, 1], [5, 2, 4, 1, 6]])
    for case, rows, n_pos, scale in [("", 2, 5, 2.0), ("", 1, 3, 1.0), ("of large logits", 2, 5, 700.0)]:
        logits, targets = noise(rows, n_pos, 7, scale=scale), tokens[:rows, :n_pos]
        leaf = logits.clone().requires_grad_()
        F.cross_entropy(leaf.flatten(0, 1), targets.flatten()).backward()
        assert leaf.grad is not None
        expected, n_targets = leaf.grad, rows * n_pos
        chances = logits.softmax(-1)
        hot = (targets[..., None] == torch.arange(7)).float()
        mistakes = {
            "it is not divided by the number of targets; the loss is a mean.": expected * n_targets,
            "it is divided by the number of texts, not by the number of targets.": expected * n_pos,
            "it is divided by the number of positions, not by the number of targets.": expected * rows,
            "it is divided by the number of logits, not by the number of targets.": expected / 7,
            "the sign is changed: it points to where the loss falls.": -expected,
            "nothing is subtracted at the targets.": chances / n_targets,
            "the probabilities are left out.": -hot / n_targets,
            "the logits are not made into probabilities.": (logits - hot) / n_targets,
            "log-probabilities are used; use probabilities.": (chances.log() - hot) / n_targets,
            "1 is subtracted everywhere; subtract it at the targets only.": (chances - 1) / n_targets,
            "1 is added at the targets; subtract it.": (chances + hot) / n_targets,
            "1 is subtracted after the division: that, too, is divided.": chances / n_targets - hot,
            "the softmax runs over the positions; for each position the tokens compete.": (logits.softmax(1) - hot)
            / n_targets,
            "the first text's targets are used for all.": (chances - hot[:1]) / n_targets,
        }
        if rows == 1:
            mistakes = {
                hint: wrong
                for hint, wrong in mistakes.items()
                if "number of positions" not in hint and "first text" not in hint
            }
        inputs = {"logits": logits, "targets": targets}
        _judge(name, fn, inputs, expected, LOGITS, mistakes, {"probability": chances, "target": hot.long()}, case)
    follows_input(name, fn, (noise(2, 5, 7), tokens), LOGITS)


def _cubes(at: Tensor) -> Tensor:
    return (at**3).sum() / 3


def _twice_used(at: Tensor) -> Tensor:
    return (at * at.sin()).sum() + at.flatten()[0]


def check_gradient_by_backward(fn: Fn) -> None:
    """Functions whose derivatives are known; tensors that record gradients already, or hold some from before."""
    name, axes = "gradient_by_backward", "row column"
    at = noise(2, 5) + 0.5
    first = torch.zeros(2, 5)
    first[0, 0] = 1.0
    for function, expected in [(_cubes, at**2), (_twice_used, at.sin() + at * at.cos() + first)]:
        mistakes: dict[str, Tensor] = {
            "the value of the function is returned, not its gradient.": function(at),
            "the gradient points downhill: its sign is changed.": -expected,
            "the gradient is divided by the number of numbers: the sum became a mean.": expected / at.numel(),
        }
        _judge(name, fn, {"fn": function, "at": at}, expected, axes, mistakes, {"at": at})
        if at.requires_grad or at.grad is not None:
            raise CheckFailed(
                f"{name}: `at` itself records gradients afterwards; it should be as before.\n"
                "  Next: work on a tensor of your own, which holds the same numbers and has no history."
            )
    _check_leaf_with_gradient(name, fn, axes)
    actual = fn(_cubes, at)
    if actual.requires_grad:
        raise CheckFailed(
            f"{name}: the answer records gradients itself.\n  Next: return the bare numbers that backward left."
        )
    compare(f"{name} at a single number", fn(_cubes, torch.tensor(3.0)), torch.tensor(9.0), "")
    follows_input(name, lambda moved: fn(_cubes, moved), (at,), axes)


def _check_leaf_with_gradient(name: str, fn: Fn, axes: str) -> None:
    """`backward` adds to what is in `.grad`: neither the answer nor `at.grad` may show that."""
    leaf = noise(2, 5, seed=1).requires_grad_()
    leaf.grad = torch.full((2, 5), 10.0)
    right = leaf.detach() ** 2
    mistakes: dict[str, Tensor] = {
        "what stood in `at.grad` before is part of the answer: backward adds to it.": right + 10,
    }
    case = "where `at.grad` holds something already"
    actual = fn(_cubes, leaf)
    if actual is None:
        raise CheckFailed(
            f"{name} {case}: returned None.\n"
            "  A copy of a tensor that records gradients has a history, and `backward` leaves its `.grad` empty.\n"
            "  Next: cut the history before you switch gradients on."
        )
    compare(f"{name} {case}", actual, right, axes, mistakes)
    if leaf.grad is None or not torch.equal(leaf.grad, torch.full((2, 5), 10.0)) or not leaf.requires_grad:
        raise CheckFailed(
            f"{name} {case}: that was changed.\n"
            "  Next: work on a tensor of your own, which holds the same numbers and has no history."
        )
