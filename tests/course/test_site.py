"""The web site: how a notebook becomes a page, and, in a real browser with the network cut, the pages of `site/`.

The first part needs neither Sphinx nor a browser. The second (marker `browser`) looks at what `make site` has written.
"""

import functools
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import nbformat
import pytest
import torch

from course_utils.build import build_chapter
from course_utils.exercises import by_part
from course_utils.plots import attention_pattern, bar, heatmap, line, scatter, template
from course_utils.sliders import slider
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))

import executed as runs
import make
from conf import docstring_as_rst
from figures import PLOTLY, circuitsvis_html, plotly_words
from make import made_of, write_scripts
from pages import glossary_page, glossary_terms, link_terms, moved_links, page, shown, without_header

LESSONS = sorted((ROOT / "chapters" / "src").glob("[0-9][0-9]_*.md"))
SITE = ROOT / "site"


# --- a notebook becomes a page ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_every_exercise_shows_its_stub_then_hints_then_the_folded_solution(lesson: Path) -> None:
    learner, solution = (nbformat.reads(text, as_version=4) for text in build_chapter(lesson, ROOT))
    cells = page(solution, learner, [], "<p>links</p>").cells
    text = "\n\n".join(cell.source for cell in cells)
    open_text = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
    stubs = {cell.id: cell.source for cell in learner.cells}
    exercises = [cell for cell in solution.cells if "course" in cell.metadata]
    assert exercises
    for cell in exercises:
        symbol, full = cell.metadata["course"]["exercise"], without_header(cell.source)
        stub = text.index(without_header(stubs[cell.id]))
        begin = text.index(f'<details class="solution"><summary>Solution of <code>{symbol}</code>')
        assert stub < text.index(f"check({symbol}", stub) < begin < text.index(full, begin)
        assert text.count(full) == 1 and full not in open_text
        assert not re.match(r"\s*<details><summary>Hint", text[text.index("\n```\n\n</details>", begin) + 16 :])
    assert sum(cell.metadata.get("course") is not None for cell in cells) == 0
    for cell in learner.cells:  # nothing else is lost, the builder's own set-up cell excepted
        if cell.cell_type == "code" and "course" not in cell.metadata and cell.id != "course-setup":
            assert any(cell.source == other.source for other in cells if other.cell_type == "code")


def test_a_site_is_kept_until_something_that_it_is_made_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_text("old")
    before = made_of(())
    assert made_of(()) == before
    assert made_of(["00"]) != before
    (tmp_path / "docs" / "guide.md").write_text("new")
    assert made_of(()) != before


def test_the_links_stand_under_the_title() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\nText.")])
    assert page(notebook, notebook, [], "LINKS").cells[0].source == "# Title\n\nLINKS\n\nText."


def test_terms_are_linked_once_and_only_in_running_text() -> None:
    terms = {"induction head", "residual stream", "hook"}
    text = (
        "## An induction head\n\nNot `induction head`, not $hook$, not [a hook](x.md), no <b title='hook'>.\n\n"
        "```python\nhook\n```\n\n<summary>hook</summary>\n\nTwo Induction\nheads write to the *residual stream*. "
        "An induction head again, unhooked by a hook-like thing."
    )
    linked = link_terms(text, terms)
    assert re.findall(r"\{term\}`([^`]*)`", linked) == [
        "Induction heads <induction head>",
        "residual stream <residual stream>",
    ]
    assert terms == {"hook"}
    assert re.sub(r"\{term\}`([^<]*) <[^>]*>`", r"\1", linked) == text.replace("Induction\nheads", "Induction heads")


def test_the_glossary_is_sorted_and_every_term_has_words() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = glossary_terms(text)
    assert len(terms) > 40 and terms == sorted(terms, key=str.casefold) and len(terms) == len(set(terms))
    made = glossary_page(text)
    assert all(re.search(rf"^{re.escape(term)}\n  \S", made, re.MULTILINE) for term in terms)
    assert made.startswith("# Glossary\n\n") and made.count(":::") == 2 and "**" not in made


def test_links_of_a_guide_lead_to_pages_of_the_site_or_to_the_repository() -> None:
    text = (
        "[a](../chapters/04_induction.ipynb) [b](../chapters/src/02_transformer.md) ![c](grading/class.png) "
        "[d](../README.md) [e](https://example.org/x) [f](#below)"
    )
    assert moved_links(text, "docs", "REPO/") == (
        "[a](chapters/04_induction.ipynb) [b](chapters/02_transformer.ipynb) ![c](docs/grading/class.png) "
        "[d](REPO/README.md) [e](https://example.org/x) [f](#below)"
    )


