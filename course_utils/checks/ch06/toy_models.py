"""What the checks of chapter 06 share: a learner's class of models side by side, and what random draws must hold to."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch06.sizes import compare_weights_slopes
from course_utils.checks.comparing import compare_kind
from course_utils.checks.modules import check_module, noise, randomise, weights_of
from course_utils.checks.outcomes import CheckFailed, Evidence

AXES = "batch instance feature"


def side_by_side(
    name: str,
    cls: Any,
    sizes: tuple[int, int, int],
    shapes: Mapping[str, tuple[int, ...]],
    each: Callable[[dict[str, Tensor], Tensor, int], Tensor],
) -> None:
    """Build a class of models side by side, and compare it with `each`: what one instance makes of its own inputs.

    `sizes` are the numbers of instances, features and hidden dimensions, as the class takes them.
    """
    keep = "Next: keep the `__init__` that was given (the statement holds it)."
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed(f"{name}: expected a class that inherits from nn.Module.\n  {keep}")
    module = cls(*sizes, torch.Generator().manual_seed(0))
    found = {entry: tuple(tensor.shape) for entry, tensor in module.state_dict().items()}
    for entry, shape in shapes.items():
        if found.get(entry) != shape:
            raise CheckFailed(f"{name}: expected a parameter `{entry}` of shape {shape}, got {found}.\n  {keep}")
    randomise(module)
    x = noise(6, sizes[0], sizes[1], seed=3)
    weights = weights_of(module)

    def right(parameters: dict[str, Tensor]) -> Tensor:
        return torch.stack([each(parameters, x[:, i], i) for i in range(sizes[0])], dim=1)

    output = right(weights)
    check_module(name, module, (x,), lambda replaced: {"output": output}, AXES)
    words = {entry: "instance row column" if len(shape) == 3 else "instance feature" for entry, shape in shapes.items()}
    compare_weights_slopes(name, module, lambda: module(x), right, **words)


def near(name: str, what: str, actual: Tensor, expected: Tensor, tolerance: float, axes: str, advice: str) -> None:
    """Raise CheckFailed unless what was counted in random draws is as near as chance allows.

    The evidence is where it is too much, where too little, and about how much on average: the same for most draws.
    """
    off = (actual - expected) * ((actual - expected).abs() > tolerance)
    if not off.any():
        return
    index = tuple(off.nonzero()[0].tolist())
    place = ", ".join(f"{word}={i}" for word, i in zip(axes.split(), index, strict=True))
    at = f"first at [{place}]: " if place else ""
    raise CheckFailed(
        f"{name}: {what}: wrong in {int(off.count_nonzero())} of {off.numel()} places.\n"
        f"  {at}expected about {expected[index]:.3g}, got {actual[index]:.3g}",
        evidence=Evidence(
            f"{name}: {what}", [off.sign(), round(float(off.sum() / off.count_nonzero() / tolerance * 1.6))]
        ),
        advice=f"  Next: {advice}",
    )


def draws(name: str, call: str, draw: Callable[[torch.Generator], Any], shape: tuple[int, ...], axes: str) -> Tensor:
    """One batch of random features, after what must hold for every draw: its form, its range, and its generator."""
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    actual = draw(generator)
    words = ", ".join(f"{word}={size}" for word, size in zip(axes.split(), shape, strict=True))
    if not isinstance(actual, Tensor):
        got = "None" if actual is None else f"a {type(actual).__name__}"
        raise CheckFailed(f"{name}: expected a Tensor, got {got}.\n  {call}\n  Next: return the tensor itself.")
    if tuple(actual.shape) != shape:
        raise CheckFailed(
            f"{name}: wrong shape.\n  {call}\n  expected ({words})\n  got      {tuple(actual.shape)}",
            evidence=Evidence(f"{name}: the shape", tuple(actual.shape)),
            advice="  Next: print the shape after each step.",
        )
    compare_kind(name, actual, torch.zeros(()))
    if actual.min() < 0 or actual.max() > 1:
        seen = f"values lie between {actual.min():.3g} and {actual.max():.3g}"
        raise CheckFailed(
            f"{name}: {seen}, expected between 0 and 1.\n  {call}",
            evidence=Evidence(f"{name}: the range", [bool(actual.min() < 0), bool(actual.max() > 1)]),
            advice="  Next: draw the values of active features with torch.rand.",
        )
    if torch.equal(generator.get_state(), before):
        raise CheckFailed(
            f"{name}: it left `generator` as it was, so every batch would be the same.\n"
            "  Next: draw from the generator itself, not from a copy."
        )
    again, second = draw(torch.Generator().manual_seed(1)), draw(generator)
    if not torch.equal(again, actual):
        raise CheckFailed(
            f"{name}: the same seed gave two different batches.\n  Next: take every random number from `generator`."
        )
    if torch.equal(second, actual) or torch.equal(draw(torch.Generator().manual_seed(2)), actual):
        raise CheckFailed(f"{name}: two batches are the same.\n  Next: draw from `generator` as it comes.")
    if torch.cuda.is_available():
        on_gpu = draw(torch.Generator("cuda").manual_seed(1))
        if on_gpu.device.type != "cuda":
            raise CheckFailed(
                f"{name}: the generator is on the GPU, the result is not.\n  Next: device=generator.device."
            )
    return actual


def active_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of the values that are not 0, over the batch."""
    n_active = (x > 0).sum(0).clamp(min=1)
    return x.sum(0) / n_active, x.square().sum(0) / n_active


def together(x: Tensor) -> Tensor:
    """How often each two coordinates of a row are active in the same sample: [coordinate, coordinate]."""
    active = (x.flatten(1) > 0).float()
    return active.T @ active / len(active)


def by_hand(
    parameters: dict[str, Tensor],
    loss_of: Callable[[dict[str, Tensor], int], Tensor],
    steps: int,
    rate: Callable[[int], float],
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[dict[str, Tensor], list[float]]:
    """Adam with decoupled decay, spelled out; `loss_of(parameters, step)` is the loss of one step's batch."""
    current = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in current.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in current.items()}
    losses = []
    for step in range(steps):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in current.items()}
        loss = loss_of(leaves, step)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        losses.append(loss.item())
        for name, grad in grads.items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grad**2
            mean, size = first[name] / (1 - betas[0] ** (step + 1)), second[name] / (1 - betas[1] ** (step + 1))
            decayed = current[name] * (1 - rate(step) * weight_decay)
            current[name] = decayed - rate(step) * mean / (size.sqrt() + 1e-8)
    return current, losses
