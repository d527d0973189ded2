"""Checks of chapter 05, is that the circuit: heads silenced, and three criteria, on a toy transformer.

The oracle walks through the toy's computation and exchanges the `z` of one head after the other, without hooks.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case, case_of, leaves_no_trace
from course_utils.checks.ch05.patching import no_graph
from course_utils.checks.ch05.task import differences
from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, must_raise
from course_utils.checks.translating import during
from course_utils.hooks import ActivationCache

Fn = Callable[..., Any]
Head = tuple[int, int]
Circuit = Collection[Head]
Wrong = dict[str, Callable[[], Tensor]]
StandIn = Callable[[Tensor, str], Tensor]  # (z of the run, hook point) -> what silenced heads get

SIZES = [(2, 3, 4, 5), (3, 2, 5, 4, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64
NO_CACHE = ActivationCache({})  # nothing here takes activations from another run


class Task:
    """A toy model, prompts with two names each, means, and what circuits really score."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model
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
        self.heads = [(layer, head) for layer in range(case.n_layers) for head in range(case.n_heads)]
        self.dataset = SimpleNamespace(tokens=case.tokens, io=io, s=s, positions={"END": end})
        if self.score(self.heads) < 0:
            self.dataset.io, self.dataset.s = s, io
        device = case.tokens.device
        self.dataset.io, self.dataset.s = self.dataset.io.to(device), self.dataset.s.to(device)
        self.known: dict[frozenset[Head], Tensor] = {}

    def logits(self, circuit: Circuit, stand_in: StandIn | None = None) -> Tensor:
        """The definition: in every layer, head after head, whatever is not of the circuit gets its mean."""

        def see(name: str, activation: Tensor) -> Tensor:
            if not name.endswith("hook_z"):
                return activation
            z, layer = activation.clone(), int(name.split(".")[1])
            silent = self.means[name] if stand_in is None else stand_in(activation, name)
            for head in range(z.shape[2]):
                if (layer, head) not in circuit:
                    z[:, :, head] = silent[:, :, head]
            return z

        with torch.no_grad():
            return self.model.compute(self.case.tokens, see)

    def each(self, circuit: Circuit) -> Tensor:
        """The logit difference of every prompt."""
        return differences(self.logits(circuit), self.dataset)

    def score(self, circuit: Circuit) -> Tensor:
        """F(C)."""
        return self.each(circuit).mean()

    def cached(self, circuit: Circuit) -> float:
        """The same as a number, worked out once."""
        key = frozenset(circuit)
        if key not in self.known:
            self.known[key] = self.score(key)
        return self.known[key].item()

    def scores(self, circuits: Sequence[Circuit]) -> Tensor:
        """F of each."""
        return torch.stack([self.score(circuit) for circuit in circuits])

    def without(self, circuit: Circuit, *removed: Head) -> list[Head]:
        """Set difference, in order."""
        return [head for head in circuit if head not in removed]

    def others(self, circuit: Circuit) -> list[Head]:
        """Set complement."""
        return self.without(self.heads, *circuit)


def task_of(sizes: tuple[Any, ...]) -> Task:
    """A task with means of its own: a learner may spoil them."""
    return Task(case_of(*sizes))


@contextmanager
def clean_run(name: str, task: Task, words: str) -> Iterator[None]:
    """Model, prompts and means are as before, and no hooks stay behind."""
    means = {f"means[{key!r}]": mean for key, mean in task.means.items()}
    with leaves_no_trace(name, task.case, NO_CACHE), unchanged(name, **means), during(words):
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
Z_AXES = "template pos head d_head"


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
    with leaves_no_trace(name, case, NO_CACHE), unchanged(name, templates=labels), during(words):
        actual = fn(case.model, case.tokens, labels, max_rows)
    seen = {key: z for key, z in case.seen.items() if key.endswith("hook_z")}
    if not isinstance(actual, dict) or set(actual) != set(seen):
        got = ", ".join(map(str, actual)) if isinstance(actual, dict) else repr(actual)[:40]
        raise CheckFailed(
            f"{name} {words}: expected a dictionary with {', '.join(seen)}; got {got or 'nothing'}.\n"
            "  Next: hook_z of every layer, and nothing else, under the hook points' own names."
        )
    for key, z in seen.items():
        mistakes = means_mistakes(case, key, z, labels)
        compare(f"{name} {words}, at {key}", actual[key], of_templates(z, labels), Z_AXES, mistakes)
        no_graph(name, actual[key])
    if case.model.most_rows > max_rows:
        raise CheckFailed(
            f"{name} {words}: one forward had {case.model.most_rows} rows.\n"
            "  Next: go through the rows in pieces (`tokens.split(max_rows)`), and add up."
        )


