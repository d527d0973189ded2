"""Wrong answers that are right on one friendly input: another number, order, text or call shows them.

`OF` has them by exercise, each with words of its refusal, for `SURPRISES`.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import regex

import solutions.ch01_tokenization as ref

Answer = Callable[..., Any]


def tokenizer(**methods: Any) -> type:
    """The reference with other methods."""
    return type("BPETokenizer", (ref.BPETokenizer,), methods)


# ------------------------------------------------------------------------------------------------- learning the merges


def without_token_0(words: Any) -> Any:
    """0 counts as false."""
    return Counter({pair: n for pair, n in ref.count_pairs(words).items() if all(pair)})


def told_apart_by_text(words: Any) -> Any:
    counts: Counter[Any] = Counter()
    first: dict[str, Any] = {}
    for pair, count in ref.count_pairs(words).items():
        counts[first.setdefault(f"{pair[0]}{pair[1]}", pair)] += count
    return counts


def same_objects(word: Any, pair: Any, new_id: int) -> Any:
    """Python keeps one object for each number up to 256 only."""
    merged: list[int] = []
    for token in word:
        if merged and merged[-1] is pair[0] and token is pair[1]:
            merged[-1] = new_id
        else:
            merged.append(token)
    return tuple(merged)


def replaced_as_text(word: Any, pair: Any, new_id: int) -> Any:
    text = " ".join(map(str, word)).replace(f"{pair[0]} {pair[1]}", str(new_id))
    return tuple(map(int, text.split()))


def used_ones_become_0(word: Any, pair: Any, new_id: int) -> Any:
    tokens = list(word)
    for i in range(len(tokens) - 1):
        if tuple(tokens[i : i + 2]) == pair:
            tokens[i : i + 2] = [new_id, 0]
    return tuple(token for token in tokens if token)


def cut(letters: str, numbers: str) -> Answer:
    """GPT-2's pattern with other classes."""
    words = rf" ?[{letters}]+| ?[{numbers}]+| ?[^\s{letters}{numbers}]+"
    return lambda text: regex.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|{words}|\s+(?!\S)|\s+", text)


def at_least_one_text(texts: Any, n_merges: int) -> Any:
    first, *others = texts
    return ref.train_bpe([first, *others], n_merges)


def lists_of_texts_only(texts: Any, n_merges: int) -> Any:
    return ref.train_bpe([" ".join(texts)] if isinstance(texts, tuple) else texts, n_merges)


# ------------------------------------------------------------------------------------------------ applying the merges


def up_to_12_bytes(merges: Any) -> Any:
    return {token: text[:12] for token, text in ref.build_vocab(merges).items()}


def ids_read_twice(ids: Any, vocab: Any) -> str:
    for token in ids:
        vocab[token]
    return ref.decode(ids, vocab)


def ids_by_number(ids: Any, vocab: Any) -> str:
    return ref.decode([ids[i] for i in range(len(ids))], vocab)


def negative_from_the_end(ids: Any, vocab: Any) -> str:
    numbers = sorted(vocab)
    return ref.decode([numbers[token] if token < 0 else token for token in ids], vocab)


def only(allowed: Callable[[Any], Any]) -> Answer:
    """Some rules are overlooked."""
    return lambda word, rules: ref.merge_word(word, {pair: rule for pair, rule in rules.items() if allowed(rule)})


def remembering(key: Callable[[list[Any]], Any]) -> Answer:
    """A memory outside of the function, with a poor notion of which merges are the same."""
    memory: dict[Any, Any] = {}

    def encode(text: str, merges: list[Any]) -> list[int]:
        rules, _ = memory.setdefault(key(merges), (ref.rules_of(merges), merges))
        return [t for piece in ref.pretokenize(text) for t in ref.merge_word(tuple(piece.encode()), rules)]

    return encode


def replacing_halves(text: str) -> str:
    return text.encode(errors="replace").decode()


# ------------------------------------------------------------------------------------------------ somebody else's files


def nothing_known(self: Any, text: str) -> Any:
    """Whole words are among what is known."""
    self.known = {}
    return ref.BPETokenizer.encode(self, text)


def longest_before_leftmost(self: Any, text: str) -> Any:
    for special in sorted(self.special_tokens, key=len, reverse=True):
        before, found, after = text.partition(special)
        if found:
            return [*self.encode(before), self.special_tokens[special], *self.encode(after)]
    return ref.BPETokenizer.encode(self, text)