# --- outputs ----------------------------------------------------------------------------------------------------------


def stored(html: str) -> Any:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])


def test_a_figure_becomes_its_data_and_its_words() -> None:
    figure = heatmap(torch.tensor([[0.0, 0.5, -2.0]]), x="key </script>", y="query", title="Where & why")
    output = nbformat.v4.new_output("display_data", {PLOTLY: json.loads(figure.to_json()), "text/plain": "Figure()"})
    cell = shown(nbformat.v4.new_code_cell("figure", outputs=[output]))
    html = cell.outputs[0].data["text/html"]
    assert html.count("</script>") == 1 and "\n\n" not in html
    assert "template" not in stored(html)["layout"]
    assert stored(html)["data"] == json.loads(figure.to_json())["data"]
    assert "Where &amp; why. query against key" in html
    assert "1 rows and 3 columns: values from -2 to 0.5." in html


def test_figures_in_words() -> None:
    falling = {"model": torch.tensor([4.0, 1.0, 2.0]), "grammar": torch.ones(3)}
    words = plotly_words(json.loads(line(falling, x="step", y="loss", title="Loss").to_json()))
    assert words.startswith("Loss. loss against step. Line “model”: begins at 4, ends at 2; values from 1 to 4. Line")
    words = plotly_words(json.loads(bar(torch.tensor([1.0, 3.0]), x="token", y="p", title="Chance").to_json()))
    assert words.endswith("Bars: values from 1 to 3.") or "Bars “p”: values from 1 to 3." in words
    dots = scatter(falling["model"], falling["model"], x="a", y="b", title="c", texts=["x", None, None])
    assert "Points: values from 1 to 4." in plotly_words(json.loads(dots.to_json()))
    heights = {name: bar(series, x="token", y="p", title="Chance") for name, series in falling.items()}
    words = plotly_words(json.loads(slider(heights, steps="kind").to_json()))
    assert words.endswith("A slider, kind: model, grammar.")


def test_the_site_has_the_look_of_the_course(tmp_path: Path) -> None:
    write_scripts(tmp_path)
    text = (tmp_path / "plotly-template.js").read_text(encoding="utf-8")
    assert json.loads(text.removeprefix("window.plotlyTemplate = ").rstrip(";\n")) == template().to_plotly_json()


def test_an_attention_view_keeps_its_data_and_leaves_the_script() -> None:
    weights = torch.rand(2, 3, 3)
    html = circuitsvis_html(attention_pattern(weights, ["a", "<b>", "c d"]).source)
    assert html is not None and len(html) < 2_000
    view = stored(html)
    assert view["component"] == "AttentionHeads"
    assert torch.allclose(torch.tensor(view["data"]["attention"]), weights)
    assert "2 attention patterns over 3 tokens: a &lt;b&gt; c d" in html
    assert circuitsvis_html("<p>some other output</p>") is None


def test_a_notebook_runs_again_only_when_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(runs, "execute", lambda notebook, *_, **__: ran.append(notebook.cells[0].source))
    one, two = (
        nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])) for source in ("1", "2")
    )
    for text, common in [(one, "x"), (one, "x"), (one, "y"), (two, "y"), (two, "y")]:
        runs.executed("00_toy", text, common, tmp_path)
    assert ran == ["1", "1", "2"]
    assert len(list(tmp_path.iterdir())) == 1  # what is out of date is not kept


def test_the_hash_of_what_runs_depend_on_covers_code_and_weights(tmp_path: Path) -> None:
    hashes = []
    for name in (
        "course_utils/plots.py",
        "course_utils/models/tales/model.safetensors",
        "solutions/ch02_transformer.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("new", encoding="utf-8")
        hashes.append(runs.common_hash(tmp_path))
    (tmp_path / "solutions/02_transformer.ipynb").write_text("generated", encoding="utf-8")
    assert len(set(hashes)) == 3 and runs.common_hash(tmp_path) == hashes[-1]


def test_docstrings_become_what_sphinx_reads() -> None:
    lines = ["Uses `a*b`, *rest and last_ too:", "", "    call(*rest)", "", "The end."]
    docstring_as_rst(None, "", "", None, None, lines)
    assert lines == ["Uses `a*b`, \\*rest and last\\_ too:", "", "::", "", "    call(*rest)", "", "The end."]


# --- the site, as files -----------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Where a page points, what it loads, and the places in it that others may point to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.loads, self.places = list[str](), list[str](), set[str]()
        self.headings: list[int] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.places |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "link", "iframe", "source"):
            self.loads += [values[key] for key in ("src", "href") if key in values]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def files() -> dict[Path, Links]:
    """Every page of the built site."""
    assert (SITE / "index.html").is_file(), "there is no site: make site"
    return {path: Links(path) for path in sorted(SITE.rglob("*.html"))}


