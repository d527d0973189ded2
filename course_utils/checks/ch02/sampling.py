"""Chapter 02: does the learner draw text from a model as it should?

Oracles are lists and loops (`drawing`), frequencies, and a model whose logits are known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch02.caching import judge_cached_generation
from course_utils.checks.ch02.chance import Measured
from course_utils.checks.ch02.drawing import kept, nucleus, ranked, scripted
from course_utils.checks.ch02.layers import CFG
from course_utils.checks.comparing import compare, compare_kind, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.standins.known_logits import ToyModel
from course_utils.checks.translating import during

LOGITS = "batch d_vocab"
INF = torch.inf

# ------------------------------------------------------------------------------------------------ logits are changed


@known_mistakes(
    {
        "the smallest logit is taken.": lambda logits: logits.argmin(-1),
        "every row gets the first row's token.": lambda logits: logits[:1].argmax(-1).expand(len(logits)),
        "the largest absolute value is taken.": lambda logits: logits.abs().argmax(-1),
        "the largest logit is sought in the whole tensor, not in each row.": lambda logits: logits.argmax().expand(
            len(logits)
        ),
    }
)
def check_greedy(fn: Callable[..., Any]) -> None:
    """Rows whose largest logits stand at both ends and in between, one of them with no positive logit."""
    logits = noise(3, 13, seed=12)
    logits[0, 12], logits[2, 0] = 4.0, 5.0
    logits[1] -= 9.0
    logits[2, 7] = -INF  # banned before
    for rows in (logits, logits[1:2]):
        expected = torch.tensor([max(range(13), key=row.tolist().__getitem__) for row in rows])
        compare("greedy", fn(rows), expected, "batch")
    follows_input("greedy", fn, (logits,), "batch")
    follows_every_kind("greedy", fn, (logits,), "batch", graph=True)


def _expect_value_error(name: str, given: str, fn: Callable[..., Any], *arguments: Any) -> None:
    """The statement promises a ValueError for this."""
    try:
        returned = fn(*arguments)
    except ValueError:
        return
    what = "None" if returned is None else f"a {type(returned).__name__}"
    raise CheckFailed(f"{name}: {given} should raise ValueError, but it returned {what}.\n  Next: test for it first.")


@known_mistakes(
    {
        "the logits are multiplied by the temperature.": lambda logits, t: logits * t,
        "the temperature is ignored.": lambda logits, t: logits.clone(),
        "the softmax is taken; return logits.": lambda logits, t: (logits / t).softmax(-1),
        "the log-softmax is taken; return the logits themselves.": lambda logits, t: (logits / t).log_softmax(-1),
        "probabilities are divided, not logits.": lambda logits, t: logits.softmax(-1) / t,
        "the division is by the square of the temperature.": lambda logits, t: logits / t**2,
        "the temperature is added.": lambda logits, t: logits + t,
    }
)
def check_apply_temperature(fn: Callable[..., Any]) -> None:
    """Below 1, above 1, exactly 1."""
    logits = noise(2, 13, seed=13, scale=2.0)
    for temperature in (0.4, 1.0, 2.5):
        expected = torch.tensor([[logit / temperature for logit in row] for row in logits.tolist()])
        name = f"apply_temperature with temperature {temperature}"
        compare(name, fn(logits, temperature), expected, LOGITS, inputs={"logit": logits})
    follows_input("apply_temperature", fn, (logits, 0.4), LOGITS)
    follows_every_kind("apply_temperature", fn, (logits, 0.4), LOGITS, graph=True)
    banned = logits.index_fill(1, torch.tensor([4]), -INF)
    compare("apply_temperature where token 4 is banned", fn(banned, 0.5), 2 * banned, LOGITS)
    for bad in (0.0, -0.5):
        _expect_value_error("apply_temperature", f"temperature {bad}", fn, logits, bad)


def counts(logits: Tensor, tokens: Tensor) -> Tensor:
    """How often each token occurs in each row."""
    return F.one_hot(tokens, logits.shape[1]).sum(1).to(logits)


def paid(result: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
    """An apply_frequency_penalty that returns `result(logits, counts, penalty)`."""
    return lambda logits, tokens, penalty: result(logits, counts(logits, tokens), penalty)


@known_mistakes(
    {
        "a token pays once, however often it occurs.": paid(lambda logits, n, penalty: logits - penalty * (n > 0)),
        "the penalty is added; subtract it.": paid(lambda logits, n, penalty: logits + penalty * n),
        "the logits are lost: only the penalties are returned.": paid(lambda logits, n, penalty: -penalty * n),
        "all rows pay for the tokens of the whole batch.": paid(lambda logits, n, penalty: logits - penalty * n.sum(0)),
        "every row pays for the first row's tokens.": paid(lambda logits, n, penalty: logits - penalty * n[:1]),
        "the logits of seen tokens are divided by the penalty.": paid(
            lambda logits, n, penalty: logits / torch.where(n > 0, penalty, 1.0)
        ),
        "the count is used alone, without the penalty.": paid(lambda logits, n, penalty: logits - n),
        "every token pays, seen or not.": paid(lambda logits, n, penalty: logits - penalty),
        "counts are divided by the number of positions.": paid(
            lambda logits, n, penalty: logits - penalty * n / n.sum(dim=1, keepdim=True)
        ),
        "only the last token pays.": lambda logits, tokens, penalty: logits - penalty * counts(logits, tokens[:, -1:]),
        "nothing is subtracted.": paid(lambda logits, n, penalty: logits.clone()),
    }
)
def check_apply_frequency_penalty(fn: Callable[..., Any]) -> None:
    """Rows with different histories: a token three times, one twice, token 0 once, one that both rows have."""
    name = "apply_frequency_penalty"
    history = torch.tensor([[3, 3, 3, 1, 7], [12, 0, 12, 5, 3]])
    logits = noise(2, 13, seed=14, scale=2.0)
    logits[0, 1] = logits[1, 2] = -INF  # banned before: a token that occurs, and one that does not
    for n_rows, n_pos, penalty in [(2, 5, 0.7), (2, 5, -0.4), (1, 4, 1.3), (2, 5, 0.0)]:
        rows, tokens = logits[:n_rows], history[:n_rows, :n_pos]
        occurs = torch.tensor([[float(row.count(token)) for token in range(13)] for row in tokens.tolist()])
        given = {"logit": rows, "count": occurs}
        actual = fn(rows, tokens, penalty)
        compare(f"{name} with penalty {penalty}", actual, rows - penalty * occurs, LOGITS, inputs=given)
    follows_input(name, fn, (logits, history, 0.7), LOGITS)
    follows_every_kind(name, fn, (logits, history, 0.7), LOGITS)


# ----------------------------------------------------------------------------------------------- logits are left out


def not_below(logits: Tensor, threshold: Tensor) -> Tensor:
    """The logits that are not below a threshold."""
    return logits.masked_fill(logits < threshold, -INF)


def filled(logits: Tensor) -> Tensor:
    """0 where it should be -inf."""
    return logits.masked_fill(logits == -INF, 0.0)


def top_k(logits: Tensor, k: int, choose: Callable[[list[int], int], Sequence[int]] | None = None) -> Tensor:
    """The logits of the tokens that `choose(a row's tokens, likeliest first; k)` returns for each row."""
    return kept(logits, [choose(row, k) if choose else row[:k] for row in ranked(logits)])


@known_mistakes(
    {
        "the smallest logits are kept.": lambda logits, k: top_k(logits, k, lambda row, k: row[-k:]),
        "the others are set to 0, which softmax turns into exp(0) = 1; use -inf.": lambda logits, k: filled(
            top_k(logits, k)
        ),
        "the first row's threshold is used for all rows.": lambda logits, k: not_below(
            logits, logits[0].topk(min(k, 13)).values[-1]
        ),
        "the first row's tokens are kept in all rows.": lambda logits, k: top_k(
            logits, k, lambda row, k: ranked(logits)[0][:k]
        ),
        "the k largest of the whole tensor are kept, not of each row.": lambda logits, k: not_below(
            logits, logits.flatten().topk(k).values[-1]
        ),
        "one token too few is kept.": lambda logits, k: top_k(logits, k - 1),
        "one token too many is kept.": lambda logits, k: top_k(logits, k + 1),
        "the first k tokens of the vocabulary are kept.": lambda logits, k: top_k(logits, k, lambda row, k: range(k)),
        "probabilities are returned; return logits.": lambda logits, k: top_k(logits, k).softmax(-1),
    }
)
def check_keep_top_k(fn: Callable[..., Any]) -> None:
    """Rows on different levels, so that one row's threshold is wrong for the others."""
    logits = noise(3, 13, seed=15, scale=2.0) + torch.tensor([[0.0], [-150.0], [200.0]])
    logits[0, 3] = -INF  # banned before
    order = ranked(logits)
    for k in (4, 1, 2, 13, 20):
        expected = kept(logits, [row[:k] for row in order])
        with during(f"with k = {k} and a vocabulary of 13"):
            actual = fn(logits, k)
        compare(f"keep_top_k with k = {k}", actual, expected, LOGITS, inputs={"logit": logits})
    follows_input("keep_top_k", fn, (logits, 4), LOGITS)
    follows_every_kind("keep_top_k", fn, (logits, 4), LOGITS)
    for bad in (0, -2):
        _expect_value_error("keep_top_k", f"k = {bad}", fn, logits, bad)


