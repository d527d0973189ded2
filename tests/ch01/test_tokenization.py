"""Chapter 01's checks against surprises, and the reference from other sides.

A surprise is a wrong answer that a check does not know, or whose refusal is written by hand.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import solutions.ch01_tokenization as ref
from course_utils.checks import CheckFailed, find_checks, run_check
from course_utils.checks.ch01.slow_bpe import TEXT
from course_utils.checks.ch01.tokenization import ENDINGS, SPACES, WORDS, by_pattern, replaced, where
from course_utils.pretrained import shipped_tokenizer
from tests.ch01 import other_tokenization as other
from tests.ch01 import subtle, unusual

CHECKS = find_checks()["01"]
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in CHECKS}
SECRETS = ("findall(", "pairwise(", "enumerate(", ".append(")

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

# ------------------------------------------------------------------------------------------------- learning the merges


def emptied(words: Any) -> Any:
    counts = ref.count_pairs(words)
    words.clear()
    return counts


def again_and_again(word: Any, pair: Any, new_id: int) -> Any:
    """Starts again from the left after each merge, and merges what it has made."""
    while where(word, pair):
        word = replaced(word, where(word, pair)[:1], new_id)
    return word


def trained(
    texts: Any,
    n_merges: int,
    cut: Any = ref.pretokenize,
    key: Callable[[Any], Any] = lambda pair: pair,
    first_id: int = 256,
    merge: Any = ref.merge_pair,
) -> Any:
    """Training with switches for what people get wrong; it asks for the best pair even where there is none."""
    words = {tuple(p.encode()): n for p, n in Counter(piece for text in texts for piece in cut(text)).items()}
    merges: list[Any] = []
    for new_id in range(first_id, first_id + n_merges):
        pairs = ref.count_pairs(words)
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], key(pair))))
        words = {merge(word, merges[-1], new_id): count for word, count in words.items()}
    return merges


def wrong_training(**switches: Any) -> Any:
    return lambda texts, n_merges: trained(texts, n_merges, **switches)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "count_pairs": [
        ("wrong answer", lambda words: Counter({p: n * w.count(p[0]) for w, n in words.items() for p in pairwise(w)})),
        (
            "(7, 7) is missing: expected 6",
            lambda words: Counter({p: n for p, n in ref.count_pairs(words).items() if p[0] != p[1]}),
        ),
        ("expected a dict, got a list", lambda words: list(ref.count_pairs(words).items())),
        ("it changed `words`", emptied),
    ],
    "merge_pair": [
        ("expected a tuple, got a list", lambda word, pair, new_id: list(ref.merge_pair(word, pair, new_id))),
        ("wrong answer", lambda word, pair, new_id: tuple(new_id if t in pair else t for t in word)),
        ("wrong answer", again_and_again),
    ],
    "pretokenize": [
        ("wrong answer", by_pattern(ENDINGS, WORDS.replace(" ?", " *"), SPACES)),
        ("wrong answer", by_pattern("'[a-z]+", WORDS, SPACES)),
        ("wrong answer", by_pattern("[’']s", ENDINGS, WORDS, SPACES)),
        ("wrong answer", by_pattern(ENDINGS, WORDS.replace("+", "{1,5}"), SPACES)),
        ("wrong answer", by_pattern(ENDINGS, WORDS, r" +(?!\S)| +")),
        ("wrong answer", by_pattern(ENDINGS, WORDS.replace("N}+", "N}"), SPACES)),
        ("expected a list, got a str", lambda text: text),
    ],
    "train_bpe": [
        ("wrong answer", wrong_training(first_id=257)),
        ("wrong answer", wrong_training(cut=lambda text: regex.findall(r"\S+\s*|\s+", text))),
        ("wrong answer", wrong_training(key=lambda pair: pair[::-1])),
        # only the first occurrence in each word
        ("wrong answer", wrong_training(merge=lambda word, pair, new: replaced(word, where(word, pair)[:1], new))),
        ("your code raised ValueError: min()", trained),
    ],
}

# ------------------------------------------------------------------------------------------------ applying the merges


def swapped(token: int, merges: Any) -> bytes:
    """The last two parts in the wrong order."""
    vocab = ref.build_vocab(merges)
    left, right = merges[token - 256]
    return vocab[right] + vocab[left]


REMEMBERED: dict[str, Any] = {"hi": [104, 105]}


def from_memory(text: str, merges: Any) -> Any:
    """A memory outside of the function, which does not know that the merges are others."""
    out: list[int] = []
    for piece in ref.pretokenize(text):
        if piece not in REMEMBERED or len(piece) > 2:
            REMEMBERED[piece] = ref.encode(piece, merges)
        out += REMEMBERED[piece]
    return out


SURPRISES |= {
    "build_vocab": [
        ("wrong answer", lambda merges: {t: v.decode(errors="replace") for t, v in ref.build_vocab(merges).items()}),
        (
            "wrong answer",
            lambda merges: ref.build_vocab([]) | {256 + i: bytes(x % 256 for x in p) for i, p in enumerate(merges)},
        ),
        (
            "wrong answer",
            lambda merges: {t: v if t < 256 else swapped(t, merges) for t, v in ref.build_vocab(merges).items()},
        ),
        ("expected a dict, got a list", lambda merges: list(ref.build_vocab(merges).values())),
    ],
    "decode": [
        (
            "is not valid UTF-8, and your code raised UnicodeDecodeError",
            lambda ids, vocab: b"".join(vocab[i] for i in ids).decode(),
        ),
        ("expected a str, got bytes", lambda ids, vocab: b"".join(vocab[i] for i in ids)),
        (
            "should raise KeyError",
            lambda ids, vocab: b"".join(vocab.get(i, b"") for i in ids).decode(errors="replace"),
        ),
        ("wrong answer", lambda ids, vocab: ref.decode(ids, vocab).strip()),
        ("wrong answer", lambda ids, vocab: " ".join(ref.decode([i], vocab) for i in ids)),
    ],
    "merge_word": [
        ("expected a tuple, got a list", lambda word, rules: list(ref.merge_word(word, rules))),
        ("wrong answer", lambda word, rules: word if len(word) == 5 else ref.merge_word(word, rules)),
    ],
    "encode": [
        ("wrong answer", lambda text, merges: ref.encode(text.lower(), merges)),
        ("wrong answer", lambda text, merges: ref.encode(f" {text}", merges)),
        (
            "should raise UnicodeEncodeError",
            lambda text, merges: ref.encode(text.encode(errors="replace").decode(), merges),
        ),
        ("after calls with other merges", from_memory),
    ],
}

# ------------------------------------------------------------------------------------------------ somebody else's files


def broken(**methods: Any) -> type:
    return type("BPETokenizer", (ref.BPETokenizer,), methods)


def from_file(change: Any) -> Any:
    """`from_huggingface` of a tokenizer with something changed afterwards."""

    def from_huggingface(cls: Any, tokenizer: Any) -> Any:
        made = ref.BPETokenizer.from_huggingface(tokenizer)
        new = cls(made.vocab, made.rules, made.special_tokens, made.split)
        change(new)
        return new

    return classmethod(from_huggingface)


def special_as_patterns(self: Any, text: str) -> Any:
    """A special token's text is taken for a pattern."""
    out = []
    plain = ref.BPETokenizer(self.vocab, self.rules, {}, self.split)
    for part in regex.split("(" + "|".join(sorted(self.special_tokens, key=len, reverse=True)) + ")", text):
        out += [self.special_tokens[part]] if part in self.special_tokens else plain.encode(part or "")
    return out


