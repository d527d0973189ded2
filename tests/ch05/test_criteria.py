"""What the checks of this section cannot know: see tests/test_checks.py. Then a model whose circuit is known."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch05_patching as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch05.criteria import check_greedy_circuit, minimal, ratio, searching, two_sides
from course_utils.config import TransformerConfig
from tests.ch05 import other_circuit as other
from tests.ch05 import subtle, unusual

SECRETS = ("torch.where(", "bincount", "argsort", "einsum(")


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

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "int((expected + changes[left] - whole).abs().argmin()) -> (expected + changes[left] - whole).abs().argmin()",
}
ONLY_ON_GPU = "device"


def without_the_first(model: Any, dataset: Any, means: Any, share: float, max_rows: int) -> Any:
    return ref.greedy_circuit(model, dataset, means, share, max_rows)[1:]


def test_a_mistake_made_in_another_way_has_the_same_cause() -> None:
    with pytest.raises(CheckFailed, match="This is what you get if the first circuit, with every head, is missing"):
        run_check(check_greedy_circuit, without_the_first)


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