def of_templates(z: Tensor, labels: Tensor) -> Tensor:
    """The definition: for every template, the rows that are of it, added up one by one."""
    rows = []
    for template in range(int(labels.max()) + 1):
        own = [z[row] for row in range(len(z)) if int(labels[row]) == template]
        rows.append(sum(own[1:], own[0]) / len(own))
    return torch.stack(rows)


def means_mistakes(case: Case, key: str, z: Tensor, labels: Tensor) -> Wrong:
    """What common mistakes give."""
    right, n = of_templates(z, labels), int(labels.max()) + 1
    counts = torch.bincount(labels)[:, None, None, None]

    def at(place: str) -> Tensor:
        return of_templates(case.seen[key.replace("hook_z", place)], labels)

    def last() -> Tensor:
        return torch.stack([z[(labels == template).nonzero()[-1, 0]] for template in range(n)])

    mistakes: Wrong = {
        "the mean is taken over all rows: every template has its own.": lambda: z.mean(0).expand(right.shape),
        "the mean is taken over the positions too: every position has its own.": lambda: right.mean(
            1, keepdim=True
        ).expand(right.shape),
        "the mean is taken over the heads too.": lambda: right.mean(2, keepdim=True).expand(right.shape),
        "they are sums; divide by the number of rows of the template.": lambda: right * counts,
        "the sums are divided by the number of all rows, not by that of the template's.": lambda: (
            right * counts / len(z)
        ),
        "the templates are in reverse order, or each one has another's mean.": lambda: right.flip(0),
        "each template has one of its rows, not the mean of them.": last,
        "the means are handed out to the rows: the first axis is the template's number.": lambda: right[labels],
        "hook_v is averaged, not hook_z.": lambda: at("hook_v"),
        "rows are given to templates in turns (0, 1, 2, 0, ...), whatever `templates` says.": lambda: of_templates(
            z, torch.arange(len(z), device=z.device) % n
        ),
        "the rows of a template are taken to stand together; `templates` says which is which.": lambda: of_templates(
            z, labels.sort().values
        ),
    }
    return mistakes


# --------------------------------------------------------------------------------------- one circuit, many circuits

CIRCUITS: list[list[Head]] = [[(1, 1), (1, 0)], [(0, 0)], [], [(1, 1), (0, 0), (1, 0)]]


def check_mean_ablate_except(fn: Fn) -> None:
    """Circuits as lists, sets and tuples; the empty one; and the one that is the whole model."""
    name = "mean_ablate_except"
    for sizes in SIZES:
        task = task_of(sizes)
        kinds: list[Callable[[list[Head]], Circuit]] = [list, set, tuple, frozenset]
        for circuit, kind in zip([*CIRCUITS, task.heads], [*kinds, list], strict=True):
            words = f"with circuit {'every head' if circuit is task.heads else circuit} {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, kind(circuit), task.means)
            right = task.logits(circuit)
            mistakes = silencing_mistakes(task, circuit) if len(circuit) < len(task.heads) else {}
            compare(f"{name} {words}", actual, right, "batch pos d_vocab", mistakes)
            no_graph(name, actual)


