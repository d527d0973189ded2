"""Grade submissions: send each notebook to a server in a sandbox, and make a result of what comes back.

A process that ends early costs what it was at: one exercise, or one cell. The next process leaves that out and goes on.
"""

import atexit
import contextlib
import json
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from course_utils.exercises import course_exercises
from course_utils.grading import sandbox
from course_utils.grading.results import (
    CAUSE,
    STATES,
    ExerciseResult,
    Result,
    Settings,
    Submission,
    key,
    load_part,
    save_part,
)
from course_utils.places import CourseError

WHOLE = 10  # a notebook may take that many times the processor time of one exercise
IDLE = 3  # and on the clock that many times more
PATIENCE = 30.0  # seconds after which a server that should have ended a process is itself ended
LONGEST_MESSAGE = 5_000
LARGEST_NOTEBOOK = 200 * 2**20
SIGNALS = {
    4: "SIGILL",
    6: "SIGABRT",
    7: "SIGBUS",
    8: "SIGFPE",
    9: "SIGKILL",
    11: "SIGSEGV",
    25: "SIGXFSZ",
}


class Stopped(Exception):
    """Grading was stopped, so that nothing more is to be started."""


class Server:
    """A process of `course_utils.grading.server`, started when it is needed, and again when it was lost."""

    def __init__(self, sandbox_name: str) -> None:
        self.sandbox = sandbox_name
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.unread = b""
        _servers.add(self)

    def start(self) -> subprocess.Popen[bytes]:
        """The running process; CourseError where it cannot be started."""
        if self.stopped:
            raise Stopped
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.end()
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                sandbox.command(self.sandbox),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=sandbox.environment(),
                cwd="/",
                start_new_session=True,
            )
            self.unread = b""
            if self.answer(time.monotonic() + 300) != {"kind": "ready"}:
                self.end()
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                if self.stopped:
                    raise Stopped
                raise CourseError(f"The grading process does not start: {lines[-1] if lines else 'it says nothing'}")
        return self.process

    def end(self) -> None:
        """Stop the process, and with it everything that it started."""
        if self.process is not None:
            self.process.kill()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Stop it for good."""
        self.stopped = True
        self.end()
        _servers.discard(self)

    def ask(self, job: dict[str, Any], content: bytes) -> Iterator[dict[str, Any]]:
        """What the server says about a notebook; ends with a message of kind "end", or "lost" where it died."""
        process = self.start()
        last = time.monotonic() + job["total"] + PATIENCE
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode() + b"\n" + content)
            process.stdin.flush()
        except OSError:
            pass  # it says "lost" below
        while True:
            message = self.answer(last)
            if message is None:
                self.end()
                if self.stopped:
                    raise Stopped
                yield {"kind": "lost"}
                return
            if message.get("kind") == "end" and not message.get("clean"):
                self.end()
            yield message
            if message.get("kind") == "end":
                return

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or None where none came in time or the server is gone."""
        assert self.process is not None and self.process.stdout is not None
        while b"\n" not in self.unread:
            try:
                ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
                part = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            except (OSError, ValueError):
                return None
            if not part:
                return None
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None


_servers: set[Server] = set()
_here = threading.local()


def close_servers() -> None:
    """Stop every server that this process has started."""
    for server in list(_servers):
        server.close()


atexit.register(close_servers)


# --- one submission -------------------------------------------------------------------------------------------------


def grade_one(submission: Submission, settings: Settings) -> Result:
    """Grade one submission; each thread keeps its server for the next one.

    Raises CourseError where no grading process can be started, never because of what is in the notebook.
    """
    server = getattr(_here, "server", None)
    if server is None or server.sandbox != settings.sandbox or server.stopped:
        if server is not None:
            server.close()
        server = _here.server = Server(settings.sandbox)
    return Attempt(submission, settings).grade(server)


