"""Find the submissions in what a teacher hands over: a folder of notebooks, of folders of learners, or a zip of either.

A folder inside is a learner, and so is a notebook beside such folders (`Zoë.ipynb`, `02_transformer-Zoë.ipynb`). A
notebook that is called like a chapter and no more belongs to whom the outer folder is named after. Nothing is run.
"""

import contextlib
import json
import os
import re
import stat
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from course_utils.grading.results import Submission, course_exercises
from course_utils.notebook import CourseError, chapters_folder

LARGEST_UNPACKED = 20 * 2**30
HARMLESS = 2**29  # a zip may hold that much, however small it is
DENSEST = 200  # times its own size; notebooks with plots reach 20
LEFT_OUT = re.compile(r"^(\.|__MACOSX$|__pycache__$)")


class Found(NamedTuple):
    """What there is to grade."""

    submissions: list[Submission]
    ignored: list[str]  # notebooks of no chapter, which are the learners' own affair


@contextlib.contextmanager
def collected(source: Path) -> Iterator[Found]:
    """The submissions in a folder or zip; unpacked files last as long as the block.

    Raises CourseError, before anything is graded, where there are none, where two are for one learner and chapter,
    where a notebook is a link that leads out of the folder, and for a zip that cannot be unpacked safely.
    """
    if source.is_dir():
        yield find(source, source.resolve().name)
    elif zipfile.is_zipfile(source):
        with tempfile.TemporaryDirectory(prefix="submissions-") as folder:
            unpack(source, Path(folder))
            yield find(Path(folder), source.stem)
    elif source.exists():
        raise CourseError(f"{source} is neither a folder nor a zip of submissions.")
    else:
        raise CourseError(f"There is no folder or zip {source}.")


def find(root: Path, name: str) -> Found:
    """The submissions under a folder, whose notebooks without another name belong to the learner `name`."""
    whole = root
    while len(inside := entries(root)) == 1 and inside[0].is_dir() and all(p.is_dir() for p in entries(inside[0])):
        root, name = inside[0], inside[0].name  # submissions.zip/submissions/...
    pairs: list[tuple[str, Path]] = []
    for entry in entries(root):
        if entry.is_dir():
            pairs += [(entry.name, path) for path in notebooks(entry)]
        elif entry.suffix == ".ipynb":
            pairs.append((learner_in(entry.stem) or name, entry))
    if not pairs:
        raise CourseError(f"There is no notebook in {whole if whole.name else root}.")
    submissions, ignored, unclear = [], [], []
    for learner, path in pairs:
        if not path.resolve().is_relative_to(whole.resolve()):
            raise CourseError(f"{path} is a link that leads out of the submissions: put the notebook itself there.")
        chapter = chapter_of(path)
        learner = unicodedata.normalize("NFC", learner)
        if chapter:
            submissions.append(Submission(learner, chapter, path))
        elif chapter is None:
            unclear.append((learner, path))
        else:
            ignored.append(str(path.relative_to(whole)))
    usual = Counter(submission.chapter for submission in submissions).most_common(1)
    for learner, path in unclear:  # it cannot be read, and its learner should hear of that
        if usual and (learner, usual[0][0]) not in {(s.learner, s.chapter) for s in submissions}:
            submissions.append(Submission(learner, usual[0][0], path))
        else:
            ignored.append(str(path.relative_to(whole)))
    if not submissions:
        raise CourseError(f"None of the notebooks in {whole.name} is of a chapter of this course: {ignored[0]}, ...")
    refuse_doubles(submissions, whole)
    return Found(sorted(submissions, key=lambda one: (one.learner, one.chapter)), ignored)


def refuse_doubles(submissions: list[Submission], root: Path) -> None:
    """Raise CourseError where two notebooks claim to be the same learner's same chapter."""
    seen: dict[tuple[str, str], Submission] = {}
    for one in submissions:
        other = seen.setdefault((one.learner, one.chapter), one)
        if other is not one:
            paths = " and ".join(str(each.path.relative_to(root)) for each in (other, one))
            raise CourseError(f"{one.learner} has two notebooks of chapter {one.chapter}, {paths}: keep one of them.")


