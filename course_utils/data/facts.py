"""What the grammar knows about every token of a story: the truth that the latents of a dictionary are held against.

`facts_of` says what is true of each token, given where the tokens stand in the text, and `fact_labels` does so for many
stories, as a tensor. `GROUPS` sorts the facts.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from course_utils.data import tales
from course_utils.data.grammar import Derivation, Mark

Span = tuple[int, int]  # where a token begins in the text, with the space in front of it, and where it ends

GROUPS: dict[str, tuple[str, ...]] = {
    "single names": tuple(f"name {name}" for name in tales.NAMES),
    "names": ("a first name", "a last name", "a name seen before"),
    "roles": ("the giver, named again", "the receiver", "before the receiver"),
    "number": ("a subject, one", "a subject, many", "between, subject one", "between, subject many"),
    "gender": ("before a pronoun, woman", "before a pronoun, man"),
    "sentiment": ("after praise", "after blame"),
    "kind of story": tuple(f"in a story of kind {kind}" for kind in tales.KINDS),
}
FACTS: tuple[str, ...] = tuple(fact for group in GROUPS.values() for fact in group)


def facts_of(story: Derivation, spans: Sequence[Span]) -> list[set[str]]:
    """The facts that are true of each token. A word of several tokens stands at its last one."""
    found: list[set[str]] = [set() for _ in spans]
    ends = {end: place for place, (_, end) in enumerate(spans)}

    def at(end: int, fact: str, back: int = 0) -> None:
        place = ends.get(end, back - 1) - back
        if place >= 0:
            found[place].add(fact)

    for label, fact in (("s2", "the giver, named again"), ("io", "the receiver")):
        for mark in _marks(story, label):
            at(mark.end, fact)
    for mark in _marks(story, "io"):
        at(mark.end, "before the receiver", back=1)
    for mark in _marks(story, "pronoun"):
        if story.text[mark.start].islower():  # "because she"; elsewhere no pronoun has to follow
            woman = story.text[mark.start : mark.end] == "she"
            at(mark.end, f"before a pronoun, {'woman' if woman else 'man'}", back=1)
    for subject, between in zip(_marks(story, "subject"), _marks(story, "distractor"), strict=True):
        number = "one" if story.text[subject.start : subject.end] in tales.SINGULAR_NOUNS else "many"
        at(subject.end, f"a subject, {number}")
        at(between.end, f"between, subject {number}")
    seen: set[str] = set()
    for word in re.finditer(r"\w+", story.text):
        if word[0] in tales.NAMES:
            at(word.end(), f"name {word[0]}")
            at(word.end(), "a first name")
            if word[0] in seen:
                at(word.end(), "a name seen before")
            seen.add(word[0])
        elif word[0] in tales.LAST_NAMES:
            at(word.end(), "a last name")
    kind = tales.kind_of(story)
    for place, (start, _) in enumerate(spans):
        found[place].add(f"in a story of kind {kind}")
        if kind in ("good_review", "bad_review") and start >= story.text.index("."):
            found[place].add("after praise" if kind == "good_review" else "after blame")
    return found


def _marks(story: Derivation, label: str) -> list[Mark]:
    return [mark for mark in story.marks if mark.label == label]


def fact_labels(stories: Sequence[Derivation], tokenizer: Any) -> Bool[Tensor, "token fact"]:
    """Which of `FACTS` is true of each token of the stories, one story after the other, without begin tokens."""
    spans = tokenizer([story.text for story in stories], return_offsets_mapping=True)["offset_mapping"]
    true = [facts for story, own in zip(stories, spans, strict=True) for facts in facts_of(story, own)]
    columns = {fact: column for column, fact in enumerate(FACTS)}
    labels = torch.zeros(len(true), len(FACTS), dtype=torch.bool)
    for row, facts in enumerate(true):
        labels[row, [columns[fact] for fact in facts]] = True
    return labels
