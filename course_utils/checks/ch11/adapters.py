"""Checks of chapter 11, adapters: a linear map with a change of low rank, and such changes all over a model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_utils.checks.ch11.small import Fn, demand, small_model
from course_utils.checks.comparing import compare
from course_utils.checks.guarding import GLOBAL_RANDOM, may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, with_methods
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.transformer import some_tokens

AXES = "batch out_features"


class Adapted(nn.Module):
    """The statement, with steps of its own that subclasses get wrong."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = self.frozen(linear), self.scaled(rank, alpha)
        self.A = nn.Parameter(self.first(linear, rank, generator))
        self.B = nn.Parameter(self.second(linear, rank, generator))

    def frozen(self, linear: nn.Linear) -> nn.Linear:
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        return linear

    def scaled(self, rank: int, alpha: float) -> float:
        return alpha / rank

    def first(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> Tensor:
        drawn = torch.normal(0.0, linear.in_features**-0.5, (rank, linear.in_features), generator=generator)
        return drawn.to(linear.weight)

    def second(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(linear.out_features, rank).to(linear.weight)

    def change(self) -> Tensor:
        return torch.einsum("or,ri->oi", self.B, self.A) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight + self.change(), self.linear.bias)

    def merged(self) -> nn.Linear:
        weight = self.linear.weight
        has_bias = self.linear.bias is not None
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            plain.weight.copy_(weight + self.change())
            if has_bias:
                plain.bias.copy_(self.linear.bias)
        return plain


def wrong(**methods: Any) -> type:
    return with_methods(Adapted, "LoRALinear", **methods)


def merged_in_place(self: Any) -> nn.Linear:
    with torch.no_grad():
        self.linear.weight += self.change()
    return self.linear


def merged_without_change(self: Any) -> nn.Linear:
    return copy.deepcopy(self.linear)


def merged_without_scale(self: Any) -> nn.Linear:
    plain = copy.deepcopy(self.linear)
    with torch.no_grad():
        plain.weight += self.B @ self.A
    return plain


def merged_with_its_bias(self: Any) -> nn.Linear:
    plain = Adapted.merged(self)
    plain.bias = self.linear.bias
    return plain


def uniform(self: Any, linear: nn.Linear, rank: int, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(rank, linear.in_features, generator=generator) * 2 - 1
    return (drawn * (3 / linear.in_features) ** 0.5).to(linear.weight)


@known_mistakes(
    {
        "B is not zeros at first, so the adapter changes the map before any training.": wrong(
            second=lambda self, linear, rank, generator: torch.randn(linear.out_features, rank, generator=generator).to(
                linear.weight
            )
        ),
        "A is zeros as well as B: then no gradient gets to either, and nothing is ever learned.": wrong(
            first=lambda self, linear, rank, generator: torch.zeros(rank, linear.in_features).to(linear.weight)
        ),
        "the change is scaled by alpha; it is alpha / rank.": wrong(scaled=lambda self, rank, alpha: alpha),
        "the change is not scaled by alpha / rank.": wrong(scaled=lambda self, rank, alpha: 1.0),
        "the linear map is not frozen.": wrong(frozen=lambda self, linear: linear),
        "A's deviation is 1; it is 1 / sqrt(in_features).": wrong(
            first=lambda self, linear, rank, generator: torch.randn(rank, linear.in_features, generator=generator).to(
                linear.weight
            )
        ),
        "the bias is lost.": wrong(forward=lambda self, x: nn.functional.linear(x, self.linear.weight + self.change())),
        "the frozen map has no say: the output is the change alone, and the bias.": wrong(
            forward=lambda self, x: nn.functional.linear(x, self.change(), self.linear.bias)
        ),
        "merged: the adapter's own map is changed, so that the change counts twice from then on.": wrong(
            merged=merged_in_place
        ),
        "merged: the change is not in it.": wrong(merged=merged_without_change),
        "merged: the change comes without its scale.": wrong(merged=merged_without_scale),
        "merged: the new map has the adapter's own bias: whoever trains it changes both.": wrong(
            merged=merged_with_its_bias
        ),
        "A is drawn evenly from an interval; the distribution is normal.": wrong(first=uniform),
    }
)
@may_change("linear", GLOBAL_RANDOM)
def check_LoRALinear(cls: Any) -> None:  # noqa: N802 (the exercise's name)
    """At first, with random adapters, merged; with and without a bias, more axes, float64; draws and gradients."""
    name = "LoRALinear"
    for bias, dtype, shape in ((True, torch.float32, (4,)), (False, torch.float64, (2, 3))):
        linear = a_linear(6, 5, bias, dtype)
        was = linear.weight.detach().clone()
        adapter = made(cls, name, linear, 2, 3.0)
        x = noise(*shape, 6, seed=7).to(dtype)
        axes = AXES if len(shape) == 1 else "batch pos out_features"
        words = f"{name}, a map {'with' if bias else 'without'} bias"
        compare(f"{words}, before training", adapter(x), linear(x), axes)
        with torch.no_grad():
            adapter.A.copy_(noise(2, 6, seed=8))
            adapter.B.copy_(noise(5, 2, seed=9))
        change = 1.5 * sum(torch.outer(adapter.B[:, r], adapter.A[r]) for r in range(2)).detach()
        expected = nn.functional.linear(x, was + change, linear.bias)
        compare(words, adapter(x), expected, axes)
        _merged(name, words, adapter, x, expected, axes, was)
        if not adapter(x).requires_grad:
            raise CheckFailed(f"{name}: no gradient gets through it.\n  Next: do not detach.")
        grads = torch.autograd.grad(adapter(x).square().sum(), [adapter.A, adapter.B])
        demand(all(g.any() for g in grads), name, "gradients", "A or B gets no gradient.", "do not detach.")
    _draws(name, cls)


def a_linear(n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(noise(n_out, n_in, seed=1))
        if bias:
            linear.bias.copy_(noise(n_out, seed=2))
    return linear


def made(cls: Any, name: str, linear: nn.Linear, rank: int, alpha: float, seed: int = 3) -> Any:
    """An adapter with all that the statement promises at first."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed(f"{name}: expected a class that inherits from nn.Module.\n  Next: see the statement.")
    adapter = cls(linear, rank, alpha, torch.Generator().manual_seed(seed))
    shapes = {label: tuple(parameter.shape) for label, parameter in adapter.named_parameters()}
    wanted = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
    for label, shape in wanted.items():
        if shapes.get(label) != shape:
            raise CheckFailed(
                f"{name}: expected a parameter `{label}` of shape {shape}, got {shapes.get(label, 'none')}.\n"
                "  Next: self.A = nn.Parameter(...)"
            )
    if getattr(adapter, "linear", None) is not linear:
        raise CheckFailed(f"{name}: `self.linear` is not the map that was handed in.\n  Next: keep it as it is.")
    trained = sorted(label for label, parameter in adapter.named_parameters() if parameter.requires_grad)
    demand(
        trained == ["A", "B"], name, "frozen", f"the parameters {trained} are trained; A and B alone are.", "freeze."
    )
    for label in wanted:
        if getattr(adapter, label).dtype != linear.weight.dtype:
            raise CheckFailed(f"{name}: `{label}` has another dtype than the map.\n  Next: `.to(linear.weight)`.")
    return adapter


def _merged(name: str, words: str, adapter: Any, x: Tensor, expected: Tensor, axes: str, was: Tensor) -> None:
    plain = adapter.merged()
    if type(plain) is not nn.Linear:
        raise CheckFailed(f"{name}: merged() gives a {type(plain).__name__}.\n  Next: return an nn.Linear.")
    demand(
        plain is not adapter.linear and torch.equal(adapter.linear.weight, was),
        name,
        "merged in place",
        "merged() changed the adapter's own map.",
        "make a new nn.Linear.",
    )
    compare(f"{words}, merged", plain(x), expected, axes, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in plain.parameters():  # what is done to the new map is not done to the old one
            parameter.zero_()
    compare(f"{words}, after merging", adapter(x), expected, axes)


def _draws(name: str, cls: Any) -> None:
    wide = made(cls, name, a_linear(500, 3, True, torch.float32), 8, 1.0).A.detach()
    demand(bool(wide.any()), name, "A zero", "A is zeros.", "draw it; only B begins as zeros.")
    deviation = float(wide.std()) * 500**0.5
    demand(
        abs(deviation - 1) < 0.07 and abs(float(wide.mean())) < 0.005,
        name,
        "A's deviation",
        f"A has a deviation of {deviation:.3g} / sqrt(in_features).",
        "draw it with a deviation of 1 / sqrt(in_features).",
    )
    largest = float(wide.abs().max()) * 500**0.5
    demand(
        largest > 2.5,
        name,
        "A's distribution",
        f"of 4000 numbers in A, the largest is {largest:.3g} / sqrt(in_features).",
        "draw from a normal distribution: torch.randn.",
    )
    drawn = [made(cls, name, a_linear(6, 5, True, torch.float32), 2, 1.0, seed).A.detach() for seed in (3, 3, 4)]
    demand(
        torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]),
        name,
        "generator",
        "A does not depend on the generator, and on it alone.",
        "give `generator` to torch.randn.",
    )


# ------------------------------------------------------------------------------------------------------- a whole model


class Change(nn.Module):
    """A parametrization by a low-rank change."""

    def __init__(self, W: Tensor, rank: int, scale: float, generator: torch.Generator, zeros: bool = True) -> None:
        super().__init__()
        n_rows, n_cols = W.shape
        self.scale = scale
        self.A = nn.Parameter((torch.randn(n_rows, rank, generator=generator) / n_rows**0.5).to(W))
        B = torch.zeros(rank, n_cols) if zeros else torch.randn(rank, n_cols, generator=generator)
        self.B = nn.Parameter(B.to(W))

    def forward(self, W: Tensor) -> Tensor:
        return W + self.scale * torch.einsum("ar,rb->ab", self.A, self.B)


def adapting(
    names: tuple[str, ...] = ("W_in", "W_out"),
    layers: slice = slice(None),
    freeze: bool = True,
    zeros: bool = True,
    given: str = "AB",
    times: float = 1.0,
    per_rank: bool = True,
) -> Fn:
    """add_adapters, with something else in one of its parts."""

    def add_adapters(model: Any, rank: int, alpha: float, generator: torch.Generator) -> list[nn.Parameter]:
        for parameter in model.parameters():
            parameter.requires_grad_(not freeze)
        found = []
        for block in list(model.blocks)[layers]:
            for name in names:
                scale = times * (alpha / rank if per_rank else alpha)
                change = Change(getattr(block.mlp, name).detach(), rank, scale, generator, zeros)
                parametrize.register_parametrization(block.mlp, name, change)
                found += [getattr(change, letter) for letter in given]
        return found

    return add_adapters


@known_mistakes(
    {
        "the model itself is not frozen.": adapting(freeze=False),
        "the adapters are not zero at first: the model computes something else before any training.": adapting(
            zeros=False
        ),
        "only W_in has an adapter.": adapting(names=("W_in",)),
        "W_out comes before W_in.": adapting(names=("W_out", "W_in")),
        "only the first layer has adapters.": adapting(layers=slice(1)),
        "only B is returned; A is trained as well.": adapting(given="B"),
        "alpha is not divided by the rank.": adapting(per_rank=False),
    }
)
@may_change("model")
def check_add_adapters(fn: Fn) -> None:
    """What is trained and what is not; the model at first, and with adapters that say something."""
    name, axes = "add_adapters", "batch pos d_vocab"
    for n_layers, rank, alpha in ((2, 3, 2.0), (1, 1, 4.0)):
        model = small_model(n_layers=n_layers)
        tokens = some_tokens(model.cfg, 3, 5, seed=2)
        before, plain = model(tokens).detach(), copy.deepcopy(model)
        added = fn(model, rank, alpha, torch.Generator().manual_seed(3))
        if not isinstance(added, list) or not all(isinstance(entry, nn.Parameter) for entry in added):
            raise CheckFailed(f"{name}: expected a list of parameters.\n  Next: return those of the adapters.")
        words = f"{name}, {n_layers} layer{'s' * (n_layers > 1)}"
        compare(f"{words}, before training", model(tokens).detach(), before, axes)
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        shapes = [tuple(parameter.shape) for parameter in added]
        wanted = [(7, rank), (rank, 6), (6, rank), (rank, 7)] * n_layers
        _list(name, shapes, wanted)
        demand(
            trained == {id(parameter) for parameter in added},
            name,
            "trained",
            f"{len(trained)} parameters of the model are trained, and {len(added)} were returned.",
            "freeze the model first, then add adapters.",
        )
        generator = torch.Generator().manual_seed(3)
        for number, parameter in enumerate(added):
            rows, cols = parameter.shape
            if number % 2 == 0:
                expected = torch.randn(rows, cols, generator=generator) / rows**0.5
                compare(f"{words}, A number {number // 2}", parameter, nn.Parameter(expected), "row rank")
            with torch.no_grad():
                parameter.copy_(noise(rows, cols, seed=20 + number))
        weights = [(block.mlp, which) for block in plain.blocks for which in ("W_in", "W_out")]
        with torch.no_grad():
            for (mlp, which), A, B in zip(weights, added[::2], added[1::2], strict=True):
                getattr(mlp, which).add_(alpha / rank * torch.einsum("ar,rb->ab", A, B))
        compare(f"{words}, with random adapters", model(tokens).detach(), plain(tokens).detach(), axes)


def _list(name: str, shapes: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> None:
    demand(
        shapes == wanted,
        name,
        f"shapes {shapes}",
        f"the parameters that it returned have shapes {shapes}; expected {wanted}.",
        "A and B of W_in, then of W_out, layer by layer.",
    )
