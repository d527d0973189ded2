"""The tokenizer of every model trained on tales: byte-level BPE, learned from the stories themselves."""

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from course_utils.data import tales

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1152  # bytes, the special token and 895 merges: enough for every name to be one token
N_STORIES = 50_000


def train_tokenizer(vocabulary: int = VOCABULARY, n_stories: int = N_STORIES) -> "PreTrainedTokenizerFast":
    """Learn the merges from seeded stories."""
    return tokenizer_for((story.text for story in islice(tales.stream(seed=0), n_stories)), vocabulary)


def tokenizer_for(texts: Iterable[str], vocabulary: int) -> "PreTrainedTokenizerFast":
    """Learn the merges from these texts. The one special token begins a text, ends it, and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
