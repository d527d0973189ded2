"""Checks of chapter 05, is that the circuit: heads ablated, on a toy transformer.

The oracle walks through the toy's computation and exchanges the `z` of one head after the other, without hooks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import DEEP, Case, case_of, compare, counted, leaves_no_trace
from course_utils.checks.ch05.patching import no_graph
from course_utils.checks.ch05.task import differences
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during

Fn = Callable[..., Any]
Head = tuple[int, int]
Circuit = Collection[Head]
Means = Mapping[str, Tensor]
StandIn = Callable[[Tensor, str, Means], Tensor]  # (z of the run, hook point, means) -> what ablated heads get

SIZES = [(2, 3, 4, 5), (3, 2, 5, 4, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64


def every_head(model: Any) -> list[Head]:
    return [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]


def without(circuit: Circuit, *removed: Head) -> list[Head]:
    """Set difference, in order."""
    return [head for head in circuit if head not in removed]


def ablated(
    model: Any,
    dataset: Any,
    circuit: Circuit,
    means: Means,
    stand_in: StandIn = lambda z, name, means: means[name],
) -> Tensor:
    """The definition: in every layer, head after head, whatever is not of the circuit gets its mean."""

    def see(name: str, activation: Tensor) -> Tensor:
        if not name.endswith("hook_z"):
            return activation
        z, layer = activation.clone(), int(name.split(".")[1])
        silent = stand_in(activation, name, means)
        for head in range(z.shape[2]):
            if (layer, head) not in circuit:
                z[:, :, head] = silent[:, :, head]
        return z

    with torch.no_grad():
        return model.compute(dataset.tokens, see)


def each_score(model: Any, dataset: Any, circuit: Circuit, means: Means) -> Tensor:
    """The logit difference of every prompt."""
    return differences(ablated(model, dataset, circuit, means), dataset)


def scores_of(
    model: Any,
    dataset: Any,
    circuits: Sequence[Circuit],
    means: Means,
    reduce: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor:
    """F of each circuit."""
    return torch.stack([reduce(each_score(model, dataset, circuit, means)) for circuit in circuits])


class Task:
    """A toy model, prompts with two names each, and means; on average the right name wins, unless asked for."""

    def __init__(self, sizes: tuple[Any, ...], wrong_name_wins: bool = False) -> None:
        self.case = case = case_of(*sizes)
        self.model = case.model
        generator = torch.Generator().manual_seed(case.n_layers)
        rows = torch.arange(case.n_batch)
        io = torch.randint(11, (case.n_batch,), generator=generator)
        s = (io + 1 + torch.randint(10, (case.n_batch,), generator=generator)) % 11
        end = case.n_pos - 1 - rows % 2
        self.means = {  # not in the order of the layers
            name: noise(*z.shape, seed=i + 40, scale=0.7).to(z)
            for i, (name, z) in reversed(list(enumerate(case.seen.items())))
            if name.endswith("hook_z")
        }
        self.heads = every_head(self.model)
        self.dataset = SimpleNamespace(tokens=case.tokens, io=io, s=s, positions={"END": end})
        if (self.scores([self.heads])[0] < 0) != wrong_name_wins:
            self.dataset.io, self.dataset.s = s, io
        device = case.tokens.device
        self.dataset.io, self.dataset.s = self.dataset.io.to(device), self.dataset.s.to(device)

    def scores(self, circuits: Sequence[Circuit]) -> Tensor:
        """F of each."""
        return scores_of(self.model, self.dataset, circuits, self.means)


@contextmanager
def clean_run(name: str, task: Task, words: str) -> Iterator[None]:
    """Model and prompts are as before, and no hooks stay behind."""
    with leaves_no_trace(name, task.case), during(words):
        yield


def frugal(name: str, task: Task, n: int, max_rows: int, per_run: int) -> None:
    """No forward had too many rows, and there were no more of them than needed."""
    most, runs, enough = task.model.most_rows, task.model.runs, -(-n // per_run)
    if most > max(max_rows, task.case.n_batch):
        raise CheckFailed(
            f"{name}: one forward had {most} rows.\n"
            "  Next: cut the circuits into groups whose copies of the prompts fit into max_rows."
        )
    if runs > enough:
        raise CheckFailed(
            f"{name}: it took {runs} forwards for {n} circuits; {enough} are enough.\n"
            "  Next: put as many circuits into a forward as max_rows allows: "
            "`torch.cat([tokens] * n)` has a copy of the prompts for each of n circuits."
        )


# --------------------------------------------------------------------------------------------------------- the means

LABELS = [(SIZES[0], [1, 0, 1, 1]), (SIZES[1], [2, 0, 2, 1, 0]), (SIZES[1], [0, 1, 0, 0, 1]), (DEEP, [0])]


def of_templates(z: Tensor, labels: Tensor) -> Tensor:
    """The definition: for every template, the rows that are of it, added up one by one."""
    rows = []
    for template in range(int(labels.max()) + 1):
        own = [z[row] for row in range(len(z)) if int(labels[row]) == template]
        rows.append(sum(own[1:], own[0]) / len(own))
    return torch.stack(rows)


def averaging(mean: Callable[[Tensor, Tensor], Tensor] = of_templates, place: str = "hook_z") -> Fn:
    """A template_means that makes something else of the z and the labels."""

    def template_means(model: Any, tokens: Any, templates: Any, max_rows: int = 256) -> Any:
        seen = model.seen(tokens)
        return {name: mean(seen[name.replace("hook_z", place)], templates) for name in seen if name.endswith("hook_z")}

    return template_means


def sums(z: Tensor, labels: Tensor) -> Tensor:
    return of_templates(z, labels) * torch.bincount(labels)[:, None, None, None]


def evened(axis: int) -> Fn:
    """A template_means that takes the mean over this axis as well."""
    return averaging(lambda z, labels: of_templates(z.mean(axis, keepdim=True).expand_as(z), labels))


def last_rows(z: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([z[labels == template][-1] for template in range(int(labels.max()) + 1)])


def in_turns(z: Tensor, labels: Tensor) -> Tensor:
    return of_templates(z, torch.arange(len(z), device=z.device) % (labels.max() + 1))


@known_mistakes(
    {
        "the mean is taken over all rows: every template has its own.": evened(0),
        "the mean is taken over the positions too: every position has its own.": evened(1),
        "the mean is taken over the heads too.": evened(2),
        "they are sums; divide by the number of rows of the template.": averaging(sums),
        "the sums are divided by the number of all rows, not by the number of the template's rows.": averaging(
            lambda z, labels: sums(z, labels) / len(z)
        ),
        "the templates are in reverse order, or each one has another's mean.": averaging(
            lambda z, labels: of_templates(z, labels).flip(0)
        ),
        "each template has one of its rows, not the mean of them.": averaging(last_rows),
        "the means are handed out to the rows: the first axis is the template's number.": averaging(
            lambda z, labels: of_templates(z, labels)[labels]
        ),
        "hook_v is averaged, not hook_z.": averaging(place="hook_v"),
        "rows are given to templates in turns (0, 1, 2, 0, ...), whatever `templates` says.": averaging(in_turns),
        "the rows of a template are taken to stand together; `templates` says which is which.": averaging(
            lambda z, labels: of_templates(z, labels.sort().values)
        ),
    }
)
def check_template_means(fn: Fn) -> None:
    """Templates of unequal size, in no order, in one run and in several; then a template that nobody has."""
    name = "template_means"
    for sizes, labels in LABELS:
        case = case_of(*sizes)
        for max_rows in (256, 2):
            assert_means(name, fn, case, torch.tensor(labels, device=case.tokens.device), max_rows)
    case = case_of(*SIZES[1])
    gap = torch.tensor([0, 2, 0, 2, 2], device=case.tokens.device)
    must_raise(name, ValueError, "a template without rows, [0, 2, 0, 2, 2],", partial(fn, case.model, case.tokens, gap))


def assert_means(name: str, fn: Fn, case: Case, labels: Tensor, max_rows: int) -> None:
    """One table of templates."""
    words = f"with templates {labels.tolist()}, max_rows={max_rows}"
    with leaves_no_trace(name, case), during(words):
        actual = fn(case.model, case.tokens, labels, max_rows)
    seen = {key: z for key, z in case.seen.items() if key.endswith("hook_z")}
    if not isinstance(actual, dict) or set(actual) != set(seen):
        got = ", ".join(map(str, actual)) if isinstance(actual, dict) else repr(actual)[:40]
        raise CheckFailed(
            f"{name} {words}: expected a dictionary with {', '.join(seen)}; got {got or 'nothing'}.\n"
            "  Next: hook_z of every layer, and nothing else, under the hook points' own names."
        )
    for key, z in seen.items():
        compare(f"{name} {words}, at {key}", actual[key], of_templates(z, labels), "template pos head d_head")
        no_graph(name, actual[key])
    if case.model.most_rows > max_rows:
        raise CheckFailed(
            f"{name} {words}: one forward had {case.model.most_rows} rows.\n"
            "  Next: go through the rows in pieces (`tokens.split(max_rows)`), and add up."
        )


# --------------------------------------------------------------------------------------- one circuit, many circuits

CIRCUITS: list[list[Head]] = [[(1, 1), (1, 0)], [(0, 0)], [], [(1, 1), (0, 0), (1, 0)]]
DEEP_CIRCUITS: list[list[Head]] = [[(1, 0), (9, 0)], [(10, 0)]]


def of_all_kinds(circuits: Sequence[Circuit]) -> list[Circuit]:
    """Sets, tuples and lists in turn: a circuit is any collection."""
    kinds: tuple[Callable[[Circuit], Circuit], ...] = (set, tuple, frozenset, list)
    return [kinds[i % 4](circuit) for i, circuit in enumerate(circuits)]


def keeping(kept: Callable[[set[Head], Head], bool]) -> Fn:
    """A mean_ablate_except that keeps other heads."""
    return lambda model, dataset, circuit, means: ablated(
        model, dataset, [at for at in every_head(model) if kept(set(circuit), at)], means
    )


def standing_in(stand_in: StandIn) -> Fn:
    """A mean_ablate_except that puts something else there."""
    return partial(ablated, stand_in=stand_in)


def kept_from_the_usual_run(model: Any, dataset: Any, circuit: Any, means: Any) -> Tensor:
    """The circuit's heads are held at what they were in the usual run."""
    seen = model.seen(dataset.tokens)
    held = {name: mean.clone() for name, mean in means.items()}
    for layer, head in circuit:
        name = f"blocks.{layer}.attn.hook_z"
        held[name][:, :, head] = seen[name][:, :, head]
    return ablated(model, dataset, [], held)


