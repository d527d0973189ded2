"""Checks of chapter 08, learning in context: the text of a prompt, data sets of prompts, and how right a model is."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from course_utils.checks.ch08.small import Fn, dataset, small_model, without_graph
from course_utils.checks.comparing import compare
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import agree, call_of, must_raise, untouched

Pairs = Sequence[tuple[str, str]]

# ------------------------------------------------------------------------------------------------ the text of a prompt


def text_of(
    examples: Pairs, query: str, start: str = " ", arrow: str = " -> ", between: str = ", ", end: str = " ->"
) -> str:
    """Piece by piece; with other pieces, what people write instead."""
    text = start
    for word, answer in examples:
        text += word + arrow + answer + between
    return text + query + end


@known_mistakes(
    {
        "the text does not begin with a space.": partial(text_of, start=""),
        "the text ends with a space; the answer brings its own.": partial(text_of, end=" -> "),
        "the arrow after the query is missing.": partial(text_of, end=""),
        "the pairs stand behind each other without a comma.": partial(text_of, between=" "),
        "each answer is written before its word.": lambda examples, query: text_of(
            [(answer, word) for word, answer in examples], query
        ),
        "the last example is left out.": lambda examples, query: text_of(examples[:-1], query),
        "the arrow has no spaces around it.": partial(text_of, arrow="->"),
    }
)
def check_icl_text(fn: Fn) -> None:
    """No examples, one, three; lists and tuples; more of them, with a word twice, and of several words."""
    name = "icl_text"
    cases: list[tuple[Pairs, str]] = [
        ([("hot", "cold"), ("wet", "dry"), ("old", "new")], "big"),
        ([], "big"),
        ((("big", "BIG"),), "hot"),
        ([("hot", "cold"), ("ice cream", "warm soup"), ("hot", "icy"), ("big", "small"), ("wet", "dry")], "big"),
    ]
    for examples, query in cases:
        with untouched(name, examples=examples):
            actual = fn(examples, query)
        agree(name, call_of(name, examples, query), actual, text_of(examples, query))


# ------------------------------------------------------------------------------------------------ data sets of prompts

TASK = {"ash": "ASH", "bay": "BAY", "cow": "COW", "den": "DEN", "elm": "ELM", "fig": "FIG", "gum": "GUM"}
ASKED = {
    "hen": "HEN-run",
    "ivy": "IVY-leaf",
    "ash": "GREY-dust",
}  # answers of two tokens; one that the task has otherwise
OTHER = {"ash": "ashes", "bay": "bays", "cow": "cows", "hen": "hens", "jay": "jays", "kid": "kids"}


class Words:
    """A tokenizer for which every word is a token, the comma too, and so is each part of a word with a hyphen.

    A word without a space before it is another token.
    """

    bos_token_id = 3

    def __init__(self) -> None:
        self.pieces = ["", "", "", "<bos>"]

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        spaced = text.replace(",", " ,").split(" ")
        words = [("" if place == 0 else "_") + word for place, word in enumerate(spaced) if word or place]
        pieces = [piece for word in words for piece in re.split(r"(?<=\w)(?=-\w)", word)]
        for piece in pieces:
            if piece not in self.pieces:
                self.pieces.append(piece)
        return [self.pieces.index(piece) for piece in pieces]

    def __call__(self, texts: Any, **kwargs: Any) -> dict[str, Any]:
        one = isinstance(texts, str)
        return {"input_ids": self.encode(texts) if one else [self.encode(text) for text in texts]}


class Prompts:
    """The statement, prompt by prompt, with steps of its own to choose words; subclasses get one thing wrong."""

    def __init__(
        self,
        task: Mapping[str, str],
        n_shots: int,
        n: int,
        tokenizer: Any,
        seed: int = 0,
        asked: Mapping[str, str] | None = None,
    ) -> None:
        self.made = (task, n_shots, n, tokenizer, asked)
        rng = Random(seed)
        prompts = []
        for query in self.ask(rng, sorted(self.pool(task, asked)), n):
            right = (asked or task)[query] if query in (asked or task) else task[query]
            prompts.append((self.choose(rng, task, query, n_shots), query, right))
        self.set(prompts)

    def ask(self, rng: Random, words: list[str], n: int) -> list[str]:
        """One after the other, until all had their turn."""
        left: list[str] = []
        asked = []
        for _ in range(n):
            left = left or list(words)
            asked.append(left.pop(rng.randrange(len(left))))
        return asked

    def pool(self, task: Mapping[str, str], asked: Mapping[str, str] | None) -> Mapping[str, str]:
        return task if asked is None else asked

    def choose(self, rng: Random, task: Mapping[str, str], query: str, n_shots: int) -> list[tuple[str, str]]:
        words = sorted(word for word in task if word != query)
        rng.shuffle(words)
        return [(word, task[word]) for word in words[:n_shots]]

    def set(self, prompts: list[tuple[list[tuple[str, str]], str, str]]) -> None:
        tokenizer = self.made[3]
        self.prompts = prompts
        self.examples = [examples for examples, _, _ in prompts]
        self.queries = [query for _, query, _ in prompts]
        self.texts = [text_of(examples, query) for examples, query, _ in prompts]
        rows = [self.row(tokenizer, text) for text in self.texts]
        for row, text in zip(rows, self.texts, strict=True):
            if len(row) != len(rows[0]):
                raise ValueError(f"{self.texts[0]!r}, {text!r}")
        self.tokens = torch.tensor(rows)
        self.answers = torch.tensor([self.answer(tokenizer, query, right) for _, query, right in prompts])

    def row(self, tokenizer: Any, text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer.encode(text)]

    def answer(self, tokenizer: Any, query: str, right: str) -> int:
        return int(tokenizer.encode(" " + right)[0])

    def again(self, change: Callable[[list[tuple[str, str]], str], list[tuple[str, str]]]) -> "Prompts":
        new = object.__new__(type(self))
        new.made = self.made
        new.set([(change(examples, query), query, right) for examples, query, right in self.prompts])
        return new

    def shuffled(self, seed: int) -> "Prompts":
        rng = Random(seed)
        if self.made[1] < 2:
            raise ValueError("too few")

        def change(examples: list[tuple[str, str]], query: str) -> list[tuple[str, str]]:
            while True:
                answers = rng.sample([answer for _, answer in examples], len(examples))
                if all(new != old for new, (_, old) in zip(answers, examples, strict=True)):
                    return [(word, answer) for (word, _), answer in zip(examples, answers, strict=True)]

        return self.again(change)

    def with_examples_of(self, other: Mapping[str, str], seed: int) -> "Prompts":
        rng = Random(seed)
        return self.again(lambda examples, query: self.choose(rng, other, query, self.made[1]))


def wrong(**methods: Any) -> type:
    return type("ICLDataset", (Prompts,), methods)


def shows_the_query(self: Any, rng: Random, task: Mapping[str, str], query: str, n_shots: int) -> Any:
    return [(word, task[word]) for word in rng.sample(sorted(task), n_shots)]


def with_replacement(self: Any, rng: Random, task: Mapping[str, str], query: str, n_shots: int) -> Any:
    words = sorted(word for word in task if word != query)
    return [(word, task[word]) for word in rng.choices(words, k=n_shots)]


def first_words(self: Any, rng: Random, task: Mapping[str, str], query: str, n_shots: int) -> Any:
    return [(word, task[word]) for word in [word for word in task if word != query][:n_shots]]


def freely_shuffled(self: Any, seed: int) -> Any:
    rng = Random(seed)

    def change(examples: list[tuple[str, str]], query: str) -> list[tuple[str, str]]:
        answers = rng.sample([answer for _, answer in examples], len(examples))
        return [(word, answer) for (word, _), answer in zip(examples, answers, strict=True)]

    if self.made[1] < 2:
        raise ValueError("too few")
    return self.again(change)


def pairs_shuffled(self: Any, seed: int) -> Any:
    rng = Random(seed)
    if self.made[1] < 2:
        raise ValueError("too few")
    return self.again(lambda examples, query: rng.sample(examples, len(examples)))


def asks_another_task(self: Any, other: Mapping[str, str], seed: int) -> Any:
    new = Prompts.with_examples_of(self, other, seed)
    new.answers = torch.tensor([self.made[3].encode(" " + other.get(query, query))[0] for query in new.queries])
    return new


@known_mistakes(
    {
        "a prompt can show the word that it asks for.": wrong(choose=shows_the_query),
        "a prompt can show a word twice; draw without replacement.": wrong(choose=with_replacement),
        "every prompt shows the first words of the task; draw them.": wrong(choose=first_words),
        "a word can come again before every other had its turn.": wrong(
            ask=lambda self, rng, words, n: rng.choices(words, k=n)
        ),
        "the words are asked for in the order of the task; draw the order.": wrong(
            ask=lambda self, rng, words, n: [words[place % len(words)] for place in range(n)]
        ),
        "`asked` is ignored: the words come from the task itself.": wrong(pool=lambda self, task, asked: task),
        "the rows do not begin with the begin token.": wrong(row=lambda self, tokenizer, text: tokenizer.encode(text)),
        "the answers have no space before them, and so other tokens.": wrong(
            answer=lambda self, tokenizer, query, right: tokenizer.encode(right)[0]
        ),
        "the answer is the word that is asked for.": wrong(
            answer=lambda self, tokenizer, query, right: tokenizer.encode(" " + query)[0]
        ),
        "shuffled: an answer can keep its place.": wrong(shuffled=freely_shuffled),
        "shuffled: whole pairs change places, and each word keeps its answer.": wrong(shuffled=pairs_shuffled),
        "with_examples_of: the right answers become those of the other task.": wrong(
            with_examples_of=asks_another_task
        ),
    }
)
def check_ICLDataset(cls: Any) -> None:  # noqa: N802 (the exercise's name)
    """What holds for every prompt; that every word has its chance; seeds; the two corruptions; errors."""
    name = "ICLDataset"
    for task, n_shots, n, asked in ((TASK, 3, 90, ASKED), (TASK, 0, 20, None), (OTHER, 2, 60, None)):
        tokenizer = Words()
        data = cls(task, n_shots, n, tokenizer, 4, asked)
        call = f"{name}(task, n_shots={n_shots}, n={n}, ..., asked={'others' if asked else None})"
        _fits(name, call, data, tokenizer, task, asked or task, n_shots, n)
        _even(name, call, data, task, asked or task, n_shots)
        again, other = (cls(task, n_shots, n, tokenizer, seed, asked) for seed in (4, 5))
        if list(again.texts) != list(data.texts):
            raise CheckFailed(f"{name}: one seed gave two data sets.\n  Next: draw from `random.Random(seed)` only.")
        if list(other.texts) == list(data.texts):
            raise CheckFailed(f"{name}: two seeds gave the same prompts.\n  Next: use `seed`.")
    _follows_the_seed(name, cls)
    _others(name, cls)
    _shuffles(name, cls)
    for seed in range(6):  # the longer text comes first or second
        _refuses_uneven(name, cls, seed)
    tokenizer = Words()
    one, two = (cls(TASK, n_shots, 1, tokenizer, 0, ASKED) for n_shots in (1, 2))
    must_raise(name, ValueError, "shuffled(0) with one example", partial(one.shuffled, 0))
    _kept(name, "with_examples_of(other, 0) of one prompt", one, one.with_examples_of(OTHER, 0), None, tokenizer)
    _kept(name, "shuffled(0) with two examples", two, two.shuffled(0), None, tokenizer)


def _follows_the_seed(name: str, cls: Any) -> None:
    """The order of the questions and the examples both, and nothing but the seed."""
    first, second = (cls(TASK, 0, len(TASK), Words(), seed) for seed in (4, 5))
    if list(first.queries) == list(second.queries):
        raise CheckFailed(
            f"{name}: two seeds asked for the words in the same order, {list(first.queries)}.\n"
            "  Next: draw the order of every round, the first one too, from `random.Random(seed)`."
        )
    asked = {word: ASKED[word] for word in ("hen", "ivy")}  # words of no example
    first, second = (cls(TASK, 3, 4, Words(), seed, asked) for seed in (4, 5))
    if [list(shown) for shown in first.examples] == [list(shown) for shown in second.examples]:
        raise CheckFailed(
            f"{name}: two seeds gave the same examples.\n  Next: draw them from the same `random.Random(seed)`."
        )
    with patch.object(random, "seed") as seed_of_all:
        cls(TASK, 0, 3, Words(), 4)
    if seed_of_all.called:
        raise CheckFailed(
            f"{name}: it calls `random.seed`, which changes the random numbers of everything else.\n"
            "  Next: draw from a `random.Random(seed)` of your own."
        )


def _refuses_uneven(name: str, cls: Any, seed: int) -> None:
    """Three questions of one word, one of them a token longer; then examples of different lengths."""
    call = f"{name}(...) with texts of seven and of eight tokens"
    words = {"log": "LOG", "dam": "DAM", "log-jam": "JAM"}
    make = partial(cls, TASK, 1, 3, Words(), seed, words)
    must_raise(name, ValueError, call, make, "compare the lengths of all rows.")
    try:
        make()
    except ValueError as error:
        quoted = [f"{word} ->" in str(error) for word in words]
        two = sum(quoted) >= 2 and quoted[-1]
        _demand(name, two, "message", f"the ValueError does not show two texts: {str(error)!r}", call)
    data = cls(TASK, 1, 30, Words(), seed, ASKED)
    call = "with_examples_of(other, 0) with examples of different lengths"
    must_raise(name, ValueError, call, partial(data.with_examples_of, words, 0), "compare the lengths there, too.")


def _fits(
    name: str,
    call: str,
    data: Any,
    tokenizer: Any,
    task: Mapping[str, str],
    asked: Mapping[str, str],
    n_shots: int,
    n: int,
) -> None:
    """All that the statement says of each prompt."""
    for attribute in ("examples", "queries", "texts", "tokens", "answers"):
        if not hasattr(data, attribute):
            raise CheckFailed(f"{name}: it has no attribute `{attribute}`.\n  Next: set all five in __init__.")
    for attribute in ("examples", "queries", "texts"):
        agree(name, f"len(data.{attribute}) of {call}", len(getattr(data, attribute)), n)
    for number, (examples, query, text) in enumerate(zip(data.examples, data.queries, data.texts, strict=True)):
        shown = [word for word, _ in examples]
        _demand(
            name, query in asked, "asked", f"prompt {number} asks for {query!r}, which is not among the asked", call
        )
        _demand(name, len(examples) == n_shots, "count", f"prompt {number} shows {len(examples)} pairs", call)
        _demand(name, query not in shown, "query", f"prompt {number} shows {query!r}, the word that it asks for", call)
        _demand(name, len(set(shown)) == n_shots, "twice", f"prompt {number} shows a word twice: {shown}", call)
        for pair in examples:
            _demand(
                name, task.get(pair[0]) == pair[1], "pair", f"prompt {number} shows {pair}, no pair of its task", call
            )
        agree(name, f"data.texts[{number}] of {call}", text, text_of(examples, query))
    _tokens(name, call, data, tokenizer, [asked[query] for query in data.queries])


def _tokens(name: str, call: str, data: Any, tokenizer: Any, right: list[str]) -> None:
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in data.texts]
    compare(f"{name}: tokens of {call}", data.tokens, torch.tensor(rows), "batch pos")
    answers = torch.tensor([tokenizer.encode(f" {answer}")[0] for answer in right])
    compare(f"{name}: answers of {call}", data.answers, answers, "batch")


def _demand(name: str, holds: bool, what: str, words: str, call: str) -> None:
    if not holds:
        raise CheckFailed(
            f"{name}: {words}.\n  {call}",
            evidence=Evidence(what, call),
            advice="  Next: print a few prompts, and compare them with the statement.",
        )


def _even(name: str, call: str, data: Any, task: Mapping[str, str], asked: Mapping[str, str], n_shots: int) -> None:
    """Each word is asked for and shown about as often as the others; far from it only where something is left out."""
    n = len(data.queries)
    rounds = [tuple(data.queries[start : start + len(asked)]) for start in range(0, n, len(asked))]
    for number, words in enumerate(rounds):
        twice = len(set(words)) < len(words)
        _demand(name, not twice, "turn", f"in round {number} {list(words)} are asked for, one of them twice", call)
    _demand(name, len(set(rounds)) > 1, "order", f"the words are always asked for in the order {rounds[0]}", call)
    shown: dict[str, set[Any]] = {query: set() for query in asked}
    for query, examples in zip(data.queries, data.examples, strict=True):
        shown[query].add(tuple(word for word, _ in examples))
    for query, lists in shown.items():
        enough = not n_shots or len(lists) > n / len(asked) / 3
        _demand(
            name, enough, f"lists {min(lists)}", f"{query!r} is always asked for after one of {len(lists)} lists", call
        )
    for what, counted, pool, expected in (
        ("shown", Counter(word for examples in data.examples for word, _ in examples), task, n * n_shots / len(task)),
        ("shown first", Counter(examples[0][0] for examples in data.examples if examples), task, n / len(task)),
    ):
        if expected < 8 or not n_shots:
            continue
        for word in pool:
            count = counted[word]
            _demand(
                name,
                expected / 4 < count < 3 * expected,
                what,
                f"in {n} prompts {word!r} is {what} {count} times, expected about {expected:.0f}",
                call,
            )


def _shuffles(name: str, cls: Any) -> None:
    tokenizer = Words()
    own = cls(TASK, 3, 60, tokenizer, 1, ASKED)
    for data, call in (
        (own, "data.shuffled(7)"),
        (own.with_examples_of(OTHER, 2), "data.with_examples_of(other, 2).shuffled(7)"),
    ):
        _shuffles_answers(name, call, data, tokenizer)
    _seeds(name, "data.shuffled", own.shuffled)


def _shuffles_answers(name: str, call: str, data: Any, tokenizer: Any) -> None:
    before = [list(examples) for examples in data.examples], list(data.texts), data.tokens.clone()
    new = data.shuffled(7)
    _kept(name, call, data, new, before, tokenizer)
    places: Counter[Any] = Counter()
    for number, (examples, old) in enumerate(zip(new.examples, before[0], strict=True)):
        agree(
            name, f"the words of prompt {number} of {call}", [word for word, _ in examples], [word for word, _ in old]
        )
        answers = [answer for _, answer in examples]
        same = sorted(answers) == sorted(answer for _, answer in old)
        _demand(name, same, "answers", f"prompt {number} has other answers than before", call)
        for place, (answer, (word, previous)) in enumerate(zip(answers, old, strict=True)):
            _demand(name, answer != previous, "kept", f"in prompt {number} {word!r} kept its answer", call)
            places[place, [answer for _, answer in old].index(answer)] += 1
    for here, there in places:
        _demand(name, places[here, there] > 8, "one way", f"answer {there} goes to place {here} hardly ever", call)
    _demand(name, len(places) == 6, "one way", "the answers always change places in the same way", call)


def _others(name: str, cls: Any) -> None:
    tokenizer = Words()
    data = cls(TASK, 3, 60, tokenizer, 1, ASKED)
    before = [list(examples) for examples in data.examples], list(data.texts), data.tokens.clone()
    new = data.with_examples_of(OTHER, 7)
    call = "data.with_examples_of(other, 7)"
    _kept(name, call, data, new, before, tokenizer)
    for number, (examples, query) in enumerate(zip(new.examples, new.queries, strict=True)):
        shown = [word for word, _ in examples]
        _demand(name, len(set(shown)) == 3, "twice", f"prompt {number} shows {shown}, not three words", call)
        _demand(name, query not in shown, "query", f"prompt {number} shows {query!r}, the word that it asks for", call)
        for pair in examples:
            _demand(
                name, OTHER.get(pair[0]) == pair[1], "pair", f"prompt {number} shows {pair}, no pair of other", call
            )
    lists = [[word for word, _ in examples] for examples in new.examples]
    distinct = len(set(map(tuple, lists)))
    _demand(name, distinct > 12, "lists", f"60 prompts show {distinct} different lists of words", call)
    for what, counted in (
        ("shown", Counter(itertools.chain(*lists))),
        ("shown first", Counter(words[0] for words in lists)),
    ):
        for word in OTHER:
            enough = counted[word] > 60 * (3 if what == "shown" else 1) / len(OTHER) / 4
            _demand(name, enough, what, f"in 60 prompts {word!r} is {what} {counted[word]} times", call)
    for n_shots in (0, 1):
        few = cls(TASK, n_shots, 5, tokenizer, 1, ASKED).with_examples_of(OTHER, 7)
        agree(
            name,
            f"how many pairs {call} shows, of a data set with {n_shots}",
            [len(e) for e in few.examples],
            5 * [n_shots],
        )
    _seeds(name, "data.with_examples_of", partial(data.with_examples_of, OTHER))


def _kept(name: str, call: str, data: Any, new: Any, before: Any, tokenizer: Any) -> None:
    """A new data set about the same questions; the old one is what it was."""
    if not isinstance(new, type(data)):
        got = "None" if new is None else f"a {type(new).__name__}"
        raise CheckFailed(f"{name}: {call} returned {got}.\n  Next: return the new data set.")
    if before is not None:
        same = [list(examples) for examples in data.examples] == before[0] and list(data.texts) == before[1]
        _demand(name, same and torch.equal(data.tokens, before[2]), "old", "the old data set was changed", call)
    agree(name, f"the queries of {call}", list(new.queries), list(data.queries))
    for number, (examples, query, text) in enumerate(zip(new.examples, new.queries, new.texts, strict=True)):
        agree(name, f"texts[{number}] of {call}", text, text_of(examples, query))
    _tokens(name, call, new, tokenizer, [ASKED[query] for query in data.queries])


def _seeds(name: str, call: str, make: Callable[[int], Any]) -> None:
    first, again, other = make(7), make(7), make(8)
    _demand(name, first.texts == again.texts, "seed", "one seed gave two data sets", call)
    _demand(name, first.texts != other.texts, "seed", "two seeds gave the same", call)


# --------------------------------------------------------------------------------------------------- how right it is


def hits(pos: int = -1, choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1)) -> Fn:
    """Prompt by prompt."""

    @torch.no_grad()
    def is_right(model: Any, data: Any) -> Tensor:
        rows = [model(tokens[None])[0, pos] for tokens in data.tokens]
        return torch.tensor(
            [int(choose(row)) == answer for row, answer in zip(rows, data.answers.tolist(), strict=True)]
        )

    return is_right


def _mixed(n_batch: int, n_pos: int, seed: int) -> tuple[Any, Any]:
    """Answers that are the second choice at the end, the first choice there, that at the first place, the last, any."""
    model, data = small_model(2), dataset(n_batch, n_pos, seed)
    with torch.no_grad():
        logits = model(data.tokens)
    data.answers[::5] = logits[::5, -1].topk(2).indices[:, 1]
    data.answers[1::5] = logits[1::5, -1].argmax(-1)
    data.answers[2::5] = logits[2::5, 0].argmax(-1)
    data.answers[3::5] = logits[3::5, -1].argmin(-1)
    return model, data


@known_mistakes(
    {
        "it looks at the first position; the prediction for the next token is at the last.": hits(pos=0),
        "it looks at the position before the last.": hits(pos=-2),
        "it takes the least likely token.": hits(choose=lambda logits: logits.argmin(-1)),
        "it is the share of right prompts; give one answer for each.": lambda model, data: (
            hits()(model, data).float().mean()
        ),
    }
)
def check_is_right(fn: Fn) -> None:
    """Some prompts right, some not; sizes that differ; one prompt."""
    name = "is_right"
    for n_batch, n_pos, seed in ((9, 5, 1), (1, 4, 2), (6, 3, 3)):
        model, data = _mixed(n_batch, n_pos, seed)
        compare(f"{name} of {n_batch} prompts", fn(model, data), hits()(model, data), "batch")
    with nothing_left_behind(name, model):
        without_graph(name, fn(model, data))
    grad = []
    model.register_forward_pre_hook(lambda module, inputs: grad.append(torch.is_grad_enabled()))
    fn(model, data)
    if any(grad):
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")


# ------------------------------------------------------------------------------------------------------ the interval


def resampling(
    size: Callable[[int], int] = lambda n: n,
    replace: bool = True,
    summary: Callable[[Tensor], Tensor] = lambda drawn: drawn.mean(),
    shares: Callable[[float], tuple[float, float]] = lambda level: ((1 - level) / 2, 1 - (1 - level) / 2),
    end: Callable[[Tensor, Tensor, float, float], tuple[float, float]] = lambda values, means, low, high: (low, high),
) -> Fn:
    """Resample by resample; switches for what people do instead."""

    def bootstrap_interval(
        values: Tensor, n_resamples: int, generator: torch.Generator, level: float = 0.95
    ) -> tuple[float, float]:
        n, means = len(values), []
        for _ in range(n_resamples):
            if replace:
                drawn = torch.randint(n, (size(n),), generator=generator)
            else:
                drawn = torch.randperm(n, generator=generator)[: size(n)]
            means.append(summary(values[drawn]))
        found = torch.stack(means)
        low, high = (float(torch.quantile(found, share)) for share in shares(level))
        return end(values, found, low, high)

    return bootstrap_interval


VALUES = torch.cat([torch.linspace(0, 1, 20) ** 2, torch.tensor([2.5, 3.0, 4.0])])


@known_mistakes(
    {
        "prompts are drawn without replacement: every mean is the same.": resampling(replace=False),
        "each resample is half as large as the batch.": resampling(size=lambda n: n // 2),
        "the interval is of the values themselves, not of their mean.": resampling(size=lambda n: 1),
        "`level` is left out on each side; it is the middle that the interval holds.": resampling(
            shares=lambda level: (1 - level, level)
        ),
        "`level` is ignored.": resampling(shares=lambda level: (0.025, 0.975)),
        "it is the middle of the medians; take the mean of each resample.": resampling(
            summary=lambda drawn: drawn.median()
        ),
        "upper and lower end are swapped.": resampling(end=lambda values, means, low, high: (high, low)),
        "it is one standard deviation to either side; take the quantiles.": resampling(
            end=lambda values, means, low, high: (float(means.mean() - means.std()), float(means.mean() + means.std()))
        ),
    }
)
def check_bootstrap_interval(fn: Fn) -> None:
    """Against a slow bootstrap with many resamples, as far as chance allows; two levels; one value."""
    name = "bootstrap_interval"
    spread = float(VALUES.std(correction=0)) / len(VALUES) ** 0.5
    for level in (0.95, 0.5):
        call = f"{name}(values, 4000, generator, level={level})"
        actual = _pair(name, call, fn(VALUES.clone(), 4000, torch.Generator().manual_seed(1), level))
        expected = _expected(level)
        for words, got, want in zip(("lower", "upper"), actual, expected, strict=True):
            if not abs(got - want) < 0.15 * spread:
                raise CheckFailed(
                    f"{name}: the {words} end is wrong.\n  {call}: expected about {want:.3f}, got {got:.3f}",
                    evidence=Evidence(f"{words} end at level {level}", round(3 * got / spread)),
                    advice="  Next: draw as many prompts as there are, with replacement; take quantiles of the means.",
                )
    agree(name, f"{name} of one value", _pair(name, name, fn(torch.ones(1), 20, torch.Generator())), (1.0, 1.0))
    # Of two values, half of all means are in the middle; with fewer or more draws none or other ones are.
    two = fn(torch.tensor([0.0, 1.0]), 200, torch.Generator().manual_seed(1), 0.3)
    agree(name, f"{name} of the values 0 and 1, level=0.3", _pair(name, name, two), (0.5, 0.5))
    one = _pair(name, name, fn(VALUES.clone(), 1, torch.Generator().manual_seed(2)))
    agree(name, f"the upper end of {name} with a single resample, against its lower end", one[1], one[0])
    same = [fn(VALUES.clone(), 50, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    if same[0] != same[1] or same[0] == same[2]:
        raise CheckFailed(f"{name}: its answer does not follow the generator.\n  Next: hand `generator` to what draws.")
    generator = torch.Generator().manual_seed(3)
    if fn(VALUES.clone(), 50, generator) == fn(VALUES.clone(), 50, generator):
        raise CheckFailed(
            f"{name}: called twice, it drew the same numbers.\n  Next: hand `generator` itself to what draws."
        )
    default = fn(VALUES.clone(), 300, torch.Generator().manual_seed(3))
    agree(name, f"{name} without a level", default, fn(VALUES.clone(), 300, torch.Generator().manual_seed(3), 0.95))


def _pair(name: str, call: str, actual: Any) -> tuple[float, float]:
    if not (isinstance(actual, tuple) and len(actual) == 2 and all(isinstance(end, float) for end in actual)):
        raise CheckFailed(f"{name}: expected two floats, got {actual!r}.\n  {call}\n  Next: return low, high.")
    return actual


@cache
def _expected(level: float) -> tuple[float, float]:
    """By many draws at once, from a seed of its own."""
    drawn = torch.randint(len(VALUES), (40_000, len(VALUES)), generator=torch.Generator().manual_seed(99))
    means = VALUES[drawn].mean(1).sort().values
    outside = (1 - level) / 2
    return float(means[round(outside * 40_000)]), float(means[round((1 - outside) * 40_000) - 1])
