"""Prompts for indirect object identification: two people, one of them gives, and who receives is for the model to say.

The texts are gift stories of the course's own grammar (`tales`), cut off before the receiver's name, so that the
shipped models have learned what they ask; other tokenizers, such as GPT-2's, do as well.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from course_utils.data import tales

PLACES = ("IO", "S1", "S1+1", "S2", "END")

# Common names of `tales`, meant to be one token each in GPT-2's vocabulary too; a tokenizer that disagrees is refused.
COMMON = """Mary Anna Emma Alice Sara Julia Laura Helen Lucy Jane Kate Rose Grace Amy Alex John Tom Paul Mark Peter
David Simon Alan Brian Carl Daniel Eric Frank George Henry Ian Jack Kevin Martin Nick Robert Sam Jacob Victor Walter
Adam Ben Chris Luke Max""".split()

# The first sentence names both, the second names the giver again; every word comes from the grammar of `tales`.
MEETINGS = (
    "<when> {A} and {B} <went> to the <place>.",
    "<when> {A} met {B} at the <place>.",
    "<when> {A} was in the <place> with {B}.",
    "<when> {A} and {B} had <meal> together.",
)
GIFTS = (
    "<then> {S} <gave> <thing> to",
    "{S} wanted to <give> <thing> to",
    "{S} had <thing> and <gave> it to",
    "It was {S} who <gave> <thing> to",
)
TEMPLATES = tuple(f"{meeting} {gift}" for meeting, gift in product(MEETINGS, GIFTS))
ORDERS = ("ABBA", "BABA")  # B is the subject, who gives; A is the indirect object: ABBA names A first
TRIES = 4_000  # drawings of words until a text has the common length


def fill(template: str, rng: random.Random) -> str:
    """Replace each `<rule>` by one of its phrases in the grammar; the names' slots stay."""
    while "<" in template:
        before, _, rest = template.partition("<")
        rule, _, after = rest.partition(">")
        phrases = [phrase for _, phrase in tales.RULES[rule]]
        template = before + rng.choice(phrases) + after
    return template


