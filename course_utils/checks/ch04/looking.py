"""Checks of chapter 04, looking: attention by kind, induction on random tokens, and what a model would say next."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import compare, compare_kind, follows_input
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import agree, shown
from course_utils.checks.standins.patterns import ToyPatterns
from course_utils.checks.standins.tokenizer import ToyTokenizer
from course_utils.hooks import ActivationCache

Fn = Callable[..., Any]
TABLE = "layer head"
INF = torch.inf
DOUBLE = {"rtol": 1e-10, "atol": 1e-12}  # how well float64 agrees: float32 inside shows
OVERFLOW = "exp is divided by its sum as it is: exp of more than 88 is infinite, and inf / inf is NaN."


def exp_over_sum(scores: Tensor) -> Tensor:
    """A softmax that overflows."""
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------- scores


def causal_patterns(n_layers: int, n_batch: int, n_heads: int, n_pos: int, seed: int = 0) -> list[Tensor]:
    """One attention pattern for each layer, all different; the rows sum to 1."""
    future = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
    shape = (n_batch, n_heads, n_pos, n_pos)
    return [
        noise(*shape, seed=seed + layer, scale=2.0).masked_fill(future, -INF).softmax(-1) for layer in range(n_layers)
    ]


def cache_of(patterns: Sequence[Tensor]) -> ActivationCache:
    """A cache as of a run: scores and z are there as well."""
    activations = {}
    for layer, pattern in enumerate(patterns):
        activations[f"blocks.{layer}.attn.hook_attn_scores"] = pattern.log()
        activations[f"blocks.{layer}.attn.hook_pattern"] = pattern
        activations[f"blocks.{layer}.hook_attn_out"] = pattern.new_ones(len(pattern), pattern.shape[-1], 7)
    return ActivationCache(activations)


def mean_attention(patterns: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The definition: add up the attention from each query to its key, in every text, and divide by their number."""
    table = []
    for pattern in patterns:
        n_batch, n_heads = pattern.shape[:2]
        weights = pattern.tolist()
        rows = range(n_batch)
        table.append(
            [
                sum(weights[row][head][query][key] for row in rows for query, key in pairs) / (n_batch * len(pairs))
                for head in range(n_heads)
            ]
        )
    return torch.tensor(table, dtype=patterns[0].dtype)


Pairs = list[tuple[int, int]]  # (query, key)
PairsFor = Callable[[int], Pairs]  # given n_half where a function is told it, otherwise the number of positions


def mean(found: Tensor) -> Tensor:
    return found.mean((1, 3))


def scored(pairs: PairsFor, end: Fn = lambda found, n_pos: mean(found)) -> Fn:
    """A score that looks at these pairs; `end` makes one of the attention found, [layer batch head pair]."""

    def scores(cache: Any, n_half: int | None = None) -> Tensor:
        patterns = cache.stack("pattern")
        n_pos = patterns.shape[-1]
        found = [patterns[..., query, key] for query, key in pairs(n_half or n_pos)]
        return end(torch.stack(found, -1), n_pos)

    return scores


def score_mistakes(pairs: PairsFor, others: Mapping[str, PairsFor]) -> dict[str, Fn]:
    """Other (query, key) pairs, texts or positions treated otherwise, axes mixed up."""
    ends: dict[str, Fn] = {
        "the layers are sorted by their names as text: 0, 1, 10, 11, 2, ...": lambda found, n: mean(
            found[sorted(range(len(found)), key=str)]
        ),
        "layers and heads are mixed up: a transpose became a reshape.": lambda found, n: mean(found).T.reshape(
            mean(found).shape
        ),
        "the layers come in reverse order.": lambda found, n: mean(found.flip(0)),
        "the positions are summed; average over them.": lambda found, n: found.mean(1).sum(-1),
        "the mean is taken over all pairs of positions.": lambda found, n: found.mean(1).sum(-1) / n**2,
        "every layer has the scores of the first.": lambda found, n: mean(found[:1].expand_as(found)),
        "the largest attention is taken, not the mean.": lambda found, n: found.amax((1, 3)),
        "only the first text of the batch is looked at.": lambda found, n: mean(found[:, :1]),
        "only the last text of the batch is looked at.": lambda found, n: mean(found[:, -1:]),
        "the texts of the batch are summed; average over them.": lambda found, n: found.sum(1).mean(-1),
        "the sum is divided by the number of positions, but not all of them count.": lambda found, n: (
            found.mean(1).sum(-1) / n
        ),
    }
    return {hint: scored(wrong) for hint, wrong in others.items()} | {
        hint: scored(pairs, end) for hint, end in ends.items()
    }


