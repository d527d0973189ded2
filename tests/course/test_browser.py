"""What a learner sees: `course lab` in a real browser, with the network cut.

`make test-browser` runs this; it needs Debian's chromium and the extra `browser`. Chapter 04 is run up to its main
figure only, since what is tested is the drawing. `SCREENSHOTS=docs make test-browser` takes the pictures in docs/ anew.
"""

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT
from tests.support.environments import NO_NETWORK, lab_address

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("lab")]

READY = """name => {
    const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
    const open = panel && panel.context && panel.context.path === name;
    return Boolean(open && panel.context.isReady && panel.content.widgets.length);
}"""
GO_TO = """async ([id, align]) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const number = notebook.widgets.findIndex(cell => cell.model.id === id);
    await notebook.scrollToItem(number, align);
    notebook.activeCellIndex = number;
    notebook.widgets[number].node.id = "cell-" + id;
}"""
RUN = "command => window.jupyterapp.commands.execute('notebook:' + command)"
SOURCE = "() => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.getSource()"


class Notebook:
    """A chapter, open in JupyterLab; its cells go by their ids."""

    def __init__(self, page: Any, name: str) -> None:
        self.page, self.name = page, name
        learner, solved = (
            nbformat.read(ROOT / folder / name, as_version=4).cells for folder in ("chapters", "solutions")
        )
        self.cells = learner
        self.answers = {cell.id: cell.source for cell in solved}

    @functools.cached_property
    def exercises(self) -> dict[str, str]:
        """The id of each exercise's cell."""
        return {cell.metadata.course.exercise: cell.id for cell in self.cells if "course" in cell.metadata}

    def find(self, words: str) -> str:
        """The id of the first cell that holds these words and defines nothing."""
        return next(cell.id for cell in self.cells if words in cell.source and "def " not in cell.source)

    def go_to(self, cell: str, align: str = "center") -> Any:
        """Scroll to a cell and select it; its place in the page."""
        self.page.evaluate(GO_TO, [cell, align])
        return self.page.locator(f"#cell-{cell}")

    def run(self, cell: str) -> Any:
        """Run a cell; the place of its outputs in the page."""
        place = self.go_to(cell)
        self.page.evaluate(RUN, "run-cell")
        return place.locator(".jp-OutputArea")

    def paste(self, cell: str, source: str) -> None:
        """Replace what stands in a cell, as with Ctrl+A and Ctrl+V."""
        self.go_to(cell).locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.evaluate(
            """text => {
                const data = new DataTransfer();
                data.setData("text/plain", text);
                document.activeElement.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
            }""",
            source,
        )
        assert self.page.evaluate(SOURCE) == source

    def photograph(self, name: str, first: str, last: str) -> None:
        """Keep a picture of the cells from one to another, with outputs, where SCREENSHOTS says that one is wanted."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.go_to(first, "start")
            self.page.mouse.move(0, 0)
            top, bottom = (self.page.locator(f"#cell-{cell}").bounding_box() for cell in (first, last))
            height = bottom["y"] + bottom["height"] - top["y"]
            self.page.screenshot(path=ROOT / folder / f"{name}.png", clip=top | {"height": height})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that `course lab` prints in an empty folder; JupyterLab's settings are its own."""
    folder = tmp_path_factory.mktemp("lab")
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")}
    settings = folder / ".config/lab/user-settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    # what a learner answers once, when JupyterLab asks whether it may fetch news
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = {**os.environ, **own, **NO_NETWORK, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "course_utils.cli", "lab", "--no-browser", "--port=0", "--expose-app-in-browser"]
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield lab_address(server)
    finally:
        server.terminate()
        server.communicate()


def open_notebook(browser: Any, lab: str, name: str) -> Notebook:
    """A chapter in a new page; `page.refused` are the addresses outside of this machine that somebody asked for."""
    page = browser.new_page(viewport={"width": 1180, "height": 2000})
    page.set_default_timeout(120_000)
    page.refused = []

    def gate(route: Any) -> None:
        if route.request.url.split("/")[2].split(":")[0] in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            page.refused.append(route.request.url)
            route.abort()

    page.route("http*://**/*", gate)
    page.goto(lab.replace("/lab?", f"/lab/workspaces/{name[:2]}/tree/{name}?"))  # a workspace is one page's
    page.wait_for_function(READY, arg=name)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")  # the kernel, too
    page.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    return Notebook(page, name)


