"""The command `course`: open the chapters, check what you wrote, run the solutions, build the notebooks.

Exit codes: 0 all is well (`grade`: the report is written, whatever is in it); 1 an exercise is wrong or not written, a
cell failed, a lesson has problems; 2 the command cannot be carried out as it was given (no such chapter, a broken
notebook), which one sentence explains.
"""

import argparse
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from course_utils.cells import read_notebook
from course_utils.exercises import by_part, exercises_of
from course_utils.fetching import PACKAGES
from course_utils.guesses import Kept, kept, summary
from course_utils.notebook import load_notebook
from course_utils.places import (
    CourseError,
    chapters_folder,
    checkout,
    choice,
    own_notebooks,
    verify_solutions,
    work_folder,
)

if TYPE_CHECKING:  # the checks import torch, and most commands need none
    from course_utils.verdict import Verdict


NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args, rest = parse(argv)
    try:
        code = carry_out(args, rest)
        sys.stdout.flush()
        return code
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `course check 02 | head -1`: whoever read has gone, and what is left to say goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if "temporary directory" in str(error.strerror):  # a full disk, too
            print(f"{error.strerror}: make room, or name another with TMPDIR.", file=sys.stderr)
        elif error.errno in NOT_ALLOWED and error.filename:
            print(
                f"{error.filename}: {error.strerror}; work in a folder of your own, with room in it.", file=sys.stderr
            )
        else:
            raise
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def carry_out(args: argparse.Namespace, rest: list[str]) -> int:
    """Do what was asked for; returns the exit code."""
    if args.command == "lab":
        return copy_only() if args.copy_only else lab(args.port, args.no_browser, rest)
    if args.command == "check":
        return check(args.chapter, args.notebook)
    if args.command == "run":
        return run(args.chapter, args.html, args.mine)
    if args.command == "status":
        return status(args.notebook)
    if args.command == "solution":
        from course_utils.solution import described, solution

        print(described(solution(args.name)))
        return 0
    if args.command == "doctor":
        from course_utils.doctor import doctor

        return doctor()
    if args.command == "models" and args.action == "train":
        from course_utils.retraining import train_again

        return train_again(args.name, args.out, args.device, args.steps)
    if args.command == "models" and args.action == "fetch":
        from course_utils.fetching import fetch

        print(f"{args.name} is in {fetch(args.name)}")
        return 0
    if args.command == "grade":
        from course_utils.grading.command import grade

        return grade(args.submissions, args.out, args.jobs, args.resume, args.timeout, args.weights, args.scheduler)
    if args.command in ("where", "new-exercise"):
        return show_places(args)
    return {"build": build, "models": models}[args.command]()


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that `lab` hands on to JupyterLab."""
    parser = argparse.ArgumentParser(
        prog="course", description="Circuits from Scratch.", epilog=(__doc__ or "").split("\n\n")[1]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("lab", help="open your chapters in JupyterLab (further arguments go to it)")
    add.add_argument("--port", type=int, help="the port to serve on")
    add.add_argument("--no-browser", action="store_true", help="print the address, but open no browser")
    add.add_argument("--copy-only", action="store_true", help="copy the missing chapters into work/ and open nothing")
    add = commands.add_parser("check", help="check the exercises of a chapter")
    add.add_argument("chapter", metavar="NN", help="a chapter's number, such as 02")
    add.add_argument("--notebook", type=Path, help="the notebook to check instead of the one in work/")
    add = commands.add_parser("status", help="count the exercises that are done")
    add.add_argument("--notebook", type=Path, help="look only at this notebook, not at those in work/")
    add = commands.add_parser("solution", help="print the reference solution of an exercise, and where it stands")
    add.add_argument("name", metavar="NAME", help="the exercise, such as causal_mask")
    add = commands.add_parser("run", help="run a chapter with its solutions")
    add.add_argument("chapter", metavar="NN", help="a chapter's number, such as 02")
    add.add_argument("--mine", action="store_true", help="run your own notebook, in work/, instead")
    add.add_argument("--html", type=Path, metavar="OUT", help="write what came out to this file")
    add = commands.add_parser("grade", help="check many learners' notebooks, each in a sandbox, and write a report")
    add.add_argument("submissions", type=Path, help="a folder of notebooks or of learners' folders, or a zip of either")
    add.add_argument("--out", type=Path, required=True, metavar="REPORT", help="the folder to write the report to")
    add.add_argument("--jobs", type=int, metavar="N", help="how many notebooks at a time (default: one per core)")
    add.add_argument("--resume", action="store_true", help="keep what an interrupted run has already graded")
    add.add_argument(
        "--timeout", type=float, default=20.0, metavar="S", help="seconds of work for one exercise (default: 20)"
    )
    add.add_argument("--weights", type=Path, metavar="FILE", help="points for exercises, instead of their difficulty")
    add.add_argument("--scheduler", metavar="ADDRESS", help="a dask scheduler, whose workers do the work")
    commands.add_parser("doctor", help="list what this machine lacks, and the command that helps")
    commands.add_parser("build", help="build the notebooks from chapters/src and solutions (for authors)")
    add = commands.add_parser("where", help="list where the pieces of an exercise are (for authors)")
    add.add_argument("name", metavar="NAME", help="the exercise, such as causal_mask")
    add = commands.add_parser("new-exercise", help="begin an exercise in all its places (for authors)")
    add.add_argument("chapter", metavar="NN", help="a chapter's number, such as 02")
    add.add_argument("name", metavar="NAME", help="the function or class that the learner will write")
    add.add_argument("--section", metavar="NAME", help="the module of checks for it, if there are several")
    add = commands.add_parser(
        "models", help="list the models; `models train NAME` trains one again, `models fetch NAME` fetches one"
    )
    actions = add.add_subparsers(dest="action", metavar="ACTION")
    add = actions.add_parser("train", help="train a model again and compare it with its card")
    add.add_argument("name", metavar="NAME", help="a model's name, such as tales")
    add.add_argument("--out", type=Path, help="where its checkpoint is kept (default: runs/NAME)")
    add.add_argument("--device", help="where to train, such as cuda (default: the recipe's choice)")
    add.add_argument("--steps", type=int, help="train for fewer steps: faster, and a worse model")
    add = actions.add_parser("fetch", help="fetch, once, what does not ship with the course")
    add.add_argument("name", metavar="NAME", help=f"one of: {', '.join(PACKAGES)}")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "lab":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return args, rest


def find_chapter(folder: Path, chapter: str) -> Path:
    """The notebook of a chapter in a folder; `2`, `02` and `02_transformer` name the same one."""
    known = {path.stem[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    number = re.match(r"\d+", chapter)
    path = known.get(number[0].zfill(2)) if number else None
    if path is None:
        raise CourseError(f"There is no chapter {chapter}; there are: {', '.join(known) or 'none at all'}.")
    return path


# --- lab ------------------------------------------------------------------------------------------------------------


def lab(port: int | None, no_browser: bool, rest: list[str]) -> int:
    """Put the missing chapters into the work folder, start JupyterLab there and print its address."""
    from jupyter_core.paths import jupyter_runtime_dir

    from course_utils.shadows import shadows, warning

    work = fill_work_folder()
    make_writable(Path(jupyter_runtime_dir()), "name another with JUPYTER_RUNTIME_DIR")
    for path in shadows(work):
        print(warning(path))
    command = lab_command(work, rest)
    # So that `!course solution NAME` in a cell finds this course's command, also where nobody has activated it.
    environment = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
    command += [f"--port={port}"] * (port is not None) + ["--no-browser"] * no_browser
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: Jupyter must not outlive the command
    server = subprocess.Popen(command, cwd=work, env=environment)
    try:
        address = wait_for_address(server)
        if address:
            print(f"Your chapters are in {work}\nJupyterLab: {address}   (Ctrl-C stops it)", flush=True)
        return server.wait()
    except KeyboardInterrupt:  # Jupyter got it too; now and then it hangs, when it was just starting a thread
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
        return 0
    finally:
        server.terminate()


def copy_only() -> int:
    """Put the missing chapters into the work folder, for those who open them elsewhere."""
    print(f"Your chapters are in {fill_work_folder()}")
    return 0


def lab_command(work: Path, rest: list[str]) -> list[str]:
    """The command that starts JupyterLab, with `rest` as further arguments."""
    # -P: a learner's own random.py in work/ must not stop the server.
    command = [sys.executable, "-P", "-m", "jupyterlab", "--ServerApp.answer_yes=True", "--log-level=WARN"]
    # The root is work/ whatever a configuration says, unless it is named here and now.
    if not any(
        re.match(r"--(ServerApp\.(root|preferred|notebook)_dir|(notebook|preferred)-dir)\b", word) for word in rest
    ):
        command += [f"--ServerApp.root_dir={work}", f"--ServerApp.preferred_dir={work}"]
    # It works without network, and asks nobody for news.
    command += [
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    # In a container one is root, and Jupyter refuses to start; it listens on this machine only, behind a token.
    command += ["--allow-root"] * (getattr(os, "geteuid", lambda: 1)() == 0)
    return command + rest


def fill_work_folder() -> Path:
    """Copy the chapters that are not yet in the work folder; what is there stays as it is."""
    chapters = sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))
    if not chapters:
        raise CourseError(f"There are no chapters in {chapters_folder()}: install the course again, or `course build`.")
    work = work_folder()
    make_writable(work, "go to a folder of your own")
    for path in chapters:
        if not (work / path.name).exists():
            shutil.copyfile(path, work / path.name)
            print(f"new in {work.name}/: {path.name}")
    return work


def make_writable(folder: Path, otherwise: str) -> None:
    """Make a folder where there is none. Raises CourseError, with what to do, where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CourseError(f"Nothing can be written into {folder} ({error.strerror}): {otherwise}.") from None


