"""Checks of chapter 09, truth: F1 against known facts, rules that explain a latent, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch09.small import Fn
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.plain import agree

# -------------------------------------------------------------------------------------------------------------- best_f1

Counts = Callable[[int, int, int, int], float]  # (both, said, true, tokens) -> score


def f1(both: int, said: int, true: int, n: int) -> float:
    return 2 * both / (said + true) if both else 0.0


def judging(
    score: Counts = f1,
    over: Callable[[list[float]], float] = max,
    level: Callable[[Tensor, float, Tensor], float] = lambda column, share, every: share * float(column.max()),
    says: Callable[[float, float], bool] = lambda value, level: value > level,
    turned: bool = False,
) -> Fn:
    """Unit by unit, fact by fact, token by token."""

    def best_f1(activations: Tensor, labels: Tensor, shares: Sequence[float]) -> Tensor:
        out = torch.zeros(labels.shape[1], activations.shape[1], dtype=activations.dtype)
        for fact, true in enumerate(labels.T.tolist()):
            for unit, column in enumerate(activations.unbind(1)):
                scores = []
                for share in shares:
                    limit = level(column, share, activations)
                    said = [says(value, limit) for value in column.tolist()]
                    both = sum(a and b for a, b in zip(said, true, strict=True))
                    scores.append(score(both, sum(said), sum(true), len(true)))
                out[fact, unit] = over(scores)
        return out.T.contiguous() if turned else out

    return best_f1


@known_mistakes(
    {
        "it is the precision.": judging(lambda both, said, true, n: both / said if said else 0.0),
        "it is the recall.": judging(lambda both, said, true, n: both / true if true else 0.0),
        "it is the share of tokens that are right, which silence gets for rare facts.": judging(
            lambda both, said, true, n: (n - said - true + 2 * both) / n
        ),
        "it is the overlap, both/(said or true); F1 is twice both over the sum.": judging(
            lambda both, said, true, n: both / (said + true - both) if both else 0.0
        ),
        "the first threshold alone is tried.": judging(over=lambda scores: scores[0]),
        "it is the mean over the thresholds; take the best.": judging(over=lambda scores: sum(scores) / len(scores)),
        "thresholds are plain numbers; they are shares of each unit's maximum.": judging(
            level=lambda column, share, every: share
        ),
        "thresholds are shares of the largest maximum of all units.": judging(
            level=lambda column, share, every: share * float(every.max())
        ),
        "a unit says so at the threshold, too; only above it.": judging(says=lambda value, level: value >= level),
        "the axes are swapped: facts come first, then units.": judging(turned=True),
    }
)
def check_best_f1(fn: Fn) -> None:
    """By loops; with a unit that is always silent, and a fact that is never true."""
    name = "best_f1"
    for n, units, facts, shares in ((11, 4, 3, (0.2, 0.5)), (8, 3, 5, (0.0, 0.25, 0.75)), (6, 2, 1, (0.3,))):
        activations = noise(n, units, seed=n) * torch.arange(1, units + 1)
        activations = activations if n == 8 else activations.relu()
        activations[:, 1] = 0 if units > 2 else activations[:, 1]
        labels = noise(n, facts, seed=n + 1) > 0.2
        labels[:, 0] = labels[:, 0] & (facts == 1)
        with unchanged(name, activations=activations, labels=labels):
            actual = fn(activations, labels, shares)
        right = judging()(activations, labels, shares)
        compare(f"{name} of {n} tokens at shares {shares}", actual, right, "fact unit")
    follows_input(name, fn, (activations, labels, (0.1, 0.6)), "fact unit")


# -------------------------------------------------------------------------------------------------------------- explain


def gini(n: int, p: float) -> float:
    return n * p * (1 - p)


def entropy(n: int, p: float) -> float:
    import math

    return -n * sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def growing(
    impurity: Callable[[int, float], float] = gini,
    order: Callable[[Any, Any], Any] = lambda no, yes: (no, yes),
    leaf: Callable[[float], Any] = lambda share: share,
    always: bool = False,
    last: bool = False,
    sides: bool = True,
    fewer: int = 0,
) -> Fn:
    """By trying every fact."""

    def share_of(fires: list[bool]) -> float:
        return sum(fires) / len(fires) if fires else 0.0

    def cost(fires: list[bool]) -> float:
        return impurity(len(fires), share_of(fires))

    def grow(fires: list[bool], facts: list[list[bool]], n_questions: int) -> Any:
        best, least = None, cost(fires) - 1e-6
        for fact in range(len(facts[0]) if facts and n_questions > 0 else 0):
            parts: tuple[list[bool], list[bool]] = ([], [])
            for fire, row in zip(fires, facts, strict=True):
                parts[row[fact]].append(fire)
            total = sum(map(cost, parts))
            if total < least - (-1e-9 if last and best is not None else 1e-9) or (always and best is None):
                best, least = fact, total
        if best is None:
            return leaf(share_of(fires))
        below = []
        for side in (False, True):
            rows = [i for i, row in enumerate(facts) if row[best] == side]
            deeper = n_questions - 1 if side or sides else 0
            below.append(grow([fires[i] for i in rows], [facts[i] for i in rows], deeper))
        return (best, *order(*below))

    return lambda fires, facts, n_questions: grow(fires.tolist(), facts.tolist(), n_questions - fewer)


@known_mistakes(
    {
        "the two rules are swapped: first the one where the fact is false.": growing(order=lambda no, yes: (yes, no)),
        "the impurity is the entropy; take n p (1 - p).": growing(entropy),
        "impurities are not weighted by the number of tokens.": growing(lambda n, p: p * (1 - p)),
        "a leaf is True or False; give the share.": growing(leaf=lambda share: share > 0.5),
        "a question is asked even if it lowers nothing.": growing(always=True),
        "of equally good facts the last is taken; take the first.": growing(last=True),
        "where the answer is no, nothing more is asked.": growing(sides=False),
        "one question too few is asked.": growing(fewer=1),
    }
)
def check_explain(fn: Fn) -> None:
    """Against trying every fact; with copies of a fact, and with nothing to find."""
    name = "explain"
    for n, n_facts, n_questions, seed in ((30, 6, 3, 0), (25, 5, 2, 1), (12, 3, 1, 2), (40, 4, 4, 3), (9, 2, 0, 4)):
        facts = noise(n, n_facts, seed=seed) > 0.4
        facts[:, -1] = facts[:, 0]
        fires = (facts[:, 0] & ~facts[:, 1]) | (noise(n, seed=seed + 50) > 1.1)
        fires = fires ^ (facts.sum(1) == 3)
        _compare_rules(name, fn, fires, facts, n_questions)
    for fires in (torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        _compare_rules(name, fn, fires, noise(6, 3) > 0, 2)
    one, two = torch.arange(5) < 1, torch.arange(5) < 2
    _compare_rules(name, fn, one, torch.stack([two, one], dim=1), 1)
    _compare_rules(name, fn, ~one, ~torch.stack([two, one], dim=1), 1)
    both = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool()
    _compare_rules(name, fn, both[:, 0] ^ both[:, 1], both, 2)
    _compare_rules(name, fn, torch.tensor([True, False]), torch.tensor([[False], [True]]), 1)
    _compare_rules(name, fn, torch.tensor([True, False, True]), torch.zeros(3, 0, dtype=torch.bool), 2)


def _compare_rules(name: str, fn: Fn, fires: Tensor, facts: Tensor, n_questions: int) -> None:
    with unchanged(name, fires=fires, facts=facts):
        actual = fn(fires, facts, n_questions)
    right = growing()(fires, facts, n_questions)
    call = f"{len(fires)} tokens, {facts.shape[1]} facts, {n_questions} questions"
    agree(name, call, repr(_rounded(actual)), repr(_rounded(right)))


def _rounded(rule: Any) -> Any:
    """With shares to six digits, so that they may be worked out in any way."""
    if isinstance(rule, tuple) and len(rule) == 3:
        return (rule[0], _rounded(rule[1]), _rounded(rule[2]))
    return round(rule, 6) if isinstance(rule, float) else rule


# --------------------------------------------------------------------------------------- detection_score, fuzzing_score


def share(rows: list[tuple[bool, bool]], side: bool) -> float:
    """Of the rows where the second is `side`, those where the first is, too."""
    right = [said == true for said, true in rows if true == side]
    return sum(right) / len(right) if right else 0.5


def balanced(rows: list[tuple[bool, bool]]) -> float:
    return (share(rows, True) + share(rows, False)) / 2


def plain(rows: list[tuple[bool, bool]]) -> float:
    return sum(said == true for said, true in rows) / max(1, len(rows))


def tokens_of(predicted: Tensor, fires: Tensor, text: Tensor) -> list[tuple[bool, bool]]:
    return list(zip(predicted.tolist(), fires.tolist(), strict=True))


def texts_of(
    predicted: Tensor, fires: Tensor, text: Tensor, some: Callable[..., bool] = any
) -> list[tuple[bool, bool]]:
    rows = []
    for one in sorted(set(text.tolist())):
        own = [place for place, number in enumerate(text.tolist()) if number == one]
        rows.append((some(bool(predicted[i]) for i in own), any(bool(fires[i]) for i in own)))
    return rows


def tokens_there(predicted: Tensor, fires: Tensor, text: Tensor) -> list[tuple[bool, bool]]:
    there = {number for number, fire in zip(text.tolist(), fires.tolist(), strict=True) if fire}
    rows = tokens_of(predicted, fires, text)
    return [row for row, number in zip(rows, text.tolist(), strict=True) if number in there]


def scoring(of: Callable[[list[tuple[bool, bool]]], float], rows: Callable[..., list[tuple[bool, bool]]]) -> Fn:
    return lambda predicted, fires, text: of(rows(predicted, fires, text))


def precise(rows: list[tuple[bool, bool]]) -> float:
    return share([(true, said) for said, true in rows], True)


@known_mistakes(
    {
        "tokens are compared; ask about whole texts.": scoring(balanced, tokens_of),
        "it is the share of all texts that are right; each of the two kinds should count one half.": scoring(
            plain, texts_of
        ),
        "only the texts in which it fires count.": scoring(lambda rows: share(rows, True), texts_of),
        "only the texts in which it does not fire count.": scoring(lambda rows: share(rows, False), texts_of),
        "prediction and firing are swapped.": lambda predicted, fires, text: balanced(texts_of(fires, predicted, text)),
        "a text counts as predicted only if all of its tokens are.": scoring(
            balanced, lambda predicted, fires, text: texts_of(predicted, fires, text, all)
        ),
    }
)
def check_detection_score(fn: Fn) -> None:
    """Text by text; also where one kind of text is missing."""
    _check_score("detection_score", fn, scoring(balanced, texts_of))


@known_mistakes(
    {
        "all texts count; only those in which it fires should.": scoring(balanced, tokens_of),
        "it is the share of all tokens that are right; each of the two kinds should count one half.": scoring(
            plain, tokens_there
        ),
        "texts are compared; ask about tokens.": scoring(balanced, texts_of),
        "only the tokens on which it fires count.": scoring(lambda rows: share(rows, True), tokens_there),
        "it is the precision.": scoring(precise, tokens_there),
        "texts count in which it is predicted, not those in which it fires.": lambda predicted, fires, text: balanced(
            [(said, true) for true, said in tokens_there(fires, predicted, text)]
        ),
    }
)
def check_fuzzing_score(fn: Fn) -> None:
    """Token by token in the texts that count; also where none does."""
    _check_score("fuzzing_score", fn, scoring(balanced, tokens_there))


def _check_score(name: str, fn: Fn, right: Fn) -> None:
    text = torch.tensor([7, 7, 7, 2, 2, 9, 9, 9, 9, 4, 5, 5])
    nothing = torch.zeros(12, dtype=torch.bool)
    cases = []
    for seed, level in ((0, 0.6), (1, 0.9), (2, 0.3)):
        fires, predicted = noise(12, seed=seed) > level, noise(12, seed=seed + 5) > 0.5
        fires[text == 5] = False
        cases += [(predicted, fires), (predicted | fires, fires), (predicted & fires, fires)]
    cases += [(predicted, nothing), (predicted, ~nothing)]
    scores: list[float] = []
    for predicted, fires in cases:
        with unchanged(name, predicted=predicted, fires=fires, text=text):
            score = fn(predicted, fires, text)
        if not isinstance(score, float):
            agree(name, f"fires at {fires.nonzero()[:, 0].tolist()}", score, 0.5)
        scores.append(score)
    wanted = torch.tensor([right(predicted, fires, text) for predicted, fires in cases])
    compare(f"{name} of {len(cases)} predictions about 5 texts", torch.tensor(scores), wanted, "case")
