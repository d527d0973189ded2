"""Chapter 01's checks against mistakes that learners make, and right answers written another way.

Each mistake returns the right type and must be refused with its promised words. Those marked `surprise` are absent
from the check's own list of known mistakes.
"""

import math
import signal
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import other_tokenization as other
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from mutation import mutants
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import solutions.ch01_tokenization as ref
from course_utils.checks import CheckFailed, find_checks, run_check
from course_utils.checks.ch01_tokenization import TEXT
from course_utils.checks.core import _run
from course_utils.pretrained import shipped_tokenizer

CHECKS = find_checks()["01"]


MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, surprise: bool = False) -> Callable[[Any], Any]:
    """Note a wrong answer: a decorator."""

    def note(answer: Any) -> Any:
        MISTAKES.append(Mistake(exercise, words, answer, surprise))
        return answer

    return note


def pairs_of(word: Any) -> list[Any]:
    return list(pairwise(word))


# -------------------------------------------------------------------------------------------------------- count_pairs

mistake("count_pairs", "the word counts are ignored")(lambda words: Counter(p for w in words for p in pairs_of(w)))
mistake("count_pairs", "across words")(
    lambda words: Counter(pairs_of([t for w, n in words.items() for _ in range(n) for t in w]))
)
mistake("count_pairs", "without regard to order")(
    lambda words: sum((Counter({tuple(sorted(p)): n}) for w, n in words.items() for p in pairs_of(w)), Counter())
)
mistake("count_pairs", "a pair counts once per word")(
    lambda words: sum((Counter(dict.fromkeys(pairs_of(w), n)) for w, n in words.items()), Counter())
)
mistake("count_pairs", "wrong answer", surprise=True)(
    lambda words: Counter({p: n * w.count(p[0]) for w, n in words.items() for p in pairs_of(w)})
)
mistake("count_pairs", "(7, 7) is missing: expected 6", surprise=True)(
    lambda words: sum((Counter({p: n}) for w, n in words.items() for p in pairs_of(w) if p[0] != p[1]), Counter())
)
mistake("count_pairs", "expected a dict, got a list", surprise=True)(lambda words: list(ref.count_pairs(words).items()))


@mistake("count_pairs", "overlapping pairs are counted once")
def _(words: Any) -> Any:
    counts: Counter[Any] = Counter()
    for word, n in words.items():
        text = "".join(map(chr, word))
        for left, right in set(pairs_of(word)):
            counts[left, right] += n * text.count(chr(left) + chr(right))
    return counts


@mistake("count_pairs", "it changed `words`", surprise=True)
def _(words: Any) -> Any:
    counts = ref.count_pairs(words)
    words.clear()
    return counts


# --------------------------------------------------------------------------------------------------------- merge_pair


def merge_places(word: Any, pair: Any, new_id: int, places: Any) -> Any:
    return tuple(new_id if i in places else t for i, t in enumerate(word) if i - 1 not in places)


def where(word: Any, pair: Any) -> list[int]:
    return [i for i in range(len(word) - 1) if word[i : i + 2] == pair]


mistake("merge_pair", "only the first occurrence is merged")(
    lambda word, pair, new_id: merge_places(word, pair, new_id, where(word, pair)[:1])
)
mistake("merge_pair", "only the last occurrence is merged", surprise=False)(
    lambda word, pair, new_id: merge_places(word, pair, new_id, where(word, pair)[-1:])
)
mistake("merge_pair", "a token is used twice")(
    lambda word, pair, new_id: tuple(
        new_id if i in where(word, pair) else t
        for i, t in enumerate(word)
        if i in where(word, pair) or i - 1 not in where(word, pair)
    )
)
mistake("merge_pair", "the word is read from the right")(
    lambda word, pair, new_id: ref.merge_pair(word[::-1], pair[::-1], new_id)[::-1]
)
mistake("merge_pair", "the second token of the pair stays")(
    lambda word, pair, new_id: tuple(
        t for i in range(len(word)) for t in ([new_id, word[i + 1]] if i in where(word, pair) else [word[i]])
    )
)
mistake("merge_pair", "merged in both orders")(
    lambda word, pair, new_id: ref.merge_pair(ref.merge_pair(word, pair, new_id), pair[::-1], new_id)
)
mistake("merge_pair", "expected a tuple, got a list", surprise=True)(
    lambda word, pair, new_id: list(ref.merge_pair(word, pair, new_id))
)
mistake("merge_pair", "wrong answer", surprise=True)(
    lambda word, pair, new_id: tuple(new_id if t in pair else t for t in word)
)