def one_memory_for_all() -> Answer:
    memory: dict[str, Any] = {}

    def encode(self: Any, text: str) -> Any:
        self.known = self.known or memory
        return ref.BPETokenizer.encode(self, text)

    return encode


def any_file(cls: Any, file: Any) -> Any:
    try:
        return ref.BPETokenizer.from_huggingface.__func__(cls, file)
    except ValueError:
        return cls({}, {})


def special_in_latin_1(self: Any, ids: Any) -> str:
    special = {number: text.encode("latin-1") for text, number in self.special_tokens.items()}
    return ref.decode(ids, self.vocab | special)


def ids_listed_by_number(self: Any, ids: Any) -> str:
    return ref.BPETokenizer.decode(self, [ids[i] for i in range(len(ids))])


# -------------------------------------------------------------------------------------------------------- the measures


def only_texts_with_words(tokenizer: Any, texts: Any) -> float:
    return ref.fertility(tokenizer, [text for text in texts if text.split()])


def some_text_at_least(tokenizer: Any, texts: Any) -> float:
    texts = list(texts)
    if texts and not any(text.split() for text in texts):
        raise ValueError
    return sum(len(tokenizer.encode(text)) for text in texts) / sum(len(text.split()) for text in texts)


OF: dict[str, list[tuple[str, Any]]] = {
    "count_pairs": [("(0, 0) is missing", without_token_0), ("wrong answer", told_apart_by_text)],
    "merge_pair": [
        ("wrong answer", same_objects),
        ("wrong answer", replaced_as_text),
        ("wrong answer", used_ones_become_0),
    ],
    "pretokenize": [
        ("wrong answer", cut(r"\p{L}\p{M}", r"\p{N}")),  # an accent is no letter
        ("wrong answer", cut(r"\p{L}", r"\p{Nd}\p{No}")),  # Roman numerals are numbers
        ("wrong answer", lambda text: ref.pretokenize(text.replace("\r\n", "\n"))),
    ],
    "train_bpe": [
        ("expected 0 items, got 1", lambda texts, n_merges: ref.train_bpe(texts, max(n_merges, 1))),
        ("your code raised ValueError: not enough values", at_least_one_text),
        ("wrong answer", lists_of_texts_only),
    ],
    "build_vocab": [("wrong answer", up_to_12_bytes)],
    "decode": [
        ("a generator", ids_read_twice),
        ("your code raised TypeError", ids_by_number),
        ("\\ufeff", lambda ids, vocab: b"".join(vocab[i] for i in ids).decode("utf-8-sig", "replace")),
        ("decode([97, -1], vocab)", negative_from_the_end),
    ],
    "merge_word": [
        ("wrong answer", only(lambda rule: rule[0] < 10_000)),
        ("wrong answer", only(lambda rule: rule[1] != 0)),
    ],
    "encode": [
        ("after calls with other merges", remembering(id)),
        ("after calls with other merges", remembering(len)),
        ("the cat", lambda text, merges: ref.encode(text if len(text) == 1 else replacing_halves(text), merges)),
    ],
    "bytes_to_unicode": [("wrong answer", lambda: ref.bytes_to_unicode() | {173: "\xad"})],  # the soft hyphen
    "BPETokenizer": [
        ("with whole_words", tokenizer(encode=nothing_known)),
        ("made by hand", tokenizer(encode=longest_before_leftmost)),
        ("wrong answer", tokenizer(encode=one_memory_for_all())),
        (
            "half a surrogate pair",
            tokenizer(encode=lambda self, text: ref.BPETokenizer.encode(self, replacing_halves(text))),
        ),
        ("should raise ValueError", tokenizer(from_huggingface=classmethod(any_file))),
        ("your code raised TypeError", tokenizer(decode=ids_listed_by_number)),
        ("made by hand", tokenizer(decode=special_in_latin_1)),
    ],
    "fertility": [
        ("wrong answer", only_texts_with_words),
        ("wrong answer", lambda tokenizer, texts: ref.fertility(tokenizer, [" ".join(texts)])),
        ("your code raised ZeroDivisionError", some_text_at_least),
    ],
    "bits_per_byte": [
        (
            "your code raised ValueError",  # the logarithm of 0
            lambda loss, tokens, n_bytes: -math.log2(math.exp(-loss * tokens)) / n_bytes,
        ),
        (
            "your code raised OverflowError",
            lambda loss, tokens, n_bytes: math.log2(math.exp(loss)) * tokens / n_bytes,
        ),
        ("wrong answer", lambda loss, tokens, n_bytes: round(ref.bits_per_byte(loss, tokens, n_bytes), 6)),
    ],
}
