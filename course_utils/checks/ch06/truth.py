"""Checks of chapter 06, judged against the truth: who stands for which feature, how well, and what hierarchies do."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch06.dictionaries import SQUARED_ERRORS
from course_utils.checks.ch06.sizes import (
    D_IN,
    LATENT,
    LEADS,
    WORDS,
    Fn,
    batch_of,
    by_instance,
    compare_slopes,
    every_kind,
)
from course_utils.checks.comparing import compare, follows_input, parts
from course_utils.checks.guarding import at_most_lines
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during

# ---------------------------------------------------------------------------------------------------------- matching


def tried_out(gain: Tensor) -> list[int]:
    """The definition: every way to give each row a column of its own, and the best of them."""
    table = gain.tolist()
    rows, columns = gain.shape
    ways = itertools.permutations(range(columns), rows)
    return list(max(ways, key=lambda way: sum(table[row][column] for row, column in enumerate(way))))


def greedily(gain: Tensor, most: bool = True) -> Tensor:
    """The largest gain of all first, then the largest of what is left."""
    left, found = gain.detach().clone().double(), torch.zeros(len(gain), dtype=torch.long)
    for _ in range(len(gain)):
        row, column = divmod(int(left.argmax() if most else left.argmin()), left.shape[1])
        found[row] = column
        left[row], left[:, column] = (-math.inf, -math.inf) if most else (math.inf, math.inf)
    return found


def row_by_row(gain: Tensor, order: Callable[[int], Sequence[int]] = range) -> Tensor:
    """Each row in its turn takes the best column that is left."""
    left, found = gain.detach().clone().double(), torch.zeros(len(gain), dtype=torch.long)
    for row in order(len(gain)):
        found[row] = left[row].argmax()
        left[:, found[row]] = -math.inf
    return found


def swapped_in_pairs(gain: Tensor) -> Tensor:
    """Begin with row i in column i, and exchange two rows' columns as long as that helps."""
    found = list(range(len(gain)))
    table, better = gain.tolist(), True
    while better:
        better = False
        for a, b in itertools.combinations(range(len(found)), 2):
            if table[a][found[b]] + table[b][found[a]] > table[a][found[a]] + table[b][found[b]] + 1e-9:
                found[a], found[b], better = found[b], found[a], True
    return torch.tensor(found)


def optimally(gain: Tensor) -> Tensor:
    return torch.tensor(tried_out(gain))


FIRST_TABLE = 3  # a seed with which every mistake below gives another assignment


def gains() -> list[Tensor]:
    """Tables of several sizes, one with two rows that want the same column, two in which a long chain pays.

    With the last one a search goes in circles if it takes for a gain what comes of rounding, in float32 or in float64.
    """
    tables = [noise(4, 5, seed=FIRST_TABLE), torch.tensor([[0.9, 0.8], [0.8, 0.1]])]
    tables += [noise(rows, columns, seed=50 + columns) for rows, columns in ((3, 5), (4, 4), (5, 6), (1, 3))]
    chain = torch.full((5, 5), -5.0)
    for row in range(5):
        chain[row, row] = 1.0
        chain[row, (row + 1) % 5] = 0.9
    chain[4, 0] = -3.0
    chain[:, 0] += torch.tensor([0.0, 7.5, 0.0, 0.0, 0.0])
    back = torch.full((5, 5), -5.0)  # the last row makes every other one move a column to the left
    for row in range(4):
        back[row, 4 - row], back[row, 3 - row] = 1.0, 0.9
    back[4, 4] = 1.0
    rounded = torch.tensor([[1.1, 1.0], [0.1, -0.5]], dtype=torch.float64)  # 0.1 - 1.1 + 1.1 is more than 0.1
    return [*tables, chain, -noise(4, 6, seed=60).abs(), 100 * noise(5, 5, seed=61), back, rounded]


