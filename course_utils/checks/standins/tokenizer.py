"""Tokenizers that stand in for a learner's, or for any."""

from typing import Any

from torch import Tensor


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


class ToyTokenizer:
    """A vocabulary of thirteen pieces, with the ways of the `transformers` library to decode."""

    bos_token_id = eos_token_id = 0
    pieces = ("<|end|>", *(f" {word}" for word in "ash bay cow den elm fig gum hen ivy jay kid log".split()))

    def decode(self, ids: Any, **kwargs: Any) -> str:
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return "".join(self.pieces[i] for i in ([ids] if isinstance(ids, int) else ids))

    def batch_decode(self, rows: Any, **kwargs: Any) -> list[str]:
        return [self.decode(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]

    def convert_ids_to_tokens(self, ids: Any, **kwargs: Any) -> Any:
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        texts = [self.decode(i).replace(" ", "Ġ") for i in ([ids] if isinstance(ids, int) else ids)]
        return texts[0] if isinstance(ids, int) else texts
