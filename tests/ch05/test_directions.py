"""What the checks of this section cannot know: see tests/test_checks.py. Then directions that are known."""

from functools import partial
from typing import Any

import torch

import solutions.ch05_patching as ref
from course_utils.checks.ch05.directions import exchanging, searched, searching
from course_utils.hooks import run_with_cache, run_with_hooks
from tests.ch05 import other_edges as other
from tests.ch05 import subtle, unusual
from tests.ch05.spoiling import leaving_a_hook, with_a_graph
from tests.ch05.test_edges import model_of, two_texts

SECRETS = ("einsum", "qr(", "possible_edges")


def refuses_lengths_only(model: Any, base: Any, source: Any, name: str, positions: Any, directions: Any) -> Any:
    if (directions.norm(dim=-1) - 1).abs().max() > 1e-4:
        raise ValueError("crooked")
    return exchanging()(model, base, source, name, positions, directions)


def of_other_prompts(model: Any, base: Any, source: Any, *rest: Any) -> Any:
    return exchanging()(model, base, source.roll(1, 0), *rest)


def in_place(model: Any, base: Any, source: Any, name: str, positions: Any, directions: Any) -> Any:
    """Writes into the activation that the model handed to the hook."""
    with torch.no_grad():
        _, cache = run_with_cache(model, source)
    rows = torch.arange(len(base))

    def fn(activation: Any, hook: Any) -> Any:
        own, others = activation[rows, positions], cache[name][rows, positions]
        activation[rows, positions] = own + (others - own) @ (directions.T @ directions)
        return activation

    return run_with_hooks(model, base, hooks={name: fn})


def by_backward(
    model: Any, base: Any, source: Any, name: str, positions: Any, metric: Any, *rest: Any, **given: Any
) -> Any:
    metric(model(base)).sum().backward()
    return searched(model, base, source, name, positions, metric, *rest, **given)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "interchange_intervention": [
        ("should raise ValueError", exchanging()),
        ("should raise ValueError", refuses_lengths_only),
        ("no gradient flows", lambda *given: ref.interchange_intervention(*given).detach()),
        ("values are wrong", of_other_prompts),
        ("values are wrong", exchanging(lambda own, source, inside: own - inside @ (source - own))),
        ("values are wrong", exchanging(lambda own, source, inside: (own + source) / 2)),
        ("a hook is left behind", leaving_a_hook(ref.interchange_intervention)),
        ("others may hold", in_place),
    ],
    "align_direction": [
        ("it changed `model.embed.W_E.grad`", by_backward),
        ("dot products", lambda *given, **options: 2 * searched(*given, **options)),
        ("has a graph", with_a_graph(searched)),
        ("values are wrong", lambda *given, **options: searched(*given[:-1], torch.Generator(), **options)),
        ("values are wrong", partial(searched, optimiser=torch.optim.SGD)),
        ("values are wrong", searching(loss=lambda values: values.relu().mean())),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "run_with_cache(model, source, names=name) -> run_with_cache(model, source)",
    "tqdm(range(steps), mininterval=1, desc=name) -> range(steps)",  # progress
    "tqdm(range(steps), mininterval=1, desc=name) -> tqdm(range(steps), mininterval=1)",
    "tqdm(range(steps), mininterval=1, desc=name) -> tqdm(range(steps), desc=name)",
    "1 -> 0",  # seconds
    "1 -> 2",
    "torch.eye(len(directions), dtype=directions.dtype, device=directions.device)"
    " -> torch.eye(len(directions), dtype=directions.dtype)",  # on a GPU
    "torch.arange(len(base), device=base.device) -> torch.arange(len(base))",  # on a GPU
}


def test_the_whole_space_is_a_patch_of_the_whole_vector() -> None:
    model, (clean, corrupted) = model_of("usual"), two_texts()
    name, positions = "blocks.1.hook_resid_pre", torch.tensor([3, 3])
    _, source = run_with_cache(model, corrupted)
    whole = ref.interchange_intervention(
        model, clean, corrupted, name, positions, torch.eye(model.cfg.d_model, dtype=torch.float64)
    )
    torch.testing.assert_close(whole.detach(), ref.run_patched(model, clean, source, name, (3,)))


def test_a_planted_direction_is_found() -> None:
    """What decides is one coordinate of the last stream; the search starts elsewhere and comes to it."""
    model, (clean, corrupted) = model_of("attention only, no LayerNorm"), two_texts()
    planted = torch.zeros(1, model.cfg.d_model, dtype=torch.float64)
    planted[0, 2] = 1.0
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.W_U[2, 3] = 1.0
        _, base = run_with_cache(model, clean, names="blocks.2.hook_resid_post")
        _, source = run_with_cache(model, corrupted, names="blocks.2.hook_resid_post")
        gap = (base["resid_post", 2] - source["resid_post", 2])[:, -1, 2]
        assert gap.abs().min() > 0.1
    signs = gap.sign()
    found = ref.align_direction(
        model, clean, corrupted, "blocks.2.hook_resid_post", torch.tensor([4, 4]),
        lambda logits: 5 * signs * logits[:, -1, 3], torch.Generator().manual_seed(0), steps=150, lr=0.1,
    )  # fmt: skip
    start = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double()
    assert abs(float(torch.cosine_similarity(start, planted))) < 0.8

    def left(directions: Any) -> Any:
        logits = ref.interchange_intervention(
            model, clean, corrupted, "blocks.2.hook_resid_post", torch.tensor([4, 4]), directions
        )
        return (signs * logits[:, -1, 3]).mean()

    assert left(found) <= left(planted) + 1e-6
