"""Chapter 03, the loop: the step, its variants, and judging what was learned.

Oracles are the gradient of a model of two tables by autograd, and plain gradient descent worked out apart.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch03.circuit import nats_of, next_nats
from course_utils.checks.ch03.training import number, side_by_side
from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Stop
from course_utils.checks.standins.toy_lm import ToyLM, toy_gradient, toy_tokens
from course_utils.checks.translating import during

# ---------------------------------------------------------------------------------------------------- clip_grad_norm

Norm = Callable[[list[Tensor]], float]


def norms_of(grads: list[Tensor]) -> list[float]:
    return [grad.norm().item() for grad in grads]


def norm_of_all(grads: list[Tensor]) -> float:
    return math.hypot(*norms_of(grads))


def clipping(
    norm_of: Norm = norm_of_all,
    factor: Callable[[float, float], float] = lambda most, norm: min(1.0, most / norm),
    returned: Callable[[float, list[Tensor]], float] = lambda most, grads: norm_of_all(grads),
) -> Callable[..., float]:
    """Clipping with another norm, another factor, or another result."""

    def clip_grad_norm(parameters: Any, max_norm: float) -> float:
        grads = [p.grad for p in parameters if p.grad is not None]
        result, scale = returned(max_norm, grads), factor(max_norm, norm_of(grads))
        for grad in grads:
            grad.mul_(scale)
        return result

    return clip_grad_norm


def clipping_each(change: Callable[[Tensor, float], Any]) -> Callable[..., float]:
    """Every tensor is changed by itself."""

    def clip_grad_norm(parameters: Any, max_norm: float) -> float:
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = norm_of_all(grads)
        for grad in grads:
            change(grad, max_norm)
        return norm

    return clip_grad_norm


@may_change("parameters.grad")
@known_mistakes(
    {
        "each tensor is clipped by its own norm, which turns the gradient; one factor is for all.": clipping_each(
            lambda grad, most: grad.mul_(min(1.0, most / grad.norm().item()))
        ),
        "the gradient is always brought to `max_norm`: a short one is scaled up.": clipping(
            factor=lambda most, norm: most / norm
        ),
        "every number is clamped to [-max_norm, max_norm].": clipping_each(lambda grad, most: grad.clamp_(-most, most)),
        "nothing is clipped (a generator can be run through only once).": clipping(factor=lambda most, norm: 1.0),
        "the factor is 1 / norm; it is max_norm / norm.": clipping(factor=lambda most, norm: 1 / norm),
        "the factor is max_norm; it is max_norm / norm.": clipping(factor=lambda most, norm: most),
        "the factor is max_norm / norm^2: the root is missing.": clipping(
            factor=lambda most, norm: min(1.0, most / norm**2)
        ),
        "the norm is the sum of the tensors' norms; add their squares.": clipping(lambda grads: sum(norms_of(grads))),
        "the norm is that of the first tensor.": clipping(lambda grads: norms_of(grads)[0]),
        "the norm is that of the last tensor.": clipping(lambda grads: norms_of(grads)[-1]),
        "the largest number counts as the norm.": clipping(lambda grads: side_by_side(grads).abs().max().item()),
        "the absolute values are added up; the norm is the root of the sum of squares.": clipping(
            lambda grads: side_by_side(grads).abs().sum().item()
        ),
        "it is the norm after clipping.": clipping(returned=lambda most, grads: min(most, norm_of_all(grads))),
        "it is the square of the norm.": clipping(returned=lambda most, grads: norm_of_all(grads) ** 2),
        "it is the factor.": clipping(returned=lambda most, grads: min(1.0, most / norm_of_all(grads))),
        "the tensors' norms are added; add their squares.": clipping(returned=lambda most, grads: sum(norms_of(grads))),
    }
)
def check_clip_grad_norm(fn: Callable[..., Any]) -> None:
    """A gradient that is too long, one that is not, and none at all; parameters come from a generator."""
    shapes = ((3, 5), (4,), (2,), ())
    for max_norm in (0.7, 2.0, 1000.0):
        parameters = [nn.Parameter(noise(*shape, seed=40 + i)) for i, shape in enumerate(shapes)]
        for i in (0, 1, 3):
            grad = noise(*reversed(shapes[i]), seed=50 + i) * (1.5 if i else 0.5)
            parameters[i].grad = grad.permute([*reversed(range(grad.dim()))])  # a matrix lies transposed in memory
        given = {i: parameters[i].grad for i in (0, 1, 3)}
        grads = [p.grad.clone() for p in parameters if p.grad is not None]
        norm = side_by_side(grads).double().norm().item()
        case = f"clip_grad_norm with max_norm={max_norm}, a norm of {norm:.3g}"
        # run_check sees no parameters, only a generator.
        with unchanged("clip_grad_norm", **{f"parameter {i}": p for i, p in enumerate(parameters)}), during(case):
            actual = fn((parameter for parameter in parameters), max_norm)
        if parameters[2].grad is not None:
            raise CheckFailed(
                f"{case}: a parameter that had no gradient has one now.\n  Next: pass over those whose `.grad` is None."
            )
        lost = [i for i in (0, 1, 3) if parameters[i].grad is None]
        if lost:
            raise CheckFailed(f"{case}: the gradient of parameter {lost[0]} is gone.\n  Next: scale it, keep it.")
        got = side_by_side(p.grad for p in parameters if p.grad is not None)
        right = side_by_side(grads) * min(1.0, max_norm / norm)
        compare(f"{case}: all gradients, side by side", got, right, "number")
        number(case, "the norm before clipping", actual, norm)
        if any(parameters[i].grad is not grad for i, grad in given.items()):
            raise CheckFailed(
                f"{case}: a gradient is a new tensor, so whatever else holds the old one keeps its values.\n"
                "  Next: write into the gradient itself, in place."
            )
    still = nn.Parameter(noise(3))
    still.grad = torch.zeros(3)
    case = "clip_grad_norm with a gradient of zeros"
    with during("with a gradient of zeros"):
        number(case, "the norm", fn([still], 1.0), 0.0)
    compare(f"{case}: the gradient", still.grad, torch.zeros(3), "number")
    nobody = nn.Parameter(noise(3))
    with during("with no gradient at all"):
        number("clip_grad_norm with no gradient at all", "the norm", fn([nobody], 1.0), 0.0)


# -------------------------------------------------------------------------------------------------------- train_step


class _PlainSGD:
    """No more than what every optimizer has, ours too; it says when it is called, and its methods take no options."""

    def __init__(self, model: ToyLM, lr: float) -> None:
        self.model, self.param_groups = model, [{"params": list(model.parameters()), "lr": lr}]

    def zero_grad(self) -> None:
        self.model.events.append("zero_grad")
        for parameter in self.model.parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.model.events.append("step")
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(self.param_groups[0]["lr"] * parameter.grad)


class _LikeTorchs(_PlainSGD):
    """With the options that methods of torch's optimizers take; torch's own need a second of imports."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()

    def step(self, closure: Any = None) -> Any:
        super().step()


