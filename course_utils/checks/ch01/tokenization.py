# ruff: noqa: N802 (check_BPETokenizer is named after its exercise)
"""Chapter 01: does the tokenizer that the learner wrote do what GPT-2's does?

Oracles are the `tokenizers` library, Python's own `str.replace`, and loops that spell the definition out.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import cache, partial
from itertools import pairwise
from typing import Any

from course_utils.checks.ch01.slow_bpe import (
    TEXT,
    Pair,
    Rule,
    Word,
    by_choice,
    bytes_of,
    count_of,
    encoded,
    in_turn,
    learned,
    merged,
    merges_of_text,
    ordinals,
    pieces_of,
    vocabulary,
)
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import with_methods
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, call_of, must_raise, shown
from course_utils.checks.standins.tokenizer import FromLibrary, TwoCharacters

Fn = Callable[..., Any]


# ------------------------------------------------------------------------------------------------- learning the merges


def tally(words: dict[Word, int], pairs_of: Callable[[Word], Iterable[Any]]) -> Counter[Any]:
    """The pairs that are found in a word, as often as the word occurs."""
    return Counter(pair for word, count in words.items() for pair in [*pairs_of(word)] * count)


def apart(word: Word) -> list[Pair]:
    """The pairs that a merge would replace: each makes the word shorter by one."""
    return [pair for pair in set(pairwise(word)) for _ in range(len(word) - len(merged(word, pair, 0)))]


@known_mistakes(
    {
        "the word counts are ignored; a word that occurs 7 times counts 7 times.": count_of,
        "pairs are counted across words; they lie within one.": (
            lambda words: count_of([tuple(token for word, count in words.items() for token in word * count)])
        ),
        "overlapping pairs are counted once; in (7, 7, 7) there are two.": lambda words: tally(words, apart),
        "a pair counts once per word; it counts at every place.": (
            lambda words: tally(words, lambda word: set(pairwise(word)))
        ),
        "pairs are counted without regard to order; (2, 3) is not (3, 2).": (
            lambda words: tally(words, lambda word: [tuple(sorted(pair)) for pair in pairwise(word)])
        ),
    }
)
def check_count_pairs(fn: Fn) -> None:
    """Words with counts, with repeated letters, and too short for a pair."""
    cases: list[dict[Word, int]] = [
        {(1, 2, 3): 4, (5, 2, 3, 2, 3): 7, (7, 7, 7, 7): 2, (3, 1): 1},
        {(7, 7, 7): 1},
        {(9,): 5, (8, 8, 8, 8): 3, (300, 8): 2},
        {(0, 0, 1, 12): 2, (11, 2, 0): 3},  # token 0 is one like others; written without a space, 1 12 is 11 2
        {},
    ]
    for words in cases:
        expected = count_of([word for word, count in words.items() for _ in range(count)])
        actual = fn(words)
        given = {pair: n for pair, n in actual.items() if n != 0} if isinstance(actual, dict) else actual
        agree("count_pairs", call_of("count_pairs", words), given, expected)


def where(word: Word, pair: Pair) -> list[int]:
    return [i for i in range(len(word) - 1) if word[i : i + 2] == pair]


def replaced(word: Word, places: list[int], new_id: int) -> Word:
    """The word with the new token at these places, for two tokens each."""
    return tuple(new_id if i in places else token for i, token in enumerate(word) if i - 1 not in places)


def overlapping(word: Word, pair: Pair, new_id: int) -> Word:
    places = where(word, pair)
    return tuple(new_id if i in places else t for i, t in enumerate(word) if i in places or i - 1 not in places)


def second_kept(word: Word, pair: Pair, new_id: int) -> Word:
    places = where(word, pair)
    return tuple(token for i in range(len(word)) for token in ([new_id, word[i + 1]] if i in places else [word[i]]))


@known_mistakes(
    {
        "only the first occurrence is merged; merge all of them.": (
            lambda word, pair, new_id: replaced(word, where(word, pair)[:1], new_id)
        ),
        "only the last occurrence is merged; merge all of them.": (
            lambda word, pair, new_id: replaced(word, where(word, pair)[-1:], new_id)
        ),
        "overlapping pairs are merged, and a token is used twice; go on after the pair.": overlapping,
        "the second token of the pair stays; both are replaced.": second_kept,
        "the word is read from the right; begin at the left.": (
            lambda word, pair, new_id: merged(word[::-1], pair[::-1], new_id)[::-1]
        ),
        "the pair is merged in both orders; (1, 2) is not (2, 1).": (
            lambda word, pair, new_id: merged(merged(word, pair, new_id), pair[::-1], new_id)
        ),
    }
)
def check_merge_pair(fn: Fn) -> None:
    """Runs of the same token, pairs at both ends, and pairs that are not there."""
    cases: list[tuple[Word, Pair, int]] = [
        ((7, 7, 7, 5, 7, 7), (7, 7), 256),
        ((7, 7, 7), (7, 7), 256),
        ((1, 2, 3, 1, 2), (1, 2), 256),
        ((7, 7, 7, 7, 5, 7, 7), (7, 7), 300),
        ((2, 1, 1, 2, 1), (1, 2), 257),
        ((1, 3, 2), (1, 2), 256),
        ((258, 4, 5, 258, 4), (258, 4), 259),
        ((3,), (3, 3), 256),
        ((1, 2, 2), (1, 2), 1),  # what is new is not merged again
        ((11, 2, 1, 2, 1, 21), (1, 2), 256),  # as text, 11 2 holds 1 2
        ((0, 0, 5, 0, 7), (5, 0), 0),
        ((*range(999, 1003), *range(999, 1003)), (1000, 1001), 1003),  # equal, but not the same objects
        ((), (1, 2), 256),
    ]
    for case in cases:
        agree("merge_pair", call_of("merge_pair", *case), fn(*case), merged(*case))


SAMPLES = (
    "I'm sure they've gone, he'll say it's John's; we'd know. Don't!",
    "snake_case2(x)+=1; // why?!",
    "a  b   c",
    " leading and trailing  ",
    "line\n\n  next\tline \n",
    "in 1984, 3.14 or 2² and ½",
    "DON'T SHOUT, it’s rude",
    "naïve Straße, 東京タワー, Привет",
    "cafe\u0301 Ⅷ, Ⅻ. ٣٤ and 三百",  # an accent of its own, Roman and Arabic numerals, letters that count
    "first\r\n\r\nsecond\r",
    "🙂🙃 👨‍👩‍👧 é",
    "nbsp\u00a0here, \u200bzero\u2003em \x1c",
    "",
    "''s 's' 'tis 'd'dd",
    "the cat sat",
)
ENDINGS, WORDS, SPACES = r"'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)|\s+"


def by_pattern(*parts: str) -> Callable[[str], list[str]]:
    """A way to cut a text by the first of these patterns that fits."""

    def cut(text: str) -> list[str]:
        import regex

        return regex.findall("|".join(parts), text)

    return cut


def stripped(text: str) -> list[str]:
    return [piece.strip() for piece in pieces_of(text) if piece.strip()]


@known_mistakes(
    {
        "the white space is lost; it belongs to the pieces.": lambda text: text.split(),
        "the white space is lost, though the rest is right; it belongs to the pieces.": stripped,
        "the English endings ('s, 't, ...) are missed; they are tried before all else.": by_pattern(WORDS, SPACES),
        "the endings are also found in upper case; GPT-2 knows only lower case.": by_pattern(
            f"(?i:{ENDINGS})", WORDS, SPACES
        ),
        "white space takes its last character along; that belongs to the word after it.": by_pattern(
            ENDINGS, WORDS, r"\s+"
        ),
        "the space is cut off on its own; it belongs to the word after it.": by_pattern(
            ENDINGS, WORDS.replace(" ?", ""), SPACES
        ),
        "the space belongs to the word before it; it belongs to the one after it.": by_pattern(
            ENDINGS, r"\p{L}+ ?|\p{N}+ ?|[^\s\p{L}\p{N}]+ ?", SPACES
        ),
        "only a to z count as letters; \\p{L} has those of all scripts.": by_pattern(
            ENDINGS, WORDS.replace(r"[^\s\p{L}", r"[^\sa-zA-Z").replace(r"\p{L}", "[a-zA-Z]"), SPACES
        ),
        "only 0 to 9 count as numbers; \\p{N} has more, such as ² and ½.": by_pattern(
            ENDINGS, WORDS.replace(r"\p{N}]", "0-9]").replace(r"\p{N}", "[0-9]"), SPACES
        ),
        "letters and numbers are one class; a piece is of one kind.": by_pattern(
            ENDINGS, r" ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+", SPACES
        ),
        "words with \\w: numbers and the underscore are not letters.": by_pattern(ENDINGS, r" ?\w+| ?[^\s\w]+", SPACES),
        "any white space may stand before a word; only a space may.": by_pattern(
            ENDINGS, WORDS.replace(" ?", r"\s?"), SPACES
        ),
    }
)
def check_pretokenize(fn: Fn) -> None:
    """Texts in which one rule after the other decides, against the `tokenizers` library."""
    for text in SAMPLES:
        agree("pretokenize", call_of("pretokenize", text), fn(text), pieces_of(text))


def ranked_once(texts: list[str], n_merges: int) -> list[Pair]:
    count = count_of(tuple(piece.encode()) for text in texts for piece in pieces_of(text))
    return sorted(count, key=lambda pair: (-count[pair], pair))[:n_merges]


@known_mistakes(
    {
        "the word counts are ignored.": partial(learned, counted=False),
        "of equally frequent pairs the largest is taken; take the smallest.": partial(learned, largest=True),
        "of equally frequent pairs the first one met is taken; take the smallest.": partial(learned, first_seen=True),
        "the text is not cut into pieces first; no pair may cross two words.": partial(
            learned, pieces=lambda text: [text]
        ),
        "the text is cut at white space, which is lost; use `pretokenize`.": partial(learned, pieces=str.split),
        "the words begin as code points; begin with the bytes of UTF-8.": partial(learned, characters=True),
        "the rarest pair is merged; merge the most frequent.": partial(learned, rare=True),
        "one merge too many is learned.": lambda texts, n_merges: learned(texts, n_merges + 1),
        "one merge too few is learned.": lambda texts, n_merges: learned(texts, n_merges)[:-1],
        "all pairs are ranked by one count at the start; count again after every merge.": ranked_once,
        "only the first text is read.": lambda texts, n_merges: learned(texts[:1], n_merges),
    }
)
def check_train_bpe(fn: Fn) -> None:
    """Few words, with counts that decide, ties, repeated letters, several bytes per letter; and running out."""
    cases: list[tuple[list[str], int]] = [
        (["low low low low lower lower newest newest newest newest newest newest widest widest widest"], 10),
        (["ab ba ab ba cd dc"], 3),
        (["aaaa aaaaaa aaa", "aaaaaa"], 4),
        (["the them then", " the", "theatre the"], 8),
        (["I'm he'm; don't won't"], 7),
        (["éé é ñ ñ éñ"], 6),
        (["ab"], 9),
        (["x y z", ""], 2),
        (["abc"], 0),
        ([], 3),
        ([TEXT], 30),
    ]
    for texts, n_merges in cases:
        call = call_of("train_bpe", texts, n_merges)
        agree("train_bpe", call, fn(texts, n_merges), learned(texts, n_merges))
    actual = fn((text for text in cases[0][0]), 5)
    agree("train_bpe", "train_bpe(a generator of texts, 5)", actual, learned(cases[0][0], 5))
    several = ("one two", "two three", "three two")
    agree("train_bpe", call_of("train_bpe", several, 6), fn(several, 6), learned(list(several), 6))


# ------------------------------------------------------------------------------------------------ applying the merges


@known_mistakes(
    {
        "the halves are put together in the wrong order.": (
            lambda merges: vocabulary([(right, left) for left, right in merges])
        ),
        "the 256 single bytes are missing.": lambda merges: {
            256 + i: bytes_of(256 + i, merges) for i in range(len(merges))
        },
        "the first merge has id 257; it is 256.": lambda merges: {
            token + (token >= 256): text for token, text in vocabulary(merges).items()
        },
        "the bytes 128 to 255 are encoded as UTF-8, two bytes each; `bytes([byte])` is one.": lambda merges: {
            token: text.decode("latin-1").encode() for token, text in vocabulary(merges).items()
        },
        "`bytes(byte)` is that many zeros; `bytes([byte])` is the byte itself.": lambda merges: {
            token: bytes(sum(text)) for token, text in vocabulary(merges).items()
        },
    }
)
def check_build_vocab(fn: Fn) -> None:
    """Merges of merges; and bytes that are no text by themselves."""
    cases: list[list[Pair]] = [
        [],
        [(104, 101), (116, 256), (257, 257)],
        [(195, 169), (32, 256)],
        [(32, 32), (256, 256), (257, 257), (258, 258), (259, 97)],
        list(merges_of_text()),
    ]
    for merges in cases:
        agree("build_vocab", call_of("build_vocab", merges), fn(merges), vocabulary(merges))


def read_as(encoding: str, errors: str = "strict") -> Callable[[list[int], dict[int, bytes]], str]:
    return lambda ids, vocab: b"".join(vocab[i] for i in ids).decode(encoding, errors)


@known_mistakes(
    {
        "every token is decoded by itself; put the bytes together first, a character may span tokens.": (
            lambda ids, vocab: "".join(vocab[i].decode(errors="replace") for i in ids)
        ),
        "invalid bytes are dropped; they become U+FFFD, so that you see them.": read_as("utf-8", "ignore"),
        "every byte becomes the character with that number (Latin-1); read them as UTF-8.": read_as(
            "latin-1", "strict"
        ),
        "invalid bytes are written as \\x..; they become U+FFFD.": read_as("utf-8", "backslashreplace"),
        "invalid bytes become surrogates; they become U+FFFD.": read_as("utf-8", "surrogateescape"),
    }
)
def check_decode(fn: Fn) -> None:
    """Tokens that end within a character, and bytes that no text has."""
    vocab = {b: bytes([b]) for b in range(256)} | {256: b"the", 257: b" caf\xc3", 258: b"\xa9!", 300: b"\xf0\x9f"}
    cases: list[tuple[list[int], str]] = [
        ([256, 257, 258], "the café!"),
        ([240, 159, 153, 130], "🙂"),
        ([300, 153, 130, 300], "🙂\ufffd"),
        ([257], " caf\ufffd"),
        ([255, 97, 128, 98, 256], "\ufffda\ufffdbthe"),
        ([], ""),
        ([104, 105, 10, 13, 10, 0], "hi\n\r\n\0"),
        ([239, 187, 191, 104], "\ufeffh"),
    ]
    for ids, expected in cases:
        actual = _no_unicode_error("decode", ids, partial(fn, ids, vocab))
        agree("decode", f"decode({ids}, vocab)", actual, expected)
    ids, expected = cases[0]
    agree("decode", f"decode(a generator of {ids}, vocab)", fn((i for i in ids), vocab), expected)
    for wrong in (999, -1):
        call = f"decode([97, {wrong}], vocab), an id that is not in `vocab`,"
        must_raise("decode", KeyError, call, partial(fn, [97, wrong], vocab))


def _no_unicode_error(name: str, ids: object, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except UnicodeDecodeError as error:
        raise CheckFailed(
            f"{name}: {shown(ids)} is not valid UTF-8, and your code raised {type(error).__name__}.\n"
            "  Next: tell `.decode` what to do with such bytes: they become U+FFFD."
        ) from None


IN_TEXT_ORDER = partial(by_choice, key=lambda rule: 0)
LAST_FIRST = partial(by_choice, key=lambda rule: -rule[0])


def as_listed(word: Word, rules: dict[Pair, Rule]) -> Word:
    """The first rule of the dictionary that fits, again and again."""
    return by_choice(word, {pair: (rank, rules[pair][1]) for rank, pair in enumerate(rules)}, key=lambda rule: rule[0])


@known_mistakes(
    {
        "merges are applied in the order of the text; the lowest rank goes first.": IN_TEXT_ORDER,
        "the pair is chosen by the id that it makes; choose by rank.": partial(by_choice, key=lambda rule: rule[1]),
        "the merge learned last goes first; the lowest rank goes first.": LAST_FIRST,
        "it stops after one merge; go on until none fits.": partial(by_choice, key=lambda rule: rule[0], once=True),
        "rules are tried in the order in which `rules` lists them; the lowest rank goes first.": as_listed,
        "tokens are made as 256 + rank; `rules` says which token a pair makes.": (
            lambda word, rules: in_turn(word, {pair: (rank, 256 + rank) for pair, (rank, _) in rules.items()})
        ),
    }
)
def check_merge_word(fn: Fn) -> None:
    """Rules whose ranks, ids and places in the word say different things."""
    h, e, t, o = b"heto"
    cases: list[tuple[Word, dict[Pair, Rule]]] = [
        (
            (o, t, h, e, t, h, o, e),
            {(e, t): (0, 290), (h, e): (1, 256), (o, t): (2, 280), (h, o): (3, 255), (t, h): (4, 300)},
        ),
        ((t, h, e), {(h, e): (0, 256), (t, h): (1, 257), (257, e): (2, 258)}),
        ((t, h, e, h, e, h), {(h, e): (0, 256), (t, 256): (1, 257), (257, 256): (2, 258)}),
        ((o, o, o, o, o), {(o, o): (0, 256), (256, 256): (1, 257)}),
        ((t, o, t, h), {(t, h): (3, 20), (t, o): (5, 12)}),
        ((o, h, e, t), {(h, e): (0, 900), (o, h): (1, 3), (e, t): (2, 4)}),  # ids in another order than ranks
        ((o, h, e, t), {(e, t): (50_002, 4), (o, h): (50_001, 3), (h, e): (50_000, 6), (o, 6): (60_000, 5)}),
        ((h, e, t), {(h, e): (0, 0), (0, t): (1, 7)}),
        ((t, h, e), {}),
        ((), {(t, h): (0, 256)}),
        ((h,), {(h, h): (0, 256)}),
    ]
    cases += [(tuple(piece.encode()), ordinals(list(merges_of_text()))) for piece in pieces_of(TEXT)]
    for word, rules in cases:
        agree("merge_word", call_of("merge_word", word, rules), fn(word, rules), in_turn(word, rules))


@known_mistakes(
    {
        "merges are applied in the order of the text; the one learned first goes first.": partial(
            encoded, merge=IN_TEXT_ORDER
        ),
        "the merge learned last goes first; the one learned first does.": partial(encoded, merge=LAST_FIRST),
        "the text is not cut into pieces first; no merge may cross two words.": partial(
            encoded, pieces=lambda text: [text]
        ),
        "the white space is lost.": partial(encoded, pieces=str.split),
        "nothing is merged.": lambda text, merges: list(text.encode()),
        "each different piece is encoded once; encode it every time it occurs.": partial(
            encoded, pieces=lambda text: dict.fromkeys(pieces_of(text))
        ),
    }
)
def check_encode(fn: Fn) -> None:
    """Against the `tokenizers` library with the same merges, and back again."""
    merges = list(merges_of_text())
    library = _library_with(merges)
    for text in (TEXT, *SAMPLES, "the other thing; the the  the", "tthe hthe"):
        agree("encode", f"encode({shown(text)}, merges)", fn(text, merges), library.encode(text).ids)
    agree("encode", "encode('hello', [])", fn("hello", []), [104, 101, 108, 108, 111])
    merges = [(104, 105)]
    agree("encode", "encode('hi', [(104, 105)]), after calls with other merges", fn("hi", merges), [256])
    merges[0] = (104, 101)  # the same list, as long as before
    agree("encode", "encode('hi', [(104, 101)]), after calls with other merges", fn("hi", merges), [104, 105])
    _check_half_a_surrogate_pair("encode", lambda text: fn(text, []))


def _check_half_a_surrogate_pair(name: str, encode: Callable[[str], Any]) -> None:
    for text in ("\ud83d", "the cat \ud83d sat"):
        call = f"encode({text!r}), which holds half a surrogate pair,"
        must_raise(name, UnicodeEncodeError, call, partial(encode, text))


def _library_with(merges: list[Pair]) -> Any:
    """A tokenizer of the library that has these merges and our numbering."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = alphabet()
    names = {token: "".join(letters[b] for b in text) for token, text in vocabulary(merges).items()}
    vocab = {name: token for token, name in names.items()}
    tokenizer = Tokenizer(models.BPE(vocab, [(names[left], names[right]) for left, right in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


# ------------------------------------------------------------------------------------------------ somebody else's files


@cache
def alphabet() -> dict[int, str]:
    """GPT-2's characters for bytes, in another way: those that Python calls printable, but for the space."""
    rest = iter(range(256, 512))
    return {b: chr(b) if visible(b) else chr(next(rest)) for b in range(256)}


def visible(byte: int) -> bool:
    return chr(byte).isprintable() and byte != 32


@known_mistakes(
    {
        "byte b is simply chr(b), for which spaces and control characters stay invisible.": lambda: {
            b: chr(b) for b in range(256)
        },
        "the invisible ones get chr(256 + b); they are numbered one after the other.": lambda: {
            b: chr(b) if visible(b) else chr(256 + b) for b in range(256)
        },
        "all bytes get chr(256 + b).": lambda: {b: chr(256 + b) for b in range(256)},
        "it goes from character to byte; the bytes are the keys.": lambda: {c: b for b, c in alphabet().items()},
    }
)
def check_bytes_to_unicode(fn: Fn) -> None:
    """Against Python's notion of what can be printed, and against the library's alphabet."""
    from tokenizers import pre_tokenizers

    if set(alphabet().values()) != set(pre_tokenizers.ByteLevel.alphabet()):
        raise ValueError("the library's alphabet has changed")
    agree("bytes_to_unicode", "bytes_to_unicode()", fn(), alphabet())


SPECIAL_TEXTS = (
    "the<|end|>cat",
    "<|end|>",
    "<|end|><|end|><|end|> the",
    "<|end| >the <|endoftext|>",
    "the cat <|end|> the",
)


@cache
def _library() -> Any:
    """A tiny tokenizer of the `tokenizers` library, trained on the spot, with special tokens: ids 0 and 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<|end|><|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@cache
def _cut_library() -> Any:
    """The tiny tokenizer, as if it had no special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    file = json.loads(_library().to_str())["model"]
    tokenizer = Tokenizer(models.BPE(file["vocab"], [tuple(merge) for merge in file["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _of_another_kind() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"the": 0}, unk_token="the"))


def wrong_tokenizer(**methods: Callable[..., Any]) -> type:
    """A BPETokenizer that makes this mistake."""
    return with_methods(FromLibrary, "BPETokenizer", **methods)


@known_mistakes(
    {
        "special tokens are cut up like any text.": wrong_tokenizer(
            encode=lambda self, text: _cut_library().encode(text).ids
        ),
        "special tokens are left out.": wrong_tokenizer(
            encode=lambda self, text: [i for i in self.library.encode(text).ids if i > 1]
        ),
        "of two special tokens that fit, the shorter is taken; take the longest.": wrong_tokenizer(
            encode=lambda self, text: [j for i in self.library.encode(text).ids for j in ([0, 0] if i == 1 else [i])]
        ),
        "special tokens are left out; they decode to their text.": wrong_tokenizer(
            decode=lambda self, ids: self.library.decode(ids, skip_special_tokens=True)
        ),
    }
)
def check_BPETokenizer(cls: Any) -> None:
    """A tiny tokenizer of the library, trained here, whose ids are in an order of their own."""
    library = _library()
    ours = cls.from_huggingface(library)
    if not isinstance(ours, cls):
        raise CheckFailed(
            f"BPETokenizer: from_huggingface returned a {type(ours).__name__}, not a BPETokenizer.\n"
            "  Next: end it with `return cls(...)`."
        )
    for text in (*SAMPLES, TEXT, *SPECIAL_TEXTS, TEXT):
        call = f"BPETokenizer.from_huggingface(library).encode({shown(text)})"
        agree("BPETokenizer", call, ours.encode(text), library.encode(text).ids)
    _check_decoding(ours, library)
    _check_half_a_surrogate_pair("BPETokenizer", ours.encode)
    _check_made_by_hand(cls)
    call = "from_huggingface of a tokenizer that knows whole words only"
    must_raise("BPETokenizer", ValueError, call, lambda: cls.from_huggingface(_of_another_kind()))


def _check_decoding(ours: Any, library: Any) -> None:
    """Back again; the special tokens stay; single bytes and halves of characters as the library does it."""
    for text in (TEXT, *SAMPLES, *SPECIAL_TEXTS):
        agree("BPETokenizer", f"decode of the ids of {shown(text)}", ours.decode(library.encode(text).ids), text)
    halves = [library.encode("東🙂é").ids[i:j] for i, j in ((0, 1), (1, 4), (2, 7), (0, 8))]
    for ids in halves:
        expected = library.decode(ids, skip_special_tokens=False)
        actual = _no_unicode_error("BPETokenizer", ids, partial(ours.decode, ids))
        agree("BPETokenizer", f"decode({ids}), halves of characters", actual, expected)
    ids = library.encode(TEXT).ids
    agree("BPETokenizer", "decode of a generator of ids", ours.decode(i for i in ids), TEXT)
    for wrong in (99999, -1):
        must_raise("BPETokenizer", KeyError, f"decode([2, {wrong}])", partial(ours.decode, [2, wrong]))


def _bytes_by_hand(text: str) -> list[int]:
    """The ids of single bytes in the vocabulary that is made by hand."""
    return [1000 + 255 - byte for byte in text.encode()]


def _check_made_by_hand(cls: Any) -> None:
    """What the constructor was given is what counts: the split, the numbering, the special tokens."""
    vocab = {1000 + b: bytes([255 - b]) for b in range(256)} | {5: b"ab", 3: b"abc", 9: b"bc"}
    a, b, c = _bytes_by_hand("abc")
    rules = {(b, c): (0, 9), (a, b): (1, 5), (a, 9): (2, 3)}
    made = cls(vocab, rules, {"(x)": 0, "a|b": 7, "x)yé": 8}, split=lambda text: text.split("-"))
    name = "BPETokenizer"
    cases = {
        "abc": [3],
        "ab": [5],
        "ab-c": [5, c],
        "(x)abc": [0, 3],
        "xa|bc": [*_bytes_by_hand("x"), 7, c],
        "abca": [3, a],
    }
    cases |= {"x)yé": [8], "(x)y": [0, *_bytes_by_hand("y")], "(x)yéa": [0, *_bytes_by_hand("yéa")]}
    for text, expected in cases.items():
        call = f"encode({text!r}), with vocab, rules, special tokens and split made by hand"
        agree(name, call, made.encode(text), expected)
    text = "(x)abca|babx)yé"
    agree(name, "decode, with vocab and special tokens made by hand", made.decode([0, 3, 7, 5, 8]), text)
    without = cls(vocab, rules, split=lambda text: [text])
    agree(name, "encode('ab'), without special tokens", without.encode("ab"), [5])
    whole = cls(vocab, {}, split=lambda text: text.split("-"), whole_words=True)
    agree(name, "encode('abc-ab-ca'), with whole_words and no rules", whole.encode("abc-ab-ca"), [3, 5, c, a])
    plain = cls(vocab, {})
    agree(name, "encode('ab'), without rules, after other tokenizers", plain.encode("ab"), [a, b])


# -------------------------------------------------------------------------------------------------------- the measures


def tokens_in(tokenizer: Any, texts: Iterable[str]) -> int:
    return sum(len(tokenizer.encode(text)) for text in texts)


def words_in(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)


@known_mistakes(
    {
        "the ratio is taken per text and then averaged; add everything up first.": lambda toy, texts: (
            sum(tokens_in(toy, [text]) / max(words_in([text]), 1) for text in texts) / len(texts)
        ),
        "it is upside down: words per token.": lambda toy, texts: words_in(texts) / tokens_in(toy, texts),
        "the words are counted by the spaces; white space can be long, or a tab.": lambda toy, texts: (
            tokens_in(toy, texts) / sum(len(text.split(" ")) for text in texts)
        ),
        "tokens are counted per character.": lambda toy, texts: tokens_in(toy, texts) / sum(map(len, texts)),
        "only the last text counts.": lambda toy, texts: tokens_in(toy, texts[-1:]) / max(words_in(texts[-1:]), 1),
        "tokens are counted per text; count them per word.": lambda toy, texts: tokens_in(toy, texts) / len(texts),
    }
)
def check_fertility(fn: Fn) -> None:
    """Texts of very different length, with white space of all kinds, and a toy tokenizer."""
    toy = TwoCharacters()
    for texts in (
        ["one two three", "a bb"],
        ["x", "longer words everywhere here \n and  there"],
        ["tab\tand  spaces ", ""],
        ["   ", "a bb", "nbsp\u00a0counts"],  # tokens without words count too
    ):
        expected = tokens_in(toy, texts) / words_in(texts)
        agree("fertility", f"fertility(toy, {shown(texts)})", fn(toy, texts), expected)
    actual = fn(toy, (text for text in ["one two three", "a bb"]))
    agree("fertility", "fertility(toy, a generator of texts)", actual, 9 / 5)
    for texts in ([" ", ""], []):
        must_raise("fertility", ValueError, f"fertility(toy, {texts})", partial(fn, toy, texts))


@known_mistakes(
    {
        "the nats are taken as bits; divide by ln 2.": lambda loss, n_tokens, n_bytes: loss * n_tokens / n_bytes,
        "it is multiplied by ln 2; 1 nat is more than 1 bit.": lambda loss, n_tokens, n_bytes: (
            loss * n_tokens / n_bytes * math.log(2)
        ),
        "these are bits per token; the text has fewer tokens than bytes.": lambda loss, n_tokens, n_bytes: (
            loss / math.log(2)
        ),
        "tokens and bytes are exchanged.": lambda loss, n_tokens, n_bytes: loss / math.log(2) * n_bytes / n_tokens,
        "`loss` is taken as the sum over the tokens; it is their mean.": lambda loss, n_tokens, n_bytes: (
            loss / math.log(2) / n_bytes
        ),
        "these are the bits of the whole text; divide by its bytes.": lambda loss, n_tokens, n_bytes: (
            loss / math.log(2) * n_tokens
        ),
    }
)
def check_bits_per_byte(fn: Fn) -> None:
    """By the probability of the whole text, which is the same however it is cut; of a long text, it is no float."""
    cases = [(math.log(256), 11, 11), (1.7, 30, 120), (2.9, 7, 31), (0.0, 4, 9)]
    for case in [*cases, (3.2, 300_000, 1_100_000), (1e-4, 3, 11), (900.0, 2, 5)]:
        loss, n_tokens, n_bytes = case
        probability = Decimal(-loss * n_tokens).exp()
        expected = float(-probability.ln() / Decimal(2).ln() / n_bytes)
        agree("bits_per_byte", call_of("bits_per_byte", *case), fn(*case), expected)
