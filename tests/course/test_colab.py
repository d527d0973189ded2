"""Every chapter as Colab runs it: an empty folder, a notebook, torch and all the rest, but not this course.

The environment is new and lends every package of this one but ours; `google.colab` is a stub; the wheel is built from
this checkout and served from this machine, and nothing else can be reached. "Run All" on a learner's notebook shows
nothing worse than "not written yet"; the solution notebook runs to its end (`make rehearse`: it takes minutes, and in
a checkout tests/course/test_notebooks.py runs the same cells).
"""

import functools
import http.server
import json
import os
import re
import shutil
import textwrap
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conftest import ROOT
from tests.support.depends import chapter_parts, fingerprint
from tests.support.environments import NO_NETWORK, clean_environment, new_environment, site_packages

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHAPTERS = sorted(path.name for path in (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def index(wheel: Path) -> Iterator[str]:
    """The address on this machine at which pip finds the wheel."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(wheel.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new environment in which `google.colab` has been imported before the first cell, and the kernel `colab`."""
    python = new_environment(tmp_path / "environment") / "python"
    packages = site_packages(tmp_path / "environment")
    (packages / "google/colab").mkdir(parents=True)
    (packages / "google/colab/__init__.py").write_text("")
    (packages / "google-colab.pth").write_text("import google.colab\n")
    spec = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Colab"}
    (tmp_path / "jupyter/kernels/colab").mkdir(parents=True)
    (tmp_path / "jupyter/kernels/colab/kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return packages


def run_all(notebook: nbformat.NotebookNode, folder: Path, address: str) -> None:
    """Run every cell in a folder that holds nothing else; pip knows of one address."""
    folder.mkdir()
    options = {
        "timeout": 1800,
        "startup_timeout": 600,
        "kernel_name": "colab",
        "resources": {"metadata": {"path": str(folder)}},
    }
    client = NotebookClient(notebook, **options)
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": address, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # the variable is Colab's; plotly goes by it
    client.execute(env=clean_environment(COLAB_NOTEBOOK_ID="rehearsal", **NO_NETWORK, **pip))


def as_colab_runs(folder: str, name: str) -> str:
    """What such a run depends on."""
    return fingerprint(ROOT / folder / name, *chapter_parts(name[:2]), Path(__file__), PROJECT["dependencies"])


def installed(packages: Path) -> set[str]:
    """The distributions that this environment holds itself."""
    return {path.name.partition("-")[0] for path in packages.glob("*.dist-info")}


@pytest.mark.unless_unchanged("chapters", lambda name: as_colab_runs("chapters", name))
@pytest.mark.parametrize("name", CHAPTERS)
def test_run_all_on_the_untouched_notebook(name: str, colab: Path, index: str, tmp_path: Path) -> None:
    """It completes, with nothing worse than "not written yet" anywhere, and in less than three minutes' work.

    The longest, 03, takes 93 s on a free machine, and 131 s where both cores are busy.
    """
    notebook = nbformat.read(ROOT / "chapters" / name, as_version=4)
    before = os.times()
    run_all(notebook, tmp_path / "content", index)
    after = os.times()  # of processes that have ended, the kernel among them; busy neighbours do not count
    assert after.children_user + after.children_system - before.children_user - before.children_system < 180
    errors = [(o, cell.source) for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    worse = [f"{e.ename}: {e.evalue}\n{source}" for e, source in errors if "not written yet" not in e.evalue]
    assert not worse, "\n\n".join(worse)
    assert errors, "nothing was left to write"
    assert installed(colab) == {"circuits_from_scratch"}, "torch and all the rest stay as they are"


@pytest.mark.rehearsal
@pytest.mark.unless_unchanged("chapters", lambda name: as_colab_runs("solutions", name))
@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions_run_to_their_end(name: str, colab: Path, index: str, tmp_path: Path) -> None:
    run_all(nbformat.read(ROOT / "solutions" / name, as_version=4), tmp_path / "content", index)
    assert installed(colab) == {"circuits_from_scratch"}


def test_ones_own_transformer_comes_along_from_drive(colab: Path, index: str, tmp_path: Path) -> None:
    """The lines that docs/running.md gives for this, with a folder as the Drive."""
    guide = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"^  ```python\n(.*?)^  ```$", guide, re.MULTILINE | re.DOTALL)
    (colab / "google/colab/drive.py").write_text("def mount(folder): ...\n")
    copy = tmp_path / "drive/MyDrive/Colab Notebooks/Copy of 02_transformer.ipynb"
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "solutions/02_transformer.ipynb", copy)
    notebook = nbformat.read(ROOT / "chapters/03_training.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    last = next(n for n, cell in enumerate(code) if "mine(" in cell.source)
    bringing = nbformat.v4.new_code_cell(textwrap.dedent(lines).replace("/content/drive", str(tmp_path / "drive")))
    notebook.cells = [*code[:last], bringing, code[last]]
    run_all(notebook, tmp_path / "content", index)
    assert "Transformer: yours, from chapter 02" in notebook.cells[-1].outputs[0].text


def test_without_network_the_first_cell_says_what_to_do(colab: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "chapters" / CHAPTERS[0], as_version=4)
    with pytest.raises(CellExecutionError) as error:
        run_all(notebook, tmp_path / "content", "http://127.0.0.1:9/")
    assert error.value.ename == "ModuleNotFoundError"
    assert error.value.evalue.startswith("No course here. With a network: `pip install circuits-from-scratch==")
    assert installed(colab) == set()
