"""Checks of chapter 14, reading the model: illegal moves by position, and linear probes of every square."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed

Fn = Callable[..., Any]


def two(name: str, answer: Any, words: tuple[str, str]) -> tuple[Any, Any]:
    """An answer's two parts."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        got = "None" if answer is None else f"a {type(answer).__name__}"
        raise CheckFailed(f"{name}: expected a tuple of {words[0]} and {words[1]}, got {got}.\n  Next: return both.")
    return answer


def compare_two(
    name: str, answer: Any, expected: tuple[Tensor, Tensor], words: tuple[str, str], axes: tuple[str, str], **close: Any
) -> None:
    for label, part, right, names in zip(words, two(name, answer, words), expected, axes, strict=True):
        compare(f"{name}: {label}", part, right, names, **close)


# ------------------------------------------------------------------------------------------------------- illegal moves


def counting(
    pick: Callable[[list[float], int], int] = lambda row, n_moves: row.index(max(row)),
    counted: Callable[[bool], bool] = lambda over: not over,
    wrong: Callable[[bool], bool] = lambda legal: not legal,
    per: str = "position",
) -> Fn:
    """illegal_rate, position by position."""

    def illegal_rate(logits: Tensor, legal: Tensor, over: Tensor) -> Tensor:
        n_games, n_pos, n_moves = legal.shape
        rates = []
        for pos in range(n_pos):
            games = [game for game in range(n_games) if counted(bool(over[game, pos]))]
            picked = [(game, pick(logits[game, pos].tolist(), n_moves)) for game in games]
            found = [wrong(token < n_moves and bool(legal[game, pos, token])) for game, token in picked]
            rates.append(sum(found) / (n_games if per == "game" else max(1, len(found))))
        return torch.tensor(rates, dtype=logits.dtype, device=logits.device)

    return illegal_rate


def illegal_probability(logits: Tensor, legal: Tensor, over: Tensor) -> Tensor:
    inside = (logits.softmax(-1)[..., : legal.shape[-1]] * legal).sum(-1)
    return ((1 - inside) * ~over).sum(0) / (~over).sum(0).clamp(min=1)


def averaged_over_everything(logits: Tensor, legal: Tensor, over: Tensor) -> Tensor:
    every = counting()(logits.flatten(0, 1)[:, None], legal.flatten(0, 1)[:, None], over.flatten()[:, None])
    return every.expand(logits.shape[1])


@known_mistakes(
    {
        "games that are over count too.": counting(counted=lambda over: True),
        "only games that are over count.": counting(counted=lambda over: over),
        "it is the share of legal moves.": counting(wrong=lambda legal: legal),
        "the tokens that are no moves were cut off first; they are never legal.": counting(
            lambda row, n_moves: row.index(max(row[:n_moves]))
        ),
        "it is the probability on illegal moves; count the likeliest token.": illegal_probability,
        "it is one number for all positions together.": averaged_over_everything,
        "it is divided by the number of all games; some are over.": counting(per="game"),
        "it looks at the least likely token.": counting(lambda row, n_moves: row.index(min(row))),
    }
)
def check_illegal_rate(fn: Fn) -> None:
    """Against loops; logits that often have their top at a token that is no move; a position without any game."""
    name = "illegal_rate"
    for seed, (n_games, n_pos, n_moves, d_vocab) in enumerate(((5, 4, 6, 7), (7, 3, 4, 6), (4, 2, 5, 5))):
        logits = noise(n_games, n_pos, d_vocab, seed=seed) + torch.arange(d_vocab) / d_vocab
        legal = noise(n_games, n_pos, n_moves, seed=seed + 10) > 0.2
        over = noise(n_games, n_pos, seed=seed + 20) > 0.4
        over[:, 1] = seed == 0
        over[1:, 0], over[0, 0], logits[0, 0, -1] = True, False, 9.0  # one game alone
        with unchanged(name, logits=logits, legal=legal, over=over):
            actual = fn(logits, legal, over)
        compare(f"{name} of {n_games} games", actual, counting()(logits, legal, over), "pos")
    follows_input(name, fn, (noise(5, 3, 6, seed=3), noise(5, 3, 4, seed=4) > 0, noise(5, 3, seed=5) > 0.5), "pos")


# ---------------------------------------------------------------------------------------------------------- the losses


