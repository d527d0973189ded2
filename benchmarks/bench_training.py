"""A training step of ours against one of transformers, our AdamW against torch's, and both against the arithmetic.

The rivals have the same shape, weights, batch, loss and clipping, no dropout, and embeddings that are not tied.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from course_utils.config import TransformerConfig
from solutions.ch02_transformer import Transformer, convert_gpt2_weights
from solutions.ch03_training import AdamW, lm_loss, parameter_groups, train_step

TALES = TransformerConfig(d_vocab=1152, n_ctx=96, n_layers=4, n_heads=8, d_model=128, d_head=16, d_mlp=512)
LARGER = TransformerConfig(d_vocab=8192, n_ctx=128, n_layers=6, n_heads=6, d_model=384, d_head=64, d_mlp=1536)
CASES = [pytest.param(TALES, 16, 15, id="tales"), pytest.param(LARGER, 4, 7, id="larger")]


def hugging_face(cfg: TransformerConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=cfg.d_vocab,
        n_positions=cfg.n_ctx,
        n_embd=cfg.d_model,
        n_layer=cfg.n_layers,
        n_head=cfg.n_heads,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    return GPT2LMHeadModel(config).train()


def matrix_multiplications(cfg: TransformerConfig, batch: int) -> Callable[[], None]:
    """Every product of one forward and one backward pass, and nothing else, into memory that is already there.

    For Y = X W these are Y itself, dX = dY W^T and dW = X^T dY: three of the same size.
    """
    d_heads, n_rows = cfg.n_heads * cfg.d_head, batch * cfg.n_ctx
    sizes = [(cfg.d_model, 3 * d_heads), (d_heads, cfg.d_model), (cfg.d_model, cfg.d_mlp), (cfg.d_mlp, cfg.d_model)]
    weights = [torch.randn(size) for size in sizes * cfg.n_layers] + [torch.randn(cfg.d_model, cfg.d_vocab)]
    rows = {width: torch.randn(n_rows, width) for weight in weights for width in weight.shape}
    into = {width: torch.empty(n_rows, width) for width in rows}
    gradients = {weight.shape: torch.empty(weight.shape) for weight in weights}
    q = torch.randn(batch * cfg.n_heads, cfg.n_ctx, cfg.d_head)
    scores = torch.empty(batch * cfg.n_heads, cfg.n_ctx, cfg.n_ctx)
    k, z = torch.randn(batch * cfg.n_heads, cfg.d_head, cfg.n_ctx), torch.empty_like(q)

    def multiply() -> None:
        for weight in weights:
            width_in, width_out = weight.shape
            torch.mm(rows[width_in], weight, out=into[width_out])
            torch.mm(rows[width_out], weight.T, out=into[width_in])
            torch.mm(rows[width_in].T, rows[width_out], out=gradients[weight.shape])
        for _ in range(3 * cfg.n_layers):
            torch.bmm(q, k, out=scores)
            torch.bmm(scores, q, out=z)

    return multiply


@pytest.mark.parametrize(("cfg", "batch", "rounds"), CASES)
def test_training_step(race, benchmark, capsys, cfg: TransformerConfig, batch: int, rounds: int) -> None:
    tokens = torch.randint(cfg.d_vocab, (batch, cfg.n_ctx), generator=torch.Generator().manual_seed(0))
    theirs = hugging_face(cfg)
    ours = Transformer(cfg)
    ours.load_state_dict(convert_gpt2_weights(theirs.state_dict(), cfg))
    half = copy.deepcopy(ours)
    torch.testing.assert_close(lm_loss(ours(tokens), tokens), theirs(tokens, labels=tokens).loss, rtol=1e-4, atol=1e-4)
    optimizer = AdamW(parameter_groups(ours, 0.01), lr=1e-4)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    half_optimizer = torch.optim.AdamW(parameter_groups(half, 0.01), lr=1e-4)

    def their_step() -> None:
        their_optimizer.zero_grad()
        loss = theirs(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        loss.item()

    race(
        f"training step {batch}x{cfg.n_ctx}, d_model {cfg.d_model}",
        lambda: train_step(ours, optimizer, tokens, max_norm=1.0),
        {
            "transformers, torch's AdamW": (their_step, "<= 1.0"),
            "ours with torch's AdamW": (lambda: train_step(half, half_optimizer, tokens, max_norm=1.0), "about 1.0"),
            "matrix multiplications alone": (matrix_multiplications(cfg, batch), "reported"),
        },
        rounds,
    )
    speed = tokens.numel() / benchmark.stats.stats.median
    benchmark.extra_info["tokens per second"] = speed
    with capsys.disabled():
        print(f"\n{speed:,.0f} tokens per second (d_model {cfg.d_model}, {torch.get_num_threads()} threads)")


@pytest.mark.parametrize(("cfg", "batch", "rounds"), CASES)
def test_optimizer(race, cfg: TransformerConfig, batch: int, rounds: int) -> None:
    def with_gradients() -> Transformer:
        model = Transformer(cfg)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return model

    def optimizer_of(kind: Callable[..., object], **options: object) -> Callable[[], object]:
        return kind(parameter_groups(with_gradients(), 0.01), lr=1e-4, **options).step  # type: ignore[attr-defined]

    race(
        f"AdamW.step, d_model {cfg.d_model}",
        optimizer_of(AdamW),
        {
            "torch's AdamW": (optimizer_of(torch.optim.AdamW), "<= 1.1"),
            "torch's AdamW, fused": (optimizer_of(torch.optim.AdamW, fused=True), "reported"),
        },
        3 * rounds,
    )
