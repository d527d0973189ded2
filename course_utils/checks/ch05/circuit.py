"""Checks of chapter 05, is that the circuit: heads silenced, and three criteria, on a toy transformer.

The oracle walks through the toy's computation and exchanges the `z` of one head after the other, without hooks.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case, case_of, leaves_no_trace, worked_out
from course_utils.checks.ch05.patching import no_graph
from course_utils.checks.ch05.task import differences
from course_utils.checks.comparing import compare
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, must_raise
from course_utils.checks.translating import during

Fn = Callable[..., Any]
Head = tuple[int, int]
Circuit = Collection[Head]
Means = Mapping[str, Tensor]
StandIn = Callable[[Tensor, str, Means], Tensor]  # (z of the run, hook point, means) -> what silenced heads get

SIZES = [(2, 3, 4, 5), (3, 2, 5, 4, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64


def every_head(model: Any) -> list[Head]:
    return [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]


def without(circuit: Circuit, *removed: Head) -> list[Head]:
    """Set difference, in order."""
    return [head for head in circuit if head not in removed]


def silenced(
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
    return differences(silenced(model, dataset, circuit, means), dataset)


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
    """A toy model, prompts with two names each, and means."""

    def __init__(self, sizes: tuple[Any, ...]) -> None:
        self.case = case = case_of(*sizes)
        self.model = case.model
        generator = torch.Generator().manual_seed(case.n_layers)
        rows = torch.arange(case.n_batch)
        io = torch.randint(11, (case.n_batch,), generator=generator)
        s = (io + 1 + torch.randint(10, (case.n_batch,), generator=generator)) % 11
        # the wrong name never wins on average: where F(M) was negative, the two would change places
        end = case.n_pos - 1 - rows % 2
        self.means = {
            name: noise(*z.shape, seed=i + 40, scale=0.7).to(z)
            for i, (name, z) in enumerate(case.seen.items())
            if name.endswith("hook_z")
        }
        self.heads = every_head(self.model)
        self.dataset = SimpleNamespace(tokens=case.tokens, io=io, s=s, positions={"END": end})
        if self.scores([self.heads])[0] < 0:
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
            "  Next: put as many circuits into a forward as max_rows allows."
        )


# --------------------------------------------------------------------------------------------------------- the means

LABELS = [(SIZES[0], [1, 0, 1, 1]), (SIZES[1], [2, 0, 2, 1, 0]), (SIZES[1], [0, 1, 0, 0, 1])]


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
        "the sums are divided by the number of all rows, not by that of the template's.": averaging(
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


def keeping(kept: Callable[[set[Head], Head], bool]) -> Fn:
    """A mean_ablate_except that keeps other heads."""
    return lambda model, dataset, circuit, means: silenced(
        model, dataset, [at for at in every_head(model) if kept(set(circuit), at)], means
    )


def standing_in(stand_in: StandIn) -> Fn:
    """A mean_ablate_except that puts something else there."""
    return partial(silenced, stand_in=stand_in)


def kept_from_the_usual_run(model: Any, dataset: Any, circuit: Any, means: Any) -> Tensor:
    """The circuit's heads are held at what they were in the usual run."""
    seen = model.seen(dataset.tokens)
    held = {name: mean.clone() for name, mean in means.items()}
    for layer, head in circuit:
        name = f"blocks.{layer}.attn.hook_z"
        held[name][:, :, head] = seen[name][:, :, head]
    return silenced(model, dataset, [], held)


