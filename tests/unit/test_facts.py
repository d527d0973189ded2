"""What the grammar knows about tokens: a few stories read by hand, and every fact somewhere."""

from itertools import islice

import torch

from course_utils.data import tales
from course_utils.data.facts import FACTS, GROUPS, fact_labels, facts_of
from course_utils.data.grammar import Derivation
from course_utils.pretrained import shipped_tokenizer


def words(text: str) -> list[tuple[int, int]]:
    """A token for each word and mark, with the space in front."""
    import re

    return [match.span() for match in re.finditer(r" ?\w+| ?[^\w\s]", text)]


def true_of(story: Derivation, fact: str) -> list[str]:
    spans = words(story.text)
    return [
        story.text[start:end].strip()
        for (start, end), facts in zip(spans, facts_of(story, spans), strict=True)
        if fact in facts
    ]


def parsed(text: str) -> Derivation:
    story = tales.parse(text)
    assert story is not None
    return story


def test_a_gift() -> None:
    story = parsed("One day Mary and John went to the park. Then John gave a ball to Mary.")
    assert true_of(story, "the receiver") == ["Mary"]
    assert true_of(story, "before the receiver") == ["to"]
    assert true_of(story, "the giver, named again") == ["John"]
    assert true_of(story, "a first name") == ["Mary", "John", "John", "Mary"]
    assert true_of(story, "a name seen before") == ["John", "Mary"]
    assert true_of(story, "name John") == ["John", "John"]
    assert len(true_of(story, "in a story of kind gift")) == len(words(story.text))


def test_numbers() -> None:
    story = parsed("The dogs near the key are old. The book behind the cups has a red mark.")
    assert true_of(story, "a subject, many") == ["dogs"]
    assert true_of(story, "between, subject many") == ["key"]
    assert true_of(story, "a subject, one") == ["book"]
    assert true_of(story, "between, subject one") == ["cups"]


def test_a_review() -> None:
    story = parsed("The film was wonderful. I loved it again. You should go.")
    assert true_of(story, "after praise")[:2] == [".", "I"]
    assert not true_of(story, "after blame")


def test_every_fact_is_true_somewhere_and_none_everywhere() -> None:
    stories = list(islice(tales.stream(0), 600))
    labels = fact_labels(stories, shipped_tokenizer("tales"))
    assert labels.shape[1] == len(FACTS) == sum(map(len, GROUPS.values()))
    assert labels.any(dim=0).all() and not labels.all(dim=0).any()
    pronoun = labels[:, [FACTS.index("before a pronoun, woman"), FACTS.index("before a pronoun, man")]]
    assert labels.dtype == torch.bool and not pronoun.all(dim=1).any()