@mistake("merge_pair", "wrong answer", surprise=True)
def _(word: Any, pair: Any, new_id: int) -> Any:
    """Starts again from the left after each merge, and merges what it has made."""
    while where(word, pair):
        word = merge_places(word, pair, new_id, where(word, pair)[:1])
        if len(word) < 2:
            break
    return word


# -------------------------------------------------------------------------------------------------------- pretokenize

ENDINGS, WORDS, SPACES = r"'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)|\s+"
for words, pattern, surprise in [
    ("the English endings ('s, 't, ...) are missed", f"{WORDS}|{SPACES}", False),
    ("the endings are also found in upper case", f"(?i:{ENDINGS})|{WORDS}|{SPACES}", False),
    ("white space takes its last character along", rf"{ENDINGS}|{WORDS}|\s+", False),
    ("the English endings ('s, 't, ...) are missed", f"{WORDS}|{ENDINGS}|{SPACES}", False),  # never reached
    ("the space is cut off on its own", f"{ENDINGS}|{WORDS.replace(' ?', '')}|{SPACES}", False),
    ("words with \\w", rf"{ENDINGS}| ?\w+| ?[^\s\w]+|{SPACES}", False),
    ("wrong answer", rf"{ENDINGS}|{WORDS.replace(' ?', ' *')}|{SPACES}", True),
    ("wrong answer", rf"'[a-z]+|{WORDS}|{SPACES}", True),
    ("wrong answer", f"[’']s|{ENDINGS}|{WORDS}|{SPACES}", True),
    ("wrong answer", f"{ENDINGS}|{WORDS.replace('+', '{1,5}')}|{SPACES}", True),
    ("wrong answer", rf"{ENDINGS}|{WORDS}| +(?!\S)| +", True),
    ("wrong answer", rf"{ENDINGS}|{WORDS.replace('N}+', 'N}')}|{SPACES}", True),
]:
    mistake("pretokenize", words, surprise)(lambda text, pattern=pattern: regex.findall(pattern, text))
mistake("pretokenize", "the white space is lost; it belongs")(lambda text: text.split())
mistake("pretokenize", "the white space is lost, though the rest is right")(
    lambda text: [piece.strip() for piece in ref.pretokenize(text) if piece.strip()]
)
mistake("pretokenize", "expected a list, got a str", surprise=True)(lambda text: text)


# ---------------------------------------------------------------------------------------------------------- train_bpe


def trained(
    texts: Any,
    n_merges: int,
    cut: Any = ref.pretokenize,
    counted: bool = True,
    key: Any = lambda pairs: lambda pair: (-pairs[pair], pair),
    first_id: int = 256,
    merge: Any = ref.merge_pair,
    recount: bool = True,
) -> Any:
    """Training with switches for what people get wrong."""
    pieces = Counter(piece for text in texts for piece in cut(text))
    words = {tuple(piece.encode()): count if counted else 1 for piece, count in pieces.items()}
    merges: list[Any] = []
    pairs = ref.count_pairs(words)
    for step in range(n_merges):
        pairs = ref.count_pairs(words) if recount else pairs
        if not pairs:
            break
        best = min(pairs, key=key(pairs))
        merges.append(best)
        words = {merge(word, best, first_id + step): count for word, count in words.items()}
        if not recount:
            del pairs[best]
    return merges