def _check_scores(name: str, fn: Fn, sizes: tuple[int, int, int, int], pairs: Pairs, *arguments: Any) -> None:
    patterns = causal_patterns(*sizes)
    compare(name, fn(cache_of(patterns), *arguments), mean_attention(patterns, pairs), TABLE)
    follows_input(name, lambda *moved: fn(cache_of(moved), *arguments), tuple(patterns), TABLE)
    doubles = [
        pattern.double().requires_grad_() for pattern in patterns
    ]  # with a graph, as after a run without no_grad
    compare(f"{name} in float64", fn(cache_of(doubles), *arguments), mean_attention(doubles, pairs), TABLE, **DOUBLE)


SIZES = [(3, 2, 5, 7), (2, 1, 4, 5), (12, 1, 2, 4), (1, 2, 1, 5)]  # layers, batch, heads, positions


def to_itself(n: int) -> Pairs:
    return [(query, query) for query in range(n)]


def to_previous(n: int) -> Pairs:
    return [(query, query - 1) for query in range(1, n)]


@known_mistakes(
    score_mistakes(
        to_previous,
        {
            "the diagonal is off by one: it is the attention to the own position.": to_itself,
            "the diagonal is off by one: it is the attention two positions back.": lambda n: [
                (query, query - 2) for query in range(2, n)
            ],
            "query and key are swapped: this is the attention to the position after, which is always 0.": lambda n: [
                (key, query) for query, key in to_previous(n)
            ],
            "query 1 is left out.": lambda n: to_previous(n)[1:],
            "only the last query counts.": lambda n: to_previous(n)[-1:],
        },
    )
)
def check_previous_token_scores(fn: Fn) -> None:
    """Two sizes of cache, all different."""
    for sizes in SIZES:
        _check_scores("previous_token_scores", fn, sizes, to_previous(sizes[-1]))


# ---------------------------------------------------------------------------------------------------------- induction

# layers, batch, heads, positions; and the length of a half
HALVES = [((3, 2, 5, 9), 4), ((2, 1, 4, 7), 3), ((12, 1, 2, 5), 2), ((1, 2, 1, 5), 2)]


def looking_back(nearer: int = 0, first: int = 0, last: int = 0) -> PairsFor:
    """Queries of the second half, each with the key that stands n_half positions before it, or so much nearer.

    `first` and `last` move the ends of the stretch of queries.
    """
    return lambda n: [
        (query, query - n + nearer) for query in range(n + 1 + first, 2 * n + 1 + last) if query >= n - nearer
    ]


def stretches(nearer: int) -> dict[str, PairsFor]:
    """Other stretches of the right diagonal."""
    return {
        "the whole diagonal is averaged; only queries of the second half count.": looking_back(nearer, first=-99),
        "the first queries of the diagonal are taken; the second half is at its end.": looking_back(
            nearer, -1 - nearer, -1 - nearer
        ),
        "the last query is left out.": looking_back(nearer, last=-1),
        "the first query of the second half is left out.": looking_back(nearer, first=1),
        "only the last query counts.": lambda n: looking_back(nearer)(n)[-1:],
        "the diagonal is off by one: it is one before the first occurrence.": looking_back(-1),
    }


INDUCTION = score_mistakes(
    looking_back(1),
    {
        **stretches(1),
        "the queries are one too early: with `bos` in front the second half is positions n_half + 1 to 2 n_half.": (
            looking_back(1, -1, -1)
        ),
        "the query before the second half is counted too.": looking_back(1, first=-1),
        "it is the attention to the same token's first occurrence; look at the one after it.": looking_back(0),
        "the diagonal is off by one: it is two after the first occurrence.": looking_back(2),
    },
)


@known_mistakes(INDUCTION)
def check_induction_scores(fn: Fn) -> None:
    """Two lengths of half."""
    for sizes, n in HALVES:
        _check_scores("induction_scores", fn, sizes, looking_back(1)(n), n)


@known_mistakes(
    score_mistakes(
        looking_back(),
        {
            **stretches(0),
            "it is the attention to the token after the first occurrence; look at that itself.": looking_back(1),
            "it is the attention to the own position, not to the first occurrence.": lambda n: to_itself(2 * n + 1)[
                n + 1 :
            ],
        },
    )
)
def check_duplicate_token_scores(fn: Fn) -> None:
    """Two lengths of half."""
    for sizes, n in HALVES:
        _check_scores("duplicate_token_scores", fn, sizes, looking_back()(n), n)


