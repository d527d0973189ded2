"""Chapter 03's first circuit: its checks against mistakes that learners make, and right answers written another way."""

from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import solutions.ch03_training as ref
from course_utils.checks import run_check
from course_utils.checks.ch03 import circuit
from tests.ch03 import other_training as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

CHECKS = {name.removeprefix("check_"): check for name, check in vars(circuit).items() if name.startswith("check_")}
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ------------------------------------------------------------------------------------------ reverse_increment_dataset


def dataset(**wrong: Any) -> Any:
    """The dataset with switches for what people get wrong."""

    def reverse_increment_dataset() -> Any:
        digits = torch.cartesian_prod(*[torch.arange(4)] * 8)
        digits = digits.flip(1) if wrong.get("little") else digits
        answer = digits if wrong.get("forwards") else digits.flip(1)
        answer = answer + wrong.get("step", 1)
        answer = answer % wrong["modulus"] if "modulus" in wrong else answer.clamp(max=wrong.get("top", 9))
        bos = torch.full((len(digits), 1), wrong.get("bos", 4))
        parts = [bos, answer, digits] if wrong.get("answer_first") else [bos, digits, answer]
        rows = torch.cat(parts, dim=1)
        return wrong.get("last", lambda rows: rows)(rows)

    return reverse_increment_dataset


def data(words: str, surprise: bool = False, **wrong: Any) -> None:
    mistake("reverse_increment_dataset", words, dataset(**{"modulus": 4} | wrong), surprise)


data("reversed only", step=0)
data("incremented only", forwards=True)
mistake("reverse_increment_dataset", "a 3 becomes 4, which is BOS", dataset())
mistake("reverse_increment_dataset", "a 3 stays a 3", dataset(top=3))
data("a 3 becomes 4, which is BOS", modulus=5)
data("decremented", step=-1)
data("answer stands before the digits", answer_first=True)
data("the first digit changes fastest", little=True)
data("BOS is 0", bos=0)
data("in another order", surprise=True, last=lambda rows: rows.flip(0))
data("first at row 0", surprise=True, last=lambda rows: rows[torch.randperm(len(rows))])
data("values are wrong", surprise=True, step=2)
data("values are wrong", surprise=True, last=lambda rows: torch.cat([rows[:, :9], rows[:, 9:].roll(1, 1)], dim=1))
data("values are wrong", surprise=True, last=lambda rows: torch.cat([rows[:-1], rows[:1]]))  # one row twice
data("expected dtype int64, got int32", surprise=True, last=torch.Tensor.int)
data("BOS is left out", last=lambda rows: rows[:, 1:])


# ----------------------------------------------------------------------------------------------------- masked_lm_loss


def nats(logits: Any, tokens: Any) -> Any:
    return -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def loss(words: str, reduce: Any, surprise: bool = False, checked: bool = True) -> None:
    """A wrong loss, which refuses masks without targets as it should."""

    def masked_lm_loss(logits: Any, tokens: Any, mask: Any) -> Any:
        if checked and not mask[:, 1:].any():
            raise ValueError
        return reduce(logits, tokens, mask)

    mistake("masked_lm_loss", words, masked_lm_loss, surprise)


def shifted(logits: Any, tokens: Any) -> Any:
    return nats(logits[:, :-1], tokens[:, 1:])


loss("the labels are not shifted", lambda x, t, m: nats(x, t)[m].mean())
loss("shifted the wrong way: logits", lambda x, t, m: nats(x[:, 1:], t[:, :-1])[m[:, :-1]].mean())
loss("read at the position of the logits", lambda x, t, m: shifted(x, t)[m[:, :-1]].mean())
loss("the mask is shifted the wrong way", lambda x, t, m: shifted(x, t)[:, :-1][m[:, 2:]].mean())
loss("the mask is not used", lambda x, t, m: shifted(x, t).mean())
loss("divided by the number of all positions", lambda x, t, m: (shifted(x, t) * m[:, 1:]).mean())
loss("the sum is taken", lambda x, t, m: shifted(x, t)[m[:, 1:]].sum())
loss("divided by the number of rows", lambda x, t, m: shifted(x, t)[m[:, 1:]].sum() / len(m))
loss("position 0 has no prediction", lambda x, t, m: shifted(x, t)[m[:, 1:]].sum() / m.sum())
loss("the sign is missing", lambda x, t, m: -shifted(x, t)[m[:, 1:]].mean())
loss("p is averaged", lambda x, t, m: (-shifted(x, t)).exp()[m[:, 1:]].mean())
loss("a function that takes it again", lambda x, t, m: shifted(x.softmax(-1), t)[m[:, 1:]].mean())
loss(
    "each row's mean is taken first",
    lambda x, t, m: torch.stack([n[c].mean() for n, c in zip(shifted(x, t), m[:, 1:], strict=True) if c.any()]).mean(),
)
loss(
    "with logits in the hundreds",
    lambda x, t, m: -x[:, :-1].softmax(-1).gather(-1, t[:, 1:, None]).squeeze(-1).log()[m[:, 1:]].mean(),
)
loss("unmarked targets are counted", lambda x, t, m: shifted(x, t)[m[:, 1:] == (m[:, 1:].all())].mean())
loss("its gradient", lambda x, t, m: shifted(x, t)[m[:, 1:]].mean() + (x - x.detach()).sum(), surprise=True)
loss("no gradient flows", lambda x, t, m: shifted(x, t)[m[:, 1:]].mean().detach(), surprise=True)
loss("expected dtype float32, got float64", lambda x, t, m: shifted(x.double(), t)[m[:, 1:]].mean(), surprise=True)
loss("marks nothing", lambda x, t, m: shifted(x, t)[m[:, 1:]].mean(), surprise=True, checked=False)
loss("expected 2.979, got 2.726", lambda x, t, m: shifted(x, t)[m[:, 1:]].median(), surprise=True)
loss("wrong shape", lambda x, t, m: shifted(x, t)[m[:, 1:]], surprise=True)
loss(
    "expected",  # only the first row's mask is read
    lambda x, t, m: shifted(x, t)[m[:1, 1:].expand_as(t[:, 1:])].mean(),
    surprise=True,
)
loss("it changed `logits` in place", lambda x, t, m: shifted(x.sub_(x.max()), t)[m[:, 1:]].mean())


