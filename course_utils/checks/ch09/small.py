"""What the checks of chapter 09 share: a small model, padded texts, and what its hook points hold, by torch's hooks."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree
from course_utils.checks.standins.transformer import SmallModel
from course_utils.config import TransformerConfig

Fn = Callable[..., Any]
Change = Callable[[Tensor], Tensor]
D_VOCAB, D_MODEL, D_SAE = 13, 7, 6
RESID, MLP_OUT, ATTN_OUT = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"


def small_model(**changes: Any) -> Any:
    """Two layers, random parameters."""
    sizes = {"n_layers": 2, "n_heads": 3, "n_ctx": 9, "d_vocab": D_VOCAB, "d_model": D_MODEL, "d_head": 4, "d_mlp": 5}
    return SmallModel(TransformerConfig(**{**sizes, **changes}))


def padded(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Texts of these lengths, a begin token (0) in front included, and their mask; 0 is the padding, too."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    words = torch.randint(1, D_VOCAB, mask.shape, generator=torch.Generator().manual_seed(seed))
    words[:, 0] = 0
    return words * mask, mask


@contextmanager
def replacing(model: Any, hook_name: str, change: Change) -> Iterator[None]:
    """While it lasts, a hook point gives what `change` makes of it: by a hook of torch's own."""
    point = model.get_submodule(hook_name)
    handle = point.register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def held(model: Any, tokens: Tensor, hook_name: str) -> Tensor:
    """What a hook point holds."""
    found: list[Tensor] = []

    def look(activation: Tensor) -> Tensor:
        found.append(activation.clone())
        return activation

    with replacing(model, hook_name, look):
        model(tokens)
    return found[0]


def rows_of(model: Any, tokens: Tensor, mask: Tensor, hook_name: str) -> Tensor:
    """The activations of the texts' tokens but the first, text by text, each run alone and without padding."""
    rows = []
    for row, length in zip(tokens, mask.sum(dim=1).tolist(), strict=True):
        rows += list(held(model, row[None, :length], hook_name)[0, 1:])
    return torch.stack(rows)


def number(name: str, call: str, actual: object, expected: float) -> None:
    """As `agree`, for a plain number, to four digits."""
    close = isinstance(actual, float) and math.isclose(actual, expected, rel_tol=1e-4, abs_tol=1e-6)
    if not close:
        agree(name, call, actual, expected)


def opened(name: str, manager: Any) -> Any:
    """What `with` can open; else CheckFailed."""
    if not (hasattr(type(manager), "__enter__") and hasattr(type(manager), "__exit__")):
        raise CheckFailed(
            f"{name}: expected something that `with` can open, got a {type(manager).__name__}.\n"
            "  Next: keep the line @contextmanager above the function, and `yield` once in it."
        )
    return manager


@contextmanager
def hooked(words: str) -> Iterator[None]:
    """A model that runs with the learner's hook: what the hook point has to say about its result is for the learner."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not str(error).startswith("The hook at"):
            raise
        raise CheckFailed(f"{words}: {error}\n  Next: look at what your function returns.") from None


class Counted:
    """Chunks of which only so many may be alive at once."""

    def __init__(self, name: str, what: str, limit: int) -> None:
        self.name, self.what, self.limit = name, what, limit

    def __iter__(self) -> Any:
        alive: list[weakref.ref[Tensor]] = []
        for number in range(6):
            chunk = noise(3, 2, seed=number)
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk
            if sum(one() is not None for one in alive) > self.limit:
                raise CheckFailed(
                    f"{self.name}: it keeps the chunks; a stream that does not fit into memory would not pass.\n"
                    "  Next: after each chunk, keep only what is needed of it."
                )
