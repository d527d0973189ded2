"""Chapter 03's checks of costs and of the exchange of gradients: wrong answers that they do not know, and right ones.

At the end the reference is compared with torch's own count of operations, and with a real model's memory.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import solutions.ch03_training as ref
from course_utils.checks.ch03.cost import averaging, count_parameters, counting, everywhere, operations, remembering
from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache
from solutions.ch02_transformer import Transformer
from tests.ch03 import other_training_cost as other

SECRETS = ("torch.stack(", "3 * 2 *")


def nothing(*given: Any) -> None:
    return None


def one_vector_more(cfg: TransformerConfig, n_ctx: int) -> int:
    return -cfg.d_model


def with_total(*given: Any) -> dict[str, int]:
    answer = ref.memory_bytes(*given)
    return answer | {"total": sum(answer.values())}


# -------------------------------------------------------------------------------------------------- average_gradients


def careless(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Right where there are ranks that agree on the names."""
    return everywhere(lambda own: own.mean(0))(grads_per_rank) if grads_per_rank else []


def in_place(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    answer = ref.average_gradients(grads_per_rank)
    for grads, averages in zip(grads_per_rank, answer, strict=True):
        for name, average in averages.items():
            grads[name].copy_(average)
    return answer


def emptied(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    answer = ref.average_gradients(grads_per_rank)
    grads_per_rank[0].pop("b")
    return answer


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "flops_per_token": [
        ("returned None", nothing),
        ("wrong answer", lambda cfg, n_ctx: operations(cfg, n_ctx) + 6 * count_parameters(cfg)["biases"]),
        ("wrong answer", counting(pairs=lambda cfg, n_ctx: 2 * n_ctx * cfg.n_heads)),  # heads counted twice
        ("wrong answer", counting(passes=3, unembed=False)),  # two mistakes at once
        ("wrong answer", lambda cfg, n_ctx: operations(replace(cfg, n_layers=1), n_ctx)),
        ("expected an int, got a number", lambda cfg, n_ctx: operations(cfg, n_ctx) / 4.5),
    ],
    "memory_bytes": [
        ("returned None", nothing),
        ("at 'activations'", remembering(more=lambda cfg, n_ctx: -cfg.n_layers * cfg.d_mlp)),
        ("at 'activations'", remembering(more=lambda cfg, n_ctx: cfg.d_vocab)),
        ("at 'activations'", remembering(more=lambda cfg, n_ctx: -cfg.n_layers * cfg.d_model)),
        ("at 'activations'", remembering(more=lambda cfg, n_ctx: -2 * cfg.d_model)),
        ("at 'gradients'", remembering(instead=lambda n, size: {"gradients": 2 * n * size})),
        ("at 'weights'", remembering(left_out=one_vector_more)),
        ("'total' should not be there", with_total),
    ],
    "average_gradients": [
        ("returned None", nothing),
        ("values are wrong", everywhere(lambda own: own.median(dim=0).values)),
        ("values are wrong", everywhere(lambda own: (own[0] + own[-1]) / 2)),
        ("the very same tensor", averaging(lambda own: [torch.stack(own).mean(0)] * len(own))),
        ("expected dtype float64, got float32", everywhere(lambda own: own.mean(0).float())),
        ("raised IndexError", lambda grads: careless(grads) if grads else grads[0]),
        ("should raise ValueError", careless),
        ("come in another order", lambda grads: [dict(sorted(mean.items())) for mean in ref.average_gradients(grads)]),
        ("values are wrong", everywhere(lambda own: own.float().mean(0).to(own.dtype))),
        ("it changed `grads_per_rank[0]['b']` in place", in_place),
        ("it changed `grads_per_rank[0]`", emptied),
        (
            "a list of 3 dictionaries, one for each rank, got a dict",
            lambda grads: ref.average_gradients(grads)[0],
        ),
        ("rank 0 should have the gradients of", lambda grads: [dict.fromkeys("a") for _ in grads]),
    ],
}

ALSO_RIGHT = {
    "flops_per_token": [other.flops_per_token, lambda *given: np.int64(other.flops_per_token(*given))],
    "memory_bytes": [other.memory_bytes],
    "average_gradients": [other.average_gradients],
}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "cfg.normalization == 'LN' -> cfg.normalization <= 'LN'",
    "0 -> -1",  # the names of any rank
}


# ------------------------------------------------------------------------------- the reference, from other sides

CFG = TransformerConfig(d_vocab=1152, n_ctx=96, n_layers=4, n_heads=8, d_model=128, d_head=16, d_mlp=512)


def test_the_profiler_counts_the_same_in_our_transformer() -> None:
    """With the pattern watched, attention takes its explicit steps; the fused kernel's are not always counted."""
    model, tokens = Transformer(CFG), torch.zeros(2, 40, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits, _ = run_with_cache(model, tokens, names="*hook_pattern")
        logits.sum().backward()
    assert counter.get_total_flops() == tokens.numel() * ref.flops_per_token(CFG, 40)


def test_weights_gradients_and_optimizer_are_those_of_our_transformer() -> None:
    model = Transformer(CFG).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    optimizer.step()
    predicted = ref.memory_bytes(CFG, 1, 5, torch.bfloat16)
    assert sum(parameter.nbytes for parameter in model.parameters()) == predicted["weights"]
    assert sum(parameter.grad.nbytes for parameter in model.parameters()) == predicted["gradients"]
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
    assert sum(moment.nbytes for moment in moments) == predicted["optimizer"]
