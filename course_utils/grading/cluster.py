"""Grading on many machines: `course grade --scheduler ADDRESS` sends each notebook to a dask.distributed cluster.

A worker does what this machine would do (`grade_one`), so it needs the same version of the course, and bubblewrap for
the sandbox. The extra `cluster` brings `distributed`, which only this module imports.
"""

import contextlib
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from course_utils.exercises import course_exercises
from course_utils.grading import sandbox
from course_utils.grading.grade import grade_one
from course_utils.grading.results import ExerciseResult, Result, Settings, Submission, course_version
from course_utils.places import CourseError

RESENT = 3  # times that a notebook is sent again; before that the scheduler itself has tried four workers
ANSWER = 10.0  # seconds to wait for a scheduler's first word
PATIENCE = 60.0  # seconds to wait for a worker when there is none


class Task(NamedTuple):
    """A submission to be graded; to unpickle it is to grade it."""

    submission: Submission
    settings: Settings

    def __reduce__(self) -> tuple[Any, ...]:
        return grade_one, (self.submission, self.settings)


class Cluster:
    """The machines behind a scheduler."""

    def __init__(self, client: Any, address: str) -> None:
        self.client = client
        self.address = address

    def jobs(self) -> int:
        """How many notebooks to have on the way at once: two for each thread, so that no worker waits for the next."""
        return 2 * sum(self.client.nthreads().values())

    def ask(self, function: Any) -> dict[str, Any]:
        """What a function of the course returns on each worker. Raises CourseError where one cannot call it."""
        answers = self.client.run(function, on_error="return")
        for worker, answer in answers.items():
            if isinstance(answer, BaseException):
                raise CourseError(f"The worker {worker} cannot grade: {answer}. Is the course installed there?")
        return answers

    def verify(self) -> None:
        """Raise CourseError where a worker has another version of the course, and so perhaps other checks."""
        for worker, version in self.ask(course_version).items():
            if version != course_version():
                raise CourseError(
                    f"The worker {worker} has version {version} of the course, and this is {course_version()}: "
                    "install the same everywhere."
                )

    def sandbox(self) -> tuple[str, str]:
        """Which sandbox works on every worker, and, where it is "none", why: as `sandbox.choose` says for here."""
        for worker, (name, why) in self.ask(sandbox.choose).items():
            if name == "none":
                return name, f"{why} (on the worker {worker})"
        return "bubblewrap", ""

    def grade(self, submission: Submission, settings: Settings) -> Result:
        """Grade one submission there; it blocks, so call it from several threads.

        A worker that dies costs nothing but time: the scheduler gives its work to another, and what had bad luck with
        several is sent again. Raises CourseError where no worker is left, or the scheduler is gone.
        """
        from distributed.scheduler import KilledWorker

        for _ in range(1 + RESENT):
            with contextlib.suppress(KilledWorker):
                # The scheduler reads functions and arguments, for which it would import the course; bytes it hands on.
                task = pickle.dumps(Task(submission.with_content(), settings))
                return self.wait_for(self.client.submit(pickle.loads, task, pure=False))
        why = "the workers that graded it died, one after the other; `--resume` grades it again"
        exercises = course_exercises()[submission.chapter]
        unknown = tuple(ExerciseResult(e.name, "error", f"{e.name}: {why}", None, 0.0) for e in exercises)
        # With no key it is nobody's result: `--resume` will not take it.
        return Result(submission.learner, submission.chapter, "", unknown, (why,), 0.0, None)

    def wait_for(self, future: Any) -> Result:
        """What comes back; CourseError where nothing can come back any more."""
        arrived = threading.Event()
        future.add_done_callback(lambda _: arrived.set())
        last_seen = time.monotonic()
        while time.monotonic() - last_seen <= PATIENCE and self.client.status == "running":
            if arrived.wait(5):
                try:
                    return future.result()
                except (OSError, CancelledError):
                    if future.status == "error":  # it came from there
                        raise
                    break
            with contextlib.suppress(OSError):
                last_seen = time.monotonic() if self.client.nthreads() else last_seen
        raise CourseError(f"The cluster at {self.address} is gone. What was graded is kept: `--resume` goes on.")


@contextlib.contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster at an address such as tcp://10.0.0.7:8786, for as long as the block lasts.

    Raises CourseError, with what to do, where `distributed` is not installed, nobody answers, no worker comes, or one
    has not this version of the course.
    """
    try:
        from distributed import Client
    except ImportError:
        raise CourseError(
            "`--scheduler` needs the package `distributed`: pip install 'circuits-from-scratch[cluster]'."
        ) from None
    try:
        client = Client(address, timeout=ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise CourseError(f"No scheduler answers at {address} ({error}): start one with `dask scheduler`.") from None
    with client:
        cluster = Cluster(client, address)
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise CourseError(
                f"The scheduler at {address} has no workers: start some with `dask worker {address}`."
            ) from None
        cluster.verify()
        yield cluster
