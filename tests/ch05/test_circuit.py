"""What the checks of this section cannot know: see tests/test_checks.py. Then a model whose circuit is known."""

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
    minimal,
    ratio,
    scoring,
    searching,
    standing_in,
    two_sides,
)
from course_utils.config import TransformerConfig
from course_utils.hooks import hooks, run_with_cache, run_with_hooks
from tests.ch05 import other_circuit as other
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


def refusing(refused: Callable[..., bool]) -> Callable[..., Any]:
    """A minimality that refuses less; `refused` gets v, K and the circuit."""

    def minimality(model: Any, dataset: Any, kept: Any, removed: Any, means: Any) -> Any:
        if any(refused(v, k, set(kept)) for v, k in removed.items()):
            raise ValueError
        return minimal()(model, dataset, kept, removed, means)

    return minimality


def never_ends(model: Any, dataset: Any, means: Any, share: float, max_rows: int) -> Any:
    while True:
        model(dataset.tokens)


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
    "faithfulness": [
        ("values are wrong", ratio(lambda c, m, e, r: 1 - (m - c).abs() / m)),
        ("values are wrong", ratio(lambda c, m, e, r: (c / m).clamp(0, 1))),
        ("wrong.", ratio(lambda c, m, e, r: c / c.max())),
    ],
    "completeness": [
        ("values are wrong", two_sides(lambda c, m, k: (c - k, c))),
        ("values are wrong", two_sides(lambda c, m, k: (m - k, m - k))),
        ("should raise ValueError", two_sides()),
    ],
    "minimality": [
        ("values are wrong", minimal(lambda c, m, k, v: (k | v, k))),
        ("values are wrong", minimal(lambda c, m, k, v: (m - v, c - k))),
        ("values are wrong", minimal(order=lambda removed, kept: sorted(removed))),
        ("a K that is not of the circuit", refusing(lambda v, k, c: v in k or v not in c)),
        ("a v that is not of the circuit", refusing(lambda v, k, c: v in k or not set(k) <= c)),
        ("a v in its own K", refusing(lambda v, k, c: not {v, *k} <= c)),
    ],
    "greedy_circuit": [
        ("wrong answer", searching(badness=lambda f, m, now: abs(f))),
        ("wrong answer", searching(carried=True)),
        ("it goes on and on", never_ends),
        (
            "one forward had",
            lambda model, dataset, means, share, rows: ref.greedy_circuit(model, dataset, means, share),
        ),
        ("expected a list of circuits", searching(lambda rounds: rounds[-2])),
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
CHUNKS = "zip(tokens.split(max_rows), templates.to(tokens.device).split(max_rows), strict=True)"
STILL_RIGHT = {
    "counts == 0 -> counts <= 0",  # there are no negative ones
    "counts.tolist() -> counts",  # the words of an error
    "True -> False",  # strict=
    f"{CHUNKS} -> {CHUNKS.replace(', strict=True', '')}",
    "int((expected + changes[left] - whole).abs().argmin()) -> (expected + changes[left] - whole).abs().argmin()",
}
ONLY_ON_GPU = "device"


def without_the_first(model: Any, dataset: Any, means: Any, share: float, max_rows: int) -> Any:
    return ref.greedy_circuit(model, dataset, means, share, max_rows)[1:]


@pytest.mark.parametrize(
    ("exercise", "sentence", "answer"),
    [
        (
            "circuit_scores",
            "they are divided by the whole model's",
            lambda model, dataset, circuits, means, rows: ref.faithfulness(model, dataset, circuits, means),
        ),
        ("greedy_circuit", "the first circuit, with every head, is missing", without_the_first),
    ],
)
def test_a_mistake_made_in_another_way_has_the_same_cause(exercise: str, sentence: str, answer: Any) -> None:
    with pytest.raises(CheckFailed, match=f"This is what you get if {sentence}"):
        run_check(getattr(circuit, f"check_{exercise}"), answer)


# ------------------------------------------------------------ a model built so that its circuit is known

SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
N_NAMES, BOS, POS = 6, 6, 5  # five positions: BOS, two names, the second of them again, and a place for the answer
BUILT = TransformerConfig(
    d_vocab=7, n_ctx=POS, n_layers=2, n_heads=3, d_model=POS + 3 * N_NAMES, d_head=N_NAMES + POS, d_mlp=1,
    attn_only=True, normalization="none",
)  # fmt: skip
READ, RELAYED, SAID = (slice(POS + i * N_NAMES, POS + (i + 1) * N_NAMES) for i in range(3))  # parts of the stream


def attend(attn: Any, head: int, query: int, key: int) -> None:
    """Position `query` looks at `key` (and all others at BOS, which holds no name)."""
    place = torch.arange(POS)
    attn.W_Q[head, place, N_NAMES + place] = 30.0
    attn.W_K[head, 0, N_NAMES + place] = 10.0
    attn.W_K[head, 0, N_NAMES + query] = 0.0
    attn.W_K[head, key, N_NAMES + query] = 20.0


def carry(attn: Any, head: int, source: slice, target: slice, size: float) -> None:
    """What is found in one part of the stream is written into another."""
    name = torch.arange(N_NAMES)
    attn.W_V[head, source, name] = torch.eye(N_NAMES)
    attn.W_O[head, name, target] = size * torch.eye(N_NAMES)


@pytest.fixture
def built(make: Callable[..., nn.Module]) -> Any:
    """Names are read at position 1, relayed to 3 by 0.1, and said at 4 by 1.2 (as 4) and, its spare, by 1.0 (as 2).

    The other three heads do nothing to the answer: 0.0 writes where nobody reads, 0.2 and 1.1 write nothing.
    """
    model: Any = make(BUILT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        name = torch.arange(N_NAMES)
        model.embed.W_E[name, READ] = torch.eye(N_NAMES)
        model.pos_embed.W_pos[:, :POS] = torch.eye(POS)
        model.unembed.W_U[SAID, name] = torch.eye(N_NAMES)
        first, second = (block.attn for block in model.blocks)
        attend(first, 1, query=3, key=1)
        carry(first, 1, READ, RELAYED, 1.0)
        attend(first, 0, query=2, key=1)
        carry(first, 0, READ, RELAYED, 1.0)
        for head, size in ((2, 4.0), (0, 2.0)):
            attend(second, head, query=4, key=3)
            carry(second, head, RELAYED, SAID, size)
    return model


class Prompts(SimpleNamespace):
    """Every ordered pair of two names: IO, S, S, and the end."""

    def __init__(self) -> None:
        pairs = [(io, s) for io in range(N_NAMES) for s in range(N_NAMES) if io != s]
        io, s = torch.tensor(pairs).T
        tokens = torch.stack([torch.full_like(io, BOS), io, s, s, torch.full_like(io, BOS)], dim=1)
        super().__init__(tokens=tokens, io=io, s=s, positions={"END": torch.full_like(io, POS - 1)})


PROMPTS = Prompts()
TRUE, SPARE = [(0, 1), (1, 2)], (1, 0)


def built_means(module: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """One template for all prompts: the mean of all, which holds no name more than another."""
    tokens = PROMPTS.tokens
    (means,) = [module.template_means(model, tokens, torch.zeros(len(tokens), dtype=torch.long))]
    return {name: mean.expand(len(tokens), *mean.shape[1:]) for name, mean in means.items()}


@SOLUTIONS
def test_a_known_circuit_scores_what_it_was_built_to_score(module: Any, built: nn.Module) -> None:
    means = built_means(module, built)
    circuits = [TRUE, [*TRUE, SPARE], [(0, 1), SPARE], [(0, 1)], [(1, 2), SPARE], [(0, 0), (0, 2), (1, 1)], []]
    scores = module.circuit_scores(built, PROMPTS, circuits, means)
    torch.testing.assert_close(scores, torch.tensor([4.0, 6, 2, 0, 0, 0, 0]), rtol=1e-4, atol=1e-4)
    faithful = module.faithfulness(built, PROMPTS, circuits[:3], means)
    torch.testing.assert_close(faithful, torch.tensor([2 / 3, 1, 1 / 3]), rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_the_spare_shows_in_completeness_and_in_minimality(module: Any, built: nn.Module) -> None:
    """Without the spare the circuit is incomplete by 2, but for a K that takes away what both writers need."""
    means = built_means(module, built)
    sides = module.completeness(built, PROMPTS, TRUE, [[], [(1, 2)], [(0, 1)]], means)
    torch.testing.assert_close(sides, torch.tensor([[4.0, 0, 0], [6, 2, 0]]), rtol=1e-4, atol=1e-4)
    circuit = [*TRUE, SPARE, (0, 0)]
    removed = {(0, 1): [], (1, 2): [(0, 1)], SPARE: [(1, 2)], (0, 0): [SPARE]}
    shares = module.minimality(built, PROMPTS, circuit, removed, means)
    torch.testing.assert_close(shares, torch.tensor([1.0, 0, 1 / 3, 0]), rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_the_search_keeps_what_was_built_in_to_the_end(module: Any, built: nn.Module) -> None:
    rounds = module.greedy_circuit(built, PROMPTS, built_means(module, built), share=0.0)
    assert [len(circuit) for circuit in rounds] == [6, 5, 4, 3, 2, 1, 0]
    assert set(rounds[3]) == {*TRUE, SPARE}
    assert set(rounds[4]) == set(TRUE)


# ------------------------------------------------------------ identities, on a random model


@SOLUTIONS
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


def test_hooks_of_others_see_the_silenced_model(model: nn.Module) -> None:
    """A hook put on before acts first, and stays: an ablation can be combined with another intervention."""
    dataset = SimpleNamespace(tokens=torch.randint(31, (2, 6), generator=torch.Generator().manual_seed(4)))
    means = ref.template_means(model, dataset.tokens, torch.tensor([0, 1]))
    seen: list[str] = []
    with hooks(model, {"*.hook_resid_post": lambda resid, hook: seen.append(hook.name)}):
        ref.mean_ablate_except(model, dataset, [(0, 1)], means)
    assert seen == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