def silencing_mistakes(task: Task, circuit: Circuit) -> Wrong:
    """Other heads silenced, or silenced in another way."""

    def stand_in(answer: StandIn) -> Callable[[], Tensor]:
        return lambda: task.logits(circuit, answer)

    means, layers = task.means, {layer for layer, _ in circuit}
    mistakes: Wrong = {
        "the circuit itself is silenced; it is all the others that are.": lambda: task.logits(task.others(circuit)),
        "nothing is silenced.": lambda: task.logits(task.heads),
        "the heads get zeros instead of their means.": stand_in(lambda z, name: torch.zeros_like(z)),
        "the heads get their mean over the prompts of this run.": stand_in(
            lambda z, name: z.mean(0, keepdim=True).expand_as(z)
        ),
        "every prompt gets the means of the first one.": stand_in(lambda z, name: means[name][:1].expand_as(z)),
        "every prompt gets the mean over all prompts' means: `means[name][row]` is for prompt `row`.": stand_in(
            lambda z, name: means[name].mean(0, keepdim=True).expand_as(z)
        ),
        "the means are averaged over positions: each position has its own.": stand_in(
            lambda z, name: means[name].mean(1, keepdim=True).expand_as(z)
        ),
        "every layer gets the means of the first.": stand_in(lambda z, name: means["blocks.0.attn.hook_z"]),
        "only the last position is silenced.": stand_in(lambda z, name: torch.cat([z[:, :-1], means[name][:, -1:]], 1)),
        "layer and head are swapped: the pairs are (layer, head).": lambda: task.logits([(b, a) for a, b in circuit]),
        "these heads are kept in every layer.": lambda: task.logits(
            [pair for pair in task.heads if pair[1] in {head for _, head in circuit}]
        ),
        "layers without a head of the circuit are left as they are; there all heads are silenced.": lambda: task.logits(
            [*circuit, *(pair for pair in task.heads if pair[0] not in layers)]
        ),
        "the circuit's heads get what they found in the usual run; they are computed anew.": lambda: frozen(
            task, circuit
        ),
    }
    return mistakes


def frozen(task: Task, circuit: Circuit) -> Tensor:
    """The circuit's heads are held at what they were in the usual run."""

    def stand_in(z: Tensor, name: str) -> Tensor:
        held, layer = task.means[name].clone(), int(name.split(".")[1])
        for head in range(z.shape[2]):
            if (layer, head) in circuit:
                held[:, :, head] = task.case.seen[name][:, :, head]
        return held

    return task.logits([], stand_in)