def in_a_run(scores: Fn) -> Fn:
    """The same of a model's patterns."""

    @torch.no_grad()
    def of_patterns(model: Any, tokens: Tensor, n_half: int) -> Tensor:
        model(tokens)
        return scores(cache_of(model.patterns(tokens)), n_half)

    return of_patterns


@known_mistakes({hint: in_a_run(scores) for hint, scores in INDUCTION.items()})
def check_induction_scores_by_hook(fn: Fn) -> None:
    """Numbers first; then that one run does it, that nothing is kept, and that nothing is left behind."""
    name = "induction_scores_by_hook"
    for (n_layers, n_batch, n_heads, n_pos), n in HALVES:
        model = ToyPatterns(n_layers, n_heads)
        tokens = torch.randint(19, (n_batch, n_pos), generator=torch.Generator().manual_seed(3))
        actual = fn(model, tokens, n)
        compare(name, actual, mean_attention(model.patterns(tokens), looking_back(1)(n)), TABLE)
        if actual.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
        if model.runs != 1:
            raise CheckFailed(f"{name}: it ran the model {model.runs} times.\n  Next: attach all hooks, then run once.")
        if model.outlived:
            raise CheckFailed(
                f"{name}: when the run was over, {model.outlived} of {n_layers} patterns were still in memory.\n"
                "  Next: reduce each pattern to one number per head inside the hook (a slice of it keeps all of it)."
            )
    with nothing_left_behind(name, model):
        fn(model, tokens, n)
    model.fails = True
    with nothing_left_behind(f"{name} after a run that ended in an exception", model):
        assert_stops(name, lambda: fn(model, tokens, n), "the model")


