"""The grammar engine, on grammars small enough to enumerate by hand."""

import math
import random

import pytest

from course_utils.data.grammar import Grammar

POOLS = {"pet": {"cat": {"young": "kitten"}, "dog": {"young": "puppy"}, "hen": {"young": "chick"}}}
RULES = {
    "start": [(3, "A {X:pet}<more>."), (1, "Nobody.")],
    "more": [(1, ""), (1, " and a {Y:pet@second}, the {X.young}")],
}


@pytest.fixture
def grammar() -> Grammar:
    return Grammar(RULES, POOLS, start="start", distinct=["pet"])


def every_text() -> dict[str, float]:
    """The language of RULES with its probabilities, spelled out."""
    texts = {"Nobody.": 1 / 4}
    for first in POOLS["pet"]:
        texts[f"A {first}."] = 3 / 4 * 1 / 3 * 1 / 2
        for second in set(POOLS["pet"]) - {first}:
            texts[f"A {first} and a {second}, the {POOLS['pet'][first]['young']}."] = 3 / 4 * 1 / 3 * 1 / 2 * 1 / 2
    return texts


def test_reads_exactly_its_language(grammar: Grammar) -> None:
    for text, probability in every_text().items():
        assert grammar.log_probability(text) == pytest.approx(math.log(probability))
        assert len(list(grammar.parses(text))) == 1
    for wrong in ("", "A cat", "A cat and a cat, the kitten.", "A cat and a dog, the puppy.", "A cow.", "Nobody. "):
        assert grammar.parse(wrong) is None
        assert grammar.log_probability(wrong) == -math.inf


def test_entropy_is_that_of_the_enumerated_language(grammar: Grammar) -> None:
    probabilities = every_text().values()
    assert sum(probabilities) == pytest.approx(1)
    assert grammar.entropy() == pytest.approx(-sum(p * math.log(p) for p in probabilities))


def test_sampling_follows_the_probabilities(grammar: Grammar) -> None:
    rng, counts = random.Random(0), dict.fromkeys(every_text(), 0)
    for _ in range(20_000):
        counts[grammar.sample(rng).text] += 1
    for text, probability in every_text().items():
        assert counts[text] / 20_000 == pytest.approx(probability, abs=0.015)


def test_truth_beside_the_text(grammar: Grammar) -> None:
    story = grammar.parse("A hen and a dog, the chick.")
    assert (story.word("X"), story.word("Y"), story.choice("more")) == ("hen", "dog", 1)
    assert story.read("second") == "dog"
    with pytest.raises(KeyError, match="no variable 'Z'"):
        story.word("Z")
    with pytest.raises(KeyError, match="no place marked 'first'"):
        story.read("first")


def test_an_ambiguous_grammar_adds_up_its_derivations() -> None:
    twice = Grammar({"s": [(1, "a<b>"), (1, "ab")], "b": [(1, "b"), (1, "c")]}, {}, start="s")
    assert len(list(twice.parses("ab"))) == 2
    assert twice.log_probability("ab") == pytest.approx(math.log(1 / 4 + 1 / 2))


@pytest.mark.parametrize("template, words", [("<nothing>", "<nothing>"), ("{X:plant}", "'plant'")])
def test_a_broken_rule_is_named(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"'start'.*{words}"):
        Grammar({"start": [(1, template)]}, POOLS, start="start")


def test_a_pool_that_is_not_distinct_may_give_an_entry_twice() -> None:
    twice = Grammar(RULES, POOLS, start="start")
    assert twice.parse("A cat and a cat, the kitten.") is not None
    assert twice.log_probability("A cat and a cat, the kitten.") == pytest.approx(math.log(3 / 4 / 3 / 2 / 3))
    of_a_pair = 3 / 4 * (math.log(3) + math.log(2) + 1 / 2 * math.log(3))
    assert twice.entropy() == pytest.approx(-3 / 4 * math.log(3 / 4) - 1 / 4 * math.log(1 / 4) + of_a_pair)
