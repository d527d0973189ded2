"""Our transformer in the shape of GPT-2 small, with random weights, against transformers and against the arithmetic."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from course_utils.config import TransformerConfig
from course_utils.hooks import hooks, run_with_cache
from solutions.ch02_transformer import Transformer, convert_gpt2_weights

CFG = TransformerConfig(d_vocab=50257, n_ctx=1024, n_layers=12, n_heads=12, d_model=768, d_head=64, d_mlp=3072)
N_POS = 128
ROUNDS = {1: 15, 8: 7}


@pytest.fixture(scope="module")
def theirs():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()


@pytest.fixture(scope="module")
def ours(theirs) -> Transformer:
    model = Transformer(CFG).eval()
    model.load_state_dict(convert_gpt2_weights(theirs.state_dict(), CFG))
    return model


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def some_tokens(batch: int) -> Tensor:
    return torch.randint(CFG.d_vocab, (batch, N_POS), generator=torch.Generator().manual_seed(0))


def matrix_multiplications(batch: int) -> Callable[[], None]:
    """Every product of one forward pass, and nothing else; the outputs go to memory that is already there."""
    d_heads, n_rows = CFG.n_heads * CFG.d_head, batch * N_POS
    sizes = [(CFG.d_model, 3 * d_heads), (d_heads, CFG.d_model), (CFG.d_model, CFG.d_mlp), (CFG.d_mlp, CFG.d_model)]
    weights = [torch.randn(size) for size in sizes * CFG.n_layers] + [torch.randn(CFG.d_model, CFG.d_vocab)]
    inputs = {weight.shape[0]: torch.randn(n_rows, weight.shape[0]) for weight in weights}
    outputs = {weight.shape[1]: torch.empty(n_rows, weight.shape[1]) for weight in weights}
    q, scores = torch.randn(batch * CFG.n_heads, N_POS, CFG.d_head), torch.empty(batch * CFG.n_heads, N_POS, N_POS)
    k, z = torch.randn(batch * CFG.n_heads, CFG.d_head, N_POS), torch.empty_like(q)

    def multiply() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])
        for _ in range(CFG.n_layers):
            torch.bmm(q, k, out=scores)
            torch.bmm(scores, q, out=z)

    return multiply


@pytest.mark.parametrize("batch", [1, 8])
def test_forward(race, ours: Transformer, theirs, batch: int) -> None:
    tokens = some_tokens(batch)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    race(
        f"forward {batch}x{N_POS}",
        lambda: ours(tokens),
        {
            "transformers (sdpa)": (lambda: theirs(tokens, use_cache=False), "<= 1.0"),
            "matrix multiplications alone": (matrix_multiplications(batch), "1.0 to 1.25"),
        },
        ROUNDS[batch],
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_everything_cached(race, ours: Transformer, batch: int) -> None:
    tokens = some_tokens(batch)

    def explicit_forward() -> None:
        with hooks(ours, {"*.hook_pattern": lambda pattern, hook: None}):  # watched, so no fused kernel
            ours(tokens)

    race(
        f"everything cached {batch}x{N_POS}",
        lambda: run_with_cache(ours, tokens),
        {"forward with explicit attention": (explicit_forward, "<= 1.1")},
        ROUNDS[batch],
    )
