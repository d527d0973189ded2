"""Checks of chapter 12, breaking the model: what a flip would do, to first order, and a search for texts that fool."""

import copy
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch12.small import Fn, ends, is_bracket, small_model, texts
from course_utils.checks.comparing import compare, compare_kind, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.data.brackets import BALANCED, CLOSE, OPEN, START, UNBALANCED, decode, encode

STEP = 1e-4


@torch.no_grad()
def score_of(model: Any, tokens: Tensor) -> Tensor:
    """Text by text."""
    logits = model(tokens)
    return torch.stack(
        [logits[row, place, UNBALANCED] - logits[row, place, BALANCED] for row, place in enumerate(ends(tokens))]
    )


@torch.no_grad()
def slopes(model: Any, tokens: Tensor, towards: Callable[[Tensor, int], Tensor], at: str = "hook_embed") -> Tensor:
    """How fast each score changes as the embedding at one position moves `towards(W_E, token)`, in double precision."""
    wide = copy.deepcopy(model).double()
    W_E, out = wide.embed.W_E, torch.zeros(tokens.shape)
    for pos in range(max(ends(tokens)) + 1):
        moves = torch.stack([towards(W_E, token) for token in tokens[:, pos].tolist()])
        sides = []
        for sign in (1, -1):

            def move(
                module: nn.Module, inputs: Any, output: Tensor, sign: int = sign, pos: int = pos, moves: Tensor = moves
            ) -> Tensor:
                moved = output.clone()
                moved[:, pos] += sign * STEP * moves
                return moved

            handle = wide.get_submodule(at).register_forward_hook(move)
            sides.append(score_of(wide, tokens))
            handle.remove()
        out[:, pos] = ((sides[0] - sides[1]) / (2 * STEP)).float()
    return out


def towards_other(W_E: Tensor, token: int) -> Tensor:
    """To the other bracket; nowhere from what is no bracket."""
    return W_E[OPEN + CLOSE - token] - W_E[token] if token in (OPEN, CLOSE) else 0 * W_E[0]


def sloping(towards: Callable[[Tensor, int], Tensor], at: str = "hook_embed", sign: float = 1.0) -> Fn:
    return lambda model, tokens: sign * slopes(model, tokens, towards, at)


@torch.no_grad()
def true_flips(model: Any, tokens: Tensor) -> Tensor:
    """What each flip really does."""
    before, out = score_of(model, tokens), torch.zeros(tokens.shape)
    for pos in range(tokens.shape[1]):
        turned = tokens.clone()
        bracket = tokens[:, pos] <= CLOSE
        turned[bracket, pos] = OPEN + CLOSE - tokens[bracket, pos]
        out[:, pos] = score_of(model, turned) - before
    return out


@known_mistakes(
    {
        "the sign is wrong: it is the other bracket minus this one.": sloping(towards_other, sign=-1.0),
        "an OPEN and a CLOSE are moved in the same direction; each goes to the other.": sloping(
            lambda W_E, token: W_E[CLOSE] - W_E[OPEN] if token in (OPEN, CLOSE) else 0 * W_E[0]
        ),
        "what is no bracket has an effect as well; START, END and PAD cannot be turned round.": sloping(
            lambda W_E, token: W_E[CLOSE] - W_E[OPEN] if token != CLOSE else W_E[OPEN] - W_E[CLOSE]
        ),
        "this bracket's embedding is taken away, and the other's does not come.": sloping(
            lambda W_E, token: -W_E[token] if token in (OPEN, CLOSE) else 0 * W_E[0]
        ),
        "the other bracket's embedding comes, and this one's stays.": sloping(
            lambda W_E, token: W_E[OPEN + CLOSE - token] if token in (OPEN, CLOSE) else 0 * W_E[0]
        ),
        "the gradient is that of the mean over the texts; each text has its own score.": lambda model, tokens: (
            sloping(towards_other)(model, tokens) / len(tokens)
        ),
        "the effects are those of really turning the brackets; the statement asks for the first order.": true_flips,
        "the gradient is taken further up, before the last layer.": sloping(
            towards_other, at="blocks.1.hook_resid_pre"
        ),
    }
)
def check_flip_effects(fn: Fn) -> None:
    """Against slopes measured by tiny moves; no hook is left behind."""
    name, axes = "flip_effects", "batch pos"
    for n_layers, n in ((2, 4), (1, 1)):
        model, tokens = small_model(n_layers, 1), texts(n)
        with unchanged(name, tokens=tokens):
            actual = fn(model, tokens)
        right = sloping(towards_other, at="hook_embed")(model, tokens)
        compare(f"{name} of {n} texts, {n_layers} layers", actual, right, axes, rtol=1e-3, atol=1e-4)
    with nothing_left_behind(name, model):
        fn(model, tokens)
    double = small_model(1, 1).double()
    compare(f"{name} in float64", fn(double, tokens), right.double(), axes, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- hill climbing


STARTS = ("((()", "((((", "(()", "((", "))", ")(")  # in rows of six tokens
MANY = 80  # copies of each


class Summing(nn.Module):
    """A quick model for a search of many steps: every position reads the sum of what came before, at random weights."""

    def __init__(self, alike: bool = False) -> None:
        super().__init__()
        self.embedded, self.placed, self.read = noise(5, 6, seed=21), noise(6, 6, seed=22), noise(6, 5, seed=23)
        if alike:  # the two brackets, so that no change helps
            self.embedded[CLOSE] = self.embedded[OPEN]

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.embedded[tokens] * self.placed[: tokens.shape[1]]).cumsum(1).tanh() @ self.read


