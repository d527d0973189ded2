"""What a check knows about wrong answers: each mistake is a function or class that makes it, beside its sentence."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from course_utils.checks.outcomes import CheckFailed, Evidence

Check = TypeVar("Check", bound=Callable[[Any], None])


def known_mistakes(*tables: Mapping[str, Any]) -> Callable[[Check], Check]:
    """Give a check its table of known mistakes: the rest of "This is what you get if ..." -> an answer that does that.

    The answers have the exercise's own signature. `run_check` hands them to the check when a learner's answer was
    refused, to find out which of them is refused for the same value at the same place; the suite hands in each one,
    and expects its sentence. Where two give the same, the first is named.
    """
    table: dict[str, Any] = {}
    for part in tables:
        twice = table.keys() & part.keys()
        if twice:
            raise ValueError(f"written twice: {', '.join(twice)}")
        table |= part

    def attach(check: Check) -> Check:
        check.mistakes = table  # type: ignore[attr-defined]
        return check

    return attach


def mistakes_of(check: Callable[[Any], None]) -> dict[str, Any]:
    """The table of a check."""
    return getattr(check, "mistakes", {})


def same_evidence(first: Evidence | None, second: Evidence | None) -> bool:
    """Whether two answers were refused at the same comparison, and gave the same there."""
    if first is None or second is None or first.place != second.place:
        return False
    return same(first.answer, second.answer)


def same(first: Any, second: Any) -> bool:
    """Whether two values agree: tensors and numbers to a tolerance, containers item by item."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
            return False
        if not first.is_floating_point():
            return torch.equal(first, second)
        return torch.allclose(first.detach().double(), second.detach().double(), 1e-4, 1e-5, equal_nan=True)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return same(torch.tensor(first), torch.tensor(second))
    try:
        return type(first) is type(second) and bool(first == second)
    except Exception:  # a learner's object may compare in any way, or not at all
        return False


def cause(check: Callable[[Any], None], failure: CheckFailed, run: Callable[[Any], None]) -> str | None:
    """The first known mistake that is refused as `failure` was; `run` runs the check on an answer."""
    if failure.evidence is None:
        return None
    sentences = mistakes_of(check)
    return next((s for s in sentences if same_evidence(failure.evidence, evidence_of(check, s, run))), None)


def evidence_of(check: Callable[[Any], None], sentence: str, run: Callable[[Any], None]) -> Evidence | None:
    """How a check refuses a known mistake. It does so the same way each time, so what it says is remembered."""
    seen: dict[str, Evidence] = check.__dict__.setdefault("seen", {})
    if sentence not in seen:
        try:
            run(mistakes_of(check)[sentence])
        except CheckFailed as refusal:
            if refusal.evidence is not None:
                seen[sentence] = refusal.evidence
        except Exception:  # a mistake that cannot be made here is not the cause; the suite finds one that never can
            return None
    return seen.get(sentence)