@pytest.mark.browser
def test_links_within_the_site_lead_somewhere(files: dict[Path, Links]) -> None:
    lost = []
    for path, found in files.items():
        for link in [*found.links, *found.loads]:
            address, fragment = urldefrag(link)
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            target = (path.parent / unquote(urlsplit(address).path)).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (fragment and target in files and unquote(fragment) not in files[target].places):
                lost.append(f"{path.relative_to(SITE)}: {link}")
    assert not lost, "\n".join(sorted(set(lost)))


@pytest.mark.browser
def test_pages_load_nothing_from_elsewhere_and_keep_headings_in_order(files: dict[Path, Links]) -> None:
    for path, found in files.items():
        assert not [load for load in found.loads if urlsplit(load).scheme not in ("", "data")], path
        steps = list(zip(found.headings, found.headings[1:], strict=False))
        begins_with = [] if path.name == "search.html" else [1]  # search writes its own when it has found something
        assert found.headings[:1] == begins_with and all(after <= before + 1 for before, after in steps), (
            path,
            found.headings,
        )
    for style in SITE.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.browser
def test_the_sidebar_has_the_parts_of_the_course() -> None:
    captions = re.findall(r'class="caption-text">([^<]*)<', (SITE / "index.html").read_text(encoding="utf-8"))
    parts = [part.heading for part in by_part(lesson.stem[:2] for lesson in LESSONS)]
    assert captions == [*parts, "Beside the chapters", "For authors"]