@known_mistakes(
    {
        "the largest gain is taken first; it may force another row to take a bad column.": greedily,
        "each row in its turn takes the best column that is left.": row_by_row,
        "each row in its turn, from the last on, takes the best column that is left.": partial(
            row_by_row, order=lambda n: range(n - 1, -1, -1)
        ),
        "each row takes its own best column, although another has it.": lambda gain: gain.argmax(dim=-1),
        "the gains are made as small as possible.": lambda gain: optimally(-gain),
        "the absolute gains are made as large as possible.": lambda gain: optimally(gain.abs()),
        "row i has column i.": lambda gain: torch.arange(len(gain)),
        "only exchanges of two rows were tried; longer chains, and free columns, may be better.": swapped_in_pairs,
        "every assignment is tried; forty features and eighty latents have too many.": optimally,
    }
)
def check_best_assignment(fn: Fn) -> None:
    """The sum is compared, since several assignments may be best; then too many rows, and too many to try them all.

    Lines are counted from the start: a search that never ends is to be told so, too.
    """
    name = "best_assignment"
    for gain in gains():
        rows, columns = gain.shape
        where = f"{name} with {rows} rows, {columns} columns"
        for given in (gain.float(), gain.double(), gain.float().T.contiguous().T):
            with during(f"with {rows} rows, {columns} columns"), at_most_lines(where, MOST_LINES, ENDS):
                actual = fn(given)
            _compare_assignment(where, actual, given, torch.tensor(tried_out(gain)))
    for shape in ((3, 2), (2, 1)):
        must_raise(name, ValueError, f"with {shape[0]} rows, {shape[1]} columns", partial(fn, noise(*shape)))
    gain, right = large_table()
    where = f"{name} with {gain.shape[0]} rows, {gain.shape[1]} columns"
    with at_most_lines(where, MOST_LINES, GROWS):
        actual = fn(gain)
    _compare_assignment(where, actual, gain, right)
    follows_input(name, fn, (noise(4, 5, seed=FIRST_TABLE),), "row")


MOST_LINES = 200_000  # an answer that follows chains needs a hundredth of them
ENDS = "does your loop come to an end? What should be equal may differ in the last digit, which is no gain."
GROWS = "count how often your innermost loop runs, for twice as many rows, too."


def large_table(rows: int = 8, columns: int = 10) -> tuple[Tensor, Tensor]:
    """Gains of which the best assignment is known: no pair gains more than its row's and its column's share.

    The pairs of the assignment gain just that, and the columns that are left over have a share of 0.
    """
    right = torch.randperm(columns, generator=torch.Generator().manual_seed(7))[:rows]
    share = torch.zeros(columns).index_copy(0, right, noise(rows, seed=62).abs())
    lost = noise(rows, columns, seed=63).abs() + 0.05
    lost[torch.arange(rows), right] = 0.0
    return noise(rows, 1, seed=64) + share - lost, right


def _compare_assignment(where: str, actual: Any, gain: Tensor, right: Tensor) -> None:
    rows, columns = gain.shape
    if not isinstance(actual, Tensor) or actual.shape != right.shape or actual.dtype != right.dtype:
        compare(where, actual, right, "row")
    evidence = Evidence(where, actual)
    shown = gain.round(decimals=2).tolist() if gain.numel() < 10 else None
    table = f"  gain {shown}\n" if shown else ""
    if len(set(actual.tolist())) < rows or actual.min() < 0 or actual.max() >= columns:
        raise CheckFailed(
            f"{where}: every row needs a column of its own.\n{table}  got columns {actual.tolist()}",
            evidence=evidence,
            advice="  Next: look at when a column is given for the second time.",
        )
    best, got = (gain.gather(1, way[:, None]).sum().item() for way in (right, actual))
    if got < best - 1e-4 * max(1.0, abs(best)):
        raise CheckFailed(
            f"{where}: another assignment is better.\n{table}  columns {right.tolist()} gain {best:.4g} in all, "
            f"got columns {actual.tolist()}, which gain {got:.4g}",
            evidence=evidence,
            advice="  Next: follow by hand what your method does with this table.",
        )


def cosines(W_dec: Tensor, truth: Tensor) -> Tensor:
    """Pair by pair; 0 for a row of zeros."""
    table = []
    for feature in truth.tolist():
        own = math.hypot(*feature)
        lengths = [math.hypot(*row) for row in W_dec.tolist()]
        dots = [sum(a * b for a, b in zip(feature, row, strict=True)) for row in W_dec.tolist()]
        table.append([dot / (own * length) if length else 0.0 for dot, length in zip(dots, lengths, strict=True)])
    return torch.tensor(table, dtype=W_dec.dtype)


