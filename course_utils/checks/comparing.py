"""Comparing tensors in the words of their axes: what is wrong, one place, and a fact about all the wrong values."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.outcomes import CheckFailed, Evidence


def compare(
    name: str,
    actual: object,
    expected: Tensor,
    axes: str,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise CheckFailed unless `actual` is the tensor `expected`, in shape, dtype, device and values.

    `axes` names the axes, such as "batch pos d_model". `inputs` are tensors of the same shape, by name, whose value at
    the wrong place is worth knowing.
    """
    words, evidence = axes.split(), Evidence(name, actual)
    if actual is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    if not isinstance(actual, Tensor):
        raise CheckFailed(
            f"{name}: expected a Tensor, got a {type(actual).__name__}.\n  Next: return the tensor itself."
        )
    if actual.shape != expected.shape:
        message, advice = _shape_message(name, actual, expected, words)
        raise CheckFailed(message, evidence=evidence, advice=advice)
    compare_kind(name, actual, expected)
    actual, expected = actual.detach(), expected.detach()
    if not expected.is_floating_point():
        rtol = atol = 0.0
    wrong = ~torch.isclose(actual.double(), expected.double(), rtol=rtol, atol=atol)
    if wrong.any():
        message = _value_message(name, actual, expected, wrong, words, inputs or {})
        raise CheckFailed(message, evidence=evidence, advice=_advice(actual, expected, wrong, words))


def parts(name: str, answer: Any, *labels: str) -> tuple[Any, ...]:
    """The entries of a tuple that should have so many."""
    if not isinstance(answer, tuple) or len(answer) != len(labels):
        got = "None" if answer is None else f"a {type(answer).__name__}"
        got += f" of {len(answer)}" if isinstance(answer, tuple) else ""
        raise CheckFailed(
            f"{name}: expected a tuple ({', '.join(labels)}), got {got}.\n  Next: return them in this order."
        )
    return answer


def compare_kind(name: str, actual: Tensor, expected: Tensor) -> None:
    """Raise CheckFailed unless dtype and device are those of `expected`."""
    for what in ("dtype", "device"):
        want, got = (str(getattr(tensor, what)).removeprefix("torch.") for tensor in (expected, actual))
        if getattr(actual, what) != getattr(expected, what):
            source = f"a tensor or a conversion with a {what} of its own"
            if (want, got) == ("float64", "float32"):
                source += ", or a quotient of whole numbers, which is float32"
            raise CheckFailed(
                f"{name}: expected {what} {want}, got {got}.\n  Next: look for {source}; it should follow the input's."
            )


def _shape_message(name: str, actual: Tensor, expected: Tensor, words: list[str]) -> tuple[str, str]:
    """What is wrong, and what to do."""
    sizes, got = list(expected.shape), list(actual.shape)
    want = ", ".join(f"{word}={size}" for word, size in zip(words, sizes, strict=True))
    message = f"{name}: wrong shape.\n  expected ({want})\n  got      {tuple(actual.shape)}"
    if len(set(sizes)) == len(sizes) and sorted(got) == sorted(sizes):
        order = ", ".join(words[sizes.index(size)] for size in got)
        return message, f"  The axes are all there, in another order: ({order})."
    if len(got) < len(sizes):
        return message, "  Next: find the step after which an axis is missing; print shapes along the way."
    return message, "  Next: print the shape after each step, and compare with the signature."


def _shown(value: Tensor) -> str:
    number = value.item()
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _value_message(
    name: str, actual: Tensor, expected: Tensor, wrong: Tensor, words: list[str], inputs: Mapping[str, Tensor]
) -> str:
    index = tuple(wrong.nonzero()[0].tolist())
    place = ", ".join(f"{word}={i}" for word, i in zip(words, index, strict=True))
    count = int(wrong.sum())
    at = f"first at [{place}]: " if words else ""
    given = ", ".join(f"{label} {_shown(tensor[index])}" for label, tensor in inputs.items())
    return (
        f"{name}: {count} of {wrong.numel()} {'values is' if count == 1 else 'values are'} wrong.\n"
        f"  {at}expected {_shown(expected[index])}, got {_shown(actual[index])}"
        + (f" (there: {given})" if given else "")
    )


def _advice(actual: Tensor, expected: Tensor, wrong: Tensor, words: list[str]) -> str:
    """What helps while no cause is known."""
    facts = [_where_wrong(wrong, words), _relation(actual, expected, words)]
    lines = [f"  {fact}" for fact in facts if fact]
    if actual.is_floating_point() and actual.isnan().any() and not expected.isnan().any():
        lines.append("  Next: find the step that gives NaN (not a number), such as 0/0 or inf - inf.")
    else:
        lines.append("  Next: work this one value out by hand, and print what each of your steps gives for it.")
    return "\n".join(lines)


