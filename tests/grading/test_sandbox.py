"""What a notebook can see and reach, what happens without a sandbox, and what the servers do when they are lost."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_utils.exercises import course_exercises
from course_utils.grading import grade, sandbox
from course_utils.grading.grade import close_servers, grade_all, grade_one
from course_utils.grading.results import ExerciseResult, Result, Settings, Submission, load_part
from tests.conftest import ROOT
from tests.grading.submissions import RIGHT, SYMBOLS, doing, packed, replaced, solved, untouched, with_code, written
from tests.support.environments import BIN, site_packages

SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
pytestmark = pytest.mark.slow


def submission(content: bytes, learner: str = "anna", chapter: str = "02") -> Submission:
    return Submission(learner, chapter, Path("02_transformer.ipynb"), content)


def first(result: Result, symbol: str = "attention_scores") -> ExerciseResult:
    return next(one for one in result.exercises if one.exercise == symbol)


@pytest.fixture(scope="module", autouse=True)
def servers():
    """Those of this module end with it."""
    yield
    close_servers()


def seen(box: str, expression: str, name: str = "os") -> str:
    """What an expression gives inside a notebook."""
    result = grade_one(submission(doing(f"import {name}\nraise RuntimeError({expression})")), Settings(sandbox=box))
    message = first(result).message
    assert "RuntimeError: " in message, message
    return message.split("RuntimeError: ")[1].split("\n  at line")[0]


def test_no_secret_of_the_environment_gets_in(box: str, monkeypatch: pytest.MonkeyPatch):
    close_servers()
    monkeypatch.setenv("SECRET_TOKEN", "hush-hush")
    assert "PATH" in seen(box, "sorted(os.environ)")
    assert "hush-hush" not in seen(box, "dict(os.environ)")


def test_a_notebook_is_nobody_in_an_empty_folder(box: str):
    assert seen(box, "os.listdir('.')") == "[]"
    assert int(seen(box, "os.getuid()")) != 0 or os.getuid() != 0
    assert seen(box, "open('/proc/self/status').read().split('CapEff:')[1].split()[0]").strip("0") == ""
    assert int(seen(box, "len([p for p in os.listdir('/proc') if p.isdigit()])")) == 2
    assert "lo" in seen(box, "[name for _, name in socket.if_nameindex()]", "socket")
    assert "eth" not in seen(box, "[name for _, name in socket.if_nameindex()]", "socket")


@pytest.mark.parametrize("answer", ["3", "'three'", "3 nats", "1 / 0"])
def test_guesses_are_not_graded(box: str, answer: str):
    cell = f"""\
        from course_utils.guesses import guess, my_guesses, reveal
        guess("02.loss", {answer})
        reveal("02.loss", "no number")
        my_guesses("02")
        """
    result = grade_one(submission(packed(with_code(cell))), Settings(sandbox=box))
    states = {one.exercise: one.state for one in result.exercises}
    assert states == dict.fromkeys(SYMBOLS, "not written yet") | RIGHT
    assert all("SyntaxError" in problem for problem in result.problems) and bool(result.problems) == ("nats" in answer)


def test_nothing_but_python_and_the_course_is_there(box: str, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    for path in (tmp_path, ROOT / "tests", ROOT / "README.md", Path.home() / ".bashrc", Path("/etc/passwd")):
        assert seen(box, f"os.path.exists({str(path)!r})") == "False"
    assert seen(box, f"os.path.exists({str(ROOT / 'course_utils')!r})") == "True"


def test_one_notebook_leaves_nothing_to_the_next(box: str):
    leaving = "import os, tempfile\nfor place in ('/tmp', '/dev/shm', os.path.expanduser('~')):\n    try:\n"
    leaving += "        open(place + '/note', 'w').write('for ben')\n    except OSError:\n        pass"
    assert first(grade_one(submission(doing(leaving)), Settings(sandbox=box))).state == "correct"
    assert seen(box, "[os.path.join(p, f) for p, _, fs in os.walk('/tmp') for f in fs if f == 'note']") == "[]"


def test_many_files_and_a_full_disk_are_stopped(box: str):
    files = "import os\nfor n in range(10**6):\n    open(str(n), 'w').close()"
    result = first(grade_one(submission(doing(files)), Settings(sandbox=box)))
    assert (result.state, "too many files" in result.message) == ("error", True)
    disk = "for n in range(100):\n    open(str(n), 'wb').write(bytes(5 * 10**7))"
    result = first(grade_one(submission(doing(disk)), Settings(sandbox=box)))
    assert (result.state, "No space left" in result.message) == ("wrong", True)


def test_waiting_ends_too_though_it_is_no_work(box: str):
    result = grade_one(submission(doing("import time; time.sleep(600)")), Settings(sandbox=box, timeout=4.0))
    assert first(result).state == "timed out"
    assert first(result).seconds >= 2


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_right_answers_are_under_no_suspicion(box: str, path: Path):
    chapter = path.stem[:2]
    result = grade_one(Submission("anna", chapter, path), Settings(sandbox=box))
    assert {(one.exercise, one.state) for one in result.exercises} == {
        (one.name, "correct") for one in course_exercises()[chapter]
    }
    assert result.problems == ()


def test_a_submission_travels_with_its_content(box: str, tmp_path: Path):
    path = tmp_path / "02_transformer.ipynb"
    path.write_bytes(packed(replaced(untouched(), written())))
    travelling = pickle.loads(pickle.dumps(Submission("anna", "02", path).with_content()))
    path.unlink()
    assert first(grade_one(travelling, Settings(sandbox=box))).state == "correct"
    lost = grade_one(Submission("anna", "02", path), Settings(sandbox=box))
    assert {one.state for one in lost.exercises} == {"error"}
    assert lost.problems == ("02_transformer.ipynb cannot be read: No such file or directory",)


def test_a_server_that_is_lost_costs_nothing(box: str):
    settings = Settings(sandbox=box)
    grade_one(submission(packed(untouched())), settings)
    process = grade._here.server.process
    os.kill(process.pid, signal.SIGKILL)
    assert first(grade_one(submission(doing("")), settings)).state == "correct"
    assert grade._here.server.process is not process


def test_resume_takes_only_what_was_graded_in_the_same_way(box: str, tmp_path: Path):
    content, heard = packed(untouched()), []
    settings = Settings(sandbox=box, jobs=1, resume=True)
    given = [submission(content), submission(content, "ben")]
    done = grade_all(given, tmp_path, settings, heard.append)
    assert [load_part(tmp_path, one, settings) for one in given] == done == heard

    def never(*_: object) -> Result:
        raise AssertionError("graded again")

    assert grade_all(given, tmp_path, settings, heard.append, never) == done
    assert heard[2:] == done
    assert load_part(tmp_path, submission(content + b" "), settings) is None
    assert load_part(tmp_path, given[0], Settings(sandbox=box, timeout=1.0)) is None
    for path in (tmp_path / "parts").glob("*.json"):
        path.write_text(path.read_text()[:-50])
    assert load_part(tmp_path, given[0], settings) is None


# --- wherever the course is -----------------------------------------------------------------------------------------


@pytest.fixture(params=["/tmp", "/dev/shm"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The course and an environment of its own where the box has something of its own."""
    folder = Path(tempfile.mkdtemp(dir=request.param, prefix="cours d'été "))
    try:
        for name in ("course_utils", "solutions", "chapters"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        venv.create(folder / "env", with_pip=False)
        lent = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        (site_packages(folder / "env") / "lent.pth").write_text("\n".join(sorted(lent)), encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder)


def test_the_course_and_its_environment_may_lie_anywhere(box: str, elsewhere: Path):
    handed_in = elsewhere / "handed in"
    handed_in.mkdir()
    hidden = [handed_in / "anna.ipynb", elsewhere / "solutions" / "note", elsewhere / "note", Path("/tmp/note")]
    looking = f"import os\nfor path in {list(map(str, hidden))}:\n    assert not os.path.exists(path)\n"
    looking += "    if path != '/tmp/note':\n        try:\n            open(path, 'w')\n"
    looking += "        except OSError:\n            pass\n        else:\n            raise RuntimeError(path)"
    hidden[0].write_bytes(doing(looking))
    command = [elsewhere / "env" / BIN / "python", "-m", "course_utils.cli", "grade", handed_in]
    done = subprocess.run(
        [*command, "--out", elsewhere / "report", "--jobs", "1"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(elsewhere)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "Warning" in done.stderr) == (0, False), done.stderr
    report = json.loads((elsewhere / "report" / "results.json").read_text(encoding="utf-8"))
    assert report["sandbox"] == box
    states = {one["exercise"]: one["state"] for one in report["results"][0]["exercises"]}
    assert (states["attention_scores"], states["causal_mask"]) == ("correct", "correct"), report


# --- without a sandbox ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.choose.cache_clear()
    yield
    sandbox.choose.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no bubblewrap to miss")
def test_a_missing_sandbox_has_a_reason(no_bubblewrap: None):
    assert sandbox.choose() == ("none", "bubblewrap is not installed")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no bubblewrap that fails")
def test_a_sandbox_that_does_not_work_has_a_reason(no_bubblewrap: None, tmp_path: Path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert sandbox.choose() == ("none", "bubblewrap does not work here: bwrap: No permissions")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no bubblewrap that works")
@pytest.mark.parametrize("says", ["bwrap: execvp python3: No such file or directory", "ImportError: no course_utils"])
def test_what_is_missing_inside_is_not_blamed_on_bubblewrap(no_bubblewrap: None, tmp_path: Path, says: str):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert sandbox.choose() == ("none", f"in bubblewrap's box this Python does not find what it needs: {says}")


@pytest.mark.parametrize(
    "what, state, words",
    [
        ("while True:\n    pass", "timed out", "not finished after 6 s"),
        ("import os; os._exit(0)", "error", "ended by itself"),
        ("x = bytearray(10**11)", "wrong", "MemoryError"),
        ("import os; os.kill(os.getppid(), 9)", "error", "stopped from inside"),
        ("torch.isclose = torch.allclose", "cheated", "it replaced torch.isclose"),
        ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)", "correct", ""),
    ],
    ids="endless exit memory parent trick child".split(),
)
def test_accidents_are_survived_without_one(what: str, state: str, words: str):
    result = grade_one(submission(doing(what)), Settings(sandbox="none", timeout=6.0))
    assert (first(result).state, words in first(result).message) == (state, True), first(result)
    assert first(result, "causal_mask").state == "correct"


def test_all_solved_without_one():
    result = grade_one(submission(packed(solved())), Settings(sandbox="none"))
    assert {one.exercise for one in result.exercises if one.state == "correct"} == set(SYMBOLS)
