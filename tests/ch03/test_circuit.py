"""Chapter 03's first circuit: its checks against mistakes that learners make, and right answers written another way."""

from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import solutions.ch03_training as ref
from course_utils.checks.ch03 import circuit
from course_utils.checks.ch03.circuit import next_nats
from tests.ch03 import other_training as other

SECRETS = ("gather(", "cartesian_prod", "copy_(", "zero_(")


def loss(reduce: Any, checked: bool = True) -> Any:
    """A wrong loss, which refuses masks without targets as it should."""

    def masked_lm_loss(logits: Any, tokens: Any, mask: Any) -> Any:
        if checked and not mask[:, 1:].any():
            raise ValueError
        return reduce(logits, tokens, mask)

    return masked_lm_loss


def counts_the_first(logits: Any, tokens: Any, mask: Any) -> Any:
    if not mask.any():
        raise ValueError
    return next_nats(logits, tokens)[mask[:, 1:]].mean()


def edited(edit: Any) -> Any:
    return lambda: edit(ref.reverse_increment_dataset())


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "reverse_increment_dataset": [
        ("in another order", edited(lambda rows: rows.flip(0))),
        ("it drew from torch's global random numbers", edited(lambda rows: rows[torch.randperm(len(rows))])),
        ("values are wrong", circuit.dataset(step=2)),
        ("values are wrong", edited(lambda rows: torch.cat([rows[:, :9], rows[:, 9:].roll(1, 1)], dim=1))),
        ("values are wrong", edited(lambda rows: torch.cat([rows[:-1], rows[:1]]))),  # one row twice
        ("expected dtype int64, got int32", edited(torch.Tensor.int)),
    ],
    "masked_lm_loss": [
        ("its gradient", loss(lambda x, t, m: next_nats(x, t)[m[:, 1:]].mean() + (x - x.detach()).sum())),
        ("no gradient flows", loss(lambda x, t, m: next_nats(x, t)[m[:, 1:]].mean().detach())),
        ("expected dtype float32, got float64", loss(lambda x, t, m: next_nats(x.double(), t)[m[:, 1:]].mean())),
        ("marks nothing", loss(lambda x, t, m: next_nats(x, t)[m[:, 1:]].mean(), checked=False)),
        ("marks position 0 only", counts_the_first),
        ("expected 2.979, got 2.726", loss(lambda x, t, m: next_nats(x, t)[m[:, 1:]].median())),
        ("wrong shape", loss(lambda x, t, m: next_nats(x, t)[m[:, 1:]])),
        ("fewer digits", loss(lambda x, t, m: next_nats(x.float(), t)[m[:, 1:]].mean().to(x.dtype))),
        (
            "where a token is impossible",
            loss(lambda x, t, m: -(F.one_hot(t, 7)[:, 1:] * x[:, :-1].log_softmax(-1)).sum(-1)[m[:, 1:]].mean()),
        ),
        # only the first row's mask is read
        ("expected", loss(lambda x, t, m: next_nats(x, t)[m[:1, 1:].expand_as(t[:, 1:])].mean())),
        ("it changed `logits` in place", loss(lambda x, t, m: next_nats(x.sub_(x.max()), t)[m[:, 1:]].mean())),
    ],
    "zero_ablated": [],
}


# ------------------------------------------------------------------------------------------------------- zero_ablated


def looked_up(model: nn.Module, name: str) -> nn.Parameter:
    parameters = dict(model.named_parameters())
    if name not in parameters:
        raise ValueError(f"no {name}; nearest: {get_close_matches(name, parameters, cutoff=0.0)}")
    return parameters[name]


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def ablation(words: str) -> Any:
    """Note a wrong generator as a wrong context manager."""

    def note(function: Any) -> Any:
        SURPRISES["zero_ablated"].append((words, contextmanager(function)))
        return function

    return note


@ablation("what stands after `yield` is skipped when the block raises")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().clone()
    parameter.data.zero_()
    yield model
    parameter.data.copy_(kept)


@ablation("the values were not written back")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach()  # the same memory
    try:
        parameter.data.zero_()
        yield model
    finally:
        parameter.data.copy_(kept)


@ablation("is another Parameter than before")
def _(model: Any, name: str) -> Any:
    old = looked_up(model, name)
    module, last = owner(model, name)
    kept = old.detach().clone()
    old.data.zero_()
    try:
        yield model
    finally:
        setattr(module, last, nn.Parameter(kept, requires_grad=old.requires_grad))


