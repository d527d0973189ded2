"""What the checks of collecting cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch07_probes as ref
from course_utils.checks.ch07.collecting import averaged, collecting, last_of
from course_utils.hooks import add_hook, run_with_cache
from tests.ch07 import other_probes as other

SECRETS = ("einops.einsum", "split(batch_size)", "argmax(dim=1)")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = {
    "places.eq(chosen[:, None]).float() -> places.eq(chosen[:, None])",  # each batch takes the dtype of its streams
    "position == 'mean' and (not given) -> position == 'mean'",  # no tensor is equal to a word
    # The cache may hold more than is needed, if it goes after each batch: `other_probes` does so, too.
    "run_with_cache(model, tokens[rows], names=names) -> run_with_cache(model, tokens[rows])",
}


def with_hooks(model: Any, *given: Any, **more: Any) -> Any:
    """Right, by a hook that stays."""
    add_hook(model, "blocks.0.hook_resid_pre", lambda stream, hook: None)
    return ref.extract_activations(model, *given, **more)


def all_at_once(model: Any, tokens: Any, mask: Any, layers: Any, position: Any, batch_size: int = 64) -> Any:
    return ref.extract_activations(model, tokens, mask, layers, position)


def strict_masks(model: Any, tokens: Any, mask: Any, layers: Any, position: Any, batch_size: int = 64) -> Any:
    if not mask.any(1).all():
        raise ValueError("an empty text")
    return ref.extract_activations(model, tokens, mask, layers, position, batch_size)


def any_word(model: Any, tokens: Any, mask: Any, layers: Any, position: Any, batch_size: int = 64) -> Any:
    position = "mean" if position == "first" else position
    return ref.extract_activations(model, tokens, mask, layers, position, batch_size)


def keeps_all_caches(model: Any, tokens: Any, mask: Any, layers: Any, position: Any, batch_size: int = 64) -> Any:
    with torch.no_grad():
        kept = [run_with_cache(model, part) for part in tokens.split(batch_size)]
    found = [torch.cat([cache[ref.stream_name(model, layer)] for _, cache in kept]) for layer in layers]
    if not isinstance(position, str):
        return torch.stack(found)[:, torch.arange(len(tokens)), position]
    right = collecting()  # the model runs no more: the streams of every layer are there
    return (
        torch.stack(found)[:, torch.arange(len(tokens)), last_of(mask)]
        if position == "last" and mask.any(1).all()
        else (right(model, tokens, mask, layers, position))
    )


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "extract_activations": [
        ("a hook is left behind", with_hooks),
        ("with batch_size=2", all_at_once),
        ("an empty text", strict_masks),
        ("should raise ValueError", any_word),
        ("values are wrong", collecting(mean=lambda found, mask: averaged(found, mask) + 1e-2)),
        ("values are wrong", collecting(given=lambda places: places.clamp(max=4))),
        ("activations of the first one were still held", keeps_all_caches),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {"extract_activations": [other.extract_activations]}


def test_padding_behind_a_text_changes_nothing() -> None:
    from course_utils.checks.ch07.collecting import CFG
    from course_utils.checks.standins.transformer import SmallModel, some_tokens

    model, tokens = SmallModel(CFG), some_tokens(CFG, 2, 4, seed=3)
    padded, mask = torch.nn.functional.pad(tokens, (0, 3)), torch.arange(7).expand(2, -1) < 4
    for position in ("last", "mean"):
        short = ref.extract_activations(model, tokens, torch.ones_like(tokens).bool(), [1, 3], position)
        torch.testing.assert_close(ref.extract_activations(model, padded, mask, [1, 3], position), short)
