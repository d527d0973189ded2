"""Checks of chapter 12, the task: brackets by a loop and by tensors, and a data set of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import compare, compare_kind, unchanged
from course_utils.checks.guarding import at_most_lines
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import agree, call_of, must_raise
from course_utils.data.brackets import CLOSE, END, KINDS, OPEN, PAD, SHARES, START, decode, encode, random_balanced

Fn = Callable[..., Any]
TEXTS = ("()", ")(", "(()", "())", "", "(())()", "())(()", "((()))()", "))((", "(", ")", "()()", "((", "(()))(")


def without_pairs(text: str) -> bool:
    """The definition by rewriting: take "()" out until there is none, and see whether anything is left."""
    while "()" in text:
        text = text.replace("()", "")
    return not text


def heights(text: str) -> list[int]:
    """The elevation after each bracket."""
    return [text[:end].count("(") - text[:end].count(")") for end in range(1, len(text) + 1)]


def verdict(decide: Callable[[list[int], str], bool]) -> Fn:
    """An is_balanced that decides from the elevations; other characters are refused."""

    def is_balanced(text: str) -> bool:
        if set(text) - {"(", ")"}:
            raise ValueError(text)
        return decide(heights(text), text)

    return is_balanced


def ends_at_zero(height: list[int]) -> bool:
    return not height or height[-1] == 0


@known_mistakes(
    {
        "it counts and forgets the order: as many of each is not enough, as in `)(`.": verdict(
            lambda height, text: ends_at_zero(height)
        ),
        "it never looks at the total: brackets that stay open, as in `(()`, are not noticed.": verdict(
            lambda height, text: min(height, default=0) >= 0
        ),
        "the empty text is refused; nothing in it lacks a partner.": verdict(
            lambda height, text: bool(text) and without_pairs(text)
        ),
        "the answer is turned round: it is True for the unbalanced ones.": verdict(
            lambda height, text: not without_pairs(text)
        ),
        "the elevation may not touch zero before the end; `()()` is balanced.": verdict(
            lambda height, text: without_pairs(text) and 0 not in height[:-1]
        ),
        "only the first and the last bracket are looked at.": verdict(
            lambda height, text: not text or (text[0] == "(" and text[-1] == ")")
        ),
    }
)
def check_is_balanced(fn: Fn) -> None:
    """Texts chosen by hand, then all of up to six brackets; and other characters."""
    name = "is_balanced"
    agree(f"{name} of {len(TEXTS)} texts", f"{name} of {', '.join(map(repr, TEXTS))}", [fn(text) for text in TEXTS],
          [without_pairs(text) for text in TEXTS])  # fmt: skip
    for text in ("".join(row) for length in range(7) for row in product("()", repeat=length)):
        agree(name, call_of(name, text), fn(text), without_pairs(text))
    for text in ("(a)", "[]", "( )", "())a", "(b"):
        must_raise(name, ValueError, call_of(name, text), partial(fn, text), "look at every character first.")


ROWS = ("(())()", ")(", "(()", "())(", "))", "((()))", "()()()()", "(", "())(()", "", "(()))(", "))((", "((")


def rows(n_ctx: int = 11, texts: Sequence[str] = ROWS) -> Tensor:
    """Some texts as tokens, not contiguous."""
    return encode(texts, n_ctx).T.contiguous().T


def by_rows(row: Callable[[list[int]], Any]) -> Fn:
    """What `row` gives for the tokens of each text."""
    return lambda tokens: torch.tensor([row(one) for one in tokens.tolist()])


STEPS = {OPEN: 1, CLOSE: -1}


def climbing(row: list[int], steps: dict[int, int] = STEPS) -> list[int]:
    """The elevation after each position of a row, by a loop."""
    height, out = 0, []
    for token in row:
        height += steps.get(token, 0)
        out.append(height)
    return out


right_elevation = by_rows(climbing)


@known_mistakes(
    {
        "the elevation is counted from the wrong end, from the right.": by_rows(lambda row: climbing(row[::-1])[::-1]),
        "padding is counted as a bracket: PAD must leave the elevation as it is.": by_rows(
            lambda row: climbing(row, STEPS | {PAD: -1})
        ),
        "everything that does not open is counted as closing: START, END and PAD are no brackets.": by_rows(
            lambda row: climbing(row, dict.fromkeys((CLOSE, START, END, PAD), -1) | {OPEN: 1})
        ),
        "START is counted as a bracket that opens.": by_rows(lambda row: climbing(row, STEPS | {START: 1})),
        "the sign is wrong: OPEN goes up and CLOSE goes down.": by_rows(
            lambda row: climbing(row, {OPEN: -1, CLOSE: 1})
        ),
        "it is the elevation before each position; this position's bracket counts already.": by_rows(
            lambda row: [0, *climbing(row)[:-1]]
        ),
        "they are the steps, not their running sum.": by_rows(lambda row: [STEPS.get(token, 0) for token in row]),
        "only the OPENs are counted.": by_rows(lambda row: climbing(row, {OPEN: 1})),
        "the running sum goes down the batch, not along the text.": lambda tokens: right_elevation(tokens.T).T,
    }
)
def check_elevation(fn: Fn) -> None:
    """Texts of many lengths, in rows of two lengths."""
    for n_ctx in (11, 13):
        tokens = rows(n_ctx)
        with unchanged("elevation", tokens=tokens):
            actual = fn(tokens)
        compare(f"elevation of {len(tokens)} texts in rows of {n_ctx}", actual, right_elevation(tokens), "batch pos")


def of_texts(decide: Callable[[list[int]], bool]) -> Callable[[Tensor], Tensor]:
    """For each row, what `decide` says of the elevations after its brackets."""
    return lambda tokens: torch.tensor([decide(heights(text)) for text in decode(tokens)], dtype=torch.bool)


def wrong_total(height: list[int]) -> bool:
    return not ends_at_zero(height)


def dips(height: list[int]) -> bool:
    return min(height, default=0) < 0


def two(first: Callable[[list[int]], bool], second: Callable[[list[int]], bool]) -> Fn:
    return lambda tokens: (of_texts(first)(tokens), of_texts(second)(tokens))


def from_right(height: list[int]) -> bool:
    """Whether some suffix opens more brackets than it closes."""
    return any(height[-1] - before > 0 for before in [0, *height[:-1]]) if height else False


@known_mistakes(
    {
        "the two failures are swapped: the total comes first.": two(dips, wrong_total),
        "a total is called wrong only if brackets stay open; too many CLOSEs are wrong too.": two(
            lambda height: bool(height) and height[-1] > 0, dips
        ),
        "a total is called wrong only if it is negative.": two(lambda height: bool(height) and height[-1] < 0, dips),
        "a total is called wrong if the elevation is not zero somewhere; it is the elevation at the end.": two(
            lambda height: any(height), dips
        ),
        "an elevation of zero is taken for negative.": two(wrong_total, lambda height: min(height, default=0) <= 0),
        "the second is looked for at the end only; the elevation can be negative half-way and recover.": two(
            wrong_total, lambda height: bool(height) and height[-1] < 0
        ),
        "the elevation is counted from the wrong end, from the right.": two(wrong_total, from_right),
        "padding is counted as a bracket.": lambda tokens: (
            by_rows(lambda row: climbing(row, STEPS | {PAD: -1})[-1] != 0)(tokens),
            by_rows(lambda row: min(climbing(row, STEPS | {PAD: -1})) < 0)(tokens),
        ),
        "texts with a wrong total are left out of the second; a text can fail in both ways.": two(
            wrong_total, lambda height: dips(height) and not wrong_total(height)
        ),
        "both are turned round: True means that the text fails.": two(
            lambda height: not wrong_total(height), lambda height: not dips(height)
        ),
    }
)
def check_failures(fn: Fn) -> None:
    """Texts that fail in either way, in both and in neither, at two lengths of row."""
    name = "failures"
    for n_ctx in (11, 13):
        tokens = rows(n_ctx)
        with unchanged(name, tokens=tokens):
            actual = fn(tokens)
        if not isinstance(actual, tuple) or len(actual) != 2:
            what = "None" if actual is None else f"a {type(actual).__name__}"
            raise CheckFailed(f"{name}: expected two tensors, got {what}.\n  Next: return wrong_total, negative.")
        # side by side, so that an answer is judged by both
        for which, part in zip(("the total is wrong", "the elevation is negative"), actual, strict=True):
            compare_form(f"{name}: whether {which}", part, len(tokens))
        both = torch.stack(list(actual), dim=1)
        right = torch.stack([of_texts(wrong_total)(tokens), of_texts(dips)(tokens)], dim=1)
        compare(f"{name} of {len(tokens)} texts in rows of {n_ctx}", both, right, "batch failure")


def compare_form(name: str, actual: Any, n: int) -> None:
    """Raise CheckFailed unless it is a tensor of `n` truth values."""
    if not isinstance(actual, Tensor) or actual.shape != (n,) or actual.dtype is not torch.bool:
        compare(name, actual, torch.zeros(n, dtype=torch.bool), "batch")


def one(decide: Callable[[list[int]], bool]) -> Fn:
    return of_texts(decide)


@known_mistakes(
    {
        "it counts and forgets the order: as many of each is not enough.": one(ends_at_zero),
        "the total is forgotten: the elevation must come back to zero.": one(lambda height: not dips(height)),
        "the answer is turned round: it is True for the unbalanced ones.": one(
            lambda height: dips(height) or wrong_total(height)
        ),
        "a text counts as unbalanced only if it fails in both ways.": one(
            lambda height: not (dips(height) and wrong_total(height))
        ),
        "padding is counted as a bracket.": lambda tokens: torch.tensor(
            [climbing(row, STEPS | {PAD: -1})[-1] == 0 and min(climbing(row)) >= 0 for row in tokens.tolist()]
        ),
        "the elevation is counted from the wrong end, from the right.": one(
            lambda height: not from_right([-level for level in height]) and ends_at_zero(height)
        ),
        "the elevation may not touch zero before the end.": one(
            lambda height: ends_at_zero(height) and not dips(height) and 0 not in height[:-1]
        ),
    }
)
def check_is_balanced_batch(fn: Fn) -> None:
    """Against rewriting; texts chosen by hand, then all of four and six brackets."""
    name = "is_balanced_batch"
    everything = ["".join(row) for length in (4, 6) for row in product("()", repeat=length)]
    for texts, n_ctx in ((ROWS, 11), (ROWS, 12), (everything, 9)):
        tokens = rows(n_ctx, texts)
        with unchanged(name, tokens=tokens):
            actual = fn(tokens)
        right = torch.tensor([without_pairs(text) for text in texts])
        compare(f"{name} of {len(texts)} texts in rows of {n_ctx}", actual, right, "batch")


# ----------------------------------------------------------------------------------------------------------- the data

N_CTX = 12  # at most ten brackets: five lengths
MANY = 600


def one_text(kind: str, pairs: int, generator: torch.Generator) -> list[int]:
    """One text of a kind, by lists."""
    text = random_balanced(1, pairs, generator)[0].tolist()
    if kind == "random":
        return torch.randint(2, (2 * pairs,), generator=generator).tolist()
    if kind == "shuffled":
        return [text[i] for i in torch.randperm(2 * pairs, generator=generator).tolist()]
    if kind == "flipped":
        place = int(torch.randint(2 * pairs, (1,), generator=generator))
        return [*text[:place], OPEN + CLOSE - text[place], *text[place + 1 :]]
    if kind == "swapped":
        first, second = (
            [place for place, token in enumerate(text) if token == wanted][
                int(torch.randint(pairs, (1,), generator=generator))
            ]
            for wanted in (OPEN, CLOSE)
        )
        text[first], text[second] = CLOSE, OPEN
    return text


def dataset(
    make: Callable[[str, int, torch.Generator], list[int]] = one_text,
    row: Callable[[list[int], int], list[int]] = lambda text, n_ctx: (
        [START, *text, END] + [PAD] * (n_ctx - 2 - len(text))
    ),
    again: bool = False,
    number: Callable[[int], int] = lambda kind: kind,
    order: Callable[[tuple[list[int], int]], Any] | None = None,
    lengths: Callable[[int], range] = lambda n_ctx: range(1, (n_ctx - 2) // 2 + 1),
    using: Callable[[Sequence[float]], Sequence[float]] = lambda shares: shares,
) -> Fn:
    """A bracket_dataset, text by text, with switches for what people get wrong."""

    def bracket_dataset(n: int, n_ctx: int, generator: torch.Generator, shares: Sequence[float] = SHARES) -> Any:
        if n > sum(4**pairs for pairs in range(1, (n_ctx - 2) // 2 + 1)):
            raise ValueError(n)
        found: list[tuple[list[int], int]] = []
        seen: set[tuple[int, ...]] = set()
        possible = lengths(n_ctx)
        chances = torch.tensor(using(shares))
        while len(found) < n:
            kind = int(torch.multinomial(chances, 1, generator=generator))
            pairs = possible[int(torch.randint(len(possible), (1,), generator=generator))]
            tokens = row(make(KINDS[kind], pairs, generator), n_ctx)
            if again or tuple(tokens) not in seen:
                seen.add(tuple(tokens))
                found.append((tokens, number(kind)))
        if order:
            found.sort(key=order)
        return torch.tensor([tokens for tokens, _ in found]), torch.tensor([kind for _, kind in found])

    return bracket_dataset


def kind_made(kind: str, instead: Callable[[list[int], torch.Generator], list[int]]) -> Fn:
    """A bracket_dataset in which one kind comes out otherwise, made from a balanced text."""

    def make(wanted: str, pairs: int, generator: torch.Generator) -> list[int]:
        if wanted != kind:
            return one_text(wanted, pairs, generator)
        return instead(random_balanced(1, pairs, generator)[0].tolist(), generator)

    return dataset(make)


def turned_twice(text: list[int], generator: torch.Generator) -> list[int]:
    first, second = torch.randperm(len(text), generator=generator)[:2].tolist()
    return [OPEN + CLOSE - token if place in (first, second) else token for place, token in enumerate(text)]


@known_mistakes(
    {
        "texts come several times; drop those that were drawn before.": dataset(again=True),
        "END is missing: it stands behind the last bracket.": dataset(
            row=lambda text, n_ctx: [START, *text] + [PAD] * (n_ctx - 1 - len(text))
        ),
        "END stands in the last column; it follows the last bracket, and PAD follows it.": dataset(
            row=lambda text, n_ctx: [START, *text] + [PAD] * (n_ctx - 2 - len(text)) + [END]
        ),
        "START is missing: every row begins with it.": dataset(
            row=lambda text, n_ctx: [*text, END] + [PAD] * (n_ctx - 1 - len(text))
        ),
        "two brackets of a swapped text are turned round; an OPEN and a CLOSE must change places.": kind_made(
            "swapped", turned_twice
        ),
        "the flipped texts are left balanced.": kind_made("flipped", lambda text, generator: text),
        "a kind says whether the text is balanced; give the number of how it was made.": dataset(
            number=lambda kind: int(KINDS[kind] == "balanced")
        ),
        "kinds are counted from 1; KINDS[0] is the first.": dataset(number=lambda kind: kind + 1),
        "the rows are sorted, as by torch.unique; a split by place is then none by chance.": dataset(
            order=lambda text: text[0]
        ),
        "no text has the most pairs that fit.": dataset(lengths=lambda n_ctx: range(1, (n_ctx - 2) // 2)),
        "all texts have the most pairs that fit; the number of pairs is drawn.": dataset(
            lengths=lambda n_ctx: range((n_ctx - 2) // 2, (n_ctx - 2) // 2 + 1)
        ),
    }
)
def check_bracket_dataset(fn: Fn) -> None:
    """The form of a batch, what each kind promises, the chances in a large one, and whose random numbers they are."""
    name, n = "bracket_dataset", 60
    call = f"{name}({n}, {N_CTX}, generator)"
    generator = torch.Generator().manual_seed(1)
    before, beginning = torch.get_rng_state(), generator.get_state()
    tokens, kinds = _parts(name, call, fn(n, N_CTX, generator), n, N_CTX)
    _form(name, call, tokens, kinds)
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed(f"{name}: it drew from torch's global generator.\n  Next: pass generator=generator.")
    if torch.equal(generator.get_state(), beginning):
        raise CheckFailed(f"{name}: it left `generator` as it was.\n  Next: draw from the generator itself.")
    again, _ = fn(n, N_CTX, torch.Generator().manual_seed(1))
    if not torch.equal(again, tokens):
        raise CheckFailed(f"{name}: one seed gave two data sets.\n  Next: take every random number from `generator`.")
    other, _ = fn(n, N_CTX, generator)
    if torch.equal(other, tokens):
        raise CheckFailed(f"{name}: the second data set is the first again.\n  Next: do not seed `generator` yourself.")
    _what_kinds_promise(name, tokens, kinds)
    # a vocabulary of lengths in which texts hardly ever come twice, so that the chances are those of the drawing
    large, made = _parts(name, f"{name}({MANY}, 42, generator)", fn(MANY, 42, generator), MANY, 42)
    _chances(name, large, made, SHARES)
    _in_the_order_of_drawing(name, large, made)
    few = (0.0, 0.5, 0.0, 0.0, 0.5)
    large, made = _parts(name, f"{name}({MANY}, 30, generator, {few})", fn(MANY, 30, generator, few), MANY, 30)
    _what_kinds_promise(name, large, made)
    _chances(name, large, made, few)
    _any_bracket_is_flipped(name, fn)
    # in rows of odd width one place stays empty
    everything, _ = _parts(name, f"{name}(20, 7, generator)", fn(20, 7, generator), 20, 7)
    _distinct(name, f"{name}(20, 7, generator), all the texts there are", everything)
    call, there = f"{name}(21, 7, generator)", "there are 20 texts"
    with at_most_lines(call, 2_000_000, f"{there}; a loop that waits for one more never ends. Raise ValueError first."):
        must_raise(name, ValueError, call, partial(fn, 21, 7, generator), f"{there}.")


def _parts(name: str, call: str, answer: Any, n: int, n_ctx: int) -> tuple[Tensor, Tensor]:
    if not isinstance(answer, tuple) or len(answer) != 2:
        what = "None" if answer is None else f"a {type(answer).__name__}"
        raise CheckFailed(f"{name}: expected the rows and their kinds, got {what}.\n  Next: return tokens, kinds.")
    for what, part, shape in (("the rows", answer[0], (n, n_ctx)), ("the kinds", answer[1], (n,))):
        zeros = torch.zeros(shape, dtype=torch.long)
        if not isinstance(part, Tensor) or part.shape != shape:
            compare(f"{name}: {what} of {call}", part, zeros, "batch n_ctx" if len(shape) > 1 else "batch")
        compare_kind(f"{name}: {what}", part, zeros)
    return answer


def _form(name: str, call: str, tokens: Tensor, kinds: Tensor) -> None:
    """Diagnoses that do not depend on which texts were drawn."""
    n_ctx = tokens.shape[1]
    length = ((tokens == OPEN) | (tokens == CLOSE)).sum(dim=1)
    place = torch.arange(n_ctx)
    special = torch.where(place == length[:, None] + 1, END, PAD).masked_fill(place == 0, START)
    bracket = (place > 0) & (place <= length[:, None])
    wrong = torch.where(bracket, (tokens != OPEN) & (tokens != CLOSE), tokens != special)
    if wrong.any():
        row, pos = wrong.nonzero()[0].tolist()
        evidence = (tokens[:, 0] == START).all(), (tokens == END).any(), (tokens[:, -1] == END).all()
        raise CheckFailed(
            f"{name}: a row is not START, brackets, END, PAD.\n  {call}\n"
            f"  first at [batch={row}, pos={pos}], in {tokens[row].tolist()}",
            evidence=Evidence("the form of rows", torch.stack(evidence)),
            advice="  Next: print one row, and put the four parts together one after the other.",
        )
    _distinct(name, call, tokens)
    if (length % 2).any() or (length == 0).any():
        odd = int(length[(length % 2 == 1) | (length == 0)][0])
        raise CheckFailed(
            f"{name}: a text has {odd} brackets.\n  {call}\n"
            "  Next: twice as many brackets as pairs, and at least one pair."
        )
    found = sorted(set(length.tolist()))
    if found != list(range(2, n_ctx - 1, 2)):
        raise CheckFailed(
            f"{name}: in {len(tokens)} rows the texts have {found} brackets.\n  {call}\n"
            f"  expected all even numbers from 2 to {n_ctx - 2}",
            evidence=Evidence("the lengths", found),
            advice="  Next: draw the number of pairs evenly from 1 to the most that fit.",
        )
    numbers = sorted(set(kinds.tolist()))
    if numbers != list(range(len(KINDS))):
        raise CheckFailed(
            f"{name}: the kinds are {numbers}.\n  {call}\n  expected all numbers from 0 to {len(KINDS) - 1}",
            evidence=Evidence("the kinds", numbers),
            advice="  Next: a kind is its index in KINDS.",
        )


def _distinct(name: str, call: str, tokens: Tensor) -> None:
    twice = [row for row, count in Counter(map(tuple, tokens.tolist())).items() if count > 1]
    if twice:
        raise CheckFailed(
            f"{name}: texts come several times, such as {decode(torch.tensor(twice))[0]!r}.\n  {call}",
            evidence=Evidence("texts that come twice", True),
            advice="  Next: keep a text only the first time, and draw on until there are enough.",
        )


def _what_kinds_promise(name: str, tokens: Tensor, kinds: Tensor) -> None:
    for text, kind in zip(decode(tokens), (KINDS[kind] for kind in kinds.tolist()), strict=True):
        total = abs(text.count("(") - text.count(")"))
        holds = {
            "random": True,
            "balanced": without_pairs(text),
            "swapped": total == 0 and min(heights(text)) >= -2,
            "flipped": total == 2 and min(heights(text)) >= -2,
            "shuffled": total == 0,
        }
        if not holds[kind]:
            raise CheckFailed(
                f"{name}: {text!r} is of the kind {kind!r}, which cannot be.\n"
                f"  its total is off by {total}, its lowest elevation is {min(heights(text))}",
                evidence=Evidence("a text that is not of its kind", kind),
                advice="  Next: make one text of each kind, and print it.",
            )


def _chances(name: str, tokens: Tensor, kinds: Tensor, shares: Sequence[float]) -> None:
    """Shares of kinds and lengths, of OPENs in random texts, and where things were changed, by five standard errors."""
    n, found = len(tokens), torch.bincount(kinds, minlength=len(KINDS)) / len(tokens)
    expected = torch.tensor(shares)
    if ((found - expected).abs() > 5 * (expected * (1 - expected) / n).sqrt() + 1e-6).any():
        raise CheckFailed(
            f"{name}: the kinds have the shares {[round(share, 2) for share in found.tolist()]}.\n"
            f"  expected about {list(shares)}\n  Next: draw every row's kind with the chances `shares`."
        )
    length = ((tokens == OPEN) | (tokens == CLOSE)).sum(dim=1)
    most, average = tokens.shape[1] - 2, float(length.float().mean())
    slack = 5 * most / 12**0.5 / n**0.5
    if not -slack < average - (most + 2) / 2 < slack + 4:  # short texts come twice, and are dropped
        raise CheckFailed(
            f"{name}: a text has {average:.1f} brackets on average.\n  expected about {(most + 2) / 2:g}\n"
            "  Next: draw the number of pairs evenly."
        )
    for kind in ("random", "shuffled"):
        chosen = tokens[kinds == KINDS.index(kind)]
        value = (chosen[:, 1] == OPEN).float().mean()  # the first bracket; it tells shuffled from balanced
        if len(chosen) and (value - 0.5).abs() > 5 * (0.25 / len(chosen)) ** 0.5:
            raise CheckFailed(
                f"{name}: {value:.0%} of the {kind} texts begin with an OPEN.\n  expected about 50%\n"
                "  Next: look at how the brackets of this kind are drawn."
            )
    random_texts = tokens[kinds == KINDS.index("random")]
    if len(random_texts):
        totals = (random_texts == OPEN).sum(1) - (random_texts == CLOSE).sum(1)
        if (totals == 0).float().mean() > 0.6:
            raise CheckFailed(
                f"{name}: most random texts have the total 0.\n  Next: draw each of their brackets by itself."
            )
    for kind in ("swapped", "flipped"):
        chosen = tokens[kinds == KINDS.index(kind)]
        if len(chosen) and not 0.15 < of_balance(chosen) < 0.85 and kind == "swapped":
            raise CheckFailed(
                f"{name}: {of_balance(chosen):.0%} of the swapped texts are balanced.\n  expected about half of them\n"
                "  Next: any OPEN and any CLOSE may change places, whichever comes first."
            )
        if len(chosen) and kind == "flipped":
            up = ((chosen == OPEN).sum(1) > (chosen == CLOSE).sum(1)).float().mean()
            if not 0.25 < up < 0.75:
                raise CheckFailed(
                    f"{name}: {up:.0%} of the flipped texts have too many OPENs.\n  expected about half of them\n"
                    "  Next: any bracket may be the one that is turned round."
                )


def _in_the_order_of_drawing(name: str, tokens: Tensor, kinds: Tensor) -> None:
    """Neighbours have nothing in common: not their kind, their length, or how they begin."""
    lengths = (tokens <= CLOSE).sum(dim=1)
    begins = tokens[:, 1:5] @ torch.tensor([8, 4, 2, 1])
    for what, values in (("kind", kinds), ("length", lengths), ("beginning", begins)):
        alike = (values[1:] == values[:-1]).float().mean()
        if alike > 0.8:
            raise CheckFailed(
                f"{name}: {alike:.0%} of the rows have the {what} of the row before.",
                evidence=Evidence("the order of rows", what),
                advice="  Next: leave the rows in the order in which their texts were drawn.",
            )


def _any_bracket_is_flipped(name: str, fn: Fn) -> None:
    """One text of one pair at a time, so that none is dropped: half of them become `))`, and half `((`."""
    generator = torch.Generator().manual_seed(2)
    came = {decode(fn(1, 4, generator, (0.0, 0.0, 0.0, 1.0, 0.0))[0])[0] for _ in range(16)}
    if came != {"((", "))"}:
        raise CheckFailed(
            f"{name}: of sixteen flipped texts of one pair all are {sorted(came)[0]!r}.\n"
            "  Next: any bracket may be the one that is turned round, the last one too."
        )


def of_balance(tokens: Tensor) -> float:
    return sum(map(without_pairs, decode(tokens))) / len(tokens)
