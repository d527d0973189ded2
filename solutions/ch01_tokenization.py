"""Byte-level byte pair encoding, as in GPT-2: learned from text, applied to text, and read from Hugging Face files.

A word is a tuple of token ids, and a text is first cut into words (pre-tokens). Ids 0 to 255 are the bytes; merge `i`
of a list of merges joins two tokens into the token `256 + i`. Text becomes bytes as UTF-8.
Sources: Gage 1994 and Sennrich et al. 2016 (byte pair encoding), Radford et al. 2019, section 2.2 (bytes, and the
pattern that cuts the text), and its code (the alphabet of `bytes_to_unicode`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import regex

from course_utils.bpe_files import read_byte_level_bpe

Word = tuple[int, ...]
Pair = tuple[int, int]
Rules = dict[Pair, tuple[int, int]]  # pair -> (rank, the token that it makes)


def count_pairs(words: Mapping[Word, int]) -> Counter[Pair]:
    """Count how often two tokens stand side by side, over all words.

    `words` maps each word to the number of times it occurs in the text; each of these occurrences counts. Pairs lie
    within a word, never across two. Overlapping pairs all count: (7, 7, 7) holds the pair (7, 7) twice.
    """
    pairs: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merge_pair(word: Word, pair: Pair, new_id: int) -> Word:
    """Replace `pair` in the word by the one token `new_id`, everywhere, from left to right.

    A token is used once: in (7, 7, 7) the pair (7, 7) is replaced once, and a 7 is left over at the end. A token
    just made takes no part in the same merge.
    """
    merged: list[int] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            merged.append(new_id)
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return tuple(merged)


def pretokenize(text: str) -> list[str]:
    """Cut a text as GPT-2 does, into pieces that no merge may cross; joined together they are the text again.

    From left to right, each piece is the first of these that fits:
    1. an English ending: 's 't 're 've 'm 'll 'd, in lower case and with the plain apostrophe;
    2. letters (Unicode's classes L), with one space before them if there is one;
    3. digits and other numbers (N), likewise;
    4. anything else that is neither white space nor letter nor number, likewise;
    5. white space, but for its last character if something else follows (so a space can join the next word);
    6. white space.
    """
    endings = r"'s|'t|'re|'ve|'m|'ll|'d"
    words = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    spaces = r"\s+(?!\S)|\s+"
    return regex.findall(f"{endings}|{words}|{spaces}", text)


def train_bpe(texts: Iterable[str], n_merges: int) -> list[Pair]:
    """Learn up to `n_merges` merges from the texts, the most frequent pair first.

    The texts are cut by `pretokenize`, and each piece becomes the word of its UTF-8 bytes. Then, again and again: count
    the pairs, merge the most frequent one (of several, the smallest: (1, 9) comes before (2, 0)) in all words into a
    new token, 256 for the first merge, 257 for the next. Stops early when every word is one token.
    """
    pieces = Counter(piece for text in texts for piece in pretokenize(text))
    words: dict[Word, int] = {tuple(piece.encode()): count for piece, count in pieces.items()}
    merges: list[Pair] = []
    while len(merges) < n_merges:
        pairs = count_pairs(words)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new_id = 256 + len(merges)
        words = {merge_pair(word, best, new_id): count for word, count in words.items()}
        merges.append(best)
    return merges


def build_vocab(merges: list[Pair]) -> dict[int, bytes]:
    """The bytes behind every token: ids 0 to 255 are one byte each, and id 256 + i is what merge i puts together."""
    vocab = {byte: bytes([byte]) for byte in range(256)}
    for new_id, (left, right) in enumerate(merges, start=256):
        vocab[new_id] = vocab[left] + vocab[right]
    return vocab


def decode(ids: Iterable[int], vocab: Mapping[int, bytes]) -> str:
    """Put the tokens' bytes together and read them as UTF-8.

    Tokens need not end where characters end, so only the whole is decoded. Bytes that are not valid UTF-8 (half of a
    character, say) become the replacement character U+FFFD, as `bytes.decode` does with errors="replace".
    Raises KeyError for an id that is not in `vocab`.
    """
    return b"".join(vocab[token] for token in ids).decode("utf-8", errors="replace")


def rules_of(merges: list[Pair]) -> Rules:
    """For each pair its rank (0 is the merge learned first) and the token that it makes."""
    return {pair: (rank, 256 + rank) for rank, pair in enumerate(merges)}


def merge_word(word: Word, rules: Rules) -> Word:
    """Apply merges to a word until none fits: always the one learned first, not the one that comes first in the text.

    `rules` gives each pair's rank and the token that it makes. In every step, of all the pairs in the word, the one
    with the lowest rank is merged, everywhere it stands.
    """
    while len(word) > 1:
        known = [pair for pair in pairwise(word) if pair in rules]
        if not known:
            break
        best = min(known, key=lambda pair: rules[pair][0])
        word = merge_pair(word, best, rules[best][1])
    return word


def encode(text: str, merges: list[Pair]) -> list[int]:
    """Turn a text into token ids: cut it by `pretokenize`, then merge the UTF-8 bytes of each piece.

    A piece that occurs again is looked up, not merged again: texts repeat their words, so this makes it fast.
    Raises UnicodeEncodeError for half a surrogate pair, which no UTF-8 can hold.
    """
    rules = rules_of(merges)
    known: dict[str, Word] = {}
    ids: list[int] = []
    for piece in pretokenize(text):
        if piece not in known:
            known[piece] = merge_word(tuple(piece.encode()), rules)
        ids.extend(known[piece])
    return ids


def bytes_to_unicode() -> dict[int, str]:
    """A visible character for each of the 256 bytes, as in GPT-2's vocabulary file.

    The bytes 33 to 126, 161 to 172 and 174 to 255 stand for the character with that code point. The others, in rising
    order, get the characters from code point 256 on: byte 0 becomes `Ā`, and the space, byte 32, becomes `Ġ`.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class BPETokenizer:
    """A byte-level BPE tokenizer with any numbering of its tokens, and with special tokens.

    `vocab` gives the bytes of each id, `rules` the rank of each pair and the token that it makes, and `special_tokens`
    the ids of texts that are one token whatever the merges say. `split` cuts a text into pre-tokens. With
    `whole_words`, a pre-token that is itself in the vocabulary is that one token, whatever the merges say.
    """

    def __init__(  # given
        self,
        vocab: Mapping[int, bytes],
        rules: Rules,
        special_tokens: Mapping[str, int] | None = None,
        split: Callable[[str], list[str]] = pretokenize,
        whole_words: bool = False,
    ) -> None:
        self.vocab, self.rules, self.split = dict(vocab), rules, split
        self.special_tokens = dict(special_tokens or {})
        self.ids = {token: number for number, token in self.vocab.items()}
        self.known: dict[str, Word] = {}  # pieces that were met before
        if whole_words:
            texts = {number: token.decode(errors="replace") for number, token in self.vocab.items()}
            self.known = {text: (i,) for i, text in texts.items() if text.encode() == self.vocab[i]}

    @classmethod
    def from_huggingface(cls, tokenizer: Any) -> "BPETokenizer":
        """The same tokenizer as a Hugging Face one with byte-level BPE, from `tokenizers` or `transformers`.

        The file writes each token as text, one character of `bytes_to_unicode` for each byte. The rank of a pair is
        its place in the file's list, and the token that it makes is the two texts joined.
        Raises ValueError for another kind of tokenizer.
        """
        file = read_byte_level_bpe(tokenizer, pretokenize)
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        vocab = {number: bytes(byte_of[character] for character in text) for text, number in file.vocab.items()}
        rules = {
            (file.vocab[left], file.vocab[right]): (rank, file.vocab[left + right])
            for rank, (left, right) in enumerate(file.merges)
        }
        return cls(vocab, rules, file.special_tokens, file.split, file.whole_words)

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids; nothing is put in front of it or behind it.

        Where a special token's text stands in it, that becomes its id (of several that fit at one place, the longest),
        and what is before and after it is encoded apart. Each piece of `split` begins as one token per byte (`self.ids`
        has the id of each byte) and is merged by `self.rules`; pieces met before are looked up in `self.known`.
        Raises UnicodeEncodeError for half a surrogate pair.
        """
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        pattern = "|".join(regex.escape(token) for token in longest_first)
        parts = regex.split(f"({pattern})", text) if pattern else [text]
        ids: list[int] = []
        for part in parts:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
                continue
            for piece in self.split(part):
                if piece not in self.known:
                    word = tuple(self.ids[bytes([byte])] for byte in piece.encode())
                    self.known[piece] = merge_word(word, self.rules)
                ids.extend(self.known[piece])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; a special token is its text. Invalid UTF-8 becomes U+FFFD.

        Raises KeyError for an id that is neither in the vocabulary nor special.
        """
        special = {number: text.encode() for text, number in self.special_tokens.items()}
        return decode(ids, self.vocab | special)


def fertility(tokenizer: Any, texts: Iterable[str]) -> float:
    """How many tokens a word takes, on average over all words of all texts; a word is what stands between white space.

    `tokenizer` has a method `encode(text)`. Raises ValueError where there are no words.
    Source: the name is from Ács 2019; Rust et al. 2021 compare models by it.
    """
    texts = list(texts)
    n_words = sum(len(text.split()) for text in texts)
    if n_words == 0:
        raise ValueError("fertility: the texts hold no words.")
    return sum(len(tokenizer.encode(text)) for text in texts) / n_words


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """The loss of a model on a text, in bits for each byte of the text, so that tokenizers can be compared.

    `loss` is the mean over the `n_tokens` tokens of the text, in nats (1 bit is ln 2 nats); `n_bytes` is the length of
    the same text in UTF-8.
    """
    return loss * n_tokens / (n_bytes * math.log(2))