def entries(folder: Path) -> list[Path]:
    """What is in a folder, without hidden things and what systems leave there."""
    return sorted(path for path in folder.iterdir() if not LEFT_OUT.match(path.name))


def notebooks(folder: Path) -> Iterator[Path]:
    """All notebooks under a folder."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not LEFT_OUT.match(name))
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix == ".ipynb" and not LEFT_OUT.match(name) and path.is_file():
                yield path


# --- whose, and which chapter ---------------------------------------------------------------------------------------


def chapter_names() -> dict[str, str]:
    """{"02_transformer": "02", ...}"""
    return {path.stem: path.stem[:2] for path in sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))}


def learner_in(stem: str) -> str:
    """The part of a file's name that is no chapter: `anna` in `anna-02_transformer`; "" where that is nothing."""
    for name in chapter_names():
        if name in stem:
            return re.sub(r"^[\s_.-]+|[\s_.-]+$", "", stem.replace(name, " ")).replace("  ", " ")
    return stem


def chapter_of(path: Path) -> str | None:
    """The chapter of a notebook, by its name or else by its exercises; "" for none, None for one that is unreadable."""
    for name, chapter in chapter_names().items():
        if name in path.stem:
            return chapter
    try:
        notebook = json.loads(path.read_bytes())
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        marked = [cell.get("metadata", {}).get("course", {}).get("exercise") for cell in cells]
        code = "\n".join("".join(cell.get("source", cell.get("input", ""))) for cell in cells)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    defined = {*marked, *re.findall(r"^(?:def|class)\s+(\w+)|^(\w+)\s*=", code, re.MULTILINE)}
    names = {name for found in defined for name in (found if isinstance(found, tuple) else (found,))}
    hits = {chapter: sum(e.name in names for e in exercises) for chapter, exercises in course_exercises().items()}
    best = max(hits, key=lambda chapter: hits[chapter], default="")
    return best if best and hits[best] else ""


# --- zips -----------------------------------------------------------------------------------------------------------


def unpack(source: Path, folder: Path) -> None:
    """Unpack the notebooks of a zip. Raises CourseError before the first where one would escape or all be too much."""
    try:
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                link = stat.S_ISLNK(member.external_attr >> 16)
                if link or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise CourseError(
                        f"{source} holds {member.filename!r}, which leads out of its folder: not unpacked."
                    )
            size = sum(member.file_size for member in members)
            if size > max(HARMLESS, DENSEST * source.stat().st_size) or size > LARGEST_UNPACKED:
                raise CourseError(
                    f"{source} would unpack to {size / 2**30:.1f} GB, more than notebooks take: not unpacked."
                )
            for member in members:
                if member.filename.endswith(".ipynb"):
                    archive.extract(member, folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
        raise CourseError(f"{source} cannot be unpacked: {error}.") from None


# --- the report's folder --------------------------------------------------------------------------------------------


def prepare_out(out: Path, source: Path, resume: bool) -> None:
    """Make the report's folder. Raises CourseError where it would mix with the submissions or with something else."""
    ours, theirs = out.resolve(), source.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise CourseError(
            f"The report {out} and the submissions {source} must not lie in each other: choose another --out."
        )
    if out.exists() and not out.is_dir():
        raise CourseError(f"{out} is a file: choose a folder for the report.")
    if out.is_dir() and any(out.iterdir()) and not (out / "parts").is_dir():
        raise CourseError(f"{out} is not empty and no earlier report: choose a new folder for the report.")
    if resume and not (out / "parts").is_dir():
        raise CourseError(f"There is nothing to resume in {out}: leave --resume out, or name that report.")
    (out / "parts").mkdir(parents=True, exist_ok=True)
    if not resume:
        for path in (out / "parts").glob("*.json"):
            path.unlink()
