"""Checks of chapter 04, looking: attention by kind, induction on random tokens, and what a model would say next."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch04.hooks import Stop, assert_stops
from course_utils.checks.comparing import Mistakes, compare, follows_input, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, shown
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, HookPoint, hook_points

Fn = Callable[..., Any]
TABLE = "layer head"
INF = torch.inf

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


def score_mistakes(
    patterns: Sequence[Tensor], pairs: Sequence[tuple[int, int]], others: Mapping[str, Sequence[tuple[int, int]]]
) -> dict[str, Tensor]:
    """Answers of common mistakes: other (query, key) pairs, texts or positions treated otherwise, axes mixed up."""
    right = mean_attention(patterns, pairs)
    n_layers, n_heads = right.shape
    n_pos = patterns[0].shape[-1]
    mistakes: dict[str, Tensor] = {hint: mean_attention(patterns, wrong) for hint, wrong in others.items() if wrong}
    mistakes |= {
        "layers and heads are mixed up: a transpose became a reshape.": right.T.reshape(n_layers, n_heads),
        "the layers come in reverse order.": right.flip(0),
        "the positions are summed; average over them.": right * len(pairs),
        "the sum is divided by the number of positions, but not all of them count.": right * len(pairs) / n_pos,
        "the mean is taken over all pairs of positions.": right * len(pairs) / n_pos**2,
        "every layer has the scores of the first.": right[:1].expand(n_layers, n_heads),
        "the largest attention is taken, not the mean.": torch.stack(
            [torch.stack([pattern[:, :, q, k] for q, k in pairs]).amax((0, 1)) for pattern in patterns]
        ),
    }
    if len(patterns[0]) > 1:
        mistakes |= {
            "only the first text of the batch is looked at.": mean_attention([p[:1] for p in patterns], pairs),
            "only the last text of the batch is looked at.": mean_attention([p[-1:] for p in patterns], pairs),
            "the texts of the batch are summed; average over them.": right * len(patterns[0]),
        }
    known = [right]  # two mistakes may give one answer: the first of them is named
    distinct = {}
    for hint, answer in mistakes.items():
        if not any(torch.allclose(answer, other) for other in known):
            known.append(answer)
            distinct[hint] = answer
    return distinct


Pairs = list[tuple[int, int]]


def _check_scores(
    name: str,
    fn: Fn,
    sizes: tuple[int, int, int, int],
    pairs: Pairs,
    others: Mapping[str, Pairs],
    *arguments: Any,
) -> None:
    patterns = causal_patterns(*sizes)
    named = {f"pattern of layer {layer}": pattern for layer, pattern in enumerate(patterns)}
    with unchanged(name, **named):
        actual = fn(cache_of(patterns), *arguments)
    compare(name, actual, mean_attention(patterns, pairs), TABLE, score_mistakes(patterns, pairs, others))
    follows_input(name, lambda *moved: fn(cache_of(moved), *arguments), tuple(patterns), TABLE)


SIZES = [(3, 2, 5, 7), (2, 1, 4, 5)]  # layers, batch, heads, positions


def check_current_token_scores(fn: Fn) -> None:
    """Two sizes of cache, all different."""
    for sizes in SIZES:
        n = sizes[-1]
        others: dict[str, Pairs] = {
            "query 0 is left out; it can see itself, and counts.": [(p, p) for p in range(1, n)],
            "it is the attention to the position before.": [(p, p - 1) for p in range(1, n)],
            "only the last query counts.": [(n - 1, n - 1)],
        }
        _check_scores("current_token_scores", fn, sizes, [(p, p) for p in range(n)], others)


def check_previous_token_scores(fn: Fn) -> None:
    """Two sizes of cache, all different."""
    for sizes in SIZES:
        n = sizes[-1]
        others: dict[str, Pairs] = {
            "the diagonal is off by one: it is the attention to the own position.": [(p, p) for p in range(n)],
            "the diagonal is off by one: it is the attention two positions back.": [(p, p - 2) for p in range(2, n)],
            "query and key are swapped: this is the attention to the position after, which is always 0.": [
                (p, p + 1) for p in range(n - 1)
            ],
            "query 1 is left out.": [(p, p - 1) for p in range(2, n)],
            "only the last query counts.": [(n - 1, n - 2)],
        }
        _check_scores("previous_token_scores", fn, sizes, [(p, p - 1) for p in range(1, n)], others)


def check_first_token_scores(fn: Fn) -> None:
    """Two sizes of cache, all different."""
    for sizes in SIZES:
        n = sizes[-1]
        others: dict[str, Pairs] = {
            "query 0 is left out; the statement counts it.": [(p, 0) for p in range(1, n)],
            "query and key are swapped: this is what position 0 attends to.": [(0, p) for p in range(n)],
            "it is the attention to position 1.": [(p, 1) for p in range(n)],
            "only the last query counts.": [(n - 1, 0)],
        }
        _check_scores("first_token_scores", fn, sizes, [(p, 0) for p in range(n)], others)


# ---------------------------------------------------------------------------------------------------------- induction

HALVES = [((3, 2, 5, 9), 4), ((2, 1, 4, 7), 3)]  # layers, batch, heads, positions; and the length of a half


def looking_back(n_half: int, distance: int, first: int, last: int) -> Pairs:
    """Queries from `first` to `last`, each with the key that many positions before it."""
    return [(query, query - distance) for query in range(first, last + 1) if query >= distance]


def induction_mistakes(n: int, distance: int) -> dict[str, Pairs]:
    """Other stretches of the right diagonal, and other diagonals."""
    whole = looking_back(n, distance, 0, 2 * n)
    return {
        "the whole diagonal is averaged; only queries of the second half count.": whole,
        "the first queries of the diagonal are taken; the second half is at its end.": whole[:n],
        "the queries are one too early: with `bos` in front the second half is positions n_half + 1 to 2 n_half.": (
            looking_back(n, distance, n, 2 * n - 1)
        ),
        "the query before the second half is counted too.": looking_back(n, distance, n, 2 * n),
        "the last query is left out.": looking_back(n, distance, n + 1, 2 * n - 1),
        "the first query of the second half is left out.": looking_back(n, distance, n + 2, 2 * n),
        "only the last query counts.": looking_back(n, distance, 2 * n, 2 * n),
    }


def check_induction_scores(fn: Fn) -> None:
    """Two lengths of half."""
    for sizes, n in HALVES:
        others = induction_mistakes(n, n - 1)
        others["it is the attention to the same token's first occurrence; look at the one after it."] = looking_back(
            n, n, n + 1, 2 * n
        )
        others["the diagonal is off by one: it is two after the first occurrence."] = looking_back(
            n, n - 2, n + 1, 2 * n
        )
        others["the diagonal is off by one: it is one before the first occurrence."] = looking_back(
            n, n + 1, n + 1, 2 * n
        )
        _check_scores("induction_scores", fn, sizes, looking_back(n, n - 1, n + 1, 2 * n), others, n)


def check_duplicate_token_scores(fn: Fn) -> None:
    """Two lengths of half."""
    for sizes, n in HALVES:
        others = induction_mistakes(n, n)
        others["it is the attention to the token after the first occurrence; look at that itself."] = looking_back(
            n, n - 1, n + 1, 2 * n
        )
        others["the diagonal is off by one: it is one before the first occurrence."] = looking_back(
            n, n + 1, n + 1, 2 * n
        )
        others["it is the attention to the own position, not to the first occurrence."] = looking_back(
            n, 0, n + 1, 2 * n
        )
        _check_scores("duplicate_token_scores", fn, sizes, looking_back(n, n, n + 1, 2 * n), others, n)


class ToyPatterns(nn.Module):
    """A transformer that has nothing but attention patterns; it notes which of them outlive the run."""

    def __init__(self, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.cfg = TransformerConfig(
            d_vocab=19, n_ctx=20, n_layers=n_layers, n_heads=n_heads, d_model=7, d_head=6, attn_only=True
        )
        self.slope = nn.Parameter(torch.ones(()))
        self.runs, self.outlived, self.fails = 0, 0, False
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            block = nn.Module()
            block.attn, block.hook_resid_post = nn.Module(), HookPoint()
            block.attn.hook_attn_scores, block.attn.hook_pattern = HookPoint(), HookPoint()
            self.blocks.append(block)

    def scores(self, tokens: Tensor, layer: int) -> Tensor:
        """Different at every place, for every text."""
        heads, places = torch.arange(self.cfg.n_heads)[:, None, None], torch.arange(tokens.shape[1])
        query, key = tokens[:, None, :, None] + places[:, None] * 0.37, tokens[:, None, None, :] + places * 0.61
        scores = 3 * torch.sin(query * (heads + 1.3) + key * (layer + 0.7) * 1.9) * self.slope
        return scores.masked_fill(places[:, None] < places, -INF)

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        living = []
        for layer, block in enumerate(self.blocks):
            scores = block.attn.hook_attn_scores(self.scores(tokens, layer))
            pattern = scores.softmax(-1)
            living.append(weakref.ref(pattern))
            pattern = block.attn.hook_pattern(pattern)
            if self.fails:
                raise Stop
            resid = block.hook_resid_post(pattern.sum(1)[..., :1].expand(-1, -1, 7))
        del scores, pattern
        self.outlived = sum(pattern() is not None for pattern in living)
        return resid

    def patterns(self, tokens: Tensor) -> list[Tensor]:
        """What the hook points will see."""
        return [self.scores(tokens, layer).softmax(-1).detach() for layer in range(self.cfg.n_layers)]


def check_induction_scores_by_hook(fn: Fn) -> None:
    """Numbers first; then that one run does it, that nothing is kept, and that nothing is left behind."""
    name = "induction_scores_by_hook"
    for (n_layers, n_batch, n_heads, n_pos), n in HALVES:
        model = ToyPatterns(n_layers, n_heads)
        tokens = torch.randint(19, (n_batch, n_pos), generator=torch.Generator().manual_seed(3))
        patterns, pairs = model.patterns(tokens), looking_back(n, n - 1, n + 1, 2 * n)
        others = induction_mistakes(n, n - 1)
        others["it is the attention to the same token's first occurrence; look at the one after it."] = looking_back(
            n, n, n + 1, 2 * n
        )
        others["the diagonal is off by one: it is two after the first occurrence."] = looking_back(
            n, n - 2, n + 1, 2 * n
        )
        with unchanged(name, tokens=tokens):
            actual = fn(model, tokens, n)
        compare(name, actual, mean_attention(patterns, pairs), TABLE, score_mistakes(patterns, pairs, others))
        if actual.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
        if model.runs != 1:
            raise CheckFailed(f"{name}: it ran the model {model.runs} times.\n  Next: attach all hooks, then run once.")
        if model.outlived:
            raise CheckFailed(
                f"{name}: when the run was over, {model.outlived} of {n_layers} patterns were still in memory.\n"
                "  Next: reduce each pattern to one number per head inside the hook (a slice of it keeps all of it)."
            )
    with _somebody_elses_hooks(name, model):
        fn(model, tokens, n)
    model.fails = True
    with _somebody_elses_hooks(f"{name} after a run that ended in an exception", model):
        assert_stops(name, lambda: fn(model, tokens, n), "the model")


@contextmanager
def _somebody_elses_hooks(name: str, model: nn.Module) -> Iterator[None]:
    """Hooks that were there before must be there afterwards, and no others."""
    handles = [point.add(lambda activation, hook: None) for point in hook_points(model).values()]
    before = {place: list(point._fns.values()) for place, point in hook_points(model).items()}
    yield
    for place, point in hook_points(model).items():
        extra = len(point._fns) + len(point._forward_hooks) - len(before[place])
        if extra > 0:
            raise CheckFailed(
                f"{name}: a hook is left behind at `{place}`.\n"
                "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away what they attached."
            )
        if list(point._fns.values()) != before[place]:
            raise CheckFailed(
                f"{name}: hooks that others had attached at `{place}` are gone.\n"
                "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away only their own."
            )
    for handle in handles:
        handle.remove()


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


def _check_form(name: str, call: str, actual: Any, n_batch: int, n_half: int, bos: int) -> None:
    if not isinstance(actual, Tensor):
        compare(name, actual, torch.zeros(n_batch, 1 + 2 * n_half, dtype=torch.long), "batch pos")
    hints = {
        (n_batch, 2 * n_half): "`bos` is missing: it stands in front of the first half.",
        (n_batch, 2 + 2 * n_half): "`bos` stands in front of each half; it begins the row, once.",
        (n_batch, 1 + n_half): "the tokens come only once.",
    }
    want = (n_batch, 1 + 2 * n_half)
    if tuple(actual.shape) != want:
        hint = hints.get(tuple(actual.shape))
        cause = f"This is what you get if {hint}" if hint else "Next: print the shape after each step."
        raise CheckFailed(
            f"{name}: wrong shape.\n  {call}\n  expected (batch={want[0]}, pos={want[1]})\n"
            f"  got      {tuple(actual.shape)}\n  {cause}"
        )
    if actual.dtype != torch.int64:
        raise CheckFailed(f"{name}: expected dtype int64, got {actual.dtype}.\n  Next: tokens are whole numbers.")
    first, second = actual[:, 1 : n_half + 1], actual[:, n_half + 1 :]
    if not (actual[:, 0] == bos).all():
        row = int((actual[:, 0] != bos).int().argmax())
        at_end = (actual[:, -1] == bos).all()
        raise CheckFailed(
            f"{name}: wrong answer.\n  {call}\n  first at [batch={row}, pos=0]: expected bos, {bos}, got "
            f"{actual[row, 0]}\n  "
            + ("This is what you get if `bos` ends the row." if at_end else "Next: begin every row with `bos`.")
        )
    if not torch.equal(first, second):
        row, place = (first != second).nonzero()[0].tolist()
        causes = {
            "each token is repeated at once; the whole half should come again.": torch.equal(
                actual[:, 1::2], actual[:, 2::2]
            ),
            "the second half is the first one backwards.": torch.equal(first.flip(1), second),
            "the second half is that of another row.": any(
                torch.equal(first.roll(shift, 0), second) for shift in range(1, n_batch)
            ),
        }
        found = [f"This is what you get if {cause}" for cause, holds in causes.items() if holds]
        raise CheckFailed(
            f"{name}: the second half is not the first one again.\n  {call}\n"
            f"  first at [batch={row}, pos={n_half + 1 + place}]: expected {first[row, place]}, as at "
            f"pos={1 + place}, got {second[row, place]}\n  "
            + (found[0] if found else "Next: draw the half once, and use it twice.")
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


def check_per_token_losses(fn: Fn) -> None:
    """Each loss by itself; and logits so far apart that the softmax underflows."""
    axes, name = "batch next", "per_token_losses"
    for n_batch, n_pos, scale in [(2, 5, 2.0), (1, 4, 2.0), (3, 4, 90.0)]:
        logits = noise(n_batch, n_pos, 7, seed=5, scale=scale)
        tokens = torch.randint(7, (n_batch, n_pos), generator=torch.Generator().manual_seed(9))
        right = torch.empty(n_batch, n_pos - 1)
        for row in range(n_batch):
            for pos in range(n_pos - 1):
                scores = logits[row, pos].double()
                top = scores.max()
                right[row, pos] = float(top + (scores - top).exp().sum().log() - scores[tokens[row, pos + 1]])

        def of(log_p: Tensor, targets: Tensor) -> Tensor:
            return -log_p.gather(2, targets[..., None])[..., 0]

        log_p = logits.log_softmax(-1)
        mistakes: Mistakes = {
            "the tokens are not shifted: logits at p are about token p + 1, not p.": of(log_p[:, :-1], tokens[:, :-1]),
            "nothing is shifted, and the first position is dropped.": of(log_p[:, 1:], tokens[:, 1:]),
            "the shift goes the wrong way: logits at p + 1 meet token p.": of(log_p[:, 1:], tokens[:, :-1]),
            "the sign is missing: a loss is minus the log-probability.": -right,
            "they are probabilities; take minus their logarithm.": (-right).exp(),
            "the logits were taken for log-probabilities; the softmax is missing.": of(logits[:, :-1], tokens[:, 1:]),
            "the logarithm is that of base 2; the unit is the nat.": right / math.log(2),
            "the softmax runs over the positions; it belongs over d_vocab.": of(
                logits.log_softmax(1)[:, :-1], tokens[:, 1:]
            ),
            "each loss is that of the likeliest token; take the one that came.": -log_p[:, :-1].amax(-1),
            "the softmax underflows, and its logarithm is -inf; log_softmax does both at once.": of(
                logits.softmax(-1).log()[:, :-1], tokens[:, 1:]
            ),
        }
        mistakes = {
            hint: answer
            for hint, answer in mistakes.items()
            if isinstance(answer, Tensor) and not torch.allclose(answer, right, rtol=1e-4, atol=1e-5)
        }
        with unchanged(name, logits=logits, tokens=tokens):
            actual = fn(logits, tokens)
        compare(name, actual, right, axes, mistakes)
    follows_input(name, fn, (logits, tokens), axes)


class ToyTokenizer:
    """A vocabulary of thirteen pieces, with the ways in which people decode."""

    bos_token_id = eos_token_id = 0
    pieces = ("<|end|>", *(f" {word}" for word in "ash bay cow den elm fig gum hen ivy jay kid log".split()))

    def decode(self, ids: Any, **kwargs: Any) -> str:
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return "".join(self.pieces[i] for i in ([ids] if isinstance(ids, int) else ids))

    def batch_decode(self, rows: Any, **kwargs: Any) -> list[str]:
        return [self.decode(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]

    def convert_ids_to_tokens(self, ids: Any, **kwargs: Any) -> Any:
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        texts = [self.decode(i).replace(" ", "Ġ") for i in ([ids] if isinstance(ids, int) else ids)]
        return texts[0] if isinstance(ids, int) else texts


def check_top_predictions(fn: Fn) -> None:
    """Few rows, one, and the whole vocabulary; the columns one after another."""
    name, tokenizer = "top_predictions", ToyTokenizer()
    for seed, k in [(1, 4), (2, 1), (3, 13)]:
        logits = noise(13, seed=seed, scale=2.0)
        with unchanged(name, logits=logits):
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
        exps = [math.exp(value) for value in logits.tolist()]
        best, total, part = order[:k], sum(exps), sum(exps[token] for token in order[:k])
        columns: list[list[Any]] = [list(column) for column in zip(*actual, strict=True)] or [[]] * 4
        worst_first: list[int] = order[::-1][:k]
        agree(
            f"{name}: the tokens",
            call,
            columns[1],
            [tokenizer.pieces[token] for token in best],
            {
                "the unlikeliest come first.": [tokenizer.pieces[token] for token in worst_first],
                "the likeliest come last.": [tokenizer.pieces[token] for token in best[::-1]],
                "the first tokens of the vocabulary are taken.": list(tokenizer.pieces[:k]),
                "the pieces come from convert_ids_to_tokens; decode([id]) gives the text.": [
                    tokenizer.convert_ids_to_tokens(token) for token in best
                ],
            },
        )
        agree(
            f"{name}: the ranks",
            call,
            columns[0],
            list(range(1, k + 1)),
            {"ranks count from 0; the likeliest has rank 1.": list(range(k))},
        )
        log_total = math.log(total)
        _close(
            f"{name}: the logits",
            columns[2],
            [logits[token].item() for token in best],
            {
                "they are log-probabilities; the statement asks for the logits.": [
                    logits[token].item() - log_total for token in best
                ],
                "they are probabilities.": [exps[token] / total for token in best],
            },
        )
        chances = [exps[token] / total for token in best]
        _close(
            f"{name}: the probabilities",
            columns[3],
            chances,
            {
                "the softmax is taken over the k best only.": [exps[token] / part for token in best],
                "they are percentages.": [100 * chance for chance in chances],
                "they are log-probabilities.": [math.log(chance) for chance in chances],
                "they are the logits once more.": [logits[token].item() for token in best],
            },
        )


def _close(name: str, actual: list[Any], expected: list[float], mistakes: Mapping[str, list[float]]) -> None:
    """Numbers in a column of a table, as good as float32 is."""
    if not all(isinstance(value, float | int) for value in actual):
        kind = next(type(value).__name__ for value in actual if not isinstance(value, float | int))
        raise CheckFailed(f"{name}: expected plain numbers, got a {kind}.\n  Next: `.item()` makes one of a tensor.")
    wrong = {hint: torch.tensor(answer) for hint, answer in mistakes.items() if answer != expected}
    compare(name, torch.tensor(actual, dtype=torch.float32), torch.tensor(expected), "row", wrong)