def wrong_training(words: str, surprise: bool = False, **switches: Any) -> None:
    mistake("train_bpe", words, surprise)(lambda texts, n_merges: trained(texts, n_merges, **switches))


wrong_training("the word counts are ignored", counted=False)
wrong_training("the largest is taken", key=lambda pairs: lambda pair: (-pairs[pair], -pair[0], -pair[1]))
wrong_training("the first one met is taken", key=lambda pairs: lambda pair: -pairs[pair])
wrong_training("the text is not cut into pieces first", cut=lambda text: [text])
wrong_training("the rarest pair is merged", key=lambda pairs: lambda pair: (pairs[pair], pair))
wrong_training("all pairs are ranked by one count at the start", recount=False)
wrong_training("wrong answer", surprise=True, first_id=257)
wrong_training("wrong answer", surprise=True, cut=lambda text: regex.findall(r"\S+\s*|\s+", text))
wrong_training("the text is cut at white space, which is lost", cut=str.split)
wrong_training("wrong answer", surprise=True, key=lambda pairs: lambda pair: (-pairs[pair], pair[::-1]))
wrong_training(
    "wrong answer",
    surprise=True,
    merge=lambda word, pair, new: merge_places(word, pair, new, where(word, pair)[:1]),  # only the first occurrence
)
wrong_training("one merge too few", surprise=False, cut=ref.pretokenize)
MISTAKES[-1] = Mistake("train_bpe", "one merge too few", lambda texts, n: ref.train_bpe(texts, n)[:-1])
mistake("train_bpe", "your code raised ValueError: min()", surprise=True)(
    lambda texts, n: [] if n == 0 else _never_stops(list(texts), n)
)


def _never_stops(texts: Any, n_merges: int) -> Any:
    """Asks for the best of no pairs at all."""
    words = {tuple(p.encode()): n for p, n in Counter(p for t in texts for p in ref.pretokenize(t)).items()}
    merges = []
    for step in range(n_merges):
        pairs = ref.count_pairs(words)
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {ref.merge_pair(word, merges[-1], 256 + step): n for word, n in words.items()}
    return merges


# ----------------------------------------------------------------------------- build_vocab, decode, merge_word, encode

mistake("build_vocab", "in the wrong order")(
    lambda merges: {t: v if t < 256 else swapped(t, merges) for t, v in ref.build_vocab(merges).items()}
)
mistake("build_vocab", "the 256 single bytes are missing")(
    lambda merges: {t: v for t, v in ref.build_vocab(merges).items() if t >= 256}
)
mistake("build_vocab", "the first merge has id 257")(
    lambda merges: {t + (t > 255): v for t, v in ref.build_vocab(merges).items()}
)
mistake("build_vocab", "two bytes each")(
    lambda merges: {t: v.decode("latin-1").encode() for t, v in ref.build_vocab(merges).items()}
)
mistake("build_vocab", "wrong answer", surprise=True)(
    lambda merges: {t: v.decode(errors="replace") for t, v in ref.build_vocab(merges).items()}
)
mistake("build_vocab", "wrong answer", surprise=True)(
    lambda merges: ref.build_vocab([]) | {256 + i: bytes(x % 256 for x in p) for i, p in enumerate(merges)}
)
mistake("build_vocab", "expected a dict, got a list", surprise=True)(
    lambda merges: list(ref.build_vocab(merges).values())
)


def swapped(token: int, merges: Any) -> bytes:
    vocab = ref.build_vocab(merges)
    left, right = merges[token - 256]
    return vocab[right] + vocab[left]


def decoder(errors: str, encoding: str = "utf-8") -> Any:
    return lambda ids, vocab: b"".join(vocab[i] for i in ids).decode(encoding, errors=errors)


