"""Looking does not change a model, in any dtype: the watched steps are as near to float64 as the fused kernels."""

import pytest
import torch
from torch import Tensor, nn

from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer, attention_scores, init_weights

HALF = [torch.float16, torch.bfloat16]
PYTHIA = TransformerConfig(
    d_vocab=50, n_ctx=40, n_layers=3, n_heads=4, d_model=32, d_head=8, d_mlp=64, act="gelu", positions="rotary",
    rotary_dim=4, parallel=True,
)  # fmt: skip


def model_named(name: str) -> nn.Module:
    if name != "Pythia":
        return load_pretrained(Transformer, name)
    model = Transformer(PYTHIA)
    init_weights(model, std=0.4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed.W_E.mul_(1000)  # as large as some positions of trained models: the squares are inf in float16
    return model


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["tales", "Pythia"])
@torch.no_grad()
def test_a_cache_does_not_change_the_logits(name: str, dtype: torch.dtype) -> None:
    model = model_named(name).to(dtype)
    tokens = torch.randint(model.cfg.d_vocab, (1, model.cfg.n_ctx), generator=torch.Generator().manual_seed(1))
    fused = model(tokens)
    exact = model.double()(tokens)  # the same weights, which dtype has rounded
    model.to(dtype)

    def error(logits: Tensor) -> float:
        return float((logits.double() - exact).square().mean().sqrt())

    for names in ("*", "*.hook_scale"):
        watched, cache = run_with_cache(model, tokens, names=names)
        assert {activation.dtype for activation in cache.values()} == {watched.dtype} == {dtype}
        assert error(watched) <= 2 * error(fused) + torch.finfo(dtype).eps, names


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scores_are_finite_where_only_the_product_is_too_large(dtype: torch.dtype) -> None:
    q = k = torch.full((1, 1, 1, 64), 40.0, dtype=dtype)
    assert attention_scores(q, k).item() == 40 * 40 * 8  # 64 products of 1600 are more than float16 can hold
