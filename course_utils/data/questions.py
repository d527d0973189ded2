"""Questions about stories whose answers the grammar knows, for a model that reads another model's activations.

A story is cut after some token, and all questions are about the text up to there. Questions are short sequences of
words, several wordings for each type; words and most answers are new tokens, numbered after those of the tokenizer of
`tales`. Names and other words of the stories are answered by their own tokens (a country or a capital by its first).
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from course_utils.data import tales
from course_utils.data.grammar import Derivation

N_TALES = 1152  # tokens of `tales`; the new ones come after them
WIDTH = 4  # activations that the oracle sees at once
N_WORDS = 3  # the longest question

ABOUT = "NAME"  # stands in a wording for the person whom the question is about
PROPERTIES = {"who": ("who", "name"), "woman": ("woman", "female"), "man": ("man", "male")}
ROLES = {
    "first": ("first", "earliest"),
    "latest": ("latest", "last"),
    "giver": ("giver", "gave"),
    "receiver": ("receiver", "got"),
}
SINGLE = {
    "surname": ("surname", "family"),
    "country": ("country", "land"),
    "capital": ("capital", "city"),
    "mood": ("mood", "opinion"),
    "number": ("number", "count"),
    "kind": ("kind", "sort"),
    "this": ("this", "here"),
    "one back": ("back1", "before"),
    "two back": ("back2", "earlier"),
    "next": ("next", "then"),
    "the one after": ("next2", "later"),
}
TYPES = (*(f"{prop} {role}" for prop in PROPERTIES for role in ROLES), "mentioned", *SINGLE)
HELD_OUT_TYPES = ("who first", "woman receiver", "man giver")  # never trained; their words occur in other questions
YES_NO = tuple(kind for kind in TYPES if kind.split()[0] in ("woman", "man", "mentioned"))
BALANCED = (*YES_NO, "mood", "number")  # types with two answers, which are asked for equally often
TOKEN_TYPES = {"this": 0, "one back": -1, "two back": -2, "next": 1, "the one after": 2}

NAMED_IN = ("gift", "meeting", "full_name", "geography")
ASKED_OF: Mapping[str, tuple[str, ...]] = {  # kinds of story in which a type can have an answer; others: in all
    **{f"{prop} {role}": NAMED_IN for prop in PROPERTIES for role in ("first", "latest")},
    **{f"{prop} {role}": ("gift", "meeting") for prop in PROPERTIES for role in ("giver", "receiver")},
    "mentioned": NAMED_IN,
    "surname": ("full_name",),
    "country": ("geography",),
    "capital": ("geography",),
    "mood": ("good_review", "bad_review"),
    "number": ("agreement",),
}

PLACEHOLDER, BLANK, MARK, UNKNOWN = range(N_TALES, N_TALES + 4)
SPECIAL = ("<activation>", "<blank>", "<answer>", "unknown")
ANSWERS = ("yes", "no", "good", "bad", "one", "many", *tales.KINDS)
ASKING = (
    "say",
    *itertools.chain(*PROPERTIES.values(), *ROLES.values(), ("mentioned", "named"), *SINGLE.values()),
)
NEW_WORDS = (*SPECIAL, *ANSWERS, *(f"{word}?" for word in ASKING))
D_VOCAB = N_TALES + len(NEW_WORDS)
IDS = {word: N_TALES + number for number, word in enumerate(NEW_WORDS)}

Wording = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question of some type and the token that answers it; `about` is the token of a name, if the type needs one."""

    type: str
    answer: int
    about: int | None = None


@dataclass(frozen=True)
class Cut:
    """A story's tokens (the first is `<|endoftext|>`), cut after position `end`, and what can be asked about it.

    `known` are questions that the text up to the cut answers, `unknown` those that make no sense for this kind of
    story; their answer is `UNKNOWN`. Questions that are neither (who gave, before anybody did) are left out.
    """

    text: str
    tokens: tuple[int, ...]
    end: int
    kind: str
    known: tuple[Question, ...]
    unknown: tuple[Question, ...]


