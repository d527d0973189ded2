"""The same weights in TransformerLens give the same activations, hook by hook. Skipped where it is not installed.

`pip install 'circuits-from-scratch[peers]'` installs it.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

import solutions.ch04_induction as ours
from course_utils.checks.ch04.weights import CFG, WITH_MLP
from course_utils.checks.modules import noise
from course_utils.hooks import run_with_cache
from solutions.ch02_transformer import Transformer

peer = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra `peers`)")
N_HALF = 4
CASES = {
    "attention only": replace(CFG, d_vocab=40),
    "with MLPs": replace(WITH_MLP, d_vocab=40, n_ctx=9),
    "relu": replace(WITH_MLP, d_vocab=40, n_ctx=9, act="relu"),
    "no normalisation": replace(CFG, d_vocab=40, normalization="none"),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def both(request: pytest.FixtureRequest) -> tuple[Any, Any, torch.Tensor]:
    """Our model and theirs, with the same random weights, and tokens."""
    cfg = CASES[request.param]
    model = Transformer(cfg)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed, scale=0.3))
    theirs = peer.HookedTransformer(
        peer.HookedTransformerConfig(
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_ctx=cfg.n_ctx,
            d_head=cfg.d_head,
            n_heads=cfg.n_heads,
            d_mlp=cfg.d_mlp or None,
            d_vocab=cfg.d_vocab,
            attn_only=cfg.attn_only,
            act_fn=cfg.act,
            normalization_type="LN" if cfg.normalization == "LN" else None,
            eps=cfg.layer_norm_eps,
            device="cpu",
        )
    )
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith(("mask", "IGNORE")) for key in missing.missing_keys), missing.missing_keys
    theirs.cfg.use_attn_result = True
    tokens = ours.repeated_tokens(2, N_HALF, cfg.d_vocab, torch.Generator().manual_seed(0), bos=0)
    return model.eval(), theirs.eval(), tokens


def test_every_cached_tensor_is_theirs(both: Any) -> None:
    model, theirs, tokens = both
    with torch.no_grad():
        logits, cache = run_with_cache(model, tokens, names="*")
        their_logits, their_cache = theirs.run_with_cache(tokens)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    for name, activation in cache.items():
        torch.testing.assert_close(
            activation, their_cache[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    ours_only = set(cache) - set(their_cache)
    theirs_only = {name for name in set(their_cache) - set(cache) if not name.endswith(("_in", "_input"))}
    theirs_only.discard("unembed.hook_out")  # the logits
    assert not ours_only and not theirs_only


def test_head_scores_are_theirs(both: Any) -> None:
    """From their patterns, by hand (their own detector wants texts and a tokenizer)."""
    model, theirs, tokens = both
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens)
        _, their_cache = theirs.run_with_cache(tokens)
    pattern = torch.stack([their_cache["pattern", layer] for layer in range(model.cfg.n_layers)])

    def mean_attention(offset: int, last: int | None = None) -> torch.Tensor:
        diagonal = pattern.diagonal(offset, -2, -1)
        return diagonal[..., -last:].mean((1, 3)) if last else diagonal.mean((1, 3))

    for scores, expected in [
        (ours.previous_token_scores(cache), mean_attention(-1)),
        (ours.duplicate_token_scores(cache, N_HALF), mean_attention(-N_HALF, N_HALF)),
        (ours.induction_scores(cache, N_HALF), mean_attention(1 - N_HALF, N_HALF)),
    ]:
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_circuits_and_composition_are_theirs(both: Any) -> None:
    model, theirs, _ = both
    for kind in ("Q", "K", "V"):
        with torch.no_grad():
            table = ours.composition_scores(model, kind)
            torch.testing.assert_close(table, theirs.all_composition_scores(kind), rtol=1e-4, atol=1e-5)
    ov, theirs_ov = ours.ov_circuit(model, 1, 0), theirs.W_E @ theirs.OV[1, 0] @ theirs.W_U
    torch.testing.assert_close(ov.A @ ov.B, theirs_ov.AB, rtol=1e-4, atol=1e-4)
    qk, theirs_qk = ours.qk_circuit(model, 0, 1), theirs.W_E @ theirs.QK[0, 1] @ theirs.W_E.T
    torch.testing.assert_close(qk.A @ qk.B, theirs_qk.AB, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ov.norm(), theirs_ov.norm(), rtol=1e-4, atol=1e-4)