def stepping(**wrong: Any) -> Callable[..., float]:
    """A step with switches for what people get wrong."""

    def train_step(model: Any, optimizer: Any, batch: Tensor, max_norm: float | None = None) -> float:
        if wrong.get("steps_first"):
            optimizer.step()
        if not wrong.get("adds"):
            optimizer.zero_grad()
        nats = nats_of if wrong.get("unshifted") else next_nats
        loss = nats(model(batch), batch).mean()
        loss.backward()
        if max_norm is not None and "factor" in wrong:
            clipping(factor=wrong["factor"])(model.parameters(), max_norm)
        elif max_norm is not None:
            clipping()(model.parameters(), max_norm)
        for _ in range(wrong.get("steps", 0 if wrong.get("steps_first") else 1)):
            optimizer.step()
        return (nats(model(batch), batch).mean() if wrong.get("afterwards") else loss).item()

    return train_step


@may_change("model")
@known_mistakes(
    {
        "the gradients of the step before are still there and were added to: `zero_grad` is missing.": stepping(
            adds=True
        ),
        "the gradients are not clipped before the step.": stepping(factor=lambda most, norm: 1.0),
        "the gradients are always scaled to max_norm.": stepping(factor=lambda most, norm: most / norm),
        "the labels are not shifted.": stepping(unshifted=True),
        "the optimizer steps twice.": stepping(steps=2),
        "it steps first, with the gradients of the batch before.": stepping(steps_first=True),
        "it is the loss after the step; return that before it.": stepping(afterwards=True),
    }
)
def check_train_step(fn: Callable[..., Any]) -> None:
    """Three steps of plain gradient descent, worked out apart; at first, there are gradients of something else."""
    lr = 0.7
    for max_norm, training in [(None, True), (0.2, False), (50.0, True), (0.0, False)]:
        model = ToyLM().train(training)
        optimizer = (_LikeTorchs if training else _PlainSGD)(model, lr)
        for parameter in model.parameters():
            parameter.grad = noise(*parameter.shape, seed=61)
        batches = [toy_tokens(3, 5, seed=70 + step) for step in range(3)]
        for step, batch in enumerate(batches):
            name = f"train_step with max_norm={max_norm}, step {step}"
            before = toy_gradient(model, batch)[0]
            start = len(model.events)
            extra = {} if max_norm is None else {"max_norm": max_norm}
            # run_check does not know which argument may change where a learner has given them other names.
            with unchanged("train_step", batch=batch), during(f"in step {step}, with max_norm={max_norm}"):
                actual = fn(model, optimizer, batch, **extra)
            if model.training is not training:
                raise CheckFailed(
                    "train_step: it changed the mode of the model (training or evaluation).\n"
                    "  Next: leave that to the caller."
                )
            right = _trained(batches[: step + 1], lr, max_norm, training)
            try:
                compare(f"{name}: all parameters, side by side", side_by_side(model.parameters()), right, "number")
            except CheckFailed:
                _check_events(name, model.events[start:])
                raise
            number(name, "the loss", actual, before)