def wait_for_address(server: subprocess.Popen) -> str | None:
    """The address of JupyterLab with its token, as soon as it serves; None if it stops instead."""
    from jupyter_server.serverapp import list_running_servers

    while server.poll() is None:
        for info in list_running_servers():
            if info["pid"] == server.pid and listens(info["port"]):
                return info["url"] + "lab" + (f"?token={info['token']}" if info["token"] else "")
        time.sleep(0.2)
    return None


def listens(port: int) -> bool:
    """Whether somebody answers there; a server is on the list of running ones a moment before it does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- check and status -----------------------------------------------------------------------------------------------


def judge(path: Path, chapter: str) -> "Iterator[tuple[str, Verdict]]":
    """Check every exercise of a chapter in a notebook. Raises CourseError when the notebook is another one."""
    from course_utils.checks import find_checks
    from course_utils.verdict import verdict

    symbols = find_checks().get(chapter, {})
    module = load_notebook(path, symbols)
    if symbols and not any(symbol in module.__broken__ or hasattr(module, symbol) for symbol in symbols):
        raise CourseError(
            f"{path} holds no exercise of chapter {chapter}: is it another chapter's, or another course's?"
        )
    for symbol in symbols:
        yield symbol, verdict(module, symbol)


def check(chapter: str, notebook: Path | None) -> int:
    """Say what is right and what is not, one exercise after the other; 0 when all are correct, otherwise 1."""
    number = find_chapter(chapters_folder(), chapter).stem[:2]
    paths = [notebook] if notebook else learners_notebooks(number)
    path, states = paths[0], []
    if read := choice(paths):
        print(f"Read: {read}.")
    for _, verdict in judge(path, number):
        print(verdict.message, flush=True)
        states.append(verdict.state)
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("correct", "wrong", "not written yet"))
    print(f"\n{path.name}: {counts}, of {len(states)}.")
    return int(set(states) != {"correct"})


def learners_notebooks(chapter: str) -> list[Path]:
    """The learner's copies of a chapter, the one that counts first. Raises CourseError where there is none."""
    paths = own_notebooks(chapter)
    if not paths:
        raise CourseError(
            f"There is no notebook of chapter {chapter} in {work_folder()}: `course lab` puts it there, "
            "`--notebook PATH` names another."
        )
    return paths