@pytest.fixture(scope="module")
def chapter02(browser: Any, lab: str) -> Notebook:
    return open_notebook(browser, lab, "02_transformer.ipynb")


@pytest.fixture(scope="module")
def chapter04(browser: Any, lab: str) -> Notebook:
    return open_notebook(browser, lab, "04_induction.ipynb")


def answer(notebook: Notebook, exercise: str, source: str) -> Any:
    """Paste an answer and run it and its check; the place of what the check says."""
    cell = notebook.exercises[exercise]
    notebook.paste(cell, source)
    notebook.run(cell)
    said = notebook.run(notebook.find(f"check({exercise})"))
    said.locator("pre").first.wait_for()
    return said


def test_a_wrong_and_a_right_answer_in_chapter_02(chapter02: Notebook) -> None:
    """The lines that the README shows."""
    for cell in chapter02.cells[:3]:
        if cell.cell_type == "code":
            assert chapter02.run(cell.id).text_content().strip() == ""
    cells = chapter02.exercises["causal_mask"], chapter02.find("check(causal_mask)")
    right = chapter02.answers[cells[0]]
    unwritten = chapter02.run(cells[1])
    assert "not defined" in unwritten.text_content() or "not written yet" in unwritten.text_content()
    wrong = right.replace("n_key - n_query + 1", "n_key - n_query")
    said = answer(chapter02, "causal_mask", wrong)
    promised = re.search(r"```text\n(causal_mask: .*?)\n```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert promised and said.text_content().strip() == promised[1]
    chapter02.photograph("check-failed", *cells)
    said = answer(chapter02, "causal_mask", right)
    assert said.text_content().strip() == "causal_mask: correct"
    chapter02.photograph("check-passed", *cells)


def test_a_wrong_and_a_right_answer_in_chapter_04(chapter04: Notebook) -> None:
    for cell in chapter04.cells[:3]:
        if cell.cell_type == "code":
            assert chapter04.run(cell.id).text_content().strip() == ""
    right = chapter04.answers[chapter04.exercises["repeated_tokens"]]
    said = answer(chapter04, "repeated_tokens", right.replace("generator=generator, ", ""))
    assert "repeated_tokens: it drew from torch's global random numbers" in said.text_content()
    said = answer(chapter04, "repeated_tokens", right)
    assert said.text_content().strip() == "repeated_tokens: correct"


@pytest.fixture(scope="module")
def solved04(chapter04: Notebook) -> Notebook:
    """Chapter 04 with all its right answers, run up to the main figure."""
    end = chapter04.find('title="Mean attention, on random tokens that repeat"')
    for cell in chapter04.cells:
        if cell.id == end:
            break
        if cell.id in chapter04.exercises.values():
            chapter04.paste(cell.id, chapter04.answers[cell.id])
    chapter04.go_to(end)
    chapter04.page.evaluate(RUN, "run-all-above")
    chapter04.run(end)
    return chapter04


def test_the_heat_map_is_drawn(solved04: Notebook) -> None:
    figure = solved04.go_to(solved04.find('random tokens that repeat"')).locator(".js-plotly-plot")
    figure.locator(".heatmaplayer image").first.wait_for()
    assert figure.locator(".heatmaplayer image").count() == 3
    box = figure.locator(".heatmaplayer image").last.bounding_box()
    assert box["width"] > 50 and box["height"] > 50
    assert "random tokens that repeat" in figure.locator(".gtitle").text_content()
    names = figure.locator(".annotation-text").all_text_contents()
    assert names == ["previous token", "duplicate token", "induction"]


def test_the_attention_view_is_drawn(solved04: Notebook) -> None:
    cell = solved04.find("attention_pattern(cache[")
    view = solved04.go_to(cell).locator(".jp-OutputArea")
    view.get_by_text("Head Selector").first.wait_for()
    canvases = view.locator("canvas")
    assert canvases.count() >= 4
    # something is on them: not every pixel is that of the corner
    painted = """canvas => {
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return data.some((value, place) => value !== data[place % 4]);
    }"""
    assert any(canvases.nth(number).evaluate(painted) for number in range(canvases.count()))
    solved04.photograph("attention-view", cell, cell)


def test_nothing_asked_for_the_network(chapter02: Notebook, solved04: Notebook) -> None:
    time.sleep(1)
    assert chapter02.page.refused + solved04.page.refused == []
