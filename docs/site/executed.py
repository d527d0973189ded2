"""Solution notebooks with their outputs: each is run once, and again only when something that it reads has changed.

A run is kept under the hash of all that its outputs come from: the notebook, both packages with the models that ship,
and the versions of the packages that compute and draw. So nothing is ever out of date, and nothing runs in vain: the
suite, which wants every cell to run without an error, and the site share the runs.
"""

import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import nbformat
from filelock import FileLock

from course_utils.cli import execute

CACHE = Path(__file__).resolve().parents[2] / "build" / "executed"
MINUTES = 10  # for one cell, after which something hangs
COMPUTES_AND_DRAWS = ("torch", "numpy", "transformers", "plotly", "circuitsvis")
# The hub is not asked, so that a page does not depend on who builds it; progress bars would fill it with lines.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PLOTLY_RENDERER": "plotly_mimetype"}
ENVIRONMENT["COURSE_CACHE"] = str(CACHE / "nothing")  # a part on a real language model shows its stored results


def hash_of(start: str, files: Iterable[Path], root: Path) -> str:
    """One hash of a text and of files, their names within `root` and what they hold."""
    digest = hashlib.sha256(start.encode())
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(root)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def common_hash(root: Path) -> str:
    """What every run depends on beside its notebook."""
    versions = " ".join(f"{name} {version(name)}" for name in COMPUTES_AND_DRAWS)
    files = [path for package in ("course_utils", "solutions") for path in (root / package).rglob("*")]
    return hash_of(versions, [path for path in files if path.suffix != ".ipynb"], root)


def executed(name: str, text: str, common: str, cache: Path = CACHE) -> nbformat.NotebookNode:
    """The notebook of this name and text with its outputs, from the cache where they still hold.

    Older runs of it are thrown away. Raises nbclient's CellExecutionError, with cell and error, when a cell fails.
    """
    key = hashlib.sha256((text + common).encode()).hexdigest()[:16]
    kept = cache / f"{name}-{key}.ipynb"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}-{name}.lock"):  # tests and site may want it at the same time
        if not kept.is_file():
            print(f"{name}: running it, because it or what it uses has changed", flush=True)
            notebook = nbformat.reads(text, as_version=4)
            execute(notebook, ENVIRONMENT, timeout=60 * MINUTES)
            for old in cache.glob(f"{name}-*.ipynb"):
                old.unlink()
            partial = kept.with_suffix(".partial")  # whoever is stopped leaves no half of a run
            nbformat.write(notebook, partial)
            partial.replace(kept)
        return nbformat.read(kept, as_version=4)