def _where_wrong(wrong: Tensor, words: list[str]) -> str | None:
    """Where all the wrong values are, or are not, where that is simply said."""
    for axis, word in enumerate(words):
        others = [other for other in range(wrong.dim()) if other != axis]
        hit = wrong.sum(dim=others).bool() if others else wrong
        if len(hit) > 1 and int(hit.sum()) == 1:
            return f"All of the wrong values are at {word}={hit.int().argmax()}."
        if len(hit) > 2 and hit[1:].all() and not hit[0]:
            return f"None of them is at {word}=0."
        if len(hit) > 2 and hit[:-1].all() and not hit[-1]:
            return f"None of them is at {word}={len(hit) - 1}, the last."
    return None


def _relation(actual: Tensor, expected: Tensor, words: list[str]) -> str | None:
    """How the whole answer comes from the right one, where it does so simply."""
    if (
        not actual.is_floating_point()
        or actual.numel() < 3
        or not (actual.isfinite().all() and expected.isfinite().all())
    ):
        return None
    if not actual.any():
        return "Every value is 0."
    ratio, shift = actual / expected, actual - expected
    if expected.all() and torch.allclose(ratio, ratio.flatten()[0], rtol=1e-3):
        return f"Every value is {_shown(ratio.flatten()[0])} times the right one."
    if torch.allclose(shift, shift.flatten()[0], rtol=1e-3):
        return f"Every value is off by the same {_shown(shift.flatten()[0])}."
    for axis, word in enumerate(words):
        for other in range(axis + 1, len(words)):
            if expected.shape[axis] == expected.shape[other] and _near(actual, expected.transpose(axis, other)):
                return f"These are the right values with {word} and {words[other]} swapped."
        if expected.shape[axis] > 1 and _near(actual, expected.flip(axis)):
            return f"These are the right values, but {word} runs backwards."
        for step in (1, -1):
            if expected.shape[axis] > 2 and _near(actual, expected.roll(step, axis)):
                return f"These are the right values, moved by one along {word}."
        if expected.shape[axis] > 1 and _near(actual, expected.select(axis, 0).unsqueeze(axis).expand_as(expected)):
            return f"The values at {word}=0 stand at every {word}."
        if expected.shape[axis] > 2 and _near(actual.sum(axis), expected.sum(axis)):
            return f"The sums over {word} are right; the values are not."
    return None


def _near(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.double(), second.double(), rtol=1e-4, atol=1e-5)


def identical(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the very same values; NaN is the same as NaN."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)


@contextmanager
def unchanged(name: str, **inputs: Tensor) -> Iterator[None]:
    """Raise CheckFailed if one of these tensors is another one after the block than before it."""
    before = {label: tensor.detach().clone() for label, tensor in inputs.items()}
    yield
    for label, tensor in inputs.items():
        if tensor.dtype != before[label].dtype or not identical(tensor.detach(), before[label]):
            raise CheckFailed(
                f"{name}: it changed `{label}` in place.\n"
                f"  Next: make a new tensor; `{label}[...] = `, `{label} += ` and methods named ..._() write into it."
            )


def follows_input(
    name: str, fn: Callable[..., Any], inputs: tuple[Any, ...], axes: str, gradient: bool = False
) -> None:
    """Call `fn` again in float64, and on a GPU where there is one: values as before, dtype and device the input's.

    With `gradient`, for what stands on the way of training or attribution, one must get through from the inputs to the
    result. Modules among the inputs are copied and moved along; inputs that are neither stay as they are.
    """
    usual = fn(*inputs)
    moves: dict[str, dict[str, Any]] = {"in float64": {"dtype": torch.float64}}
    if torch.cuda.is_available():
        moves["on the GPU"] = {"device": torch.device("cuda", torch.cuda.current_device())}
    for where, target in moves.items():
        moved = [_moved(value, target) for value in inputs]
        compare(f"{name} {where}", fn(*moved), _moved(usual, target), axes, rtol=1e-3, atol=1e-4)
    if gradient:
        carries_gradient(name, fn, inputs)


def carries_gradient(name: str, fn: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """Raise CheckFailed if the result has no graph although the inputs do."""
    leaves = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    if not fn(*leaves).requires_grad:
        raise CheckFailed(
            f"{name}: no gradient gets through it, so nothing before it could be trained.\n"
            "  Next: look for .item(), .detach(), .data, torch.tensor(...) or torch.no_grad on the way."
        )


def _moved(value: Any, target: dict[str, Any]) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(**target)
    if isinstance(value, Tensor) and (value.is_floating_point() or "device" in target):
        return value.to(**target)
    return value
