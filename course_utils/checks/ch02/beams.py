"""Beam search over plain lists, the search through every text there is, and how two lists of beams are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.standins.known_logits import ToyModel

Found = list[tuple[float, list[int]]]


@dataclass(frozen=True)
class Beam:
    """A text, its score, and whether it has come to its end."""

    total: float
    tokens: tuple[int, ...]
    finished: bool = False


def exhaustive(model: ToyModel, prompt: Tensor, n_new: int, eos: int | None) -> Found:
    """All texts of at most `n_new` new tokens which end there or with eos, the likeliest first."""
    open_texts, done = [Beam(0.0, tuple(prompt[0].tolist()))], []
    for _ in range(n_new):
        longer = [beam for beams in _extensions(model, open_texts, eos) for beam in beams]
        done += [beam for beam in longer if beam.finished]
        open_texts = [beam for beam in longer if not beam.finished]
    return _ranked([*done, *open_texts])


def _ranked(beams: Sequence[Beam]) -> Found:
    return [(beam.total, list(beam.tokens)) for beam in sorted(beams, key=lambda beam: -beam.total)]


@torch.no_grad()
def _extensions(model: ToyModel, beams: Sequence[Beam], eos: int | None, adds: str = "logprobs") -> list[list[Beam]]:
    """For each beam, all that it may become by one more token."""
    logits = model.logits(torch.tensor([beam.tokens for beam in beams]))[:, -1] * model.scale
    steps = {"logprobs": logits.log_softmax(-1), "probabilities": logits.softmax(-1), "logits": logits}[adds].tolist()
    return [
        [Beam(beam.total + step, (*beam.tokens, token), token == eos) for token, step in enumerate(row)]
        for beam, row in zip(beams, steps, strict=True)
    ]


def _runs(tokens: Sequence[int], n: int) -> set[tuple[int, ...]]:
    return {tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)}


def search(
    model: ToyModel,
    prompt: Tensor,
    n_beams: int,
    n_new: int,
    no_repeat_ngram: int | None = None,
    eos: int | None = None,
    **wrong: Any,
) -> Found:
    """The definition, step by step: candidates are the finished beams and all extensions of the others.

    `wrong` names what is done differently, for the mistakes that a check knows.
    """
    start = tuple(prompt[0].tolist())
    n_prompt, width = len(start), wrong.get("width", n_beams)
    beams = [Beam(0.0, start, bool(wrong.get("prompt_counts")) and eos in start)]
    apart: list[Beam] = []
    for _ in range(min(n_new, model.cfg.n_ctx - n_prompt)):
        kept = [beam for beam in beams if beam.finished]
        going = [beam for beam in beams if not beam.finished]
        if not going:
            break
        groups = _extensions(
            model, going, None if wrong.get("extends_finished") else eos, wrong.get("adds", "logprobs")
        )
        if no_repeat_ngram and not wrong.get("no_bans"):
            groups = [
                _allowed(group, beam, going, no_repeat_ngram, n_prompt, wrong)
                for group, beam in zip(groups, going, strict=True)
            ]
        if wrong.get("forgets"):
            groups = [
                [replace(new, total=new.total - beam.total) for new in group]
                for group, beam in zip(groups, going, strict=True)
            ]
        if wrong.get("drops_finished"):
            groups = [[beam for beam in group if not beam.finished] for group in groups]
        if wrong.get("per_beam") and len(going) > 1:
            groups = [sorted(group, key=lambda beam: -beam.total)[:1] for group in groups]
        candidates = [*kept, *(beam for group in groups for beam in group)]
        if wrong.get("apart"):
            apart += [beam for beam in candidates if beam.finished]
            candidates = [beam for beam in candidates if not beam.finished]
        if not candidates:
            break
        beams = sorted(candidates, key=lambda beam: -beam.total)[:width]
    return _ranked([*apart, *beams])


def _allowed(
    group: list[Beam], beam: Beam, beams: Sequence[Beam], n: int, n_prompt: int, wrong: Mapping[str, Any]
) -> list[Beam]:
    """The extensions of a beam that do not end in a run which it holds."""
    if wrong.get("shared_bans"):
        banned = set().union(*(_runs(other.tokens, n) for other in beams))
    else:
        banned = _runs(beam.tokens[n_prompt:] if wrong.get("prompt_free") else beam.tokens, n)
    allowed = [new for new in group if new.tokens[-n:] not in banned]
    if wrong.get("renormalises"):
        mass = torch.tensor([new.total - beam.total for new in allowed]).logsumexp(0).item()
        return [replace(new, total=new.total - mass) for new in allowed]
    return allowed


def judge_beams(case: str, actual: Any, expected: Found) -> None:
    """Raise CheckFailed unless `actual` is that list of log probabilities and tokens; name the first wrong beam."""
    found = _read(case, actual)
    if _same(found, expected):
        return
    place = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if not _same([a], [b])), None)
    if place is None:
        lines = [f"{case}: expected {len(expected)} beams, got {len(found)}."]
    else:
        shown = [f"{tokens} with log probability {total:.4f}" for total, tokens in (expected[place], found[place])]
        lines = [f"{case}: beam {place} (of {len(expected)}, best first) is wrong."]
        lines += [f"  expected {shown[0]}", f"  got      {shown[1]}"]
    if place is not None and found[place][1] == expected[place][1]:
        advice = "  Next: the tokens are right; work out their log probability by hand, token by token."
    elif sorted(map(str, found)) == sorted(map(str, expected)):
        advice = "  Next: these are the right beams; sort them, best first."
    else:
        advice = "  Next: print all candidates of the first two steps, with their sums, and mark those you keep."
    raise CheckFailed("\n".join(lines), evidence=Evidence(case, found), advice=advice)


def _same(first: Found, second: Found) -> bool:
    return len(first) == len(second) and all(
        row == other_row and abs(total - other) < 1e-3
        for (total, row), (other, other_row) in zip(first, second, strict=True)
    )


def _read(case: str, actual: Any) -> Found:
    """The learner's list in plain numbers."""
    promise = "\n  Next: return a list of pairs, each the log probability (a number) and the tokens [pos] of one beam."
    if actual is None:
        raise CheckFailed(f"{case}: returned None.{promise}")
    if not isinstance(actual, list):
        raise CheckFailed(f"{case}: expected a list, got a {type(actual).__name__}.{promise}")
    found: Found = []
    for place, pair in enumerate(actual):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise CheckFailed(f"{case}: item {place} of the list is not a pair.{promise}")
        total, tokens = pair
        if isinstance(total, Tensor) and total.ndim:
            raise CheckFailed(f"{case}: the log probability of item {place} is not a single number.{promise}")
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 1:
            what = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise CheckFailed(f"{case}: the tokens of item {place} should be integers [pos], got {what}.{promise}")
        found.append((float(total), tokens.tolist()))
    return found
