"""What the checks of this section cannot know: see tests/test_checks.py. Then identities, on a real model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import solutions.ch02_transformer as ch02
import solutions.ch05_patching as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch05 import edges
from course_utils.checks.ch05.edges import attributing, case_of, keeping, never_cut, sending
from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache
from tests.ch02 import other_transformer
from tests.ch05 import other_edges as other
from tests.ch05 import subtle, unusual
from tests.ch05.spoiling import clearing_hooks, leaving_a_hook, with_a_graph

SECRETS = ("einsum", "qr(", "possible_edges")


def scaled(rows: Any, model: Any, cache: Any) -> Any:
    if model.cfg.normalization == "none":
        return rows
    return {name: cache["ln1.scale", 0] * row for name, row in rows.items()}


def in_place(model: Any, cache: Any) -> Any:
    """Takes the embedding's share out of the cached stream, for good."""
    rows = ref.sender_outputs(model, cache)
    cache["resid_post", -1].sub_(rows[0])
    return rows


def last_position(own: Any, source: Any) -> Any:
    return torch.cat([0 * own[:, :, :-1], (source - own)[:, :, -1:]], dim=2)


def shared(table: Any, model: Any, steps: int) -> Any:
    """One gradient for all receivers of a stage."""
    stages = list(ref.edge_nodes(model.cfg)[1].values())
    return torch.stack([table[:, [i for i, at in enumerate(stages) if at == stage]].sum(1) for stage in stages], 1)