def repeating(join: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Fn:
    """Tokens drawn as they should be; `join(bos, half)` gives what the rows are made of."""

    def tokens(n_batch: int, n_half: int, d_vocab: int, generator: torch.Generator, bos: int) -> Tensor:
        half = torch.randint(d_vocab, (n_batch, n_half), generator=generator)
        return torch.cat([*join(torch.full((n_batch, 1), bos), half)], 1)

    return tokens


@known_mistakes(
    {
        "`bos` is missing: it stands in front of the first half.": repeating(lambda bos, half: [half, half]),
        "`bos` stands in front of each half; it begins the row, once.": repeating(
            lambda bos, half: [bos, half, bos, half]
        ),
        "the tokens come only once.": repeating(lambda bos, half: [bos, half]),
        "`bos` ends the row.": repeating(lambda bos, half: [half, half, bos]),
        "each token is repeated at once; the whole half should come again.": repeating(
            lambda bos, half: [bos, half.repeat_interleave(2, 1)]
        ),
        "the second half is the first one backwards.": repeating(lambda bos, half: [bos, half, half.flip(1)]),
        "the second half comes from another row.": repeating(lambda bos, half: [bos, half, half.roll(1, 0)]),
    }
)
def check_repeated_tokens(fn: Fn) -> None:
    """The form of one batch; then what a large one says about the chances; then where its numbers come from."""
    name, call = "repeated_tokens", "repeated_tokens(3, 5, 11, generator, bos=12)"
    generator = torch.Generator().manual_seed(1)
    before, beginning = torch.get_rng_state(), generator.get_state()
    actual = fn(3, 5, 11, generator, 12)
    _check_form(name, call, actual, 3, 5, 12)
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed(f"{name}: it drew from torch's global generator.\n  Next: pass generator=generator.")
    if torch.equal(generator.get_state(), beginning):
        raise CheckFailed(
            f"{name}: it left `generator` as it was, so every batch would be the same.\n"
            "  Next: draw from the generator itself, not from a copy."
        )
    again = fn(3, 5, 11, torch.Generator().manual_seed(1), 12)
    if not torch.equal(actual, again):
        raise CheckFailed(
            f"{name}: the same seed gave two different batches.\n  Next: take every random number from `generator`."
        )
    if torch.equal(fn(3, 5, 11, torch.Generator().manual_seed(2), 12), actual):
        raise CheckFailed(f"{name}: two seeds gave the same batch.\n  Next: draw from `generator` as it comes.")
    if torch.equal(fn(3, 5, 11, generator, 12), actual):
        raise CheckFailed(
            f"{name}: the second batch from one generator is the first again.\n  Next: do not seed it yourself."
        )
    _check_chances(name, fn(700, 10, 7, generator, 3)[:, 1:11])
    if torch.cuda.is_available():
        on_gpu = fn(3, 5, 11, torch.Generator("cuda").manual_seed(1), 12)
        if on_gpu.device.type != "cuda":
            raise CheckFailed(
                f"{name}: the generator is on the GPU, the tokens are not.\n  Next: device=generator.device."
            )


def _alike(tokens: Tensor) -> Tensor:
    """Which places of a text hold the same tokens in all rows, and which hold another row's: not what was drawn."""
    shifted = torch.stack([tokens.roll(shift, 0) for shift in range(len(tokens))])  # [shift row place]
    alike = (tokens[:, :, None] == shifted[:, :, None, :]).all(1)
    return torch.stack([alike[0], alike[1:].any(0)])


def _check_form(name: str, call: str, actual: Any, n_batch: int, n_half: int, bos: int) -> None:
    """Diagnoses with evidence that does not depend on which tokens were drawn."""
    want = (n_batch, 1 + 2 * n_half)
    if not isinstance(actual, Tensor):
        compare(name, actual, torch.zeros(want, dtype=torch.long), "batch pos")
    if tuple(actual.shape) != want:
        raise CheckFailed(
            f"{name}: wrong shape.\n  {call}\n  expected (batch={want[0]}, pos={want[1]})\n"
            f"  got      {tuple(actual.shape)}",
            evidence=Evidence("the shape", tuple(actual.shape)),
            advice="  Next: print the shape after each step.",
        )
    compare_kind(name, actual, torch.zeros(want, dtype=torch.long))
    first, second = actual[:, 1 : n_half + 1], actual[:, n_half + 1 :]
    if not (actual[:, 0] == bos).all():
        row = int((actual[:, 0] != bos).int().argmax())
        raise CheckFailed(
            f"{name}: wrong answer.\n  {call}\n  first at [batch={row}, pos=0]: expected bos, {bos}, got "
            f"{actual[row, 0]}",
            evidence=Evidence("where `bos` stands", (actual == bos).all(0)),
            advice="  Next: begin every row with `bos`.",
        )
    if not torch.equal(first, second):
        row, place = (first != second).nonzero()[0].tolist()
        raise CheckFailed(
            f"{name}: the second half is not the first one again.\n  {call}\n"
            f"  first at [batch={row}, pos={n_half + 1 + place}]: expected {first[row, place]}, as at "
            f"pos={1 + place}, got {second[row, place]}",
            evidence=Evidence("which places are alike", _alike(actual)),
            advice="  Next: draw the half once, and use it twice.",
        )
    if (first == first[:1]).all():
        raise CheckFailed(
            f"{name}: all rows are the same.\n  {call}\n  Next: draw [n_batch, n_half] tokens, another half per row."
        )


def _check_chances(name: str, half: Tensor) -> None:
    """7000 tokens of a vocabulary of 7: each at every place, as often as the others, whatever its neighbours are."""
    call = "repeated_tokens(700, 10, 7, generator, bos=3)"
    lowest, highest = int(half.min()), int(half.max())
    if (lowest, highest) != (0, 6):
        raise CheckFailed(
            f"{name}: wrong answer.\n  {call}\n  the random tokens go from {lowest} to {highest}, expected 0 to 6\n"
            "  Next: every token of the vocabulary can come, and d_vocab itself is none."
        )
    counts = torch.stack([(half == token).float().mean(0) for token in range(7)])  # [token, place]
    worst = (counts - 1 / 7).abs().max()
    overall = (counts.mean(1) - 1 / 7).abs().max()
    pairs = (half[:, 1:] == half[:, :-1]).float().mean()
    rows = (half[1:] == half[:-1]).float().mean()
    # five standard errors of a share of 1/7 among 700, and among 7000
    if worst > 0.067 or overall > 0.021 or (pairs - 1 / 7).abs() > 0.022 or (rows - 1 / 7).abs() > 0.021:
        raise CheckFailed(
            f"{name}: the tokens are not drawn independently, each with the same chance.\n  {call}\n"
            f"  shares of the tokens: {', '.join(f'{share:.3f}' for share in counts.mean(1).tolist())} "
            f"(each should be near {1 / 7:.3f}); neighbours are equal in {pairs:.0%} (near {1 / 7:.0%})\n"
            "  Next: draw each token by itself from the whole vocabulary; one may come twice."
        )


def rows(
    logits: Tensor,
    tokenizer: Any,
    k: int,
    chosen: Callable[[list[int], int], list[int]] = lambda order, k: order[:k],
    text: Callable[[Any, int], str] = lambda tokenizer, token: tokenizer.decode([token]),
    first: int = 1,
    number: Callable[[Tensor, list[int]], Tensor] = lambda logits, best: logits[best],
    chance: Callable[[Tensor, list[int]], Tensor] = lambda logits, best: logits.softmax(-1)[best],
) -> list[Any]:
    """The table of predictions, with switches for what people get wrong."""
    best = chosen(logits.argsort(descending=True).tolist(), k)
    texts = [text(tokenizer, token) for token in best]
    ranks = range(first, first + len(best))
    return [*zip(ranks, texts, number(logits, best).tolist(), chance(logits, best).tolist(), strict=True)]


@known_mistakes(
    {
        "the unlikeliest come first.": partial(rows, chosen=lambda order, k: order[::-1][:k]),
        "the likeliest come last.": partial(rows, chosen=lambda order, k: order[:k][::-1]),
        "the first tokens of the vocabulary are taken.": partial(rows, chosen=lambda order, k: [*range(k)]),
        "the pieces come from convert_ids_to_tokens; decode([id]) gives the text.": partial(
            rows, text=lambda tokenizer, token: tokenizer.convert_ids_to_tokens(token)
        ),
        "ranks count from 0; the likeliest has rank 1.": partial(rows, first=0),
        "they are log-probabilities; the statement asks for the logits.": partial(
            rows, number=lambda logits, best: logits.log_softmax(-1)[best]
        ),
        "they are probabilities.": partial(rows, number=lambda logits, best: logits.softmax(-1)[best]),
        "the softmax is taken over the k best only.": partial(
            rows, chance=lambda logits, best: logits[best].softmax(-1)
        ),
        "they are percentages.": partial(rows, chance=lambda logits, best: 100 * logits.softmax(-1)[best]),
        "they are log-probabilities.": partial(rows, chance=lambda logits, best: logits.log_softmax(-1)[best]),
        OVERFLOW: partial(rows, chance=lambda logits, best: exp_over_sum(logits)[best]),
        "they are the logits once more.": partial(rows, chance=lambda logits, best: logits[best]),
    }
)
def check_top_predictions(fn: Fn) -> None:
    """Few rows, one, the whole vocabulary, and logits far beyond 88; the columns one after another."""
    name, tokenizer = "top_predictions", ToyTokenizer()
    for seed, k, scale in [(1, 4, 2.0), (2, 1, 2.0), (3, 13, 2.0), (4, 3, 200.0)]:
        logits = noise(13, seed=seed, scale=scale)
        actual = fn(logits, tokenizer, k)
        call = f"{name}(logits, tokenizer, {k})"
        if not isinstance(actual, list) or not all(isinstance(row, tuple) and len(row) == 4 for row in actual):
            what = "None" if actual is None else f"a {type(actual).__name__}"
            if isinstance(actual, list) and actual:
                what = f"a list of {shown(actual[0])} and so on"
            raise CheckFailed(
                f"{name}: expected a list of rows (rank, token, logit, probability), got {what}.\n  {call}\n"
                "  Next: one tuple of four for each token."
            )
        order = sorted(range(13), key=logits.tolist().__getitem__, reverse=True)
        exps = [math.exp(value - float(logits.max())) for value in logits.tolist()]
        best, total = order[:k], sum(exps)
        columns: list[list[Any]] = [list(column) for column in zip(*actual, strict=True)] or [[]] * 4
        agree(f"{name}: the tokens", call, columns[1], [tokenizer.pieces[token] for token in best])
        agree(f"{name}: the ranks", call, columns[0], list(range(1, k + 1)))
        _close(f"{name}: the logits", columns[2], [logits[token].item() for token in best])
        _close(f"{name}: the probabilities", columns[3], [exps[token] / total for token in best])


def _close(name: str, actual: list[Any], expected: list[float]) -> None:
    """Numbers in a column of a table, as good as float32 is."""
    if not all(isinstance(value, float | int) for value in actual):
        kind = next(type(value).__name__ for value in actual if not isinstance(value, float | int))
        raise CheckFailed(f"{name}: expected plain numbers, got a {kind}.\n  Next: `.item()` makes one of a tensor.")
    compare(name, torch.tensor(actual, dtype=torch.float32), torch.tensor(expected), "row")
