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
from course_utils.grading.grade import grade_one
from course_utils.grading.results import Settings
from course_utils.places import CourseError
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
        assert all(submission.read() and not submission.missing for submission in one.submissions)
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
        assert [(one.learner, one.chapter) for one in given] == [("a", "02"), ("b", "02")]
        assert [one.missing for one in given] == ["", "y.ipynb is of no chapter of this course"]
        assert ignored == [os.path.join("b", "y.ipynb")]


def test_another_ending_hides_no_notebook(tmp_path: Path):
    files = {"a/02_transformer.IPYNB": NOTEBOOK, "b/02_transformer.ipynb.txt": NOTEBOOK, "Zoë.ipynb.TXT": NOTEBOOK}
    files |= {"c/02_transformer.ipynb": NOTEBOOK, "c/02_transformer.ipynb.txt": b"an older one", "d.IPYNB": NOTEBOOK}
    assert found(put(tmp_path, files)) == [(learner, "02") for learner in ("Zoë", "a", "b", "c", "d")]


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


def missing(source: Path) -> dict[str, str]:
    """What is said of the learners without a notebook."""
    with collected(source) as one:
        assert {submission.chapter for submission in one.submissions} == {"02"}
        assert all(submission.read() or submission.missing for submission in one.submissions)
        return {submission.learner: submission.missing for submission in one.submissions if submission.missing}


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


WITHOUT = {
    "ben/answers.py": b"x = 1",
    "cem/.DS_Store": b"",
    "dan/work.zip": archive({"main.py": b"", "notes.txt": b""}),
    "eve/work.zip": b"PK of a kind",
    "fay/a.py": b"",
    "fay/b/c.txt": b"",
    "fay/d.7z": b"",
    "fay/e.html": b"",
    "hal_1234_98765_answers.py": b"",
    "ida_1235_text.html": b"",
}
SAID = {
    "ben": "there is no notebook in what was handed in, only answers.py",
    "cem": "nothing was handed in",
    "dan": "there is no notebook in what was handed in, only work.zip with main.py, notes.txt",
    "eve": "work.zip cannot be unpacked: File is not a zip file",
    "fay": "there is no notebook in what was handed in, only a.py, d.7z, e.html and 1 more",
    "hal": "there is no notebook in what was handed in, only hal_1234_98765_answers.py",
    "ida": "there is no notebook in what was handed in, only ida_1235_text.html",
}


@pytest.mark.parametrize("wrapper", ["", "class of 2026/"])
def test_every_learner_gets_a_row(tmp_path: Path, wrapper: str):
    files = {wrapper + name: content for name, content in {**WITHOUT, "anna/02_transformer.ipynb": NOTEBOOK}.items()}
    (put(tmp_path / "all", files) / wrapper / "gus").mkdir()
    assert missing(tmp_path / "all") == SAID | {"gus": "nothing was handed in"}
    assert missing(zipped(tmp_path / "all.zip", files | {f"{wrapper}gus/": b""})) == SAID | {
        "gus": "nothing was handed in"
    }


def test_a_row_without_a_notebook_is_graded_without_a_process(tmp_path: Path):
    put(tmp_path, {"anna/02_transformer.ipynb": NOTEBOOK, "ben/answers.py": b""})
    with collected(tmp_path) as one:
        [ben] = [submission for submission in one.submissions if submission.learner == "ben"]
    result = grade_one(ben.with_content(), Settings(sandbox="no such thing"))
    assert {(e.state, e.message.split(": ")[1]) for e in result.exercises} == {("error", SAID["ben"])}
    assert result.problems == (SAID["ben"],)


def test_one_learner_s_other_folders_are_no_learners(tmp_path: Path):
    files = {"02_transformer.ipynb": NOTEBOOK, "figures/loss.png": b"", "helper.py": b""}
    with collected(put(tmp_path / "anna", files)) as (given, ignored):
        assert [(one.learner, one.missing) for one in given] == [("anna", "")]
        assert ignored == ["helper.py"]


