"""What the checks of composition cannot know: see tests/test_checks.py."""

from functools import partial
from typing import Any

import torch

import solutions.ch04_induction as ref
from course_utils.checks.ch04.composition import all_pairs, baseline, composed
from course_utils.checks.ch04.weights import frobenius
from tests.ch04 import other_weights as other

SECRETS = ("linalg.qr", "masked_fill(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "Tensor | FactoredMatrix -> Tensor",
    "Tensor | FactoredMatrix -> FactoredMatrix",
    "n_layers - 1 -> n_layers",  # the last layer has no later one
    "1 -> 0",  # the same
    "int(torch.randint(n_layers - 1, (), generator=generator)) -> torch.randint(n_layers - 1, (), generator=generator)",
    "int(torch.randint(layer + 1, n_layers, (), generator=generator)) -> "
    "torch.randint(layer + 1, n_layers, (), generator=generator)",
    "torch.randint(n_heads, (2,), generator=generator).tolist() -> torch.randint(n_heads, (2,), generator=generator)",
    "random_rotation(d_model, generator).to(W_V) -> random_rotation(d_model, generator)",
    "n_layers - 1 -> 1",  # which of the earlier layers is drawn how often is not measured
    "layer + 1 -> 1",
}


def pairs(model: Any, kind: str, lenient: bool = False, **wrong: Any) -> Any:
    if kind not in ("Q", "K", "V") and not lenient:
        raise ValueError(kind)
    return all_pairs(model, kind if kind in ("Q", "K", "V") else "V", **wrong)


def drawing(
    kinds: Any = lambda kind: kind, source: Any = lambda generator: generator, lenient: bool = False, **wrong: Any
) -> Any:
    """random_composition_baseline with switches for what people get wrong."""

    def random_composition_baseline(model: Any, kind: str, n: int, generator: Any) -> Any:
        if kind not in ("Q", "K", "V") or (model.cfg.n_layers == 1 and not lenient):
            raise ValueError(kind)
        layers = wrong.get("layers", (0, model.cfg.n_layers - 1))
        return baseline(model, kinds(kind), n, source(generator), **{**wrong, "layers": layers})

    return random_composition_baseline


def drawing_neighbours(model: Any, kind: str, n: int, generator: Any) -> Any:
    """The later layer is always the next one."""
    if model.cfg.n_layers < 3:
        return drawing()(model, kind, n, generator)
    first = int(torch.randint(2, (), generator=generator))
    halves = [
        drawing(layers=pair)(model, kind, n // 2, generator) for pair in ((first, first + 1), (1 - first, 2 - first))
    ]
    return torch.cat(halves)


def asks_the_first_only(A: Any, B: Any) -> Any:
    norm = torch.linalg.matrix_norm if isinstance(A, torch.Tensor) else (lambda M: M.norm())
    return norm(A @ B) / (norm(A) * norm(B))


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "composition_score": [
        ("of a batch: wrong shape", lambda A, B: (A @ B).norm() / (A.norm() * B.norm())),
        ("is wrong", lambda A, B: frobenius(A @ B) / torch.linalg.matrix_norm(A, 2) / frobenius(B)),
        ("is wrong", lambda A, B: composed(A, B) / A.shape[-1] ** 0.5),
        ("is wrong", lambda A, B: composed(A, B).log()),
        ("with tensors and a factored matrix", asks_the_first_only),
    ],
    "composition_scores": [
        ("should raise ValueError", partial(pairs, lenient=True)),
        ("values are wrong", partial(pairs, end=lambda table: table / table.max())),
        ("values are wrong", partial(pairs, end=torch.square)),
        ("wrong shape", partial(pairs, end=lambda table: table[:-1])),
        ("several for each pair", pairs),
    ],
    "random_composition_baseline": [
        ("it drew from torch's global random numbers", drawing(source=lambda generator: torch.default_generator)),
        ("different seeds give the same scores", drawing(source=lambda generator: torch.Generator().manual_seed(0))),
        ("the deviation of 60 scores", drawing(pair=lambda W_A, R, W_B: (R**3, R.flip(0) ** 3))),
        ("on average", drawing(score=lambda W_A, W_B: frobenius(W_A @ W_B))),
        ("on average", drawing(score=lambda W_A, W_B: torch.linalg.matrix_norm(W_A @ W_B, 2) / frobenius(W_B))),
        ('for "V": the deviation', drawing(kinds=lambda kind: "Q")),
        ('for "Q": the deviation', drawing(kinds=lambda kind: "V")),
        ("should raise ValueError", drawing(lenient=True)),
        ("the second in layer 0", drawing(layers=(0, 0))),
        ("100% were in the first and the last", drawing()),
        ("0% were in the first and the last", drawing_neighbours),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_rotations_are_orthogonal_and_turn_everywhere_alike() -> None:
    rng = torch.Generator().manual_seed(0)
    rotations = torch.stack([ref.random_rotation(5, rng) for _ in range(600)])
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(5).expand(600, 5, 5), rtol=0, atol=1e-5)
    assert rotations.mean(0).abs().max() < 0.1  # without the right signs the diagonal leans to one side
    assert (rotations.square().mean(0) - 1 / 5).abs().max() < 0.05