def _trained(batches: Sequence[Tensor], lr: float, max_norm: float | None, training: bool) -> Tensor:
    """Where the toy model is after a step on each batch, by hand."""
    model = ToyLM().train(training)
    for batch in batches:
        grads = toy_gradient(model, batch)[1]
        norm = side_by_side(grads).norm().item()
        factor = 1.0 if max_norm is None else min(1.0, max_norm / norm)
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.sub_(lr * factor * grad)
    return side_by_side(model.parameters())


def _check_events(name: str, events: list[str]) -> None:
    """Order mistakes that leave the parameters where they were, or in a place that does not say why."""
    if "step" not in events:
        raise CheckFailed(
            f"{name}: the optimizer was not asked to step, so no parameter changed.\n"
            "  Next: after the gradients are there, call `optimizer.step()`."
        )
    if "backward" not in events:
        raise CheckFailed(f"{name}: no gradient was computed.\n  Next: `loss.backward()` sends it to every parameter.")
    backward, step = events.index("backward"), len(events) - 1 - events[::-1].index("step")
    if "zero_grad" in events[backward:step]:
        raise CheckFailed(
            f"{name}: `zero_grad` stands between `backward` and `step`: the gradients are forgotten before their use.\n"
            "  Next: forget the old gradients before new ones are computed."
        )


# ---------------------------------------------------------------------------------------------- accumulate_gradients

Share = Callable[[int, int, int, int], float]


def of_rows(rows: int, all_rows: int, n: int, n_micro: int) -> float:
    """A micro-batch's share of the whole loss; there are n of them, and were to be n_micro."""
    return rows / all_rows


def of_micro_batches(rows: int, all_rows: int, n: int, n_micro: int) -> float:
    return 1 / n


def of_those_asked_for(rows: int, all_rows: int, n: int, n_micro: int) -> float:
    return 1 / n_micro if n < n_micro else rows / all_rows


def accumulating(
    share: Share = of_rows,
    cut: Callable[[Tensor, int], Sequence[Tensor]] = Tensor.chunk,
    returned: Share | None = of_rows,
    **wrong: Any,
) -> Callable[..., float]:
    """Accumulation with switches: shares in the gradient and in the result, how rows are cut, what is forgotten."""

    def accumulate_gradients(model: Any, batch: Tensor, n_micro: int) -> float:
        micros = cut(batch, n_micro)
        if wrong.get("forgets") == "what was there":
            model.zero_grad()
        total = 0.0
        for micro in micros:
            if wrong.get("forgets") == "each time":
                model.zero_grad()
            counts = len(micro), len(batch), len(micros), n_micro
            loss = next_nats(model(micro), micro).mean()
            (share(*counts) * loss).backward()
            total = total + returned(*counts) * loss.item() if returned else loss.item()
        return total

    return accumulate_gradients