Choose = Callable[[list[float], list[int], float, int], Sequence[int]]


def top_p(logits: Tensor, p: float, n: int, choose: Choose = nucleus) -> Tensor:
    """The logits of the tokens that `choose(probabilities, tokens, likeliest first; p, n)` returns for each row."""
    chances = logits.double().softmax(-1).tolist()
    return kept(logits, [choose(*row, p, n) for row in zip(chances, ranked(logits), strict=True)])


def choosing(choose: Choose) -> Callable[..., Tensor]:
    """A keep_top_p that keeps what `choose` returns for each row."""
    return lambda logits, p, n=1: top_p(logits, p, n, choose)


def as_in_first_row(logits: Tensor, p: float, n: int, *, tokens: bool) -> Tensor:
    """Each row keeps the first row's tokens, or as many as the first row does."""
    first = top_p(logits[:1], p, n)[0].isfinite()
    size = int(first.sum())
    return kept(logits, [first.nonzero().flatten().tolist() if tokens else row[:size] for row in ranked(logits)])


def gathered(logits: Tensor, p: float, n: int = 1) -> Tensor:
    """The mask of the sorted logits, read at the places to which it should be written."""
    ordered = logits.sort(-1, descending=True)
    dropped = top_p(ordered.values, p, n) == -INF
    return logits.masked_fill(dropped.gather(-1, ordered.indices), -INF)