def after_the_norm(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
    """The gradient behind each LayerNorm, taken for the one in front of it."""
    kept = other.back_through
    other.back_through = lambda norm, resid, slope: slope
    try:
        return other.edge_attribution(model, clean, corrupted, metric, steps)
    finally:
        other.back_through = kept


def by_backward(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
    metric(model(clean)).sum().backward()
    return ref.edge_attribution(model, clean, corrupted, metric, steps)


def frozen(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
    """Right, but the parameters no longer want gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return ref.edge_attribution(model, clean, corrupted, metric, steps)


def with_sources(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A run_with_edges with the difference of the two runs on the edges that are cut, not that from this very run."""

    def run_with_edges(model: Any, clean: Any, corrupted: Any, edges: Any) -> Any:
        with torch.no_grad():
            own, source = (ref.sender_outputs(model, run_with_cache(model, text)[1]) for text in (clean, corrupted))
            cut = (ref.possible_edges(model.cfg) & ~edges).to(own)
            return ref.run_with_own_inputs(
                model, clean, lambda rows: torch.einsum("sr,sbpd->rbpd", cut[:, rows], change(source) - own)
            )

    return run_with_edges


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "sender_outputs": [
        ("values are wrong", sending(lambda rows, model, cache: rows | {"embed": cache["pos_embed"]})),
        ("values are wrong", sending(lambda rows, model, cache: rows | {"1.0": rows["1.1"], "1.1": rows["1.0"]})),
        ("values are wrong", sending(scaled)),
        ("it changed `cache[", in_place),
    ],
    "edge_attribution": [
        ("it changed `model.embed.W_E.grad`", by_backward),
        (".requires_grad` to False", frozen),
        ("values are wrong", attributing(masked=False, then=shared)),
        ("values are wrong", attributing(difference=last_position)),
        ("values are wrong", attributing(then=lambda table, model, steps: table - table.mean())),
        ("values are wrong", attributing(difference=lambda own, source: (source - own).roll(1, 1))),
        ("values are wrong", after_the_norm),
    ],
    "run_with_edges": [
        ("values are wrong", keeping(lambda edges, s, r: edges[:, [1, 0, *range(2, len(r))]])),
        ("values are wrong", keeping(lambda edges, s, r: edges[[0, 2, 1, *range(3, len(s))]])),
        ("values are wrong", never_cut(lambda sender, receiver: "." in sender and receiver.endswith("k"))),
        ("values are wrong", with_sources(lambda source: source.mean(1, keepdim=True))),
        ("a hook is left behind", leaving_a_hook(ref.run_with_edges)),
        ("hooks that others had attached", clearing_hooks(ref.run_with_edges)),
        ("gradients are recorded", with_a_graph(ref.run_with_edges)),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 -> -1",  # of the one gradient that torch.autograd.grad returns; of a layer that the embedding has not
    "0 -> 1",  # the latter
    "possible_edges(model.cfg).to(edges.device) & ~edges -> ~edges",  # unless attention and MLP are parallel: see below
    "torch.zeros_like(other) -> other",  # each row is read once, before it is written
    "possible_edges(model.cfg).to(own.device) -> possible_edges(model.cfg)",  # on a GPU
    "possible_edges(model.cfg).to(edges.device) -> possible_edges(model.cfg)",  # on a GPU
}


@pytest.mark.parametrize(
    ("exercise", "sentence", "answer"),
    [
        # with all else clean, what they carry is then clean as well
        (
            "run_with_edges",
            "kept edges carry what the senders write on the clean",
            never_cut(lambda s, r: r != "final"),
        ),
        ("run_with_edges", "the other edges get corrupted minus clean", with_sources(lambda source: source)),
        (
            "edge_attribution",
            "the steps are left out",
            lambda model, clean, corrupted, metric, steps: other.edge_attribution(model, clean, corrupted, metric),
        ),
    ],
)
def test_a_mistake_made_in_another_way_has_the_same_cause(exercise: str, sentence: str, answer: Any) -> None:
    with pytest.raises(CheckFailed, match=f"This is what you get if {sentence}"):
        run_check(getattr(edges, f"check_{exercise}"), answer)


# ----------------------------------------------------------------------------------------------------------- identities

LN = {"d_vocab": 13, "n_ctx": 9, "n_layers": 2, "n_heads": 3, "d_model": 8, "d_head": 4, "d_mlp": 11}
CONFIGS = {
    "usual": TransformerConfig(**LN),
    "attention only, no LayerNorm": TransformerConfig(
        **{**LN, "d_mlp": 0, "n_layers": 3}, attn_only=True, normalization="none"
    ),
    "rotary and parallel": TransformerConfig(**LN, positions="rotary", rotary_dim=4, parallel=True),
}


def model_of(name: str, scale: float = 0.5) -> Any:
    """A Transformer of chapter 02 with random weights, biases included, in double precision."""
    model = ch02.Transformer(CONFIGS[name]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model


def two_texts() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(13, (2, 5), generator=generator), torch.randint(13, (2, 5), generator=generator)


def metric(logits: Any) -> Any:
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(name: str) -> None:
    model, (clean, corrupted) = model_of(name), two_texts()
    there = ref.possible_edges(model.cfg)
    with torch.no_grad():
        torch.testing.assert_close(ref.run_with_edges(model, clean, corrupted, there), model(clean))
        torch.testing.assert_close(ref.run_with_edges(model, clean, corrupted, ~there), model(corrupted))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_senders_write_is_the_stream(name: str) -> None:
    model, (clean, _) = model_of(name), two_texts()
    with torch.no_grad():
        _, cache = run_with_cache(model, clean)
        biases = sum(block.attn.b_O for block in model.blocks)
        torch.testing.assert_close(ref.sender_outputs(model, cache).sum(0) + biases, cache["resid_post", -1])


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_into_a_receiver_sum_to_the_slope_times_its_inputs_difference(name: str) -> None:
    """For the last LayerNorm that is what attribution patching says of the last stream."""
    model, (clean, corrupted) = model_of(name), two_texts()
    scores = ref.edge_attribution(model, clean, corrupted, metric)
    _, source = run_with_cache(model, corrupted)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    estimate = ref.attribution_patching(model, clean, source, metric, [last])[last]
    torch.testing.assert_close(scores[:, -1].sum(), estimate.sum(dim=(1, 2)).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_what_a_small_part_of_the_corrupted_value_does(name: str) -> None:
    """Finite differences, through another function: one edge at a time, to a small share."""
    model, (clean, corrupted) = model_of(name), two_texts()
    scores = ref.edge_attribution(model, clean, corrupted, metric)
    there = ref.possible_edges(model.cfg)
    share = 1e-5
    with torch.no_grad():
        own, source = (ref.sender_outputs(model, run_with_cache(model, text)[1]) for text in (clean, corrupted))

        def moved(sender: int, receiver: int, share: float) -> Any:
            def added(rows: slice) -> Any:
                out = torch.zeros(rows.stop - rows.start, *own.shape[1:], dtype=own.dtype)
                if rows.start <= receiver < rows.stop:
                    out[receiver - rows.start] = share * (source[sender] - own[sender])
                return out

            return metric(ref.run_with_own_inputs(model, clean, added)).mean()

        for sender, receiver in there.nonzero()[::7].tolist():
            slope = (moved(sender, receiver, share) - moved(sender, receiver, -share)) / (2 * share)
            torch.testing.assert_close(scores[sender, receiver], slope, rtol=1e-4, atol=1e-7)


def test_on_a_linear_model_the_scores_are_exact() -> None:
    """Without LayerNorms and with queries of zero, patterns are even and values are read linearly."""
    model, (clean, corrupted) = model_of("attention only, no LayerNorm"), two_texts()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    scores = ref.edge_attribution(model, clean, corrupted, metric)
    there = ref.possible_edges(model.cfg)
    with torch.no_grad():
        before = metric(model(clean)).mean()
    for sender, receiver in there.nonzero()[::5].tolist():
        edges = there.clone()
        edges[sender, receiver] = False
        change = metric(ref.run_with_edges(model, clean, corrupted, edges)).mean() - before
        torch.testing.assert_close(scores[sender, receiver], change)
    assert (scores != 0).sum() > 10


def test_a_differently_written_transformer_gives_the_same() -> None:
    ours = model_of("usual")
    theirs = other_transformer.Transformer(ours.cfg).double()
    theirs.load_state_dict(ours.state_dict())
    clean, corrupted = two_texts()
    edges = torch.rand(ref.possible_edges(ours.cfg).shape, generator=torch.Generator().manual_seed(6)) > 0.5
    scores = [ref.edge_attribution(model, clean, corrupted, metric, steps=2) for model in (ours, theirs)]
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(*(ref.run_with_edges(model, clean, corrupted, edges) for model in (ours, theirs)))


def test_cases_are_telling() -> None:
    """The check of edge_attribution tells numbers apart to 1e-6: scores are far above that."""
    for number in (0, 1):
        known = case_of(number)
        scores = ref.edge_attribution(known.model, known.clean, known.corrupted, known.metric)
        assert scores[ref.possible_edges(known.model.cfg)].abs().median() > 1e-4