# --- wordings -----------------------------------------------------------------------------------------------------


def all_wordings(kind: str) -> list[Wording]:
    """Every way to ask a question of this type: synonyms, with or without "say?" in front."""
    if kind == "mentioned":
        parts = [("mentioned", "named"), (ABOUT,)]
    elif kind in SINGLE:
        parts = [SINGLE[kind]]
    else:
        prop, role = kind.split()
        parts = [PROPERTIES[prop], ROLES[role]]
    cores = [tuple(word if word == ABOUT else f"{word}?" for word in words) for words in itertools.product(*parts)]
    return [(*frame, *core) for frame in ((), ("say?",)) for core in cores]


def held_out_wording(kind: str) -> Wording:
    """The one that is never trained: "say?" and all the second synonyms, each of which occurs in other wordings."""
    return all_wordings(kind)[-1]


def trained_wordings(kind: str) -> list[Wording]:
    """All the others; the first is the plainest."""
    return all_wordings(kind)[:-1]


def question_ids(wording: Wording, about: int | None = None) -> list[int]:
    """The tokens of a question, blanks in front so that all are equally long."""
    ids = IDS if about is None else IDS | {ABOUT: about}
    if ABOUT in wording and about is None:
        raise ValueError(f"question_ids: {' '.join(wording)} needs `about`, the token of a name.")
    return [BLANK] * (N_WORDS - len(wording)) + [ids[word] for word in wording]


def oracle_row(wording: Wording, about: int | None = None) -> list[int]:
    """What the oracle reads: a placeholder for each activation, the question, and the mark after which it answers."""
    return [PLACEHOLDER] * WIDTH + question_ids(wording, about) + [MARK]


# --- answers ------------------------------------------------------------------------------------------------------


def word_id(tokenizer: Any, word: str) -> int:
    """The token that stands for a word: a new one for what is among `NEW_WORDS`, else the first one of " word"."""
    return IDS[word] if word in IDS else tokenizer.encode(" " + word)[0]


def spelled(tokenizer: Any, token: int) -> str:
    """A token as a word, without its leading space."""
    return NEW_WORDS[token - N_TALES] if token >= N_TALES else tokenizer.decode([token]).strip()


def possible_answers(tokenizer: Any, kind: str) -> list[int]:
    """The tokens that can answer a question of this type, `UNKNOWN` last; for questions about tokens, all of them."""
    if kind in TOKEN_TYPES:
        return [*range(N_TALES), UNKNOWN]
    words: Sequence[str]
    if kind in YES_NO:
        words = ("yes", "no")
    elif kind.startswith("who"):
        words = (*tales.WOMEN, *tales.MEN)
    else:
        words = {
            "surname": tales.LAST_NAMES,
            "country": tuple(tales.CAPITALS),
            "capital": tuple(tales.CAPITALS.values()),
            "mood": ("good", "bad"),
            "number": ("one", "many"),
            "kind": tales.KINDS,
        }[kind]
    return [*(word_id(tokenizer, word) for word in words), UNKNOWN]


# --- what a text answers ------------------------------------------------------------------------------------------