def status(notebook: Path | None) -> int:
    """Print a table of the exercises done, chapter by chapter, or of one notebook, whose name tells its chapter."""
    chapters = sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))
    if notebook is not None:
        chapters = [find_chapter(chapters_folder(), notebook.name)]
        read_notebook(notebook)  # a broken file ends the command here, before the table begins
    guesses: Mapping[str, Kept] = {}
    try:
        guesses = kept(notebook.parent if notebook else work_folder())
    except CourseError as error:
        print(error)
    print(f"{'chapter':<24} {'correct':>8} {'wrong':>8} {'not written':>12} {'core path':>10}")
    headings = {numbers[0]: part.heading for part, numbers in by_part(path.stem[:2] for path in chapters).items()}
    missing = False
    for path in chapters:
        if heading := headings.get(path.stem[:2]):
            print(heading)
        title = path.stem.replace("_", " ")
        paths = [notebook] if notebook else own_notebooks(path.stem[:2])
        if not paths:
            missing = True
            print(f"{title:<24} no notebook yet")
            continue
        try:
            states = {symbol: verdict.state for symbol, verdict in judge(paths[0], path.stem[:2])}
        except CourseError as error:
            print(f"{title:<24} {error}")
            continue
        core = [exercise.name for exercise in exercises_of(path) if not exercise.optional]
        counts = Counter(states.values())
        correct = f"{counts['correct']}/{len(states)}"
        on_core_path = f"{sum(states.get(name) == 'correct' for name in core)}/{len(core)}"
        print(f"{title:<24} {correct:>8} {counts['wrong']:>8} {counts['not written yet']:>12} {on_core_path:>10}")
        if read := choice(paths):
            print(f"   read: {read}")
        if made := summary(guesses, path.stem[:2]):
            print(f"   {made}")
    if missing:
        print(f"\n`course lab` puts the notebooks that are missing into {work_folder()}.")
    return 0


