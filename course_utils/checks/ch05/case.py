"""Two batches of prompts for a toy transformer, and what patches from one into the other really do: the oracle."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from course_utils.checks import comparing
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.toy_transformer import ToyTransformer
from course_utils.hooks import ActivationCache, hook_points

ONE = (1, 1, 1, 1)  # one layer, one head, one prompt, one position: nothing to squeeze
DEEP = (11, 1, 1, 1)  # so deep that layers have numbers of two digits


def compare(
    name: str, actual: object, expected: Tensor, axes: str, rtol: float = 1e-4, atol: float = 1e-5, **options: Any
) -> None:
    """As always; but what comes in double precision must have been worked out in it all the way."""
    comparing.compare(name, actual, expected, axes, rtol, atol, **options)
    if expected.dtype == torch.float64 and not torch.allclose(actual, expected, 1e-9, 1e-10):
        raise CheckFailed(
            f"{name}: the inputs are in double precision (float64), but the answer is only as exact as float32.\n"
            "  Next: look for .float(), torch.float32, or a tensor made without dtype=, on the way to it."
        )


def counted(number: int, what: str) -> str:
    """One head, two heads."""
    return f"{number} {what}{'s' * (number != 1)}"


class Case:
    """Two batches of prompts for a toy model, a metric, and what patches from one into the other really do.

    With `moved` all of it is in double precision, and on a GPU where there is one: answers have to follow. The source
    run then has a graph, as a run without `torch.no_grad()` leaves it.
    """

    def __init__(
        self, n_layers: int, n_heads: int, n_batch: int, n_pos: int, attn_only: bool = False, moved: bool = False
    ) -> None:
        seed = n_layers
        target: dict[str, Any] = {"dtype": torch.float64 if moved else torch.float32}
        target["device"] = "cuda" if moved and torch.cuda.is_available() else "cpu"
        self.model = ToyTransformer(n_layers, n_heads, attn_only, seed).to(**target)
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randint(11, (2, n_batch, n_pos), generator=generator).to(target["device"])
        self.tokens, self.source_tokens = draw[0], (draw[0] + 1 + draw[1] % 10) % 11  # no token is the same
        self.seen, self.source = self.model.seen(self.tokens), self.model.seen(self.source_tokens)
        self.weights = noise(n_batch, 11, seed=seed + 77).to(**target)
        self.n_batch, self.n_pos, self.n_layers, self.n_heads = n_batch, n_pos, n_layers, n_heads
        self.asking = ""  # which exercise is being checked
        self.moved = moved
        self.sizes = (n_layers, n_heads, n_batch, n_pos, attn_only, moved)
        self.words = (
            f"on {counted(n_batch, 'prompt')} of {counted(n_pos, 'token')}, "
            f"{counted(n_layers, 'layer')} of {counted(n_heads, 'head')}{', no MLPs' * attn_only}"
        )

    def cache(self) -> ActivationCache:
        """The source run, as a learner gets it."""
        graph = torch.ones((), dtype=self.weights.dtype, device=self.weights.device, requires_grad=self.moved)
        source = {name: activation * graph for name, activation in self.source.items()}
        return ActivationCache(source, self.n_layers)

    def metric(self, logits: Tensor) -> Tensor:
        """One number per prompt, with weights of its own for each, and not linear."""
        if not isinstance(logits, Tensor) or logits.shape != (self.n_batch, self.n_pos, 11):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else f"of type {type(logits).__name__}"
            raise CheckFailed(
                f"{self.asking}: the metric was given logits {got}, "
                f"expected (batch={self.n_batch}, pos={self.n_pos}, d_vocab=11).\n"
                "  Next: it compares prompt by prompt: hand it the logits of all prompts, once for each patch."
            )
        last, first = ((logits[:, pos] * self.weights).sum(-1) for pos in (-1, 0))
        return torch.sin(last) + first.tanh() + self.weights[:, 0]

    def logits(self, place: str, index: tuple[Any, ...]) -> Tensor:
        """The logits with this part of this activation taken from the source run."""

        def see(name: str, activation: Tensor) -> Tensor:
            if name == place:
                part = (slice(None), *index)
                activation = activation.clone()
                activation[part] = self.source[name][part]
            return activation

        with torch.no_grad():
            return self.model.compute(self.tokens, see)


@cache
def case_of(*sizes: Any) -> Case:
    """A case, made once: it is the same at each call, unless somebody spoils it."""
    return Case(*sizes)


_WORKED_OUT: dict[tuple[str, tuple[Any, ...]], Any] = {}


def worked_out(key: str, case: Case, work: Callable[[Case], Any]) -> Any:
    """An expected answer, worked out once for a case, on one that nobody has spoiled: the loop behind it is slow."""
    if (key, case.sizes) not in _WORKED_OUT:
        _WORKED_OUT[key, case.sizes] = work(case_of(*case.sizes))
    return _WORKED_OUT[key, case.sizes]


@contextmanager
def hooks_stay(name: str, model: Any) -> Iterator[None]:
    """Hooks of others stay, and no hook of the learner's does."""
    points = hook_points(model)
    handles = [point.add(lambda activation, hook: None) for point in points.values()]
    before = {place: list(point._fns.values()) for place, point in points.items()}
    try:
        yield
        for place, point in points.items():
            now = list(point._fns.values())
            left = len(now) > len(before[place]) or point._forward_hooks or point._forward_pre_hooks
            if left or now != before[place]:
                what = (
                    f"a hook is left behind at `{place}`" if left else f"hooks of others, at `{place}`, are taken away"
                )
                raise CheckFailed(
                    f"{name}: {what}.\n"
                    "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away their own."
                )
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients_stay(name: str, model: Any) -> Iterator[None]:
    """The parameters' gradients are what they were: somebody else's."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    yield
    for place, parameter in model.named_parameters():
        if parameter.grad is None or not (parameter.grad == 1).all():
            raise CheckFailed(
                f"{name}: it touched the gradients of the model's parameters, as at `{place}`.\n"
                "  Next: torch.autograd.grad(output, inputs) returns gradients and stores none."
            )


@contextmanager
def leaves_no_trace(name: str, case: Case) -> Iterator[None]:
    """The tokens (which a dataset holds), the parameters' gradients and everybody's hooks must be there as before."""
    model = case.model
    model.runs, model.rows, model.most_rows, case.asking = 0, 0, 0, name
    tokens = case.tokens.clone()
    try:
        with gradients_stay(name, model), hooks_stay(name, model):
            yield
        if not torch.equal(case.tokens, tokens):
            raise CheckFailed(f"{name}: it changed `tokens` in place.\n  Next: make a new tensor.")
    except BaseException:
        case_of.cache_clear()  # whatever was spoiled, nobody else shall see it
        raise
