"""What grading takes and gives: submissions, settings, results, and the files they are kept in.

A report folder holds `results.json` (`to_json`) and `parts/`, one file for each submission, written as soon as it is
graded, from which `--resume` goes on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from course_utils.files import write_atomically
from course_utils.places import COURSE, CourseError

SCHEMA = 1
STATES = ("correct", "wrong", "not written yet", "timed out", "cheated", "error")
CAUSE = "This is what you get if "


@dataclass(frozen=True)
class Submission:
    """One learner's notebook of one chapter. It can be pickled; with `content` it needs no file where it is graded."""

    learner: str
    chapter: str  # "02"
    path: Path
    content: bytes | None = None
    missing: str = ""  # what was found instead of a notebook, in one sentence

    def read(self) -> bytes:
        """The notebook as it was handed in."""
        return self.path.read_bytes() if self.content is None else self.content

    def with_content(self) -> "Submission":
        """The same, carrying what stands in its file, for another machine."""
        return dataclasses.replace(self, content=self.read())


@dataclass(frozen=True)
class Settings:
    """How to grade. What can change a verdict is part of each result's key."""

    # Seconds of processor time for one exercise, so that a busy machine changes no verdict. A whole notebook may take
    # ten times that, and either of them three times as long on the clock.
    timeout: float = 20.0
    memory_mb: int = 2048  # beyond what the libraries take
    sandbox: str = "none"  # "bubblewrap" or "none": see course_utils.grading.sandbox
    jobs: int = 2
    resume: bool = False


@dataclass(frozen=True)
class ExerciseResult:
    """What came of one exercise."""

    exercise: str
    state: str  # one of STATES
    message: str  # the lines that the check would have shown
    mistake: str | None  # the named cause of a wrong answer: what follows "This is what you get if"
    seconds: float


@dataclass(frozen=True)
class Result:
    """What came of one submission."""

    learner: str
    chapter: str
    key: str  # see `key`
    exercises: tuple[ExerciseResult, ...]  # all of the chapter, in the order of the lesson
    problems: tuple[str, ...]  # about the notebook as a whole: unreadable, killed, warnings, tricks that were found
    seconds: float
    peak_mb: float | None  # resident memory at its highest, libraries included


# --- the course -----------------------------------------------------------------------------------------------------


def course_version() -> str:
    """The installed version of the course."""
    try:
        return version(COURSE)
    except PackageNotFoundError:  # run from a copy of the sources
        return "unknown"


def key(submission: Submission, settings: Settings) -> str:
    """A digest of all that the verdicts depend on: the notebook, the course and the limits."""
    digest = hashlib.sha256(submission.read())
    digest.update(submission.missing.encode("utf-8", "surrogatepass"))
    digest.update(repr((submission.chapter, course_version(), settings.timeout, settings.memory_mb)).encode())
    return digest.hexdigest()


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(results: Iterable[Result], settings: Settings) -> dict[str, Any]:
    """The content of results.json; lists are in the order given."""
    return {
        "schema": SCHEMA,
        "course": {"name": COURSE, "version": course_version()},
        "sandbox": settings.sandbox,
        "results": [dataclasses.asdict(result) for result in results],
    }


def from_json(data: Mapping[str, Any]) -> list[Result]:
    """The results in such an object. Raises CourseError where it is none, or of another schema."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise CourseError(f"These results have schema {found!r}, and this version reads {SCHEMA}: grade again.")
    try:
        return [result_from_json(one) for one in data["results"]]
    except (KeyError, TypeError) as error:
        raise CourseError(f"These results are damaged ({error!r}): grade again.") from None


def result_from_json(data: Mapping[str, Any]) -> Result:
    """One result; KeyError or TypeError where a field is missing or unknown."""
    exercises = tuple(ExerciseResult(**one) for one in data["exercises"])
    return Result(**{**data, "exercises": exercises, "problems": tuple(data["problems"])})


# --- parts, from which --resume goes on -----------------------------------------------------------------------------


def part_path(out: Path, submission: Submission | Result) -> Path:
    """Where the result of a submission is kept; any learner's name will do, for it is only hashed."""
    digest = hashlib.sha256(f"{submission.learner}\0{submission.chapter}".encode("utf-8", "surrogatepass"))
    return out / "parts" / f"{digest.hexdigest()[:32]}.json"


def save_part(out: Path, result: Result, settings: Settings) -> None:
    """Keep one result."""
    text = json.dumps(to_json([result], settings), ensure_ascii=False, indent=1)
    write_atomically(part_path(out, result), text + "\n")


def load_part(out: Path, submission: Submission, settings: Settings) -> Result | None:
    """The result that was kept for this very notebook, graded in the same way; None where there is none."""
    try:
        [result] = from_json(json.loads(part_path(out, submission).read_text(encoding="utf-8")))
    except (OSError, ValueError, CourseError):
        return None
    return result if result.key == key(submission, settings) else None