class Attempt:
    """The grading of one submission, in as many processes as it takes."""

    def __init__(self, submission: Submission, settings: Settings) -> None:
        self.submission = submission
        self.settings = settings
        self.symbols = [exercise.name for exercise in course_exercises()[submission.chapter]]
        self.done: dict[str, ExerciseResult] = {}
        self.broken: dict[int, tuple[str, str]] = {}  # cells to leave out: the state and the reason
        self.problems: list[str] = []
        self.peak: float | None = None
        self.worked = 0.0  # seconds of processor time
        self.lost = 0

    def grade(self, server: Server) -> Result:
        """The result."""
        begin = time.monotonic()
        try:
            content = self.submission.read()
            mark = key(self.submission, self.settings)
        except OSError as error:
            content, mark = b"", ""
            self.give_up(f"{self.submission.path.name} cannot be read: {error.strerror}")
        if self.submission.missing:
            self.give_up(self.submission.missing)
        if len(content) > LARGEST_NOTEBOOK:
            self.give_up(f"{self.submission.path.name} is larger than {LARGEST_NOTEBOOK // 2**20} MB")
        work = WHOLE * self.settings.timeout
        while todo := [symbol for symbol in self.symbols if symbol not in self.done]:
            left = begin + IDLE * work - time.monotonic()
            if left <= 0 or self.worked >= work:
                self.give_up(f"not finished after {work:g} s, so it was stopped", "timed out")
                break
            self.go_on(server, content, todo, work - self.worked, left)
        return Result(
            learner=self.submission.learner,
            chapter=self.submission.chapter,
            key=mark,
            exercises=tuple(self.done[symbol] for symbol in self.symbols),
            problems=tuple(dict.fromkeys(self.problems)),
            seconds=round(time.monotonic() - begin, 3),
            peak_mb=self.peak,
        )

    def go_on(self, server: Server, content: bytes, todo: list[str], work: float, total: float) -> None:
        """Check what is left in a new process, which decides an exercise or leaves one more cell out."""
        job = {
            "chapter": self.submission.chapter,
            "symbols": self.symbols,
            "todo": todo,
            "broken": {number: why for number, (_, why) in self.broken.items()},
            "name": file_name(self.submission),
            "size": len(content),
            "timeout": self.settings.timeout,
            "work": work,
            "total": total,
            "memory_mb": self.settings.memory_mb,
        }
        cell: int | None = None
        current: str | None = None
        loaded = False
        for message in server.ask(job, content):
            match message:
                case {"kind": "cell", "number": int(number)} if not loaded:
                    cell = number
                case {"kind": "loaded", "warnings": list(warnings)} if not loaded:
                    loaded, cell = True, None
                    self.problems += [text(warning) for warning in warnings]
                case {"kind": "unreadable", "message": str(why)} if not loaded:
                    self.give_up(text(why))
                case {"kind": "start", "symbol": str(symbol)} if loaded and symbol in todo and symbol not in self.done:
                    current = symbol
                case {"kind": "verdict", "symbol": str(symbol), "state": str(state), "message": str(what)} if (
                    symbol == current and state in STATES
                ):
                    self.decide(symbol, state, text(what), message.get("seconds"))
                    current = None
                case {"kind": "fault", "message": str(why)}:
                    if not loaded and cell is None:
                        self.give_up(f"{file_name(self.submission)} cannot be loaded: {text(why)}")
                case {"kind": "end" | "lost"}:
                    if isinstance(message.get("peak_mb"), int | float):
                        self.peak = round(max(self.peak or 0.0, message["peak_mb"]), 1)
                    if isinstance(message.get("work"), int | float):
                        self.worked += message["work"]
                    self.end(message, cell, current, loaded)
                case _:
                    self.end({"kind": "end", "why": "forged"}, cell, current, loaded)

    def end(self, message: dict[str, Any], cell: int | None, current: str | None, loaded: bool) -> None:
        """Blame the end of a process on what it was at."""
        todo = [symbol for symbol in self.symbols if symbol not in self.done]
        state, why = fate(message, self.settings)
        if not todo:
            return
        if current is not None:
            self.decide(current, state, f"{current}: {why}.", None)
        elif not loaded and cell is not None and cell not in self.broken:
            self.broken[cell] = (state, why)
            self.problems.append(f"code cell {cell} was left out: {why}")
        elif not loaded and message["kind"] == "lost" and not self.lost:
            self.lost += 1  # perhaps it was no fault of this notebook
        elif not loaded:
            self.give_up(why, state)
        elif message.get("why") or message.get("status"):
            self.decide(todo[0], state, f"{todo[0]}: {why}.", None)  # between two exercises: by a thread of its own

    def decide(self, symbol: str, state: str, message: str, seconds: object) -> None:
        """Keep the verdict on one exercise."""
        for cell, (reason, why) in self.broken.items():
            if state == "wrong" and f"code cell {cell} of" in message and why in message:
                state = reason
        if state == "cheated":
            name, _, trick = message.splitlines()[0].partition(": ")
            if not any(problem.endswith(trick) for problem in self.problems):
                self.problems.append(f"{name}: {trick}")
        mistake = next((line.partition(CAUSE)[2] for line in message.splitlines() if CAUSE in line), None)
        took = round(seconds, 3) if isinstance(seconds, float) else self.settings.timeout * (state == "timed out")
        self.done[symbol] = ExerciseResult(symbol, state, message, mistake, took)

    def give_up(self, why: str, state: str = "error") -> None:
        """The same for all exercises that are not decided."""
        self.problems.append(why)
        for symbol in self.symbols:
            if symbol not in self.done:
                self.done[symbol] = ExerciseResult(symbol, state, f"{symbol}: {why}", None, 0.0)


