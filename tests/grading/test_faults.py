"""Forty-odd submissions, right, wrong and hostile: each gets the states it should, in every run, and hurts nobody."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course_utils.grading.collect import collected
from course_utils.grading.grade import grade_all
from course_utils.grading.results import Result, Settings, from_json
from tests.grading import submissions
from tests.grading.submissions import SYMBOLS, Case

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NAMES = [case.learner for case in submissions.cases(Path("/nowhere"), 0)]
TIMEOUT = 12.0


def family(process: int) -> set[tuple[int, str]]:
    """What a process has started, directly or not, and what is there still: numbers, and when each began."""
    parents, begun = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                parents[int(entry)], begun[int(entry)] = int(fields[1]), fields[19]
    own = {process}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return {(pid, begun[pid]) for pid in own - {process} if pid in begun}


def left_of(processes: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Those that are there still after a while."""
    for _ in range(6000):  # killed they are; a busy machine may take its time
        left = processes & family(0)
        if not left:
            break
        time.sleep(0.1)
    return left


@pytest.fixture(scope="module")
def cases(outside: Path, port: int) -> dict[str, Case]:
    return {case.learner: case for case in submissions.cases(outside, port)}


@pytest.fixture(scope="module")
def folder(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submissions")
    submissions.write(folder, list(cases.values()))
    return folder


@pytest.fixture(scope="module")
def graded(box: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    settings, started = Settings(timeout=TIMEOUT, sandbox=box, jobs=2), set()
    with collected(folder) as found:
        out = tmp_path_factory.mktemp("first")
        results = grade_all(found.submissions, out, settings, lambda _: started.update(family(os.getpid())))
    assert len(started) >= 4
    assert not left_of(started)
    return {result.learner: result for result in results}


def test_there_are_at_least_forty():
    assert len(NAMES) == len(set(NAMES)) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_every_case_gets_the_states_it_should(name: str, cases: dict[str, Case], graded: dict[str, Result]):
    case, result = cases[name], graded[name]
    assert [one.exercise for one in result.exercises] == SYMBOLS
    assert {one.exercise: one.state for one in result.exercises} == {symbol: case.state(symbol) for symbol in SYMBOLS}
    about = next(one for one in result.exercises if one.exercise == case.about)
    assert case.words in about.message or any(case.words in problem for problem in result.problems), result
    assert (case.mistake or "") in (about.mistake or "")
    assert (about.mistake is None) == (case.mistake is None)
    assert "Traceback" not in about.message and "/tmp" not in about.message
    if not case.lasts:
        assert "timed out" not in {one.state for one in result.exercises}


def test_nothing_outside_was_touched(graded: dict[str, Result], folder: Path, outside: Path, cases: dict[str, Case]):
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "nobody's business"
    for case in cases.values():
        assert (folder / case.learner / "02_transformer.ipynb").read_bytes() == case.content


def test_memory_stays_within_bounds(graded: dict[str, Result]):
    assert all(result.peak_mb < 2048 + 700 for result in graded.values() if result.peak_mb is not None)


def test_the_same_again_after_a_kill_and_resume(graded: dict[str, Result], folder: Path, tmp_path: Path):
    out = tmp_path / "report"
    command = [sys.executable, "-m", "course_utils.cli", "grade", str(folder), "--out", str(out), "--jobs", "2"]
    command += ["--timeout", str(TIMEOUT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        started = set()
        while len(list((out / "parts").glob("*.json"))) < 15:
            assert first.poll() is None
            started |= family(first.pid)
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert len(started) >= 4
    assert not left_of(started)
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.json")}
    assert 15 <= len(kept) < len(NAMES)
    assert not (out / "results.json").exists()

    second = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = {result.learner: result for result in from_json(json.loads((out / "results.json").read_text()))}
    assert again.keys() == graded.keys()
    for name, result in again.items():
        states = [(one.exercise, one.state, one.mistake) for one in result.exercises]
        assert states == [(one.exercise, one.state, one.mistake) for one in graded[name].exercises], name
        assert result.key == graded[name].key
