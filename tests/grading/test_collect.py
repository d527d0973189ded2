"""Finding the submissions: whose they are, of which chapter, and what is refused before any work starts."""

import io
import json
import os
import stat
import unicodedata
import zipfile
from pathlib import Path

import pytest

from course_utils.grading.collect import collected, prepare_out
from course_utils.notebook import CourseError
from tests.grading import submissions
from tests.grading.submissions import packed, replaced, untouched, written

NOTEBOOK = packed(untouched())


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def found(source: Path) -> list[tuple[str, str]]:
    with collected(source) as one:
        assert all(submission.read() for submission in one.submissions)
        return [(submission.learner, submission.chapter) for submission in one.submissions]


FOLDERS = {
    "Zoë/02_transformer.ipynb": NOTEBOOK,
    "Zoë/extra/04_induction (1).ipynb": NOTEBOOK,
    "Zoë/.ipynb_checkpoints/02_transformer-checkpoint.ipynb": NOTEBOOK,
    "Zoë/helper.py": b"1/0",
    "李/my answers.ipynb": NOTEBOOK,
}
EXPECTED = [("Zoë", "02"), ("Zoë", "04"), ("李", "02")]


def test_folders_of_learners(tmp_path: Path):
    assert found(put(tmp_path, FOLDERS)) == EXPECTED


@pytest.mark.parametrize("wrapper", ["", "class of 2026/"])
def test_a_zip_of_them(tmp_path: Path, wrapper: str):
    assert found(zipped(tmp_path / "all.zip", {wrapper + name: text for name, text in FOLDERS.items()})) == EXPECTED


def test_names_are_the_same_however_a_system_spells_them(tmp_path: Path):
    decomposed = unicodedata.normalize("NFD", "Zoë")
    assert found(put(tmp_path, {f"{decomposed}/02_transformer.ipynb": NOTEBOOK})) == [("Zoë", "02")]


def test_notebooks_without_folders(tmp_path: Path):
    files = {"Zoë.ipynb": NOTEBOOK, "02_transformer-anna.ipynb": NOTEBOOK, "ben_04_induction.ipynb": NOTEBOOK}
    assert found(put(tmp_path, files)) == [("Zoë", "02"), ("anna", "02"), ("ben", "04")]


def test_the_chapters_of_one_learner(tmp_path: Path):
    files = {"02_transformer.ipynb": NOTEBOOK, "04_induction.ipynb": NOTEBOOK}
    assert found(put(tmp_path / "anna", files)) == [("anna", "02"), ("anna", "04")]


def test_a_chapter_is_known_by_its_exercises(tmp_path: Path):
    notebook = replaced(untouched(), written())
    for cell in notebook["cells"]:
        cell["metadata"] = {}
    files = {"a/x.ipynb": packed(notebook), "b/y.ipynb": packed(notebook | {"cells": [submissions.cell("print(1)")]})}
    with collected(put(tmp_path, files)) as (given, ignored):
        assert [(one.learner, one.chapter) for one in given] == [("a", "02")]
        assert ignored == [os.path.join("b", "y.ipynb")]


def test_an_unreadable_notebook_counts_for_the_chapter_of_the_others(tmp_path: Path):
    files = {"a/02_transformer.ipynb": NOTEBOOK, "b/mine.ipynb": NOTEBOOK[:1000]}
    assert found(put(tmp_path, files)) == [("a", "02"), ("b", "02")]


def test_none(tmp_path: Path):
    with pytest.raises(CourseError, match="There is no notebook in"):
        found(put(tmp_path, {"anna/notes.txt": b""}))
    with pytest.raises(CourseError, match="There is no folder or zip"):
        found(tmp_path / "elsewhere")
    with pytest.raises(CourseError, match="neither a folder nor a zip"):
        found(tmp_path / "anna" / "notes.txt")


