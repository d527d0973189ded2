"""Chapter 03's step and its variants: wrong answers that their checks do not know, and right ones in another style.

At the end the parts together: a batch that is learned by heart.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import solutions.ch03_training as ref
from course_utils.checks.ch03 import step
from tests.ch03 import other_training_loop as other

SECRETS = ("optimizer.zero_grad()", ".flatten(0, 1)", "grad.mul_", ".chunk(")

# ---------------------------------------------------------------------------------------------------- clip_grad_norm


def asks_everyone(parameters: Any, max_norm: float) -> float:
    return float(torch.stack([p.grad.norm() for p in parameters]).norm())


def scales_the_parameters(parameters: Any, max_norm: float) -> float:
    parameters = list(parameters)
    norm = ref.clip_grad_norm(parameters, math.inf)
    for p in parameters:
        p.data.mul_(min(1, max_norm / norm))
    return norm


def gives_gradients(parameters: Any, max_norm: float) -> float:
    parameters = list(parameters)
    norm = ref.clip_grad_norm(parameters, max_norm)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return norm


def takes_gradients(parameters: Any, max_norm: float) -> float:
    parameters = list(parameters)
    norm = ref.clip_grad_norm(parameters, max_norm)
    for p in parameters:
        p.grad = None
    return norm


def makes_new_gradients(parameters: Any, max_norm: float) -> float:
    parameters = [p for p in parameters if p.grad is not None]
    norm = ref.clip_grad_norm(parameters, math.inf)
    for p in parameters:
        p.grad = p.grad * min(1.0, max_norm / norm) if norm else p.grad
    return norm


def divides_by_zero(parameters: Any, max_norm: float) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.tensor(step.norm_of_all(grads))
    for grad in grads:
        grad.mul_(norm.clamp(max=max_norm) / norm)
    return norm.item()


def side_by_side_views(parameters: Any, max_norm: float) -> float:
    parameters = [p for p in parameters if p.grad is not None]
    torch.cat([p.grad.view(-1) for p in parameters])
    return ref.clip_grad_norm(parameters, max_norm)


# -------------------------------------------------------------------------------------------------------- train_step


def acting(*acts: Callable[[Any, Any, Any, float | None], Any]) -> Any:
    """Forgets the old gradients, works out the loss, and then does these things in order."""

    def train_step(model: Any, optimizer: Any, batch: Any, max_norm: float | None = None) -> float:
        optimizer.zero_grad()
        loss = ref.lm_loss(model(batch), batch)
        for act in acts:
            act(model, optimizer, loss, max_norm)
        return loss.item()

    return train_step


def backward(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    loss.backward()


def half_backward(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    (0.5 * loss).backward()


def forget(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    optimizer.zero_grad()


def clip(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    if max_norm is not None:
        ref.clip_grad_norm(model.parameters(), max_norm)


def clip_tightly(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    ref.clip_grad_norm(model.parameters(), 0.1)


def go(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    optimizer.step()


def renamed(network: Any, adam: Any, texts: Any, max_norm: float | None = None) -> float:
    return ref.train_step(network, adam, texts, max_norm)


def renamed_and_spoiled(network: Any, adam: Any, texts: Any, max_norm: float | None = None) -> float:
    loss = ref.train_step(network, adam, texts, max_norm)
    texts.clamp_(max=5)
    return loss


def change_mode(model: Any, optimizer: Any, loss: Any, max_norm: float | None) -> None:
    model.train()


def asks_for_none(model: Any, optimizer: Any, batch: Any, max_norm: float | None = None) -> float:
    optimizer.zero_grad(set_to_none=True)
    return ref.train_step(model, optimizer, batch, max_norm)


def functional(model: Any, batch: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients by torch.func."""

    def loss_of(parameters: Any) -> Any:
        return ref.lm_loss(torch.func.functional_call(model, parameters, (batch,)), batch)

    grads, loss = torch.func.grad_and_value(loss_of)({name: p.detach() for name, p in model.named_parameters()})
    return loss.item(), grads


def functional_step(model: Any, optimizer: Any, batch: Any, max_norm: float | None = None) -> float:
    loss, grads = functional(model, batch)
    for name, p in model.named_parameters():
        p.grad = grads[name]
    clip(model, optimizer, loss, max_norm)
    optimizer.step()
    return loss


