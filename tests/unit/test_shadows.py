"""Files of a learner's that are called like a module: they are named, and a notebook beside them says so."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from course_utils.shadows import shadows
from tests.conftest import ROOT


def put(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('not the one that was meant')\n")
    return folder


@pytest.mark.parametrize(
    "name",
    ["random.py", "tokenize.py", "queue.py", "torch.py", "plotly/__init__.py", "course_utils.py", "solutions.py"],
)
def test_a_module_s_name_is_seen(tmp_path: Path, name: str) -> None:
    assert shadows(put(tmp_path, name)) == [tmp_path / name.removesuffix("/__init__.py")]


@pytest.mark.parametrize(
    "name", ["helper.py", "test.py", "random.txt", "torch/notes.txt", "__init__.py", "my torch.py"]
)
def test_other_names_are_not(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, name)
    assert shadows(tmp_path) == []
    monkeypatch.syspath_prepend(tmp_path)
    assert shadows(tmp_path) == []


def test_the_course_does_not_shadow_itself() -> None:
    assert shadows(ROOT) == shadows(ROOT / "solutions") == shadows(ROOT / "nowhere") == []


def test_a_notebook_beside_them_says_so(tmp_path: Path) -> None:
    """The kernel starts, the course's extension names them, and the standard library is what it is."""
    put(
        tmp_path,
        *(f"{name}.py" for name in sys.stdlib_module_names if name not in sys.builtin_module_names),
        "torch.py",
    )
    (tmp_path / "helper.py").write_text("mine = 5")
    cells = ["%load_ext course_utils", "import random, helper; print(random.randrange(1), helper.mine)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    first, second = ("".join(output.text for output in cell.outputs) for cell in notebook.cells)
    assert "torch.py has the name of a module that Python or the course needs" in first
    assert "\ntokenize.py has the name of" in first and str(tmp_path) not in first
    assert second == "0 5\n"
