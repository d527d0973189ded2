"""Find the submissions in what a teacher hands over: a folder of notebooks, of folders of learners, or a zip of either.

A folder inside is a learner, and so is a notebook or a zip beside such folders: `Zoë.ipynb`,
`02_transformer-Zoë.ipynb`, and what Canvas makes of it, `zoe_1234_98765_02_transformer-1.ipynb`. A notebook that is
called like a chapter and no more belongs to whom the outer folder is named after. Nothing is run, and no learner is
left out.
"""

import contextlib
import json
import os
import re
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from course_utils.exercises import course_exercises
from course_utils.grading.results import Submission
from course_utils.grading.unpack import LARGEST_UNPACKED, NOTEBOOK, unpack
from course_utils.places import CourseError, chapters_folder

LEFT_OUT = re.compile(r"^(\.|__MACOSX$|__pycache__$)")
# Canvas: who, whether late, a number for who, a number for the file (a long one, so no chapter's), and the file, to
# which a later try adds -1 or -2; or a text that was typed into a form.
CANVAS = re.compile(
    r"(?:(?P<name>.+?)(?:_LATE)?_(?P<id>\d+)|(?:LATE_)?(?P<anon>anon_\w{5}))_(?:\d{3,}_.+|(?:text|link)\.html)"
)
ENDING = re.compile(NOTEBOOK.pattern + r"|\.zip$", re.IGNORECASE)


class Found(NamedTuple):
    """What there is to grade."""

    submissions: list[Submission]
    ignored: list[str]  # files of no chapter and of no learner


class Notebook(NamedTuple):
    """A notebook before it is known of which chapter it is."""

    learner: str
    path: Path
    spare: (
        int  # 0 for a notebook, 1 for one with another ending, 2 for one in a zip: each counts where none before does
    )


@contextlib.contextmanager
def collected(source: Path) -> Iterator[Found]:
    """The submissions in a folder or zip; unpacked files last as long as the block.

    Raises CourseError, before anything is graded, where there are none, where two are for one learner and chapter,
    where a notebook is a link that leads out of the folder, and for a zip that cannot be unpacked safely. What is wrong
    with a zip that one of several learners handed in is that learner's affair.
    """
    if source.is_dir():
        with tempfile.TemporaryDirectory(prefix="submissions-") as folder:
            yield Search(source, source, Path(folder)).find(source.resolve().name)
    elif zipfile.is_zipfile(source):
        with tempfile.TemporaryDirectory(prefix="submissions-") as folder:
            whole = Path(folder, "whole")
            unpack(source, whole)
            yield Search(source, whole, Path(folder, "parts")).find(source.stem)
    elif source.exists():
        raise CourseError(f"{source} is neither a folder nor a zip of submissions.")
    else:
        raise CourseError(f"There is no folder or zip {source}.")


