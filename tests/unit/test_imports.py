"""Imports go one way: the drawing in CONTRIBUTING.md holds, and `solutions` stands above all of `course_utils`."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "course_utils"
# Made on demand, when there is a kernel, or to keep the solutions from the learner's code.
ON_DEMAND = {"course_utils": {"shadows", "unwritten"}}
NAMES_SOLUTIONS = {"grading.server", "grading.tricks"}


def drawing() -> list[set[str]]:
    """The lines of the drawing, each as the modules and folders in it."""
    text = re.search(r"```text\n(config .*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert text, "CONTRIBUTING.md has no drawing of imports"
    lines = []
    for line in text[1].splitlines():
        words = re.split(r"\s{2,}", line)[0]
        folder, _, names = words.rpartition(": ")
        lines.append({f"{folder}.{name}".strip(".").rstrip("/") for name in names.split()})
    return lines


def modules() -> dict[str, Path]:
    paths = [path for path in PACKAGE.rglob("*.py") if "models" not in path.parts]
    return {module_name(path): path for path in sorted(paths)}


def module_name(path: Path) -> str:
    """`checks.running` of course_utils/checks/running.py; that of a package for its `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "course_utils"


LINES, MODULES = drawing(), modules()


def line_of(module: str) -> int:
    """The line that a module stands in, by itself or with its folder; a package's is that of `running`."""
    if module == "checks":
        module = "checks.running"
    for number, line in enumerate(LINES):
        if line & {module, *(".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1))}:
            return number
    raise AssertionError(f"course_utils/{module.replace('.', '/')}.py is not in the drawing of CONTRIBUTING.md")


def imported(path: Path) -> set[str]:
    """What a file imports of ours, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            inside = (node.module or "").removeprefix("course_utils").lstrip(".")
            whole = {name: f"{node.module}.{name}" for name in names if f"{inside}.{name}".strip(".") in MODULES}
            names = [whole.get(name, node.module) for name in names]
        found |= {name for name in names if name and name.split(".")[0] in ("course_utils", "solutions", "tests")}
    return {name.removeprefix("course_utils.") for name in found}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_the_lines_above_its_own(module: str) -> None:
    needs = imported(MODULES[module])
    assert not {name for name in needs if name.split(".")[0] == "tests"}
    assert module in NAMES_SOLUTIONS or not {name for name in needs if name.split(".")[0] == "solutions"}
    ours = {name for name in needs if name.split(".")[0] not in ("solutions", "tests")} - ON_DEMAND.get(module, set())
    folder = module.rpartition(".")[0]
    is_package = MODULES[module].name == "__init__.py"
    own = f"{module}." if is_package else f"{folder}." if folder not in ("", "checks") else "nothing"
    for name in ours:
        beside = name.startswith(own)
        assert beside or line_of(name) < line_of(module), f"{module} imports {name}"


def test_solutions_import_neither_tests_nor_checks() -> None:
    for path in (ROOT / "solutions").rglob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] in ("tests", "checks")}, path.name


def test_the_drawing_names_what_is_there() -> None:
    known = {*MODULES, *(name.rpartition(".")[0] for name in MODULES)}
    assert not [name for line in LINES for name in line if name not in known]
