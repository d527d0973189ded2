# ruff: noqa: N802 (check_BPETokenizer is named after its exercise)
"""Chapter 01: does the tokenizer that the learner wrote do what GPT-2's does?

Oracles are the `tokenizers` library, Python's own `str.replace`, and loops that spell the definition out.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, call_of, must_raise, shown, untouched

Word = tuple[int, ...]
Pair = tuple[int, int]
Fn = Callable[..., Any]

TEXT = (
    "the cat sat on the mat; the cat's hat isn't there. The other cats thought they'd gather the others, and then "
    "the hot tea. Über Straße, naïve café: 東京 2024, 3.14! That's all we've got, they said. The end."
)


# ---------------------------------------------------------------------------------------------------------- the oracles


@cache
def _alphabet() -> dict[int, str]:
    """GPT-2's characters for bytes, by another road: those that Python calls printable, but for the space."""
    rest = iter(range(256, 512))
    return {b: chr(b) if chr(b).isprintable() and b != 32 else chr(next(rest)) for b in range(256)}


def _pieces(text: str) -> list[str]:
    """The pre-tokens, cut by the library."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


def _merged(word: Word, pair: Pair, new_id: int) -> Word:
    """The tokens as characters, and Python's own replacement of text."""
    left, right, new = (chr(0x10000 + token) for token in (*pair, new_id))
    text = "".join(chr(0x10000 + token) for token in word).replace(left + right, new)
    return tuple(ord(character) - 0x10000 for character in text)


def _in_turn(word: Word, rules: dict[Pair, tuple[int, int]]) -> Word:
    """Each rule once, from the first learned to the last: the same, as a pair's parts are made by earlier rules."""
    for pair, (_, new_id) in sorted(rules.items(), key=lambda item: item[1][0]):
        word = _merged(word, pair, new_id)
    return word


def _ordinals(merges: list[Pair]) -> dict[Pair, tuple[int, int]]:
    return {pair: (rank, 256 + rank) for rank, pair in enumerate(merges)}


def _bytes_of(token: int, merges: list[Pair]) -> bytes:
    return bytes([token]) if token < 256 else b"".join(_bytes_of(part, merges) for part in merges[token - 256])