def test_two_for_one_chapter(tmp_path: Path):
    files = {"anna/02_transformer.ipynb": NOTEBOOK, "anna/02_transformer-Copy1.ipynb": NOTEBOOK}
    with pytest.raises(CourseError, match=r"anna has two notebooks of chapter 02, .*Copy1.* and .*: keep one"):
        found(put(tmp_path, files))


def test_a_link_to_what_somebody_else_wrote(tmp_path: Path):
    put(tmp_path, {"outside.ipynb": NOTEBOOK, "all/anna/02_transformer.ipynb": NOTEBOOK})
    (tmp_path / "all" / "ben").mkdir()
    (tmp_path / "all" / "ben" / "02_transformer.ipynb").symlink_to(tmp_path / "outside.ipynb")
    with pytest.raises(CourseError, match="a link that leads out"):
        found(tmp_path / "all")


@pytest.mark.parametrize(
    "name", ["../evil.ipynb", "/evil.ipynb", "a/../../evil.ipynb", "..\\evil.ipynb", "C:/evil.ipynb"]
)
def test_a_zip_that_escapes(tmp_path: Path, name: str):
    with pytest.raises(CourseError, match="leads out of its folder"):
        found(zipped(tmp_path / "all.zip", {"a/02_transformer.ipynb": NOTEBOOK, name: NOTEBOOK}))
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.parent.glob("evil*"))


def test_a_zip_with_a_link(tmp_path: Path):
    link = zipfile.ZipInfo("a/02_transformer.ipynb")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(CourseError, match="leads out of its folder"):
        found(tmp_path / "all.zip")


def test_a_zip_that_is_a_bomb(tmp_path: Path):
    path = zipped(tmp_path / "all.zip", {"a/02_transformer.ipynb": NOTEBOOK})
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("b/02_transformer.ipynb", "w") as file,
    ):
        for _ in range(600):
            file.write(bytes(2**20))
    with pytest.raises(CourseError, match=r"would unpack to 0\.6 GB"):
        found(path)


def test_a_zip_that_says_less_than_it_holds(tmp_path: Path):
    """What it says is what is unpacked, at most."""
    path = zipped(tmp_path / "all.zip", {"a/02_transformer.ipynb": bytes(10**6)})
    content = path.read_bytes().replace((10**6).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(CourseError, match="cannot be unpacked"):
        found(path)


def test_a_damaged_zip(tmp_path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/02_transformer.ipynb", NOTEBOOK)
    content = bytearray(buffer.getvalue())
    content[2000:2100] = bytes(100)
    (tmp_path / "all.zip").write_bytes(content)
    with pytest.raises(CourseError, match="cannot be unpacked"):
        found(tmp_path / "all.zip")


# --- the report's folder --------------------------------------------------------------------------------------------


def test_the_report_is_apart_from_the_submissions(tmp_path: Path):
    source = put(tmp_path / "all", {"a/02_transformer.ipynb": NOTEBOOK})
    for out in (source / "report", source, tmp_path):
        with pytest.raises(CourseError, match="must not lie in each other"):
            prepare_out(out, source, resume=False)
    assert not (source / "report").exists()


def test_the_report_overwrites_only_a_report(tmp_path: Path):
    source = put(tmp_path / "all", {"a/02_transformer.ipynb": NOTEBOOK})
    out = put(tmp_path / "out", {"thesis.txt": b"years of work"})
    with pytest.raises(CourseError, match="is not empty and no earlier report"):
        prepare_out(out, source, resume=False)
    with pytest.raises(CourseError, match="is a file"):
        prepare_out(out / "thesis.txt", source, resume=False)
    with pytest.raises(CourseError, match="nothing to resume"):
        prepare_out(tmp_path / "new", source, resume=True)
    prepare_out(tmp_path / "new", source, resume=False)
    (tmp_path / "new" / "parts" / "one.json").write_text(json.dumps({}))
    prepare_out(tmp_path / "new", source, resume=True)
    assert (tmp_path / "new" / "parts" / "one.json").exists()
    prepare_out(tmp_path / "new", source, resume=False)
    assert not (tmp_path / "new" / "parts" / "one.json").exists()
