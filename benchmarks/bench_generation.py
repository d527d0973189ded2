"""Text from our transformer in the shape of GPT-2 small, random weights: with a key-value cache, and against others."""

import pytest
import torch
from torch import Tensor

from course_utils.config import TransformerConfig
from solutions.ch02_transformer import KVCache, Transformer, beam_search, convert_gpt2_weights, generate, greedy

CFG = TransformerConfig(d_vocab=50257, n_ctx=1024, n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072)
N_PROMPT, N_NEW = 32, 32
ROUNDS = {1: 7, 8: 5}


@pytest.fixture(scope="module")
def theirs():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # Tied embeddings and fresh weights would say the same token again and again.
    return GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa", tie_word_embeddings=False)).eval()


@pytest.fixture(scope="module")
def ours(theirs) -> Transformer:
    model = Transformer(CFG).eval()
    model.load_state_dict(convert_gpt2_weights(theirs.state_dict(), CFG))
    return model


def some_tokens(batch: int) -> Tensor:
    return torch.randint(CFG.d_vocab, (batch, N_PROMPT), generator=torch.Generator().manual_seed(0))


def ours_with_cache(model: Transformer, tokens: Tensor) -> Tensor:
    return generate(model, tokens, N_NEW, greedy, cache=KVCache(CFG, batch=len(tokens)))


def generate_theirs(model, tokens: Tensor, **options) -> Tensor:
    options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(tokens, max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False, **options)


@pytest.mark.parametrize("batch", [1, 8])
def test_generate(race, ours: Transformer, theirs, batch: int) -> None:
    tokens = some_tokens(batch)
    written = ours_with_cache(ours, tokens)
    assert torch.equal(written, generate_theirs(theirs, tokens))
    assert len(written.unique()) > N_PROMPT * batch  # not the same token again and again
    race(
        f"generate {batch}x({N_PROMPT}+{N_NEW})",
        lambda: ours_with_cache(ours, tokens),
        {"transformers generate (cached)": (lambda: generate_theirs(theirs, tokens), "<= 1.0")},
        ROUNDS[batch],
    )


def test_cache(race, ours: Transformer) -> None:
    tokens = some_tokens(1)
    assert torch.equal(ours_with_cache(ours, tokens), generate(ours, tokens, N_NEW, greedy))
    race(
        f"generate 1x({N_PROMPT}+{N_NEW}), cached",
        lambda: ours_with_cache(ours, tokens),
        {"the same without a cache": (lambda: generate(ours, tokens, N_NEW, greedy), "< 1")},
        3,
    )


def test_beam_search(race, ours: Transformer, theirs) -> None:
    tokens = some_tokens(1)

    def search() -> Tensor:
        return beam_search(ours, tokens, 4, N_NEW, cache=KVCache(CFG, batch=1))[0][1]

    assert torch.equal(search(), generate_theirs(theirs, tokens, num_beams=4)[0])
    race(
        f"beam search 1x({N_PROMPT}+{N_NEW}), 4 beams",
        search,
        {"transformers generate (num_beams=4)": (lambda: generate_theirs(theirs, tokens, num_beams=4), "<= 1.0")},
        3,
    )
