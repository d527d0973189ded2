"""Grading on a cluster: a scheduler and two workers on this machine, one of which is killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from course_utils.exercises import course_exercises
from course_utils.grading import cluster as cluster_module
from course_utils.grading import sandbox
from course_utils.grading.cluster import Cluster, connect
from course_utils.grading.grade import grade_all
from course_utils.grading.results import Result, Settings, Submission
from course_utils.places import CourseError
from tests.conftest import ROOT

CHAPTER = "02"
PATIENCE = 600  # seconds for what takes two on an idle machine
pytest.importorskip("distributed", reason="distributed is not installed (extra `cluster`)")


class Local(NamedTuple):
    """A cluster of processes on this machine."""

    address: str
    workers: dict[str, subprocess.Popen[bytes]]  # by address


def address_in(file: Path) -> str:
    """What the scheduler has written down; "" as long as that is nothing, or not the whole."""
    try:
        return json.loads(file.read_text())["address"]
    except (OSError, ValueError):
        return ""


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    """A scheduler and two workers with one thread each, as a teacher would start them."""
    where, started = tmp_path / "scheduler.json", []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT"] = f"{PATIENCE}s"

    def start(name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{name}", "--scheduler-file", str(where), *options]
        with (tmp_path / f"{name}-{len(started)}.log").open("w") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        return started[-1]

    try:
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--no-show")
        while not (address := address_in(where)):
            assert started[0].poll() is None, (tmp_path / "scheduler-0.log").read_text()
            time.sleep(0.1)
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
        pids = {process.pid: process for process in (start("worker", *options), start("worker", *options))}
        from distributed import Client

        with Client(address, timeout=PATIENCE, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE)
            workers = {name: pids[pid] for name, pid in client.run(os.getpid).items()}
        yield Local(address, workers)
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def submissions(tmp_path_factory: pytest.TempPathFactory) -> list[Submission]:
    """Eight notebooks of three kinds: nothing written, everything right, one exercise wrong."""
    folder = tmp_path_factory.mktemp("handed-in")
    untouched = next((ROOT / "chapters").glob(f"{CHAPTER}_*.ipynb")).read_text(encoding="utf-8")
    right = next((ROOT / "solutions").glob(f"{CHAPTER}_*.ipynb")).read_text(encoding="utf-8")
    wrong = right.replace("diagonal=n_key - n_query + 1", "diagonal=n_key - n_query")
    assert wrong != right
    found = []
    for number, text in enumerate([untouched, right, wrong, untouched, right, wrong, untouched, untouched]):
        path = folder / f"learner-{number}.ipynb"
        path.write_text(text, encoding="utf-8")
        found.append(Submission(path.stem, CHAPTER, path))
    return found


def verdicts(results: list[Result]) -> list[tuple[Any, ...]]:
    """Everything but the times, which differ."""
    told = [(r.learner, r.chapter, r.key, r.problems) for r in results]
    return [
        (*one, [(e.exercise, e.state, e.message, e.mistake) for e in result.exercises])
        for one, result in zip(told, results, strict=True)
    ]


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(
    local: Local, submissions: list[Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "ANSWER", PATIENCE)
    with connect(local.address) as cluster:
        (box, why), (own, reason) = cluster.sandbox(), sandbox.choose()
        assert box == own and why.startswith(reason)  # each may have none
        settings = Settings(jobs=cluster.jobs(), sandbox=box, timeout=60.0)
        assert settings.jobs == 4
        arrived: list[str] = []
        killed: list[str] = []

        def on_result(result: Result) -> None:
            arrived.append(result.learner)
            if not killed:  # one worker in the middle of its next notebook
                busy = cluster.client.processing()
                victim = max(busy, key=lambda worker: len(busy[worker]))
                assert busy[victim]
                local.workers[victim].send_signal(signal.SIGKILL)
                killed.append(victim)

        there = grade_all(submissions, tmp_path / "there", settings, on_result, cluster.grade)
        local.workers[killed[0]].wait()
        assert list(cluster.client.nthreads()) == [name for name in local.workers if name not in killed]
    assert sorted(arrived) == [s.learner for s in submissions]
    assert [result.learner for result in there] == [s.learner for s in submissions]
    here = grade_all(submissions, tmp_path / "here", settings, lambda result: None)
    assert verdicts(there) == verdicts(here)
    n = len(course_exercises()[CHAPTER])
    correct = [sum(e.state == "correct" for e in result.exercises) for result in there]
    assert correct[0] == 0 and correct[1] == n and 0 < correct[2] < n
    [mask] = [e for e in there[2].exercises if e.exercise == "causal_mask"]
    assert mask.mistake == "the diagonal is masked too; a query may look at itself."


# --- what can go wrong, with a client that does as it is told --------------------------------------------------------


class Future:
    """A future whose result is the client's next outcome; without one it never comes."""

    def __init__(self, client: "Client") -> None:
        self.client = client
        self.status = "pending"

    def add_done_callback(self, call: Callable[["Future"], None]) -> None:
        if self.client.outcomes:
            call(self)

    def result(self) -> object:
        outcome = self.client.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Client:
    """Stands in for `distributed.Client`."""

    def __init__(self, *outcomes: object, status: str = "running", threads: int = 1) -> None:
        self.outcomes = list(outcomes)
        self.status = status
        self.threads = threads
        self.submitted: list[tuple[Any, ...]] = []

    def submit(self, *task: Any, pure: bool) -> Future:
        assert not pure  # the same notebook of two learners is two tasks
        self.submitted.append(task)
        return Future(self)

    def nthreads(self) -> dict[str, int]:
        return {"tcp://worker": self.threads} if self.threads else {}

    def run(self, function: Any, on_error: str) -> dict[str, Any]:
        return {"tcp://worker": self.outcomes.pop(0)}


