# ruff: noqa: N802 (check_Heaviside is named after its exercise)
"""Checks of chapter 06, dictionaries: kinds of latents, steps with a slope, the autoencoder and its loss.

Gradients of the steps are compared with their formulas: finite differences would give the true slope, which is 0.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch06.sizes import (
    BATCH,
    D_IN,
    INSTANCE,
    LATENT,
    LEADS,
    WORDS,
    Fn,
    batch_of,
    by_instance,
    compare_slopes,
    compare_weights_slopes,
    every_kind,
)
from course_utils.checks.comparing import compare, parts, unchanged
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import check_gradient, noise, randomise, weights_of
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.translating import during

# ------------------------------------------------------------------------------------------------------------- kinds


def elementwise(tensor: Tensor, of_one: Callable[[float], float]) -> Tensor:
    """A function of one number, number by number."""
    return torch.tensor([of_one(value) for value in tensor.flatten().tolist()], dtype=tensor.dtype).reshape(
        tensor.shape
    )


@known_mistakes(
    {
        "negative values pass; they should be 0.": lambda pre: pre * 1.0,
        "the sign is dropped; a negative value should be 0.": lambda pre: pre.abs(),
        "negative values keep a small slope.": lambda pre: nn.functional.leaky_relu(pre, 0.01),
        "values are cut at 1; large ones should pass as they are.": lambda pre: pre.clamp(0, 1),
        "it is 1 where a latent is active; the value itself should pass.": lambda pre: pre.relu().sign(),
        "positive values are dropped, and negative ones pass.": lambda pre: pre.clamp(max=0),
    }
)
def check_relu_latents(fn: Fn) -> None:
    """With instances and without."""
    for lead in LEADS:
        pre = batch_of(lead, LATENT, 1)
        axes = f"batch {WORDS[lead]}latent"
        compare("relu_latents", fn(pre), elementwise(pre, lambda value: max(value, 0.0)), axes)
        every_kind("relu_latents", fn, (pre,), axes)


def largest_of_rows(pre: Tensor, k: int) -> Tensor:
    """The definition: in each row, a value stays if fewer than k others are larger, and if it is positive."""
    out = torch.zeros_like(pre)
    for row, kept in zip(pre.reshape(-1, pre.shape[-1]), out.view(-1, pre.shape[-1]), strict=True):
        values = row.tolist()
        for place, value in enumerate(values):
            if value > 0 and sum(other > value for other in values) < k:
                kept[place] = value
    return out


def keeping(
    dims: Callable[[Tensor], tuple[int, ...]] = lambda pre: (-1,),
    rank: Callable[[Tensor], Tensor] = lambda pre: pre,
    more: int = 0,
    finish: Callable[[Tensor, Tensor], Tensor] = lambda pre, kept: pre.relu() * kept,
    times_batch: bool = False,
) -> Fn:
    """A top-k along other axes, by another rank, of another number, or with another end."""

    def topk_latents(pre: Tensor, k: int) -> Tensor:
        axes = [axis % pre.dim() for axis in dims(pre)]
        rest = [axis for axis in range(pre.dim()) if axis not in axes]
        order = [*rest, *axes]
        moved = rank(pre).permute(order)
        flat = moved.reshape(*moved.shape[: len(rest)], -1)
        n = max(1, min(k * len(pre) if times_batch else k + more, flat.shape[-1]))
        lowest = flat.topk(n, dim=-1).values[..., -1:]
        kept = (flat >= lowest).reshape(moved.shape).permute([order.index(axis) for axis in range(pre.dim())])
        return finish(pre, kept.to(pre.dtype))

    return topk_latents


def in_order(pre: Tensor, k: int) -> Tensor:
    """The k largest stand first, not at their places."""
    values = pre.topk(min(k, pre.shape[-1]), dim=-1).values.relu()
    return nn.functional.pad(values, (0, pre.shape[-1] - values.shape[-1]))


@known_mistakes(
    {
        "the k largest of the whole batch are kept; every row has k of its own.": keeping(lambda pre: (0, -1)),
        "k for each row, but the largest of the whole batch, are kept; every row has k of its own.": keeping(
            lambda pre: (0, -1), times_batch=True
        ),
        "the k largest of every column are kept: the latents should compete, not the samples.": keeping(
            lambda pre: (0,)
        ),
        "all instances of a sample compete together; each has k of its own.": keeping(
            lambda pre: tuple(range(1, pre.dim()))
        ),
        "negative values pass; among the k largest, too, they should become 0.": keeping(
            finish=lambda pre, kept: pre * kept
        ),
        "the k smallest are kept.": keeping(rank=lambda pre: -pre),
        "the k with the largest absolute value are kept.": keeping(rank=torch.abs),
        "k + 1 are kept.": keeping(more=1),
        "k - 1 are kept.": keeping(more=-1),
        "what is kept becomes 1; it should keep its value.": keeping(finish=lambda pre, kept: kept * (pre > 0)),
        "all are kept; only the negative ones become 0.": keeping(more=99),
        "the values come in the order of their size; each should stay at its place.": in_order,
    }
)
def check_topk_latents(fn: Fn) -> None:
    """Few, one, and more than there are; then where the gradient goes."""
    name = "topk_latents"
    for lead in LEADS:
        axes = f"batch {WORDS[lead]}latent"
        pre = batch_of(lead, LATENT, 2)
        for k in (1, 4, 2, LATENT + 3):
            with during(f"with k={k}"):
                compare(f"{name} with k={k}", fn(pre, k), largest_of_rows(pre, k), axes)
        compare_slopes(
            name,
            lambda pre: fn(pre, 2),
            lambda pre: pre * (largest_of_rows(pre.detach(), 2) > 0),
            {"pre": pre},
            {"pre": axes},
        )
        every_kind(name, fn, (pre, 2), axes)


def largest_of_batch(pre: Tensor, k: int | float) -> tuple[Tensor, Tensor]:
    """The definition for one instance: sort all values of the batch, and keep so many."""
    values = sorted(pre.flatten().tolist(), reverse=True)[: min(round(k * len(pre)), pre.numel())]
    lowest = values[-1]
    return pre * ((pre >= lowest) & (pre > 0)), torch.tensor(max(lowest, 0.0), dtype=pre.dtype)


def expected_of_batch(pre: Tensor, k: int | float) -> tuple[Tensor, Tensor]:
    if pre.dim() == 2:
        return largest_of_batch(pre, k)
    each = [largest_of_batch(own, k) for own in pre.unbind(1)]
    return torch.stack([latents for latents, _ in each], 1), torch.stack([threshold for _, threshold in each])


def sharing(
    count: Callable[[Any, int], int] = lambda k, n_batch: round(k * n_batch),
    rows: bool = False,
    together: bool = False,
    finish: Callable[[Tensor], Tensor] = torch.relu,
    threshold: Callable[[Tensor, Tensor, int], Tensor] = lambda largest, flat, n: largest[..., -1].relu(),
    back: bool = True,
) -> Fn:
    """batch_topk_latents with switches for what people get wrong."""

    def batch_topk_latents(pre: Tensor, k: int | float) -> tuple[Tensor, Tensor]:
        moved = pre.movedim(0, -2)  # [*instance batch latent]
        flat = moved.reshape(1, -1) if together else moved if rows else moved.flatten(-2)
        n = max(
            1,
            min(round(k) if rows else count(k, len(pre)) * (pre[0, ..., 0].numel() if together else 1), flat.shape[-1]),
        )
        top = flat.topk(n, dim=-1)
        kept = torch.zeros_like(flat).scatter(-1, top.indices, finish(top.values))
        latents = kept.reshape(moved.shape).movedim(-2, 0) if back else kept.reshape(pre.shape)
        least = threshold(top.values, flat, n)
        least = least.amin(-1) if rows else least.expand(pre.shape[1:-1]) if together and pre.dim() > 2 else least
        return latents, least.reshape(pre.shape[1:-1]).detach()

    return batch_topk_latents


@known_mistakes(
    {
        "every row keeps k of its own; the batch should share them.": sharing(rows=True),
        "k are kept of the whole batch; it should be k for each sample, k * batch in all.": sharing(
            lambda k, n_batch: round(k)
        ),
        "k is cut to a whole number; only k * batch is rounded.": sharing(lambda k, n_batch: int(k) * n_batch),
        "k * batch is rounded down; it should be rounded to the nearest number.": sharing(
            lambda k, n_batch: int(k * n_batch)
        ),
        "k * batch is rounded up; it should be rounded to the nearest number.": sharing(
            lambda k, n_batch: math.ceil(k * n_batch)
        ),
        "all instances compete together; each has k * batch of its own.": sharing(together=True),
        "negative values pass; among the largest, too, they should become 0.": sharing(finish=lambda values: values),
        "what is kept becomes 1; it should keep its value.": sharing(finish=lambda values: (values > 0).to(values)),
        "batch and instance are mixed up when the axes are brought back.": sharing(back=False),
        "the threshold is the largest value; it should be the smallest that was kept.": sharing(
            threshold=lambda largest, flat, n: largest[..., 0].relu()
        ),
        "the threshold is the largest value that was dropped.": sharing(
            threshold=lambda largest, flat, n: (
                flat.sort(-1, descending=True).values[..., min(n, flat.shape[-1] - 1)].relu()
            )
        ),
        "the threshold is the mean of what was kept.": sharing(
            threshold=lambda largest, flat, n: largest.relu().mean(-1)
        ),
        "the threshold is negative; where the smallest value kept is, it should be 0.": sharing(
            threshold=lambda largest, flat, n: largest[..., -1]
        ),
    }
)
def check_batch_topk_latents(fn: Fn) -> None:
    """Numbers that are not whole, one for each sample, and more than are positive; latents first, then thresholds."""
    name = "batch_topk_latents"
    for lead in LEADS:
        axes = f"batch {WORDS[lead]}latent"
        pre = batch_of(lead, LATENT, 3)
        for k in (1.4, 1.3, 2, 1, 0.5, LATENT - 0.5, LATENT + 2):
            label = f"{name} with k={k}"
            with during(f"with k={k}"):
                latents, threshold = parts(label, fn(pre, k), "latents", "threshold")
            right = expected_of_batch(pre, k)
            compare(f"{label}: the latents", latents, right[0], axes)
            compare(f"{label}: the threshold", threshold, right[1], WORDS[lead].strip())
        if fn(pre.clone().requires_grad_(), 2)[1].requires_grad:
            raise CheckFailed(f"{name}: a gradient flows through the threshold.\n  Next: detach it.")
        compare_slopes(
            f"{name}: the latents",
            lambda pre: fn(pre, 1.4)[0],
            lambda pre: pre * (expected_of_batch(pre.detach(), 1.4)[0] > 0),
            {"pre": pre},
            {"pre": axes},
        )
        every_kind(f"{name}: the latents", lambda pre, k: fn(pre, k)[0], (pre, 1.4), axes)
        label = f"{name} in float64: the threshold"
        compare(label, fn(pre.double(), 1.4)[1], fn(pre, 1.4)[1].double(), WORDS[lead].strip())


def gating(
    gate: Callable[[Tensor, Tensor], Tensor] = lambda projected, b_gate: projected + b_gate,
    magnitude: Callable[..., Tensor] = lambda projected, r_mag, b_mag, b_gate: (projected * r_mag.exp() + b_mag).relu(),
    join: Callable[[Tensor, Tensor], Tensor] = lambda gate, magnitude: magnitude * (gate > 0),
    out: Callable[[Tensor, Tensor], Any] = lambda latents, gate: (latents, gate),
) -> Fn:
    """gated_latents with something else in one of its steps."""

    def gated_latents(projected: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Any:
        opened = gate(projected, b_gate)
        return out(join(opened, magnitude(projected, r_mag, b_mag, b_gate)), opened)

    return gated_latents


@known_mistakes(
    {
        "the gate has no bias.": gating(lambda projected, b_gate: projected),
        "the gate's bias is subtracted.": gating(lambda projected, b_gate: projected - b_gate),
        "the stretch is missing: projected should be multiplied by exp(r_mag).": gating(
            magnitude=lambda projected, r_mag, b_mag, b_gate: (projected + b_mag).relu()
        ),
        "r_mag itself is the factor; it should be exp(r_mag).": gating(
            magnitude=lambda projected, r_mag, b_mag, b_gate: (projected * r_mag + b_mag).relu()
        ),
        "the bias is stretched too; only projected should be.": gating(
            magnitude=lambda projected, r_mag, b_mag, b_gate: ((projected + b_mag) * r_mag.exp()).relu()
        ),
        "the magnitude has no bias.": gating(
            magnitude=lambda projected, r_mag, b_mag, b_gate: (projected * r_mag.exp()).relu()
        ),
        "the magnitude is made of the gate, bias and all.": gating(
            magnitude=lambda projected, r_mag, b_mag, b_gate: ((projected + b_gate) * r_mag.exp() + b_mag).relu()
        ),
        "the magnitude has no ReLU: a latent is negative.": gating(
            magnitude=lambda projected, r_mag, b_mag, b_gate: projected * r_mag.exp() + b_mag
        ),
        "a latent is its magnitude whether the gate is open or not.": gating(join=lambda gate, magnitude: magnitude),
        "a gate of exactly 0 counts as open; it should be above 0.": gating(
            join=lambda gate, magnitude: magnitude * (gate >= 0)
        ),
        "magnitude and gate are multiplied; the gate should only let pass or not.": gating(
            join=lambda gate, magnitude: magnitude * gate.relu()
        ),
        "the gate's sigmoid is a factor; the gate should be open or closed.": gating(
            join=lambda gate, magnitude: magnitude * gate.sigmoid()
        ),
        "a latent is the gate's value where it is open; it should be the magnitude.": gating(
            join=lambda gate, magnitude: gate.relu()
        ),
        "the gate is returned with its negative values cut off; return it as it is.": gating(
            out=lambda latents, gate: (latents, gate.relu())
        ),
        "the gate is returned as 0 or 1; return it as it is.": gating(
            out=lambda latents, gate: (latents, (gate > 0).to(gate))
        ),
        "the two are returned in the wrong order: latents first.": gating(out=lambda latents, gate: (gate, latents)),
    }
)
def check_gated_latents(fn: Fn) -> None:
    """Latents, then gates, with biases and stretches that all differ."""
    name = "gated_latents"
    for lead in LEADS:
        axes = f"batch {WORDS[lead]}latent"
        inputs = (batch_of(lead, LATENT, 4), *(noise(*lead, LATENT, seed=seed, scale=0.7) for seed in (5, 6, 7)))
        inputs[0][1, ..., 2], inputs[3][..., 2] = -inputs[1][..., 2], 3.0  # a gate of exactly 0, which is not open
        projected, b_gate, r_mag, b_mag = [tensor.expand_as(inputs[0]).flatten().tolist() for tensor in inputs]
        right = [
            max(p * math.exp(r) + m, 0.0) if p + g > 0 else 0.0
            for p, g, r, m in zip(projected, b_gate, r_mag, b_mag, strict=True)
        ]
        latents, gate = parts(name, fn(*inputs), "latents", "gate")
        compare(f"{name}: the latents", latents, torch.tensor(right).reshape(inputs[0].shape), axes)
        gates = torch.tensor([p + g for p, g in zip(projected, b_gate, strict=True)]).reshape(inputs[0].shape)
        compare(f"{name}: the gate", gate, gates, axes)
        for number, label in enumerate(("latents", "gate")):
            every_kind(f"{name}: the {label}", lambda *given, n=number: fn(*given)[n], inputs, axes)
        labels = ("projected", "b_gate", "r_mag", "b_mag")
        compare_slopes(
            f"{name}: the latents",
            lambda **given: fn(*given.values())[0],
            lambda **given: gating()(**given)[0],
            dict(zip(labels, inputs, strict=True)),
            {label: axes if label == "projected" else f"{WORDS[lead]}latent" for label in labels if label != "b_gate"},
        )
        compare_slopes(
            f"{name}: the gate",
            lambda **given: fn(*given.values())[1],
            lambda **given: given["projected"] + given["b_gate"],
            dict(zip(labels, inputs, strict=True)),
            {"projected": axes, "b_gate": f"{WORDS[lead]}latent"},
        )


def by_gates_alone(
    opened: Callable[[Tensor], Tensor] = torch.relu,
    end: Callable[[Tensor], Tensor] = lambda error: error.square().sum(-1).mean(0),
    bias: Callable[[Tensor], Tensor | float] = lambda b_dec: b_dec.detach(),
    weights: Callable[[Tensor], Tensor] = lambda W_dec: W_dec.detach(),
) -> Fn:
    """gated_auxiliary_loss with something else in one of its steps."""

    def gated_auxiliary_loss(x: Tensor, gate: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        rows = (opened(gate)[..., None] * weights(W_dec)).sum(-2)
        return end(x - rows - bias(b_dec))

    return gated_auxiliary_loss


SQUARED_ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "the error is averaged over d_in; it should be summed.": lambda error: error.square().mean(-1).mean(0),
    "the error is summed over the batch; it should be averaged.": lambda error: error.square().sum(-1).sum(0),
    "the error is not squared: it is a sum of absolute values.": lambda error: error.abs().sum(-1).mean(0),
    "the root is taken: it is the length of the error, not its square.": lambda error: error.norm(dim=-1).mean(0),
}


@known_mistakes(
    {
        "the gate is used as it is; negative values should become 0.": by_gates_alone(lambda gate: gate),
        "an open gate counts as 1; its value should be used.": by_gates_alone(lambda gate: (gate > 0).to(gate)),
        "the decoder bias is left out.": by_gates_alone(bias=lambda b_dec: 0.0),
        "the gradient reaches W_dec, which should be a constant here.": by_gates_alone(weights=lambda W_dec: W_dec),
        "the gradient reaches b_dec, which should be a constant here.": by_gates_alone(bias=lambda b_dec: b_dec),
        "no gradient reaches the gate, the one thing that should learn from it.": by_gates_alone(
            lambda gate: gate.detach().relu()
        ),
    },
    {sentence: by_gates_alone(end=end) for sentence, end in SQUARED_ERRORS.items()},
)
def check_gated_auxiliary_loss(fn: Fn) -> None:
    """The value, then whom the gradient reaches."""
    name = "gated_auxiliary_loss"
    for lead in LEADS:
        x, gate = batch_of(lead, D_IN, 8), batch_of(lead, LATENT, 9)
        learns = {"gate": gate, "W_dec": noise(*lead, LATENT, D_IN, seed=10), "b_dec": noise(*lead, D_IN, seed=11)}
        right = partial(by_instance, lead, error_of_gates, x, axes=(1, 1, 0, 0))
        compare(name, fn(x, *learns.values()), right(*learns.values()), WORDS[lead].strip())
        compare_slopes(
            name,
            lambda x=x, **given: fn(x, *given.values()),
            lambda right=right, **given: right(*given.values()),
            learns,
            {"gate": f"batch {WORDS[lead]}latent"},
        )
        every_kind(name, fn, (x, *learns.values()), WORDS[lead].strip())


def error_of_gates(x: Tensor, gate: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Of one instance: sample by sample, and direction by direction, for every gate that is open."""
    total = x.new_zeros(())
    for sample, row in zip(x, gate, strict=True):
        guess = b_dec.detach()
        for value, direction in zip(row, W_dec.detach(), strict=True):
            guess = guess + (value * direction if value > 0 else 0)
        total = total + ((sample - guess) ** 2).sum()
    return total / len(x)


