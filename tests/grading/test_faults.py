"""Forty-odd submissions, right, wrong and hostile: each gets the states it should, in every run, and hurts nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submissions
from submissions import SYMBOLS, Case

from course_utils.grading.collect import collected
from course_utils.grading.grade import grade_all
from course_utils.grading.results import Result, Settings, from_json

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NAMES = [case.learner for case in submissions.cases(Path("/nowhere"), 0)]
TIMEOUT = 12.0


def running() -> set[int]:
    """The grading servers on this machine, outside and inside their sandboxes, and what they have started."""
    found = set()
    for entry in os.listdir("/proc"):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if entry.isdigit() and b"course_utils.grading.server" in words:
            found.add(int(entry))
    return found


def wait_until_gone(before: set[int]) -> set[int]:
    """The servers that are there still after a while, and were not `before`."""
    for _ in range(100):
        left = running() - before
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
    before = running()
    settings = Settings(timeout=TIMEOUT, sandbox=box, jobs=2)
    with collected(folder) as found:
        results = grade_all(found.submissions, tmp_path_factory.mktemp("first"), settings, lambda _: None)
    assert not wait_until_gone(before)
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
    out, before = tmp_path / "report", running()
    command = [sys.executable, "-m", "course_utils.cli", "grade", str(folder), "--out", str(out), "--jobs", "2"]
    command += ["--timeout", str(TIMEOUT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while len(list((out / "parts").glob("*.json"))) < 15 and time.monotonic() < deadline:
            assert first.poll() is None
            time.sleep(0.1)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not wait_until_gone(before)
    kept = {path: path.stat().st_mtime_ns for path in (out / "parts").glob("*.json")}
    assert 15 <= len(kept) < len(NAMES)
    assert not (out / "results.json").exists()

    second = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not wait_until_gone(before)
    again = {result.learner: result for result in from_json(json.loads((out / "results.json").read_text()))}
    assert again.keys() == graded.keys()
    for name, result in again.items():
        states = [(one.exercise, one.state, one.mistake) for one in result.exercises]
        assert states == [(one.exercise, one.state, one.mistake) for one in graded[name].exercises], name
        assert result.key == graded[name].key