def counts_the_first(logits: Any, tokens: Any, mask: Any) -> Any:
    if not mask.any():
        raise ValueError
    return shifted(logits, tokens)[mask[:, 1:]].mean()


mistake("masked_lm_loss", "marks position 0 only", counts_the_first, surprise=True)


# ------------------------------------------------------------------------------------------------------- zero_ablated


def looked_up(model: nn.Module, name: str) -> nn.Parameter:
    parameters = dict(model.named_parameters())
    if name not in parameters:
        raise ValueError(f"no {name}; nearest: {get_close_matches(name, parameters, cutoff=0.0)}")
    return parameters[name]


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def ablation(words: str, surprise: bool = False) -> Any:
    """Note a wrong generator as a wrong context manager."""

    def note(function: Any) -> Any:
        mistake("zero_ablated", words, contextmanager(function), surprise)
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


@ablation("in the block `W_O` is another one than before", surprise=True)
def _(model: Any, name: str) -> Any:
    looked_up(model, name)
    first = next(n for n, _ in model.named_parameters() if n.split(".")[-1] == name.split(".")[-1])
    with ref.zero_ablated(model, first):
        yield model


@ablation("is another one than before", surprise=True)
def _(model: Any, name: str) -> Any:
    looked_up(model, name)
    chosen = [p for n, p in model.named_parameters() if n.endswith(name)]
    kept = [p.detach().clone() for p in chosen]
    try:
        for parameter in chosen:
            parameter.data.zero_()
        yield model
    finally:
        for parameter, values in zip(chosen, kept, strict=True):
            parameter.data.copy_(values)


@ablation("at [0, 0, 1]: expected -0.0, got 0.0", surprise=True)
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().clone()
    parameter.data.zero_()
    try:
        yield model
    finally:
        parameter.data.copy_((kept - kept) + kept)


@ablation("is not what it was", surprise=True)
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


@ablation("should raise ValueError, for no parameter has that name")
def _(model: Any, name: str) -> Any:
    if name in dict(model.named_parameters()):
        with ref.zero_ablated(model, name):
            yield model
    else:
        yield model


@ablation("should name the nearest parameters", surprise=True)
def _(model: Any, name: str) -> Any:
    if name not in dict(model.named_parameters()):
        raise ValueError("unknown")
    with ref.zero_ablated(model, name):
        yield model


@ablation("your code raised KeyError", surprise=True)
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(
        model, next(n for n, p in model.named_parameters() if p is dict(model.named_parameters())[name])
    ):
        yield model


@ablation("in the block gradients are switched off", surprise=True)
def _(model: Any, name: str) -> Any:
    with torch.no_grad(), ref.zero_ablated(model, name):
        yield model


@ablation("`blocks.0.attn.W_O.requires_grad` is not what it was", surprise=True)
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(model, name):
        yield model
    looked_up(model, name).requires_grad_(True)


@ablation("in the block `blocks.1.attn.W_O` is not zero", surprise=True)
def _(model: Any, name: str) -> Any:
    parameter = looked_up(model, name)
    kept = parameter.detach().clone()
    try:
        parameter.data[0] = 0
        yield model
    finally:
        parameter.data.copy_(kept)


@ablation("should hand over the model", surprise=True)
def _(model: Any, name: str) -> Any:
    with ref.zero_ablated(model, name):
        yield looked_up(model, name)


def no_manager(model: Any, name: str) -> Any:
    return looked_up(model, name).data.zero_()


mistake("zero_ablated", "expected something that `with` can open", no_manager, surprise=True)


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("gather(", "cartesian_prod", "copy_(", "zero_("))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_the_reference_and_another_right_answer_pass(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(ref, exercise))
    run_check(CHECKS[exercise], getattr(other, exercise))


def test_more_right_answers_pass() -> None:
    """A dataset counted by arithmetic, losses by sums and by a loop over the rows."""

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

    run_check(CHECKS["reverse_increment_dataset"], counted)
    run_check(CHECKS["masked_lm_loss"], by_sums)
    run_check(CHECKS["masked_lm_loss"], by_rows)


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(ref, exercise))


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


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise]) <= STILL_RIGHT