def _learned(
    texts: list[str],
    n_merges: int,
    pieces: Callable[[str], list[str]] = _pieces,
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
        seen = [(word[i], word[i + 1]) for word in words for i in range(len(word) - 1)]
        if not seen:
            break
        count = Counter(seen)
        top = min(count.values()) if rare else max(count.values())
        best = [pair for pair in count if count[pair] == top]
        merges.append(best[0] if first_seen else max(best) if largest else min(best))
        words = [_merged(word, merges[-1], new_id) for word in words]
    return merges


@cache
def _merges() -> tuple[Pair, ...]:
    """Learned from a few sentences, for the exercises that apply merges."""
    return tuple(_learned([TEXT], 60))


@cache
def _library(n_vocab: int = 330) -> Any:
    """A tiny tokenizer of the `tokenizers` library, trained on the spot, with special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=["<|end|>", "<|end|><|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _library_with(merges: list[Pair]) -> Any:
    """A tokenizer of the library that has these merges and our numbering."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = _alphabet()
    names = {token: "".join(letters[b] for b in _bytes_of(token, merges)) for token in range(256 + len(merges))}
    vocab = {name: token for token, name in names.items()}
    tokenizer = Tokenizer(models.BPE(vocab, [(names[left], names[right]) for left, right in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


# ------------------------------------------------------------------------------------------------- learning the merges


def check_count_pairs(fn: Fn) -> None:
    """Words with counts, with repeated letters, and too short for a pair."""
    cases: list[dict[Word, int]] = [
        {(1, 2, 3): 4, (5, 2, 3, 2, 3): 7, (7, 7, 7, 7): 2, (3, 1): 1},
        {(7, 7, 7): 1},
        {(9,): 5, (8, 8, 8, 8): 3, (300, 8): 2},
        {},
    ]
    for words in cases:
        one_by_one = [word for word, count in words.items() for _ in range(count)]
        expected = Counter((word[i], word[i + 1]) for word in one_by_one for i in range(len(word) - 1))
        once = Counter((word[i], word[i + 1]) for word in words for i in range(len(word) - 1))
        whole = [token for word in one_by_one for token in word]
        apart: Counter[Pair] = Counter()
        per_word: Counter[Pair] = Counter()
        for word, count in words.items():
            for pair in set(pairwise(word)):
                per_word[pair] += count
                apart[pair] += count * (len(word) - len(_merged(word, pair, 0)))  # a merge makes it one shorter
        mistakes = {
            "the word counts are ignored; a word that occurs 7 times counts 7 times.": once,
            "pairs are counted across words; they lie within one.": Counter(pairwise(whole)),
            "overlapping pairs are counted once; in (7, 7, 7) there are two.": apart,
            "a pair counts once per word; it counts at every place.": per_word,
            "pairs are counted without regard to order; (2, 3) is not (3, 2).": Counter(
                tuple(sorted((word[i], word[i + 1]))) for word in one_by_one for i in range(len(word) - 1)
            ),
        }
        with untouched("count_pairs", words=words):
            actual = fn(words)
        given = {pair: n for pair, n in actual.items() if n != 0} if isinstance(actual, dict) else actual
        agree("count_pairs", call_of("count_pairs", words), given, expected, mistakes)


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
    ]
    for word, pair, new_id in cases:
        expected = _merged(word, pair, new_id)
        places = [i for i in range(len(word) - 1) if word[i : i + 2] == pair]
        first = (*word[: places[0]], new_id, *word[places[0] + 2 :]) if places else word
        last = (*word[: places[-1]], new_id, *word[places[-1] + 2 :]) if places else word
        kept_both = tuple(
            token for i in range(len(word)) for token in ([new_id, word[i + 1]] if i in places else [word[i]])
        )
        from_right = _merged(word[::-1], pair[::-1], new_id)[::-1]
        overlapping = tuple(
            new_id if i in places else t for i, t in enumerate(word) if i in places or i - 1 not in places
        )
        mistakes = {
            "only the first occurrence is merged; merge all of them.": first,
            "only the last occurrence is merged; merge all of them.": last,
            "overlapping pairs are merged, and a token is used twice; go on behind the pair.": overlapping,
            "the second token of the pair stays; both are replaced.": kept_both,
            "the word is read from the right; begin at the left.": from_right,
            "the pair is merged in both orders; (1, 2) is not (2, 1).": _merged(expected, pair[::-1], new_id),
        }
        call = call_of("merge_pair", word, pair, new_id)
        actual = fn(word, pair, new_id)
        agree("merge_pair", call, actual, expected, {k: v for k, v in mistakes.items() if v != expected})


SAMPLES = (
    "I'm sure they've gone, he'll say it's John's; we'd know. Don't!",
    "snake_case2(x)+=1; // why?!",
    "a  b   c",
    " leading and trailing  ",
    "line\n\n  next\tline \n",
    "in 1984, 3.14 or 2² and ½",
    "DON'T SHOUT, it’s rude",
    "naïve Straße, 東京タワー, Привет",
    "🙂🙃 👨‍👩‍👧 é",
    "nbsp\u00a0here, \u200bzero\u2003em \x1c",
    "",
    "''s 's' 'tis 'd'dd",
    "the cat sat",
)


def check_pretokenize(fn: Fn) -> None:
    """Texts in which one rule after the other decides, against the `tokenizers` library."""
    import regex

    def cut(pattern: str, text: str, flags: int = 0) -> list[str]:
        return regex.findall(pattern, text, flags=flags)

    endings, words, spaces = r"'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)|\s+"
    for text in SAMPLES:
        expected = _pieces(text)
        mistakes = {
            "the white space is lost; it belongs to the pieces.": text.split(),
            "the white space is lost, though the rest is right; it belongs to the pieces.": [
                piece.strip() for piece in expected if piece.strip()
            ],
            "the English endings ('s, 't, ...) are missed; they are tried before all else.": cut(
                f"{words}|{spaces}", text
            ),
            "the endings are also found in upper case; GPT-2 knows the lower case only.": cut(
                f"{endings}|{words}|{spaces}", text, regex.IGNORECASE
            ),
            "white space takes its last character along; that belongs to the word behind it.": cut(
                rf"{endings}|{words}|\s+", text
            ),
            "the space is cut off on its own; it belongs to the word behind it.": cut(
                rf"{endings}|{words.replace(' ?', '')}|{spaces}", text
            ),
            "the space belongs to the word before it; it belongs to the one behind it.": cut(
                rf"{endings}|\p{{L}}+ ?|\p{{N}}+ ?|[^\s\p{{L}}\p{{N}}]+ ?|{spaces}", text
            ),
            "only a to z count as letters; \\p{L} is those of all scripts.": cut(
                rf"{endings}| ?[a-zA-Z]+| ?\p{{N}}+| ?[^\sa-zA-Z\p{{N}}]+|{spaces}", text
            ),
            "only 0 to 9 count as numbers; \\p{N} has more, such as ² and ½.": cut(
                rf"{endings}| ?\p{{L}}+| ?[0-9]+| ?[^\s\p{{L}}0-9]+|{spaces}", text
            ),
            "letters and numbers are one class; a piece is of one kind.": cut(
                rf"{endings}| ?[\p{{L}}\p{{N}}]+| ?[^\s\p{{L}}\p{{N}}]+|{spaces}", text
            ),
            "words with \\w: numbers and the underscore are not letters.": cut(
                rf"{endings}| ?\w+| ?[^\s\w]+|{spaces}", text
            ),
            "any white space may stand before a word; only a space may.": cut(
                rf"{endings}|\s?\p{{L}}+|\s?\p{{N}}+|\s?[^\s\p{{L}}\p{{N}}]+|{spaces}", text
            ),
        }
        actual = fn(text)
        agree("pretokenize", call_of("pretokenize", text), actual, expected, _different(mistakes, expected))


def _different(mistakes: dict[str, Any], expected: Any) -> dict[str, Any]:
    """The mistakes that show in this case; of several with the same answer none is a cause that can be told."""
    answers = list(mistakes.values())
    return {hint: v for hint, v in mistakes.items() if v != expected and answers.count(v) == 1}


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
        ([TEXT], 30),
    ]
    for texts, n_merges in cases:
        expected = _learned(texts, n_merges)
        mistakes = {
            "the word counts are ignored.": _learned(texts, n_merges, counted=False),
            "of equally frequent pairs the largest is taken; take the smallest.": _learned(
                texts, n_merges, largest=True
            ),
            "of equally frequent pairs the first one met is taken; take the smallest.": _learned(
                texts, n_merges, first_seen=True
            ),
            "the text is not cut into pieces first; no pair may cross two words.": _learned(
                texts, n_merges, pieces=lambda text: [text]
            ),
            "the text is cut at white space, which is lost; use `pretokenize`.": _learned(
                texts, n_merges, pieces=str.split
            ),
            "the words begin as code points; begin with the bytes of UTF-8.": _learned(
                texts, n_merges, characters=True
            ),
            "the rarest pair is merged; merge the most frequent.": _learned(texts, n_merges, rare=True),
            "one merge too many is learned.": _learned(texts, n_merges + 1),
            "one merge too few is learned.": expected[:-1],
            "all pairs are ranked by one count at the start; count again after every merge.": [
                pair for pair, _ in sorted(_first_count(texts).items(), key=lambda item: (-item[1], item[0]))
            ][:n_merges],
            "only the first text is read.": _learned(texts[:1], n_merges),
        }
        with untouched("train_bpe", texts=texts):
            actual = fn(texts, n_merges)
        call = call_of("train_bpe", texts, n_merges)
        agree("train_bpe", call, actual, expected, _different(mistakes, expected))
    actual = fn((text for text in cases[0][0]), 5)
    agree("train_bpe", "train_bpe(a generator of texts, 5)", actual, _learned(cases[0][0], 5))


def _first_count(texts: list[str]) -> Counter[Pair]:
    words = [tuple(piece.encode()) for text in texts for piece in _pieces(text)]
    return Counter(pair for word in words for pair in pairwise(word))


# ------------------------------------------------------------------------------------------------ applying the merges


def check_build_vocab(fn: Fn) -> None:
    """Merges of merges; and bytes that are no text by themselves."""
    for merges in ([], [(104, 101), (116, 256), (257, 257)], [(195, 169), (32, 256)], list(_merges())):
        n_tokens = 256 + len(merges)
        expected = {token: _bytes_of(token, merges) for token in range(n_tokens)}
        mistakes = {
            "the halves are put together in the wrong order.": {
                t: e if t < 256 else _bytes_of(merges[t - 256][1], merges) + _bytes_of(merges[t - 256][0], merges)
                for t, e in expected.items()
            },
            "the 256 single bytes are missing.": {t: e for t, e in expected.items() if t >= 256},
            "the first merge has id 257; it is 256.": {t + (t >= 256): e for t, e in expected.items()},
            "the bytes 128 to 255 are encoded as UTF-8, two bytes each; `bytes([byte])` is one.": {
                t: b"".join(chr(b).encode() for b in e) for t, e in expected.items()
            },
            "`bytes(byte)` is that many zeros; `bytes([byte])` is the byte itself.": {
                t: b"".join(bytes(b) for b in e) for t, e in expected.items()
            },
        }
        with untouched("build_vocab", merges=merges):
            actual = fn(merges)
        agree("build_vocab", call_of("build_vocab", merges), actual, expected, _different(mistakes, expected))


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
    ]
    for ids, expected in cases:
        whole = b"".join(vocab[i] for i in ids)
        mistakes = {
            "every token is decoded by itself; put the bytes together first, a character may span tokens.": "".join(
                vocab[i].decode(errors="replace") for i in ids
            ),
            "invalid bytes are dropped; they become U+FFFD, so that one sees them.": whole.decode(errors="ignore"),
            "every byte becomes the character with that number (Latin-1); read them as UTF-8.": whole.decode("latin-1"),
            "invalid bytes are written as \\x..; they become U+FFFD.": whole.decode(errors="backslashreplace"),
            "invalid bytes become surrogates; they become U+FFFD.": whole.decode(errors="surrogateescape"),
        }
        with untouched("decode", ids=ids, vocab=vocab):
            actual = _no_unicode_error("decode", ids, partial(fn, ids, vocab))
        agree("decode", f"decode({ids}, vocab)", actual, expected, _different(mistakes, expected))
    must_raise("decode", KeyError, "decode([999], vocab), an id that is not in `vocab`,", lambda: fn([999], vocab))


def _no_unicode_error(name: str, ids: object, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except UnicodeDecodeError as error:
        raise CheckFailed(
            f"{name}: {shown(ids)} is not valid UTF-8, and your code raised {type(error).__name__}.\n"
            "  Next: tell `.decode` what to do with such bytes: they become U+FFFD."
        ) from None


def check_merge_word(fn: Fn) -> None:
    """Rules whose ranks, ids and places in the word say different things."""
    h, e, t, o = b"heto"
    cases: list[tuple[Word, dict[Pair, tuple[int, int]]]] = [
        (
            (o, t, h, e, t, h, o, e),
            {(e, t): (0, 290), (h, e): (1, 256), (o, t): (2, 280), (h, o): (3, 255), (t, h): (4, 300)},
        ),
        ((t, h, e), {(h, e): (0, 256), (t, h): (1, 257), (257, e): (2, 258)}),
        ((t, h, e, h, e, h), {(h, e): (0, 256), (t, 256): (1, 257), (257, 256): (2, 258)}),
        ((o, o, o, o, o), {(o, o): (0, 256), (256, 256): (1, 257)}),
        ((t, o, t, h), {(t, h): (3, 20), (t, o): (5, 12)}),
        ((o, h, e, t), {(h, e): (0, 900), (o, h): (1, 3), (e, t): (2, 4)}),  # ids in another order than ranks
        ((t, h, e), {}),
        ((), {(t, h): (0, 256)}),
        ((h,), {(h, h): (0, 256)}),
    ]
    cases += [(tuple(piece.encode()), _ordinals(list(_merges()))) for piece in _pieces(TEXT)]
    for word, rules in cases:
        expected = _in_turn(word, rules)
        mistakes = {
            "merges are applied in the order of the text; the lowest rank goes first.": _by_choice(word, rules, "text"),
            "the pair is chosen by the id that it makes; choose by rank.": _by_choice(word, rules, "id"),
            "the merge learned last goes first; the lowest rank goes first.": _by_choice(word, rules, "last"),
            "it stops after one merge; go on until none fits.": _by_choice(word, rules, "once"),
            "tokens are made as 256 + rank; `rules` says which token a pair makes.": _in_turn(
                word, {pair: (rank, 256 + rank) for pair, (rank, _) in rules.items()}
            ),
        }
        with untouched("merge_word", rules=rules):
            actual = fn(word, rules)
        name = "merge_word"
        agree(name, call_of(name, word, rules), actual, expected, _different(mistakes, expected))


def _by_choice(word: Word, rules: dict[Pair, tuple[int, int]], choice: str) -> Word:
    """Merge until nothing fits, with a pair chosen wrongly."""
    while True:
        known = [pair for pair in pairwise(word) if pair in rules]
        if not known:
            return word
        keys = {
            "text": lambda _: 0,
            "id": lambda p: rules[p][1],
            "last": lambda p: -rules[p][0],
            "once": lambda p: rules[p][0],
        }
        best = min(known, key=keys[choice])
        word = _merged(word, best, rules[best][1])
        if choice == "once":
            return word


def check_encode(fn: Fn) -> None:
    """Against the `tokenizers` library with the same merges, and back again."""
    merges = list(_merges())
    library = _library_with(merges)
    texts = [TEXT, *SAMPLES, "the other thing; the the  the", "tthe hthe"]
    for text in texts:
        expected = library.encode(text).ids
        rules = _ordinals(merges)

        def by(choice: str, text: str = text, rules: dict[Pair, tuple[int, int]] = rules) -> list[int]:
            return [token for piece in _pieces(text) for token in _by_choice(tuple(piece.encode()), rules, choice)]

        mistakes = {
            "merges are applied in the order of the text; the one learned first goes first.": by("text"),
            "the merge learned last goes first; the one learned first does.": by("last"),
            "the text is not cut into pieces first; no merge may cross two words.": list(
                _in_turn(tuple(text.encode()), rules)
            ),
            "the white space is lost.": [t for p in text.split() for t in _in_turn(tuple(p.encode()), rules)],
            "nothing is merged.": list(text.encode()),
            "each piece is kept once; it comes out every time that it comes in.": [
                t for p in dict.fromkeys(_pieces(text)) for t in _in_turn(tuple(p.encode()), rules)
            ],
        }
        with untouched("encode", merges=merges):
            actual = fn(text, merges)
        agree("encode", f"encode({shown(text)}, merges)", actual, expected, _different(mistakes, expected))
    agree("encode", "encode('hello', [])", fn("hello", []), [104, 101, 108, 108, 111])
    merges = [(104, 105)]
    agree("encode", "encode('hi', [(104, 105)]), after calls with other merges", fn("hi", merges), [256])
    must_raise("encode", UnicodeEncodeError, "encode of half a surrogate pair, '\\ud83d',", lambda: fn("\ud83d", []))


# ------------------------------------------------------------------------------------------------ somebody else's files


def check_bytes_to_unicode(fn: Fn) -> None:
    """Against Python's notion of what can be printed, and against the library's alphabet."""
    from tokenizers import pre_tokenizers

    expected = _alphabet()
    if set(expected.values()) != set(pre_tokenizers.ByteLevel.alphabet()):
        raise ValueError("the library's alphabet has changed")
    rest = [b for b in range(256) if not chr(b).isprintable() or b == 32]
    mistakes = {
        "byte b is simply chr(b), for which spaces and control characters stay invisible.": {
            b: chr(b) for b in range(256)
        },
        "the invisible ones get chr(256 + b); they are numbered one after the other.": {
            b: chr(256 + b) if b in rest else chr(b) for b in range(256)
        },
        "all bytes get chr(256 + b).": {b: chr(256 + b) for b in range(256)},
        "it goes from character to byte; the bytes are the keys.": {c: b for b, c in expected.items()},
    }
    agree("bytes_to_unicode", "bytes_to_unicode()", fn(), expected, mistakes)


SPECIAL_TEXTS = (
    "the<|end|>cat",
    "<|end|>",
    "<|end|><|end|><|end|> the",
    "<|end| >the <|endoftext|>",
    "the cat <|end|> the",
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
        expected = library.encode(text).ids
        mistakes = {
            "special tokens are cut up like any text.": _cut_library().encode(text).ids,
            "special tokens are left out.": [i for i in expected if i > 1],
            "of two special tokens that fit, the shorter is taken; take the longest.": [
                j for i in expected for j in ([0, 0] if i == 1 else [i])
            ],
        }
        actual = ours.encode(text)
        call = f"BPETokenizer.from_huggingface(library).encode({shown(text)})"
        agree("BPETokenizer", call, actual, expected, _different(mistakes, expected))
    _check_decoding(ours, library)
    _check_made_by_hand(cls)


@cache
def _cut_library() -> Any:
    """The tiny tokenizer, as if it had no special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    file = json.loads(_library().to_str())["model"]
    tokenizer = Tokenizer(models.BPE(file["vocab"], [tuple(merge) for merge in file["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _check_decoding(ours: Any, library: Any) -> None:
    """Back again; the special tokens stay; single bytes and halves of characters as the library does it."""
    for text in (TEXT, *SAMPLES, *SPECIAL_TEXTS):
        ids = library.encode(text).ids
        mistakes = {
            "special tokens are left out; they decode to their text.": library.decode(ids, skip_special_tokens=True)
        }
        call = f"decode of the ids of {shown(text)}"
        agree("BPETokenizer", call, ours.decode(ids), text, _different(mistakes, text))
    halves = [library.encode("東🙂é").ids[i:j] for i, j in ((0, 1), (1, 4), (2, 7), (0, 8))]
    for ids in halves:
        expected = library.decode(ids, skip_special_tokens=False)
        actual = _no_unicode_error("BPETokenizer", ids, partial(ours.decode, ids))
        agree("BPETokenizer", f"decode({ids}), halves of characters", actual, expected)
    must_raise("BPETokenizer", KeyError, "decode([99999])", lambda: ours.decode([99999]))


def _check_made_by_hand(cls: Any) -> None:
    """What the constructor was given is what counts: the split, the numbering, the special tokens."""
    vocab = {1000 + b: bytes([255 - b]) for b in range(256)} | {5: b"ab", 3: b"abc", 9: b"bc"}
    a, b, c = (1000 + 255 - letter for letter in b"abc")
    rules = {(b, c): (0, 9), (a, b): (1, 5), (a, 9): (2, 3)}
    made = cls(vocab, rules, {"(x)": 0, "a|b": 7}, split=lambda text: text.split("-"))
    name = "BPETokenizer"
    cases = {"abc": [3], "ab": [5], "ab-c": [5, c], "(x)abc": [0, 3], "xa|bc": [1000 + 255 - 120, 7, c], "abca": [3, a]}
    for text, expected in cases.items():
        call = f"encode({text!r}), with vocab, rules, special tokens and split made by hand"
        agree(name, call, made.encode(text), expected)
    agree(name, "decode, with vocab and special tokens made by hand", made.decode([0, 3, 7, 5]), "(x)abca|bab")
    without = cls(vocab, rules, split=lambda text: [text])
    agree(name, "encode('(x)'), without special tokens", without.encode("ab"), [5])


# -------------------------------------------------------------------------------------------------------- the measures


class _Pairs:
    """A tokenizer for which two characters are a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(text[i]) for i in range(0, len(text), 2)]


def check_fertility(fn: Fn) -> None:
    """Texts of very different length, with white space of all kinds, and a toy tokenizer."""
    toy = _Pairs()
    for texts in (
        ["one two three", "a bb"],
        ["x", "longer words everywhere here \n and  there"],
        ["tab\tand  spaces ", ""],
    ):
        n_tokens = [len(toy.encode(text)) for text in texts]
        n_words = [len(text.split()) for text in texts]
        expected = sum(n_tokens) / sum(n_words)
        mistakes = {
            "the ratio is taken per text and then averaged; add everything up first.": lambda t=n_tokens, w=n_words: (
                sum(a / max(b, 1) for a, b in zip(t, w, strict=True)) / len(t)
            ),
            "it is upside down: words per token.": sum(n_words) / sum(n_tokens),
            "the words are counted by the spaces; white space can be long, or a tab.": sum(n_tokens)
            / sum(len(text.split(" ")) for text in texts),
            "tokens are counted per character.": sum(n_tokens) / sum(map(len, texts)),
            "only the last text counts.": lambda t=n_tokens, w=n_words: t[-1] / max(w[-1], 1),
            "tokens are counted per text; count them per word.": sum(n_tokens) / len(texts),
        }
        agree("fertility", f"fertility(toy, {shown(texts)})", fn(toy, texts), expected, mistakes)
    actual = fn(toy, (text for text in ["one two three", "a bb"]))
    agree("fertility", "fertility(toy, a generator of texts)", actual, 9 / 5)
    must_raise("fertility", ValueError, "fertility(toy, [' ', ''])", lambda: fn(toy, [" ", ""]))


def check_bits_per_byte(fn: Fn) -> None:
    """By the probability of the whole text, which is the same however it is cut."""
    for loss, n_tokens, n_bytes in ((math.log(256), 11, 11), (1.7, 30, 120), (2.9, 7, 31), (0.0, 4, 9)):
        bits = -math.log2(math.exp(-loss * n_tokens))
        expected = bits / n_bytes
        mistakes = {
            "the nats are taken as bits; divide by ln 2.": loss * n_tokens / n_bytes,
            "it is multiplied by ln 2; 1 nat is more than 1 bit.": loss * n_tokens / n_bytes * math.log(2),
            "these are bits per token; the text has fewer tokens than bytes.": loss / math.log(2),
            "tokens and bytes are exchanged.": loss / math.log(2) * n_bytes / n_tokens,
            "`loss` is taken as the sum over the tokens; it is their mean.": loss / math.log(2) / n_bytes,
            "these are the bits of the whole text; divide by its bytes.": bits,
        }
        call = call_of("bits_per_byte", loss, n_tokens, n_bytes)
        actual = fn(loss, n_tokens, n_bytes)
        agree(
            "bits_per_byte",
            call,
            actual,
            expected,
            {k: v for k, v in mistakes.items() if not math.isclose(v, expected)},
        )