# ------------------------------------------------------------------------------------------------------------- steps


def in_window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre)


def stepping(
    title: str,
    value: Callable[[Tensor, Tensor], Tensor],
    window: Callable[[Tensor, Tensor, float], Tensor] = in_window,
    height: Callable[[Tensor, Tensor, float], Tensor | float] = lambda pre, threshold, bandwidth: 1 / bandwidth,
    above: Callable[[Tensor], Tensor] = lambda grad: grad,
    to_pre: Callable[[Tensor, Tensor, Tensor], Tensor | None] = lambda grad, pre, threshold: None,
    reduce: Callable[[Tensor], Tensor] = lambda slopes: slopes.sum(0),
) -> Any:
    """A step whose threshold learns, with something else in one of its parts."""

    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return value(pre, threshold)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        slopes = -above(grad) * window(pre, threshold, ctx.bandwidth) * height(pre, threshold, ctx.bandwidth)
        return to_pre(grad, pre, threshold), reduce(slopes), None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(title, (torch.autograd.Function,), methods)


def wrong_windows(step: Callable[..., Any], height: Callable[..., Any]) -> dict[str, Any]:
    """What people get wrong in the made-up slope, for either function; `height` is the right one."""
    return {
        "the sign is wrong: a higher threshold lets less through.": step(above=lambda grad: -grad),
        "the window is a whole bandwidth wide on either side; it should be half of one.": step(
            window=lambda pre, threshold, bandwidth: in_window(pre, threshold, 2 * bandwidth)
        ),
        "every sample counts, however far from the threshold it is.": step(
            window=lambda pre, threshold, bandwidth: torch.ones_like(pre)
        ),
        "only samples above the threshold count; the window reaches as far below.": step(
            window=lambda pre, threshold, bandwidth: in_window(pre, threshold, bandwidth) * (pre > threshold)
        ),
        "the window is around 0; it should be around the threshold.": step(
            window=lambda pre, threshold, bandwidth: in_window(pre, torch.zeros_like(threshold), bandwidth)
        ),
        "it is not divided by the bandwidth.": step(
            height=lambda pre, threshold, bandwidth: height(pre, threshold, bandwidth) * bandwidth
        ),
        "it is multiplied by the bandwidth; it should be divided.": step(
            height=lambda pre, threshold, bandwidth: height(pre, threshold, bandwidth) * bandwidth**2
        ),
        "the gradient from above is left out; the slope should be multiplied by it.": step(above=torch.ones_like),
        "the batch is averaged; its gradients should be summed.": step(reduce=lambda slopes: slopes.mean(0)),
        "the threshold gets no gradient: it is cut.": step(reduce=lambda slopes: 0 * slopes.sum(0)),
    }


