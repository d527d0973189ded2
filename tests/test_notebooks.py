"""The committed notebooks: built from the sources as they are, clean, and "Run All" goes through.

The solution notebooks are run by nbval, in `make test`.
"""

import time
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from course_utils.build import render
from course_utils.cli import execute

LEARNERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
ALL = [*LEARNERS, *sorted((ROOT / "solutions").glob("[0-9][0-9]_*.ipynb"))]


def test_notebooks_are_current() -> None:
    stale = [path.name for path, text in render(ROOT).items() if not path.is_file() or path.read_text("utf-8") != text]
    assert not stale, f"run `course build`: {stale}"


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_notebook_is_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        assert set(cell.metadata) <= {"tags", "course"}


@pytest.mark.slow
@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.name)
def test_run_all_on_the_untouched_notebook(path: Path) -> None:
    """It completes, with nothing worse than "not written yet" anywhere, and in less than two minutes."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    execute(notebook, {})
    assert time.perf_counter() - start < 120
    errors = [(o, cell.source) for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    worse = [f"{e.ename}: {e.evalue}\n{source}" for e, source in errors if "not written yet" not in e.evalue]
    assert not worse, "\n\n".join(worse)
