"""The committed notebooks: built from the sources as they are, and clean, and the solutions run to their end.

A run is kept for the site, and until something changes that it depends on (docs/site/executed.py). Learners' notebooks
are run in tests/course/test_colab.py.
"""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from course_utils.build import render
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))

from executed import common_hash, executed

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


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_solution_notebook_runs(path: Path) -> None:
    try:
        executed(path.stem, path.read_text(encoding="utf-8"), common_hash(ROOT))
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: a cell failed.\n{error}", pytrace=False)


def test_a_cell_that_fails_is_named_and_its_run_not_kept(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1", "x / 0")]
    text = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
    with pytest.raises(CellExecutionError, match=r"x / 0(.|\n)*ZeroDivisionError"):
        executed("00_toy", text, "", tmp_path)
    assert list(tmp_path.iterdir()) == []