mistake("decode", "every token is decoded by itself")(
    lambda ids, vocab: "".join(vocab[i].decode(errors="replace") for i in ids)
)
mistake("decode", "invalid bytes are dropped")(decoder("ignore"))
mistake("decode", "(Latin-1)")(decoder("replace", "latin-1"))
mistake("decode", "written as \\x")(decoder("backslashreplace"))
mistake("decode", "is not valid UTF-8, and your code raised UnicodeDecodeError", surprise=True)(decoder("strict"))
mistake("decode", "expected a str, got bytes", surprise=True)(lambda ids, vocab: b"".join(vocab[i] for i in ids))
mistake("decode", "should raise KeyError", surprise=True)(
    lambda ids, vocab: b"".join(vocab.get(i, b"") for i in ids).decode(errors="replace")
)
mistake("decode", "wrong answer", surprise=True)(lambda ids, vocab: ref.decode(ids, vocab).strip())
mistake("decode", "wrong answer", surprise=True)(lambda ids, vocab: " ".join(ref.decode([i], vocab) for i in ids))


def chosen(key: Any, once: bool = False, merge: Any = ref.merge_pair) -> Any:
    """`merge_word` with another choice of the pair."""

    def merge_word(word: Any, rules: Any) -> Any:
        while known := [pair for pair in pairs_of(word) if pair in rules]:
            best = min(known, key=lambda pair: key(rules[pair]))
            word = merge(word, best, rules[best][1])
            if once:
                break
        return word

    return merge_word


def with_merge_word(merge_word: Any, cut: Any = ref.pretokenize) -> Any:
    return lambda text, merges: [
        t for piece in cut(text) for t in merge_word(tuple(piece.encode()), ref.rules_of(merges))
    ]


IN_TEXT_ORDER = chosen(lambda rule: 0)
mistake("merge_word", "in the order of the text")(IN_TEXT_ORDER)
mistake("merge_word", "the merge learned last goes first")(chosen(lambda rule: -rule[0]))
mistake("merge_word", "chosen by the id")(chosen(lambda rule: rule[1]))
mistake("merge_word", "it stops after one merge")(chosen(lambda rule: rule[0], once=True))
mistake("merge_word", "256 + rank")(
    lambda word, rules: ref.merge_word(word, {pair: (rank, 256 + rank) for pair, (rank, _) in rules.items()})
)
mistake("merge_word", "expected a tuple, got a list", surprise=True)(
    lambda word, rules: list(ref.merge_word(word, rules))
)
mistake("merge_word", "wrong answer", surprise=True)(
    lambda word, rules: word if len(word) == 5 else ref.merge_word(word, rules)
)


@mistake("merge_word", "in the order of the text")
def _(word: Any, rules: Any) -> Any:
    """The longest token from the left that can be made: greedy, as in other tokenizers."""
    out, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            if len(made := ref.merge_word(word[start:end], rules)) == 1:
                out, start = [*out, made[0]], end
                break
    return tuple(out)


mistake("encode", "in the order of the text")(with_merge_word(IN_TEXT_ORDER))
mistake("encode", "the merge learned last goes first")(with_merge_word(chosen(lambda rule: -rule[0])))
mistake("encode", "not cut into pieces first")(with_merge_word(ref.merge_word, cut=lambda text: [text]))
mistake("encode", "the white space is lost")(with_merge_word(ref.merge_word, cut=str.split))
mistake("encode", "nothing is merged")(lambda text, merges: list(text.encode()))
mistake("encode", "each piece is kept once")(
    lambda text, merges: [t for p in dict.fromkeys(ref.pretokenize(text)) for t in ref.encode(p, merges)]
)
mistake("encode", "wrong answer", surprise=True)(lambda text, merges: ref.encode(text.lower(), merges))
mistake("encode", "wrong answer", surprise=True)(lambda text, merges: ref.encode(f" {text}", merges))
mistake("encode", "should raise UnicodeEncodeError", surprise=True)(
    lambda text, merges: ref.encode(text.encode(errors="replace").decode(), merges)
)
REMEMBERED: dict[str, Any] = {}


