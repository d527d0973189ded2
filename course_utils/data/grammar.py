"""A probabilistic grammar that can write texts, read them back, and state its own entropy exactly.

A rule is a list of (weight, template) alternatives. In a template

    <rule>        stands for one alternative of that rule,
    {A:name}      draws an entry of the pool `name`, uniformly among those not drawn yet, calls it A and writes it,
    {A}           writes A again, and {A.she} writes a form of A that its pool knows,
    {A@io}        does the same and marks the place in the text with the label `io`.

Everything else is written as it stands.
"""

import bisect
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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

    def __init__(self, rules: Mapping[str, Sequence[tuple[float, str]]], pools: Mapping[str, Pool], start: str) -> None:
        self.start, self.pools = start, pools
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
                piece = self._written(part, *bound[part.var])
                if part.mark:
                    marks.append(Mark(part.mark, length, length + len(piece)))
            pieces.append(piece)
            length += len(piece)
        bindings = tuple((var, pool, word) for var, (pool, word) in bound.items())
        return Derivation("".join(pieces), log_probability, bindings, tuple(marks), tuple(choices))

    def _free(self, pool: str, taken) -> list[str]:
        used = {word for its_pool, word in taken if its_pool == pool}
        return [word for word in self._words[pool] if word not in used] if used else self._words[pool]

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        return {name: list(pool) for name, pool in self.pools.items()}

    def _written(self, slot: Slot, pool: str, word: str) -> str:
        return word if slot.form is None else self.pools[pool][word][slot.form]

    # -- reading ---------------------------------------------------------------------------------------------------

    def parses(self, text: str, start: str | None = None, prefix: bool = False) -> Iterator[Derivation]:
        """Every way in which the grammar could have written `text`; one at most, if the grammar is unambiguous.

        With `prefix`, every way in which a text of the grammar could begin with `text`; marks may then lie beyond it.
        """
        beginning: list[tuple[tuple[Part, ...], Derivation]] = [((Rule(start or self.start),), Derivation())]
        while beginning:
            parts, done = beginning.pop()
            if prefix and len(done.text) >= len(text):
                yield done
                continue
            if not parts:
                if len(done.text) == len(text):
                    yield done
                continue
            part, rest = parts[0], parts[1:]
            if isinstance(part, Rule):
                for number, alternative in enumerate(self.rules[part.name]):
                    beginning.append(
                        (
                            alternative + rest,
                            replace(
                                done,
                                log_probability=done.log_probability + self.log_weights[part.name][number],
                                choices=(*done.choices, (part.name, number)),
                            ),
                        )
                    )
            else:
                beginning.extend((rest, step) for step in self._read(part, text, done, prefix))

    def _read(self, part: str | Slot, text: str, done: Derivation, prefix: bool) -> Iterator[Derivation]:
        """The ways to read one literal or slot at the point that `done` has reached."""
        start = len(done.text)

        def fits(piece: str) -> bool:
            return text.startswith(piece, start) or (prefix and piece.startswith(text[start:]))

        if isinstance(part, str):
            if fits(part):
                yield replace(done, text=done.text + part)
            return
        if part.pool:
            free = self._free(part.pool, [(pool, word) for _, pool, word in done.bindings])
            log_probability = done.log_probability - math.log(len(free))
            options = [(part.pool, word, (*done.bindings, (part.var, part.pool, word))) for word in free]
        else:
            pool, word = next((pool, word) for var, pool, word in done.bindings if var == part.var)
            log_probability, options = done.log_probability, [(pool, word, done.bindings)]
        for pool, word, bindings in options:
            piece = self._written(part, pool, word)
            if fits(piece):
                mark = (Mark(part.mark, start, start + len(piece)),) if part.mark else ()
                yield replace(
                    done,
                    text=done.text + piece,
                    log_probability=log_probability,
                    bindings=bindings,
                    marks=(*done.marks, *mark),
                )

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

        What a draw costs depends only on how many entries of its pool are taken, so that is all the state there is.
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
                if isinstance(part, str) or (isinstance(part, Slot) and not part.pool):
                    continue
                after: dict[frozenset, float] = {}
                for state, share in states.items():
                    if isinstance(part, Rule):
                        entropy, outcomes = of_rule(part.name, state)
                    else:
                        counts = dict(state)
                        n_taken = counts.get(part.pool, 0)
                        entropy = math.log(len(self.pools[part.pool]) - n_taken)
                        outcomes = {frozenset({**counts, part.pool: n_taken + 1}.items()): 1.0}
                    total += share * entropy
                    for outcome, probability in outcomes.items():
                        after[outcome] = after.get(outcome, 0.0) + share * probability
                states = after
            return total, states

        return of_rule(start or self.start, frozenset())[0]
