"""What the checks of this section cannot know: see tests/test_checks.py. Then identities, on a real model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch05_patching as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch05 import circuit
from course_utils.checks.ch05.circuit import (
    averaging,
    scoring,
    standing_in,
)
from course_utils.hooks import hooks, run_with_cache, run_with_hooks
from tests.ch05 import other_circuit as other
from tests.ch05 import subtle, unusual
from tests.ch05.spoiling import leaving_a_hook, with_a_graph

SECRETS = ("torch.where(", "bincount", "argsort", "einsum(")


def renamed(key: Callable[[str], Any]) -> Callable[..., Any]:
    """A template_means whose answer has other keys."""
    return lambda *given: {key(name): mean for name, mean in averaging()(*given).items()}


def of_each(reduce: Callable[[Any], Any]) -> Callable[..., Any]:
    """A template_means with another kind of mean, and none refused."""
    return averaging(lambda z, labels: torch.stack([reduce(z[labels == t]) for t in range(int(labels.max()) + 1)]))


def with_usual_mlps(model: Any, dataset: Any, kept: Any, means: Any) -> Any:
    """The MLPs say what they do in the usual run."""

    def silence(z: Any, hook: Any) -> Any:
        layer = int(hook.name.split(".")[1])
        stays = torch.tensor([(layer, head) in kept for head in range(z.shape[2])])
        return z * stays[:, None] + means[hook.name] * ~stays[:, None]

    with torch.no_grad():
        _, usual = run_with_cache(model, dataset.tokens)
        held = {name: lambda activation, hook: usual[hook.name] for name in usual if name.endswith("hook_mlp_out")}
        return run_with_hooks(model, dataset.tokens, hooks={"*.attn.hook_z": silence} | held)


def spoiling_means(model: Any, dataset: Any, kept: Any, means: Any) -> Any:
    logits = ref.mean_ablate_except(model, dataset, kept, means)
    means["blocks.1.attn.hook_z"].zero_()
    return logits


def spoiling_tokens(model: Any, dataset: Any, kept: Any, means: Any) -> Any:
    logits = ref.mean_ablate_except(model, dataset, kept, means)
    dataset.tokens.zero_()
    return logits


def interleaved(model: Any, dataset: Any, circuits: Any, means: Any, max_rows: int = 64) -> Any:
    """The prompts are repeated one by one, and their copies cut as if they had been repeated as a whole."""
    n_batch = len(dataset.tokens)
    each = [ref.mean_ablate_except(model, dataset, kept, means) for kept in circuits]
    rows = [(row // n_batch, row // len(circuits)) for row in range(n_batch * len(circuits))]
    logits = torch.stack([each[number][prompt] for number, prompt in rows])
    return torch.stack([ref.logit_difference(copy, dataset).mean() for copy in logits.split(n_batch)])


def with_rows(rows: Callable[[int, int], int]) -> Callable[..., Any]:
    """A circuit_scores that takes another number of rows."""
    return lambda model, dataset, circuits, means, max_rows: ref.circuit_scores(
        model, dataset, circuits, means, rows(max_rows, len(dataset.tokens))
    )


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "template_means": [
        ("expected a dictionary with", renamed(lambda name: name.replace("hook_z", "hook_v"))),
        ("expected a dictionary with", renamed(lambda name: int(name.split(".")[1]))),
        ("values are wrong", of_each(lambda rows: rows.median(0).values)),
        ("values are wrong", of_each(lambda rows: rows.sum(0) / (len(rows) + 1))),
        ("one forward had", lambda model, tokens, templates, max_rows: ref.template_means(model, tokens, templates)),
        ("should raise ValueError", of_each(lambda rows: rows.mean(0))),
    ],
    "mean_ablate_except": [
        ("values are wrong", with_usual_mlps),
        ("values are wrong", standing_in(lambda z, name, means: means[name].roll(1, 0))),
        ("values are wrong", standing_in(lambda z, name, means: (means[name] + z) / 2)),
        ("it changed `means[", spoiling_means),
        ("it changed `tokens`", spoiling_tokens),
        ("gradients are recorded", with_a_graph(ref.mean_ablate_except)),
        ("a hook is left behind", leaving_a_hook(ref.mean_ablate_except)),
    ],
    "circuit_scores": [
        ("values are wrong", interleaved),
        ("values are wrong", scoring(reduce=torch.median)),
        ("one forward had", with_rows(lambda max_rows, n_batch: max_rows * n_batch)),
        ("forwards for 5 circuits", with_rows(lambda max_rows, n_batch: 1)),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
CHUNKS = "zip(tokens.split(max_rows), templates.to(tokens.device).split(max_rows), strict=True)"
STILL_RIGHT = {
    "counts == 0 -> counts <= 0",  # there are no negative ones
    "counts.tolist() -> counts",  # the words of an error
    "True -> False",  # strict=
    f"{CHUNKS} -> {CHUNKS.replace(', strict=True', '')}",
}
ONLY_ON_GPU = "device"


@pytest.mark.parametrize(
    ("exercise", "sentence", "answer"),
    [
        (
            "circuit_scores",
            "they are divided by the whole model's",
            lambda model, dataset, circuits, means, rows: ref.faithfulness(model, dataset, circuits, means),
        ),
    ],
)
def test_a_mistake_made_in_another_way_has_the_same_cause(exercise: str, sentence: str, answer: Any) -> None:
    with pytest.raises(CheckFailed, match=f"This is what you get if {sentence}"):
        run_check(getattr(circuit, f"check_{exercise}"), answer)


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_every_head_is_the_model_and_no_head_leaves_each_position_to_itself(module: Any, model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(31, (4, 6), generator=generator)
    tokens[1::2, 5] = tokens[::2, 5]  # prompts 0 and 1 end in the same token, and so do 2 and 3
    means = module.template_means(model, tokens, torch.tensor([0, 0, 1, 1]))
    dataset = SimpleNamespace(tokens=tokens)
    each = {name: mean[[0, 0, 1, 1]] for name, mean in means.items()}
    with torch.no_grad():
        usual = model(tokens)
    whole = module.mean_ablate_except(model, dataset, module.every_head(model), each)
    torch.testing.assert_close(whole, usual, rtol=1e-4, atol=1e-4)
    empty = module.mean_ablate_except(model, dataset, [], each)[:, -1]
    torch.testing.assert_close(empty[::2], empty[1::2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(empty[0], empty[2], atol=0.1)


def test_random_circuits_are_of_their_size_and_without_repetition(model: nn.Module) -> None:
    drawn = [ref.random_circuits(model, 4, 9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(circuit)) == 4 and set(circuit) <= set(ref.every_head(model)) for circuit in drawn[0])
    assert len({frozenset(circuit) for circuit in drawn[0]}) > 1


def test_hooks_of_others_see_the_ablated_model(model: nn.Module) -> None:
    """A hook put on before acts first, and stays: an ablation can be combined with another intervention."""
    dataset = SimpleNamespace(tokens=torch.randint(31, (2, 6), generator=torch.Generator().manual_seed(4)))
    means = ref.template_means(model, dataset.tokens, torch.tensor([0, 1]))
    seen: list[str] = []
    with hooks(model, {"*.hook_resid_post": lambda resid, hook: seen.append(hook.name)}):
        ref.mean_ablate_except(model, dataset, [(0, 1)], means)
    assert seen == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
