"""What the checks of this section cannot know: see tests/test_checks.py. Then a copying head built by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import solutions.ch05_patching as ref
from course_utils.checks.ch05.heads import afterwards, copied, looking, signals, worked_roles
from course_utils.checks.ch05.path_loops import path_scores
from course_utils.hooks import run_with_cache
from tests.ch05 import other_paths as other
from tests.ch05 import subtle, unusual
from tests.ch05.test_paths import circuit

SECRETS = ("einsum(", ".repeat(", "run_with_cache(")


def copying(model: Any, dataset: Any, sign: int = 1, k: int = 5, **wrong: Any) -> Any:
    """A name_copying_scores whose names stand elsewhere, come last, or have a bias."""
    with torch.no_grad():
        _, cache = run_with_cache(model, dataset.tokens)
        at = torch.stack([dataset.positions["IO"], dataset.positions["S1"]], 1)
        rows, scores = torch.arange(len(at))[:, None], []
        stream = cache["resid_pre" if model.cfg.attn_only else "resid_post", 0][rows, at + wrong.get("shift", 0)]
        for block in model.blocks:
            for head in range(model.cfg.n_heads):
                v = block.ln1(stream) @ block.attn.W_V[head] + block.attn.b_V[head]
                out = sign * (v @ block.attn.W_O[head]) + (block.attn.b_O if wrong.get("bias") else 0)
                best = model.unembed(model.ln_final(out)).topk(k, largest=not wrong.get("smallest")).indices
                scores.append((best == dataset.tokens[rows, at][..., None]).any(-1).to(out.dtype).mean())
    return torch.stack(scores).reshape(model.cfg.n_layers, model.cfg.n_heads)


def backwards(model: Any, clean: Any, corrupted: Any, *rest: Any) -> Any:
    return path_scores(model, corrupted, clean, *rest)


def roles_without_refusal(tables: Any, rules: Any) -> Any:
    return {role: [] if set(rules[role]) - set(tables) else ref.head_roles(tables, rules)[role] for role in rules}


def heads_as(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda tables, rules: {role: change(heads) for role, heads in worked_roles(tables, rules).items()}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "attention_between": [
        ("values are wrong", looking(lambda q, k: (q, k + 1))),
        ("values are wrong", looking(then=lambda found: found.flip(1))),
        ("values are wrong", looking(then=lambda found: found / found.sum(0))),
        ("in another order", looking(then=lambda found: found.permute(2, 0, 1))),
    ],
    "name_copying_scores": [
        ("wrong", partial(copying, smallest=True)),
        ("the shares are in float32", lambda *given: copied(*given).float()),
        ("wrong", partial(copying, bias=True)),
        ("wrong", partial(copying, shift=1)),
        ("wrong", lambda *given: copied(*given).flip(1)),
    ],
    "signal_effects": [
        ("values are wrong", partial(signals, score=backwards)),
        ("values are wrong", partial(signals, token=("abc",), both=("names",))),
        ("expected a dictionary", afterwards(lambda e: {"names": e["token"], "order": e["position"]})),
    ],
    "head_roles": [
        ("should raise ValueError", roles_without_refusal),
        ("wrong", partial(worked_roles, order=abs)),
        ("wrong", heads_as(lambda heads: heads[:1])),
        ("pair of ints", heads_as(lambda heads: [tuple(torch.tensor(at)) for at in heads])),
        ("wrong", heads_as(lambda heads: [list(at) for at in heads])),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "run_with_cache(model, dataset.tokens, names=place) -> run_with_cache(model, dataset.tokens)",  # keeps more
    "first[at].item() -> first[at]",  # tensors can be sorted
}
ONLY_ON_GPU = "device"


def test_a_copying_head_built_by_hand_scores_1(make: Any) -> None:
    """Head 1.0 says what it reads, 0.0 and 1.1 say something else, and 0.1 nothing at all."""
    dataset: Any = type("Prompts", (), {})()
    dataset.tokens = torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0]])
    dataset.positions = {"IO": torch.tensor([0, 1]), "S1": torch.tensor([2, 0])}
    scores = ref.name_copying_scores(circuit(make), dataset, k=1)
    assert scores[1, 0] == 1.0 and scores[0, 0] < 1.0
    assert ref.name_copying_scores(circuit(make), dataset, sign=-1, k=1)[1, 0] == 0.0
