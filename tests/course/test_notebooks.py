"""The committed notebooks: built from the sources as they are, and clean. tests/test_colab.py and nbval run them."""

from pathlib import Path

import nbformat
import pytest

from course_utils.build import render
from tests.conftest import ROOT

NOTEBOOKS = sorted((*(ROOT / "chapters").glob("[0-9]*.ipynb"), *(ROOT / "solutions").glob("[0-9]*.ipynb")))


def test_notebooks_are_current() -> None:
    stale = [path.name for path, text in render(ROOT).items() if not path.is_file() or path.read_text("utf-8") != text]
    assert not stale, f"run `course build`: {stale}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_notebook_is_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        assert set(cell.metadata) <= {"tags", "course"}