def pairing(
    gain: Callable[[Tensor, Tensor], Tensor] = cosines,
    assign: Callable[[Tensor], Tensor] = optimally,
    value: Callable[[Tensor, Tensor], Tensor] = cosines,
) -> Fn:
    """match_features by another gain, another assignment, or with another value in the end."""

    def match_features(W_dec: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        W_dec, truth = W_dec.detach(), truth.detach()
        assignment = assign(gain(W_dec, truth))
        return assignment, value(W_dec, truth).gather(1, assignment[:, None])[:, 0]

    return match_features


def dot_products(W_dec: Tensor, truth: Tensor) -> Tensor:
    return truth @ W_dec.T


MATCHING: dict[str, Fn] = {
    "the largest cosine is taken first, greedily; the sum should be as large as possible.": pairing(assign=greedily),
    "each feature takes its nearest latent, although another has it.": pairing(assign=lambda gain: gain.argmax(dim=-1)),
    "the dot product is used; rows and features may have any norm.": pairing(dot_products, value=dot_products),
    "the decoder rows are not normalised.": pairing(
        lambda W_dec, truth: dot_products(W_dec, torch.nn.functional.normalize(truth, dim=-1)),
        value=lambda W_dec, truth: dot_products(W_dec, torch.nn.functional.normalize(truth, dim=-1)),
    ),
    "the features are not normalised.": pairing(
        lambda W_dec, truth: dot_products(torch.nn.functional.normalize(W_dec, dim=-1), truth),
        value=lambda W_dec, truth: dot_products(torch.nn.functional.normalize(W_dec, dim=-1), truth),
    ),
    "the absolute cosine is used; a latent that points the other way stands for something else.": pairing(
        lambda W_dec, truth: cosines(W_dec, truth).abs(), value=lambda W_dec, truth: cosines(W_dec, truth).abs()
    ),
}


def dictionary_and_truth(seed: int, n_features: int = 5) -> tuple[Tensor, Tensor]:
    """Rows of all lengths near features of all lengths, in another order, and one latent to spare."""
    truth = noise(n_features, 4, seed=seed)
    order = torch.randperm(n_features, generator=torch.Generator().manual_seed(seed))
    rows = truth[order] + noise(n_features, 4, seed=seed + 1, scale=0.9)
    W_dec = torch.cat([rows, noise(7 - n_features, 4, seed=seed + 2)])
    lengths = torch.tensor([0.3, 2.0, 1.0, 4.0, 0.1, 3.0, 0.7])[:, None]
    return W_dec * lengths, truth * torch.tensor([2.0, 0.5, 1.5, 3.0, 0.2])[:n_features, None]


SEEDS = (142, 289, 376)


@known_mistakes(MATCHING)
def check_match_features(fn: Fn) -> None:
    """The assignment, then its cosines; a row of zeros; no gradient; too few latents."""
    name = "match_features"
    for seed in SEEDS:
        W_dec, truth = dictionary_and_truth(seed)
        for words, rows in (("", W_dec), (" with a row of zeros", W_dec * (torch.arange(7) != 2)[:, None])):
            assignment, cosine = parts(name, fn(rows, truth), "assignment", "cosine")
            right = optimally(cosines(rows, truth))
            compare(f"{name}{words}: the assignment", assignment, right, "feature")
            compare(
                f"{name}{words}: the cosines", cosine, cosines(rows, truth).gather(1, right[:, None])[:, 0], "feature"
            )
        if fn(W_dec.clone().requires_grad_(), truth)[1].requires_grad:
            raise CheckFailed(f"{name}: the cosines have a graph.\n  Next: detach them.")
        follows_input(f"{name}: the cosines", lambda *given: fn(*given)[1], (W_dec, truth), "feature")
    too_few = partial(fn, W_dec[:3], truth)
    must_raise(name, ValueError, "with 3 latents for 5 features", too_few)


def sharing_of(
    match: Fn, above: Callable[[Tensor, float], Tensor] = lambda cosine, threshold: cosine > threshold
) -> Fn:
    """A recovery with another match or another count."""
    return lambda W_dec, truth, threshold: above(match(W_dec, truth)[1], threshold).float().mean().item()


@known_mistakes(
    {sentence: sharing_of(match) for sentence, match in MATCHING.items() if "rows are not" not in sentence},
    {
        "it is a number of features; it should be a share.": lambda W_dec, truth, threshold: float(
            (pairing()(W_dec, truth)[1] > threshold).sum()
        ),
        "it is the share of the latents; it should be the share of the features.": lambda W_dec, truth, threshold: (
            (pairing()(W_dec, truth)[1] > threshold).sum().item() / len(W_dec)
        ),
        "it is the share of features that are not recovered.": sharing_of(
            pairing(), lambda cosine, threshold: cosine <= threshold
        ),
        "it is the mean cosine; the threshold is not used.": lambda W_dec, truth, threshold: (
            pairing()(W_dec, truth)[1].mean().item()
        ),
        "the threshold is fixed at 0.9.": sharing_of(pairing(), lambda cosine, threshold: cosine > 0.9),
        "the sign of the cosine is dropped; a latent that points the other way stands for something else.": sharing_of(
            pairing(), lambda cosine, threshold: cosine.abs() > threshold
        ),
    },
)
def check_recovery(fn: Fn) -> None:
    """Several thresholds, and a latent that points the other way."""
    name = "recovery"
    for seed in SEEDS:
        W_dec, truth = dictionary_and_truth(seed)
        best = sorted(pairing()(W_dec, truth)[1].tolist())
        thresholds = [sum(pair) / 2 for pair in itertools.pairwise(best)]
        actual = [fn(W_dec, truth, threshold) for threshold in thresholds]
        for share in actual:
            if isinstance(share, bool) or not isinstance(share, float):
                kind = "None" if share is None else f"a {type(share).__name__}"
                raise CheckFailed(
                    f"{name}: expected a plain number, got {kind}.\n  Next: `.item()` makes one of a tensor."
                )
        right = [sum(value > threshold for value in best) / len(best) for threshold in thresholds]
        where = f"{name} at thresholds of {', '.join(f'{threshold:.3f}' for threshold in thresholds)}"
        compare(where, torch.tensor(actual), torch.tensor(right), "threshold")
    opposite = torch.tensor([fn(-truth[:1], truth[:1], 0.5)])
    compare(f"{name} of one latent, opposite to the feature", opposite, torch.zeros(1), "threshold")


# ------------------------------------------------------------------------------------------------------------- firing


def counted(
    latents: Tensor,
    features: Tensor,
    assignment: Tensor,
    fires: Callable[[float], bool] = lambda value: value > 0,
    follow: bool = True,
    below: Callable[..., tuple[int, int]] = lambda n_fires, n_there, n_batch: (n_fires, n_there),
    flip: bool = False,
    nothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sample by sample, with switches for what people get wrong."""
    shares: list[list[float]] = [[], []]
    for feature in range(features.shape[1]):
        latent = int(assignment[feature]) if follow else feature
        pairs = [
            (fires(value), there > 0)
            for value, there in zip(latents[:, latent].tolist(), features[:, feature].tolist(), strict=True)
        ]
        both = sum(fired and there for fired, there in pairs)
        totals = below(sum(fired for fired, _ in pairs), sum(there for _, there in pairs), len(pairs))
        for share, total in zip(shares, totals, strict=True):
            share.append(both / total if total else nothing)
    precision, recall = (torch.tensor(share, dtype=latents.dtype) for share in shares)
    return (recall, precision) if flip else (precision, recall)


@known_mistakes(
    {
        "precision and recall are swapped.": partial(counted, flip=True),
        "latent i is taken for feature i; `assignment` says which one it is.": partial(counted, follow=False),
        "`assignment` is used the wrong way round: `assignment[f]` is the latent of feature f.": (
            lambda latents, features, assignment: counted(latents, features, assignment.argsort())
        ),
        "both are shares of all samples.": partial(counted, below=lambda fires, there, n: (n, n)),
        "both are shares of the samples in which the latent fires.": partial(
            counted, below=lambda fires, there, n: (fires, fires)
        ),
        "a latent counts as firing at a value above 0.5; it should be above 0.": partial(
            counted, fires=lambda value: value > 0.5
        ),
        "a latent counts as firing at 0, too.": partial(counted, fires=lambda value: value >= 0),
        "a share of no samples is NaN; it should be 0.": partial(counted, nothing=math.nan),
        "a share of no samples is 1; it should be 0.": partial(counted, nothing=1.0),
    }
)
def check_firing_scores(fn: Fn) -> None:
    """More latents than features; then a latent that never fires, and a feature that is never there."""
    name = "firing_scores"
    for empty in (False, True):
        latents, features, assignment = firing(empty)
        words = " with a silent latent and an absent feature" if empty else ""
        answer = parts(name, fn(latents, features, assignment), "precision", "recall")
        for label, got, right in zip(
            ("precision", "recall"), answer, counted(latents, features, assignment), strict=True
        ):
            compare(f"{name}{words}: the {label}", got, right, "feature")
        for number, label in enumerate(("precision", "recall")):
            every_kind_of_shares(
                f"{name}: the {label}", lambda *given, n=number: fn(*given)[n], latents, features, assignment
            )


def every_kind_of_shares(name: str, fn: Fn, *inputs: Tensor) -> None:
    """Shares are counts: they follow dtype and device, and carry no gradient."""
    follows_input(name, fn, inputs, "feature")


def firing(empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and features of thirty samples, which agree now and then."""
    features = noise(30, 5, seed=80).relu()
    assignment = torch.tensor([3, 0, 6, 1, 4])
    latents = (noise(30, 7, seed=81) - 0.4).relu()
    latents[:, assignment] = latents[:, assignment] + 0.7 * features * (noise(30, 5, seed=82) > -0.5)
    if empty:
        latents[:, assignment[2]] = 0.0
        features[:, 4] = 0.0
        latents[:, assignment[0]] = features[:, 0] = (torch.arange(30) == 7).float()  # there once
    return latents, features, assignment


# ---------------------------------------------------------------------------------------------------------- shrinkage


def ratio(
    top: Callable[[Tensor, Tensor], Tensor] = lambda x, made: made.square().sum(-1),
    bottom: Callable[[Tensor, Tensor], Tensor] = lambda x, made: (made * x).sum(-1),
    join: Callable[[Tensor, Tensor], Tensor] = lambda top, bottom: top.sum(0) / bottom.sum(0),
) -> Fn:
    """A quotient of two sums, with something else in one of its parts."""
    return lambda x, reconstruction: join(top(x, reconstruction), bottom(x, reconstruction))


def fitted(x: Tensor, made: Tensor) -> Tensor:
    """Of one instance: what the reconstructions have to be divided by, by least squares."""
    factor = torch.linalg.lstsq(made.double().flatten()[:, None], x.double().flatten()[:, None]).solution
    return (1 / factor[0, 0]).to(x.dtype)


@known_mistakes(
    {
        "it is upside down: this is the factor that repairs the length.": ratio(
            join=lambda top, bottom: bottom.sum(0) / top.sum(0)
        ),
        "the mean of the samples' quotients is taken; sum both parts first.": ratio(
            join=lambda top, bottom: (top / bottom).mean(0)
        ),
        "it is the factor from x to the reconstruction: divided by |x|² instead.": ratio(
            top=lambda x, made: (made * x).sum(-1), bottom=lambda x, made: x.square().sum(-1)
        ),
        "squares are compared with squares: |reconstruction|² / |x|².": ratio(
            bottom=lambda x, made: x.square().sum(-1)
        ),
        "lengths are compared: |reconstruction| / |x|.": ratio(
            top=lambda x, made: made.norm(dim=-1), bottom=lambda x, made: x.norm(dim=-1)
        ),
        "the absolute values of the products are summed.": ratio(bottom=lambda x, made: (made * x).abs().sum(-1)),
    }
)
def check_shrinkage(fn: Fn) -> None:
    """Against least squares; reconstructions that are short, and one that is long."""
    name = "shrinkage"
    for lead in LEADS:
        x = batch_of(lead, D_IN, 90)
        made = 0.7 * x + 0.2 * batch_of(lead, D_IN, 91)
        for words, reconstruction in (("", made), (" of twice the reconstruction", 2 * made)):
            right = by_instance(lead, fitted, x, reconstruction, axes=(1, 1))
            compare(f"{name}{words}", fn(x, reconstruction), right, WORDS[lead].strip())
        every_kind(name, fn, (x, made), WORDS[lead].strip())


# --------------------------------------------------------------------------------------------------------- hierarchies

PARENT = torch.tensor([-1, -1, 0, 1, 0])


def absorbed(
    latents: Tensor,
    features: Tensor,
    assignment: Tensor,
    parent: Tensor,
    counts: Callable[..., bool] = lambda there, fires, parent_there, parent_fires: there and fires,
    alone: Callable[..., bool] = lambda there, fires, parent_there, parent_fires: not parent_fires,
    roots: float = 0.0,
    follow: bool = True,
    nothing: float = 0.0,
) -> Tensor:
    """Sample by sample, with switches for what people get wrong."""
    rates = []
    for feature, above in enumerate(parent.tolist()):
        if above < 0 and not math.isnan(roots):
            rates.append(roots)
            continue
        own, other = (assignment[feature], assignment[above]) if follow else (feature, above)
        n_counted = n_alone = 0
        for fired, there in zip(latents.tolist(), features.tolist(), strict=True):
            facts = there[feature] > 0, fired[int(own)] > 0, there[above] > 0, fired[int(other)] > 0
            n_counted += bool(counts(*facts))
            n_alone += bool(counts(*facts) and alone(*facts))
        rates.append(n_alone / n_counted if n_counted else nothing)
    return torch.tensor(rates, dtype=latents.dtype)


@known_mistakes(
    {
        "samples in which the child's own latent is silent count too.": partial(
            absorbed, counts=lambda there, fires, parent_there, parent_fires: there
        ),
        "it is divided by all samples with the child; only those in which its latent fires count.": partial(
            absorbed,
            counts=lambda there, fires, parent_there, parent_fires: there,
            alone=lambda there, fires, parent_there, parent_fires: fires and not parent_fires,
        ),
        "samples without the child count too.": partial(
            absorbed, counts=lambda there, fires, parent_there, parent_fires: fires
        ),
        "all samples with the parent count; only those with the child should.": partial(
            absorbed, counts=lambda there, fires, parent_there, parent_fires: parent_there
        ),
        "it is the share in which the parent's latent fires; it should be silent.": partial(
            absorbed, alone=lambda there, fires, parent_there, parent_fires: parent_fires
        ),
        "it asks whether the parent is there; it should ask whether the parent's latent fires.": partial(
            absorbed, alone=lambda there, fires, parent_there, parent_fires: not parent_there
        ),
        "latent i is taken for feature i; `assignment` says which one it is.": partial(absorbed, follow=False),
        "a feature without a parent gets the last feature for one: an index of -1.": partial(absorbed, roots=math.nan),
        "a share of no samples is NaN; it should be 0.": partial(absorbed, nothing=math.nan),
    }
)
def check_absorption_rate(fn: Fn) -> None:
    """Two parents, three children; then a child that is never there, and one that is there once."""
    name = "absorption_rate"
    for empty in (False, True):
        latents, features, assignment = firing()
        for child, above in enumerate(PARENT.tolist()):
            if above >= 0:
                features[:, child] = features[:, child] * (features[:, above] > 0)
        latents[:10, assignment[0]] = latents[5:20, assignment[1]] = 0.0
        if empty:
            features[:, 3] = 0.0
            alone = (latents[:10, assignment[2]] > 0) & (features[:10, 2] > 0)
            features[torch.arange(30) != alone.nonzero()[0], 2] = 0.0  # there once, and its parent's latent is silent
        words = " with a child that is never there, and one that is there once" if empty else ""
        actual = fn(latents, features, assignment, PARENT)
        compare(f"{name}{words}", actual, absorbed(latents, features, assignment, PARENT), "feature")
        follows_input(name, fn, (latents, features, assignment, PARENT), "feature")


def nested(
    end: Callable[[Tensor], Tensor] = lambda error: error.square().sum(-1).mean(0),
    which: Callable[[int, int], slice] = lambda m, before: slice(m),
    bias: Callable[[Tensor], Tensor | float] = lambda b_dec: b_dec,
    join: Callable[[Tensor], Tensor] = lambda losses: losses.sum(0),
    over: Callable[[Sequence[int], int], Sequence[int]] = lambda prefixes, n: prefixes,
) -> Fn:
    """matryoshka_loss with something else in one of its steps."""

    def matryoshka_loss(x: Tensor, latents: Tensor, W_dec: Tensor, b_dec: Tensor, prefixes: Sequence[int]) -> Tensor:
        losses, before = [], 0
        for m in over(prefixes, W_dec.shape[-2]):
            part = which(m, before)
            made = (latents[..., part, None] * W_dec[..., part, :]).sum(-2)
            losses.append(end(x - made - bias(b_dec)))
            before = m
        return join(torch.stack(losses))

    return matryoshka_loss


def nested_by_loops(x: Tensor, latents: Tensor, W_dec: Tensor, b_dec: Tensor, prefixes: Sequence[int]) -> Tensor:
    """Of one instance: sample by sample, adding one latent after the other."""
    total = x.new_zeros(())
    for sample, row in zip(x, latents, strict=True):
        for m in prefixes:
            made = b_dec
            for place in range(m):
                made = made + row[place] * W_dec[place]
            total = total + ((sample - made) ** 2).sum() / len(x)
    return total


@known_mistakes(
    {sentence: nested(end) for sentence, end in SQUARED_ERRORS.items()},
    {
        "each dictionary has only the latents that are new; they should be nested.": nested(
            which=lambda m, before: slice(before, m)
        ),
        "the last m latents are used; it should be the first m.": nested(which=lambda m, before: slice(-m, None)),
        "latent m belongs to the prefix m, one too many.": nested(which=lambda m, before: slice(m + 1)),
        "the decoder bias is left out.": nested(bias=lambda b_dec: 0.0),
        "the losses are averaged; they should be summed.": nested(join=lambda losses: losses.mean(0)),
        "only the last prefix counts.": nested(join=lambda losses: losses[-1]),
        "only the first prefix counts.": nested(join=lambda losses: losses[0]),
        "the whole dictionary is added to the prefixes; it counts only if it is one of them.": nested(
            over=lambda prefixes, n: [*prefixes, n]
        ),
    },
)
def check_matryoshka_loss(fn: Fn) -> None:
    """Several prefixes, with the whole dictionary and without."""
    name = "matryoshka_loss"
    for lead in LEADS:
        x, latents = batch_of(lead, D_IN, 92), batch_of(lead, LATENT, 93).relu()
        W_dec, b_dec = noise(*lead, LATENT, D_IN, seed=94), noise(*lead, D_IN, seed=95)
        axes = WORDS[lead].strip()
        for prefixes in ([2, 4], [1, 3, LATENT], [3]):
            with during(f"with the prefixes {prefixes}"):
                actual = fn(x, latents, W_dec, b_dec, prefixes)
            right = by_instance(
                lead, partial(nested_by_loops, prefixes=prefixes), x, latents, W_dec, b_dec, axes=(1, 1, 0, 0)
            )
            compare(f"{name} with the prefixes {prefixes}", actual, right, axes)
        learns = {"latents": latents, "W_dec": W_dec, "b_dec": b_dec}
        compare_slopes(
            name,
            lambda x=x, **given: fn(x, *given.values(), [2, 4]),
            lambda x=x, **given: nested()(x, *given.values(), [2, 4]),
            learns,
            {
                "latents": f"batch {WORDS[lead]}latent",
                "W_dec": f"{WORDS[lead]}latent d_in",
                "b_dec": f"{WORDS[lead]}d_in",
            },
        )
        every_kind(name, fn, (x, latents, W_dec, b_dec, (2, 4)), axes)
