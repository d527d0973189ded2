"""`course grade` against one pytest for each notebook, on two cores; and, when asked for, a class of three hundred.

make bench ARGS="-k grading"                        # six notebooks of chapter 02 each way
make bench ARGS="-k grading --learners 300"         # the class too, and as many notebooks over all chapters: wall time
                                                    # for a notebook, processor time by chapter, memory over time
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from generated_class import ROOT, every_chapter, write

from course_utils.grading.results import from_json

CORES = 2
FEW = 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def grade(folder: Path, out: Path) -> None:
    command = [sys.executable, "-m", "course_utils.cli", "grade", str(folder), "--out", str(out), "--jobs", str(CORES)]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)


def pytest_on(notebook: Path) -> None:
    """What `pytest --notebook` does; it ends with 1 where an exercise is wrong."""
    options = ["-q", "-k", "02-", "--notebook", str(notebook)]
    command = [sys.executable, "-m", "pytest", "tests/test_checks.py::test_exercise", *options]
    run = subprocess.run(command, capture_output=True, env=ENVIRONMENT, cwd=ROOT)
    assert run.returncode in (0, 1), run.stdout


def test_grading_against_pytest(tmp_path: Path, benchmark, report) -> None:
    write(tmp_path / "class", FEW)
    notebooks = sorted((tmp_path / "class").iterdir())
    start = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(pytest_on, notebooks))
    theirs = time.perf_counter() - start
    benchmark.pedantic(grade, args=(tmp_path / "class", tmp_path / "report"), rounds=1)
    ours = benchmark.stats.stats.data[0]
    report("course grade, one notebook", "pytest --notebook", ours / FEW, theirs / FEW, ours / theirs, "< 1")
    for name, seconds in {"course grade": ours, "pytest": theirs}.items():
        benchmark.extra_info[f"notebooks per minute, {name}"] = 60 * FEW / seconds
        print(f"{name}: {60 * FEW / seconds:.1f} notebooks per minute on {CORES} cores")


@pytest.mark.parametrize("chapters", [["02"], every_chapter()], ids=["chapter 02", "all chapters"])
def test_grading_a_class(
    tmp_path: Path, benchmark, report, request: pytest.FixtureRequest, chapters: list[str]
) -> None:
    n_learners = request.config.getoption("--learners")
    if not n_learners:
        pytest.skip("takes minutes: --learners 300 asks for it")
    write(tmp_path / "class", n_learners, chapters=chapters)
    benchmark.pedantic(grade, args=(tmp_path / "class", tmp_path / "report"), rounds=1)
    each = benchmark.stats.stats.data[0] / n_learners
    parts = sorted((tmp_path / "report/parts").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    results = [from_json(json.loads(path.read_text(encoding="utf-8")))[0] for path in parts]
    peaks = [result.peak_mb or 0.0 for result in results]
    quarter = max(1, len(peaks) // 4)
    first, last = statistics.mean(peaks[:quarter]), statistics.mean(peaks[-quarter:])
    of = "all chapters" if len(chapters) > 1 else "chapter 02"
    report(f"{n_learners} notebooks of {of}, each", "the aim", each, 2.0, each / 2.0, "< 2 s on two cores")
    benchmark.extra_info |= {"peak MB, first quarter": first, "peak MB, last quarter": last}
    print(f"{each:.2f} s for a notebook; peak memory {first:.0f} MB in the first quarter, {last:.0f} MB in the last")
    problems = sorted({problem for result in results for problem in result.problems})
    states = Counter(one.state for result in results for one in result.exercises)
    print(f"{len(results)} notebooks; exercises: {dict(states)}; problems: {problems or 'none'}")
    for chapter in chapters:
        own = [result.seconds for result in results if result.chapter == chapter]
        print(f"  {chapter}: {statistics.mean(own):.1f} s on average, {max(own):.1f} at most, of {len(own)} notebooks")
    size = (tmp_path / "report/report.html").stat().st_size / 1e6
    print(f"the teacher's page: {size:.1f} MB")
    assert len(results) == n_learners and not set(states) & {"cheated", "error"}
