"""The process inside the sandbox that loads the libraries once and starts a fresh process for each notebook.

`course_utils.grading.grade` starts it and writes to its standard input a JSON object a line, each followed by a
notebook; the answers come back as JSON objects on its standard output. It never runs a learner's code itself: each
notebook gets a copy of this process (fork), with limits, in an empty folder, and when that is over nothing of it is
left, neither process nor file.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

IDLE = 3  # on the clock an exercise may take that many times its processor time: the machine may be busy
MOST_PROCESSES = 32
LARGEST_FILE = 64 * 2**20
MOST_FILES = 10_000
LONGEST_LINE = 100_000
LONGEST_REPORT = 2_000_000
FIRST_USER = 60_578  # to 61177: numbers that nobody else uses (https://systemd.io/UIDS-GIDS/)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36


class Job(NamedTuple):
    """What to do with one notebook; its content comes after it."""

    chapter: str
    symbols: list[str]  # all exercises of the chapter
    todo: list[str]  # those to check now
    broken: dict[str, str]  # cells to leave out, and why
    name: str  # of the notebook's file
    size: int  # of the notebook's content, in bytes
    timeout: float  # seconds of processor time for one statement or one exercise
    work: float  # seconds of processor time for everything
    total: float  # seconds on the clock for everything
    memory_mb: int


def main() -> None:
    """Serve until the input ends."""
    boxed = sys.argv[1:] == ["boxed"] and os.getpid() == 1
    if sys.argv[1:] == ["boxed"] and not boxed:
        sys.exit("the sandbox has not made this process the first of its own world")
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    _on_linux(PR_SET_DUMPABLE, 0)  # no process of the same user may look into this one
    _on_linux(PR_SET_CHILD_SUBREAPER, 1)  # what a notebook leaves behind comes to this process
    if not boxed:
        _on_linux(PR_SET_PDEATHSIG, signal.SIGKILL)  # in the sandbox, bubblewrap sees to that
    preload()
    from course_utils.grading.tricks import Watch

    watch = Watch()
    gc.collect()
    gc.freeze()
    server = Server(boxed, watch)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    reply({"kind": "ready"})
    os.dup2(nowhere, 2)
    for line in requests:
        job = Job(**json.loads(line))
        for message in server.check(job, requests.read(job.size)):
            reply(message)


def preload() -> None:
    """Import what the checks and the notebooks need, so that no notebook waits for it."""
    import torch

    import solutions
    from course_utils.checks import find_checks

    torch.set_num_threads(1)
    find_checks()
    chapters = [info.name for info in pkgutil.iter_modules(solutions.__path__) if info.name.startswith("ch")]
    extras = ["course_utils.plots", "course_utils.grading.worker", "plotly.graph_objects", "einops._torch_specific"]
    extras += ["transformers.models.gpt2.modeling_gpt2", "transformers.tokenization_utils_tokenizers"]
    # What an optimiser imports when it is made; it replaces torch.manual_seed, which should not look like a trick.
    extras += ["torch._dynamo"]
    for name in [*(f"solutions.{chapter}" for chapter in chapters), *extras]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    kinds = [torch.optim.Optimizer]
    for kind in kinds:  # torch wraps `step` when a class is first used: let that be over
        kinds += kind.__subclasses__()
        with contextlib.suppress(AttributeError):
            kind.__new__(kind)._patch_step_function()


def _on_linux(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class Server:
    """Runs one notebook after the other, each in a process of its own."""

    def __init__(self, boxed: bool, watch: Any) -> None:
        self.boxed = boxed
        self.watch = watch
        self.user = FIRST_USER + secrets.randbelow(600) if boxed and os.geteuid() == 0 else None
        self.own = private_memory(os.getpid())
        self.files = set(os.listdir(tempfile.gettempdir())) if boxed else set()

    def check(self, job: Job, content: bytes) -> Iterator[dict[str, Any]]:
        """Everything the notebook's process reports, and at last how it ended."""
        folder = Path(tempfile.mkdtemp(prefix="grading-"))
        (folder / "handed in").mkdir()
        (folder / "work").mkdir()
        notebook = folder / "handed in" / job.name
        notebook.write_bytes(content)
        if self.user is not None:
            os.chown(folder / "work", self.user, self.user)
        os.chmod(folder, 0o555)
        word = secrets.token_hex(16)
        reports, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reports)
                pipe = os.dup2(pipe, 3)
                self.become_worker(job, folder / "work", notebook, pipe, word)
            except BaseException as error:
                with contextlib.suppress(BaseException):
                    os.write(pipe, json.dumps({"word": word, "kind": "fault", "message": repr(error)}).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(pipe)
        try:
            why = yield from self.listen(job, reports, child, word)
        finally:
            os.close(reports)
            peak, work, status = self.clear(child)
            os.chmod(folder, 0o755)
            shutil.rmtree(folder, ignore_errors=True)
        # What was left outside the notebook's own folder, the next one must not find: a new sandbox forgets it.
        clean = not self.boxed or set(os.listdir(tempfile.gettempdir())) <= self.files
        yield {"kind": "end", "why": why, "status": status, "peak_mb": peak, "work": work, "clean": clean}

    def become_worker(self, job: Job, folder: Path, notebook: Path, pipe: int, word: str) -> None:
        """In the new process: give up what the notebook must not have, then check it."""
        os.setsid()
        os.closerange(pipe + 1, 65536)
        os.chdir(folder)
        os.environ.update(HOME=str(folder), TMPDIR=str(folder))
        tempfile.tempdir = None
        limit_resources(job)
        if self.user is not None:
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
        if not self.boxed:
            _on_linux(PR_SET_PDEATHSIG, signal.SIGKILL)
        from course_utils.grading.worker import Worker

        broken = {int(number): why for number, why in job.broken.items()}
        worker = Worker(job.chapter, job.symbols, broken, self.watch, pipe, word)
        worker.run(notebook, job.todo, job.timeout / 2)  # a statement that takes long must not cost its whole cell

    def listen(self, job: Job, reports: int, child: int, word: str) -> Generator[dict[str, Any], None, str | None]:
        """Hand on what the process reports, until it ends (returns None) or has to be ended (returns why)."""
        begin = heard = looked = time.monotonic()
        worked = 0.0  # seconds of processor time until something was heard
        unread, length = b"", 0
        while True:
            ready, _, _ = select.select([reports], [], [], 0.05)
            now = time.monotonic()
            if ready:
                part = os.read(reports, 65536)
                if not part:
                    return None
                *lines, unread = (unread + part).split(b"\n")
                length += len(part)
                if len(unread) > LONGEST_LINE or length > LONGEST_REPORT:
                    return "forged"
                for line in lines:
                    try:
                        message = json.loads(line)
                        forged = message.pop("word") != word
                    except (ValueError, KeyError, AttributeError, TypeError):
                        forged = True
                    if forged:
                        return "forged"
                    yield message
                    heard, worked = now, -1.0
            elif has_ended(child):
                return None  # though a process that it started holds the pipe open
            if now > min(heard + IDLE * job.timeout, begin + job.total):
                return "time"
            if now < looked + 0.05:
                continue
            looked, processes = now, self.processes(child)
            spent = sum(processes.values())
            worked = spent if worked < 0 else worked
            if spent > worked + job.timeout:
                return "time"
            # Each is a copy of this process; what it has beyond that is its own.
            if sum(max(0, private_memory(pid) - self.own) for pid in processes) > job.memory_mb * 2**20:
                return "memory"
            if self.boxed:
                disk = os.statvfs(tempfile.gettempdir())
                if disk.f_files - disk.f_ffree > MOST_FILES:
                    return "files"

    def processes(self, child: int) -> dict[int, float]:
        """The notebook's processes, and the processor time in seconds that each has taken; 0 where nobody counts."""
        if sys.platform != "linux":
            return {child: 0.0}
        parents, seconds = {}, {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                    parents[int(entry)] = int(fields[1])
                    seconds[int(entry)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        own = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in own} - own:
            own |= more
        return {pid: seconds[pid] for pid in own if pid != os.getpid()}

    def clear(self, child: int) -> tuple[float, float, int]:
        """End every process that is left; returns the first one's peak in MB, its seconds, and how it ended."""
        peak, work, status = 0.0, 0.0, 0
        while True:
            if self.boxed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)  # everybody in the sandbox but this process, at one stroke
            else:
                for pid in self.processes(child):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            try:
                pid, state, usage = os.wait4(-1, 0)
            except ChildProcessError:
                return peak, work, status
            if pid == child:
                status, work = os.waitstatus_to_exitcode(state), usage.ru_utime + usage.ru_stime
                peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def has_ended(child: int) -> bool:
    """Whether it is over with a process that nobody has waited for yet; False where the system cannot say."""
    if not hasattr(os, "waitid"):  # macOS
        return False
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def limit_resources(job: Job) -> None:
    """Limits for this process and all that it starts."""
    space = 0
    if sys.platform == "linux":
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: space + job.memory_mb * 2**20,
        resource.RLIMIT_CPU: int(job.work) + 1,
        resource.RLIMIT_FSIZE: LARGEST_FILE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: tasks_of_this_user() + MOST_PROCESSES,
        resource.RLIMIT_NOFILE: 256,
    }
    for kind, most in limits.items():
        with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit, or has a lower one
            resource.setrlimit(kind, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def tasks_of_this_user() -> int:
    """How many processes and threads the system counts for this user, whose limit is one for all that run anywhere."""
    own = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if process.stat().st_uid == os.getuid():
                own += len(os.listdir(process / "task"))
    return own


def private_memory(pid: int) -> int:
    """Bytes of memory that belong to a process and to no file; 0 where that cannot be known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
        return int(text.split("RssAnon:")[1].split()[0]) * 1024
    return 0


if __name__ == "__main__":
    main()
