"""Results of a real language model: from a run, or stored, and the same in both cases."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from course_utils import fetching, real
from solutions.ch02_transformer import Transformer
from tests.conftest import ROOT
from tests.support.real_parts import differences, is_constant

FOUND: dict[str, Any] = {"table": torch.tensor([[1 / 3, 2.0]]), "one": 123456.0, "texts": ["a b", "é"], "n": 30}


def test_every_result_that_a_lesson_shows_is_stored_and_no_other() -> None:
    shown = set()
    for lesson in (ROOT / "chapters" / "src").glob("[0-9]*.md"):
        shown |= set(re.findall(r'= results\("(\d\d\.\w+)"', lesson.read_text(encoding="utf-8")))
    stored = {name for file in real.STORED.glob("*.json") for name in json.loads(file.read_text(encoding="utf-8"))}
    assert shown == stored


def test_stored_and_new_results_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "STORED", tmp_path)
    monkeypatch.setenv(real.RECORD, str(tmp_path / "99.json"))
    new = real.results("99.some", "a model", lambda model: FOUND)
    assert capsys.readouterr().out == ""
    stored = real.results("99.some", None, lambda model: FOUND)
    assert capsys.readouterr().out == "(stored results)\n"
    assert new.keys() == stored.keys() == FOUND.keys() and new["texts"] == stored["texts"] == FOUND["texts"]
    for found in (new, stored):
        torch.testing.assert_close(found["table"], torch.tensor([[0.3333, 2.0]]))
        assert found["one"].item() == 123500 and found["n"].item() == 30


def test_without_the_model_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(fetching.FOLDER, str(tmp_path))
    assert real.real_model(Transformer) is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "course models fetch smollm2-135m" in said and "stored results" in said


def test_differences_are_found_in_numbers_and_texts() -> None:
    stored = {"a": {"x": [1.0, 200.0], "y": "same"}}
    assert not list(differences({"a": {"x": [1.01, 201.0], "y": "same"}}, stored, near=0.02))
    assert list(differences({"a": {"x": [1.05, 200.0], "y": "other"}}, stored, near=0.02)) == [
        " a x[0]: 1.05 for 1.0",
        " a y: 'other' for 'same'",
    ]
    assert list(differences({}, stored, near=0.02))


@pytest.mark.parametrize(
    ("line", "is_one"), [("N = 3", True), ("A, B = 1, 2", True), ("a[:, 0] = 0", False), ("b = a", False)]
)
def test_constants_of_a_chapter_need_nothing_of_it(line: str, is_one: bool) -> None:
    assert is_constant(ast.parse(line).body[0]) == is_one
