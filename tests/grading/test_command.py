"""`course grade` as it is typed: what it refuses at once, and what it says."""

import json
from pathlib import Path

import pytest

from course_utils.cli import main
from course_utils.grading import sandbox
from course_utils.grading.results import from_json
from tests.grading.submissions import packed, replaced, untouched, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "all" / "Zoë" / "02_transformer.ipynb"
    path.parent.mkdir(parents=True)
    path.write_bytes(packed(replaced(untouched(), written())))
    return tmp_path / "all"


@pytest.mark.parametrize(
    "options, words",
    [
        (["nowhere", "--out", "report"], "There is no folder or zip nowhere."),
        (["all", "--out", "all/report"], "must not lie in each other"),
        (["all", "--out", "report", "--resume"], "nothing to resume"),
        (["all", "--out", "report", "--jobs", "0"], "a number above 0"),
        (["all", "--out", "report", "--timeout", "nan"], "a number above 0"),
        (["all", "--out", "report", "--weights", "weights.toml"], "weights.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_sentence_says_what_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
):
    monkeypatch.chdir(folder.parent)
    assert main(["grade", *options]) == 2
    told = capsys.readouterr()
    assert words in told.err and len(told.err.strip().splitlines()) == 1 and not told.out
    assert sorted(path.name for path in folder.parent.iterdir()) == ["all"]


@pytest.mark.slow
def test_without_a_sandbox_there_is_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sandbox, "choose", lambda: ("none", "it is not installed"))
    out = folder.parent / "report"
    assert main(["grade", str(folder), "--out", str(out), "--jobs", "1"]) == 0
    told = capsys.readouterr()
    assert told.err.count("Warning: no sandbox (it is not installed).") == 1
    assert "1/1" in told.err and "notebook" in told.err  # the progress bar
    assert f"1 notebook graded; the report: {out / 'report.html'}" in told.out
    data = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert data["sandbox"] == "none"
    [result] = from_json(data)
    states = {one.exercise: one.state for one in result.exercises}
    assert (result.learner, states["causal_mask"], states["MLP"]) == ("Zoë", "correct", "not written yet")