@known_mistakes(
    {
        "the circuit itself is ablated; ablate all the others.": keeping(lambda circuit, at: at not in circuit),
        "nothing is ablated.": keeping(lambda circuit, at: True),
        "the heads get zeros instead of their means.": standing_in(lambda z, name, means: torch.zeros_like(z)),
        "the heads get their mean over the prompts of this run.": standing_in(
            lambda z, name, means: z.mean(0, keepdim=True).expand_as(z)
        ),
        "every prompt gets the means of the first one.": standing_in(
            lambda z, name, means: means[name][:1].expand_as(z)
        ),
        "every prompt gets the mean over all prompts' means: `means[name][row]` is for prompt `row`.": standing_in(
            lambda z, name, means: means[name].mean(0, keepdim=True).expand_as(z)
        ),
        "the means are averaged over positions: each position has its own.": standing_in(
            lambda z, name, means: means[name].mean(1, keepdim=True).expand_as(z)
        ),
        "every layer gets the means of the first.": standing_in(lambda z, name, means: means["blocks.0.attn.hook_z"]),
        "only the last position is ablated.": standing_in(
            lambda z, name, means: torch.cat([z[:, :-1], means[name][:, -1:]], 1)
        ),
        "layer and head are swapped: the pairs are (layer, head).": keeping(lambda circuit, at: at[::-1] in circuit),
        "these heads are kept in every layer.": keeping(lambda circuit, at: at[1] in {head for _, head in circuit}),
        "layers without a head of the circuit are left as they are; ablate all heads there.": keeping(
            lambda circuit, at: at in circuit or at[0] not in {layer for layer, _ in circuit}
        ),
        "the circuit's heads get what they found in the usual run; they are computed anew.": kept_from_the_usual_run,
    }
)
def check_mean_ablate_except(fn: Fn) -> None:
    """Circuits as lists, sets and tuples; the empty one; and the one that is the whole model."""
    name = "mean_ablate_except"
    for sizes in [*SIZES, DEEP]:
        task = Task(sizes)
        circuits = [*(DEEP_CIRCUITS if sizes == DEEP else CIRCUITS), task.heads]
        for circuit, given in zip(circuits, of_all_kinds(circuits), strict=True):
            words = f"with circuit {'every head' if circuit is task.heads else circuit} {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, given, task.means)
            right = ablated(task.model, task.dataset, circuit, task.means)
            compare(f"{name} {words}", actual, right, "batch pos d_vocab")
            no_graph(name, actual)


