"""What the checks of chapter 08 share: a small model, tokens, and a run through it block by block, without hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks

Fn = Callable[..., Any]
D_VOCAB, D_MODEL = 13, 7
SIZES = {"n_ctx": 9, "d_vocab": D_VOCAB, "d_model": D_MODEL, "d_head": 4}
ROTARY = {"positions": "rotary", "rotary_dim": 2, "normalization": "RMS", "n_kv_heads": 1, "gated": True}


def small_model(n_layers: int = 3, n_heads: int = 2, **changes: Any) -> Any:
    """A model with random parameters; `ROTARY` makes it one of Llama's family."""
    size = {} if changes.get("attn_only") else {"d_mlp": 6}
    return SmallModel(TransformerConfig(n_layers=n_layers, n_heads=n_heads, **SIZES, **size, **changes))


def tokens_of(n_batch: int, n_pos: int, seed: int = 0) -> Tensor:
    """Random tokens."""
    return torch.randint(D_VOCAB, (n_batch, n_pos), generator=torch.Generator().manual_seed(seed))


def dataset(n_batch: int, n_pos: int, seed: int = 0) -> Any:
    """Tokens and answers, as an ICLDataset has them."""
    return SimpleNamespace(
        tokens=tokens_of(n_batch, n_pos, seed), answers=tokens_of(n_batch, 1, seed + 50)[:, 0].contiguous()
    )


def beginning(model: Any, tokens: Tensor) -> Tensor:
    """The residual stream before the first block."""
    return model.embed(tokens) + model.pos_embed(tokens)


Step = Callable[[int, Tensor], Tensor]  # (layer, the stream after that block) -> what goes on


@torch.no_grad()
def streams(model: Any, tokens: Tensor, then: Step = lambda layer, resid: resid) -> list[Tensor]:
    """The residual stream after every block; each block goes on with what `then` makes of it."""
    resid, found = beginning(model, tokens), []
    for layer, block in enumerate(model.blocks):
        resid = then(layer, block(resid))
        found.append(resid)
    return found


@torch.no_grad()
def before_blocks(model: Any, tokens: Tensor) -> list[Tensor]:
    """The residual stream before every block."""
    return [beginning(model, tokens), *streams(model, tokens)[:-1]]


@torch.no_grad()
def logits_with(model: Any, tokens: Tensor, then: Step) -> Tensor:
    """The logits where `then` changes the stream after the blocks."""
    return model.unembed(model.ln_final(streams(model, tokens, then)[-1]))


@contextmanager
def adding(model: Any, layer: int, change: Callable[[Tensor], Tensor], place: str = "resid_post") -> Iterator[None]:
    """What a mistake does to the stream while a context lasts."""
    with hooks(model, {f"blocks.{layer}.hook_{place}": lambda resid, hook: change(resid.clone())}):
        yield


def opened(name: str, manager: Any) -> Any:
    """What `with` can open; else CheckFailed."""
    if not (hasattr(type(manager), "__enter__") and hasattr(type(manager), "__exit__")):
        raise CheckFailed(
            f"{name}: expected something that `with` can open, got a {type(manager).__name__}.\n"
            "  Next: keep the line @contextmanager above the function, and `yield` once in it."
        )
    return manager


def without_graph(name: str, actual: object) -> None:
    if isinstance(actual, Tensor) and actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