def check_circuit_scores(fn: Fn) -> None:
    """The scores of five circuits, in few and in many forwards; then memory, and the number of forwards."""
    name = "circuit_scores"
    for sizes in SIZES:
        for max_rows in (2, 11, 64):  # the first has not even room for the prompts of one circuit
            task = task_of(sizes)
            circuits = [*CIRCUITS, task.heads]
            words = f"with max_rows={max_rows} {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, circuits, task.means, max_rows)
            per_run = max(1, max_rows // task.case.n_batch)
            mistakes = score_mistakes(task, circuits, per_run)
            compare(f"{name} {words}", actual, task.scores(circuits), "circuit", mistakes)
            no_graph(name, actual)
            frugal(f"{name} {words}", task, len(circuits), max_rows, per_run)


def score_mistakes(task: Task, circuits: Sequence[Circuit], per_run: int) -> Wrong:
    """What common mistakes give."""
    n_batch = task.case.n_batch

    def repeated(place: int) -> Tensor:
        """One circuit of each group for all copies."""
        chunks = [circuits[start : start + per_run] for start in range(0, len(circuits), per_run)]
        return task.scores([chunk[place] for chunk in chunks for _ in chunk])

    mistakes: Wrong = {
        "the circuits themselves are silenced; it is all the others that are.": lambda: task.scores(
            [task.others(circuit) for circuit in circuits]
        ),
        "nothing is silenced.": lambda: task.scores([task.heads] * len(circuits)),
        "the logit differences are summed over the prompts; take their mean.": lambda: task.scores(circuits) * n_batch,
        "it is the first prompt's logit difference; take the mean over all.": lambda: torch.stack(
            [task.each(circuit)[0] for circuit in circuits]
        ),
        "the sign is wrong: it is the receiver minus the giver.": lambda: -task.scores(circuits),
        "they are divided by the whole model's; the scores themselves are asked for.": lambda: (
            task.scores(circuits) / task.score(task.heads)
        ),
        "the circuits are in reverse order.": lambda: task.scores(circuits).flip(0),
    }
    if per_run > 1:
        mistakes["all copies have the first circuit of their forward."] = lambda: repeated(0)
        mistakes["all copies have the last circuit of their forward."] = lambda: repeated(-1)
    return mistakes


# -------------------------------------------------------------------------------------------------- the three criteria


def check_faithfulness(fn: Fn) -> None:
    """A ratio of means, for several circuits at once, and for one."""
    name = "faithfulness"
    for sizes in SIZES:
        for n in (5, 1):
            task = task_of(sizes)
            circuits = [*CIRCUITS, task.heads][:n]
            words = f"of {n} circuits {task.case.words}"
            with clean_run(name, task, words):
                actual = fn(task.model, task.dataset, circuits, task.means)
            scores, whole, empty = task.scores(circuits), task.score(task.heads), task.score([])
            each = torch.stack([(task.each(circuit) / task.each(task.heads)).mean() for circuit in circuits])
            removed = task.scores([task.others(circuit) for circuit in circuits])
            mistakes = {
                "it is F(C), not divided by F(M).": scores,
                "the ratio is upside down: it is F(C) / F(M).": whole / scores,
                "it is the difference F(M) - F(C); the ratio is asked for.": whole - scores,
                "it is the distance from 1, |1 - F(C) / F(M)|; the ratio itself is asked for.": (
                    1 - scores / whole
                ).abs(),
                "F(empty) is subtracted from both: a good measure, too, but another one.": (scores - empty)
                / (whole - empty),
                "it is the mean of every prompt's ratio; take the ratio of the means.": each,
                "it is what the model loses with the circuit: the circuit is silenced, not the rest.": removed / whole,
                "it is F(C) / F(empty): divide by the whole model's.": scores / empty,
            }
            compare(f"{name} {words}", actual, scores / whole, "circuit", mistakes)


KS: list[list[Head]] = [[(0, 0)], [], [(1, 1), (1, 0)], [(1, 0), (0, 0), (1, 1)]]  # the last is all of the circuit


def check_completeness(fn: Fn) -> None:
    """Both sides for K of several sizes, the empty one among them; and a K that is not of the circuit."""
    name = "completeness"
    circuit = CIRCUITS[3]
    for sizes in SIZES:
        task = task_of(sizes)
        words = f"of {circuit} with K in {KS} {task.case.words}"
        with clean_run(name, task, words):
            actual = fn(task.model, task.dataset, circuit, KS, task.means)

        def sides(from_circuit: Sequence[Circuit], from_model: Sequence[Circuit], task: Task = task) -> Tensor:
            return torch.stack([task.scores(from_circuit), task.scores(from_model)])

        less, rest = ([task.without(side, *k) for k in KS] for side in (circuit, task.heads))
        right = sides(less, rest)
        mistakes: Wrong = {
            "the sides are swapped: the circuit comes first.": partial(torch.flip, right, (0,)),
            "K is taken out of the circuit only, and not out of the model.": partial(
                sides, less, [task.heads] * len(KS)
            ),
            "K is taken out of the model only, and not out of the circuit.": partial(sides, [circuit] * len(KS), rest),
            "K is what is kept, not what is taken out.": partial(sides, KS, KS),
            "what is left of the circuit is taken out of the model, instead of K.": partial(
                sides, less, [task.others(left) for left in less]
            ),
            "on the model's side the circuit is gone too: only K is taken out of it.": partial(
                sides, less, [task.others(circuit)] * len(KS)
            ),
            "the K come in reverse order.": partial(torch.flip, right, (1,)),
            "it is the incompleteness, the difference of the two sides; give both.": partial(
                torch.abs, right[0] - right[1]
            ),
            "they are divided by F(M); the scores themselves are asked for.": partial(
                torch.div, right, task.score(task.heads)
            ),
            "a transpose became a reshape.": partial(torch.reshape, right.T, right.shape),
        }
        compare(f"{name} {words}", actual, right, "side removed", mistakes)
    task = task_of(SIZES[0])
    must_raise(
        name,
        ValueError,
        "with a K that is not of the circuit, [(0, 0), (0, 2)],",
        partial(fn, task.model, task.dataset, circuit, [[(0, 0), (0, 2)]], task.means),
    )


# the heads come in an order of their own, not in the circuit's
REMOVED: dict[Head, list[Head]] = {(1, 0): [(1, 1)], (0, 0): [], (1, 1): [(1, 0), (0, 0)]}


def check_minimality(fn: Fn) -> None:
    """A score for each head, with K of several sizes; then what must be refused."""
    name = "minimality"
    circuit = CIRCUITS[3]
    for sizes in SIZES:
        task = task_of(sizes)
        words = f"of {circuit} with removed={REMOVED} {task.case.words}"
        with clean_run(name, task, words):
            actual = fn(task.model, task.dataset, circuit, REMOVED, task.means)
        right, mistakes = minimality_answers(task, circuit)
        compare(f"{name} {words}", actual, right, "head", mistakes)
    task = task_of(SIZES[0])
    for wrong, why in [
        ({(0, 0): [(0, 2)]}, "a K that is not of the circuit"),
        ({(0, 2): [(0, 0)]}, "a v that is not of the circuit"),
        ({(0, 0): [(1, 0), (0, 0)]}, "a v in its own K"),
    ]:
        run = partial(fn, task.model, task.dataset, circuit, wrong, task.means)
        must_raise(name, ValueError, f"with {why}, removed={wrong},", run)


def minimality_answers(task: Task, circuit: Circuit) -> tuple[Tensor, Wrong]:
    """The right scores, and what common mistakes give."""

    def scores(sets: Callable[[Head, list[Head]], list[Head]]) -> Tensor:
        return task.scores([sets(v, k) for v, k in REMOVED.items()])

    whole = task.score(task.heads)
    less = scores(lambda v, k: task.without(circuit, *k))
    least = scores(lambda v, k: task.without(circuit, *k, v))
    right = (least - less).abs() / whole
    own = task.score(circuit)
    in_model = scores(lambda v, k: task.without(task.heads, *k)), scores(lambda v, k: task.without(task.heads, *k, v))
    order = [list(REMOVED).index(head) for head in circuit]
    mistakes: Wrong = {
        "K stays in: it is |F(C without v) - F(C)|.": lambda: (
            (scores(lambda v, k: task.without(circuit, v)) - own).abs() / whole
        ),
        "it is what K adds: |F(C without K) - F(C)|; v is not taken out.": lambda: (less - own).abs() / whole,
        "it is what v and K add together: F(C) stands where F(C without K) should.": lambda: (
            (least - own).abs() / whole
        ),
        "v alone is compared with K alone; take out both, and then K only.": lambda: (
            (scores(lambda v, k: task.without(circuit, v)) - less).abs() / whole
        ),
        "it is measured in the whole model; take the heads out of the circuit.": lambda: (
            (in_model[1] - in_model[0]).abs() / whole
        ),
        "it has a sign; take the absolute value.": lambda: (least - less) / whole,
        "it has a sign, and the other one at that; take the absolute value.": lambda: (less - least) / whole,
        "it is not a share of F(M).": lambda: (least - less).abs(),
        "it is a share of F(C); take F(M).": lambda: (least - less).abs() / own.abs(),
        "it is a share of F(C without K); take F(M).": lambda: ((least - less) / less).abs(),
        "the ratio is upside down.": lambda: whole / (least - less).abs(),
        "the heads come in the circuit's order, not in that of `removed`.": lambda: right[order],
    }
    return right, mistakes


# ------------------------------------------------------------------------------------------------------------- greedy


def search(
    task: Task,
    share: float,
    *,
    badness: Callable[[float, float, float], float] = lambda score, whole, now: abs(score - whole),
    count: Callable[[float], int] = int,
    once: bool = False,
    adding: bool = True,
) -> list[list[Head]]:
    """The search, spelled out: `badness` of (an expected score, the model's, the one before) says who goes next."""
    circuit = list(task.heads)
    rounds = [circuit]
    whole = task.cached(circuit)
    changes: dict[Head, float] = {}
    while circuit:
        now = task.cached(circuit)
        if not once or not changes:
            changes = {head: task.cached(task.without(circuit, head)) - now for head in circuit}
        left = list(circuit)
        for _ in range(max(1, count(share * len(circuit)))):
            values = {head: badness(now + changes[head], whole, now) for head in left}
            gone = min(left, key=values.__getitem__)
            left.remove(gone)
            now += changes[gone] if adding else 0.0
        circuit = left
        rounds.append(circuit)
    return rounds


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


def check_greedy_circuit(fn: Fn) -> None:
    """Every round of the search, heads one at a time and several at once; then memory."""
    name = "greedy_circuit"
    for sizes, share, max_rows in [(SIZES[1], 0.35, 64), (SIZES[0], 0.0, 64), (SIZES[0], 0.5, 9)]:
        task = task_of(sizes)
        call = f"greedy_circuit(..., share={share}, max_rows={max_rows}) {task.case.words}"
        with clean_run(name, task, f"with share={share}"), at_most(name, task.model, 150):
            actual = fn(task.model, task.dataset, task.means, share, max_rows)
        most_rows = task.model.most_rows
        right = search(task, share)
        agree(name, call, as_lists(name, actual), right, greedy_mistakes(task, share, right))
        if most_rows > max(max_rows, task.case.n_batch):
            raise CheckFailed(
                f"{name} with max_rows={max_rows}: one forward had {most_rows} rows.\n  Next: hand `max_rows` on."
            )


def as_lists(name: str, rounds: Any) -> Any:
    """Each round's circuit as a sorted list; a set or a tuple is right, too."""
    try:
        return [sorted((int(layer), int(head)) for layer, head in circuit) for circuit in rounds]
    except (TypeError, ValueError):
        raise CheckFailed(
            f"{name}: expected a list of circuits, each with pairs (layer, head), got {repr(rounds)[:60]}.\n"
            "  Next: one circuit for each round, the first with every head."
        ) from None


def greedy_mistakes(task: Task, share: float, right: list[list[Head]]) -> dict[str, Callable[[], list[list[Head]]]]:
    """What common mistakes give."""
    mistakes: dict[str, Callable[[], list[list[Head]]]] = {
        "the heads that are missed most go first.": lambda: search(task, share, badness=lambda f, m, now: -abs(f - m)),
        "those heads go whose absence leaves the highest score, even above the model's.": lambda: search(
            task, share, badness=lambda f, m, now: -f
        ),
        "those heads go whose absence leaves the lowest score.": lambda: search(
            task, share, badness=lambda f, m, now: f
        ),
        "scores are compared with the one before, not with the whole model's.": lambda: search(
            task, share, badness=lambda f, m, now: abs(f - now)
        ),
        "the changes are measured once, in the whole model; measure them anew in every round.": lambda: search(
            task, share, once=True
        ),
        "within a round the changes do not add up: each head is looked at as if it went alone.": lambda: search(
            task, share, adding=False
        ),
        "the share is rounded up; it is rounded down, but at least one head goes.": lambda: search(
            task, share, count=lambda n: -int(-n // 1)
        ),
        "heads go one at a time, whatever `share` says.": lambda: search(task, 0.0),
        "the first circuit, with every head, is missing.": lambda: right[1:],
        "the last circuit, the empty one, is missing.": lambda: right[:-1],
        "the circuits come in reverse order: every head first.": lambda: right[::-1],
        "each round holds the heads that went, not those that stay.": lambda: [task.others(kept) for kept in right],
    }
    return mistakes
