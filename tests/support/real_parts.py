"""The part of a chapter that is about a real language model, from top to bottom, with the reference solutions.

python -m tests.support.real_parts 04        stores what it finds, for those who have no such model
"""

import ast
import builtins
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import torch
from IPython.core.inputtransformer2 import TransformerManager

from course_utils.overview import REAL
from course_utils.real import RECORD, STORED
from solutions.ch02_transformer import Transformer
from tests.conftest import ROOT

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
TYPES = ("Any", "Callable", "Tensor")


def statements(chapter: str) -> Iterator[ast.stmt]:
    """The definitions of a chapter up to its real part, and all that this part does."""
    (path,) = (ROOT / "solutions").glob(f"{chapter}_*.ipynb")
    inside = False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (titles := re.findall(r"^## .*", cell.source, re.MULTILINE)):
            inside = titles[-1].startswith(f"## {REAL}")
        if cell.cell_type == "code":
            body = ast.parse(TransformerManager().transform_cell(cell.source)).body
            yield from (node for node in body if inside or isinstance(node, DEFINITIONS) or is_constant(node))


def is_constant(node: ast.stmt) -> bool:
    """An assignment to names that reads nothing but types."""
    if not isinstance(node, ast.Assign) or any(isinstance(target, ast.Subscript) for target in node.targets):
        return False
    parts = list(ast.walk(node.value))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return not any(isinstance(part, ast.Call | ast.comprehension) for part in parts) and all(
        name in TYPES or hasattr(builtins, name) for name in names
    )


def run(chapter: str, record: Path) -> tuple[dict[str, Any], float]:
    """What the part finds, and how many seconds of processor time it takes."""
    module = ModuleType(f"real_part_of_{chapter}")
    space = vars(module)
    space["Transformer"] = Transformer  # chapter 02 writes its own
    sys.modules[module.__name__] = module  # where its converter is looked for
    os.environ[RECORD] = str(record)
    start = time.process_time()
    try:
        for node in statements(chapter):
            exec(
                compile(ast.Module([node], []), f"chapter {chapter}, line {node.lineno} of a cell", "exec"),
                space,
            )
    finally:
        del os.environ[RECORD]
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found, time.process_time() - start


def differences(found: Any, stored: Any, near: float, where: str = "") -> Iterator[str]:
    """The places at which numbers differ by more than `near`, of their own size and in all, or texts at all."""
    if isinstance(stored, dict):
        if found.keys() != stored.keys():
            yield f"{where}: {sorted(found)} for {sorted(stored)}"
            return
        for name in stored:
            yield from differences(found[name], stored[name], near, f"{where} {name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(found) == len(stored):
        for i, (new, old) in enumerate(zip(found, stored, strict=True)):
            yield from differences(new, old, near, f"{where}[{i}]")
    elif isinstance(stored, int | float) and isinstance(found, int | float):
        if not abs(found - stored) <= near + near * abs(stored):
            yield f"{where}: {found} for {stored}"
    elif found != stored:
        yield f"{where}: {found!r} for {stored!r}"


if __name__ == "__main__":
    for number in sys.argv[1:]:
        file = STORED / f"{number}.json"
        file.unlink(missing_ok=True)
        torch.set_num_threads(1)
        print(number, f"{run(number, file)[1]:.0f} s of processor time, {file.stat().st_size / 1000:.0f} kB")
