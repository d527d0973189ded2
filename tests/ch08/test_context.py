"""What the checks of learning in context cannot know: see tests/test_checks.py."""

import random
from collections import Counter
from typing import Any

import pytest
import torch

import solutions.ch08_function_vectors as ref
from course_utils.checks.ch08.context import OTHER, TASK, Prompts, Words, hits, resampling, wrong
from course_utils.data import pairs
from tests.ch08 import other_function_vectors as other

SECRETS = ("sample(", "argmax(", "quantile(", "randint(")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the second is the last
    "0 -> -1",  # any row tells how long all must be
    "True -> False",  # zip(strict=True) of equal lengths
    "zip(examples, queries, strict=True) -> zip(examples, queries)",
    "zip(order, order[1:] + order[:1], strict=True) -> zip(order, order[1:] + order[:1])",
    "zip(rows, self.texts, strict=True) -> zip(rows, self.texts)",
    # on a GPU
    "torch.randint(len(values), (n_resamples, len(values)), generator=generator, device=generator.device) -> "
    "torch.randint(len(values), (n_resamples, len(values)), generator=generator)",
}


def one_rotation(self: Any, seed: int) -> Any:
    """Every answer moves on by one place, whatever the seed."""
    if self.made[1] < 2:
        raise ValueError("too few")

    def change(examples: Any, query: str) -> Any:
        return [(word, examples[place - 1][1]) for place, (word, _) in enumerate(examples)]

    return self.again(change)


def forgets_the_answers(self: Any, prompts: Any) -> None:
    Prompts.set(self, prompts)
    self.answers = self.answers.float()


def first_round_in_order(self: Any, rng: Any, words: list[str], n: int) -> list[str]:
    return [*words, *Prompts.ask(self, rng, words, n)][:n]


def examples_of_one_seed(self: Any, rng: Any, task: Any, query: str, n_shots: int) -> Any:
    return Prompts.choose(self, vars(self).setdefault("own", random.Random(0)), task, query, n_shots)


def with_the_world_s_numbers(self: Any, *given: Any, **more: Any) -> None:
    random.seed(0)
    Prompts.__init__(self, *given, **more)


def answers_of_the_task(self: Any, seed: int) -> Any:
    """Right only while the examples are still the task's own."""
    task, new = self.made[0], Prompts.shuffled(self, seed)
    back = {answer: word for examples in self.examples for word, answer in examples}
    return new.again(lambda examples, query: [(w, task.get(back[a], a)) for w, a in examples])


def the_same_for_all(self: Any, other: Any, seed: int) -> Any:
    words = random.Random(seed).sample(sorted(other), min(len(other), self.made[1] + 1))
    return self.again(lambda examples, query: [(w, other[w]) for w in words if w != query][: self.made[1]])


def in_order(self: Any, other: Any, seed: int) -> Any:
    new = Prompts.with_examples_of(self, other, seed)
    return new.again(lambda examples, query: sorted(examples))


def leaves_out_what_does_not_fit(self: Any, other: Any, seed: int) -> Any:
    lengths = {word: len(self.made[3].encode(f"{word} -> {answer}")) for word, answer in other.items()}
    usual = Counter(lengths.values()).most_common(1)[0][0]
    fitting = {word: answer for word, answer in other.items() if lengths[word] == usual}
    return Prompts.with_examples_of(self, fitting, seed)