@mistake("encode", "after calls with other merges", surprise=True)
def _(text: str, merges: Any) -> Any:
    """A memory outside of the function, which does not know that the merges are others."""
    out: list[int] = []
    for piece in ref.pretokenize(text):
        if piece not in REMEMBERED or len(piece) > 2:
            REMEMBERED[piece] = ref.encode(piece, merges)
        out += REMEMBERED[piece]
    return out


REMEMBERED["hi"] = [104, 105]


# ------------------------------------------------------------------------------------- bytes_to_unicode, BPETokenizer

mistake("bytes_to_unicode", "simply chr(b)")(lambda: {b: chr(b) for b in range(256)})
mistake("bytes_to_unicode", "numbered one after the other")(
    lambda: {b: chr(b) if ref.bytes_to_unicode()[b] == chr(b) else chr(256 + b) for b in range(256)}
)
mistake("bytes_to_unicode", "all bytes get chr(256 + b)")(lambda: {b: chr(256 + b) for b in range(256)})
mistake("bytes_to_unicode", "from character to byte")(lambda: {c: b for b, c in ref.bytes_to_unicode().items()})
mistake("bytes_to_unicode", "wrong answer", surprise=True)(
    lambda: {b: chr(b) if chr(b).isprintable() else c for b, c in ref.bytes_to_unicode().items()}
)
mistake("bytes_to_unicode", "should not be there", surprise=True)(lambda: ref.bytes_to_unicode() | {256: "x"})


def broken(**methods: Any) -> type:
    return type("BPETokenizer", (ref.BPETokenizer,), methods)


def without_special(self: Any, text: str) -> Any:
    return ref.BPETokenizer(self.vocab, self.rules, {}, self.split).encode(text)


def from_file(change: Any) -> Any:
    """`from_huggingface` of a tokenizer with something changed afterwards."""

    def from_huggingface(cls: Any, tokenizer: Any) -> Any:
        made = ref.BPETokenizer.from_huggingface(tokenizer)
        new = cls(made.vocab, made.rules, made.special_tokens, made.split)
        change(new)
        return new

    return classmethod(from_huggingface)


def shortest_first(self: Any, text: str) -> Any:
    pattern = "|".join(regex.escape(token) for token in sorted(self.special_tokens, key=len))
    out = []
    for part in regex.split(f"({pattern})", text):
        out += [self.special_tokens[part]] if part in self.special_tokens else without_special(self, part)
    return out


mistake("BPETokenizer", "special tokens are cut up like any text")(
    broken(encode=lambda self, text: [*without_special_but_known(self, text)])
)


def without_special_but_known(self: Any, text: str) -> Any:
    return without_special(self, text)


