"""What docs/teaching.md tells a teacher to do works, and its timetable adds up."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from course_utils.exercises import course_exercises
from tests.conftest import ROOT

GUIDE = (ROOT / "docs/teaching.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^ *```sh\n(.*?)^ *```$", GUIDE, re.MULTILINE | re.DOTALL)
[WEIGHTS] = re.findall(r"^ *```toml\n(.*?)^ *```$", GUIDE, re.MULTILINE | re.DOTALL)
UNTOUCHED = next((ROOT / "chapters").glob("01_*.ipynb"))
SOLVED = next((ROOT / "solutions").glob("01_*.ipynb"))


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `course` and `python` are these, and a browser writes down what it was to open."""
    tools = tmp_path / "tools"
    tools.mkdir()
    interpreter = shlex.quote(sys.executable)
    for name, line in {
        "python": f'exec {interpreter} "$@"',
        "course": f'exec {interpreter} -m course_utils.cli "$@"',
        "browser": f'echo "$1" > {shlex.quote(str(tmp_path / "opened"))}',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "BROWSER": f"{tools}/browser %s"}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


def run(command: list[str], folder: Path, environment: dict[str, str], code: int = 0) -> str:
    """What a command prints; it must end with that code."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def table(text: str) -> dict[str, dict[str, str]]:
    return {row["learner"]: row for row in csv.DictReader(text.removeprefix("\ufeff").splitlines())}


@pytest.mark.slow
def test_the_six_commands(tmp_path: Path, shell: dict[str, str]) -> None:
    commands = SCRIPTS[0].strip().splitlines()
    assert len(commands) == 6
    desk = tmp_path / "desk"
    for learner, notebook in {"collecting/ada": SOLVED, "collecting/Zoë": UNTOUCHED, "late/bob": UNTOUCHED}.items():
        (desk / learner).mkdir(parents=True)
        (desk / learner / notebook.name).write_bytes(notebook.read_bytes())
    run([sys.executable, "-m", "zipfile", "-c", "../handed-in.zip", "ada", "Zoë"], desk / "collecting", shell)
    first = next(iter(course_exercises()["01"])).name
    (desk / "weights.toml").write_text(f"{WEIGHTS}\n{first} = 40\n")

    for number, command in enumerate(commands, start=1):
        run(["sh", "-euc", command], desk, shell)
        if number == 2:
            early = table((desk / "report/gradebook.csv").read_text(encoding="utf-8"))
            assert set(early) == {"ada", "Zoë"}
    assert (tmp_path / "opened").read_text().strip().endswith("report/report.html")
    late = table((desk / "report/gradebook.csv").read_text(encoding="utf-8"))
    assert set(late) == {"ada", "Zoë", "bob"}
    assert late["ada"]["points"] == late["ada"]["of"] != early["ada"]["of"]
    assert late["bob"]["not written yet"] == str(len(course_exercises()["01"])) and late["bob"]["points"] == "0"
    packed = run([sys.executable, "-m", "zipfile", "-l", "feedback.zip"], desk, shell)
    assert packed.count(".md") == 3 and "feedback/ada.md" in packed


@pytest.mark.slow
def test_one_notebook_under_pytest(shell: dict[str, str]) -> None:
    [line] = SCRIPTS[1].strip().splitlines()
    words = [str(SOLVED) if word.endswith(".ipynb") else word.replace("02-", "01-") for word in shlex.split(line)]
    assert f"{len(course_exercises()['01'])} passed" in run(words, ROOT, shell)


# --- timetables -----------------------------------------------------------------------------------------------------

ROW = (
    r"^\|(?: day \d,)? (\d\d):(\d\d)–(\d\d):(\d\d) \| (\d\d) \| `(\w+)` \| `(\w+)` \| (\d+)(?: \((\d+) optional\))? \|$"
)
ROWS = re.findall(ROW, GUIDE, re.MULTILINE)


def test_the_timetables_add_up() -> None:
    assert len(ROWS) == 5 + 13 + 4 + 5
    previous: Any = None
    for *clock, chapter, first, last, minutes, optional in ROWS:
        begin, end = (timedelta(hours=int(h), minutes=int(m)) for h, m in (clock[:2], clock[2:]))
        exercises = course_exercises()[chapter]
        names = [e.name for e in exercises]
        stated = sum(e.minutes for e in exercises[names.index(first) : names.index(last) + 1])
        assert int(minutes) == stated, (first, last)
        left_out = sum(e.minutes for e in exercises[names.index(first) : names.index(last) + 1] if e.optional)
        assert int(optional or 0) == left_out, (first, last)
        assert end - begin >= timedelta(minutes=stated * 4 / 3 - 3), (first, last)
        if first != names[0]:  # goes on where the last row ended, or after what is optional there
            skipped = exercises[names.index(previous) + 1 : names.index(first)]
            assert names.index(previous) < names.index(first) and all(e.optional for e in skipped), first
        previous = last


# --- Gradescope and GitHub Classroom, as far as they can be tried here ------------------------------------------------


@pytest.mark.slow
def test_gradescopes_scripts(tmp_path: Path, shell: dict[str, str]) -> None:
    folder = ROOT / "docs/grading/gradescope"
    run(["bash", "-n", "setup.sh"], folder, shell)
    assert all(os.access(folder / name, os.X_OK) for name in ("setup.sh", "run_autograder"))
    for part in ("submission", "source"):
        (tmp_path / part).mkdir()
    (tmp_path / "submission" / SOLVED.name).write_bytes(SOLVED.read_bytes())
    first = course_exercises()["01"][0].name
    (tmp_path / "source/weights.toml").write_text(f"{first} = 40")
    environment = {**shell, "AUTOGRADER": str(tmp_path)}
    run([sys.executable, str(folder / "run_autograder")], tmp_path, environment)
    tests = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))["tests"]
    assert [test["name"] for test in tests] == [e.name for e in course_exercises()["01"]]
    assert tests[0]["score"] == tests[0]["max_score"] == 40
    (tmp_path / "submission" / SOLVED.name).unlink()
    run([sys.executable, str(folder / "run_autograder")], tmp_path, environment)
    empty = json.loads((tmp_path / "results/results.json").read_text(encoding="utf-8"))
    assert empty["score"] == 0 and "submission" in empty["output"]


@pytest.mark.slow
def test_the_workflow_for_github_classroom(tmp_path: Path, shell: dict[str, str]) -> None:
    workflow = yaml.safe_load((ROOT / "docs/grading/classroom.yml").read_text(encoding="utf-8"))
    [job] = workflow["jobs"].values()
    steps = {step["name"]: step for step in job["steps"] if "name" in step}
    assert {step["uses"].split("@")[0] for step in job["steps"] if "uses" in step} == {
        f"actions/{name}" for name in ("checkout", "setup-python", "upload-artifact")
    }
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / UNTOUCHED.name).write_bytes(UNTOUCHED.read_bytes())
    summary = tmp_path / "summary.md"
    environment = {**shell, "RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(summary)}
    run(["bash", "-eo", "pipefail", "-c", steps["Grade"]["run"]], tmp_path, environment)
    assert "Not written yet: " in summary.read_text(encoding="utf-8")
    verdict = steps["Fail where an exercise was tried and is not right"]
    assert verdict["shell"] == "python"
    run([sys.executable, "-c", verdict["run"]], tmp_path, environment)
    path = tmp_path / "report/results.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"not written yet"', '"wrong"', 1), encoding="utf-8")
    run([sys.executable, "-c", verdict["run"]], tmp_path, environment, code=1)


def test_every_file_that_the_guide_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", GUIDE) if not link.startswith("http")]
    assert links and all((ROOT / "docs" / link).exists() for link in links), links