class IOIDataset:
    """`n` prompts such as "One day Mary and John went to the park. Then John gave a red ball to", answer " Mary".

    Templates and orders take turns, so that each pair of them comes about equally often; words and names are drawn
    with `seed`. All prompts have the same number of tokens, the first of which is the tokenizer's `bos_token_id`:
    nothing is padded, and a prompt ends at the last position. Two datasets of one tokenizer have the same length, too.

    `tokens` [batch pos]; `io` and `s`, the token ids of the receiver and the giver [batch]; `positions`, a dictionary
    with where "IO", "S1" (the giver's first mention), "S1+1" (the token after it), "S2" (the second mention) and "END"
    stand in each prompt [batch]; `texts`; `templates`, a number into the templates for each prompt [batch]; and
    `orders`, a list of "ABBA" (receiver named first) and "BABA". `flipped` gives corrupted prompts of equal length, and
    `to` the same prompts on another device, for a model that is there.

    Other `templates` may be given in the place of `TEMPLATES`, in the same notation: {A} and {B} are introduced, in
    this order, {S} gives, a <rule> becomes one of its phrases in the grammar. {X} is one more person, who has the same
    name wherever it stands and keeps it in all corruptions. Each template needs texts of the length that is common to
    all.

    Raises ValueError for a tokenizer in which one of `names`, with a space before it, is not one token, and says which.
    """

    def __init__(
        self,
        n: int,
        tokenizer: Any,
        seed: int,
        names: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        names = COMMON if names is None else list(names)
        for name in names:
            pieces = [tokenizer.decode([token]) for token in _encode(tokenizer, " " + name)]
            if len(pieces) != 1:
                raise ValueError(
                    f"IOIDataset: {' ' + name!r} is not one token here but {len(pieces)} ({pieces}); "
                    "leave it out of `names`, or take another tokenizer."
                )
        # two in a prompt, and three others for its ABC corruption
        if len(set(names)) < 5 + any("{X}" in template for template in templates):
            raise ValueError(
                f"IOIDataset: it needs five different names or more (six with {{X}}), and got {len(set(names))}."
            )
        for template in templates:
            if not all(slot in template for slot in ("{A}", "{B}", "{S}")):
                raise ValueError(f"IOIDataset: a template needs {{A}}, {{B}} and {{S}}, and {template!r} lacks one.")
            if re.search(r"(?<! ){[ABSX]}", template):
                raise ValueError(f"IOIDataset: a name needs a space before it, also in {template!r}.")
        self.tokenizer, self.names, self.seed, self.device = tokenizer, names, seed, torch.device("cpu")
        rng = random.Random(seed)
        length = _common_length(tokenizer, tuple(templates))
        turns = list(product(range(len(templates)), ORDERS))
        rng.shuffle(turns)
        rows = []
        for i in range(n):
            number, order = turns[i % len(turns)]
            text = next(_texts(templates[number], tokenizer, length, rng))
            io, s = rng.sample(names, 2)
            if "{X}" in text:
                text = text.replace("{X}", rng.choice([name for name in names if name not in (io, s)]))
            rows.append((text, number, order, io, s))
        self._frames = [text for text, *_ in rows]
        self.templates: Int[Tensor, " batch"] = torch.tensor([number for _, number, *_ in rows], dtype=torch.long)
        self._write([order for _, _, order, *_ in rows], [(io, s, s) for *_, io, s in rows])

    def _write(self, orders: list[str], people: list[tuple[str, str, str]]) -> None:
        """Put (IO, S1, S2) into the frames, and find out where everything stands."""
        self.orders, self._people = orders, people
        self.texts = []
        places: dict[str, list[int]] = {place: [] for place in PLACES}
        rows = []
        for frame, order, (io, s1, s2) in zip(self._frames, orders, people, strict=True):
            first, second = (io, s1) if order == "ABBA" else (s1, io)
            cuts = [frame.index(slot) for slot in ("{A}", "{B}", "{S}")]
            # what stands before each name, and the tokens up to it; names are one token with their space
            at = [1 + len(_encode(self.tokenizer, _named(frame[: cut - 1], first, second))) for cut in cuts]
            text = _named(frame, first, second).replace("{S}", s2)
            tokens = [self.tokenizer.bos_token_id, *_encode(self.tokenizer, text)]
            at_io, at_s1 = (at[0], at[1]) if order == "ABBA" else (at[1], at[0])
            values = (at_io, at_s1, at_s1 + 1, at[2], len(tokens) - 1)
            for place, position in zip(PLACES, values, strict=True):
                places[place].append(position)
            self.texts.append(text)
            rows.append(tokens)
        self.tokens: Int[Tensor, "batch pos"] = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.positions = {
            place: torch.tensor(found, dtype=torch.long, device=self.device) for place, found in places.items()
        }
        every = torch.arange(len(rows), device=self.device)
        self.io: Int[Tensor, " batch"] = self.tokens[every, self.positions["IO"]]
        self.s: Int[Tensor, " batch"] = self.tokens[every, self.positions["S1"]]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"IOIDataset: {len(self)} prompts of {self.tokens.shape[1]} tokens, {len(set(self.orders))} orders"

    def flipped(self, kind: str) -> "IOIDataset":
        """The same prompts, corrupted, token by token of the same length. Labels and positions are those of the result.

        "abc": three different names that are not in the prompt, so that nobody is named twice and nothing can be
        known (`io` and `s` are the first two). "names": giver and receiver exchange their names everywhere, so that
        the other answer is right, and the order of roles stays. "order": only the first two mentions exchange places,
        so that the answer stays, and ABBA becomes BABA. Both, one after the other, change S2 alone.
        """
        orders, people = self.orders, self._people
        if kind == "abc":
            rng = random.Random(f"abc {self.seed}")
            taken = [{*row, *re.findall(r"\w+", frame)} for row, frame in zip(people, self._frames, strict=True)]
            people = [_three([name for name in self.names if name not in row], rng) for row in taken]
        elif kind == "names":
            if any(s1 != s2 for _, s1, s2 in people):
                raise ValueError("IOIDataset: in ABC prompts nobody is named twice, so there are no roles to exchange.")
            people = [(s, io, io) for io, s, _ in people]
        elif kind == "order":
            orders = ["BABA" if order == "ABBA" else "ABBA" for order in orders]
        else:
            raise ValueError(f'IOIDataset: there is no corruption {kind!r}; there are "abc", "names" and "order".')
        return self._like(range(len(self)), orders, people)

    def select(self, rows: Sequence[int]) -> "IOIDataset":
        """Some of the prompts, by number, in that order."""
        return self._like(rows, [self.orders[row] for row in rows], [self._people[row] for row in rows])

    def to(self, device: torch.device | str) -> "IOIDataset":
        """The same prompts, with all tensors on another device: that of the model which is to read them."""
        return self._like(range(len(self)), self.orders, self._people, device)

    def _like(
        self,
        rows: Sequence[int],
        orders: list[str],
        people: list[tuple[str, str, str]],
        device: torch.device | str | None = None,
    ) -> "IOIDataset":
        other = object.__new__(type(self))
        other.tokenizer, other.names, other.seed = self.tokenizer, self.names, self.seed
        other.device = torch.device(self.device if device is None else device)
        other._frames = [self._frames[row] for row in rows]
        other.templates = self.templates[list(rows)].to(other.device)
        other._write(orders, people)
        return other


def _encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text, and nothing else: some tokenizers put a BOS in front, unless they are told not to."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def _named(text: str, first: str, second: str) -> str:
    return text.replace("{A}", first).replace("{B}", second)


def _three(names: list[str], rng: random.Random) -> tuple[str, str, str]:
    first, second, third = rng.sample(names, 3)
    return first, second, third


def _length(frame: str, tokenizer: Any) -> int:
    """Tokens of a frame with names in it, which are one token each."""
    text = _named(frame, COMMON[0], COMMON[1]).replace("{S}", COMMON[1]).replace("{X}", COMMON[2])
    return len(_encode(tokenizer, text))


def _texts(template: str, tokenizer: Any, length: int, rng: random.Random) -> Iterator[str]:
    """Frames of a template that have so many tokens."""
    for _ in range(TRIES):
        frame = fill(template, rng)
        if _length(frame, tokenizer) == length:
            yield frame
    raise ValueError(f"IOIDataset: with this tokenizer {template!r} hardly ever has {length} tokens.")


@lru_cache(maxsize=8)
def _common_length(tokenizer: Any, templates: tuple[str, ...]) -> int:
    """The number of tokens that every template has in reach, and the one that is rarest has most often."""
    rng = random.Random(0)
    tallies = [Counter(_length(fill(template, rng), tokenizer) for _ in range(60)) for template in templates]
    return max(range(1, 90), key=lambda length: min(tally[length] for tally in tallies))