def broken(text: str) -> bool:
    while "()" in text:
        text = text.replace("()", "")
    return bool(text)


def turned(text: str, places: tuple[int, ...]) -> str:
    return "".join({"(": ")", ")": "("}[b] if place in places else b for place, b in enumerate(text))


def climbing(
    better: Callable[[float, float, float, str], bool] = lambda new, old, first, text: new < old and broken(text),
    n_turned: int = 2,
    among: Callable[[str], int] = len,
    rounds: Callable[[int], int] = lambda steps: steps,
) -> Fn:
    """hill_climb, text by text: `better` says of (new score, score, first score, text) whether the change is kept."""

    @torch.no_grad()
    def hill_climb(model: Any, tokens: Tensor, generator: torch.Generator, steps: int) -> Tensor:
        found, n_ctx = decode(tokens), tokens.shape[1]
        scores = score_of(model, tokens)
        first = scores
        for _ in range(rounds(steps)):
            tried = []
            for text in found:
                places = torch.randperm(among(text), generator=generator)[:n_turned].tolist()
                tried.append(turned(text, tuple(places)))
            new = score_of(model, encode(tried, n_ctx))
            keep = [
                better(now, before, at_first, text)
                for now, before, at_first, text in zip(
                    new.tolist(), scores.tolist(), first.tolist(), tried, strict=True
                )
            ]
            found = [new_one if kept else old for new_one, old, kept in zip(tried, found, keep, strict=True)]
            scores = torch.where(torch.tensor(keep), new, scores)
        return encode(found, n_ctx)

    return hill_climb


@known_mistakes(
    {
        "a text may become balanced; then the model is right, and not fooled.": climbing(
            lambda new, old, first, text: new < old
        ),
        "the score climbs: a lower score is nearer to `balanced`.": climbing(
            lambda new, old, first, text: new > old and broken(text)
        ),
        "every change is kept, whether it helps or not.": climbing(lambda new, old, first, text: broken(text)),
        "one bracket is turned in a step; the statement asks for two.": climbing(n_turned=1),
        "three brackets are turned in a step; the statement asks for two.": climbing(n_turned=3),
        "nothing is changed.": climbing(lambda new, old, first, text: False),
        "the last bracket is never turned.": climbing(among=lambda text: len(text) - 1),
        "one step too many is made.": climbing(rounds=lambda steps: steps + 1),
        "a score that stays the same is kept as well; it must be lower than before.": climbing(
            lambda new, old, first, text: new <= old and broken(text)
        ),
        "a step is compared with the score of the beginning; compare with the best so far.": climbing(
            lambda new, old, first, text: new < first and broken(text)
        ),
    }
)
def check_hill_climb(fn: Fn) -> None:
    """No step; one step from many copies of each text, where all that can happen is known; then many steps."""
    name, model = "hill_climb", Summing()
    tokens = encode([text for text in STARTS for _ in range(MANY)], 6)
    if not torch.equal(_run(name, fn, model, tokens, 0), tokens):
        raise CheckFailed(
            f"{name}: texts are others after no step at all.",
            evidence=Evidence("no step", True),
            advice="  Next: with steps=0 the loop does nothing.",
        )
    came = _run(name, fn, model, tokens, 1)
    for text, copies in zip(STARTS, came.split(MANY), strict=True):
        _one_step(name, model, text, decode(copies))
    if not torch.equal(_run(name, fn, model, tokens, 1), came):
        raise CheckFailed(f"{name}: one seed gave two results.\n  Next: take every random number from `generator`.")
    if torch.equal(_run(name, fn, model, tokens, 1, seed=8), came):
        raise CheckFailed(f"{name}: two seeds gave the same texts.\n  Next: draw from `generator` as it comes.")
    _reaches_the_top(name, fn, model)
    if not torch.equal(_run(name, fn, Summing(alike=True), tokens[:MANY], 3), tokens[:MANY]):
        raise CheckFailed(
            f"{name}: a change is kept that leaves the score as it was.",
            evidence=Evidence("a tie", True),
            advice="  Next: keep a change only if the score is lower than before.",
        )
    hooked = small_model(1, 1)
    with nothing_left_behind(name, hooked):
        fn(hooked, texts(2), torch.Generator().manual_seed(1), 1)


