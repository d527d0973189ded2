"""Right answers by other means than most people's; `OF` has them by exercise, for `ALSO_RIGHT`."""

import codecs
import functools
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import regex

import solutions.ch01_tokenization as ref


def numbers_of_numpy(words: Any) -> dict[Any, Any]:
    counts: dict[Any, Any] = {}
    for word, count in words.items():
        for pair in itertools.pairwise(word):
            counts[pair] = np.int64(counts.get(pair, 0) + count)
    return counts


def counters_added(words: Any) -> Any:
    each = ({pair: n * count for pair, n in Counter(itertools.pairwise(word)).items()} for word, count in words.items())
    return sum(map(Counter, each), Counter())


class MergePair:
    """An answer that is an object."""

    def __call__(self, word: Any, pair: Any, new_id: int) -> Any:
        return ref.merge_pair(word, pair, new_id)


def folded(word: Any, pair: Any, new_id: int) -> Any:
    """From left to right; the last token is held back, as it may be the first half."""

    def step(state: Any, token: int) -> Any:
        done, held = state
        return ((*done, new_id), ()) if (*held, token) == pair else (done + held, (token,))

    return sum(functools.reduce(step, word, ((), ())), ())


def found_one_by_one(text: str) -> list[str]:
    pattern = r"'(?:[stmd]|re|ve|ll)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
    return [match[0] for match in regex.finditer(pattern, text)]


def by_a_heap(texts: Any, n_merges: int) -> list[Any]:
    words = Counter(tuple(piece.encode()) for text in texts for piece in ref.pretokenize(text))
    merges: list[Any] = []
    for new_id in range(256, 256 + n_merges):
        heap = [(-count, pair) for pair, count in ref.count_pairs(words).items()]
        if not heap:
            break
        heapq.heapify(heap)
        best = heap[0][1]
        merges.append(tuple(np.array(best)))
        words = Counter({ref.merge_pair(word, best, new_id): count for word, count in words.items()})
    return merges


def from_the_top(merges: Any) -> dict[Any, bytes]:
    @functools.cache
    def text_of(token: int) -> bytes:
        return bytes([token]) if token < 256 else b"".join(map(text_of, merges[token - 256]))

    return {np.int64(token): text_of(token) for token in reversed(range(256 + len(merges)))}


def bit_by_bit(ids: Any, vocab: Any) -> str:
    """A decoder that keeps what is not yet a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return "".join(decoder.decode(vocab[token]) for token in ids) + decoder.decode(b"", True)


def rule_after_rule(word: Any, rules: Any) -> Any:
    for pair, (_, new_id) in sorted(rules.items(), key=lambda item: item[1][0]):
        word = ref.merge_pair(word, pair, new_id)
    return word


def remembered_by_contents(text: str, merges: Any) -> list[int]:
    return list(itertools.chain.from_iterable(piece_of(piece, tuple(merges)) for piece in ref.pretokenize(text)))


@functools.cache
def piece_of(piece: str, merges: Any) -> Any:
    return ref.merge_word(tuple(piece.encode()), ref.rules_of(list(merges)))


def by_what_is_printable() -> dict[int, str]:
    codes = itertools.count(256)
    letters: dict[int, str] = defaultdict(str)
    for byte in range(256):
        letters[byte] = chr(byte) if chr(byte).isprintable() and byte != 32 else chr(next(codes))
    return letters


class BetweenSpecialTokens(ref.BPETokenizer):
    """Match after match, and what lies between."""

    def encode(self, text: str) -> list[int]:
        ids, start = [], 0
        pattern = "|".join(map(regex.escape, sorted(self.special_tokens, key=len, reverse=True)))
        for match in regex.finditer(pattern, text) if pattern else ():
            ids += [*self.plain(text[start : match.start()]), self.special_tokens[match[0]]]
            start = match.end()
        return ids + self.plain(text[start:])

    def plain(self, text: str) -> list[int]:
        return [token for piece in self.split(text) for token in self.known.get(piece) or self.merged(piece)]

    def merged(self, piece: str) -> Any:
        return ref.merge_word(tuple(self.ids[bytes([byte])] for byte in piece.encode()), self.rules)


class NumbersOfNumpy(ref.BPETokenizer):
    def encode(self, text: str) -> list[Any]:
        return list(np.array(super().encode(text), dtype=np.int64))


def by_matrix(tokenizer: Any, texts: Any) -> Any:
    each = [(len(tokenizer.encode(text)), len(text.split())) for text in texts]
    tokens, words = np.array(each).reshape(-1, 2).sum(0)
    if not words:
        raise ValueError("no words")
    return tokens / words


OF: dict[str, list[Callable[..., Any]]] = {
    "count_pairs": [numbers_of_numpy, counters_added],
    "merge_pair": [MergePair(), folded],
    "pretokenize": [found_one_by_one],
    "train_bpe": [by_a_heap],
    "build_vocab": [from_the_top],
    "decode": [bit_by_bit],
    "merge_word": [rule_after_rule],
    "encode": [remembered_by_contents, lambda text, merges: list(np.array(ref.encode(text, merges), dtype=np.int64))],
    "bytes_to_unicode": [by_what_is_printable],
    "BPETokenizer": [BetweenSpecialTokens, NumbersOfNumpy],
    "fertility": [by_matrix],
    "bits_per_byte": [
        lambda loss, tokens, n_bytes: np.log2(np.e) * loss * tokens / n_bytes,
        lambda loss, tokens, n_bytes: loss / math.log(2, math.e) / (n_bytes / tokens),
    ],
}
