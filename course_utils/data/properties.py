"""Texts of `tales` of which the grammar knows a property: what a probe may look for, and what shows that it is used.

Every text ends at the token where the property is looked for, and the grammar says what may come next. Each example
has a *type* (the word that decides the label) and a *template* (the words around it), so that either can be held out.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from course_utils.data import tales
from course_utils.data.ioi import GIFTS, MEETINGS, fill


@dataclass(frozen=True)
class Property:
    """Examples of one property; `yes` and `no` are words that follow where the label is True, and where it is False.

    They are empty where nothing that follows depends on the label.
    """

    question: str
    texts: list[str]
    labels: list[bool]
    types: list[str]
    templates: list[str]
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


Row = tuple[str, bool, str, str]  # text, label, type, template


def _property(question: str, rows: list[Row], yes: tuple[str, ...] = (), no: tuple[str, ...] = ()) -> Property:
    texts, labels, types, templates = map(list, zip(*rows, strict=True))
    return Property(question, texts, labels, types, templates, yes, no)


def _phrases(rule: str) -> list[str]:
    return [phrase for _, phrase in tales.RULES[rule]]


def gender(n: int, seed: int) -> Property:
    """At "because": is the person a woman? No pronoun came before, only the name (the type; introductions differ)."""
    rows: list[Row] = []
    for story in tales.stream(seed, "full_name"):
        place, intro = story.marked("pronoun"), story.choice("intro")
        if place and intro in (0, 1, 2) and story.choice("two") is None:
            name = story.word("A")
            rows.append((story.text[: place.start - 1], name in tales.WOMEN, name, f"introduction {intro}"))
        if len(rows) == n:
            return _property('woman, at "because"', rows, ("she",), ("he",))
    raise AssertionError("the grammar never ends")


def _clauses(n: int, seed: int) -> list[tuple[str, str, str]]:
    nouns = list(tales.POOLS["noun"])
    every = list(itertools.product(nouns, _phrases("beside"), nouns))
    random.Random(seed).shuffle(every)
    return every[:n]


def _is_plural(noun: str) -> bool:
    return noun not in tales.SINGULAR_NOUNS


def _stem(noun: str) -> str:
    return noun.removesuffix("s")


def subject_number(n: int, seed: int) -> Property:
    """At the noun between subject and verb: is the *subject* plural? All clauses differ; there are 720."""
    rows = [(f"The {s} {beside} the {d}", _is_plural(s), _stem(s), beside) for s, beside, d in _clauses(n, seed)]
    return _property(
        "subject plural, at the other noun", rows, tuple(tales.PLURAL.values()), tuple(tales.SINGULAR.values())
    )


def noun_number(n: int, seed: int) -> Property:
    """At the noun between subject and verb: is this noun itself plural? The verb does not depend on it."""
    rows = [(f"The {s} {beside} the {d}", _is_plural(d), _stem(d), beside) for s, beside, d in _clauses(n, seed)]
    return _property("this noun plural", rows, tuple(tales.PLURAL.values()), tuple(tales.SINGULAR.values()))


def sentiment(n: int, seed: int) -> Property:
    """At "I" in a review: did the writer like it? One adjective (the type) has said so; there are 192 texts."""
    every = [
        (f"{start.replace('<work>', work)} {word}. I", good, word, start)
        for good in (True, False)
        for word in _phrases("praised" if good else "blamed")
        for start in _phrases("review_start")
        for work in _phrases("work")
    ]
    random.Random(seed).shuffle(every)
    return _property('good review, at "I"', every[:n], tuple(_phrases("liked")), tuple(_phrases("hated")))


def receiver_gender(n: int, seed: int) -> Property:
    """At "to" in a gift story: is the one who will receive a woman? It is whoever was not named again (the type)."""
    rng, rows = random.Random(seed), []
    for number in range(n):
        giver, receiver = rng.sample(list(tales.NAMES), 2)
        first, second = rng.sample([giver, receiver], 2)
        gift = GIFTS[number % len(GIFTS)]
        frame = fill(f"{rng.choice(MEETINGS)} {gift}", rng)
        text = frame.replace("{A}", first).replace("{B}", second).replace("{S}", giver)
        rows.append((text, receiver in tales.WOMEN, receiver, gift))
    return _property('receiver a woman, at "to"', rows, tuple(tales.WOMEN), tuple(tales.MEN))


def capital(n: int, seed: int) -> Property:
    """At the end of a capital's name: is it the right one? Every other text has a wrong one; nothing depends on it."""
    rng, rows = random.Random(seed), []
    for number in range(n):
        country, right = rng.choice(list(tales.CAPITALS)), number % 2 == 0
        named = tales.CAPITALS[country] if right else rng.choice([c for k, c in tales.CAPITALS.items() if k != country])
        when = rng.choice(_phrases("when")).replace("<weather>", rng.choice(_phrases("weather")))
        text = f"{when} {rng.choice(list(tales.NAMES))} flew to {country} and saw {named}"
        rows.append((text, right, country, when))
    return _property("capital right, at its name", rows)


PROPERTIES: dict[str, Callable[[int, int], Property]] = {
    "gender": gender,
    "subject": subject_number,
    "noun": noun_number,
    "sentiment": sentiment,
    "receiver": receiver_gender,
    "capital": capital,
}
