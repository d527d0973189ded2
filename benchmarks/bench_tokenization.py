"""Our byte-level BPE against the `tokenizers` library: the same tokenizer, one megabyte of text."""

from itertools import islice
from pydoc_data.topics import topics

import pytest

from course_utils.data import tales
from course_utils.pretrained import shipped_tokenizer
from solutions.ch01_tokenization import BPETokenizer

MEGABYTE = 1_000_000
TEXTS = {
    "stories": "\n".join(story.text for story in islice(tales.stream(seed=0), 9_000))[:MEGABYTE],
    "Python's manual": "".join(topics[name] for name in sorted(topics) * 3)[:MEGABYTE],  # many words it never learned
}


@pytest.mark.parametrize("kind", TEXTS)
def test_encode(race, kind: str) -> None:
    text, tokenizer = TEXTS[kind], shipped_tokenizer("tales")
    theirs = tokenizer.backend_tokenizer
    ours = BPETokenizer.from_huggingface(tokenizer)
    assert len(text.encode()) == pytest.approx(MEGABYTE, rel=0.01)
    assert ours.encode(text) == theirs.encode(text).ids

    def with_empty_memory() -> None:
        ours.known.clear()
        ours.encode(text)

    race(f"encode 1 MB, {kind}", with_empty_memory, {"tokenizers": (lambda: theirs.encode(text), "a few seconds")}, 5)
