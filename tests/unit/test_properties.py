"""The grammar agrees with what the properties' texts claim, and could have written each of them so far."""

import pytest

from course_utils.data import tales
from course_utils.data.properties import PROPERTIES, Property


def made(name: str, n: int = 60, seed: int = 1) -> Property:
    return PROPERTIES[name](n, seed)


@pytest.mark.parametrize("name", PROPERTIES)
def test_labels_are_balanced_and_the_same_seed_gives_the_same_texts(name: str) -> None:
    examples = made(name)
    assert len(examples) == len(examples.labels) == len(examples.types) == len(examples.templates) == 60
    assert 15 <= sum(examples.labels) <= 45
    assert examples == made(name) != made(name, seed=2)
    assert len(set(examples.types)) > 3 and len(set(examples.templates)) > 1


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gender", " {} went home."),
        ("subject", " {} old. The dog near the key is old."),
        ("sentiment", " {} it again. {}"),
        ("receiver", " {}."),
    ],
)
def test_the_grammar_goes_on_as_the_label_says(name: str, end: str) -> None:
    """With a word of the right kind it is a story of `tales`, with one of the other kind it is not."""
    examples = made(name)
    for text, label, kind in zip(examples.texts[:20], examples.labels, examples.types, strict=False):
        right, wrong = (examples.yes[0], examples.no[0]) if label else (examples.no[0], examples.yes[0])
        if name == "receiver":
            right, wrong = kind, next(n for n in tales.NAMES if n not in text)
        closing = ("Five stars." if label else "One star.") if name == "sentiment" else ""
        if name == "subject":
            right, wrong = ("are", "is") if label else ("is", "are")
        assert tales.parse(text + end.format(right, closing)), text + end.format(right, closing)
        assert not tales.parse(text + end.format(wrong, closing))


def test_the_number_of_the_noun_is_its_own_and_does_not_decide_the_verb() -> None:
    subjects, nouns = made("subject"), made("noun")
    assert subjects.texts == nouns.texts and subjects.labels != nouns.labels
    assert all((text[-1] == "s") == label for text, label in zip(nouns.texts, nouns.labels, strict=True))


def test_capitals_are_right_where_the_label_says_so() -> None:
    examples = made("capital")
    for text, label, country in zip(examples.texts, examples.labels, examples.types, strict=True):
        assert country in text and (tales.CAPITALS[country] in text) == label
        assert (tales.parse(text + ", its capital.") is not None) == label