class Search:
    """The search for submissions in a folder; zips in it are unpacked in another."""

    def __init__(self, source: Path, whole: Path, scratch: Path) -> None:
        self.source = source
        self.whole = whole
        self.scratch = scratch
        self.room = LARGEST_UNPACKED
        self.n_unpacked = 0

    def find(self, name: str) -> Found:
        """The submissions, where notebooks without another name belong to the learner `name`."""
        root, name = self.innermost(self.as_folders(self.whole), name)
        files, strays = people(root, name)
        found, instead = [], {}
        for learner, own in files.items():
            notebooks, instead[learner] = self.notebooks(learner, own)
            found += notebooks
        if not found:
            raise CourseError(f"There is no notebook in {self.source}.")
        best: dict[tuple[str, str], list[Notebook]] = {}
        unclear, ignored = [], [self.shown(path) for path in strays]
        for one in found:
            chapter = chapter_of(one.path)
            if chapter:
                best.setdefault((one.learner, chapter), []).append(one)
            elif chapter is None:
                unclear.append(one)
            else:
                ignored.append(self.shown(one.path))
                instead[one.learner] = instead[one.learner] or f"{one.path.name} is of no chapter of this course"
        usual = Counter(chapter for _, chapter in best).most_common(1)
        if not usual:
            names = ", ".join([*ignored, *(self.shown(one.path) for one in unclear)][:3])
            raise CourseError(f"None of the notebooks in {name} is of a chapter of this course: {names}, ...")
        [(usually, _)] = usual
        for one in unclear:  # it cannot be read, and its learner should hear of that
            if (one.learner, usually) in best:
                ignored.append(self.shown(one.path))
            else:
                best[one.learner, usually] = [one]
        submissions = [Submission(*key, self.only(*key, several)) for key, several in best.items()]
        for learner in files.keys() - {learner for learner, _ in best}:
            submissions.append(Submission(learner, usually, root / learner, b"", instead[learner]))
        return Found(sorted(submissions, key=lambda one: (one.learner, one.chapter)), ignored)

    def as_folders(self, root: Path) -> Path:
        """The folder, with folders for the backslashes which unpacking a zip from Windows may leave in its names."""
        if not any("\\" in path.name for path in entries(root)):
            return root
        folder = self.scratch / "folders"
        for path in entries(root):
            place = folder.joinpath(*(part for part in path.name.split("\\") if part not in ("", "..")))
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.name.endswith("\\"):
                place.mkdir(exist_ok=True)
            else:
                place.symlink_to(path.resolve())
        return folder

    def innermost(self, root: Path, name: str) -> tuple[Path, str]:
        """The folder in which the learners are: submissions.zip/submissions/..., or a zip in a folder."""
        while len(inside := entries(root)) == 1:
            [only] = inside
            if only.is_dir() and (are_folders(only) or is_class(only)):
                root, name = only, only.name
            elif only.suffix.lower() == ".zip" and only.is_file() and not self.n_unpacked:
                root, name = self.unpacked(only), only.stem
            else:
                break
        return root, name

    def unpacked(self, path: Path) -> Path:
        """The folder in which a zip is unpacked."""
        self.n_unpacked += 1
        folder = self.scratch / str(self.n_unpacked)
        self.room -= unpack(path, folder, path.name, self.room)
        return folder

    def notebooks(self, learner: str, files: list[Path]) -> tuple[list[Notebook], str]:
        """The notebooks among a learner's files, and what to say where there are none."""
        found, others, trouble = [], [], ""
        for path in files:
            if not path.is_file():
                others.append(f"{path.name} (a link to nothing)")
                continue
            if NOTEBOOK.search(path.name):
                self.refuse_links(path)
                found.append(Notebook(learner, path, int(path.suffix.lower() != ".ipynb")))
            elif path.suffix.lower() == ".zip":
                self.refuse_links(path)
                try:
                    inside = list(all_files(self.unpacked(path)))
                except CourseError as error:
                    trouble = trouble or str(error).rstrip(".")
                    continue
                own = [Notebook(learner, one, 2) for one in inside if NOTEBOOK.search(one.name)]
                found += own
                if not own:
                    others.append(f"{path.name} with {listed([one.name for one in inside])}")
            else:
                others.append(path.name)
        if found or trouble:
            return found, trouble
        if not others:
            return [], "nothing was handed in"
        return [], f"there is no notebook in what was handed in, only {listed(others)}"

    def only(self, learner: str, chapter: str, several: list[Notebook]) -> Path:
        """The one that counts. Raises CourseError where two have the same right to be the learner's chapter."""
        first = min(one.spare for one in several)
        paths = [one.path for one in several if one.spare == first]
        if len(paths) > 1:
            both = " and ".join(self.shown(path) for path in paths[:2])
            raise CourseError(f"{learner} has two notebooks of chapter {chapter}, {both}: keep one of them.")
        return paths[0]

    def refuse_links(self, path: Path) -> None:
        """Raise CourseError for what leads to where its learner could not have written."""
        if not any(path.resolve().is_relative_to(place.resolve()) for place in (self.whole, self.scratch)):
            raise CourseError(f"{path} is a link that leads out of the submissions: put the notebook itself there.")

    def shown(self, path: Path) -> str:
        """A path as the teacher knows it."""
        return str(path.relative_to(self.whole if path.is_relative_to(self.whole) else self.scratch))


