"""Checks of chapter 11, training: examples drawn evenly, and a loss on answers alone."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch11.small import Fn, demand, same_seed_twice
from course_utils.checks.comparing import carries_gradient, compare, compare_kind
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.data.questions import (
    BALANCED,
    IDS,
    MARK,
    PLACEHOLDER,
    WIDTH,
    Question,
    Wording,
    all_wordings,
    oracle_row,
    trained_wordings,
)

GOOD, BAD, ONE, MANY = (IDS[word] for word in ("good", "bad", "one", "many"))
ASKED = ("mood", "number", "this", "mentioned")  # a type that is held out stands in `known` as well
YES, NO = IDS["yes"], IDS["no"]
N = 2400


def some_questions() -> list[tuple[Question, ...]]:
    """What 37 windows answer: few moods, nearly all of them good; each but one has a token; held-out types."""
    found: list[tuple[Question, ...]] = []
    for window in range(37):
        questions = [Question("this", 20 if window % 9 == 4 else 11)]
        if window in (3, 5, 8, 13, 21, 30):
            questions.insert(0, Question("mood", BAD if window == 8 else GOOD))
        if window % 4 == 2:
            questions.append(Question("number", MANY if window % 8 == 2 else ONE))
        if window % 3 == 0:
            questions.append(Question("who first", 40 + window))
        if window % 5 == 1:
            questions += [Question("mentioned", YES, 60 + window), Question("mentioned", NO, 100 + window)]
        if window == 11:  # one window with many questions of a type
            questions += [Question("mentioned", YES, 72 + name) for name in range(3)]
        found.append(tuple(questions) if window != 36 else ())
    return found


Draw = Callable[[dict[str, list[tuple[int, Question]]], Random, Collection[str]], tuple[int, Question]]


def by_type(
    pools: dict[str, list[tuple[int, Question]]], rng: Random, balanced: Collection[str], window_first: bool = False
) -> tuple[int, Any]:
    """A type, an answer if that is to be balanced, a question."""
    kind = rng.choice(sorted(pools))
    pool = pools[kind]
    if kind in balanced:
        answer = rng.choice(sorted({question.answer for _, question in pool}))
        pool = [entry for entry in pool if entry[1].answer == answer]
    if window_first:
        window = rng.choice(sorted({window for window, _ in pool}))
        pool = [entry for entry in pool if entry[0] == window]
    return rng.choice(pool)


def drawing(
    draw: Draw = by_type,
    words: Callable[[str, Sequence[Wording], Random], Wording] = lambda kind, wordings, rng: rng.choice(list(wordings)),
    row: Callable[[list[int], Question], list[int]] = lambda row, question: row,
    left_out: bool = True,
    number: Callable[[int, list[Any]], int] = lambda window, known: window,
) -> Fn:
    """oracle_examples, one by one; with another step, what people write instead."""

    def oracle_examples(
        known: Sequence[Sequence[Question]],
        wordings: Mapping[str, Sequence[Wording]],
        n: int,
        rng: Random,
        balanced: Collection[str] = BALANCED,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pools: dict[str, list[tuple[int, Question]]] = {}
        for window, questions in enumerate(known):
            for question in questions:
                if wordings.get(question.type) or not left_out:
                    pools.setdefault(question.type, []).append((number(window, list(known)), question))
        which, rows, answers = [], [], []
        for _ in range(n):
            window, question = draw(pools, rng, balanced)
            choice = wordings.get(question.type) or trained_wordings(question.type)
            which.append(window)
            rows.append(row(oracle_row(words(question.type, choice, rng), question.about), question))
            answers.append(question.answer)
        return torch.tensor(which), torch.tensor(rows), torch.tensor(answers)

    return oracle_examples


def one_type_each(
    known: Any, wordings: Any, n: int, rng: Random, balanced: Collection[str], kinds: Callable[[list[str]], list[str]]
) -> tuple[Tensor, ...]:
    """Examples whose types are not drawn: `kinds` lists them, out of those that there are."""
    asked = sorted({question.type for its in known for question in its if wordings.get(question.type)})
    planned = iter(kinds(asked))

    def draw(pools: dict[str, list[tuple[int, Question]]], rng: Random, balanced: Collection[str]) -> Any:
        kind = next(planned)
        return by_type({kind: pools[kind]}, rng, balanced)

    return drawing(draw)(known, wordings, n, rng, balanced)


def in_blocks(known: Any, wordings: Any, n: int, rng: Random, balanced: Collection[str] = BALANCED) -> Any:
    return one_type_each(
        known, wordings, n, rng, balanced, lambda kinds: [kind for kind in kinds for _ in range(-(-n // len(kinds)))]
    )


def taking_turns(known: Any, wordings: Any, n: int, rng: Random, balanced: Collection[str] = BALANCED) -> Any:
    return one_type_each(known, wordings, n, rng, balanced, lambda kinds: kinds * -(-n // len(kinds)))


def in_proportion(pools: dict[str, list[tuple[int, Question]]], rng: Random, balanced: Collection[str]) -> Any:
    return rng.choice([entry for pool in pools.values() for entry in pool])


@known_mistakes(
    {
        "frequent types are asked for more often: draw the type first.": drawing(in_proportion),
        "the two answers of a balanced type come as often as they occur; draw the answer first.": drawing(
            lambda pools, rng, balanced: by_type(pools, rng, ())
        ),
        "the answers of every type are balanced; only those of `balanced` are.": drawing(
            lambda pools, rng, balanced: by_type(pools, rng, list(pools))
        ),
        "held-out wordings are among the questions; draw from `wordings`.": drawing(
            words=lambda kind, wordings, rng: rng.choice(all_wordings(kind))
        ),
        "types that have no wordings are asked for, held-out ones among them.": drawing(left_out=False),
        "every type is asked for in its first wording.": drawing(words=lambda kind, wordings, rng: wordings[0]),
        "the examples come type by type; draw the type anew for each of them.": in_blocks,
        "the types take turns; draw one for each example.": taking_turns,
        "the window is drawn before the question; each question of a type is equally likely.": drawing(
            lambda pools, rng, balanced: by_type(pools, rng, balanced, window_first=True)
        ),
        "the answer stands in the row, at the end of the question: the oracle could copy it.": drawing(
            row=lambda row, question: [*row[:-2], question.answer, row[-1]]
        ),
        "the windows are numbered among those that answer something; `known[i]` belongs to window i.": drawing(
            number=lambda window, known: sum(bool(questions) for questions in known[:window]) - 1
        ),
    }
)
def check_oracle_examples(fn: Fn) -> None:
    """Many examples of few windows: each fits its window, and types, answers, wordings and windows come evenly."""
    name, known = "oracle_examples", some_questions()
    wordings = {kind: trained_wordings(kind) for kind in (*ASKED, "country")}  # nobody asks for a country
    found = fn(known, wordings, N, Random(4))
    which, rows, answers = _three(name, found, N)
    words = {
        tuple(oracle_row(wording, question.about)): (question.type, question.about, wording)
        for questions in known
        for question in questions
        for wording in all_wordings(question.type)
    }
    asked = [words.get(tuple(row)) for row in rows.tolist()]
    _rows(name, rows, answers, asked, wordings)
    types, counted = Counter(), Counter()  # type: Counter[str], Counter[Any]
    for window, one, answer in zip(which.tolist(), asked, answers.tolist(), strict=True):
        assert one is not None
        kind, about, wording = one
        demand(
            0 <= window < len(known) and Question(kind, answer, about) in known[window],
            name,
            "another window",
            f"window {window} does not answer {kind!r} with {answer}.",
            "keep window, question and answer together.",
        )
        types[kind] += 1
        counted.update([(kind, "answer", answer), (kind, "window", window), (kind, "wording", wording)])
        counted["many"] += kind == "mentioned" and window == 11 and answer == YES
    for kind in ASKED:
        _near(name, "types", f"{kind!r} is asked", types[kind], N / len(ASKED), N)
    kinds = [one[0] for one in asked if one is not None]
    repeats = sum(one == other for one, other in pairwise(kinds))
    order = "type by type" if repeats > 0.9 * N else "in turn" if repeats < 0.05 * N else "some other"
    _near(name, f"order: {order}", "the type is that of the example before", repeats, N / len(ASKED), N)
    for kind, shares in SHARES.items():
        for answer, share in shares.items():
            count = counted[kind, "answer", answer]
            _near(name, f"answers of {kind}", f"{kind!r} has the answer {answer}", count, types[kind] * share, N)
        for wording in wordings[kind]:
            count, expected = counted[kind, "wording", wording], types[kind] / len(wordings[kind])
            _near(name, "wordings", f"{kind!r} is asked as {' '.join(wording)!r}", count, expected, N)
    for window in range(36):
        kind = "this"
        _near(name, "windows", f"window {window} is asked", counted[kind, "window", window], types[kind] / 36, N)
    several = counted["mentioned", "answer", YES] * 4 / 11
    _near(
        name,
        "many questions",
        "window 11 is asked whether its name was mentioned, with yes",
        counted["many"],
        several,
        N,
    )
    _other_calls(name, fn, known, wordings)


SHARES = {
    "mood": {GOOD: 1 / 2, BAD: 1 / 2},
    "number": {ONE: 1 / 2, MANY: 1 / 2},
    "this": {11: 32 / 36, 20: 4 / 36},
}


def _three(name: str, found: Any, n: int) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(part, Tensor) for part in found):
        raise CheckFailed(f"{name}: expected three tensors, (which, rows, answers).\n  Next: look at the signature.")
    shape = torch.zeros(n, dtype=torch.long)
    for part, words in zip(found, ("which", "rows", "answers"), strict=True):
        if words != "rows" and part.shape != shape.shape:
            compare(f"{name}, {words}", part, shape, "n")
        if words == "rows" and (part.dim() != 2 or len(part) != n):
            compare(f"{name}, rows", part, shape[:, None].expand(n, WIDTH + 4), "n pos")
        compare_kind(f"{name}, {words}", part, shape)
    return found


def _rows(
    name: str, rows: Tensor, answers: Tensor, asked: list[Any], wordings: Mapping[str, Sequence[Wording]]
) -> None:
    for row, answer, one in zip(rows.tolist(), answers.tolist(), asked, strict=True):
        demand(
            answer not in row,
            name,
            "answer in row",
            f"the answer {answer} stands in the row {row}.",
            "the row is what the oracle reads before it answers.",
        )
        demand(
            one is not None,
            name,
            "rows",
            f"the row {row} is no question about any window.",
            f"a row is {WIDTH} times {PLACEHOLDER}, the question's words, and {MARK}: `oracle_row` makes it.",
        )
        kind, _, wording = one
        demand(
            kind in wordings,
            name,
            "held-out type",
            f"{kind!r} has no wordings, and is asked for.",
            "leave out what `wordings` does not know.",
        )
        demand(
            wording in wordings[kind],
            name,
            "held-out wording",
            f"{' '.join(wording)!r} is not among the wordings that were handed in.",
            "draw from `wordings`.",
        )


def _near(name: str, where: str, what: str, count: int, expected: float, n: int) -> None:
    """Within five standard errors."""
    slack = 5 * (expected * (1 - expected / n)) ** 0.5
    demand(
        abs(count - expected) < slack,
        name,
        where,
        f"{what} {count} times in {n} examples; expected about {expected:.0f}.",
        "go through the order of the draws in the docstring.",
    )


def _other_calls(name: str, fn: Fn, known: Any, wordings: Any) -> None:
    same_seed_twice(name, lambda seed: torch.cat([part.flatten() for part in fn(known, wordings, 30, Random(seed))]))
    moods = {"mood": [("mood?",)], "number": []}
    _, rows, answers = _three(name, fn(known, moods, 400, Random(1), balanced=("number",)), 400)
    demand(
        bool((rows == torch.tensor(oracle_row(("mood?",)))).all()),
        name,
        "no wordings",
        'with {"mood": [("mood?",)], "number": []} it asks something else than "mood?".',
        "a type with no wordings is left out.",
    )
    _near(name, "balanced", "with 'mood' not balanced, BAD is the answer", int((answers == BAD).sum()), 400 / 6, 400)


# ----------------------------------------------------------------------------------------------------------------- loss

TOKENS = torch.tensor([[4, 1, 0, 3, 2, 5], [2, 2, 4, 6, 1, 0], [5, 3, 1, 4, 4, 6]])
IS_ANSWER = torch.tensor([[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1]]).bool()


def flat(rows: list[list[Tensor]]) -> list[Tensor]:
    return [value for row in rows for value in row]


def losing(
    counts: Callable[[Tensor], Tensor] = lambda is_answer: is_answer,
    shift: int = 1,
    average: Callable[[list[list[Tensor]]], Tensor] = lambda rows: torch.stack(flat(rows)).mean(),
    score: Callable[[Tensor], Tensor] = lambda p: -p.log(),
) -> Fn:
    """oracle_loss, token by token."""

    def oracle_loss(logits: Tensor, tokens: Tensor, is_answer: Tensor) -> Tensor:
        rows = []
        for row, marked in enumerate(counts(is_answer).tolist()):
            values = []
            for pos in range(1 if shift else 0, tokens.shape[1]):
                if marked[pos]:
                    p = logits[row, pos - shift].softmax(-1)[tokens[row, pos]]
                    values.append(score(p))
            rows.append(values)
        return average(rows)

    return oracle_loss


@known_mistakes(
    {
        "the question's tokens count as well; only answers do.": losing(torch.ones_like),
        "each token is judged by the logits at its own place; those of the place before predict it.": losing(shift=0),
        "the losses are summed; take their mean.": losing(average=lambda rows: torch.stack(flat(rows)).sum()),
        "the mean is taken over the rows, of each row's own mean; it is over all answer tokens.": losing(
            average=lambda rows: torch.stack([torch.stack(row).mean() for row in rows]).mean()
        ),
        "the sum is divided by the number of all tokens; divide by the number of answer tokens.": losing(
            average=lambda rows: torch.stack(flat(rows)).sum() / TOKENS.numel()
        ),
        "the losses are in bits; nats are asked for.": losing(score=lambda p: -p.log2()),
        "it is the mean of the probabilities, not of -log p.": losing(score=lambda p: p),
        "the answers are left out, and all else counts.": losing(torch.logical_not),
    }
)
def check_oracle_loss(fn: Fn) -> None:
    """Rows with different numbers of answers; huge logits; every kind of input, and gradients."""
    name, logits = "oracle_loss", 2 * noise(3, 6, 7, seed=6)
    compare(name, fn(logits, TOKENS, IS_ANSWER), losing()(logits, TOKENS, IS_ANSWER), "")
    one = torch.zeros_like(IS_ANSWER)
    one[1, 3] = True
    compare(f"{name} with one answer", fn(logits, TOKENS, one), losing()(logits, TOKENS, one), "")
    sure = torch.zeros(1, 2, 3)
    sure[0, 0, 2] = 300.0
    actual = fn(sure, torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    compare(f"{name} of an answer that the model rules out", actual, torch.tensor(300.0), "")
    first = torch.ones_like(IS_ANSWER)
    expected = losing()(logits, TOKENS, first)
    compare(f"{name} where the first token is marked too, which nothing predicts",
            fn(logits, TOKENS, first), expected, "")  # fmt: skip
    follows_every_kind(name, lambda values: fn(values, TOKENS, IS_ANSWER), (logits,), "", graph=True)
    carries_gradient(name, lambda values: fn(values, TOKENS, IS_ANSWER), (logits,))
    assert math.isfinite(float(expected))
