"""Checks of chapter 05, directions: parts of a vector exchanged, and the search for what decides."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks import comparing
from course_utils.checks.ch05.case import compare
from course_utils.checks.ch05.edges import LOGITS, Case, Fn, case, case_of
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during
from course_utils.hooks import HookPoint, hooks


@contextmanager
def streams_stay(name: str, model: Any) -> Iterator[None]:
    """What others saw of the stream before a hook of the learner's must still be what they saw."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(resid: Tensor, hook: HookPoint) -> None:
        seen.append((resid.detach(), resid.detach().clone()))

    with hooks(model, {"blocks.*.hook_resid_p*": note}):
        yield
    if not all(torch.equal(now, before) for now, before in seen):
        raise CheckFailed(
            f"{name}: it writes into the activation itself, which others may hold.\n"
            "  Next: `clone()` the activation in the hook, write into the clone, and return that."
        )


Swap = Callable[[Tensor, Tensor], Tensor]  # (base's vector, source's vector) -> what stands there in the run on base


def swapped(model: Any, base: Tensor, source: Tensor, place: str, where: Tensor, swap: Swap) -> Tensor:
    """The logits with vectors of each prompt exchanged, by PyTorch's own hooks, prompt by prompt.

    `where` holds a position for each prompt, or several.
    """
    module = model.get_submodule(place)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(source)
    handle.remove()

    def exchange(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        out = output.clone()
        for prompt, positions in enumerate(where.reshape(len(base), -1).tolist()):
            for pos in positions:
                out[prompt, pos] = swap(output[prompt, pos], seen[0][prompt, pos])
        return out

    handle = module.register_forward_hook(exchange)
    try:
        return model(base)
    finally:
        handle.remove()


def along(directions: Tensor) -> Swap:
    """The definition: direction by direction, the base's dot product is exchanged for the source's."""

    def swap(own: Tensor, other: Tensor) -> Tensor:
        out = own
        for direction in directions:
            out = out + ((other @ direction) - (own @ direction)) * direction
        return out

    return swap


def orthonormal(*rows: Tensor) -> Tensor:
    """Gram and Schmidt's basis of the rows' span."""
    found: list[Tensor] = []
    for row in rows:
        for other in found:
            row = row - (row @ other) * other
        found.append(row / row.norm())
    return torch.stack(found)


def exchanging(
    swap: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda own, other, inside: own + inside @ (other - own),
    at: Callable[[Tensor, Tensor], Tensor] = lambda positions, base: positions,
    using: Callable[[Tensor], Tensor] = lambda directions: directions,
) -> Fn:
    """An interchange_intervention with something else in the vector's place, or at other positions.

    `swap` gets both vectors, and the projection on the directions.
    """

    def interchange_intervention(model: Any, base: Any, source: Any, name: str, positions: Any, directions: Any) -> Any:
        used = using(directions)
        inside = used.T @ used
        where = at(positions, base)
        return swapped(model, base, source, name, where, lambda own, other: swap(own, other, inside))

    return interchange_intervention


@known_mistakes(
    {
        "nothing is exchanged.": exchanging(lambda own, other, inside: own),
        "base and source are swapped.": (lambda model, base, source, *rest: exchanging()(model, source, base, *rest)),
        "the whole vector is exchanged, not only its part along the directions.": exchanging(
            lambda own, other, inside: other
        ),
        "the part along the directions stays, and all the rest is exchanged.": exchanging(
            lambda own, other, inside: other + inside @ (own - other)
        ),
        "the source's part is added, but the base's own part stays.": exchanging(
            lambda own, other, inside: own + inside @ other
        ),
        "the base's part is removed, and nothing takes its place.": exchanging(
            lambda own, other, inside: own - inside @ own
        ),
        "it is the source's part alone: what is orthogonal to the directions is lost.": exchanging(
            lambda own, other, inside: inside @ other
        ),
        "the exchange is at all positions.": exchanging(
            at=lambda positions, base: torch.arange(base.shape[1]).expand_as(base)
        ),
        "the exchange is at the last position.": exchanging(
            at=lambda positions, base: torch.full_like(positions, base.shape[1] - 1)
        ),
        "all prompts use the first one's position.": exchanging(
            at=lambda positions, base: positions[:1].expand_as(positions)
        ),
        "the positions are off by one.": exchanging(at=lambda positions, base: positions + 1),
        "only the first direction is used.": exchanging(using=lambda directions: directions[:1]),
    }
)
def check_interchange_intervention(fn: Fn) -> None:
    """Three places, subspaces of one to three dimensions, positions that differ; then directions to refuse."""
    name = "interchange_intervention"
    for number, place, n_directions in PLACES:
        with case(number) as known:
            where = torch.tensor([2, 0, 3, 1][: len(known.clean)])
            rows = noise(n_directions, known.model.cfg.d_model, seed=7).to(known.weights.dtype)
            directions = orthonormal(*rows).requires_grad_()
            with streams_stay(name, known.model), known.leaves_no_trace(name), during(f"at {place}"):
                actual = fn(known.model, known.clean, known.corrupted, place, where, directions)
            right = swapped(known.model, known.clean, known.corrupted, place, where, along(directions))
            label = f"{name} at {place}, {n_directions} direction{'s' * (n_directions > 1)}"
            compare(label, actual, right, LOGITS)
            if not actual.requires_grad:
                raise CheckFailed(
                    f"{name}: no gradient flows to `directions`.\n"
                    "  Next: only the run on `source` goes under torch.no_grad(); detach nothing in the other."
                )
            slopes = [slope_among_orthonormal(known.metric(lo).sum(), directions) for lo in (actual, right)]
            words = f"{label}: the gradient of a metric"
            compare(words, slopes[0], slopes[1], "direction d_model", rtol=1e-3, atol=5e-5)
    refuses_crooked(name, fn)


PLACES = [(0, "blocks.1.hook_resid_pre", 1), (0, "blocks.0.hook_mlp_out", 3), (1, "blocks.2.hook_resid_post", 2)]


def slope_among_orthonormal(value: Tensor, directions: Tensor) -> Tensor:
    """The gradient for steps after which the directions are still orthonormal; what it is elsewhere nobody says."""
    (slope,) = torch.autograd.grad(value, directions)
    return slope - (slope @ directions.T + directions @ slope.T) / 2 @ directions


def refuses_crooked(name: str, fn: Fn) -> None:
    """Directions too long, too short, or not orthogonal, also by little; but not by rounding."""
    with case(0) as known:
        first, second = orthonormal(*noise(2, known.model.cfg.d_model, seed=8))
        where = torch.tensor([2, 0, 3, 1])
        for words, rows in {
            "a direction of length 2": [2 * first],
            "a direction of length 0.9": [0.9 * first],
            "a direction of length 1.0002": [1.0002 * first],
            "two directions that are not orthogonal": [first, (first + second) / 2**0.5],
        }.items():
            call = partial(fn, known.model, known.clean, known.corrupted, "blocks.1.hook_resid_pre", where)
            with known.leaves_no_trace(name):
                must_raise(name, ValueError, words, partial(call, torch.stack(rows)))
        with known.leaves_no_trace(name), during("a direction of length 1.00002"):
            call((1.00002 * first)[None])


def softplus_mean(values: Tensor) -> Tensor:
    """What is minimised."""
    return torch.logaddexp(values, torch.zeros_like(values)).mean()


def searched(
    model: Any,
    base: Any,
    source: Any,
    name: str,
    positions: Any,
    metric: Any,
    generator: Any,
    steps: int = 40,
    lr: float = 0.05,
    n_directions: int = 1,
    *,
    loss: Callable[[Tensor], Tensor] = softplus_mean,
    optimiser: Any = torch.optim.Adam,
) -> Tensor:
    """The search, with Gram and Schmidt's directions; another loss or optimiser finds something else."""
    raw = torch.randn(n_directions, model.cfg.d_model, generator=generator)
    raw = raw.to(model.embed.W_E.dtype).requires_grad_()
    learns = optimiser([raw], lr=lr)
    for _ in range(steps):
        values = metric(swapped(model, base, source, name, positions, along(orthonormal(*raw))))
        (raw.grad,) = torch.autograd.grad(loss(values), [raw])
        learns.step()
    return orthonormal(*raw.detach())


def searching(steps: Callable[[int], int] = lambda steps: steps, backwards: bool = False, **fixed: Any) -> Fn:
    """An align_direction with another number of steps, other roles, or something fixed, such as `loss` or `lr`."""

    def align_direction(model: Any, base: Any, source: Any, *rest: Any, **given: Any) -> Any:
        texts = (source, base) if backwards else (base, source)
        return searched(model, *texts, *rest, **given | {"steps": steps(given["steps"])} | fixed)

    return align_direction


@known_mistakes(
    {
        "the metric is made as large as possible.": searching(loss=lambda values: F.softplus(-values).mean()),
        "the metric itself is minimised; its softplus stops where an answer has changed.": searching(loss=torch.mean),
        "the metric is minimised through a sigmoid.": searching(loss=lambda values: values.sigmoid().mean()),
        "nothing is learned: these are the directions of the start.": searching(lambda steps: 0),
        "there is one step too few.": searching(lambda steps: steps - 1),
        "`lr` is not used.": searching(lr=0.05),
        "base and source are swapped.": searching(backwards=True),
    }
)
def check_align_direction(fn: Fn) -> None:
    """The same search, step by step; what counts is the span of the directions."""
    name = "align_direction"
    for number, place, options, size in SEARCHES:
        with case(number) as known:
            given = search_of(number, place, size)
            quiet = redirect_stderr(io.StringIO())  # progress bars
            with known.leaves_no_trace(name), quiet:
                actual = fn(*given, **options)
            right = known_directions(number, place, size, **options)
            n_directions = options.get("n_directions", 1)
            label = f"{name} at {place}, {options['steps']} steps{', a metric in the hundreds' * (size > 1)}"
            comparing.compare(label, actual, right, "direction d_model", rtol=1e9, atol=1e9)  # shape, dtype and device
            if actual.requires_grad:
                raise CheckFailed(f"{name}: what it returns has a graph.\n  Next: detach it.")
            products, identity = actual @ actual.T, torch.eye(n_directions).to(actual)
            comparing.compare(f"{label}: the directions' dot products", products, identity, "direction direction")
            words = f"{label}: the projection on the directions"
            comparing.compare(words, actual.T @ actual, right.T @ right, "d_model d_model", rtol=1e-2, atol=2e-3)


SEARCHES: list[tuple[int, str, dict[str, Any], float]] = [  # with what the metric is multiplied
    (0, "blocks.1.hook_resid_pre", {"steps": 3, "lr": 0.2, "n_directions": 1}, 1.0),
    (1, "blocks.1.hook_resid_post", {"steps": 4, "lr": 0.1, "n_directions": 2}, 1.0),
    (0, "blocks.0.hook_resid_post", {"steps": 2}, 1000.0),
]


def search_of(number: int, place: str, size: float) -> tuple[Any, ...]:
    """Model, base, source, place, positions, metric and generator of a search."""
    known = case_of(number)
    where = torch.tensor([2, 1, 3, 1][: len(known.clean)])
    generator = torch.Generator().manual_seed(11)
    return known.model, known.clean, known.corrupted, place, where, partial(enlarged, known, size), generator


def enlarged(known: Case, size: float, logits: Tensor) -> Tensor:
    return known.metric(logits) * size


@cache
def known_directions(number: int, place: str, size: float, **options: Any) -> Tensor:
    """The expected directions, worked out once."""
    search: Fn = searched
    return search(*search_of(number, place, size), **options)