BANDWIDTHS = (0.8, 0.3)


def _check_step(
    name: str, cls: Any, value: Callable[[float, float], float], slope: Callable[..., tuple[float, float]]
) -> None:
    """Forward, then the gradients of the threshold and of the pre-activation, number by number."""
    if not (isinstance(cls, type) and issubclass(cls, torch.autograd.Function)):
        raise CheckFailed(
            f"{name}: expected a class that inherits from torch.autograd.Function.\n  Next: keep its first line."
        )
    for lead in LEADS:
        axes = f"batch {WORDS[lead]}latent"
        threshold = noise(*lead, LATENT, seed=12).abs() + 0.2
        pre = threshold + batch_of(lead, LATENT, 13) * 0.5
        pre[1, ..., 2] = threshold[..., 2]  # exactly at the threshold: not above it
        for bandwidth in BANDWIDTHS:
            for dtype in (torch.float32, torch.float64):
                where = f"{name} with a bandwidth of {bandwidth}" + (" in float64" if dtype == torch.float64 else "")
                leaves = [tensor.to(dtype).requires_grad_() for tensor in (pre, threshold)]
                inputs = {"pre": leaves[0], "threshold": leaves[1]}
                with during(f"with a bandwidth of {bandwidth}"), unchanged(name, **inputs):
                    out = cls.apply(*leaves, bandwidth)
                wide = leaves[1].expand_as(pre).flatten().tolist()
                narrow = leaves[0].flatten().tolist()
                right = [value(p, t) for p, t in zip(narrow, wide, strict=True)]
                compare(where, out, torch.tensor(right, dtype=dtype).reshape(pre.shape), axes)
                grad = noise(*pre.shape, seed=14).to(dtype)
                if not out.requires_grad:
                    raise CheckFailed(
                        f"{name}: no gradient gets through.\n  Next: call no `.detach()` or no_grad in it."
                    )
                with during("in backward"), unchanged(name, **{"the gradient from above": grad}):
                    got = backward_of(where, out, leaves, grad)
                slopes = [slope(p, t, bandwidth) for p, t in zip(narrow, wide, strict=True)]
                for number, (label, words) in enumerate((("pre", axes), ("threshold", f"{WORDS[lead]}latent"))):
                    want = torch.tensor([each[number] for each in slopes], dtype=dtype).reshape(pre.shape) * grad
                    want = want if number == 0 else want.sum(0)
                    given = torch.zeros_like(leaves[number]) if got[number] is None else got[number]
                    compare(f"{where}: the gradient of `{label}`", given, want, words)