@known_mistakes(
    {
        "the circuit itself is silenced; it is all the others that are.": keeping(
            lambda circuit, at: at not in circuit
        ),
        "nothing is silenced.": keeping(lambda circuit, at: True),
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
        "only the last position is silenced.": standing_in(
            lambda z, name, means: torch.cat([z[:, :-1], means[name][:, -1:]], 1)
        ),
        "layer and head are swapped: the pairs are (layer, head).": keeping(lambda circuit, at: at[::-1] in circuit),
        "these heads are kept in every layer.": keeping(lambda circuit, at: at[1] in {head for _, head in circuit}),
        "layers without a head of the circuit are left as they are; there all heads are silenced.": keeping(
            lambda circuit, at: at in circuit or at[0] not in {layer for layer, _ in circuit}
        ),
        "the circuit's heads get what they found in the usual run; they are computed anew.": kept_from_the_usual_run,
    }
)
def check_mean_ablate_except(fn: Fn) -> None:
    """Circuits as lists, sets and tuples; the empty one; and the one that is the whole model."""
    name = "mean_ablate_except"
    for sizes in SIZES:
        task = Task(sizes)
        kinds: list[Callable[[list[Head]], Circuit]] = [list, set, tuple, frozenset]
        for circuit, kind in zip([*CIRCUITS, task.heads], [*kinds, list], strict=True):
            words = f"with circuit {'every head' if circuit is task.heads else circuit} {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, kind(circuit), task.means)
            right = silenced(task.model, task.dataset, circuit, task.means)
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
        "the circuits themselves are silenced; it is all the others that are.": scoring(
            lambda circuits, heads, fit: [without(heads, *circuit) for circuit in circuits]
        ),
        "nothing is silenced.": scoring(lambda circuits, heads, fit: [heads] * len(circuits)),
        "the logit differences are summed over the prompts; take their mean.": scoring(reduce=torch.sum),
        "it is the first prompt's logit difference; take the mean over all.": scoring(reduce=lambda values: values[0]),
        "the sign is wrong: it is the receiver minus the giver.": scoring(then=lambda scores, whole: -scores),
        "they are divided by the whole model's; the scores themselves are asked for.": scoring(
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
        for max_rows in (2, 11, 64):  # the first has not even room for the prompts of one circuit
            task = Task(sizes)
            circuits = [*CIRCUITS, task.heads]
            words = f"with max_rows={max_rows} {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, circuits, task.means, max_rows)
            compare(f"{name} {words}", actual, task.scores(circuits), "circuit")
            no_graph(name, actual)
            per_run = max(1, max_rows // task.case.n_batch)
            frugal(f"{name} {words}", task, len(circuits), max_rows, per_run)


# -------------------------------------------------------------------------------------------------- the three criteria


def ratio(value: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Fn:
    """A faithfulness made of F(C), F(M), F(empty) and F(all but C)."""

    def faithfulness(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
        heads, n = every_head(model), len(circuits)
        rest = [without(heads, *circuit) for circuit in circuits]
        scores = scores_of(model, dataset, [*circuits, *rest, heads, []], means)
        return value(scores[:n], scores[-2], scores[-1], scores[n : 2 * n])

    return faithfulness


def mean_of_ratios(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
    whole = each_score(model, dataset, every_head(model), means)
    return torch.stack([(each_score(model, dataset, circuit, means) / whole).mean() for circuit in circuits])


@known_mistakes(
    {
        "it is F(C), not divided by F(M).": ratio(lambda c, m, e, r: c),
        "the ratio is upside down: it is F(C) / F(M).": ratio(lambda c, m, e, r: m / c),
        "it is the difference F(M) - F(C); the ratio is asked for.": ratio(lambda c, m, e, r: m - c),
        "it is the distance from 1, |1 - F(C) / F(M)|; the ratio itself is asked for.": ratio(
            lambda c, m, e, r: (1 - c / m).abs()
        ),
        "F(empty) is subtracted from both: a good measure, too, but another one.": ratio(
            lambda c, m, e, r: (c - e) / (m - e)
        ),
        "it is the mean of every prompt's ratio; take the ratio of the means.": mean_of_ratios,
        "it is what the model loses with the circuit: the circuit is silenced, not the rest.": ratio(
            lambda c, m, e, r: r / m
        ),
        "it is F(C) / F(empty): divide by the whole model's.": ratio(lambda c, m, e, r: c / e),
    }
)
def check_faithfulness(fn: Fn) -> None:
    """A ratio of means, for several circuits at once, and for one."""
    name = "faithfulness"
    for sizes in SIZES:
        for n in (5, 1):
            task = Task(sizes)
            circuits = [*CIRCUITS, task.heads][:n]
            words = f"of {n} circuits {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, circuits, task.means)
            right = task.scores(circuits) / task.scores([task.heads])
            compare(f"{name} {words}", actual, right, "circuit")


KS: list[list[Head]] = [[(0, 0)], [], [(1, 1), (1, 0)], [(1, 0), (0, 0), (1, 1)]]  # the last is all of the circuit


def two_sides(
    sides: Callable[..., tuple[Any, Any]] = lambda c, m, k: (c - k, m - k),
    then: Callable[[Tensor, Tensor], Tensor] = lambda scores, whole: scores,
) -> Fn:
    """A completeness whose two circuits come from `sides(circuit, every head, K)`, three sets."""

    def completeness(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
        heads = set(every_head(model))
        pairs = [sides(set(circuit), heads, set(k)) for k in removed]
        runs = [first for first, _ in pairs] + [second for _, second in pairs]
        *scores, whole = scores_of(model, dataset, [*runs, heads], means)
        return then(torch.stack(scores).reshape(2, -1), whole)

    return completeness


@known_mistakes(
    {
        "the sides are swapped: the circuit comes first.": two_sides(lambda c, m, k: (m - k, c - k)),
        "K is taken out of the circuit only, and not out of the model.": two_sides(lambda c, m, k: (c - k, m)),
        "K is taken out of the model only, and not out of the circuit.": two_sides(lambda c, m, k: (c, m - k)),
        "K is what is kept, not what is taken out.": two_sides(lambda c, m, k: (k, k)),
        "what is left of the circuit is taken out of the model, instead of K.": two_sides(
            lambda c, m, k: (c - k, m - (c - k))
        ),
        "on the model's side the circuit is gone too: only K is taken out of it.": two_sides(
            lambda c, m, k: (c - k, m - c)
        ),
        "the K come in reverse order.": two_sides(then=lambda scores, whole: scores.flip(1)),
        "it is the incompleteness, the difference of the two sides; give both.": two_sides(
            then=lambda scores, whole: (scores[0] - scores[1]).abs()
        ),
        "they are divided by F(M); the scores themselves are asked for.": two_sides(
            then=lambda scores, whole: scores / whole
        ),
        "a transpose became a reshape.": two_sides(then=lambda scores, whole: scores.T.reshape(scores.shape)),
    }
)
def check_completeness(fn: Fn) -> None:
    """Both sides for K of several sizes, the empty one among them; and a K that is not of the circuit."""
    name = "completeness"
    circuit = CIRCUITS[3]
    for sizes in SIZES:
        task = Task(sizes)
        words = f"of {circuit} with K in {KS} {task.case.words}"
        with clean_run(name, task, words):
            actual = fn(task.model, task.dataset, circuit, KS, task.means)
        right = torch.stack([task.scores([without(side, *k) for k in KS]) for side in (circuit, task.heads)])
        compare(f"{name} {words}", actual, right, "side removed")
    task = Task(SIZES[0])
    must_raise(
        name,
        ValueError,
        "with a K that is not of the circuit, [(0, 0), (0, 2)],",
        partial(fn, task.model, task.dataset, circuit, [[(0, 0), (0, 2)]], task.means),
    )


# the heads come in an order of their own, not in the circuit's
REMOVED: dict[Head, list[Head]] = {(1, 0): [(1, 1)], (0, 0): [], (1, 1): [(1, 0), (0, 0)]}


def minimal(
    sets: Callable[..., tuple[Any, Any]] = lambda c, m, k, v: (c - k - v, c - k),
    value: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda a, b, m, c: (a - b).abs() / m,
    order: Callable[[Any, Any], Any] = lambda removed, circuit: removed,
) -> Fn:
    """A minimality that compares the two circuits of `sets(circuit, every head, K, {v})`, four sets.

    `value` gets both scores, that of the model, and that of the circuit.
    """

    def minimality(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
        heads, values = set(every_head(model)), []
        for v in order(removed, circuit):
            runs = sets(set(circuit), heads, set(removed[v]), {v})
            values.append(value(*scores_of(model, dataset, [*runs, heads, circuit], means)))
        return torch.stack(values)

    return minimality


@known_mistakes(
    {
        "K stays in: it is |F(C without v) - F(C)|.": minimal(lambda c, m, k, v: (c - v, c)),
        "it is what K adds: |F(C without K) - F(C)|; v is not taken out.": minimal(lambda c, m, k, v: (c - k, c)),
        "it is what v and K add together: F(C) stands where F(C without K) should.": minimal(
            lambda c, m, k, v: (c - k - v, c)
        ),
        "v alone is compared with K alone; take out both, and then K only.": minimal(lambda c, m, k, v: (c - v, c - k)),
        "it is measured in the whole model; take the heads out of the circuit.": minimal(
            lambda c, m, k, v: (m - k - v, m - k)
        ),
        "it has a sign; take the absolute value.": minimal(value=lambda a, b, m, c: (a - b) / m),
        "it has a sign, and the other one at that; take the absolute value.": minimal(
            value=lambda a, b, m, c: (b - a) / m
        ),
        "it is not a share of F(M).": minimal(value=lambda a, b, m, c: (a - b).abs()),
        "it is a share of F(C); take F(M).": minimal(value=lambda a, b, m, c: ((a - b) / c).abs()),
        "it is a share of F(C without K); take F(M).": minimal(value=lambda a, b, m, c: ((a - b) / b).abs()),
        "the ratio is upside down.": minimal(value=lambda a, b, m, c: m / (a - b).abs()),
        "the heads come in the circuit's order, not in that of `removed`.": minimal(
            order=lambda removed, circuit: circuit
        ),
    }
)
def check_minimality(fn: Fn) -> None:
    """A score for each head, with K of several sizes; then what must be refused."""
    name = "minimality"
    circuit = CIRCUITS[3]
    for sizes in SIZES:
        task = Task(sizes)
        words = f"of {circuit} with removed={REMOVED} {task.case.words}"
        with clean_run(name, task, words):
            actual = fn(task.model, task.dataset, circuit, REMOVED, task.means)
        less = task.scores([without(circuit, *k) for k in REMOVED.values()])
        least = task.scores([without(circuit, *k, v) for v, k in REMOVED.items()])
        right = (least - less).abs() / task.scores([task.heads])
        compare(f"{name} {words}", actual, right, "head")
    task = Task(SIZES[0])
    for wrong, why in [
        ({(0, 0): [(0, 2)]}, "a K that is not of the circuit"),
        ({(0, 2): [(0, 0)]}, "a v that is not of the circuit"),
        ({(0, 0): [(1, 0), (0, 0)]}, "a v in its own K"),
    ]:
        run = partial(fn, task.model, task.dataset, circuit, wrong, task.means)
        must_raise(name, ValueError, f"with {why}, removed={wrong},", run)


# ------------------------------------------------------------------------------------------------------------- greedy


def search(
    model: Any,
    dataset: Any,
    means: Any,
    share: float = 0.25,
    max_rows: int = 64,
    *,
    badness: Callable[[float, float, float], float] = lambda score, whole, now: abs(score - whole),
    count: Callable[[float], int] = int,
    once: bool = False,
    adding: bool = True,
    carried: bool = False,
) -> list[list[Head]]:
    """The search, spelled out: `badness` of (an expected score, the model's, the one before) says who goes next.

    The other switches: `count` rounds; with `once` changes are measured once, without `adding` they do not add up;
    `carried`, a round begins with what the one before expected.
    """
    known: dict[frozenset[Head], float] = {}

    def score(circuit: Circuit) -> float:
        if frozenset(circuit) not in known:
            known[frozenset(circuit)] = scores_of(model, dataset, [circuit], means).item()
        return known[frozenset(circuit)]

    circuit = every_head(model)
    rounds, whole, changes = [circuit], score(circuit), dict[Head, float]()
    now = whole
    while circuit:
        now = now if carried else score(circuit)
        if not once or not changes:
            changes = {head: score(without(circuit, head)) - score(circuit) for head in circuit}
        left = list(circuit)
        for _ in range(max(1, count(share * len(circuit)))):
            values = {head: badness(now + changes[head], whole, now) for head in left}
            gone = min(left, key=values.__getitem__)
            left.remove(gone)
            now += changes[gone] if adding else 0.0
        circuit = left
        rounds.append(circuit)
    return rounds


def searching(then: Callable[[list[list[Head]]], Any] = lambda rounds: rounds, **wrong: Any) -> Fn:
    """A greedy_circuit with a switch of `search` turned, or whose rounds were changed."""
    return lambda *given: then(search(*given, **wrong))


@known_mistakes(
    {
        "the heads that are missed most go first.": searching(badness=lambda f, m, now: -abs(f - m)),
        "those heads go whose absence leaves the highest score, even above the model's.": searching(
            badness=lambda f, m, now: -f
        ),
        "those heads go whose absence leaves the lowest score.": searching(badness=lambda f, m, now: f),
        "scores are compared with the one before, not with the whole model's.": searching(
            badness=lambda f, m, now: abs(f - now)
        ),
        "the changes are measured once, in the whole model; measure them anew in every round.": searching(once=True),
        "within a round the changes do not add up: each head is looked at as if it went alone.": searching(
            adding=False
        ),
        "the share is rounded up; it is rounded down, but at least one head goes.": searching(
            count=lambda n: -int(-n // 1)
        ),
        "heads go one at a time, whatever `share` says.": searching(count=lambda n: 1),
        "the first circuit, with every head, is missing.": searching(lambda rounds: rounds[1:]),
        "the last circuit, the empty one, is missing.": searching(lambda rounds: rounds[:-1]),
        "the circuits come in reverse order: every head first.": searching(lambda rounds: rounds[::-1]),
        "each round holds the heads that went, not those that stay.": searching(
            lambda rounds: [without(rounds[0], *kept) for kept in rounds]
        ),
    }
)
def check_greedy_circuit(fn: Fn) -> None:
    """Every round of the search, heads one at a time and several at once; then memory."""
    name = "greedy_circuit"
    for sizes, share, max_rows in [(SIZES[1], 0.35, 64), (SIZES[0], 0.0, 64), (SIZES[0], 0.5, 9)]:
        task = Task(sizes)
        call = f"greedy_circuit(..., share={share}, max_rows={max_rows}) {task.case.words}"
        with clean_run(name, task, f"with share={share}"), at_most(name, task.model, 150):
            actual = fn(task.model, task.dataset, task.means, share, max_rows)
        most_rows = task.model.most_rows
        right = worked_out(call, task.case, partial(searched, share=share))
        agree(name, call, as_lists(name, actual), right)
        if most_rows > max(max_rows, task.case.n_batch):
            raise CheckFailed(
                f"{name} with max_rows={max_rows}: one forward had {most_rows} rows.\n  Next: hand `max_rows` on."
            )


def searched(case: Case, share: float) -> list[list[Head]]:
    task = Task(case.sizes)
    return search(task.model, task.dataset, task.means, share)


@contextmanager
def at_most(name: str, model: Any, runs: int) -> Iterator[None]:
    """A search that never ends is stopped."""
    start = model.runs

    def count(module: Any, inputs: Any) -> None:
        if model.runs - start > runs:
            raise CheckFailed(
                f"{name}: it goes on and on: more than {runs} runs for a model of six heads.\n"
                "  Next: every round has to take out one head at least, and the search ends when none is left."
            )

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def as_lists(name: str, rounds: Any) -> Any:
    """Each round's circuit as a sorted list; a set or a tuple is right, too."""
    try:
        return [sorted((int(layer), int(head)) for layer, head in circuit) for circuit in rounds]
    except (TypeError, ValueError):
        raise CheckFailed(
            f"{name}: expected a list of circuits, each with pairs (layer, head), got {repr(rounds)[:60]}.\n"
            "  Next: one circuit for each round, the first with every head."
        ) from None