def fate(message: dict[str, Any], settings: Settings) -> tuple[str, str]:
    """The state and the reason for what a process was at when it ended."""
    status = message.get("status")
    match message.get("why"), status:
        case ("time", _) | (_, -24):  # SIGXCPU
            return "timed out", f"not finished after {settings.timeout:g} s, so it was stopped"
        case "memory", _:
            return "error", f"it used more than {settings.memory_mb} MB of memory, so it was stopped"
        case "files", _:
            return "error", "it made too many files, so it was stopped"
        case "forged", _:
            return "cheated", "it wrote into the grader's own channel"
        case _, int() if status < 0:
            return "error", f"the process was ended by {SIGNALS.get(-status, f'signal {-status}')}"
    if message["kind"] == "lost":
        return "error", "the process that checks it was stopped from inside"
    return "error", f"the process ended by itself (exit status {status})"


def text(given: object) -> str:
    """Words from a notebook's process, fit to be shown and stored."""
    words = str(given).encode("utf-8", "replace").decode()
    words = "".join(letter for letter in words if letter.isprintable() or letter in "\n\t")
    return words if len(words) <= LONGEST_MESSAGE else words[:LONGEST_MESSAGE] + " ..."


def file_name(submission: Submission) -> str:
    """The notebook's name, or one of ours where it is no name for a file anywhere."""
    name = submission.path.name
    fit = name.isprintable() and len(name.encode("utf-8", "replace")) <= 200 and name.endswith(".ipynb")
    return name if fit else f"{submission.chapter}.ipynb"


# --- many submissions -----------------------------------------------------------------------------------------------


def grade_all(
    submissions: list[Submission],
    out: Path,
    settings: Settings,
    on_result: Callable[[Result], None],
    grade: Callable[[Submission, Settings], Result] = grade_one,
) -> list[Result]:
    """Grade them in parallel, keeping each result in `out` at once; with `settings.resume` those kept are not redone.

    The results come in the order of the submissions; `on_result` hears of each as it is there. `grade` grades one,
    here or elsewhere (see `course_utils.grading.cluster`).
    """
    results: dict[int, Result] = {}
    todo = []
    for number, submission in enumerate(submissions):
        kept = load_part(out, submission, settings) if settings.resume else None
        if kept is None:
            todo.append(number)
        else:
            results[number] = kept
            on_result(kept)
    pool = ThreadPoolExecutor(max(1, min(settings.jobs, len(todo))))
    try:
        waiting = {pool.submit(grade, submissions[number], settings): number for number in todo}
        for future in as_completed(waiting):
            result = future.result()
            save_part(out, result, settings)
            results[waiting[future]] = result
            on_result(result)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        close_servers()
    return [results[number] for number in range(len(submissions))]