def people(root: Path, name: str) -> tuple[dict[str, list[Path]], list[Path]]:
    """The learners and their files, and what is nobody's; what has no other name belongs to `name`."""
    files: dict[tuple[str, str], list[Path]] = {}  # by name, and by Canvas' number for those who have one
    strays = []
    inside = entries(root)
    notebooks = [path for path in inside if path.is_file() and NOTEBOOK.search(path.name)]
    folders = {path: list(all_files(path)) for path in inside if path.is_dir()}
    if any(not learner_in(path.name) for path in notebooks) and not any(
        NOTEBOOK.search(path.name) for own in folders.values() for path in own
    ):
        folders = {}  # one learner's folder, and what else that learner keeps in it
    for entry in inside:
        match = CANVAS.fullmatch(entry.name)
        if entry.is_dir():
            if entry in folders:
                files.setdefault((normal(entry.name), ""), []).extend(folders[entry])
        elif match:
            files.setdefault((normal(match["name"] or match["anon"]), match["id"] or ""), []).append(entry)
        elif entry in notebooks or entry.suffix.lower() == ".zip":
            files.setdefault((normal(learner_in(entry.name) or name), ""), []).append(entry)
        else:
            strays.append(entry)
    same = Counter(learner for learner, _ in files)
    return {f"{who}_{number}" if number and same[who] > 1 else who: own for (who, number), own in files.items()}, strays


def are_folders(folder: Path) -> bool:
    """Whether there are folders, and beside several of them nothing that could be handed in."""
    inside = entries(folder)
    folders = sum(path.is_dir() for path in inside)
    others = any(NOTEBOOK.search(path.name) or path.suffix.lower() == ".zip" for path in inside)
    return folders == len(inside) > 0 or (folders > 1 and not others)


def is_class(folder: Path) -> bool:
    """Whether notebooks in a folder are several learners': Canvas says so, or a chapter is there under two names."""
    files = [path for path in entries(folder) if path.is_file()]
    if any(CANVAS.fullmatch(path.name) for path in files):
        return True
    names = [learner_in(path.name) for path in files if NOTEBOOK.search(path.name)]
    if "" in names or len(set(names)) < 2:
        return False
    chapters = Counter(chapter_of(path) for path in files if NOTEBOOK.search(path.name))
    return any(chapter and count > 1 for chapter, count in chapters.items())


def entries(folder: Path) -> list[Path]:
    """What is in a folder, without hidden things and what systems leave there."""
    return sorted(path for path in folder.iterdir() if not LEFT_OUT.match(path.name))


def all_files(folder: Path) -> Iterator[Path]:
    """All files under a folder, without hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not LEFT_OUT.match(name))
        yield from (Path(place, name) for name in sorted(files) if not LEFT_OUT.match(name))


def listed(names: list[str]) -> str:
    """A few of the names; "nothing" where there are none."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3) or "nothing"


def normal(name: str) -> str:
    """A name the same, however a system spells it."""
    return unicodedata.normalize("NFC", name)


# --- whose, and which chapter ---------------------------------------------------------------------------------------


def chapter_names() -> dict[str, str]:
    """{"02_transformer": "02", ...}"""
    return {path.stem: path.stem[:2] for path in sorted(chapters_folder().glob("[0-9][0-9]_*.ipynb"))}


def learner_in(file_name: str) -> str:
    """The part of a file's name that is no chapter: `anna` in `anna-02_transformer.ipynb`; "" where that is nothing."""
    stem = ENDING.sub("", file_name)
    for name in chapter_names():
        rest, found = re.subn(re.escape(name), " ", stem, flags=re.IGNORECASE)
        if found:
            return re.sub(r"^[\s_.-]+|[\s_.-]+$", "", rest).replace("  ", " ")
    return stem


def chapter_of(path: Path) -> str | None:
    """The chapter of a notebook, by its name or else by its exercises; "" for none, None for one that is unreadable."""
    for name, chapter in chapter_names().items():
        if name.lower() in path.name.lower():
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