def scoring(
    circuits: Callable[[list[Any], list[Head], int], Sequence[Circuit]] = lambda circuits, heads, fit: circuits,
    reduce: Callable[[Tensor], Tensor] = torch.mean,
    then: Callable[[Tensor, Tensor], Tensor] = lambda scores, whole: scores,
) -> Fn:
    """A circuit_scores of other circuits (made of those asked for, all heads, and how many fit into a forward)."""

    def circuit_scores(model: Any, dataset: Any, asked: Any, means: Any, max_rows: int = 64) -> Any:
        heads = every_head(model)
        wrong = circuits(list(asked), heads, max(1, max_rows // len(dataset.tokens)))
        *scores, whole = scores_of(model, dataset, [*wrong, heads], means, reduce)
        return then(torch.stack(scores), whole)

    return circuit_scores


def repeated(place: int) -> Fn:
    """A circuit_scores with one circuit of each forward for all copies."""

    def chosen(circuits: list[Any], heads: list[Head], fit: int) -> list[Any]:
        chunks = [circuits[start : start + fit] for start in range(0, len(circuits), fit)]
        return [chunk[place] for chunk in chunks for _ in chunk]

    return scoring(chosen)


@known_mistakes(
    {
        "the circuits themselves are ablated; ablate all the other heads.": scoring(
            lambda circuits, heads, fit: [without(heads, *circuit) for circuit in circuits]
        ),
        "nothing is ablated.": scoring(lambda circuits, heads, fit: [heads] * len(circuits)),
        "the logit differences are summed over the prompts; take their mean.": scoring(reduce=torch.sum),
        "it is the first prompt's logit difference; take the mean over all.": scoring(reduce=lambda values: values[0]),
        "the sign is wrong: it is the receiver minus the giver.": scoring(then=lambda scores, whole: -scores),
        "they are divided by the whole model's score; return the scores themselves.": scoring(
            then=lambda scores, whole: scores / whole
        ),
        "the circuits are in reverse order.": scoring(then=lambda scores, whole: scores.flip(0)),
        "all copies have the first circuit of their forward.": repeated(0),
        "all copies have the last circuit of their forward.": repeated(-1),
    }
)
def check_circuit_scores(fn: Fn) -> None:
    """The scores of five circuits, in few and in many forwards; then memory, and the number of forwards."""
    name = "circuit_scores"
    for sizes in SIZES:
        for max_rows in (2, 11):  # the first has not even room for the prompts of one circuit; 64 is the default, below
            task = Task(sizes)
            assert_scores(name, fn, task, [*CIRCUITS, task.heads], max_rows)
    assert_scores(name, fn, Task(SIZES[0]), CIRCUITS * 5, None)
    assert_scores(name, fn, Task(DEEP), DEEP_CIRCUITS, 2)
    assert_scores(name, fn, Task(DEEP), DEEP_CIRCUITS[:1], 2)


def assert_scores(name: str, fn: Fn, task: Task, circuits: list[list[Head]], limit: int | None) -> None:
    """Some circuits, in forwards of so many rows; without a limit, of as many as by default."""
    max_rows = 64 if limit is None else limit
    words = f"of {counted(len(circuits), 'circuit')} with max_rows={max_rows} {task.case.words}"
    with clean_run(name, task, words):
        given = () if limit is None else (limit,)
        actual = fn(task.model, task.dataset, of_all_kinds(circuits), task.means, *given)
    once = {str(circuit): task.scores([circuit])[0] for circuit in circuits}
    compare(f"{name} {words}", actual, torch.stack([once[str(circuit)] for circuit in circuits]), "circuit")
    no_graph(name, actual)
    frugal(f"{name} {words}", task, len(circuits), max_rows, max(1, max_rows // task.case.n_batch))
