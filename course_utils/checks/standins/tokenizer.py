"""Tokenizers that stand in for a learner's, or for any."""

from typing import Any


class FromLibrary:
    """A tokenizer of the `tokenizers` library in the dress of a `BPETokenizer`."""

    def __init__(self, library: Any) -> None:
        self.library = library

    @classmethod
    def from_huggingface(cls, library: Any) -> "FromLibrary":
        return cls(library)

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)


class TwoCharacters:
    """A tokenizer for which two characters are a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(text[i]) for i in range(0, len(text), 2)]
