"""A learner's own files that are called like a module, and stand in its way: `random.py`, `torch.py`."""

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

OURS = ("course_utils", "solutions")
HARMLESS = ("test", "__init__", "__main__")  # Python has a `test`, which nobody imports, and so has everybody


def shadows(folder: Path) -> list[Path]:
    """The files and packages in a folder that a program started there may import instead of what it means."""
    course = Path(__file__).resolve().parent.parent
    folder = folder.resolve()
    elsewhere = [place for place in sys.path if place and Path(place).resolve() != folder]
    found = []
    for path in sorted(folder.glob("*")):
        name = path.name.removesuffix(".py")
        if name in HARMLESS or not os.path.isfile(path if path.suffix == ".py" else path / "__init__.py"):
            continue
        if name in OURS:
            meant = folder != course
        else:
            spec = PathFinder.find_spec(name, elsewhere)
            meant = spec is not None and spec.origin is not None  # a folder without an __init__.py has no origin
        if meant:
            found.append(path)
    return found


def warning(path: Path) -> str:
    """What to say about one of them."""
    return f"{path} has the name of a module that Python or the course needs, and may be imported instead: rename it."