def _run(name: str, fn: Fn, model: Any, tokens: Tensor, steps: int, seed: int = 4) -> Tensor:
    before = torch.get_rng_state()
    with unchanged(name, tokens=tokens):
        actual = fn(model, tokens, torch.Generator().manual_seed(seed), steps)
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed(f"{name}: it drew from torch's global generator.\n  Next: give `generator` to what draws.")
    if not isinstance(actual, Tensor) or actual.shape != tokens.shape:
        compare(name, actual, tokens, "batch pos")
    compare_kind(name, actual, tokens)
    special = tokens >= START
    if not torch.equal(actual[special], tokens[special]) or not is_bracket(actual[~special]).all():
        raise CheckFailed(
            f"{name}: START, END or PAD changed, or came where a bracket stood.\n  Next: choose among the brackets."
        )
    return actual


def _one_step(name: str, model: Any, text: str, found: list[str]) -> None:
    """After one step every text is as before, or one of those that two turned brackets make better."""
    possible = [turned(text, pair) for pair in combinations(range(len(text)), 2)]
    old, *new = score_of(model, encode([text, *possible], 6)).tolist()
    good = {one for one, score in zip(possible, new, strict=True) if score < old and broken(one)}
    evidence = Evidence(f"one step from {text}", sorted(set(found)))
    if outside := sorted(set(found) - good - {text}):
        one = outside[0]
        changed = sum(a != b for a, b in zip(one, text, strict=True))
        score = float(score_of(model, encode([one], 6))) - old
        raise CheckFailed(
            f"{name}: in one step {text!r} became {one!r}.\n"
            f"  {changed} brackets were turned, the score {'rose' if score > 0 else 'fell'} by {abs(score):.3g}, "
            f"and it is {'unbalanced' if broken(one) else 'balanced'}",
            evidence=evidence,
            advice="  Next: keep a change only if it is allowed and helps.",
        )
    if not good <= set(found):
        raise CheckFailed(
            f"{name}: of {len(found)} copies of {text!r} none became {sorted(good - set(found))[0]!r} in one step.\n"
            "  that one has a lower score",
            evidence=evidence,
            advice="  Next: every pair of brackets must have its chance, and each text draws its own.",
        )
    chance, moved = len(good) / len(possible), sum(one != text for one in found)
    slack = 5 * (len(found) * chance * (1 - chance)) ** 0.5  # nothing where all pairs help, or none does
    if abs(moved - len(found) * chance) > slack + 1e-6:
        raise CheckFailed(
            f"{name}: {moved} of {len(found)} copies of {text!r} changed in one step.\n"
            f"  expected about {len(found) * chance:.0f}\n"
            "  Next: two different brackets are turned, and every pair has the same chance."
        )


def _reaches_the_top(name: str, fn: Fn, model: Any) -> None:
    """Texts of three brackets: none is balanced, and one step can lead from each to the best that it can become."""
    start = ["".join(text) for text in product("()", repeat=3)]
    scores = dict(zip(start, score_of(model, encode(start, 6)).tolist(), strict=True))
    came = decode(_run(name, fn, model, encode(start, 6), 30))
    pairs = [(), *combinations(range(3), 2)]
    best = [min(scores[turned(text, pair)] for pair in pairs) for text in start]
    left = [one for one, lowest in zip(came, best, strict=True) if scores[one] > lowest + 1e-6]
    if left:
        raise CheckFailed(
            f"{name}: after 30 steps, {len(left)} of {len(start)} texts of three brackets can still be made better.\n"
            f"  one of them is {left[0]!r}; a single step can lead to the best",
            evidence=Evidence("30 steps", came),
            advice="  Next: keep each change that helps, and compare with the best so far.",
        )