def facts(story: Derivation, end: int, kind: str, rng: random.Random) -> Iterator[tuple[str, str, str | None]]:
    """What the first `end` characters of a story answer: (type, answer, about). `rng` chooses whom to ask about."""
    text = story.text[:end]
    named = [word for word in re.findall(r"[A-Z][a-z]+", text) if word in tales.NAMES]
    people = {"first": named[0], "latest": named[-1]} if named else {}
    giver, receiver = story.marked("s2"), story.marked("io")
    if kind in ASKED_OF["who giver"]:
        if giver and giver.end <= end:
            people["giver"] = story.read("s2")
        if receiver and receiver.start - len(" to ") <= end:  # from the last word before it on
            people["receiver"] = story.read("io")
    for role, name in people.items():
        yield f"who {role}", name, None
        yield f"woman {role}", "yes" if name in tales.WOMEN else "no", None
        yield f"man {role}", "no" if name in tales.WOMEN else "yes", None
    if named:
        yield "mentioned", "yes", rng.choice(named)
        yield "mentioned", "no", rng.choice([name for name in tales.NAMES if name not in named])
    yield "kind", kind, None
    last = story.marked("last")
    if kind == "full_name" and last and last.end <= end:
        yield "surname", story.read("last"), None
    if kind == "geography":
        countries = [word for word in re.findall(r"[A-Z][a-z]+", text) if word in tales.CAPITALS]
        if countries:
            yield "country", countries[-1], None
            yield "capital", tales.CAPITALS[countries[-1]], None
    if kind in ASKED_OF["mood"] and re.search("|".join(ADJECTIVES), text):
        yield "mood", kind.removesuffix("_review"), None
    if kind == "agreement":
        subjects = [mark for mark in story.marks if mark.label == "subject" and mark.end <= end]
        if subjects:
            plural = story.text[subjects[-1].start : subjects[-1].end] not in tales.SINGULAR_NOUNS
            yield "number", "many" if plural else "one", None


ADJECTIVES = [phrase for rule in ("praised", "blamed") for _, phrase in tales.RULES[rule]]


def cut_story(tokenizer: Any, story: Derivation, end: int, rng: random.Random) -> Cut:
    """The story cut after its token number `end` (the first word's is 1), with all questions about it."""
    encoding = tokenizer(story.text, return_offsets_mapping=True)
    row = (tokenizer.bos_token_id, *encoding["input_ids"])
    kind = tales.kind_of(story)
    until = encoding["offset_mapping"][end - 1][1]
    known = [
        Question(type, word_id(tokenizer, answer), None if about is None else word_id(tokenizer, about))
        for type, answer, about in facts(story, until, kind, rng)
    ]
    for type, offset in TOKEN_TYPES.items():
        if 1 <= end + offset < len(row):
            known.append(Question(type, row[end + offset]))
    names = word_id(tokenizer, rng.choice(list(tales.NAMES)))
    unknown = [
        Question(type, UNKNOWN, names if type == "mentioned" else None)
        for type, kinds in ASKED_OF.items()
        if kind not in kinds
    ]
    return Cut(story.text[:until], row, end, kind, tuple(known), tuple(unknown))


def cut_stories(
    tokenizer: Any,
    n_stories: int,
    seed: int,
    per_story: int = 1,
    kind: str | None = None,
    where: Callable[[Derivation], bool] | None = None,
) -> list[Cut]:
    """Stories from a seed, each cut after `per_story` random tokens, none of them among the first few.

    Only stories of one kind, or for which `where` is True, if asked for.
    """
    rng, found, n_taken = random.Random(seed), [], 0
    for story in tales.stream(seed, kind):
        if where is not None and not where(story):
            continue
        n_tokens = len(tokenizer(story.text)["input_ids"])
        for end in rng.sample(range(WIDTH + 1, n_tokens + 1), min(per_story, n_tokens - WIDTH)):
            found.append(cut_story(tokenizer, story, end, rng))
        n_taken += 1
        if n_taken == n_stories:
            return found
    raise AssertionError("the grammar never ends")


def asked_when_shuffled(rng: random.Random, tokenizer: Any, types: Sequence[str]) -> tuple[Question, ...]:
    """Every type of question, to be answered with `UNKNOWN`: for activations that belong to no text."""
    name = word_id(tokenizer, rng.choice(list(tales.NAMES)))
    return tuple(Question(type, UNKNOWN, name if type == "mentioned" else None) for type in types)


def token_rows(cuts: Sequence[Cut]) -> tuple[Tensor, Tensor]:
    """The tokens of whole stories, padded on the right with `<|endoftext|>`, and where they are cut."""
    longest = max(len(cut.tokens) for cut in cuts)
    rows = [[*cut.tokens, *[cut.tokens[0]] * (longest - len(cut.tokens))] for cut in cuts]
    return torch.tensor(rows), torch.tensor([cut.end for cut in cuts])
