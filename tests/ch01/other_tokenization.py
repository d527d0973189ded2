"""Chapter 01 written another way: other loops, other libraries, the same answers."""

import math
import unicodedata
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

from course_utils.bpe_files import read_byte_level_bpe


def count_pairs(words: Any) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for word in words:
        for i in range(1, len(word)):
            counts[word[i - 1], word[i]] += words[word]
    return counts


def merge_pair(word: Any, pair: Any, new_id: int) -> tuple[int, ...]:
    if len(word) < 2:
        return word
    if word[:2] == pair:
        return (new_id, *merge_pair(word[2:], pair, new_id))
    return (word[0], *merge_pair(word[1:], pair, new_id))


def kind(character: str) -> str:
    if character.isspace() and character not in "\x1c\x1d\x1e\x1f":  # Unicode's white space has no separators
        return "space"
    first = unicodedata.category(character)[0]
    return {"L": "letter", "N": "number"}.get(first, "other")


def pretokenize(text: str) -> list[str]:
    """Without any pattern: one character after the other."""
    pieces, start = [], 0
    while start < len(text):
        ending = next((e for e in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(e, start)), None)
        if ending:
            end = start + len(ending)
        else:
            first = start + (text[start] == " ")
            if first < len(text) and kind(text[first]) != "space":
                end = first
                while end < len(text) and kind(text[end]) == kind(text[first]):
                    end += 1
            else:
                end = start
                while end < len(text) and kind(text[end]) == "space":
                    end += 1
                if end < len(text) and end - start > 1:
                    end -= 1
        pieces.append(text[start:end])
        start = end
    return pieces


def train_bpe(texts: Any, n_merges: int) -> list[tuple[int, int]]:
    """Words in a list, counts beside them, and max with a key instead of min."""
    counted = Counter(piece for text in texts for piece in pretokenize(text)).items()
    words, counts = [list(piece.encode("utf-8")) for piece, _ in counted], [count for _, count in counted]
    merges: list[tuple[int, int]] = []
    for step in range(n_merges):
        total: Counter[tuple[int, int]] = Counter()
        for word, count in zip(words, counts, strict=True):
            for i in range(len(word) - 1):
                total[word[i], word[i + 1]] += count
        if not total:
            return merges
        best = sorted(total, key=lambda pair: (total[pair], -pair[0], -pair[1]))[-1]
        words = [list(merge_pair(tuple(word), best, 256 + step)) for word in words]
        merges.append(best)
    return merges


def build_vocab(merges: Any) -> dict[int, bytes]:
    tokens = [bytes((byte,)) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return dict(enumerate(tokens))


def decode(ids: Any, vocab: Any) -> str:
    data = bytearray()
    for token in ids:
        data += vocab[token]
    return str(data, "utf-8", "replace")


def merge_word(word: Any, rules: Any) -> tuple[int, ...]:
    """The best place, by rank and then from the left, one merge at a time."""
    tokens = list(word)
    while True:
        places = [(rules[pair][0], i) for i, pair in enumerate(pairwise(tokens)) if pair in rules]
        if not places:
            return tuple(tokens)
        _, i = min(places)
        tokens[i : i + 2] = [rules[tokens[i], tokens[i + 1]][1]]


def encode(text: str, merges: Any) -> list[int]:
    """Each merge in turn, on every piece: slow and plain."""
    words = [tuple(piece.encode()) for piece in pretokenize(text)]
    for new_id, pair in enumerate(merges, start=256):
        words = [merge_pair(word, pair, new_id) for word in words]
    return [token for word in words for token in word]


def bytes_to_unicode() -> dict[int, str]:
    """As in GPT-2's own code: with a list that grows."""
    kept = (
        list(range(ord("!"), ord("~") + 1)) + list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    )
    codes = kept[:]
    for byte in range(256):
        if byte not in kept:
            kept.append(byte)
            codes.append(256 + len(codes) - 188)
    return {byte: chr(code) for byte, code in zip(kept, codes, strict=True)}


class BPETokenizer:
    """Special tokens by hand, no memory of earlier pieces, and its own inner form."""

    def __init__(
        self, vocab: Any, rules: Any, special_tokens: Any = None, split: Any = pretokenize, whole_words: bool = False
    ):
        self.bytes_of, self.rules, self.split, self.whole_words = vocab, rules, split, whole_words
        self.special = dict(special_tokens or {})

    @classmethod
    def from_huggingface(cls, tokenizer: Any) -> "BPETokenizer":
        file = read_byte_level_bpe(tokenizer, pretokenize)
        table = str.maketrans({character: chr(byte) for byte, character in bytes_to_unicode().items()})
        vocab = {file.vocab[text]: text.translate(table).encode("latin-1") for text in file.vocab}
        rules = {}
        for rank in range(len(file.merges)):
            left, right = file.merges[rank]
            rules[file.vocab[left], file.vocab[right]] = (rank, file.vocab[left + right])
        return cls(vocab, rules, file.special_tokens, file.split, file.whole_words)

    def encode(self, text: str) -> list[int]:
        ids: dict[bytes, int] = {token: number for number, token in self.bytes_of.items()}
        out: list[int] = []
        waiting = ""
        while text:
            fitting = [token for token in self.special if text.startswith(token)]
            if fitting:
                best = max(fitting, key=len)
                out += [*self._plain(waiting, ids), self.special[best]]
                waiting, text = "", text[len(best) :]
            else:
                waiting, text = waiting + text[0], text[1:]
        return out + self._plain(waiting, ids)

    def _plain(self, text: str, ids: dict[bytes, int]) -> list[int]:
        out: list[int] = []
        for piece in self.split(text) if text else []:
            data = piece.encode()
            whole = self.whole_words and data in ids
            out += [ids[data]] if whole else merge_word(tuple(ids[bytes([byte])] for byte in data), self.rules)
        return out

    def decode(self, ids: Any) -> str:
        names = {number: text for text, number in self.special.items()}
        data = b"".join(names[i].encode() if i in names else self.bytes_of[i] for i in ids)
        return data.decode(errors="replace")


def fertility(tokenizer: Any, texts: Any) -> float:
    n_tokens = n_words = 0
    for text in texts:
        n_tokens += len(tokenizer.encode(text))
        n_words += len(text.split())
    if not n_words:
        raise ValueError("no words")
    return n_tokens / n_words


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    return math.log2(math.e) * loss / (n_bytes / n_tokens)