def rounded(logits: Tensor, p: float, n: int = 1) -> Tensor:
    """The nucleus by a running sum in the logits' own precision, whatever p is."""
    if not 0 < p <= 1:
        raise ValueError(p)
    ordered = logits.softmax(-1).sort(-1, descending=True)
    sum_before = ordered.values.cumsum(-1) - ordered.values
    dropped = (sum_before >= p).index_fill(-1, torch.arange(min(n, logits.shape[-1])), False)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, ordered.indices, dropped), -torch.inf)


@known_mistakes(
    {
        "the token that crosses p is dropped; it is the last one kept.": choosing(
            lambda chances, row, p, n: row[: max(len(nucleus(chances, row, p)) - 1, n)]
        ),
        "the token that crosses p is dropped, and sometimes nothing is left.": choosing(
            lambda chances, row, p, n: row[: len(nucleus(chances, row, p)) - 1]
        ),
        "one token too many is kept after p is reached.": choosing(
            lambda chances, row, p, n: row[: len(nucleus(chances, row, p, n)) + 1]
        ),
        "the sum has to exceed p (`>`); reaching it is enough (`>=`).": choosing(
            lambda chances, row, p, n: nucleus(chances, row, p + 1e-9, n)
        ),
        "the least likely tokens are kept.": choosing(lambda chances, row, p, n: nucleus(chances, row[::-1], p, n)),
        "the mask of the sorted logits is put on the unsorted ones: bring it back into the tokens' order.": choosing(
            lambda chances, row, p, n: range(len(nucleus(chances, row, p, n)))
        ),
        "the mask of the sorted logits is brought back with `gather`, which reads at `order`; `scatter` writes "
        "there.": gathered,
        "the logits come back sorted.": lambda logits, p, n=1: top_p(logits.sort(-1, descending=True).values, p, n),
        "the first row's tokens are kept in all rows.": lambda logits, p, n=1: as_in_first_row(
            logits, p, n, tokens=True
        ),
        "every row keeps as many tokens as the first.": lambda logits, p, n=1: as_in_first_row(
            logits, p, n, tokens=False
        ),
        "min_tokens_to_keep is ignored.": lambda logits, p, n=1: top_p(logits, p, 1),
        "the others are set to 0, which softmax turns into exp(0) = 1; use -inf.": lambda logits, p, n=1: filled(
            top_p(logits, p, n)
        ),
        "single tokens with a probability above p are kept; it is the sum that counts.": choosing(
            lambda chances, row, p, n: [t for place, t in enumerate(row) if place < n or chances[t] >= p]
        ),
        "probabilities are returned; return logits.": lambda logits, p, n=1: top_p(logits, p, n).softmax(-1),
        "nothing is dropped.": lambda logits, p, n=1: logits.clone(),
        "tokens are dropped because the sum before them is rounded to 1; with p = 1 all of them stay.": rounded,
    }
)
def check_keep_top_p(fn: Callable[..., Any]) -> None:
    """Rows of different sharpness, in no order, so that each keeps another number of tokens."""
    logits = noise(3, 13, seed=16) * torch.tensor([[1.0], [3.0], [0.4]]) + torch.tensor([[0.0], [200.0], [-150.0]])
    logits[0, 3] = -INF  # banned before
    chances = logits.double().softmax(-1)
    for rows, p, at_least in [
        (3, 0.6, 1),
        (3, 0.9, 1),
        (3, 0.01, 1),
        (3, 0.3, 4),
        (3, 0.01, 20),
        (1, 0.7, 1),
        (3, 1.0, 1),
    ]:
        some = logits[:rows]
        actual = fn(some, p) if at_least == 1 else fn(some, p, at_least)
        at = f" and min_tokens_to_keep = {at_least}" if at_least > 1 else ""
        given = {"logit": some, "probability": chances[:rows]}
        compare(f"keep_top_p with p = {p}{at}", actual, top_p(some, p, at_least), LOGITS, inputs=given)
    n_kept = fn(torch.zeros(2, 4), 0.5).isfinite().sum(dim=-1)  # a quarter each: the sum of two is 0.5 without rounding
    compare("keep_top_p, tokens kept of four equal ones with p = 0.5", n_kept, torch.tensor([2, 2]), "batch")
    follows_input("keep_top_p", fn, (logits, 0.6), LOGITS)
    follows_every_kind("keep_top_p", fn, (logits, 0.6), LOGITS)
    for bad in (0.0, -0.1, 1.5):
        _expect_value_error("keep_top_p", f"p = {bad}", fn, logits, bad)
    sharp = torch.tensor([[40.0, 0.0, 3.0, -1.0], [0.5, 40.0, -2.0, 1.0]])
    compare("keep_top_p with p = 1, for one token that is nearly certain", fn(sharp, 1.0), sharp, LOGITS)