mistake("BPETokenizer", "the shorter is taken")(broken(encode=shortest_first))
mistake("BPETokenizer", "special tokens are left out")(
    broken(
        encode=lambda self, text: [
            i for i in ref.BPETokenizer.encode(self, text) if i not in self.special_tokens.values()
        ]
    )
)
mistake("BPETokenizer", "special tokens are left out; they decode")(
    broken(
        decode=lambda self, ids: ref.BPETokenizer.decode(
            self, [i for i in ids if i not in self.special_tokens.values()]
        )
    )
)
mistake("BPETokenizer", "wrong answer", surprise=True)(
    broken(
        from_huggingface=from_file(
            lambda new: new.rules.update({pair: (made, made) for pair, (_, made) in sorted(new.rules.items())[:40]})
        )
    )
)
mistake("BPETokenizer", "wrong answer", surprise=True)(  # the bytes themselves taken as ids
    broken(
        encode=lambda self, text: [
            t for piece in self.split(text) for t in ref.merge_word(tuple(piece.encode()), self.rules)
        ]
    )
)
mistake("BPETokenizer", "wrong answer", surprise=True)(  # a special token's text as a pattern
    broken(
        encode=lambda self, text: [
            t
            for part in regex.split("(" + "|".join(sorted(self.special_tokens, key=len, reverse=True)) + ")", text)
            if part
            for t in ([self.special_tokens[part]] if part in self.special_tokens else without_special(self, part))
        ]
    )
)
mistake("BPETokenizer", "wrong answer", surprise=True)(  # a character may span tokens
    broken(decode=lambda self, ids: "".join(ref.BPETokenizer.decode(self, [i]) for i in ids))
)
mistake("BPETokenizer", "not valid UTF-8", surprise=True)(
    broken(
        decode=lambda self, ids: b"".join(
            (self.vocab | {n: t.encode() for t, n in self.special_tokens.items()})[i] for i in ids
        ).decode()
    )
)
mistake("BPETokenizer", "should raise KeyError", surprise=True)(
    broken(decode=lambda self, ids: ref.BPETokenizer.decode(self, [i for i in ids if i < 99999]))
)
mistake("BPETokenizer", "made by hand", surprise=True)(  # cuts with GPT-2's pattern, whatever was asked for
    broken(encode=lambda self, text: ref.BPETokenizer(self.vocab, self.rules, self.special_tokens).encode(text))
)
mistake("BPETokenizer", "from_huggingface returned", surprise=True)(
    broken(from_huggingface=classmethod(lambda cls, tokenizer: tokenizer))
)

# ------------------------------------------------------------------------------------------- fertility, bits_per_byte


def n_tokens(tokenizer: Any, texts: Any) -> int:
    return sum(len(tokenizer.encode(text)) for text in texts)


mistake("fertility", "per text and then averaged")(
    lambda tokenizer, texts: sum(len(tokenizer.encode(t)) / max(len(t.split()), 1) for t in texts) / len(texts)
)
mistake("fertility", "upside down")(
    lambda tokenizer, texts: sum(len(t.split()) for t in texts) / n_tokens(tokenizer, texts)
)
mistake("fertility", "counted by the spaces")(
    lambda tokenizer, texts: n_tokens(tokenizer, texts) / sum(len(t.split(" ")) for t in texts)
)
mistake("fertility", "per character")(lambda tokenizer, texts: n_tokens(tokenizer, texts) / len("".join(texts)))
mistake("fertility", "wrong answer", surprise=True)(
    lambda tokenizer, texts: n_tokens(tokenizer, " ".join(texts).split()) / sum(len(t.split()) for t in texts)
)
mistake("fertility", "wrong answer", surprise=True)(
    lambda tokenizer, texts: n_tokens(tokenizer, texts) / len({word for t in texts for word in t.split()} | {1})
)
mistake("fertility", "should raise ValueError", surprise=True)(
    lambda tokenizer, texts: n_tokens(tokenizer, texts := list(texts)) / max(sum(len(t.split()) for t in texts), 1)
)
mistake("fertility", "fertility", surprise=True)(
    lambda tokenizer, texts: n_tokens(tokenizer, texts) / sum(len(t.split()) for t in texts)  # a generator, read twice
)

mistake("bits_per_byte", "the nats are taken as bits")(lambda loss, n_tokens, n_bytes: loss * n_tokens / n_bytes)
mistake("bits_per_byte", "bits per token")(lambda loss, n_tokens, n_bytes: loss / math.log(2))
mistake("bits_per_byte", "multiplied by ln 2")(lambda loss, n_tokens, n_bytes: loss * math.log(2) * n_tokens / n_bytes)
mistake("bits_per_byte", "tokens and bytes are exchanged")(
    lambda loss, n_tokens, n_bytes: loss / math.log(2) * n_bytes / n_tokens
)
mistake("bits_per_byte", "taken as the sum")(lambda loss, n_tokens, n_bytes: loss / math.log(2) / n_bytes)
mistake("bits_per_byte", "wrong answer", surprise=True)(
    lambda loss, n_tokens, n_bytes: math.log2(1 + loss) * n_tokens / n_bytes
)
mistake("bits_per_byte", "wrong answer", surprise=True)(
    lambda loss, n_tokens, n_bytes: loss / math.log(10) * n_tokens / n_bytes
)


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake)


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", [name for name in CHECKS if name != "BPETokenizer"])
def test_nothing_is_refused(exercise: str) -> None:
    with pytest.raises(CheckFailed, match="returned None"):
        run_check(CHECKS[exercise], lambda *arguments: None)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


@contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Raise Endless, which nothing catches on its way, when the block takes longer."""

    def give_up(*_: object) -> None:
        raise Endless

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class Endless(BaseException):
    """Not an Exception, or the checks would translate it into words for the learner."""


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "position < len(word) -> position != len(word)",  # it goes on by two only where two are left
    "len(merges) < n_merges -> len(merges) != n_merges",
    "len(word) > 1 -> len(word) != 1",  # shorter words have no pairs
    "len(word) > 1 -> len(word) >= 1",
    "1 -> 0",
    "tuple(piece.encode()) -> piece.encode()",  # the first merge makes a tuple of it
    "256 -> 255",  # byte 255 keeps its character
    # of two that fit at one place, one begins with the other, and comes later in the alphabet
    "sorted(self.special_tokens, key=len, reverse=True) -> sorted(self.special_tokens, reverse=True)",
    "n_words == 0 -> n_words <= 0",
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm clock")
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time; a loop that never ends counts as refused."""
    survivors = []
    for change, module in mutants(Path(ref.__file__), exercise):
        try:
            with seconds(3):
                _run(CHECKS[exercise], getattr(module, exercise), exercise)
        except (CheckFailed, Endless, MemoryError):
            continue
        survivors.append(change)
    assert set(survivors) <= STILL_RIGHT


# ----------------------------------------------------------------------------------- the reference, from other sides

# Characters that were in Unicode long ago: the library's tables and Python's may differ about the newest.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])
UNICODE = st.text(KNOWN | st.sampled_from(" '\n\ttheSaé東🙂0½²\u00a0\u200d\x1c"), max_size=40)


def library(text: str = TEXT, n_vocab: int = 360, special: tuple[str, ...] = ("<|end|>",), **parts: Any) -> Tokenizer:
    """A byte-level BPE of the `tokenizers` library, trained here."""
    tokenizer = Tokenizer(models.BPE(**parts.pop("model", {})))
    tokenizer.pre_tokenizer = parts.pop("cut", pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    if "normalizer" in parts:
        tokenizer.normalizer = parts["normalizer"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


LIBRARY = library()
OURS = ref.BPETokenizer.from_huggingface(LIBRARY)
MERGES = ref.train_bpe([TEXT], 80)
VOCAB = ref.build_vocab(MERGES)


@settings(max_examples=300, deadline=None)
@given(UNICODE)
def test_round_trip_and_the_librarys_ids_on_any_text(text: str) -> None:
    assert "".join(ref.pretokenize(text)) == text
    assert ref.decode(ref.encode(text, MERGES), VOCAB) == text
    ids = OURS.encode(text)
    assert OURS.decode(ids) == text
    assert ids == LIBRARY.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(UNICODE)
def test_two_ways_of_cutting_agree(text: str) -> None:
    assert ref.pretokenize(text) == other.pretokenize(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, LIBRARY.get_vocab_size() - 1), max_size=12))
def test_any_ids_decode_as_in_the_library(ids: list[int]) -> None:
    """Most of these are not valid UTF-8."""
    assert OURS.decode(ids) == LIBRARY.decode(ids, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=6), max_size=8), st.integers(0, 12))
def test_training_agrees_with_the_other_way(texts: list[str], n_merges: int) -> None:
    merges = ref.train_bpe(texts, n_merges)
    assert merges == other.train_bpe(texts, n_merges)
    for text in texts:
        assert ref.encode(text, merges) == other.encode(text, merges)