# --- the site, in a browser -------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture(scope="module")
def address(files: dict[Path, Links]) -> Iterator[str]:
    """Where the site is served: on this machine only."""
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Opens a page of the site; in the end nothing may have failed, spoken of an error, or asked for another host."""
    contexts, complaints = [], []

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # that is a page left before its icon had come, on a busy machine
            complaints.append(f"failed: {request.url}")

    def open_page(path: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", failed)
        page.on(
            "response",
            lambda answer: complaints.append(f"{answer.status}: {answer.url}") if answer.status > 399 else None,
        )
        page.on(
            "request", lambda r: complaints.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
        )
        page.goto(address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


UNFOLD = "document.querySelectorAll('details').forEach(fold => { fold.open = true; })"
UNDRAWN = """() => [...document.querySelectorAll('figure > .drawing')].filter(box =>
    !box.querySelector(box.parentElement.className === 'plotly-figure' ? '.main-svg' : 'canvas')).length"""
BLANK = """() => [...document.querySelectorAll('.plotly-figure .drawing')].filter(box => !box.querySelector(
    '.heatmaplayer image, .scatterlayer path, .barlayer path, .annotation-text, .histogramlayer path')).length"""
# Formulas that were not set, or that MathJax could not read
UNSET = """() => document.querySelectorAll('.math:not(:has(mjx-container)), mjx-merror').length"""


def draw_everything(page: Any) -> None:
    """Unfold all, and bring every figure near the window, as a reader would."""
    page.evaluate(UNFOLD)
    for figure in page.locator("figure > .drawing").all():
        figure.evaluate("box => box.scrollIntoView({ block: 'center', behavior: 'instant' })")
        page.wait_for_timeout(50)
    page.wait_for_function(f"() => ({UNDRAWN})() === 0")


CIRCUITSVIS_LABEL = '<h4 role="presentation"'  # white on the colour of a head


def serious(page: Any, code: bool = True) -> list[str]:
    """What axe calls serious or critical: the rule, and where it is broken; CircuitsVis's own labels are not ours.

    Without `code` it skips the contrast of highlighted code, whose thousands of small pieces take it a minute.
    """
    from axe_playwright_python.sync_playwright import Axe

    contrast = "color-contrast"
    runs: list[tuple[Any, dict[str, Any]]] = [(None, {})]
    if not code:
        rest = {"exclude": [[".highlight-python pre"]]}
        runs = [(None, {"rules": {contrast: {"enabled": False}}}), (rest, {"runOnly": [contrast]})]
    reports = [Axe().run(page, where, {"resultTypes": ["violations"], **options}) for where, options in runs]
    found = {}
    for violation in [violation for report in reports for violation in report.response["violations"]]:
        ours = [node["html"][:200] for node in violation["nodes"] if not node["html"].startswith(CIRCUITSVIS_LABEL)]
        if ours and violation["impact"] in ("serious", "critical"):
            found[violation["id"]] = ours[:3]
    return [f"{rule}: {where}" for rule, where in found.items()]


PHONE = 390
LOOKS = [("dark", 1280), ("light", PHONE), ("light", 1280)]  # each chapter is looked at in one of them


@pytest.mark.browser
@pytest.mark.parametrize(
    ("lesson", "look"),
    [(lesson, LOOKS[i % len(LOOKS)]) for i, lesson in enumerate(LESSONS)],
    ids=[lesson.stem for lesson in LESSONS],
)
def test_a_chapter_draws_its_figures_and_axe_finds_nothing_serious(
    open_page: Any, lesson: Path, look: tuple[str, int]
) -> None:
    scheme, width = look
    window = {"width": width, "height": 900}
    page = open_page(f"chapters/{lesson.stem}.html", viewport=window, color_scheme=scheme, reduced_motion="reduce")
    assert page.locator("figure > .drawing").count() > 0
    draw_everything(page)
    assert page.evaluate(BLANK) == 0
    page.wait_for_function(f"() => ({UNSET})() === 0")
    for words in page.locator("figure > figcaption").all_text_contents():
        assert len(words) > 20, words
    assert not serious(page, code=lesson in LESSONS[:2])  # one in the dark, one in the light
    page.set_viewport_size({"width": PHONE, "height": 844})
    page.wait_for_function(f"() => document.documentElement.scrollWidth <= {PHONE}")


@pytest.mark.browser
def test_search_finds_induction(open_page: Any) -> None:
    page = open_page("index.html")
    page.locator(".sidebar-search").fill("induction")
    page.locator(".sidebar-search").press("Enter")
    page.locator("#search-results li a").first.wait_for()
    assert page.locator("#search-results li a[href*='04_induction']").count() > 0


@pytest.mark.browser
def test_a_folded_solution_opens_with_the_keyboard(open_page: Any) -> None:
    page = open_page("chapters/04_induction.html")
    solution = page.locator("details.solution").first
    code = solution.locator("pre")
    assert not code.is_visible()
    solution.locator("summary").focus()
    page.keyboard.press("Enter")
    code.wait_for(state="visible")
    assert "class MyHookPoint" in code.text_content()


@pytest.mark.browser
def test_the_picture_that_moves_can_be_stopped(open_page: Any) -> None:
    page = open_page("index.html")
    paused = "document.getElementById('birth').animationsPaused()"
    assert page.evaluate(paused) is False
    page.get_by_role("button", name="Pause").click()
    assert page.evaluate(paused) is True
    calm = open_page("index.html", reduced_motion="reduce")
    assert calm.evaluate(paused) is True
    assert calm.get_by_role("button", name="Play").is_visible()


@pytest.mark.browser
def test_no_other_page_is_wider_than_a_phone(open_page: Any, files: dict[Path, Links]) -> None:
    page = open_page("index.html", viewport={"width": PHONE, "height": 844}, has_touch=True)
    here = page.url.removesuffix("index.html")
    chapters = {f"{lesson.stem}.html" for lesson in LESSONS}
    wide = {}
    for path in files:
        if path.name in chapters:
            continue
        page.goto(here + path.relative_to(SITE).as_posix())
        draw_everything(page)
        page.wait_for_timeout(200)
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE:
            wide[path.name] = width
    assert wide == {}


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", PHONE)])
@pytest.mark.parametrize("path", ["index.html", "glossary.html", "models/tales.html", "api/course_utils.plots.html"])
def test_axe_finds_nothing_serious(open_page: Any, path: str, scheme: str, width: int) -> None:
    window = {"width": width, "height": 900}
    page = open_page(path, color_scheme=scheme, viewport=window, reduced_motion="reduce")
    draw_everything(page)
    assert not serious(page)
