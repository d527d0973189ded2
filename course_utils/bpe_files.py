"""Read what a Hugging Face tokenizer file says about byte-level BPE, and refuse what is not that; GPT-2's own files."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import regex

Split = Callable[[str], list[str]]
DIGITS = r"\p{N}"


class ByteLevelBPE(NamedTuple):
    """The parts of a tokenizer file; tokens are written one character per byte."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    special_tokens: dict[str, int]
    split: Split
    whole_words: bool  # a pre-token that is in the vocabulary is one token, whatever the merges say


def read_byte_level_bpe(tokenizer: Any, gpt2_split: Split) -> ByteLevelBPE:
    """The parts of a tokenizer of `tokenizers`, or of a fast one of `transformers`.

    Where the file asks for GPT-2's way of cutting a text, that is `gpt2_split`. Raises ValueError, naming the part, for
    whatever would give other ids than a byte-level BPE as taught here.
    """
    file = json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    model = file["model"]
    for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _need(not model.get(part), f"a model with {part}")
    _need(model.get("type") == "BPE", f"a model of type {model.get('type')}")
    for added in file["added_tokens"]:
        for flag in ("single_word", "lstrip", "rstrip"):
            _need(not added[flag], f"the added token {added['content']!r} with {flag}")
        found_late = added["normalized"] and not _normal_everywhere(added["content"], file["normalizer"])
        _need(not found_late, f"the added token {added['content']!r}, which it looks for in the normalised text")
    special_tokens = {added["content"]: added["id"] for added in file["added_tokens"]}
    halves = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]  # older files: "a b"
    merges = [(left, right) for left, right in halves]
    vocab = {text: number for text, number in model["vocab"].items() if text not in special_tokens}
    steps = [_normalizer(file["normalizer"]), *_splitters(file["pre_tokenizer"], gpt2_split)]

    def split(text: str) -> list[str]:
        pieces = [text]
        for step in steps:
            pieces = [part for piece in pieces for part in step(piece) if part]
        return pieces

    return ByteLevelBPE(vocab, merges, special_tokens, split, bool(model.get("ignore_merges")))


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"This tokenizer has {what}; only byte-level BPE, as in GPT-2, can be read.")


def _normal_everywhere(content: str, normalizer: Any) -> bool:
    """Whether a text holds `content` at the same places before and after it is normalised.

    So it is for the runs of blanks that GPT-NeoX has: nothing becomes a blank but under NFKC and NFKD, and no accent
    joins one. Anything else may appear, or disappear.
    """
    return normalizer is None or (normalizer["type"] in ("NFC", "NFD") and not content.strip(" \n\t"))


def _normalizer(part: Any) -> Split:
    if part is None:
        return lambda text: [text]
    form = part["type"]
    _need(form in ("NFC", "NFD", "NFKC", "NFKD"), f"a normalizer of type {form}")
    return lambda text: [unicodedata.normalize(form, text)]


def _splitters(part: Any, gpt2_split: Split) -> list[Split]:
    """The steps by which a text is cut; the last one must be ByteLevel, which makes characters into bytes."""
    parts = part["pretokenizers"] if part and part["type"] == "Sequence" else [part]
    _need(bool(parts[-1]) and parts[-1]["type"] == "ByteLevel", "no byte level")
    steps: list[Split] = []
    for one in parts[:-1]:
        if one["type"] == "Digits":
            steps.append(_isolate(DIGITS if one["individual_digits"] else f"{DIGITS}+"))
        else:
            _need(one["type"] == "Split", f"a pre-tokenizer of type {one['type']}")
            _need(one["behavior"] == "Isolated" and not one["invert"], "a split that is not isolated")
            (kind, pattern), *_ = one["pattern"].items()
            steps.append(_isolate(pattern if kind == "Regex" else regex.escape(pattern)))
    if parts[-1]["add_prefix_space"]:
        steps.append(lambda text: [text if text.startswith(" ") else f" {text}"])
    if parts[-1]["use_regex"]:
        steps.append(gpt2_split)
    return steps


def _isolate(pattern: str) -> Split:
    """Cut out every match, and keep what stands between the matches."""
    compiled = regex.compile(pattern)

    def split(text: str) -> list[str]:
        pieces, position = [], 0
        for match in compiled.finditer(text):
            pieces += [text[position : match.start()], match[0]]
            position = match.end()
        return [*pieces, text[position:]]

    return split


def gpt2_tokenizer(folder: Path) -> Any:
    """The library's tokenizer made from GPT-2's own two files, those of `course models fetch gpt2-vocabulary`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
    )