def among(model: Any, data: Any) -> torch.Tensor:
    """The best of those answers that occur at all."""
    with torch.no_grad():
        logits, kinds = model(data.tokens)[:, -1], data.answers.unique()
    return kinds[logits[:, kinds].argmax(-1)] == data.answers


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "icl_text": [
        ("wrong answer", lambda examples, query: ref.icl_text(examples, query).replace(" ->", ":")),
        ("wrong answer", lambda examples, query: ref.icl_text(list(reversed(examples)), query)),
        ("expected a str", lambda examples, query: ref.icl_text(examples, query).split()),
        ("wrong answer", lambda examples, query: ref.icl_text(list(dict(examples).items()), query)),
        ("wrong answer", lambda examples, query: ref.icl_text(examples[:3], query)),
        ("wrong answer", lambda examples, query: ref.icl_text([pair for pair in examples if pair[0] != query], query)),
        ("wrong answer", lambda examples, query: ref.icl_text([(w, a.split()[0]) for w, a in examples], query)),
    ],
    "ICLDataset": [
        ("always change places in the same way", wrong(shuffled=one_rotation)),
        ("expected dtype int64", wrong(set=forgets_the_answers)),
        ("the old data set was changed", wrong(with_examples_of=lambda self, other, seed: self.set(
            Prompts.with_examples_of(self, other, seed).prompts) or self)),
        ("it has no attribute", type("ICLDataset", (), {"__init__": lambda self, *args: None})),
        ("asked for the words in the same order", wrong(ask=first_round_in_order)),
        ("two seeds gave the same examples", wrong(choose=examples_of_one_seed)),
        ("is always asked for after one of", wrong(choose=lambda self, rng, task, query, n_shots: Prompts.choose(
            self, random.Random(query), task, query, n_shots))),
        ("answers of", wrong(answer=lambda self, tokenizer, query, right: tokenizer.encode(f" {right}")[-1])),
        ("it calls `random.seed`", wrong(__init__=with_the_world_s_numbers)),
        ("other answers than before", wrong(shuffled=answers_of_the_task)),
        ("different lists of words", wrong(with_examples_of=the_same_for_all)),
        ("is shown first", wrong(with_examples_of=in_order)),
        ("should raise ValueError", wrong(with_examples_of=leaves_out_what_does_not_fit)),
    ],
    "is_right": [
        ("expected dtype bool", lambda model, data: hits()(model, data).float()),
        ("values are wrong", lambda model, data: ~hits()(model, data)),
        ("gradients are recorded", lambda model, data: model(data.tokens)[:, -1].argmax(-1) == data.answers),
        ("values are wrong", hits(choose=lambda logits: logits.topk(2).indices[1])),
        ("wrong", among),
    ],
    "bootstrap_interval": [
        ("expected two floats", lambda *args: torch.tensor(ref.bootstrap_interval(*args))),
        (
            "does not follow the generator",
            lambda values, n, generator, level=0.95: ref.bootstrap_interval(
                values, n, torch.Generator().manual_seed(0), level
            ),
        ),
        ("end is wrong", lambda values, n, generator, level=0.95: tuple(
            end + 0.5 for end in ref.bootstrap_interval(values, n, generator, level))),
        ("wrong answer", resampling(size=lambda n: max(1, n - 1))),
        ("with a single resample", lambda values, n, generator, level=0.95: ref.bootstrap_interval(
            values, 1000, generator, level)),
        ("it drew the same numbers", lambda values, n, generator, level=0.95: ref.bootstrap_interval(
            values, n, torch.Generator().manual_seed(generator.initial_seed()), level)),
    ],
}  # fmt: skip

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_error_of_unequal_lengths_shows_two_texts() -> None:
    with pytest.raises(ValueError, match="log jam"):
        ref.ICLDataset(TASK | {"log jam": "JAM"}, 1, 60, Words())


def test_corruptions_keep_the_length_in_tokens() -> None:
    data = ref.ICLDataset(TASK, 3, 20, Words())
    assert data.shuffled(1).tokens.shape == data.with_examples_of(OTHER, 1).tokens.shape == data.tokens.shape


def test_pairs_of_a_kind_are_where_they_may_be() -> None:
    """No list without a title holds a held-out pair beside others, and only sentences hold a told one."""
    for number, text in zip(range(3000), pairs.stream(7), strict=False):
        for task, answers in pairs.TASKS.items():
            for kind in ("held_out", "told"):
                for word in pairs.words(task, (kind,)):
                    if any(f" {word} -> {answers[word]}{end}" in text for end in ",."):
                        assert kind == "held_out", (number, text)
                        assert not text.startswith(" ") or text.count("->") == 1 or is_ambiguous(text, task), text


def is_ambiguous(text: str, task: str) -> bool:
    """Whether the list is one of another task that shares this pair."""
    shown = [tuple(pair.split(" -> ")) for pair in text.strip(" .").split(", ")]
    return any(
        all(other.get(word) == answer for word, answer in shown) for name, other in pairs.TASKS.items() if name != task
    )


def test_every_word_stands_in_several_tasks() -> None:
    for word in pairs.TASKS["capitals"]:
        assert sum(word in answers for answers in pairs.TASKS.values()) >= 4