def killed_worker() -> Exception:
    from distributed.scheduler import KilledWorker

    return KilledWorker("task", None, 3)


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    (tmp_path / "ada.ipynb").write_bytes(b"{}")
    return Submission("ada", CHAPTER, tmp_path / "ada.ipynb")


def test_what_the_scheduler_gave_up_is_sent_again(submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result("ada", CHAPTER, "key", (), (), 1.0, None)
    client = Client(killed_worker(), killed_worker(), result)
    assert Cluster(client, "there").grade(submission, Settings()) is result
    assert len(client.submitted) == 3
    monkeypatch.setattr("course_utils.grading.grade.grade_one", lambda *given: given)
    function, task = client.submitted[0]
    assert function(task) == (submission.with_content(), Settings())


def test_a_notebook_that_no_worker_survives_costs_only_itself(submission: Submission) -> None:
    client = Client(*[killed_worker()] * 10)
    result = Cluster(client, "there").grade(submission, Settings())
    assert {e.state for e in result.exercises} == {"error"} and len(client.submitted) == 4
    assert "`--resume`" in result.problems[0] and result.key == ""


@pytest.mark.parametrize(
    "client",
    [Client(OSError("closed")), Client(CancelledError()), Client(status="closed"), Client(threads=0)],
    ids=["connection lost", "forgotten", "closed", "no workers left"],
)
def test_a_cluster_that_is_gone_is_said(
    client: Client, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "PATIENCE", 1.0)
    with pytest.raises(CourseError, match=r"The cluster at there is gone\. What was graded is kept"):
        Cluster(client, "there").grade(submission, Settings())


def test_an_error_of_the_worker_is_not_mistaken_for_a_lost_scheduler(submission: Submission) -> None:
    future = Future(Client(FileNotFoundError("bwrap")))
    future.status = "error"
    with pytest.raises(FileNotFoundError, match="bwrap"):
        Cluster(future.client, "there").wait_for(future)


def test_a_worker_with_another_version_is_refused() -> None:
    with pytest.raises(CourseError, match=r"tcp://worker has version 0\.0\.7 of the course"):
        Cluster(Client("0.0.7"), "there").verify()


def test_a_worker_without_the_course_is_refused() -> None:
    with pytest.raises(CourseError, match="Is the course installed there"):
        Cluster(Client(ModuleNotFoundError("No module named 'course_utils'")), "there").verify()


def test_the_sandbox_is_that_of_the_workers() -> None:
    assert Cluster(Client(("bubblewrap", "")), "there").sandbox() == ("bubblewrap", "")
    weak = Cluster(Client(("none", "bubblewrap is not installed")), "there").sandbox()
    assert weak == ("none", "bubblewrap is not installed (on the worker tcp://worker)")


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CourseError, match=r"pip install 'circuits-from-scratch\[cluster\]'"), connect("tcp://there:1"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x"])
def test_nobody_at_the_address_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "ANSWER", 1.0)
    with pytest.raises(CourseError, match="No scheduler answers at"), connect(address):
        pass