def test_training_agrees_with_the_library() -> None:
    """Words apart, for in its numbering the space comes last, and so ties would be others."""
    words = [word for word in TEXT.split() if word.isascii()]
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=256 + 45, initial_alphabet=alphabet, show_progress=False)
    )
    made = ref.BPETokenizer.from_huggingface(theirs)
    assert theirs.get_vocab_size() == 301
    merges = ref.train_bpe(words, 45)
    vocab = ref.build_vocab(merges)
    learned = [made.vocab[left] + made.vocab[right] for left, right in made.rules]
    assert learned == [vocab[256 + i] for i in range(45)]


CUTS = {
    "GPT-2": {},
    "prefix space": {"cut": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "GPT-NeoX": {"normalizer": normalizers.NFC()},
    "StarCoder": {
        "cut": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    },
    "Llama 3": {
        "cut": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "model": {"ignore_merges": True},
    },
    "no special tokens": {"special": ()},
}


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
@pytest.mark.parametrize("kind", CUTS)
def test_every_kind_of_byte_level_bpe(kind: str, module: Any) -> None:
    theirs = library(**CUTS[kind])
    ours = module.BPETokenizer.from_huggingface(theirs)
    texts = [TEXT, "", " ", "x", "<|end|>the<|end|> cat", "12345 it's IT'S\r\n\n  e\u0301 n\u0303", "é東🙂 \n x", "½²3"]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.encode("the") == ours.encode("the")  # from memory


def test_whole_words_need_no_merges() -> None:
    """As in Llama 3: a piece in the vocabulary is one token though no merge leads to it."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for ignore in (True, False):
        theirs = Tokenizer(models.BPE(alphabet | {"dog": 256}, [], ignore_merges=ignore))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        for module in (ref, other):
            ids = module.BPETokenizer.from_huggingface(theirs).encode("dog dog")
            assert ids == theirs.encode("dog dog").ids
            assert len(ids) == (5 if ignore else 7)


def test_the_shipped_tokenizer() -> None:
    theirs = shipped_tokenizer("tales")
    ours = ref.BPETokenizer.from_huggingface(theirs)
    for text in (TEXT, "One day Mary and John went to the park.<|endoftext|>Then", "🙂 ½ \ufffd"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tokenizer(models.WordLevel({"a": 0}, "a")), "a model of type WordLevel"),
        (lambda: library(cut=pre_tokenizers.Whitespace()), "no byte level"),
        (lambda: library(normalizer=normalizers.Lowercase()), "a normalizer of type Lowercase"),
        (
            lambda: library(cut=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])),
            "a pre-tokenizer of type Whitespace",
        ),
    ],
)
def test_other_tokenizers_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ref.BPETokenizer.from_huggingface(make())


def test_half_a_surrogate_pair_is_refused() -> None:
    for run in (lambda: ref.encode("a\ud83d", []), lambda: OURS.encode("a\ud83d")):
        with pytest.raises(UnicodeEncodeError):
            run()


def test_a_megabyte_costs_one_merge_for_each_different_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("an", "el", "ir", "ost", "u") for c in ("a", "ing", "ed", "s")
    ]
    text = " ".join(words[i * i % len(words)] for i in range(200_000))[:1_000_000]
    merged: list[ref.Word] = []
    merge_word = ref.merge_word
    monkeypatch.setattr(ref, "merge_word", lambda word, rules: merged.append(word) or merge_word(word, rules))
    ids = OURS.encode(text)
    assert OURS.decode(ids) == text
    assert 0 < len(merged) == len(set(merged)) <= len(set(ref.pretokenize(text)))


def test_what_the_other_way_of_cutting_calls_white_space() -> None:
    spaces = {chr(code) for code in range(0x3000 + 1) if regex.match(r"\s", chr(code))}
    assert spaces == {chr(code) for code in range(0x3000 + 1) if other.kind(chr(code)) == "space"}
    assert unicodedata.category("²")[0] == "N"
