"""Chapter 03's checks of costs and of the exchange of gradients, against mistakes that learners make.

Each mistake returns the right type and form, and must be refused with its promised words. Those marked `surprise` are
absent from the check's own list of known mistakes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import solutions.ch03_training as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch03 import cost
from course_utils.checks.ch03.cost import activation_numbers, count_parameters, operations
from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache
from solutions.ch02_transformer import Transformer
from tests.ch03 import other_training_cost as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

CHECKS: dict[str, Callable[[Any], None]] = {
    name.removeprefix("check_"): value
    for name, value in vars(cost).items()
    if name in ("check_flops_per_token", "check_memory_bytes", "check_average_gradients")
}
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ---------------------------------------------------------------------------------------------------- flops_per_token


def flops(words: str, surprise: bool = False, **changes: Any) -> None:
    """A count with something forgotten or misunderstood; a change may be a function of cfg and n_ctx."""

    def answer(cfg: TransformerConfig, n_ctx: int) -> int:
        worked_out = {name: value(cfg, n_ctx) if callable(value) else value for name, value in changes.items()}
        return operations(cfg, n_ctx, **worked_out)

    mistake("flops_per_token", words, answer, surprise)


flops("a multiply-add is counted as one operation", passes=3)
flops("only forward is counted", passes=2)
flops("backward costs what forward does", passes=4)
flops("the unembedding is forgotten", unembed=False)
flops("looking up embeddings counts as a product", lookups=True)
flops("scores and mixtures are left out", pairs=0)
flops("half of attention's work is missing", pairs=lambda cfg, n_ctx: n_ctx)
flops("only the keys that a query may see", pairs=lambda cfg, n_ctx: n_ctx + 1)
flops("attention is counted over `cfg.n_ctx` keys", pairs=lambda cfg, n_ctx: 2 * cfg.n_ctx)
flops("taken to be d_model wide", width=lambda cfg, n_ctx: cfg.d_model)
flops("`W_O` is forgotten", output=False)
flops("the MLP is counted", mlp=True)
mistake("flops_per_token", "a whole sequence is counted", lambda cfg, n_ctx: n_ctx * operations(cfg, n_ctx))
mistake("flops_per_token", "6 operations per parameter", lambda cfg, n_ctx: 6 * sum(count_parameters(cfg).values()))
mistake(
    "flops_per_token",
    "wrong answer",
    lambda cfg, n_ctx: operations(cfg, n_ctx) + 6 * count_parameters(cfg)["biases"],
    surprise=True,
)
flops("wrong answer", surprise=True, pairs=lambda cfg, n_ctx: 2 * n_ctx * cfg.n_heads)  # heads counted twice
flops("wrong answer", surprise=True, passes=3, unembed=False)  # two mistakes at once
mistake(
    "flops_per_token",
    "wrong answer",
    lambda cfg, n_ctx: operations(replace(cfg, n_layers=1), n_ctx),
    surprise=True,
)
mistake("flops_per_token", "expected an int, got a number", lambda cfg, n_ctx: operations(cfg, n_ctx) / 4.5, True)


# ------------------------------------------------------------------------------------------------------- memory_bytes


def memory(words: str, edit: Callable[..., dict[str, int] | None], surprise: bool = False) -> None:
    """The right answer, edited: `edit(answer, cfg, batch, n_ctx, size)` returns what to put in its place."""

    def answer(cfg: TransformerConfig, batch: int, n_ctx: int, dtype: torch.dtype) -> dict[str, int]:
        right = ref.memory_bytes(cfg, batch, n_ctx, dtype)
        return {**right, **(edit(right, cfg, batch, n_ctx, dtype.itemsize) or {})}

    mistake("memory_bytes", words, answer, surprise)


def weights(answer: dict[str, int], change: int) -> dict[str, int]:
    """The answer where the weights take so many bytes more, and what follows from that."""
    n = answer["weights"] + change
    return {"weights": n, "gradients": n, "optimizer": 2 * n}


for kind, words in {
    "biases": "biases are not counted",
    "norms": "the parameters of LayerNorm are not counted",
    "positions": "the position embeddings are not counted",
    "embed": "only one of `W_E` and `W_U` is counted",
}.items():
    memory(words, lambda right, cfg, batch, n_ctx, size, kind=kind: weights(right, -count_parameters(cfg)[kind] * size))
memory(
    "there are `n_ctx` position", lambda a, cfg, b, n_ctx, size: weights(a, (n_ctx - cfg.n_ctx) * cfg.d_model * size)
)
memory("AdamW keeps two", lambda a, *_: {"optimizer": a["weights"]})
memory("a copy of the weights as well", lambda a, *_: {"optimizer": 3 * a["weights"]})
memory(
    "the moments of the optimizer are in float32", lambda a, cfg, b, n, size: {"optimizer": 8 * a["weights"] // size}
)
memory("the gradients are forgotten", lambda a, *_: {"gradients": 0})
memory("numbers are counted, not bytes", lambda a, cfg, b, n, size: {k: v // size for k, v in a.items()})
memory("four bytes, whatever `dtype` is", lambda a, cfg, b, n, size: {k: 4 * v // size for k, v in a.items()})


def activations(words: str, change: Callable[[TransformerConfig, int], int], surprise: bool = False) -> None:
    """Activations with so many numbers more for each token."""
    memory(
        words,
        lambda a, cfg, batch, n_ctx, size: {
            "activations": a["activations"] + batch * n_ctx * size * change(cfg, n_ctx)
        },
        surprise,
    )


activations("log-probabilities of the vocabulary are not", lambda cfg, n_ctx: -cfg.d_vocab)
activations("the patterns are among the activations", lambda cfg, n_ctx: cfg.n_layers * cfg.n_heads * n_ctx)
activations("but z is not", lambda cfg, n_ctx: -cfg.n_layers * cfg.n_heads * cfg.d_head)
activations(
    "are those of one layer", lambda cfg, _: -(cfg.n_layers - 1) * activation_numbers(cfg)["in layers"] // cfg.n_layers
)
activations("at 'activations'", lambda cfg, n_ctx: -cfg.n_layers * cfg.d_mlp, surprise=True)
activations("at 'activations'", lambda cfg, n_ctx: cfg.d_vocab, surprise=True)
activations("at 'activations'", lambda cfg, n_ctx: -cfg.n_layers * cfg.d_model, surprise=True)
activations("at 'activations'", lambda cfg, n_ctx: -2 * cfg.d_model, surprise=True)
memory("those of one row", lambda a, cfg, batch, *_: {"activations": a["activations"] // batch})
memory("of `cfg.n_ctx` tokens in each row", lambda a, cfg, b, n, _: {"activations": a["activations"] // n * cfg.n_ctx})
memory("of one token", lambda a, cfg, batch, n_ctx, _: {"activations": a["activations"] // (batch * n_ctx)})
memory("at 'gradients'", lambda a, *_: {"gradients": 2 * a["weights"]}, surprise=True)
memory("at 'weights'", lambda a, cfg, b, n, size: weights(a, cfg.d_model * size), surprise=True)
memory("'total' should not be there", lambda a, *_: {"total": sum(a.values())}, surprise=True)


# -------------------------------------------------------------------------------------------------- average_gradients


def gradients(words: str, surprise: bool = False) -> Callable[[Any], Any]:
    """Note a function from the ranks' tensors of one name to what each rank gets."""

    def note(function: Callable[[list[Tensor]], list[Tensor]]) -> Any:
        def answer(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
            if not grads_per_rank or len({frozenset(grads) for grads in grads_per_rank}) > 1:
                raise ValueError
            columns = {name: function([grads[name] for grads in grads_per_rank]) for name in grads_per_rank[0]}
            return [{name: values[rank] for name, values in columns.items()} for rank in range(len(grads_per_rank))]

        mistake("average_gradients", words, answer, surprise)

    return note


def copies(tensor: Tensor, n: int) -> list[Tensor]:
    return [tensor.clone() for _ in range(n)]


gradients("added up, not averaged")(lambda own: copies(sum(own), len(own)))
gradients("keeps its own gradients")(lambda own: [sum(own) / len(own), *(grad.clone() for grad in own[1:])])
gradients("every rank gets the gradients of rank 0")(lambda own: copies(own[0], len(own)))
gradients("divided by the ranks twice")(lambda own: copies(sum(own) / len(own) ** 2, len(own)))
gradients("all of a parameter's numbers are averaged")(
    lambda own: copies((sum(own) / len(own)).mean().expand(own[0].shape), len(own))
)
gradients("values are wrong", surprise=True)(lambda own: copies(torch.stack(own).median(dim=0).values, len(own)))
gradients("values are wrong", surprise=True)(lambda own: copies((own[0] + own[-1]) / 2, len(own)))
gradients("the very same tensor", surprise=True)(lambda own: [sum(own) / len(own)] * len(own))
gradients("expected dtype float64, got float32", surprise=True)(
    lambda own: copies((sum(own) / len(own)).float(), len(own))
)


def careless(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    n = len(grads_per_rank)
    return [{k: sum(grads[k] for grads in grads_per_rank) / n for k in grads_per_rank[0]} for _ in range(n)]


def careful(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    if not grads_per_rank or len({frozenset(grads) for grads in grads_per_rank}) > 1:
        raise ValueError
    return careless(grads_per_rank)


def in_place(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    answer = careful(grads_per_rank)
    for grads, averages in zip(grads_per_rank, answer, strict=True):
        for name, average in averages.items():
            grads[name].copy_(average)
    return answer


def emptied(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    answer = careful(grads_per_rank)
    grads_per_rank[0].pop("b")
    return answer


mistake("average_gradients", "raised IndexError", lambda g: careless(g) if g else g[0], surprise=True)
mistake("average_gradients", "changed `rank 0's W` in place", in_place, surprise=True)
mistake("average_gradients", "changed `grads_per_rank`", emptied, surprise=True)
mistake("average_gradients", "should raise ValueError", lambda g: careless(g) if g else [], surprise=True)
mistake("average_gradients", "a list of 3 dictionaries, one for each rank, got a dict", lambda g: careful(g)[0], True)
mistake("average_gradients", "rank 0 should have the gradients of", lambda g: [dict.fromkeys("a") for _ in g], True)


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("torch.stack(", "3 * 2 *"))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_nothing_is_refused(exercise: str) -> None:
    with pytest.raises(CheckFailed, match="returned None"):
        run_check(CHECKS[exercise], lambda *arguments: None)


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
@pytest.mark.parametrize("exercise", CHECKS)
def test_right_answers_pass(exercise: str, module: Any) -> None:
    run_check(CHECKS[exercise], getattr(module, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "cfg.normalization == 'LN' -> cfg.normalization <= 'LN'",
    "0 -> -1",  # the names of any rank
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise]) <= STILL_RIGHT


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
