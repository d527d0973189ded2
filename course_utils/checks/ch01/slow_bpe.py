"""Byte pair encoding by slow loops and Python's own `str.replace`: the oracles, with switches for what goes wrong."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise

Word = tuple[int, ...]
Pair = tuple[int, int]
Rule = tuple[int, int]  # a pair's rank, and the token that it makes

TEXT = (
    "the cat sat on the mat; the cat's hat isn't there. The other cats thought they'd gather the others, and then "
    "the hot tea. Über Straße, naïve café: 東京 2024, 3.14! That's all we've got, they said. The end."
)


def pieces_of(text: str) -> list[str]:
    """The pre-tokens, cut by the library."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


def merged(word: Word, pair: Pair, new_id: int) -> Word:
    """The tokens as characters, and Python's own replacement of text."""
    left, right, new = (chr(0x10000 + token) for token in (*pair, new_id))
    text = "".join(chr(0x10000 + token) for token in word).replace(left + right, new)
    return tuple(ord(character) - 0x10000 for character in text)


def in_turn(word: Word, rules: dict[Pair, Rule]) -> Word:
    """Each rule once, from the first learned to the last: the same, as a pair's parts are made by earlier rules."""
    for pair, (_, new_id) in sorted(rules.items(), key=lambda item: item[1][0]):
        word = merged(word, pair, new_id)
    return word


def by_choice(word: Word, rules: dict[Pair, Rule], key: Callable[[Rule], int], once: bool = False) -> Word:
    """Merge until nothing fits, always the pair with the smallest key; `once` stops after one merge."""
    while known := [pair for pair in pairwise(word) if pair in rules]:
        best = min(known, key=lambda pair: key(rules[pair]))
        word = merged(word, best, rules[best][1])
        if once:
            break
    return word


def ordinals(merges: list[Pair]) -> dict[Pair, Rule]:
    return {pair: (rank, 256 + rank) for rank, pair in enumerate(merges)}


def bytes_of(token: int, merges: list[Pair]) -> bytes:
    return bytes([token]) if token < 256 else b"".join(bytes_of(part, merges) for part in merges[token - 256])


def vocabulary(merges: list[Pair]) -> dict[int, bytes]:
    return {token: bytes_of(token, merges) for token in range(256 + len(merges))}


def learned(
    texts: list[str],
    n_merges: int,
    pieces: Callable[[str], list[str]] = pieces_of,
    counted: bool = True,
    largest: bool = False,
    first_seen: bool = False,
    characters: bool = False,
    rare: bool = False,
) -> list[Pair]:
    """BPE with every occurrence of every word kept as a list of its own; the switches are mistakes."""
    words = [tuple(map(ord, p)) if characters else tuple(p.encode()) for text in texts for p in pieces(text)]
    words = words if counted else list(dict.fromkeys(words))
    merges: list[Pair] = []
    for new_id in range(256, 256 + n_merges):
        count = count_of(words)
        if not count:
            break
        top = min(count.values()) if rare else max(count.values())
        best = [pair for pair in count if count[pair] == top]
        merges.append(best[0] if first_seen else max(best) if largest else min(best))
        words = [merged(word, merges[-1], new_id) for word in words]
    return merges


def count_of(words: Iterable[Word]) -> Counter[Pair]:
    """How often each pair stands in these words, each of which counts once."""
    return Counter((word[i], word[i + 1]) for word in words for i in range(len(word) - 1))


@cache
def merges_of_text() -> tuple[Pair, ...]:
    """Learned from a few sentences, for the exercises that apply merges."""
    return tuple(learned([TEXT], 60))


def encoded(
    text: str,
    merges: list[Pair],
    pieces: Callable[[str], Iterable[str]] = pieces_of,
    merge: Callable[[Word, dict[Pair, Rule]], Word] = in_turn,
) -> list[int]:
    """The ids of a text; the switches are mistakes."""
    rules = ordinals(merges)
    return [token for piece in pieces(text) for token in merge(tuple(piece.encode()), rules)]
