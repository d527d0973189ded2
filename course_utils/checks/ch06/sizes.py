"""What the checks of dictionaries share: sizes that all differ, with and without instances."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed

Fn = Callable[..., Any]
BATCH, INSTANCE, LATENT, D_IN = 4, 3, 6, 5
WORDS = {(): "", (INSTANCE,): "instance "}  # the axes between the batch and the last, in words
LEADS = tuple(WORDS)  # one autoencoder, and several side by side


def batch_of(lead: tuple[int, ...], last: int, seed: int) -> Tensor:
    """Random numbers [batch *instance last]."""
    return noise(BATCH, *lead, last, seed=seed)


def by_instance(
    lead: tuple[int, ...], of_one: Callable[..., Tensor], *tensors: Tensor, axes: tuple[int, ...]
) -> Tensor:
    """`of_one` for each instance alone, stacked; `axes` says which axis of each tensor is the instance's."""
    if not lead:
        return of_one(*tensors)
    slices = [tensor.unbind(axis) for tensor, axis in zip(tensors, axes, strict=True)]
    return torch.stack([of_one(*each) for each in zip(*slices, strict=True)])


def every_kind(name: str, fn: Fn, inputs: tuple[Any, ...], axes: str) -> None:
    """Other dtypes and layouts, and a gradient that gets through."""
    follows_input(name, fn, inputs, axes, gradient=True)
    follows_every_kind(name, fn, inputs, axes)


def compare_slopes(name: str, fn: Fn, right: Fn, inputs: dict[str, Tensor], axes: dict[str, str]) -> None:
    """The gradients of a weighted sum of the result with respect to each input, against those of a right function.

    An input that is not in `axes` must get none.
    """
    found = []
    for each in (fn, right):
        leaves = {label: tensor.detach().clone().requires_grad_() for label, tensor in inputs.items()}
        out = each(**leaves)
        slopes: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if out.requires_grad:
            weighted = (out * noise(*out.shape, seed=77)).sum()
            slopes = torch.autograd.grad(weighted, list(leaves.values()), allow_unused=True)
        found.append(dict(zip(leaves, slopes, strict=True)))
    for label, tensor in inputs.items():
        got = found[0][label]
        got = torch.zeros_like(tensor) if got is None else got
        words = axes.get(label, " ".join(f"axis{i}" for i in range(tensor.dim())))
        want = found[1][label] if label in axes else torch.zeros_like(tensor)
        compare(f"{name}: the gradient of `{label}`", got, want, words)


def compare_weights_slopes(
    name: str, module: nn.Module, run: Callable[[], Tensor], right: Callable[[dict[str, Tensor]], Tensor], **axes: str
) -> None:
    """The gradients that a weighted sum of `run()` sends into a module's parameters, against those of `right`.

    `right` has the parameters by name. A bias that is cut off in one of two places gives the right values.
    """
    parameters = dict(module.named_parameters())
    leaves = {label: parameter.detach().clone().requires_grad_() for label, parameter in parameters.items()}
    out, expected = run(), right(leaves)
    weights = noise(*expected.shape, seed=78)
    got: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if out.requires_grad:
        got = torch.autograd.grad((out * weights).sum(), list(parameters.values()), allow_unused=True)
    want = torch.autograd.grad((expected * weights).sum(), list(leaves.values()), allow_unused=True)
    for label, found, slope in zip(parameters, got, want, strict=True):
        if slope is not None:
            found = torch.zeros_like(slope) if found is None else found
            try:
                compare(f"{name}: the gradient of `{label}`", found, slope, axes[label])
            except CheckFailed as failure:
                raise failure.with_lines("  The values are right. Is there a .detach(), .data or no_grad?") from None