# --- run ------------------------------------------------------------------------------------------------------------


def run(chapter: str, html: Path | None, mine: bool = False) -> int:
    """Run a notebook, with a line for each cell; the notebook itself stays as it is.

    It is the one with the solutions, in an empty folder, or the learner's own, where it is: there later chapters find
    the `Transformer` of an earlier one.
    """
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    if html is not None and not html.resolve().parent.is_dir():
        raise CourseError(f"The folder of {html} does not exist: make it first, or name another place.")
    if html is not None:
        make_writable(html.resolve().parent, "name another place")
    verify_solutions()
    spec = find_spec("solutions")
    assert spec is not None and spec.origin is not None  # verified above
    path = find_chapter(chapters_folder() if mine else Path(spec.origin).parent, chapter)
    if mine:
        path = learners_notebooks(path.stem[:2])[0]
    notebook = read_notebook(path)
    start = time.perf_counter()
    try:
        renderer = {"PLOTLY_RENDERER": "plotly_mimetype+notebook"} if html else {}
        execute(notebook, renderer, folder=path.parent if mine else None)
    except CellExecutionError as error:
        print(f"{path.name}: a cell failed.\n{error}", file=sys.stderr)
        return 1
    except DeadKernelError:
        print(f"{path.name}: the kernel died; most often there is too little memory.", file=sys.stderr)
        return 1
    print(f"{path.name}: all cells ran in {time.perf_counter() - start:.0f} s.")
    if html is not None:
        from nbconvert import HTMLExporter

        html.write_text(
            HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})[0], encoding="utf-8"
        )
        print(f"Written: {html}")
    return 0