def test_notebooks_in_zips_in_folders(tmp_path: Path):
    packed = archive({"work\\02_transformer.ipynb": NOTEBOOK, "work\\data.csv": b""})
    files = {"anna/02_transformer.ipynb": NOTEBOOK, "anna/02.zip": packed, "ben/all.zip": packed, "cem.ZIP": packed}
    put(tmp_path / "all", files)
    assert found(tmp_path / "all") == [("anna", "02"), ("ben", "02"), ("cem", "02")]
    whole = zipped(tmp_path / "whole.zip", files)
    assert found(whole) == [("anna", "02"), ("ben", "02"), ("cem", "02")]
    assert found(put(tmp_path / "download", {"whole.zip": whole.read_bytes()})) == found(whole)
    with collected(whole) as (given, _):
        assert "whole" in str(given[0].path) and given[0].read() == NOTEBOOK


def test_one_learner_s_hostile_zip_is_that_learner_s_affair(tmp_path: Path):
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as inner, inner.open("02_transformer.ipynb", "w") as file:
        for _ in range(600):
            file.write(bytes(2**20))
    files = {"anna/02_transformer.ipynb": NOTEBOOK, "ben/a.zip": archive({"../../evil.ipynb": NOTEBOOK})}
    assert missing(put(tmp_path / "all", {**files, "cem/a.zip": bomb.getvalue()})) == {
        "ben": "a.zip holds '../../evil.ipynb', which leads out of its folder: not unpacked",
        "cem": "a.zip would unpack to 0.6 GB, more than notebooks take: not unpacked",
    }
    assert not list(tmp_path.rglob("evil*"))


CANVAS = {
    "smithanna_1234_98765_02_transformer.ipynb": NOTEBOOK,
    "smithanna_1234_98766_04_induction-1.ipynb": NOTEBOOK,
    "jones_ben_1235_98767_02_transformer-2.ipynb": NOTEBOOK,
    "李_LATE_1236_98768_my_answers-1.ipynb": NOTEBOOK,
    "lee_1237_98769_lab.ipynb": NOTEBOOK,
    "lee_LATE_1238_98770_lab-1.ipynb.txt": NOTEBOOK,
    "roe_1239_98771_work.zip": archive({"02_transformer.ipynb": NOTEBOOK}),
    "anon_x7Yz1_98772_02_transformer-1.ipynb": NOTEBOOK,
    "LATE_anon_x7Yz2_98773_02_transformer.ipynb": NOTEBOOK,
}


@pytest.mark.parametrize("wrapper", ["", "submissions/"])
def test_canvas_says_whose_they_are(tmp_path: Path, wrapper: str):
    files = {wrapper + name: content for name, content in CANVAS.items()}
    assert found(zipped(tmp_path / "submissions.zip", files)) == [
        ("anon_x7Yz1", "02"),
        ("anon_x7Yz2", "02"),
        ("jones_ben", "02"),
        ("lee_1237", "02"),
        ("lee_1238", "02"),
        ("roe", "02"),
        ("smithanna", "02"),
        ("smithanna", "04"),
        ("李", "02"),
    ]


def test_a_class_without_folders_in_one_folder(tmp_path: Path):
    files = {"class/Zoë.ipynb": NOTEBOOK, "class/02_transformer-anna.ipynb": NOTEBOOK}
    assert found(zipped(tmp_path / "class.zip", files)) == [("Zoë", "02"), ("anna", "02")]


def test_a_zip_from_windows_or_macos(tmp_path: Path):
    """Backslashes, and names in UTF-8 that are not marked as such."""
    names = ["class\\anna\\02_transformer.ipynb", "class\\Zoë\\02_transformer.ipynb", "class\\ben\\"]
    path = zipped(tmp_path / "all.zip", {name.replace("Zoë", "Zo__"): NOTEBOOK for name in names[:2]})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(names[2], b"")
    path.write_bytes(path.read_bytes().replace(b"Zo__", "Zoë".encode()))
    with collected(path) as (given, _):
        assert [(one.learner, one.missing) for one in given] == [
            ("Zoë", ""),
            ("anna", ""),
            ("ben", "nothing was handed in"),
        ]
    with zipfile.ZipFile(path) as archive:  # as the guide has it
        archive.extractall(tmp_path / "all")
    if os.name == "posix":
        with collected(tmp_path / "all") as (given, _):
            assert [one.learner for one in given] == ["Zo├½", "anna", "ben"]
            assert all(one.read() == NOTEBOOK for one in given if not one.missing)


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
