"""One place says where computing happens, and the chapters stay on the CPU."""

import ast
from pathlib import Path

import nbformat
import pytest

from course_utils.cells import plain_python
from course_utils.device import device
from tests.conftest import ROOT


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_device(monkeypatch: pytest.MonkeyPatch, there: bool, chosen: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert device() == chosen


def names_cuda(node: ast.AST) -> bool:
    """Whether the code names CUDA, but for asking if it is there, and what stands below that question."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "torch.cuda.is_available()":
        return any(names_cuda(child) for child in node.orelse)
    if isinstance(node, ast.Attribute) and node.attr == "cuda":
        return True
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda"):
        return True
    return any(names_cuda(child) for child in ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("[0-9]*.ipynb")), ids=lambda path: path.stem)
def test_chapters_stay_on_the_cpu(path: Path) -> None:
    """A tensor of the CPU must not meet a model on the GPU only because a machine has one."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not [source for source in cells if names_cuda(ast.parse(plain_python(source)))]


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("model.cuda()", True),
        ("x.to('cuda:0')", True),
        ("if torch.cuda.is_available():\n    model.cuda()\nelse:\n    print('none')", False),
        ("if torch.cuda.is_available():\n    pass\nelse:\n    model.cuda()", True),
        ("model.to('cpu')", False),
    ],
)
def test_names_cuda(code: str, named: bool) -> None:
    assert names_cuda(ast.parse(code)) == named
