"""A tokenizer that decodes, as the `transformers` library's do."""

from typing import Any

from torch import Tensor


class ToyTokenizer:
    """A vocabulary of thirteen pieces, with the ways in which people decode."""

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