@may_change("model.grad")
@known_mistakes(
    {
        "the micro-batches' losses are added up, each a mean; weigh them by their share of the rows.": accumulating(
            lambda *counts: 1.0
        ),
        "every micro-batch weighs the same; the last has fewer rows.": accumulating(of_micro_batches),
        "the sum is divided by n_micro, but there are fewer micro-batches.": accumulating(of_those_asked_for),
        "what was in `.grad` before is lost; add to it.": accumulating(forgets="what was there"),
        "only the last micro-batch is left in `.grad`.": accumulating(forgets="each time"),
        "only the last micro-batch is left in `.grad`, not weighed.": accumulating(
            lambda *counts: 1.0, forgets="each time"
        ),
        "the last micro-batch is left out.": accumulating(
            cut=lambda batch, n_micro: batch.chunk(n_micro)[: max(1, n_micro - 1)]
        ),
        "the rows that do not fill a micro-batch are left out.": accumulating(
            of_micro_batches, lambda batch, n_micro: batch.split(max(1, len(batch) // n_micro))[:n_micro]
        ),
        "it is the sum of the micro-batches' losses.": accumulating(returned=lambda *counts: 1.0),
        "it is the loss of the last micro-batch.": accumulating(returned=None),
        "every micro-batch weighs the same, though the last has fewer rows.": accumulating(returned=of_micro_batches),
        "it is divided by n_micro, but there are fewer micro-batches.": accumulating(returned=of_those_asked_for),
    }
)
def check_accumulate_gradients(fn: Callable[..., Any]) -> None:
    """The gradient of the whole batch; seven rows cannot be cut evenly, and something is in `.grad` already."""
    for n_rows, n_micro, unused in [(6, 3, False), (7, 3, False), (7, 2, True), (5, 1, False), (2, 3, False)]:
        model = ToyLM()
        batch = toy_tokens(n_rows, 4, seed=80)
        old = [noise(*parameter.shape, seed=81) * (not unused) for parameter in model.parameters()]
        for parameter, grad in zip(model.parameters(), old, strict=True):
            parameter.grad = None if unused else grad.clone()
        whole, fresh = toy_gradient(model, batch)
        name = f"accumulate_gradients of {n_rows} rows in {n_micro}"
        with during(f"in {n_micro} of {n_rows} rows"):
            actual = fn(model, batch, n_micro)
        most = -(-n_rows // n_micro)
        largest = max((seen["rows"] for seen in model.seen), default=0)
        if largest > most:
            raise CheckFailed(
                f"{name}: the model was given {largest} rows at once; at most {most} was the point.\n"
                "  Next: cut the rows into micro-batches, and run one after the other."
            )
        if any(seen["rows"] == 0 for seen in model.seen):
            raise CheckFailed(
                f"{name}: the model was given a micro-batch without rows, whose mean is 0/0.\n"
                "  Next: make fewer micro-batches where there are fewer rows."
            )
        got = side_by_side(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
        right = side_by_side(old) + side_by_side(fresh)
        compare(f"{name}: all gradients, side by side", got, right, "number")
        # Without backward, as in torch.func, there are no such events.
        if "backward" in model.events and ("forward", "forward") in pairwise(model.events):
            raise CheckFailed(
                f"{name}: a micro-batch went forward before the one before it had gone backward, so that the "
                "activations of several are kept.\n  Next: call backward on each loss before the next forward."
            )
        if len(model.seen) > n_micro:
            raise CheckFailed(
                f"{name}: the rows were cut into {len(model.seen)} micro-batches; there should be at most {n_micro}.\n"
                "  Next: make each as large as it may be."
            )
        number(name, "the mean loss over the batch", actual, whole)


# ---------------------------------------------------------------------------------------------------------- evaluate

Weight = Callable[[Tensor], float]


def predictions(tokens: Tensor) -> int:
    return tokens[:, 1:].numel()


def judging(result: Callable[[list[float], list[Tensor]], float]) -> Callable[..., float]:
    """An evaluation that makes this of the batches' losses."""

    def evaluate(model: Any, batches: Any) -> float:
        was_training, kept = model.training, list(batches)
        model.eval()
        with torch.no_grad():
            losses = [next_nats(model(tokens), tokens).mean().item() for tokens in kept]
        model.train(was_training)
        return result(losses, kept)

    return evaluate


def weighed(weight: Weight, over: Weight | None = None) -> Callable[..., float]:
    """Every batch's loss counts so much; their sum is divided by all weights, or by the sum of something else."""

    def result(losses: list[float], batches: list[Tensor]) -> float:
        total = sum(weight(tokens) * loss for loss, tokens in zip(losses, batches, strict=True))
        return total / sum(map(over or weight, batches))

    return judging(result)


# The mode is looked at here: after an exception run_check puts it back before anybody sees it.
@may_change("model")
@known_mistakes(
    {
        "every batch weighs the same; every predicted token should.": weighed(lambda tokens: 1),
        "batches weigh as their rows do; every predicted token should weigh the same.": weighed(len),
        "batches weigh as their lengths do; rows count too.": weighed(lambda tokens: tokens.shape[1] - 1),
        "batches weigh as their tokens do; the first of each row is not predicted.": weighed(Tensor.numel),
        "it is the sum over all predictions; take their mean.": judging(
            lambda losses, batches: sum(predictions(t) * loss for t, loss in zip(batches, losses, strict=True))
        ),
        "it is divided by all tokens; the first of each row is not predicted.": weighed(predictions, Tensor.numel),
        "it is the loss of the last batch.": judging(lambda losses, batches: losses[-1]),
        "it is the loss of the first batch.": judging(lambda losses, batches: losses[0]),
    }
)
def check_evaluate(fn: Callable[..., Any]) -> None:
    """Batches of other rows and lengths; a model that is another one in training mode and notes how it is run."""
    batches = [toy_tokens(3, 6, seed=90), toy_tokens(1, 2, seed=91), toy_tokens(5, 3, seed=92)]
    for training in (True, False):
        model = ToyLM().train(training)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        mode = "training" if training else "evaluation"
        read = {f"batch {i}": batch for i, batch in enumerate(batches)} | dict(model.named_parameters())
        with unchanged("evaluate", **read):
            actual = fn(model, (batch for batch in batches))
        if any(seen["training"] for seen in model.seen):
            raise CheckFailed(
                "evaluate: the model ran in training mode, in which layers such as dropout add noise.\n"
                "  Next: `model.eval()` before the first batch."
            )
        if any(seen["graph"] for seen in model.seen):
            raise CheckFailed(
                "evaluate: gradients are recorded, which costs memory and time.\n"
                "  Next: run the model under torch.no_grad()."
            )
        if model.training is not training:
            raise CheckFailed(
                f"evaluate: the model was in {mode} mode before, and is not afterwards.\n"
                "  Next: keep `model.training` first, and hand it to `model.train(...)` in the end."
            )
        grads = [parameter.grad for parameter in model.parameters()]
        if any(grad is None or not torch.equal(grad, torch.ones_like(grad)) for grad in grads):
            raise CheckFailed("evaluate: it changed the parameters' `.grad`.\n  Next: it should only look.")
        model.eval()
        losses = [toy_gradient(model, batch)[0] for batch in batches]
        expected = sum(n * loss for n, loss in zip((15, 1, 10), losses, strict=True)) / 26
        number("evaluate", "the mean loss", actual, expected)
    _check_broken_evaluation(fn)


class _Broken(ToyLM):
    def forward(self, tokens: Tensor) -> Tensor:
        raise Stop


def _check_broken_evaluation(fn: Callable[..., Any]) -> None:
    def broken_off() -> Iterator[Tensor]:
        yield toy_tokens(2, 3)
        raise Stop

    for where, model, batches in (
        ("in the model", _Broken(), [toy_tokens(2, 3)]),
        ("in the batches", ToyLM(), broken_off()),
    ):
        model.train()
        with contextlib.suppress(Stop):
            fn(model, batches)
        if not model.training:
            raise CheckFailed(
                f"evaluate: after an exception {where} the training mode is not put back.\n"
                "  Next: `try: ... finally: ...` does something whatever happens."
            )
