"""What a learner sees: chapter 04, run, opened in JupyterLab in a real browser, with the network cut.

`make test-browser` runs this; it needs Debian's chromium and the extra `browser`. It runs the chapter up to the main
figure only, since what is tested is the drawing.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbformat.sign import NotebookNotary

from course_utils.cli import execute, wait_for_address

pytestmark = pytest.mark.browser

LAST = 'title="Mean attention, on random tokens that repeat"'  # the cell with the main figure
PATTERNS = "attention_pattern(cache["
# What Chromium would fetch by itself, and every way out: names resolve to nothing but this machine.
CHROMIUM = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()
CHROMIUM += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
READY = """() => {
    const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
    return Boolean(panel && panel.context && panel.context.isReady && panel.content.widgets.length);
}"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the solution notebook of chapter 04, run up to the main figure."""
    notebook = nbformat.read(ROOT / "solutions/04_induction.ipynb", as_version=4)
    end = next(number for number, cell in enumerate(notebook.cells) if LAST in cell.source)
    del notebook.cells[end + 1 :]
    execute(notebook, NO_NETWORK)
    folder = tmp_path_factory.mktemp("lab")
    nbformat.write(notebook, folder / "04_induction.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(executed: Path) -> Iterator[str]:
    """The address of a JupyterLab that shows this folder; its settings and its trust are its own."""
    own = {f"JUPYTER_{kind}_DIR": str(executed / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **own, **NO_NETWORK, "no_proxy": "127.0.0.1,localhost"}
    jupyter = [sys.executable, "-m", "jupyter"]
    notebook = nbformat.read(executed / "04_induction.ipynb", as_version=4)
    Path(own["JUPYTER_DATA_DIR"]).mkdir()
    NotebookNotary(data_dir=own["JUPYTER_DATA_DIR"]).sign(notebook)  # what `jupyter trust` does
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", "--expose-app-in-browser"]
    with pytest.MonkeyPatch.context() as patch, (executed / "lab.log").open("w") as log:
        patch.setenv("JUPYTER_RUNTIME_DIR", own["JUPYTER_RUNTIME_DIR"])  # where wait_for_address looks
        server = subprocess.Popen(
            [*jupyter, "lab", *options], cwd=executed, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            address = wait_for_address(server)
            assert address, (executed / "lab.log").read_text()
            yield address
        finally:
            server.terminate()
            server.wait(timeout=20)


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Any]:
    """The notebook, open; `page.refused` are the addresses outside of this machine that somebody asked for."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "there is no chromium: apt-get install chromium"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        refused: list[str] = []

        def gate(route: Any) -> None:
            if route.request.url.split("/")[2].split(":")[0] in ("127.0.0.1", "localhost"):
                route.continue_()
            else:
                refused.append(route.request.url)
                route.abort()

        page.route("http*://**/*", gate)
        page.goto(lab.replace("/lab?", "/lab/tree/04_induction.ipynb?"))
        page.wait_for_function(READY, timeout=60_000)
        page.refused = refused
        yield page
        browser.close()


def show(page: Any, words: str) -> Any:
    """Scroll to the cell that holds these words; the place of its outputs in the page."""
    number = page.evaluate(
        """async words => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            const sources = notebook.widgets.map(cell => cell.model.sharedModel.getSource());
            const number = sources.findIndex(source => source.includes(words) && !source.includes("def "));
            await notebook.scrollToItem(number, "center");
            notebook.widgets[number].node.id = "cell-to-look-at-" + number;
            return number;
        }""",
        words,
    )
    return page.locator(f"#cell-to-look-at-{number} .jp-OutputArea")


def test_the_heat_map_is_drawn(page: Any) -> None:
    figure = show(page, LAST).locator(".js-plotly-plot")
    figure.locator(".heatmaplayer image").first.wait_for(timeout=30_000)
    assert figure.locator(".heatmaplayer image").count() == 3
    box = figure.locator(".heatmaplayer image").last.bounding_box()
    assert box["width"] > 50 and box["height"] > 50
    assert "random tokens that repeat" in figure.locator(".gtitle").text_content()
    names = figure.locator(".annotation-text").all_text_contents()
    assert names == ["previous token", "duplicate token", "induction"]


def test_circuitsvis_is_drawn(page: Any) -> None:
    view = show(page, PATTERNS)
    view.get_by_text("Head Selector").first.wait_for(timeout=30_000)
    canvases = view.locator("canvas")
    assert canvases.count() >= 4
    # something is on them: not every pixel is that of the corner
    painted = """canvas => {
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return data.some((value, place) => value !== data[place % 4]);
    }"""
    assert any(canvases.nth(number).evaluate(painted) for number in range(canvases.count()))


def test_nothing_asked_for_the_network(page: Any) -> None:
    time.sleep(1)
    assert page.refused == []