def bytes_as_ids(self: Any, text: str) -> Any:
    return [t for piece in self.split(text) for t in ref.merge_word(tuple(piece.encode()), self.rules)]


def decoded_strictly(self: Any, ids: Any) -> str:
    texts = self.vocab | {number: text.encode() for text, number in self.special_tokens.items()}
    return b"".join(texts[i] for i in ids).decode()


SURPRISES |= {
    "bytes_to_unicode": [
        (
            "wrong answer",
            lambda: {b: chr(b) if chr(b).isprintable() else c for b, c in ref.bytes_to_unicode().items()},
        ),
        ("should not be there", lambda: ref.bytes_to_unicode() | {256: "x"}),
    ],
    "BPETokenizer": [
        (
            "wrong answer",
            broken(
                from_huggingface=from_file(
                    lambda new: new.rules.update({p: (made, made) for p, (_, made) in sorted(new.rules.items())[:40]})
                )
            ),
        ),
        ("wrong answer", broken(encode=bytes_as_ids)),
        ("wrong answer", broken(encode=special_as_patterns)),
        # a character may span tokens
        ("wrong answer", broken(decode=lambda self, ids: "".join(ref.BPETokenizer.decode(self, [i]) for i in ids))),
        ("not valid UTF-8", broken(decode=decoded_strictly)),
        (
            "should raise KeyError",
            broken(decode=lambda self, ids: ref.BPETokenizer.decode(self, [i for i in ids if i < 99999])),
        ),
        (  # cuts with GPT-2's pattern, whatever was asked for
            "made by hand",
            broken(
                encode=lambda self, text: ref.BPETokenizer(self.vocab, self.rules, self.special_tokens).encode(text)
            ),
        ),
        ("from_huggingface returned", broken(from_huggingface=classmethod(lambda cls, tokenizer: tokenizer))),
    ],
}

# -------------------------------------------------------------------------------------------------------- the measures


def n_tokens(tokenizer: Any, texts: Any) -> int:
    return sum(len(tokenizer.encode(text)) for text in texts)


SURPRISES |= {
    "fertility": [
        (
            "wrong answer",
            lambda toy, texts: n_tokens(toy, " ".join(texts).split()) / sum(len(t.split()) for t in texts),
        ),
        (
            "wrong answer",
            lambda toy, texts: n_tokens(toy, texts) / len({word for t in texts for word in t.split()} | {1}),
        ),
        (
            "should raise ValueError",
            lambda toy, texts: n_tokens(toy, texts := list(texts)) / max(sum(len(t.split()) for t in texts), 1),
        ),
        # a generator, read twice
        ("your code raised ZeroDivisionError", lambda toy, ts: n_tokens(toy, ts) / sum(len(t.split()) for t in ts)),
    ],
    "bits_per_byte": [
        ("wrong answer", lambda loss, tokens, n_bytes: math.log2(1 + loss) * tokens / n_bytes),
        ("wrong answer", lambda loss, tokens, n_bytes: loss / math.log(10) * tokens / n_bytes),
    ],
}


SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}


@pytest.mark.parametrize("exercise", [name for name in CHECKS if name != "BPETokenizer"])
def test_nothing_is_refused(exercise: str) -> None:
    with pytest.raises(CheckFailed, match="returned None"):
        run_check(CHECKS[exercise], lambda *arguments: None)


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
