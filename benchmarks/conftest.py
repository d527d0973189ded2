"""Races: what is measured takes turns with what it is compared to, so that a busy machine slows both alike."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    what: str
    against: str
    ours: float  # seconds
    theirs: float
    ratio: float
    aim: str


results: list[Result] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--learners", type=int, default=0, help="grade a generated class of that size too")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def report() -> Callable[..., None]:
    """Add a line, the fields of a `Result`, to the table at the end."""
    return lambda *fields: results.append(Result(*fields))


@pytest.fixture
def race(benchmark, report):
    """`race(what, ours, {name: (rival, aim)}, rounds)`: rivals run before each round of ours.

    The ratio is the median over rounds of ours / theirs, so that drift of the machine cancels.
    """

    def run(what: str, ours: Callable[[], object], rivals: dict[str, tuple[Callable[[], object], str]], rounds: int):
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def rivals_first() -> None:
            for name, (rival, _) in rivals.items():
                times[name].append(seconds(rival))

        benchmark.pedantic(ours, setup=rivals_first, rounds=rounds, warmup_rounds=2)
        mine = benchmark.stats.stats.data
        for name, (_, aim) in rivals.items():
            theirs = times[name][-rounds:]  # without the warm-up
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            report(what, name, statistics.median(mine), statistics.median(theirs), ratio, aim)
            benchmark.extra_info[f"ratio to {name}"] = ratio

    return run


def pytest_terminal_summary(terminalreporter) -> None:
    if not results:
        return
    terminalreporter.section("ratios (median over rounds, taking turns)")
    terminalreporter.line(f"{'what':34}{'ms':>8}  {'against':34}{'ms':>8}{'ratio':>8}  aim")
    for result in results:
        terminalreporter.line(
            f"{result.what:34}{result.ours * 1e3:8.0f}  {result.against:34}{result.theirs * 1e3:8.0f}"
            f"{result.ratio:8.2f}  {result.aim}"
        )