def execute(  # type: ignore[no-untyped-def]
    notebook, environment: dict[str, str], timeout: int | None = None, folder: Path | None = None
) -> None:
    """Run all cells in place, printing a line for each; `timeout` is in seconds, for one cell.

    Without a `folder` they run in an empty one.

    The packages of this course come first on the kernel's path, whatever else is called `solutions`.
    """
    from nbclient import NotebookClient

    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    total = sum(cell.cell_type == "code" for cell in notebook.cells)
    number = 0
    with tempfile.TemporaryDirectory() as empty:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            startup_timeout=600,  # a busy machine takes more than the usual minute
            kernel_name="python3",
            resources={"metadata": {"path": str(folder or empty)}},
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        # Not client.execute(), which catches Ctrl-C in a way of its own.
        with client.setup_kernel(env={**os.environ, "PYTHONPATH": path, **environment}):
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type != "code":
                    continue
                number, start = number + 1, time.perf_counter()
                first = next((line for line in cell.source.splitlines() if line and not line.startswith("#")), "")
                print(f"[{number:>3}/{total}] {first[:70]:<70}", end="", flush=True)
                try:
                    client.execute_cell(cell, index)
                finally:
                    print(f" {time.perf_counter() - start:6.1f} s", flush=True)


# --- build and models -----------------------------------------------------------------------------------------------


def build() -> int:
    """Build the notebooks of the checkout around the current folder."""
    root = checkout()
    if root is None:
        raise CourseError("`course build` needs the lessons: run it inside a checkout of the repository.")
    from course_utils.build import BuildError
    from course_utils.build import build as build_all

    try:
        changed = build_all(root)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for path in changed:
        print(f"built {path.relative_to(root)}")
    if not changed:
        print("Everything is up to date.")
    return 0


def show_places(args: argparse.Namespace) -> int:
    """Print where the pieces of an exercise are; for a new one, after they were begun."""
    from course_utils.authoring import begins_a_section, new_exercise, root_of_checkout, where

    new = args.command == "new-exercise"
    places = new_exercise(args.chapter.zfill(2), args.name, args.section) if new else where(args.name)
    for place in places:
        print(f"{place.piece:<9} {place.path.relative_to(root_of_checkout())}:{place.line}")
    if new and begins_a_section(places):
        print(f"\nThis begins a section, {args.section}. If you meant another, delete its two files, and what was")
        print("added at the end of the lesson and of the solution. Then begin again.")
    if new:
        print(f"\nWrite each of them, and a call of {args.name} in tests/course/test_on_meta.py.")
        tests = "tests/test_checks.py tests/course/test_on_meta.py"
        print(f"Then: course build, and python -m pytest {tests} -k {args.name}")
    return 0


def models() -> int:
    """Print a table of the models that ship, where their cards are, which say the rest, and what can be fetched."""
    from course_utils.fetching import NotFetched, fetched, megabytes
    from course_utils.pretrained import MODELS, shipped_models

    print(f"{'name':<20} {'parameters':>10}  about")
    for card in shipped_models():
        print(f"{card['name']:<20} {int(card['parameters']):>10,}  {card['about']}")
    print(f"\nHow each was trained and what it can do: card.md in the folders of {MODELS}")
    print("`course models train NAME` trains one again and compares it with its card.")
    print("\nThese do not ship; `course models fetch NAME` gets them:")
    for name, package in PACKAGES.items():
        try:
            state = f"in {fetched(name)}"
        except NotFetched:
            state = f"not on this machine, {megabytes(package.size)}"
        except CourseError as error:
            state = str(error)
        print(f"{name:<20} {package.about}: {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
