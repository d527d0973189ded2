"""Checks of chapter 11, believing: accuracies by type, calibration, and answers that contradict each other."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch11.small import Fn
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, must_raise, untouched

TYPES = ["who", "mood", "who", "kind", "mood", "mood", "who", "mood", "mood", "who"]
PREDICTED = torch.tensor([4, 8, 5, 2, 9, 9, 7, 8, 8, 4])
ANSWERS = torch.tensor([4, 8, 5, 3, 8, 9, 7, 9, 9, 6])


def hits(p: list[int], a: list[int]) -> int:
    return sum(x == y for x, y in zip(p, a, strict=True))


def counting(
    right: Callable[[list[int], list[int]], float] = hits,
    most: Callable[[list[int], list[int]], float] = lambda p, a: max(Counter(a).values()),
    share: Callable[[float, int, int], float] = lambda count, n, whole: count / n,
    number: Callable[[int, int], int] = lambda n, n_types: n,
) -> Fn:
    """accuracy_by_type by loops."""

    def accuracy_by_type(
        types: Sequence[str], predicted: Tensor, answers: Tensor
    ) -> dict[str, tuple[float, float, int]]:
        table = {}
        for kind in sorted(set(types)):
            rows = [row for row, its in enumerate(types) if its == kind]
            p, a = [int(predicted[row]) for row in rows], [int(answers[row]) for row in rows]
            shares = (share(right(p, a), len(rows), len(types)), share(most(p, a), len(rows), len(types)))
            table[kind] = (*shares, number(len(rows), len(types)))
        return table

    return accuracy_by_type


@known_mistakes(
    {
        "shares are of all questions; each is of the questions of its type.": counting(
            share=lambda count, n, whole: count / whole
        ),
        "the majority is that of the predictions; it is that of the right answers.": counting(
            most=lambda p, a: max(Counter(p).values())
        ),
        "these are numbers of answers, not shares.": counting(share=lambda count, n, whole: float(count)),
        "the wrong answers are counted.": counting(
            right=lambda p, a: sum(x != y for x, y in zip(p, a, strict=True))
        ),
        "each type has the number of all questions; it is how many there are of this type.": counting(
            number=lambda n, whole: whole
        ),
        "chance is taken for 1 divided by the number of answers that occur; it is the share of the most frequent.":
        counting(most=lambda p, a: len(a) / len(set(a))),
    }
)  # fmt: skip
def check_accuracy_by_type(fn: Fn) -> None:
    """Types in no order, one with a single question; one type alone."""
    name = "accuracy_by_type"
    for n in (10, 1):
        with untouched(name, types=TYPES):
            actual = fn(TYPES[:n], PREDICTED[:n], ANSWERS[:n])
        call = f"{name} of {n} question{'s' * (n > 1)}"
        agree(name, call, actual, counting()(TYPES[:n], PREDICTED[:n], ANSWERS[:n]))
        for kind, entry in actual.items():
            agree(name, f"{call}, the types of what belongs to {kind!r}", [type(part).__name__ for part in entry],
                  ["float", "float", "int"])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- calibration


def probabilities() -> tuple[Tensor, Tensor]:
    """Confidences inside bins of 1/4 and on their edges, right and wrong; bins that are used unequally."""
    best = [0.30, 0.50, 0.52, 0.74, 0.75, 1.0, 0.49, 0.95, 0.55, 0.61, 0.26]
    right = [1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1]
    rows, answers = [], []
    for number, (top, correct) in enumerate(zip(best, right, strict=True)):
        place = number % 5
        rest = [(1 - top) * share for share in (0.31, 0.29, 0.23, 0.17)]
        rest.insert(place, top)
        rows.append(rest)
        answers.append(place if correct else (place + 2) % 5)
    return torch.tensor(rows), torch.tensor(answers)


Entry = tuple[float, float]  # confidence, and 1 where it was right


def chosen(probs: Tensor, answers: Tensor) -> list[Entry]:
    """One entry an example: its most likely token."""
    found = []
    for row, answer in zip(probs.tolist(), answers.tolist(), strict=True):
        found.append((max(row), float(row.index(max(row)) == answer)))
    return found


def every_class(probs: Tensor, answers: Tensor) -> list[Entry]:
    return [
        (p, float(token == answer))
        for row, answer in zip(probs.tolist(), answers.tolist(), strict=True)
        for token, p in enumerate(row)
    ]


def of_the_answer(probs: Tensor, answers: Tensor) -> list[Entry]:
    right = [entry[1] for entry in chosen(probs, answers)]
    return [(row[answer], hit) for row, answer, hit in zip(probs.tolist(), answers.tolist(), right, strict=True)]


def bins_of(
    entries: list[Entry], n_bins: int, which: Callable[[float, int], int] = lambda p, n: min(int(p * n), n - 1)
) -> list[list[Entry]]:
    found: list[list[Entry]] = [[] for _ in range(n_bins)]
    for entry in entries:
        if 0 <= which(entry[0], n_bins) < n_bins:
            found[which(entry[0], n_bins)].append(entry)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def mean_confidence(group: list[Entry], b: int, n: int) -> float:
    return mean([p for p, _ in group])


def mean_hits(group: list[Entry]) -> float:
    return mean([hit for _, hit in group])


def binning(
    entries: Callable[[Tensor, Tensor], list[Entry]] = chosen,
    which: Callable[[float, int], int] = lambda p, n: min(int(p * n), n - 1),
    confidence: Callable[[list[Entry], int, int], float] = mean_confidence,
    right: Callable[[list[Entry]], float] = mean_hits,
    bins: Callable[[int], int] = lambda n_bins: n_bins,
) -> Fn:
    """reliability by loops."""

    def reliability(probabilities: Tensor, answers: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
        n_bins = bins(n_bins)
        groups = bins_of(entries(probabilities, answers), n_bins, which)
        means = [[confidence(group, b, n_bins) for b, group in enumerate(groups)], [right(group) for group in groups]]
        counts = torch.tensor([len(group) for group in groups], device=probabilities.device)
        return torch.tensor(means[0]).to(probabilities), torch.tensor(means[1]).to(probabilities), counts

    return reliability


@known_mistakes(
    {
        "every class of every example is an entry; only the answer that was given is.": binning(every_class),
        "the confidence is the probability of the right answer; it is that of the answer given.": binning(
            of_the_answer
        ),
        "a confidence on the edge of two bins goes to the lower one; a bin begins with its lower edge.": binning(
            which=lambda p, n: max(int(-(-(p * n) // 1)) - 1, 0)
        ),
        "a confidence of 1 is in no bin; it is in the last.": binning(which=lambda p, n: int(p * n)),
        "the middle of the bin stands for its confidences; take their mean.": binning(
            confidence=lambda group, b, n: (b + 0.5) / n if group else 0.0
        ),
        "the right answers of a bin are counted; take their share.": binning(
            right=lambda group: sum(hit for _, hit in group)
        ),
        "there are always 10 bins.": binning(bins=lambda n_bins: 10),
    }
)
def check_reliability(fn: Fn) -> None:
    """Four bins, one of them empty; more and fewer; a single example; float64."""
    name = "reliability"
    probs, answers = probabilities()
    words = {"confidence": "bin", "right": "bin", "counts": "bin"}
    for n_bins, n in ((4, 11), (3, 11), (7, 11), (4, 1)):
        found = _three(name, fn(probs[:n], answers[:n], n_bins))
        expected = binning()(probs[:n], answers[:n], n_bins)
        for part, actual, right in zip(words, found, expected, strict=True):
            compare(f"{name}, {part} in {n_bins} bins", actual, right, "bin")
    for place in range(3):
        follows_input(
            name,
            lambda p, place=place: fn(p, answers.to(p.device), 4)[place].to(p.dtype),
            (probs,),
            "bin",
        )
    doubled = fn(probs.double(), answers, 4)
    if doubled[0].dtype != torch.float64 or doubled[1].dtype != torch.float64:
        raise CheckFailed(f"{name} in float64: its means are not.\n  Next: the dtype should follow the input's.")


def _three(name: str, found: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(found, tuple) or len(found) != 3:
        raise CheckFailed(f"{name}: expected (confidence, right, counts).\n  Next: return three tensors.")
    return found


def weighted(gaps: list[float], counts: list[int]) -> float:
    return sum(gap * count for gap, count in zip(gaps, counts, strict=True)) / sum(counts)


def erring(
    entries: Callable[[Tensor, Tensor], list[Entry]] = chosen,
    distance: Callable[[float], float] = abs,
    total: Callable[[list[float], list[int]], float] = weighted,
) -> Fn:
    """expected_calibration_error by loops."""

    def expected_calibration_error(probabilities: Tensor, answers: Tensor, n_bins: int) -> Tensor:
        groups = [group for group in bins_of(entries(probabilities, answers), n_bins) if group]
        gaps = [distance(mean([p for p, _ in group]) - mean([hit for _, hit in group])) for group in groups]
        return torch.tensor(total(gaps, [len(group) for group in groups])).to(probabilities)

    return expected_calibration_error


@known_mistakes(
    {
        "it is computed over all classes; calibration is about the answers that were given.": erring(every_class),
        "the confidence is the probability of the right answer; it is that of the answer given.": erring(of_the_answer),
        "all bins count the same; a bin counts by its examples.": erring(
            total=lambda gaps, counts: sum(gaps) / len(gaps)
        ),
        "distances have a sign, so that too sure and not sure enough cancel.": erring(distance=lambda gap: gap),
        "distances are squared.": erring(distance=lambda gap: gap**2),
        "it is the largest distance; take their mean.": erring(total=lambda gaps, counts: max(gaps)),
        "the distances are summed over the examples; take their mean.": erring(
            total=lambda gaps, counts: sum(gap * count for gap, count in zip(gaps, counts, strict=True))
        ),
    }
)
def check_expected_calibration_error(fn: Fn) -> None:
    """Several numbers of bins, one bin, one example; float64."""
    name = "expected_calibration_error"
    probs, answers = probabilities()
    for n_bins, n in ((4, 11), (1, 11), (7, 11), (3, 1)):
        words = f"{name}, {n} example{'s' * (n > 1)}, {n_bins} bin{'s' * (n_bins > 1)}"
        compare(words, fn(probs[:n], answers[:n], n_bins), erring()(probs[:n], answers[:n], n_bins), "")
    follows_input(name, lambda p: fn(p, answers.to(p.device), 4), (probs,), "")
    follows_every_kind(name, lambda p: fn(p, answers, 5), (probs,), "")


# ------------------------------------------------------------------------------------------------------- contradictions

YES, NO = 5, 9
FIRST = torch.tensor([5, 9, 5, 9, 7, 5, 7, 9, 5, 9, 5])
SECOND = torch.tensor([5, 5, 9, 9, 5, 7, 7, 5, 5, 5, 9])

Pair = tuple[int, int]


def answered(pair: Pair, yes: int, no: int) -> bool:
    return all(answer in (yes, no) for answer in pair)


def contradicting(
    counts: Callable[[Pair, int, int], bool] = answered,
    wrong: Callable[[Pair, int, int], bool] = lambda pair, yes, no: pair[0] == pair[1],
    whole: Callable[[int, int], int] = lambda n_counted, n: n_counted,
    checks: bool = True,
) -> Fn:
    """contradiction_rate, row by row."""

    def contradiction_rate(first: Tensor, second: Tensor, yes: int, no: int) -> Tensor:
        pairs = list(zip(first.tolist(), second.tolist(), strict=True))
        kept = [pair for pair in pairs if counts(pair, yes, no)]
        if not kept and checks:
            raise ValueError("nothing counts")
        share = sum(wrong(pair, yes, no) for pair in kept) / max(whole(len(kept), len(pairs)), 1)
        return torch.tensor(share, device=first.device)

    return contradiction_rate


@known_mistakes(
    {
        'every row counts; one in which the oracle says "unknown" contradicts nothing.': contradicting(
            counts=lambda pair, yes, no: True
        ),
        "the share is of all rows; it is of those in which both questions are answered.": contradicting(
            whole=lambda n_counted, n: n
        ),
        "the rows whose answers differ are counted: these are the ones that agree with each other.": contradicting(
            wrong=lambda pair, yes, no: pair[0] != pair[1]
        ),
        'only two times "yes" is counted; two times "no" is a contradiction as well.': contradicting(
            wrong=lambda pair, yes, no: pair == (yes, yes)
        ),
        'only two times "no" is counted; two times "yes" is a contradiction as well.': contradicting(
            wrong=lambda pair, yes, no: pair == (no, no)
        ),
        "a row counts as soon as one of its questions is answered.": contradicting(
            counts=lambda pair, yes, no: any(answer in (yes, no) for answer in pair)
        ),
        "it is a number of rows, not a share.": contradicting(whole=lambda n_counted, n: 1),
    }
)
def check_contradiction_rate(fn: Fn) -> None:
    """Some answers unknown; other tokens for yes and no; nothing that counts."""
    name = "contradiction_rate"
    right = contradicting()
    for n, yes, no in ((11, YES, NO), (11, 9, 7), (4, 5, 9), (1, 5, 9), (11, 7, 5)):
        words = f"{name} of {n} row{'s' * (n > 1)}, yes={yes}, no={no}"
        expected = right(FIRST[:n], SECOND[:n], yes, no)
        compare(words, fn(FIRST[:n].clone(), SECOND[:n].clone(), yes, no), expected, "")
    nobody = partial(fn, FIRST.clone(), SECOND.clone(), 1, 2)
    must_raise(name, ValueError, f"{name} with yes=1, no=2, which nobody says", nobody)
    never_both = partial(fn, torch.tensor([5, 7, 9]), torch.tensor([7, 5, 7]), YES, NO)
    must_raise(name, ValueError, f"{name} where no row has both answers", never_both)
