"""What a check costs: processor time on the reference, the median over all and the slowest. No test depends on it."""

import importlib
import statistics
import time
from pathlib import Path

from course_utils.checks import find_checks, run_check

ROUNDS = 5
SLOWEST = 10


def milliseconds(check, answer) -> float:
    """Processor time of one run, the median over some."""
    run_check(check, answer)  # torch warms up, and imports what it needs
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        run_check(check, answer)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def test_checks(benchmark, report) -> None:
    took: dict[str, float] = {}
    folder = Path(__file__).resolve().parent.parent / "solutions"

    def run_all() -> None:
        for chapter, checks in find_checks().items():
            (solution,) = folder.glob(f"ch{chapter}_*.py")
            module = importlib.import_module(f"solutions.{solution.stem}")
            for symbol, check in checks.items():
                took[f"{chapter} {symbol}"] = milliseconds(check, getattr(module, symbol))

    benchmark.pedantic(run_all, rounds=1)
    median = statistics.median(took.values())
    report("a check, the median of all", "the aim", median / 1000, 0.04, median / 40, "<= 1.0")
    for name in sorted(took, key=took.__getitem__, reverse=True)[:SLOWEST]:
        report(f"check of {name}", "the limit", took[name] / 1000, 0.1, took[name] / 100, "<= 1.0")
