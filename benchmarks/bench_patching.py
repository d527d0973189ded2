"""Sweeps of patches, many to a forward, against one forward each, and against TransformerLens where it is installed.

The model is `attn-only-4l`, the rival's weights are the same, and so are the answers.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from course_utils.data.ioi import IOIDataset
from course_utils.hooks import run_with_cache
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer
from solutions.ch05_patching import Metric, Patch, batched_sweep, logit_difference, run_patched

ROUNDS = {1: 9, 32: 3}


@pytest.fixture(scope="module")
def ours() -> Any:
    return load_pretrained(Transformer, "attn-only-4l")


@pytest.fixture(scope="module")
def theirs(ours: Any) -> Any:
    """The same weights in TransformerLens; None without it."""
    if find_spec("transformer_lens") is None:
        return None
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = ours.cfg
    sizes = {name: getattr(cfg, name) for name in ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_vocab")}
    model = HookedTransformer(
        HookedTransformerConfig(**sizes, attn_only=True, eps=cfg.layer_norm_eps, normalization_type="LN", device="cpu")
    )
    model.load_state_dict(ours.state_dict(), strict=False)
    return model.eval()


def streams(model: Any, n_pos: int) -> list[Patch]:
    """Every position of the stream before every layer."""
    return [(f"blocks.{layer}.hook_resid_pre", (pos,)) for layer in range(model.cfg.n_layers) for pos in range(n_pos)]


def heads(model: Any, n_pos: int) -> list[Patch]:
    """Every head, at all positions."""
    places = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    return [(f"blocks.{layer}.attn.hook_z", (slice(None), head)) for layer, head in places]


def their_sweep(kind: str, model: Any, tokens: Tensor, source: Tensor, metric: Metric) -> Callable[[], Tensor]:
    """The function of TransformerLens that answers the same question, without gradients."""
    from transformer_lens import patching

    sweep = {
        "stream": patching.get_act_patch_resid_pre,
        "heads": patching.get_act_patch_attn_head_out_all_pos,
    }[kind]
    with torch.no_grad():
        _, cache = model.run_with_cache(source)
    return torch.no_grad()(lambda: sweep(model, tokens, cache, lambda logits: metric(logits).mean()))


@pytest.mark.parametrize("n_prompts", ROUNDS)
@pytest.mark.parametrize("kind, all_patches", [("stream", streams), ("heads", heads)], ids=["stream", "heads"])
def test_sweep(
    race, ours: Any, theirs: Any, kind: str, all_patches: Callable[[Any, int], list[Patch]], n_prompts: int
) -> None:
    clean = IOIDataset(n_prompts, ours.tokenizer, seed=1)
    tokens, patches = clean.flipped("names").flipped("order").tokens, all_patches(ours, clean.tokens.shape[1])
    with torch.no_grad():
        _, cache = run_with_cache(ours, clean.tokens)

    def metric(logits: Tensor) -> Tensor:
        return logit_difference(logits, clean)

    def one_by_one() -> Tensor:
        return torch.stack([metric(run_patched(ours, tokens, cache, *patch)).mean() for patch in patches])

    def together() -> Tensor:
        return batched_sweep(ours, tokens, cache, metric, patches)

    torch.testing.assert_close(together(), one_by_one(), rtol=1e-5, atol=1e-5)
    rivals: dict[str, tuple[Callable[[], Tensor], str]] = {
        "one forward for each": (one_by_one, "<= 0.33" if n_prompts == 1 else "<= 1.0")
    }
    if theirs is not None:
        rival = their_sweep(kind, theirs, tokens, clean.tokens, metric)
        torch.testing.assert_close(rival().flatten(), one_by_one(), rtol=1e-4, atol=1e-4)
        rivals["TransformerLens' patching"] = (rival, rivals["one forward for each"][1])
    race(f"sweep, {kind}, {n_prompts} prompts", together, rivals, ROUNDS[n_prompts])