def one_by_one(W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """[batch square state]: the scores of each square by themselves."""
    return torch.stack([x @ W[square] + b[square] for square in range(len(W))], dim=1)


def losing(
    scores: Callable[[Tensor, Tensor, Tensor], Tensor] = one_by_one,
    loss: Callable[[Tensor], Tensor] = lambda losses: losses.mean(),
    chosen: Callable[[Tensor], Tensor] = lambda labels: labels,
) -> Fn:
    """probe_loss from log-probabilities, one square after the other; `loss` gets one number per vector and square."""

    def probe_loss(W: Tensor, b: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        logprobs = scores(W, b, x).log_softmax(-1)
        picked = torch.stack([logprobs[row, torch.arange(len(W)), chosen(labels[row])] for row in range(len(x))])
        return loss(-picked)

    return probe_loss


def probabilities_as_scores(W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return one_by_one(W, b, x).softmax(-1)


@known_mistakes(
    {
        "the losses of the squares are summed; take the mean.": losing(loss=lambda losses: losses.sum(1).mean()),
        "the losses of the vectors are summed; take the mean.": losing(loss=lambda losses: losses.mean(1).sum()),
        "all losses are summed; take the mean.": losing(loss=lambda losses: losses.sum()),
        "the biases are left out.": losing(lambda W, b, x: one_by_one(W, b * 0, x)),
        "a softmax was taken before the cross-entropy, which takes its own.": losing(probabilities_as_scores),
        "it is the mean log-probability; a loss is minus that.": losing(loss=lambda losses: -losses.mean()),
        "every square is scored by the first square's probe.": losing(
            lambda W, b, x: one_by_one(W[:1].expand_as(W), b[:1].expand_as(b), x)
        ),
        "the last two states are swapped.": losing(chosen=lambda labels: (3 - labels) % 3),
    }
)
def check_probe_loss(fn: Fn) -> None:
    """Against log-probabilities picked one by one; sizes that all differ; and gradients get through."""
    name = "probe_loss"
    for n_rows, d_model, n_squares, n_states in ((5, 7, 4, 3), (2, 3, 6, 4), (1, 2, 1, 3)):
        inputs = (
            noise(n_squares, d_model, n_states),
            noise(n_squares, n_states, seed=1),
            noise(n_rows, d_model, seed=2),
        )
        labels = (noise(n_rows, n_squares, seed=3).abs() * 3).long().clamp(max=2)
        with unchanged(name, W=inputs[0], b=inputs[1], x=inputs[2], labels=labels):
            actual = fn(*inputs, labels)
        compare(f"{name} of {n_rows} vectors and {n_squares} squares", actual, losing()(*inputs, labels), "")
    follows_input(name, fn, (*inputs, labels), "", gradient=True)
    for number, argument in enumerate(("W", "b", "x")):
        leaves = [value.clone().requires_grad_(place == number) for place, value in enumerate(inputs)]
        if not fn(*leaves, labels).requires_grad:
            raise CheckFailed(
                f"{name}: no gradient gets through to {argument}.\n  Next: look for .detach() or .data on its way."
            )


# ---------------------------------------------------------------------------------------------------------- a training


def fitting(
    draw: Callable[[int, int, torch.Generator], Tensor] = lambda n, rows, g: torch.randint(n, (rows,), generator=g),
    adam: bool = True,
    decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    more_steps: int = 0,
    start: float = 0.0,
    bias: bool = True,
    corrected: bool = True,
    rows_of: Callable[[int], int] = lambda rows: rows,
) -> Fn:
    """train_probe with gradients and AdamW worked out by hand, in double precision."""

    def train_probe(
        x: Tensor, labels: Tensor, steps: int, lr: float, generator: torch.Generator, rows: int = 256
    ) -> tuple[Tensor, Tensor]:
        wide, n_squares = x.detach().double(), labels.shape[1]
        W = start * torch.ones(n_squares, x.shape[1], 3, dtype=torch.float64).cumsum(1)
        b = torch.zeros(n_squares, 3, dtype=torch.float64)
        moments = {0: (W * 0, W * 0), 1: (b * 0, b * 0)}
        for step in range(1, steps + more_steps + 1):
            chosen = draw(len(x), rows_of(rows), generator)
            slope = one_by_one(W, b, wide[chosen]).softmax(-1) - F.one_hot(labels[chosen], 3)
            slope = slope / slope.shape[0] / n_squares
            slopes = (torch.einsum("bd,bsc->sdc", wide[chosen], slope), slope.sum(0) * bias)
            found = []
            for number, (value, g) in enumerate(zip((W, b), slopes, strict=True)):
                m, v = (
                    beta * old + (1 - beta) * new
                    for beta, old, new in zip(betas, moments[number], (g, g * g), strict=True)
                )
                moments[number] = (m, v)
                if corrected:
                    m, v = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
                found.append(value * (1 - lr * decay) - lr * (m / (v.sqrt() + 1e-8) if adam else g))
            W, b = found
        return W.to(x.dtype), b.to(x.dtype)

    return train_probe


def seeded_anew(n: int, rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(n, (rows,), generator=torch.Generator().manual_seed(0))


@known_mistakes(
    {
        "it is plain gradient descent; the optimiser is AdamW.": fitting(adam=False),
        "there is no weight decay; it is 0.01 by default.": fitting(decay=0.0),
        "one step too many is taken.": fitting(more_steps=1),
        "one step too few is taken.": fitting(more_steps=-1),
        "the biases stay at zero; train them too.": fitting(bias=False),
        "W does not begin at zero.": fitting(start=0.01),
        "rows are drawn without repetition.": fitting(lambda n, rows, g: torch.randperm(n, generator=g)[:rows]),
        "the first rows are taken in every step; draw them.": fitting(lambda n, rows, g: torch.arange(rows) % n),
        "all rows are taken in every step.": fitting(lambda n, rows, g: torch.arange(n)),
        "`rows` is ignored: there are always 256.": fitting(rows_of=lambda rows: 256),
        "the generator is made anew in each step: every step sees the same rows.": fitting(seeded_anew),
    }
)
def check_train_probe(fn: Fn) -> None:
    """Against gradients and an optimiser by hand; few steps; under no_grad, as most of a chapter runs."""
    name, words, axes = "train_probe", ("W", "b"), ("square d_model state", "square state")
    for steps, lr, rows, seed in ((4, 0.1, 5, 0), (2, 0.5, 3, 1), (1, 0.05, 7, 2)):
        x = noise(11, 6, seed=seed).double() + 0.3
        labels = torch.randint(3, (11, 4), generator=torch.Generator().manual_seed(seed))
        right = fitting()(x, labels, steps, lr, torch.Generator().manual_seed(5), rows)
        with unchanged(name, x=x, labels=labels), torch.set_grad_enabled(steps != 2):
            answer = fn(x, labels, steps, lr, torch.Generator().manual_seed(5), rows)
        compare_two(f"{name}, {steps} steps", answer, right, words, axes)
        if any(part.requires_grad for part in answer):
            raise CheckFailed(f"{name}: what it returns still has a graph.\n  Next: return `.detach()` of each.")
    x, labels = x.float(), labels[:, :3]
    right = fitting()(x, labels, 2, 0.1, torch.Generator().manual_seed(6))
    answer = fn(x, labels, 2, 0.1, torch.Generator().manual_seed(6))
    compare_two(f"{name} in float32, 256 rows", answer, right, words, axes, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ how well, where


def scoring(
    among: Callable[[int], bool] = lambda label: label != 0,
    of_all: Callable[[int], bool] = lambda label: True,
    guess: Callable[[list[float]], int] = lambda scores: scores.index(max(scores)),
    bias: bool = True,
    per: str = "all",
) -> Fn:
    """probe_accuracy, one vector and square at a time."""

    def probe_accuracy(W: Tensor, b: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = one_by_one(W, b * bias, x)
        hits = [
            (label, guess(scores[row, square].tolist()) == label, square)
            for row, line in enumerate(labels.tolist())
            for square, label in enumerate(line)
        ]

        def share(wanted: Callable[[int], bool]) -> Tensor:
            if per == "square":
                each = [[hit for label, hit, at in hits if wanted(label) and at == square] for square in range(len(W))]
                shares = [sum(found) / len(found) for found in each if found]
                return torch.tensor(sum(shares) / len(shares)).to(x)
            found = [hit for label, hit, _ in hits if wanted(label)]
            return torch.tensor(sum(found) / len(found)).to(x)

        return share(of_all), share(among)

    return probe_accuracy


@known_mistakes(
    {
        "the second share counts empty squares alone; it is about those with a disc.": scoring(
            lambda label: label == 0
        ),
        "the second share counts all squares, too.": scoring(lambda label: True),
        "the second share counts my discs alone.": scoring(lambda label: label == 1),
        "the first share counts empty squares alone.": scoring(of_all=lambda label: label == 0),
        "the biases are left out.": scoring(bias=False),
        "the guess is the state with the lowest score.": scoring(guess=lambda scores: scores.index(min(scores))),
        "a share is taken for each square, and then their mean; take all together.": scoring(per="square"),
    }
)
def check_probe_accuracy(fn: Fn) -> None:
    """Against counting; squares that are often empty, and others that hardly ever are."""
    name, words = "probe_accuracy", ("all squares", "squares with a disc")
    for n_rows, d_model, n_squares in ((9, 3, 4), (5, 2, 7)):
        W, b, x = noise(n_squares, d_model, 3), noise(n_squares, 3, seed=1), noise(n_rows, d_model, seed=2)
        chance = noise(n_rows, n_squares, seed=n_rows) + torch.arange(n_squares) - 2
        labels = chance.round().long().clamp(0, 2)
        with unchanged(name, W=W, b=b, x=x, labels=labels):
            answer = fn(W, b, x, labels)
        compare_two(f"{name} of {n_rows} vectors", answer, scoring()(W, b, x, labels), words, ("", ""))
    wide = (W.double(), b.double(), x.double())
    right = scoring()(*wide, labels)
    compare_two(f"{name} in float64", fn(*wide, labels), right, words, ("", ""))


def directed(
    colour: Callable[[Tensor], Tensor] = lambda W: W[..., 1] - W[..., 2],
    emptiness: Callable[[Tensor], Tensor] = lambda W: W[..., 0] - W[..., 1:].mean(-1),
) -> Fn:
    return lambda W: (colour(W), emptiness(W))


@known_mistakes(
    {
        "the colour is theirs minus mine.": directed(colour=lambda W: W[..., 2] - W[..., 1]),
        "the colour is mine alone; take theirs off.": directed(colour=lambda W: W[..., 1]),
        "the colour is empty minus mine: the states are empty, mine, theirs.": directed(
            colour=lambda W: W[..., 0] - W[..., 1]
        ),
        "both discs are taken off emptiness whole; take off their mean.": directed(
            emptiness=lambda W: W[..., 0] - W[..., 1] - W[..., 2]
        ),
        "emptiness is the empty state alone; take off the mean of the discs.": directed(emptiness=lambda W: W[..., 0]),
        "emptiness has the wrong sign.": directed(emptiness=lambda W: W[..., 1:].mean(-1) - W[..., 0]),
        "the directions were brought to length 1.": directed(
            lambda W: F.normalize(W[..., 1] - W[..., 2], dim=-1),
            lambda W: F.normalize(W[..., 0] - W[..., 1:].mean(-1), dim=-1),
        ),
        "the two directions are swapped: colour comes first.": lambda W: directed()(W)[::-1],
    }
)
def check_probe_directions(fn: Fn) -> None:
    """Against sums over weights."""
    name, words, axes = "probe_directions", ("colour", "emptiness"), ("square d_model", "square d_model")
    for n_squares, d_model in ((5, 4), (2, 7)):
        W = noise(n_squares, d_model, 3, seed=d_model)
        with unchanged(name, W=W):
            answer = fn(W)
        right = (W @ torch.tensor([0.0, 1.0, -1.0]), W @ torch.tensor([1.0, -0.5, -0.5]))
        compare_two(name, answer, right, words, axes)
    compare_two(f"{name} in float64", fn(W.double()), tuple(part.double() for part in right), words, axes)


def angles(
    length: Callable[[Tensor], Tensor] = lambda v: v.square().sum().sqrt(),
    both: bool = True,
    turn: Callable[[Tensor], Tensor] = lambda cosine: cosine,
    centred: bool = False,
) -> Fn:
    """cosine_similarities, pair by pair."""

    def cosine_similarities(a: Tensor, b: Tensor) -> Tensor:
        if centred:
            a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        rows = [torch.stack([turn((v * w).sum() / length(v) / (length(w) if both else 1)) for w in b]) for v in a]
        return torch.stack(rows)

    return cosine_similarities


@known_mistakes(
    {
        "the vectors were not brought to length 1: these are dot products.": angles(length=lambda v: v[0] * 0 + 1),
        "only the vectors of `a` were brought to length 1.": angles(both=False),
        "it was divided by squared lengths.": angles(length=lambda v: v.square().sum()),
        "it was divided by sums of absolute values, not by lengths.": angles(length=lambda v: v.abs().sum()),
        "these are angles, not their cosines.": angles(turn=torch.acos),
        "the sign is lost.": angles(turn=torch.abs),
        "each vector's mean was taken off first: these are correlations.": angles(centred=True),
    }
)
def check_cosine_similarities(fn: Fn) -> None:
    """Against one pair at a time; vectors of all lengths."""
    name = "cosine_similarities"
    for rows, cols, d_model in ((4, 3, 5), (2, 6, 3), (1, 1, 2)):
        a = noise(rows, d_model) * torch.arange(1.0, rows + 1)[:, None] + 0.5
        b = noise(cols, d_model, seed=1) * torch.arange(1.0, cols + 1)[:, None] - 0.5
        with unchanged(name, a=a, b=b):
            actual = fn(a, b)
        compare(f"{name} of {rows} and {cols} vectors", actual, angles()(a, b), "row col")
    follows_input(name, fn, (noise(3, 4), noise(2, 4, seed=1)), "row col")