@ablation("lies in other memory than before")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().clone()
    parameter.data.zero_()
    try:
        yield model
    finally:
        parameter.data = kept


@ablation("a view of the parameter still shows the old weights")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.data
    try:
        parameter.data = torch.zeros_like(kept)
        yield model
    finally:
        parameter.data = kept


@ablation("at [0, 0, 1]: expected -0.0, got 0.0")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().clone()
    parameter.data.zero_()
    try:
        yield model
    finally:
        parameter.data.copy_((kept - kept) + kept)


@ablation("is not what it was")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().half().float()
    parameter.data.zero_()
    try:
        yield model
    finally:
        parameter.data.copy_(kept)


@ablation("was swallowed")
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(model, name), suppress(RuntimeError):
        try:
            yield model
        except Exception:
            return


@ablation("should raise ValueError, because no parameter has that name")
def _(model: Any, name: str) -> Any:
    if name in dict(model.named_parameters()):
        with ref.zero_ablated(model, name):
            yield model
    else:
        yield model


@ablation("should name the nearest parameters")
def _(model: Any, name: str) -> Any:
    if name not in dict(model.named_parameters()):
        raise ValueError("unknown")
    with ref.zero_ablated(model, name):
        yield model


@ablation("your code raised KeyError")
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(
        model, next(n for n, p in model.named_parameters() if p is dict(model.named_parameters())[name])
    ):
        yield model


@ablation("in the block gradients are switched off")
def _(model: Any, name: str) -> Any:
    with torch.no_grad(), ref.zero_ablated(model, name):
        yield model


@ablation("`blocks.0.attn.W_O.requires_grad` is not what it was")
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(model, name):
        yield model
    looked_up(model, name).requires_grad_(True)


@ablation("in the block `blocks.1.attn.W_O` is not zero")
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().clone()
    try:
        parameter.data[-1] = 0  # the first alone is a known mistake
        yield model
    finally:
        parameter.data.copy_(kept)


@ablation("should hand over the model")
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(model, name):
        yield looked_up(model, name)


def no_manager(model: Any, name: str) -> Any:
    return looked_up(model, name).data.zero_()


SURPRISES["zero_ablated"].append(("it changed `model.blocks.1.attn.W_O` in place", no_manager))
SURPRISES["zero_ablated"].append(("expected something that `with` can open", looked_up))


# -------------------------------------------------------------------------------------------------- other right answers


def counted() -> Any:
    rows = [
        [4, *(n >> 2 * (7 - k) & 3 for k in range(8)), *((n >> 2 * k & 3) + 1 & 3 for k in range(8))]
        for n in range(4**8)
    ]
    return torch.tensor(rows)


def by_sums(logits: Any, tokens: Any, mask: Any) -> Any:
    counts = mask[:, 1:].to(logits.dtype)
    if counts.sum() == 0:
        raise ValueError
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (flat * counts.flatten()).sum() / counts.sum()


def by_rows(logits: Any, tokens: Any, mask: Any) -> Any:
    places = [(row, pos) for row, pos in mask.nonzero().tolist() if pos > 0]
    if not places:
        raise ValueError
    terms = [logits[row, pos - 1].logsumexp(0) - logits[row, pos - 1, tokens[row, pos]] for row, pos in places]
    return torch.stack(terms).mean()


ALSO_RIGHT = {
    "reverse_increment_dataset": [other.reverse_increment_dataset, counted],
    "masked_lm_loss": [other.masked_lm_loss, by_sums, by_rows],
    "zero_ablated": [other.zero_ablated],
}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "parameter.detach() -> parameter",  # the clone is in a graph, which nobody reads
    "3 -> 4",  # how many near names the message holds, and how it lists them
    "3 -> 2",
    "get_close_matches(parameter_name, parameters, n=3, cutoff=0.0)"
    " -> get_close_matches(parameter_name, parameters, cutoff=0.0)",
    "get_close_matches(parameter_name, parameters, n=3, cutoff=0.0)"
    " -> get_close_matches(parameter_name, parameters, n=3)",
    "', '.join(get_close_matches(parameter_name, parameters, n=3, cutoff=0.0))"
    " -> get_close_matches(parameter_name, parameters, n=3, cutoff=0.0)",
}
