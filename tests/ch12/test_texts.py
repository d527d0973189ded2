"""What the checks of the task of chapter 12 cannot know: see tests/test_checks.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import solutions.ch12_brackets as ref
from course_utils.checks.ch12.texts import dataset, one_text, without_pairs
from course_utils.data.brackets import (
    CLOSE,
    D_VOCAB,
    END,
    KINDS,
    OPEN,
    PAD,
    START,
    SYMBOLS,
    decode,
    encode,
    random_balanced,
)
from tests.ch12 import other_brackets as other
from tests.ch12 import third_style as third

SECRETS = ("cumsum(", "argsort(", "gather(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "bracket == '(' -> bracket <= '('",  # only ")" is left, and it comes later
    "height == 0 -> height <= 0",  # a negative one has ended the loop
    "tokens == OPEN -> tokens <= OPEN",  # no token is smaller
    "1 -> 2",  # of height[:, -1]: END or PAD stands there, and changes nothing
    "OPEN + CLOSE -> CLOSE",  # OPEN is 0
    "balanced == OPEN -> balanced <= OPEN",
    "balanced == CLOSE -> balanced >= CLOSE",
    "first * (balanced == OPEN) -> first + (balanced == OPEN)",  # the largest is among the brackets that are wanted
    "second * (balanced == CLOSE) -> second + (balanced == CLOSE)",
    "first.argsort(dim=1) -> first.argsort()",
    "kinds.tolist() -> kinds",
    "True -> False",  # zip(strict=True) of equal lengths
    "zip(rows.tolist(), kinds.tolist(), strict=True) -> zip(rows.tolist(), kinds.tolist())",
    "n_pairs.unique() -> n_pairs",  # some lengths are made again; the last one counts
    "n_pairs.unique().tolist() -> n_pairs.unique()",
    "n_pairs == pairs -> n_pairs >= pairs",  # longer texts are made again when their turn comes
}


def last_as_total(tokens: Tensor) -> Any:
    """Fine in rows without padding only."""
    height = other.elevation(tokens)
    return height[:, -2] != 0, (height < 0).any(1)


def made(make: Callable[[str, int, torch.Generator], list[int]]) -> Any:
    return dataset(make)


def only_later(kind: str, pairs: int, generator: torch.Generator) -> list[int]:
    """A swap that always spoils."""
    text = random_balanced(1, pairs, generator)[0].tolist()
    return [CLOSE, *text[1:-1], OPEN] if kind == "swapped" else one_text(kind, pairs, generator)


def always_up(kind: str, pairs: int, generator: torch.Generator) -> list[int]:
    text = random_balanced(1, pairs, generator)[0].tolist()
    return [*text[:-1], OPEN] if kind == "flipped" else one_text(kind, pairs, generator)


def opening(kind: str, pairs: int, generator: torch.Generator) -> list[int]:
    text = one_text(kind, pairs, generator)
    return [OPEN, *text[1:]] if kind == "random" else text


def halves(kind: str, pairs: int, generator: torch.Generator) -> list[int]:
    """Random texts that always have the right total."""
    return one_text("shuffled" if kind == "random" else kind, pairs, generator)


def first_half(kind: str, pairs: int, generator: torch.Generator) -> list[int]:
    """The bracket that is turned stands in the first half."""
    text = random_balanced(1, pairs, generator)[0].tolist()
    place = int(torch.randint(pairs, (), generator=generator))
    return (
        [*text[:place], 1 - text[place], *text[place + 1 :]] if kind == "flipped" else one_text(kind, pairs, generator)
    )


def judged_early(text: str) -> bool:
    """It stops at the first bracket too many, and does not see what stands behind it."""
    height = 0
    for bracket in text:
        if bracket not in "()":
            raise ValueError(bracket)
        height += 1 if bracket == "(" else -1
        if height < 0:
            return False
    return height == 0


def first_and_last(tokens: Tensor) -> Tensor:
    """Right totals that begin and end as they should: not yet balanced."""
    last = tokens.gather(1, (tokens <= CLOSE).sum(1, keepdim=True))[:, 0]
    return (other.elevation(tokens)[:, -1] == 0) & (tokens[:, 1] != CLOSE) & (last != OPEN)


def from_global(n: int, n_ctx: int, generator: torch.Generator, *shares: Any) -> Any:
    return ref.bracket_dataset(n, n_ctx, torch.Generator().manual_seed(int(torch.randint(99, ()))), *shares)


def from_a_copy(n: int, n_ctx: int, generator: torch.Generator, *shares: Any) -> Any:
    copied = torch.Generator()
    copied.set_state(generator.get_state())
    return ref.bracket_dataset(n, n_ctx, copied, *shares)


def for_ever(n: int, n_ctx: int, generator: torch.Generator, *shares: Any) -> Any:
    """Draws until there are enough texts, also where there never will be."""
    while n > sum(4**pairs for pairs in range(1, (n_ctx - 2) // 2 + 1)):
        torch.rand(1, generator=generator)
    return ref.bracket_dataset(n, n_ctx, generator, *shares)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "is_balanced": [
        ("expected True, got 1", lambda text: int(other.is_balanced(text))),
        ("should raise ValueError", lambda text: without_pairs(text)),
        ("wrong answer", lambda text: other.is_balanced(text) and len(text) < 6),
        ("should raise ValueError", judged_early),
    ],
    "elevation": [
        ("expected dtype int64, got float32", lambda tokens: other.elevation(tokens).float()),
        ("values are wrong", lambda tokens: other.elevation(tokens).abs()),
        ("wrong shape", lambda tokens: other.elevation(tokens)[:, 1:]),
        ("values are wrong", lambda tokens: other.elevation(tokens).masked_fill(tokens > CLOSE, 0)),
    ],
    "failures": [
        ("wrong shape", lambda tokens: (other.failures(tokens)[0][:, None], other.failures(tokens)[1])),
        ("expected dtype bool", lambda tokens: tuple(part.long() for part in other.failures(tokens))),
        ("expected two tensors, got a Tensor", lambda tokens: torch.stack(other.failures(tokens))),
        (
            "values are wrong",
            lambda tokens: (other.failures(tokens)[0], (other.elevation(tokens) < -1).any(1)),
        ),
        ("wrong", lambda tokens: ((tokens <= CLOSE).sum(1) % 2 == 1, other.failures(tokens)[1])),
        ("wrong", lambda tokens: (other.failures(tokens)[0], tokens[:, 1] == CLOSE)),
        ("wrong", lambda tokens: (other.failures(tokens)[0], (other.elevation(tokens) < 0).any().repeat(len(tokens)))),
    ],
    "is_balanced_batch": [
        ("expected dtype bool", lambda tokens: other.is_balanced_batch(tokens).long()),
        ("values is wrong", lambda tokens: other.is_balanced_batch(tokens) & (tokens[:, 1] < END)),  # the empty text
        ("expected a Tensor", lambda tokens: other.is_balanced_batch(tokens).tolist()),
        ("wrong", first_and_last),
    ],
    "bracket_dataset": [
        ("a loop that waits for one more never ends", for_ever),
        ("of the swapped texts are balanced", made(only_later)),
        ("of the flipped texts have too many OPENs", made(always_up)),
        ("of the random texts begin with an OPEN", made(opening)),
        ("most random texts have the total 0", made(halves)),
        ("of sixteen flipped texts of one pair all are", made(first_half)),
        ("of the rows have the kind of the row before", dataset(order=lambda text: text[1])),
        ("of the rows have the length of the row before", dataset(order=lambda text: text[0].index(END))),
        ("it drew from torch's global random numbers", from_global),
        ("it left `generator` as it was", from_a_copy),
        ("the kinds are [1, 4]", dataset(using=lambda shares: (0.0, 0.5, 0.0, 0.0, 0.5))),
        ("the kinds have the shares", dataset(using=lambda shares: (0.2, 0.2, 0.2, 0.2, 0.2))),
        ("expected the rows and their kinds", lambda *args: ref.bracket_dataset(*args)[0]),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), getattr(third, name)] for name in SURPRISES}


def test_encode_and_decode_are_inverse() -> None:
    texts = ["", "()", ")(", "(" * 9]
    tokens = encode(texts, 11)
    assert decode(tokens) == texts
    assert tokens[1].tolist() == [START, OPEN, CLOSE, END] + [PAD] * 7
    assert len(SYMBOLS) == D_VOCAB


@pytest.mark.parametrize(("text", "words"), [("(a)", "no bracket"), ("(" * 10, "room for 9")])
def test_encode_refuses_what_is_no_text_of_brackets_or_too_long(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode([text], 11)


def test_balanced_texts_are_all_equally_likely() -> None:
    """Fourteen texts of four pairs, by chi squared with thirteen degrees of freedom."""
    drawn = decode(random_balanced(14_000, 4, torch.Generator().manual_seed(0)))
    counts = torch.tensor([drawn.count(text) for text in sorted(set(drawn))])
    assert len(counts) == 14 and all(map(without_pairs, set(drawn)))
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 34.5  # the 99.9% point


def test_training_and_held_out_texts_are_apart() -> None:
    tokens, _ = ref.bracket_dataset(3000, 42, torch.Generator().manual_seed(0))
    train, held_out = decode(tokens[:2500]), decode(tokens[2500:])
    assert not set(train) & set(held_out)


def test_the_shares_of_kinds_can_leave_one_out() -> None:
    _, kinds = ref.bracket_dataset(500, 42, torch.Generator().manual_seed(0), (0.5, 0.5, 0.0, 0.0, 0.0))
    assert {KINDS[kind] for kind in kinds.tolist()} == {"random", "balanced"}