def backward_of(where: str, out: Tensor, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the leaves; what torch says about a backward that returns something else is for the learner."""
    try:
        return torch.autograd.grad(out, leaves, grad, allow_unused=True)
    except RuntimeError as error:
        if not str(error).startswith("Function "):
            raise
        raise CheckFailed(
            f"{where}: torch refuses what backward returns.\n  {error}\n"
            "  Next: return a gradient (or None) for each of the three arguments, in the shape of that argument."
        ) from None


def unit_height(pre: Tensor, threshold: Tensor, bandwidth: float) -> float:
    return 1 / bandwidth


heaviside = partial(stepping, "Heaviside", lambda pre, threshold: (pre > threshold).to(pre))


def step_with(value: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return stepping("Heaviside", value)


@known_mistakes(
    {
        "a pre-activation exactly at the threshold counts as above it.": step_with(
            lambda pre, threshold: (pre >= threshold).to(pre)
        ),
        "the step is at 0; it should be at the threshold.": step_with(lambda pre, threshold: (pre > 0).to(pre)),
        "it is 1 below the threshold.": step_with(lambda pre, threshold: (pre < threshold).to(pre)),
        "the pre-activation itself comes out; it should be 1.": step_with(
            lambda pre, threshold: pre * (pre > threshold)
        ),
        "the gradient is let through to `pre`, as if the step were not there; it should get None.": heaviside(
            to_pre=lambda grad, pre, threshold: grad
        ),
        "the gradient is let through to `pre` above the threshold; it should get None.": heaviside(
            to_pre=lambda grad, pre, threshold: grad * (pre > threshold)
        ),
        "`pre` gets the slope of the ramp too; only the threshold should.": heaviside(
            to_pre=lambda grad, pre, threshold: grad * in_window(pre, threshold, 0.8) / 0.8
        ),
        "the slope is multiplied by the threshold, as for JumpReLU; the step is 1 high.": heaviside(
            height=lambda pre, threshold, bandwidth: threshold / bandwidth
        ),
    },
    wrong_windows(heaviside, unit_height),
)
def check_Heaviside(cls: Any) -> None:
    """Values on both sides of each threshold, near and far, and one exactly at it."""

    def slope(pre: float, threshold: float, bandwidth: float) -> tuple[float, float]:
        return 0.0, -1 / bandwidth if abs(pre - threshold) < bandwidth / 2 else 0.0

    _check_step("Heaviside", cls, lambda pre, threshold: float(pre > threshold), slope)


def jump_height(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return threshold / bandwidth


def jumping(**changed: Any) -> Any:
    """JumpReLU with something else in one of its parts."""
    usual = {
        "value": lambda pre, threshold: pre * (pre > threshold),
        "height": jump_height,
        "to_pre": lambda grad, pre, threshold: grad * (pre > threshold),
    }
    return stepping("JumpReLU", **(usual | changed))


@known_mistakes(
    {
        "the threshold is subtracted; what passes should pass unchanged.": jumping(
            value=lambda pre, threshold: (pre - threshold).relu()
        ),
        "it is an ordinary ReLU, with its corner at 0.": jumping(value=lambda pre, threshold: pre.relu()),
        "it is the step alone; the pre-activation should pass.": jumping(
            value=lambda pre, threshold: (pre > threshold).to(pre)
        ),
        "a pre-activation exactly at the threshold passes; it should not.": jumping(
            value=lambda pre, threshold: pre * (pre >= threshold)
        ),
        "the gradient is let through to `pre` everywhere; it should be 0 below the threshold.": jumping(
            to_pre=lambda grad, pre, threshold: grad
        ),
        "the gradient is let through to `pre` wherever it is positive; it should be 0 below the threshold.": jumping(
            to_pre=lambda grad, pre, threshold: grad * (pre > 0)
        ),
        "`pre` gets no gradient.": jumping(to_pre=lambda grad, pre, threshold: None),
        "the slope is multiplied by `pre`; the jump is as high as the threshold.": jumping(
            height=lambda pre, threshold, bandwidth: pre / bandwidth
        ),
        "the slope is that of a step of 1; the jump is as high as the threshold.": jumping(height=unit_height),
    },
    wrong_windows(jumping, jump_height),
)
def check_JumpReLU(cls: Any) -> None:
    """Values on both sides of each threshold, near and far, and one exactly at it."""

    def slope(pre: float, threshold: float, bandwidth: float) -> tuple[float, float]:
        return float(pre > threshold), -threshold / bandwidth if abs(pre - threshold) < bandwidth / 2 else 0.0

    _check_step("JumpReLU", cls, lambda pre, threshold: pre if pre > threshold else 0.0, slope)


# ------------------------------------------------------------------------------------------------- the autoencoder


class Autoencoder(nn.Module):
    """An autoencoder without einsum: the base of what people get wrong."""

    def __init__(self, d_in: int, d_sae: int, kind: str, n_instances: int | None = None, **options: Any) -> None:
        super().__init__()
        lead = () if n_instances is None else (n_instances,)
        self.kind = kind
        self.W_enc, self.W_dec = (
            nn.Parameter(torch.empty(*lead, d_in, d_sae)),
            nn.Parameter(torch.empty(*lead, d_sae, d_in)),
        )
        self.b_enc, self.b_dec = nn.Parameter(torch.empty(*lead, d_sae)), nn.Parameter(torch.empty(*lead, d_in))

    def activate(self, pre: Tensor) -> Tensor:
        return pre.relu()

    def origin(self) -> Tensor | float:
        return self.b_dec

    def pre_activations(self, x: Tensor) -> Tensor:
        return ((x - self.origin())[..., None] * self.W_enc).sum(-2) + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        return self.activate(self.pre_activations(x))

    def decode(self, latents: Tensor) -> Tensor:
        return (latents[..., None] * self.W_dec).sum(-2) + self.b_dec

    def forward(self, x: Tensor) -> Any:
        latents = self.encode(x)
        return self.decode(latents), latents


def autoencoder(**methods: Any) -> type:
    """An autoencoder with other methods."""
    return type("SparseAutoencoder", (Autoencoder,), methods)


def wrong_encoder(encode: Callable[[Any, Tensor], Tensor]) -> type:
    """An autoencoder with other pre-activations."""
    return autoencoder(pre_activations=encode)


def project(x: Tensor, W: Tensor) -> Tensor:
    return (x[..., None] * W).sum(-2)


@known_mistakes(
    {
        "the decoder bias is not subtracted before the encoder.": wrong_encoder(
            lambda self, x: project(x, self.W_enc) + self.b_enc
        ),
        "the decoder bias is added before the encoder; it should be subtracted.": wrong_encoder(
            lambda self, x: project(x + self.b_dec, self.W_enc) + self.b_enc
        ),
        "the encoder bias is left out.": wrong_encoder(lambda self, x: project(x - self.b_dec, self.W_enc)),
        "the encoder bias is subtracted.": wrong_encoder(
            lambda self, x: project(x - self.b_dec, self.W_enc) - self.b_enc
        ),
        "the encoder uses the decoder's weights, transposed; it has its own.": wrong_encoder(
            lambda self, x: project(x - self.b_dec, self.W_dec.mT) + self.b_enc
        ),
        "the pre-activations are activated already, and then once more.": wrong_encoder(
            lambda self, x: self.activate(project(x - self.b_dec, self.W_enc) + self.b_enc)
        ),
        "the latents are activated before the encoder bias is added.": autoencoder(
            encode=lambda self, x: self.activate(project(x - self.b_dec, self.W_enc)) + self.b_enc
        ),
        "the latents are the pre-activations: `activate` is left out.": autoencoder(
            encode=lambda self, x: self.pre_activations(x)
        ),
        "the decoder bias is not added after the decoder.": autoencoder(
            decode=lambda self, latents: project(latents, self.W_dec)
        ),
        "the decoder bias is subtracted after the decoder; it should be added.": autoencoder(
            decode=lambda self, latents: project(latents, self.W_dec) - self.b_dec
        ),
        "the decoder uses the encoder's weights, transposed; it has its own.": autoencoder(
            decode=lambda self, latents: project(latents, self.W_enc.mT) + self.b_dec
        ),
        "forward returns the latents first; the reconstruction comes first.": autoencoder(
            forward=lambda self, x: (self.encode(x), self.decode(self.encode(x)))
        ),
        "forward returns the pre-activations; it should return the latents.": autoencoder(
            forward=lambda self, x: (self.decode(self.encode(x)), self.pre_activations(x))
        ),
    }
)
@may_change("self")
def check_SparseAutoencoder(cls: Any) -> None:
    """Method by method, with a toy in the place of `activate`; then with the latents' own functions."""
    name, keep = "SparseAutoencoder", "Next: keep the `__init__` that was given (the statement holds it)."
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed(f"{name}: expected a class that inherits from nn.Module.\n  {keep}")
    for lead in LEADS:
        sae: Any = cls(D_IN, LATENT, "relu", *lead)
        shapes = {"W_enc": (D_IN, LATENT), "W_dec": (LATENT, D_IN), "b_enc": (LATENT,), "b_dec": (D_IN,)}
        for label, shape in shapes.items():
            if tuple(getattr(sae, label, torch.empty(0)).shape) != (*lead, *shape):
                raise CheckFailed(f"{name}: `{label}` should have the shape {(*lead, *shape)}.\n  {keep}")
        randomise(sae)
        weights = weights_of(sae)
        for activation in (torch.sin, None):
            if activation is not None:
                sae.activate = activation
            else:
                del sae.activate
            _compare_methods(
                name if activation is None else f"{name} with a sine for `activate`",
                sae,
                lead,
                weights,
                activation or torch.relu,
            )
        check_gradient(name, _Reconstruction(sae), (batch_of(lead, D_IN, 15),))
        _compare_slopes_of_parameters(name, sae, lead)
        _in_double(name, sae, lead)


class _Reconstruction(nn.Module):
    """What is trained: the first of the pair."""

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        return self.sae(x)[0]


def _compare_methods(name: str, sae: Any, lead: tuple[int, ...], weights: dict[str, Tensor], activation: Fn) -> None:
    x, some = batch_of(lead, D_IN, 15), batch_of(lead, LATENT, 16)
    axes, out = f"batch {WORDS[lead]}latent", f"batch {WORDS[lead]}d_in"
    each = partial(_affine, lead, weights)
    pre = each(x - weights["b_dec"], "W_enc", "b_enc")
    with torch.no_grad():
        compare(f"{name}: pre_activations", sae.pre_activations(x), pre, axes)
        compare(f"{name}: encode", sae.encode(x), activation(pre), axes)
        compare(f"{name}: decode", sae.decode(some), each(some, "W_dec", "b_dec"), out)
        reconstruction, latents = parts(f"{name}: forward", sae(x), "reconstruction", "latents")
        compare(f"{name}: forward, the reconstruction", reconstruction, each(activation(pre), "W_dec", "b_dec"), out)
        compare(f"{name}: forward, the latents", latents, activation(pre), axes)


def _affine(lead: tuple[int, ...], weights: dict[str, Tensor], values: Tensor, matrix: str, bias: str) -> Tensor:
    """Sample by sample, and instance by instance: a matrix times the values, and a bias."""
    if not lead:
        return torch.stack([weights[matrix].T.mv(value) + weights[bias] for value in values])
    each = [{label: tensor[i] for label, tensor in weights.items()} for i in range(INSTANCE)]
    return torch.stack([_affine((), own, values[:, i], matrix, bias) for i, own in enumerate(each)], 1)


def _compare_slopes_of_parameters(name: str, sae: Any, lead: tuple[int, ...]) -> None:
    x, axes = batch_of(lead, D_IN, 15), {"b_enc": "latent", "b_dec": "d_in", "W_enc": "d_in latent"}
    axes |= {"W_dec": "latent d_in"}

    def encoded(weights: dict[str, Tensor]) -> Tensor:
        return _affine(lead, weights, x - weights["b_dec"], "W_enc", "b_enc").clamp(min=0)

    def decoded(weights: dict[str, Tensor]) -> Tensor:
        return _affine(lead, weights, encoded(weights), "W_dec", "b_dec")

    words = {label: WORDS[lead] + axis for label, axis in axes.items()}
    compare_weights_slopes(f"{name}: forward, the reconstruction", sae, lambda: sae(x)[0], decoded, **words)
    compare_weights_slopes(f"{name}: forward, the latents", sae, lambda: sae(x)[1], encoded, **words)


def _in_double(name: str, sae: Any, lead: tuple[int, ...]) -> None:
    x = batch_of(lead, D_IN, 15)
    with torch.no_grad():
        usual = sae(x)[0].double()
        compare(f"{name} in float64", sae.double()(x.double())[0], usual, f"batch {WORDS[lead]}d_in", 1e-3, 1e-4)


# ------------------------------------------------------------------------------------------------------- the loss


def losing(
    error: Callable[[Tensor], Tensor] = lambda error: error.square().sum(-1).mean(0),
    penalty: Callable[[Tensor, Tensor, Tensor | None], Tensor] = lambda latents, norms, active: (
        latents * norms if active is None else active
    ),
    reduce: Callable[[Tensor], Tensor] = lambda counted: counted.sum(-1).mean(0),
    total: Callable[[Tensor, Any, Tensor], Tensor] = lambda error, weight, amount: (error + weight * amount).sum(),
    out: Callable[[Tensor, Any, Tensor], Tensor] = lambda error, weight, amount: amount,
) -> Fn:
    """sae_loss with something else in one of its steps."""

    def sae_loss(
        x: Tensor, reconstruction: Tensor, latents: Tensor, W_dec: Tensor, sparsity: Any, active: Tensor | None = None
    ) -> dict[str, Tensor]:
        wrong, amount = error(x - reconstruction), reduce(penalty(latents, W_dec.norm(dim=-1), active))
        return {
            "reconstruction": wrong,
            "sparsity": out(wrong, sparsity, amount),
            "total": total(wrong, sparsity, amount),
        }

    return sae_loss


@known_mistakes(
    {sentence: losing(error) for sentence, error in SQUARED_ERRORS.items()},
    {
        "the decoder norms are left out of L1.": losing(
            penalty=lambda latents, norms, active: latents * 1.0 if active is None else active
        ),
        "the decoder norms are squared in L1.": losing(
            penalty=lambda latents, norms, active: latents * norms**2 if active is None else active
        ),
        "L1 is divided by the decoder norms; it should be multiplied.": losing(
            penalty=lambda latents, norms, active: latents / norms if active is None else active
        ),
        "the latents are squared in L1.": losing(
            penalty=lambda latents, norms, active: latents**2 * norms if active is None else active
        ),
        "`active` is not used.": losing(penalty=lambda latents, norms, active: latents * norms),
        "`active` is multiplied by the decoder norms; L0 is a count.": losing(
            penalty=lambda latents, norms, active: (latents if active is None else active) * norms
        ),
        "the sparsity is averaged over the latents; it should be summed.": losing(
            reduce=lambda counted: counted.mean(-1).mean(0)
        ),
        "the sparsity is summed over the batch; it should be averaged.": losing(
            reduce=lambda counted: counted.sum(-1).sum(0)
        ),
        '"sparsity" is multiplied by the weight already; it should be the amount itself.': losing(
            out=lambda error, weight, amount: weight * amount
        ),
        "the weight of the sparsity is left out of the total.": losing(
            total=lambda error, weight, amount: (error + amount).sum()
        ),
        "the total is a mean over the instances; each one's gradient then depends on how many there are.": losing(
            total=lambda error, weight, amount: (error + weight * amount).mean()
        ),
        "the total is the reconstruction alone.": losing(total=lambda error, weight, amount: error.sum()),
        "the total has a number for each instance; sum over them.": losing(
            total=lambda error, weight, amount: error + weight * amount
        ),
    },
)
def check_sae_loss(fn: Fn) -> None:
    """L1, then L0; one weight for all, then one for each instance."""
    name = "sae_loss"
    for lead in reversed(LEADS):
        x, reconstruction = batch_of(lead, D_IN, 17), batch_of(lead, D_IN, 18)
        latents, W_dec = batch_of(lead, LATENT, 19).relu(), noise(*lead, LATENT, D_IN, seed=20)
        active = (batch_of(lead, LATENT, 21) > 0).float()
        weights = (0.3, torch.tensor([0.2, 0.5, 0.9])[: lead[0]] if lead else torch.tensor(0.7))
        for sparsity in weights:
            for extra in ((), (active,)):
                words = f" with {'L0' if extra else 'L1'}"
                words += ", one weight for each instance" if lead and isinstance(sparsity, Tensor) else ""
                answer = fn(x, reconstruction, latents, W_dec, sparsity, *extra)
                right = _loss_by_loops(lead, x, reconstruction, latents, W_dec, sparsity, *extra)
                _compare_parts(f"{name}{words}", answer, right, WORDS[lead].strip())
        _check_slopes(name, fn, lead, x, reconstruction, latents, W_dec)


def _loss_by_loops(
    lead: tuple[int, ...],
    x: Tensor,
    reconstruction: Tensor,
    latents: Tensor,
    W_dec: Tensor,
    sparsity: Any,
    active: Tensor | None = None,
) -> dict[str, Tensor]:
    """Instance by instance, sample by sample."""
    errors, amounts, total = [], [], 0.0
    for number in range(lead[0] if lead else 1):
        own = [tensor[:, number] if lead else tensor for tensor in (x, reconstruction, latents)]
        rows = (W_dec[number] if lead else W_dec).tolist()
        fires = None if active is None else (active[:, number] if lead else active)
        norms = [math.sqrt(sum(value**2 for value in row)) for row in rows]
        error = sum(((a - b) ** 2).sum().item() for a, b in zip(own[0], own[1], strict=True)) / BATCH
        counted = (
            [sum(v * n for v, n in zip(sample, norms, strict=True)) for sample in own[2].tolist()]
            if fires is None
            else [sum(sample) for sample in fires.tolist()]
        )
        amount = sum(counted) / BATCH
        weight = float(sparsity[number]) if isinstance(sparsity, Tensor) and sparsity.dim() else float(sparsity)
        errors.append(error)
        amounts.append(amount)
        total += error + weight * amount
    pack = [torch.tensor(values if lead else values[0]) for values in (errors, amounts)]
    return {"reconstruction": pack[0], "sparsity": pack[1], "total": torch.tensor(total)}


def _compare_parts(name: str, answer: Any, right: dict[str, Tensor], axes: str) -> None:
    if not isinstance(answer, dict):
        got = "None" if answer is None else f"a {type(answer).__name__}"
        raise CheckFailed(f"{name}: expected a dict, got {got}.\n  Next: return the three parts by name.")
    if answer.keys() != right.keys():
        raise CheckFailed(f"{name}: expected the keys {list(right)}, got {list(answer)}.\n  Next: see the statement.")
    for label, value in right.items():
        compare(f'{name}: "{label}"', answer[label], value, "" if label == "total" else axes)


def _check_slopes(name: str, fn: Fn, lead: tuple[int, ...], *tensors: Tensor) -> None:
    labels = dict(zip(("x", "reconstruction", "latents", "W_dec"), tensors, strict=True))
    words = {
        "reconstruction": f"batch {WORDS[lead]}d_in",
        "latents": f"batch {WORDS[lead]}latent",
        "W_dec": f"{WORDS[lead]}latent d_in",
    }
    learns = {label: tensor for label, tensor in labels.items() if label != "x"}
    compare_slopes(
        f'{name}: "total"',
        lambda **given: fn(tensors[0], *given.values(), 0.3)["total"],
        lambda **given: losing()(tensors[0], *given.values(), 0.3)["total"],
        learns,
        words,
    )
    doubled = [tensor.double() for tensor in tensors]
    compare(
        f'{name} in float64: "total"',
        fn(*doubled, 0.3)["total"],
        losing()(*doubled, 0.3)["total"],
        "",
        rtol=1e-9,
        atol=1e-9,
    )
    compare_slopes(
        f'{name} with L0: "total"',
        lambda active: fn(*tensors, 0.3, active)["total"],
        lambda active: losing()(*tensors, 0.3, active)["total"],
        {"active": (tensors[2] > 0).to(tensors[2])},
        {"active": words["latents"]},
    )


# ------------------------------------------------------------------------------------------------------ directions


def with_a_zero_row(W_dec: Tensor) -> Tensor:
    W_dec = W_dec.clone()
    W_dec[..., 2, :] = 0.0
    return W_dec


def unit_rows(W_dec: Tensor) -> Tensor:
    """Row by row."""
    rows = []
    for row in W_dec.reshape(-1, W_dec.shape[-1]):
        length = math.sqrt(sum(value**2 for value in row.tolist()))
        rows.append(row / length if length else row)
    return torch.stack(rows).reshape(W_dec.shape)


def safely(norm: Tensor) -> Tensor:
    return norm.where(norm > 0, 1.0)


@known_mistakes(
    {
        "the columns are normalised; a direction is a row.": lambda W: W / safely(W.norm(dim=-2, keepdim=True)),
        "the whole matrix is divided by one number.": lambda W: W / W.norm(),
        "it is divided by the square of the norm.": lambda W: W / safely(W.square().sum(-1, keepdim=True)),
        "it is divided by the sum of absolute values.": lambda W: W / safely(W.abs().sum(-1, keepdim=True)),
        "it is divided by the largest value.": lambda W: W / safely(W.abs().amax(-1, keepdim=True)),
        "only rows longer than 1 are shortened.": lambda W: W / W.norm(dim=-1, keepdim=True).clamp(min=1),
        "a row of zeros becomes NaN; it should stay as it is.": lambda W: W / W.norm(dim=-1, keepdim=True),
        "something is added to the norm, which makes short rows shorter than 1.": lambda W: (
            W / (W.norm(dim=-1, keepdim=True) + 1e-2)
        ),
    }
)
def check_normalise_decoder(fn: Fn) -> None:
    """Rows of every length, short and long; then one of zeros."""
    name = "normalise_decoder"
    for lead in LEADS:
        axes = f"{WORDS[lead]}latent d_in"
        lengths = torch.tensor([0.01, 0.3, 1.0, 2.0, 5.0, 40.0])[:, None]
        W_dec = noise(*lead, LATENT, D_IN, seed=22) * lengths
        compare(name, fn(W_dec), unit_rows(W_dec), axes)
        zero = with_a_zero_row(W_dec)
        compare(f"{name} with a row of zeros", fn(zero), unit_rows(zero), axes)
        every_kind(name, fn, (W_dec,), axes)


def perpendicular(W_dec: Tensor, grad: Tensor) -> Tensor:
    """Row by row: Gram and Schmidt's step, with the row's own length divided out."""
    rows = []
    for row, slope in zip(W_dec.reshape(-1, W_dec.shape[-1]), grad.reshape(-1, grad.shape[-1]), strict=True):
        square = (row @ row).item()
        rows.append(slope - (slope @ row) / square * row if square else slope)
    return torch.stack(rows).reshape(grad.shape)


def along(W_dec: Tensor, grad: Tensor, axis: Any = -1) -> Tensor:
    """The part along each row, or along something else."""
    return (grad * W_dec).sum(axis, keepdim=True) * W_dec / safely(W_dec.square().sum(axis, keepdim=True))


@known_mistakes(
    {
        "the rows are taken to have a norm of 1; they may have any.": lambda W_dec, grad: (
            grad - (grad * W_dec).sum(-1, keepdim=True) * W_dec
        ),
        "the part is divided by the norm once; both factors need a direction of norm 1.": lambda W_dec, grad: (
            grad - (grad * W_dec).sum(-1, keepdim=True) * W_dec / safely(W_dec.norm(dim=-1, keepdim=True))
        ),
        "this is the part along the rows; it should be taken away.": along,
        "the part along the rows is added; it should be taken away.": lambda W_dec, grad: grad + along(W_dec, grad),
        "the part along the columns is removed; a direction is a row.": lambda W_dec, grad: (
            grad - along(W_dec, grad, -2)
        ),
        "only the part along the whole matrix is removed.": lambda W_dec, grad: grad - along(W_dec, grad, (-2, -1)),
        "nothing is removed.": lambda W_dec, grad: grad * 1.0,
        "only the length is projected: the direction is missing.": lambda W_dec, grad: (
            grad - (grad * W_dec).sum(-1, keepdim=True) / safely(W_dec.norm(dim=-1, keepdim=True))
        ),
        "a row of zeros gives NaN; there, the gradient should stay as it is.": lambda W_dec, grad: (
            grad - (grad * W_dec).sum(-1, keepdim=True) * W_dec / W_dec.square().sum(-1, keepdim=True)
        ),
    }
)
def check_remove_parallel_gradient(fn: Fn) -> None:
    """Rows of every length; then one of zeros."""
    name = "remove_parallel_gradient"
    for lead in LEADS:
        axes = f"{WORDS[lead]}latent d_in"
        W_dec, grad = noise(*lead, LATENT, D_IN, seed=23), noise(*lead, LATENT, D_IN, seed=24)
        W_dec = W_dec * torch.tensor([0.1, 0.3, 1.0, 2.0, 5.0, 9.0])[:, None]
        compare(name, fn(W_dec, grad), perpendicular(W_dec, grad), axes)
        zero = with_a_zero_row(W_dec)
        compare(f"{name} with a row of zeros", fn(zero, grad), perpendicular(zero, grad), axes)
        every_kind(name, fn, (W_dec, grad), axes)