# ---------------------------------------------------------------------------------------------------- tokens are drawn


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row, with chances in proportion to its weights."""
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


@known_mistakes(
    {
        "the most likely token is always taken.": lambda logits, generator: logits.argmax(-1),
        "the softmax is taken twice.": lambda logits, generator: draw(logits.softmax(-1).softmax(-1), generator),
        "all tokens are equally likely; the logits are ignored.": lambda logits, generator: draw(
            torch.ones_like(logits), generator
        ),
        "every row is drawn with another row's probabilities.": lambda logits, generator: draw(
            logits.softmax(-1).roll(1, 0), generator
        ),
        "the tokens with a finite logit are all equally likely.": lambda logits, generator: draw(
            logits.isfinite().float(), generator
        ),
    }
)
def check_sample(fn: Callable[..., Any]) -> None:
    """Seeded frequencies over two thousand rows of two kinds, and where the random numbers come from."""
    chances = torch.tensor([[0.06, 0.5, 0.0, 0.15, 0.29], [0.45, 0.0, 0.3, 0.05, 0.2]])
    n_each = 1000
    # softmax does not mind an added constant, but exp alone overflows at this one
    logits = (chances.log() + torch.tensor([[0.0], [200.0]])).repeat(n_each, 1)

    def drawn_with(seed: int) -> tuple[Any, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return fn(logits, generator), generator

    before = torch.get_rng_state()
    drawn, generator = drawn_with(1)
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed(
            "sample: it drew from torch's global random numbers.\n  Next: hand `generator=generator` to what draws."
        )
    if isinstance(drawn, Tensor) and drawn.shape == (2 * n_each,):
        compare_kind("sample", drawn, torch.zeros(1, dtype=torch.int64))
        _judge_frequencies(drawn.reshape(n_each, 2), chances)
    else:
        compare("sample", drawn, torch.zeros(2 * n_each, dtype=torch.int64), "batch")
    if torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state()):
        raise CheckFailed(
            "sample: it left `generator` as it was, so the next call would draw the same again.\n"
            "  Next: draw from `generator` itself, not from a copy or another one."
        )
    if not torch.equal(drawn_with(1)[0], drawn):
        raise CheckFailed(
            "sample: the same seed gave two different draws.\n  Next: draw from `generator` and nothing else."
        )
    if torch.equal(drawn_with(2)[0], drawn):
        raise CheckFailed(
            "sample: two seeds gave the same 2000 draws.\n  Next: draw from `generator`, without seeding it."
        )
    compare("sample from one row", fn(torch.tensor([[-INF, 3.0, -INF]]), generator), torch.tensor([1]), "batch")


def _judge_frequencies(drawn: Tensor, chances: Tensor) -> None:
    """Each kind of row against its probabilities; five standard errors of tolerance."""
    n_each, n_tokens = len(drawn), chances.shape[1]
    rates = torch.stack([(drawn == token).float().mean(dim=0) for token in range(n_tokens)], dim=1)  # [kind token]
    evidence = Evidence("how often each token was drawn", Measured(rates, rates * (1 - rates) / n_each))
    for kind in range(2):
        own, wanted = rates[kind], chances[kind]
        if own.sum() < 0.999:
            raise CheckFailed(f"sample: it drew {drawn[:, kind].max()}, but tokens go from 0 to {n_tokens - 1}.")
        impossible = (own > 0) & (wanted == 0)
        if impossible.any():
            token = int(impossible.int().argmax())
            raise CheckFailed(
                f"sample: it drew token {token}, whose logit is -inf (in {own[token]:.0%} of the draws).",
                evidence=evidence,
                advice="  Next: softmax gives a logit of -inf the probability 0; look for what changes that.",
            )
        if ((own - wanted).abs() > 5 * (wanted * (1 - wanted) / n_each).sqrt() + 1e-6).any():
            worst = int((own - wanted).abs().argmax())
            raise CheckFailed(
                f"sample: token {worst} should be drawn with probability {wanted[worst]:.2f}, but it came in "
                f"{own[worst]:.0%} of {n_each} draws.",
                evidence=evidence,
                advice="  Next: the probabilities are the softmax of the row's logits, along d_vocab.",
            )
    together = torch.corrcoef(drawn.T.double())[0, 1].item()
    if abs(together) > 6 / n_each**0.5:
        raise CheckFailed("sample: rows depend on each other.\n  Next: draw another random number for each row.")


# ------------------------------------------------------------------------------------------------- text is generated


def continued(**wrong: Any) -> Callable[..., Tensor]:
    """A generate without a cache, with switches for what people get wrong."""

    @torch.no_grad()
    def generate(
        model: Any, tokens: Tensor, n_new: int, pick: Callable[[Tensor], Tensor], eos: int | None = None
    ) -> Tensor:
        prompt = tokens
        eos = None if wrong.get("ignores_eos") else eos
        finished = torch.zeros(len(prompt), dtype=torch.bool)
        if wrong.get("prompt_counts") and eos is not None:
            finished = (prompt == eos).any(dim=1)
        for _ in range(min(n_new, model.cfg.n_ctx - prompt.shape[1])):
            logits = model(prompt if wrong.get("stale") else tokens)[:, wrong.get("position", -1)]
            new = pick(logits.softmax(-1) if wrong.get("softmax") else logits)
            if eos is not None:
                new = new if wrong.get("forgetful") else new.masked_fill(finished, wrong.get("fill", eos))
                finished = finished | (new == eos)
            stops = not wrong.get("never_stops") and wrong.get("stops", torch.all)(finished)
            if stops and wrong.get("cut"):
                break
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            if stops:
                break
        return tokens[:, prompt.shape[1] :] if wrong.get("new_only") else tokens

    return generate


@known_mistakes(
    {
        "it gets the logits at the first position; take the last.": continued(position=0),
        "it gets the logits after the prompt again and again; hand the longer sequence to the model.": continued(
            stale=True
        ),
        "the softmax is taken; `pick` wants logits.": continued(softmax=True),
        "only the new tokens are returned; put the prompt in front.": continued(new_only=True),
        "a finished row goes on with what `pick` says; it should go on with eos.": continued(forgetful=True),
        "generation does not stop when all rows are finished.": continued(never_stops=True),
        "eos is ignored, or only looked for in the newest tokens: remember which rows are finished.": continued(
            ignores_eos=True
        ),
        "generation stops as soon as one row is finished.": continued(stops=torch.any),
        "the last eos is cut off.": continued(cut=True),
        "finished rows are filled with 0 instead of eos.": continued(fill=0),
        "an eos in the prompt finishes the row; only what the row produces counts.": continued(prompt_counts=True),
    }
)
def check_generate(fn: Callable[..., Any]) -> None:
    """A toy model with known logits, and picks that follow a script."""
    prompt = torch.tensor([[3, 0, 12], [8, 1, 5]])
    _check_greedy_run(fn, prompt, n_new=4)
    _check_greedy_run(fn, prompt[:1, :2], n_new=3)
    _check_greedy_run(fn, prompt, n_new=0)
    _check_greedy_run(fn, prompt, n_new=20)  # n_ctx is 9
    _check_greedy_run(fn, torch.arange(9)[None] + torch.tensor([[0], [2]]), n_new=2)
    script = torch.tensor([[4, 6, 7, 2, 9, 3], [7, 8, 1, 6, 5, 4]])
    _check_eos(fn, prompt, script, eos=6)
    _check_eos(fn, prompt + 1, torch.where(script == 6, 0, script), eos=0)
    _check_eos(fn, torch.tensor([[6, 1, 6], [8, 1, 5]]), script, eos=6)
    _check_eos(fn, prompt, torch.tensor([[4, 7, 7, 2, 9, 3], [7, 8, 6, 1, 5, 4]]), eos=6)
    _check_eos(fn, prompt, torch.where(script == 6, 0, script), eos=None)
    judge_cached_generation(fn, CFG, prompt)


def _check_greedy_run(fn: Callable[..., Any], prompt: Tensor, n_new: int) -> None:
    """The most likely token, again and again."""
    model = ToyModel(CFG)
    model.train()
    n_steps = min(n_new, CFG.n_ctx - prompt.shape[1])
    tokens, wanted = prompt, []
    for _ in range(n_steps):
        wanted.append(model.logits(tokens))
        tokens = torch.cat([tokens, wanted[-1][:, -1].argmax(-1)[:, None]], dim=1)
    given: list[Tensor] = []

    def pick(logits: Tensor) -> Tensor:
        step = len(given)
        if step == n_steps:
            raise CheckFailed(
                f"generate: `pick` was called more than {n_steps} times (n_new = {n_new}, n_ctx = {CFG.n_ctx}, and a "
                f"prompt of {prompt.shape[1]} positions).\n  Next: count the steps, and stop when n_ctx is reached."
            )
        compare(f"generate: what `pick` gets in step {step}", logits, wanted[step][:, -1].detach(), LOGITS)
        if logits.requires_grad:
            raise CheckFailed(
                "generate: gradients are recorded, which fills the memory step by step.\n"
                "  Next: run the loop under torch.no_grad()."
            )
        given.append(logits)
        return logits.argmax(-1)

    label = f"generate with n_new = {n_new}, n_ctx = {CFG.n_ctx} and a prompt of {prompt.shape[1]} positions"
    compare(label, fn(model, prompt, n_new, pick), tokens, "batch pos")


def _check_eos(fn: Callable[..., Any], prompt: Tensor, script: Tensor, eos: int | None) -> None:
    """Picks from a script, row by row; the loop in plain Python says what should come out."""
    n_steps = script.shape[1]
    expected = scripted(prompt, script, eos, [False] * len(prompt))
    n_used = expected.shape[1] - prompt.shape[1]
    step = 0

    def pick(logits: Tensor) -> Tensor:
        nonlocal step
        if step == n_steps:
            raise CheckFailed(
                f"generate: `pick` was called more than n_new = {n_steps} times.\n  Next: count the steps."
            )
        step += 1
        return script[:, step - 1].clone()

    label = f"generate with eos = {eos}"
    compare(label, fn(ToyModel(CFG), prompt, n_steps, pick, *([] if eos is None else [eos])), expected, "batch pos")
    if step > n_used:
        raise CheckFailed(
            f"{label}: all rows were finished after {n_used} steps, but it went on for {step}.\n  Next: stop there."
        )
