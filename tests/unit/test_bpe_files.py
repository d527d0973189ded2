"""Added tokens and normalisers: the ids are those of the library, or the tokenizer is refused with a reason."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from solutions.ch01_tokenization import BPETokenizer


def adding(content: str, normalizer: Any, normalized: bool = True) -> Tokenizer:
    """A tokenizer of single bytes with one added token."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens([AddedToken(content, normalized=normalized)])
    return tokenizer


@pytest.mark.parametrize(
    ("content", "normalizer", "normalized"),
    [
        ("<pad>", None, True),
        ("<pad>", normalizers.NFKC(), False),
        ("   ", normalizers.NFC(), True),  # as in GPT-NeoX and Pythia
        ("\n\n", normalizers.NFD(), True),
    ],
)
def test_added_tokens_that_stand_at_the_same_places_in_any_case(
    content: str, normalizer: Any, normalized: bool
) -> None:
    theirs = adding(content, normalizer, normalized)
    ours = BPETokenizer.from_huggingface(theirs)
    for text in (f"a{content}b", f"{content}\u0338 e\u0301", "\uff1cpad\uff1e \u2003 \u00a0\u00a0\u00a0 \n\n\u0301"):
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    ("content", "normalizer", "text"),
    [
        ("é!", normalizers.NFC(), "e\u0301!"),  # stands in the text only after it was normalised
        ("<pad>", normalizers.NFKC(), "\uff1cpad\uff1e"),
        ("  ", normalizers.NFKC(), "\u00a0\u00a0"),
        ("<pad>", normalizers.NFC(), "<pad>\u0338"),  # only before: together with the accent, > is another character
    ],
)
def test_added_tokens_that_normalising_makes_or_unmakes_are_refused(content: str, normalizer: Any, text: str) -> None:
    theirs = adding(content, normalizer)
    added = theirs.token_to_id(content)
    assert (added in theirs.encode(text).ids) != (content in text)  # so taking the text as it is would be wrong
    with pytest.raises(ValueError, match="which it looks for in the normalised text"):
        BPETokenizer.from_huggingface(theirs)
