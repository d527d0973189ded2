"""A probabilistic grammar that can write texts, read them back, and state its own entropy exactly.

A rule is a list of (weight, template) alternatives. In a template

    <rule>        stands for one alternative of that rule,
    {A:name}      draws an entry of the pool `name`, uniformly, calls it A and writes it,
    {A}           writes A again, and {A.she} writes a form of A that its pool knows,
    {A@io}        does the same and marks the place in the text with the label `io`.

Everything else is written as it stands. A pool that is `distinct` gives no entry twice in one text.
"""

import bisect
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Pool = Mapping[str, Mapping[str, str]]  # an entry's word -> its forms
PART = re.compile(r"<(?P<rule>\w+)>|\{(?P<var>\w+)(:(?P<pool>\w+))?(\.(?P<form>\w+))?(@(?P<mark>\w+))?\}")


@dataclass(frozen=True)
class Mark:
    """A labelled place in a text: `text[start:end]`."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class Derivation:
    """A text together with the ground truth of how the grammar wrote it."""

    text: str = ""
    log_probability: float = 0.0  # nats
    bindings: tuple[tuple[str, str, str], ...] = ()  # (variable, pool, word), in order of drawing
    marks: tuple[Mark, ...] = ()
    choices: tuple[tuple[str, int], ...] = ()  # (rule, number of the alternative taken), in order

    def word(self, variable: str) -> str:
        """The word that a variable stands for. Raises KeyError for a variable that this text does not have."""
        for name, _, word in self.bindings:
            if name == variable:
                return word
        raise KeyError(f"this text has no variable {variable!r}; it has {[name for name, _, _ in self.bindings]}")

    def choice(self, rule: str) -> int | None:
        """Which alternative of a rule was taken first; None where the rule was not used."""
        return next((number for name, number in self.choices if name == rule), None)

    def marked(self, label: str) -> Mark | None:
        """The first place with this label."""
        return next((mark for mark in self.marks if mark.label == label), None)

    def read(self, label: str) -> str:
        """What stands at the first place with this label. Raises KeyError where there is none."""
        place = self.marked(label)
        if place is None:
            raise KeyError(f"this text has no place marked {label!r}; it has {sorted({m.label for m in self.marks})}")
        return self.text[place.start : place.end]


@dataclass(frozen=True)
class Slot:
    """A variable in a template: drawn here if it has a pool, otherwise written again."""

    var: str
    pool: str | None
    form: str | None
    mark: str | None


@dataclass(frozen=True)
class Rule:
    name: str


Part = str | Slot | Rule


class Grammar:
    """Rules and pools, checked when they are put together.

    Raises ValueError, naming the rule, for an unknown rule, pool or form.
    """

    def __init__(
        self,
        rules: Mapping[str, Sequence[tuple[float | int, str]]],
        pools: Mapping[str, Pool],
        start: str,
        distinct: Iterable[str] = (),
    ) -> None:
        self.start, self.pools, self.distinct = start, pools, frozenset(distinct)
        self.rules: dict[str, list[tuple[Part, ...]]] = {}
        self.cumulative: dict[str, list[float]] = {}
        self.log_weights: dict[str, list[float]] = {}
        for name, alternatives in rules.items():
            total = sum(weight for weight, _ in alternatives)
            self.rules[name] = [self._parts(name, template, rules) for _, template in alternatives]
            self.cumulative[name] = list(itertools.accumulate(weight for weight, _ in alternatives))
            self.log_weights[name] = [math.log(weight / total) for weight, _ in alternatives]

    def _parts(self, rule: str, template: str, rules: Mapping) -> tuple[Part, ...]:
        parts: list[Part] = []
        end = 0
        for match in PART.finditer(template):
            parts += [template[end : match.start()]] if match.start() > end else []
            end = match.end()
            if match["rule"]:
                if match["rule"] not in rules:
                    raise ValueError(f"grammar: rule {rule!r} uses <{match['rule']}>, which is not a rule.")
                parts.append(Rule(match["rule"]))
            else:
                if match["pool"] and match["pool"] not in self.pools:
                    raise ValueError(f"grammar: rule {rule!r} draws from {match['pool']!r}, which is not a pool.")
                parts.append(Slot(match["var"], match["pool"], match["form"], match["mark"]))
        return (*parts, template[end:]) if end < len(template) else tuple(parts)

    # -- writing ---------------------------------------------------------------------------------------------------

    def sample(self, rng: random.Random, start: str | None = None) -> Derivation:
        """Write one text, with `start` (any rule) or the grammar's own first rule as its beginning."""
        pieces: list[str] = []
        bound: dict[str, tuple[str, str]] = {}
        marks: list[Mark] = []
        choices: list[tuple[str, int]] = []
        log_probability, length = 0.0, 0
        stack: list[Part] = [Rule(start or self.start)]
        while stack:
            part = stack.pop()
            if isinstance(part, Rule):
                cumulative = self.cumulative[part.name]
                number = bisect.bisect_right(cumulative, rng.random() * cumulative[-1])
                choices.append((part.name, number))
                log_probability += self.log_weights[part.name][number]
                stack.extend(reversed(self.rules[part.name][number]))
                continue
            piece = part if isinstance(part, str) else ""
            if isinstance(part, Slot):
                if part.pool:
                    free = self._free(part.pool, bound.values())
                    bound[part.var] = (part.pool, rng.choice(free))
                    log_probability -= math.log(len(free))
                pool, piece = bound[part.var]
                if part.form:
                    piece = self.pools[pool][piece][part.form]
                if part.mark:
                    marks.append(Mark(part.mark, length, length + len(piece)))
            pieces.append(piece)
            length += len(piece)
        bindings = tuple((var, pool, word) for var, (pool, word) in bound.items())
        return Derivation("".join(pieces), log_probability, bindings, tuple(marks), tuple(choices))

    def _free(self, pool: str, taken: Iterable[tuple[str, str]]) -> list[str]:
        used = {word for its_pool, word in taken if its_pool == pool} if pool in self.distinct else ()
        return [word for word in self._words[pool] if word not in used] if used else self._words[pool]

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        return {name: list(pool) for name, pool in self.pools.items()}

    # -- reading ---------------------------------------------------------------------------------------------------

    def parses(self, text: str, start: str | None = None) -> Iterator[Derivation]:
        """Every way in which the grammar could have written `text`; one at most, if the grammar is unambiguous.

        Depth first, with a stack of unfinished readings: what is still to come, the place reached, the truth so far.
        """
        Bindings = tuple[tuple[str, str, str], ...]
        unfinished: list[tuple[tuple[Part, ...], int, float, Bindings, tuple[Mark, ...], tuple[tuple[str, int], ...]]]
        unfinished = [((Rule(start or self.start),), 0, 0.0, (), (), ())]
        while unfinished:
            parts, place, log_p, bindings, marks, choices = unfinished.pop()
            if not parts:
                if place == len(text):
                    yield Derivation(text, log_p, bindings, marks, choices)
                continue
            part, rest = parts[0], parts[1:]
            if isinstance(part, str):
                if text.startswith(part, place):
                    unfinished.append((rest, place + len(part), log_p, bindings, marks, choices))
            elif isinstance(part, Rule):
                for number, alternative in enumerate(self.rules[part.name]):
                    if alternative and isinstance(alternative[0], str) and not text.startswith(alternative[0], place):
                        continue
                    weight, taken = self.log_weights[part.name][number], (*choices, (part.name, number))
                    unfinished.append((alternative + rest, place, log_p + weight, bindings, marks, taken))
            else:
                if part.pool:
                    free = self._free(part.pool, [(pool, word) for _, pool, word in bindings])
                    log_p -= math.log(len(free))
                    options = [(part.pool, word, (*bindings, (part.var, part.pool, word))) for word in free]
                else:
                    options = [(pool, word, bindings) for var, pool, word in bindings if var == part.var]
                for pool, word, bound in options:
                    piece = word if part.form is None else self.pools[pool][word][part.form]
                    if text.startswith(piece, place):
                        end = place + len(piece)
                        mark = (Mark(part.mark, place, end),) if part.mark else ()
                        unfinished.append((rest, end, log_p, bound, (*marks, *mark), choices))

    def parse(self, text: str, start: str | None = None) -> Derivation | None:
        """The ground truth of a text, or None where the grammar could not have written it."""
        return next(self.parses(text, start), None)

    def log_probability(self, text: str, start: str | None = None) -> float:
        """log p(text) in nats, over all derivations; -inf for a text that is not in the language."""
        found = [derivation.log_probability for derivation in self.parses(text, start)]
        return math.log(sum(math.exp(value - max(found)) for value in found)) + max(found) if found else -math.inf

    # -- measuring -------------------------------------------------------------------------------------------------

    def entropy(self, start: str | None = None) -> float:
        """The entropy of a derivation in nats, by exact recursion: that of the texts, as no text has two derivations.

        What a draw costs depends only on how many entries of a distinct pool are taken: that is all the state there is.
        """
        memo: dict[tuple[str, frozenset], tuple[float, dict[frozenset, float]]] = {}

        def of_rule(name: str, taken: frozenset) -> tuple[float, dict[frozenset, float]]:
            if (name, taken) not in memo:
                total, after = 0.0, dict[frozenset, float]()
                for log_weight, parts in zip(self.log_weights[name], self.rules[name], strict=True):
                    weight = math.exp(log_weight)
                    entropy, outcomes = of_parts(parts, taken)
                    total += weight * (entropy - log_weight)
                    for outcome, share in outcomes.items():
                        after[outcome] = after.get(outcome, 0.0) + weight * share
                memo[name, taken] = total, after
            return memo[name, taken]

        def of_parts(parts: tuple[Part, ...], taken: frozenset) -> tuple[float, dict[frozenset, float]]:
            total, states = 0.0, {taken: 1.0}
            for part in parts:
                after: dict[frozenset, float] = {}
                for state, share in states.items():
                    if isinstance(part, Rule):
                        entropy, outcomes = of_rule(part.name, state)
                    elif isinstance(part, Slot) and part.pool:
                        counts = dict(state)
                        n_taken = counts.get(part.pool, 0)
                        entropy = math.log(len(self.pools[part.pool]) - n_taken)
                        if part.pool in self.distinct:
                            counts[part.pool] = n_taken + 1
                        outcomes = {frozenset(counts.items()): 1.0}
                    else:  # nothing to choose
                        entropy, outcomes = 0.0, {state: 1.0}
                    total += share * entropy
                    for outcome, probability in outcomes.items():
                        after[outcome] = after.get(outcome, 0.0) + share * probability
                states = after
            return total, states

        return of_rule(start or self.start, frozenset())[0]
