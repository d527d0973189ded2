"""Stored dictionaries: written, read again, and refused where they are damaged."""

from pathlib import Path

import pytest
import torch

from course_utils import saved_dictionaries as saved


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(saved, "FOLDER", tmp_path)
    saved.save("small", {"W": torch.arange(4.0)}, {"k": 3}, {"l0": 2.5}, "# small", {"history": [1, 2]})
    return tmp_path


def test_what_is_written_is_read_again(folder: Path) -> None:
    config, weights = saved.read("small")
    assert config == {"k": 3} and weights["W"].dtype == torch.float32 and weights["W"].tolist() == [0, 1, 2, 3]
    assert saved.shipped() == ["small"] and saved.card("small")["l0"] == "2.5"
    assert saved.record("small", "history") == [1, 2]
    saved.add_record("small", "more", {"a": 1})
    assert saved.record("small", "more") == {"a": 1}


def test_a_damaged_file_and_an_unknown_name_are_refused(folder: Path) -> None:
    path = folder / "small" / saved.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(saved.DictionaryError, match="SHA-256"):
        saved.read("small")
    with pytest.raises(saved.DictionaryError, match="small"):
        saved.read("smal")