def asked_step(model: Any, optimizer: Any, batch: Any, max_norm: float | None = None) -> float:
    loss = ref.lm_loss(model(batch), batch)
    parameters = list(model.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.grad = grad
    clip(model, optimizer, loss, max_norm)
    optimizer.step()
    return loss.item()


# ---------------------------------------------------------------------------------------------- accumulate_gradients


def functional_accumulation(model: Any, batch: Any, n_micro: int) -> float:
    total, sums = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for micro in batch.chunk(n_micro):
        loss, grads = functional(model, micro)
        total += loss * len(micro) / len(batch)
        for name, grad in grads.items():
            sums[name] += grad * len(micro) / len(batch)
    for name, p in model.named_parameters():
        p.grad = sums[name] if p.grad is None else p.grad + sums[name]
    return total


def adds_to_nothing(model: Any, batch: Any, n_micro: int) -> float:
    kept = [p.grad.clone() for p in model.parameters()]
    loss = ref.accumulate_gradients(model, batch, n_micro)
    return loss if kept else 0.0


def row_by_row(model: Any, batch: Any, n_micro: int) -> float:
    return ref.accumulate_gradients(model, batch, len(batch))


def keeps_all_graphs(model: Any, batch: Any, n_micro: int) -> float:
    losses = [ref.lm_loss(model(micro), micro) * len(micro) / len(batch) for micro in batch.chunk(n_micro)]
    sum(losses).backward()
    return sum(losses).item()


def steps_too(model: Any, batch: Any, n_micro: int) -> float:
    loss = ref.accumulate_gradients(model, batch, n_micro)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    return loss


def all_at_once(model: Any, batch: Any, n_micro: int) -> float:
    loss = ref.lm_loss(model(batch), batch)
    loss.backward()
    return loss.item()


# ---------------------------------------------------------------------------------------------------------- evaluate


def looking(training: bool = False, recorded: bool = False) -> Any:
    """An evaluation in this mode, with or without gradients, which puts the mode back unless something fails."""

    def evaluate(model: Any, batches: Any) -> float:
        was_training = model.training
        model.train(training)
        with torch.set_grad_enabled(recorded):
            found = [(ref.lm_loss(model(tokens), tokens).item(), tokens[:, 1:].numel()) for tokens in batches]
        model.train(was_training)
        return sum(loss * n for loss, n in found) / sum(n for _, n in found)

    return evaluate


def then(act: Callable[[Any], Any]) -> Any:
    """A right evaluation, after which something is done to the model."""

    def evaluate(model: Any, batches: Any) -> float:
        loss = ref.evaluate(model, batches)
        act(model)
        return loss

    return evaluate


def changes_batches(model: Any, batches: Any) -> float:
    return ref.evaluate(model, (tokens.clamp_(max=5) for tokens in batches))


def empties_the_generator(model: Any, batches: Any) -> float:
    list(batches)
    return ref.evaluate(model, [torch.tensor([[0, 1, 2]])])


def reads_batches_first(model: Any, batches: Any) -> float:
    was_training = model.training
    model.eval()
    kept = list(batches)
    model.train(was_training)
    return ref.evaluate(model, iter(kept))


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "clip_grad_norm": [
        (
            "as a plain number, got a Tensor",
            lambda parameters, most: torch.tensor(ref.clip_grad_norm(parameters, most)),
        ),
        ("Every value is", step.clipping(factor=lambda most, norm: min(1.0, most / norm) ** 0.5)),
        ("your code raised AttributeError", asks_everyone),
        ("it changed `parameter 0` in place", scales_the_parameters),
        ("a parameter that had no gradient has one now", gives_gradients),
        ("the gradient of parameter 0 is gone", takes_gradients),
        ("a gradient is a new tensor", makes_new_gradients),
        ("with a gradient of zeros", divides_by_zero),
        ("your code raised RuntimeError", side_by_side_views),
    ],
    "train_step": [
        ("`zero_grad` stands between", acting(backward, forget, clip, go)),
        ("was not asked to step", acting(backward, clip)),
        ("no gradient was computed", acting(clip, go)),
        ("values are wrong", acting(half_backward, clip, go)),
        ("values are wrong", acting(backward, clip, clip_tightly, go)),
        ("it changed the mode", acting(backward, clip, go, change_mode)),
        ("got a Tensor", lambda *given, **options: torch.tensor(ref.train_step(*given, **options))),
        ("it changed `batch` in place", renamed_and_spoiled),
        ("raised TypeError in step 0, with max_norm=0.2", asks_for_none),
        ("with max_norm=0.0", lambda *given, max_norm=None: ref.train_step(*given, max_norm or None)),
    ],
    "accumulate_gradients": [
        ("activations of several are kept", keeps_all_graphs),
        ("a micro-batch without rows", step.accumulating(cut=torch.Tensor.tensor_split)),
        ("it changed `model.here` in place", steps_too),
        ("returned None", lambda *given: ref.accumulate_gradients(*given) and None),
        ("rows at once; at most", step.accumulating(cut=lambda batch, n_micro: batch.chunk(n_micro, dim=1))),
        ("the model was given 6 rows at once; at most 2", all_at_once),
        ("raised AttributeError in 2 of 7 rows", adds_to_nothing),
        ("the rows were cut into 6 micro-batches", row_by_row),
    ],
    "evaluate": [
        ("the model was in training mode before", then(lambda model: model.eval())),
        ("the model was in evaluation mode before", then(lambda model: model.train())),
        ("ran in training mode", looking(training=True)),
        ("gradients are recorded", looking(recorded=True)),
        ("it left gradient recording", then(lambda model: torch.set_grad_enabled(False))),
        ("got a Tensor", lambda *given: torch.tensor(ref.evaluate(*given))),
        ("after an exception in the model", looking()),
        ("after an exception in the batches", reads_batches_first),
        ("it changed the parameters' `.grad`", then(lambda model: model.zero_grad())),
        ("it changed `here` in place", then(lambda model: model.here.data.mul_(0.9))),
        ("it changed `batch 0` in place", changes_batches),
        ("values is wrong", empties_the_generator),
    ],
}

ALSO_RIGHT = {
    "clip_grad_norm": [other.clip_grad_norm],
    "train_step": [other.train_step, renamed, asked_step, functional_step],
    "accumulate_gradients": [other.accumulate_gradients, functional_accumulation],
    "evaluate": [other.evaluate, lambda *given: np.float64(other.evaluate(*given))],
}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "grad.square().sum().item() -> grad.square().sum()",
    "norm > max_norm -> norm >= max_norm",
}


# ---------------------------------------------------------------------------------------------------------- together


def test_one_batch_can_be_learned_by_heart() -> None:
    """The parts together: what every training loop should be able to do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11))
    rng = torch.Generator().manual_seed(0)
    batch = torch.randperm(11, generator=rng)[None].repeat(3, 1)
    optimizer = ref.AdamW(model.parameters(), lr=0.05)
    losses = [ref.train_step(model, optimizer, batch, max_norm=1.0) for _ in range(60)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.02
    assert ref.evaluate(model, [batch]) < 0.02
