"""The course as a web site: `make site`, or `python docs/site/make.py`, writes it into `site/`.

    lessons + solutions  -> notebooks, run once (executed.py)  -> pages with folded solutions (pages.py)
    shipped models       -> cards with curves (models.py), the picture that moves (birth.py)
    course_utils         -> the API, from its docstrings

All pages are gathered in `build/site/source`, with the hand-written ones of `docs/site/written`; what has not changed
is not touched, so that Sphinx reads again only what has. Everything that a page loads is a file of the site.
"""

import argparse
import json
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import distribution, distributions
from importlib.util import find_spec
from pathlib import Path

import birth
import nbformat
from executed import common_hash, executed, hash_of
from models import model_page
from pages import glossary_page, glossary_terms, moved_links, page

import course_utils
from course_utils.build import build_chapter
from course_utils.exercises import by_part
from course_utils.links import Release, read_release
from course_utils.lint import in_parts, read_lesson
from course_utils.overview import REAL, words
from course_utils.plots import template
from course_utils.pretrained import shipped_models, shipped_steps

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "site"
HTML = BUILD / "html"
GLOSSARY = ROOT / "docs" / "glossary.md"
GUIDES = ("teaching", "research")  # of docs/
SITE = ROOT / "site"  # a copy of HTML, beside which myst-nb leaves notes of its own
# Whose scripts, fonts and styles are part of the site; their licences travel with it.
SHIPPED = ("plotly", "circuitsvis", "sphinx-mathjax-offline", "furo", "sphinx-basic-ng", "sphinx", "pygments")
TOCTREE = ":::{{toctree}}\n{options}\n\n{entries}\n:::\n"


class Source:
    """The folder that Sphinx reads: files that are up to date stay untouched, those that nobody wrote are removed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, set[Path]()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        self.written.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")

    def copy(self, path: Path, name: str) -> None:
        self.written.add(self.folder / name)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.folder / name)

    def clean(self) -> None:
        """Remove what an earlier build wrote and this one did not, with the pages made of it."""
        for path in [p for p in self.folder.rglob("*") if p.is_file() and p not in self.written]:
            path.unlink()
            (HTML / path.relative_to(self.folder)).with_suffix(".html").unlink(missing_ok=True)


def lessons() -> list[Path]:
    return sorted((ROOT / "chapters" / "src").glob("[0-9][0-9]_*.md"))


def links(name: str, release: Release) -> str:
    """The ways from a chapter's page to its notebook; the second is a file of this site."""
    return (
        f'<p class="ways"><a href="{release.colab(name)}">Open in Colab</a> '
        f'<a href="../notebooks/{name}" download>Download the notebook</a></p>'
    )


def write_chapters(source: Source, chosen: Iterable[Path], downloads: Path) -> None:
    """A page for each lesson, and its notebook to be downloaded."""
    terms = glossary_terms(GLOSSARY.read_text(encoding="utf-8"))
    release, common = read_release(ROOT), common_hash(ROOT)
    for lesson in chosen:
        learner, solution = build_chapter(lesson, ROOT)
        name = f"{lesson.stem}.ipynb"
        run = executed(lesson.stem, solution, common)
        made = page(run, nbformat.reads(learner, as_version=4), terms, links(name, release))
        source.write(f"chapters/{name}", nbformat.writes(with_ids(made)))
        downloads.mkdir(parents=True, exist_ok=True)
        (downloads / name).write_text(learner, encoding="utf-8")


def with_ids(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Cells numbered instead of named at random, so that the same page is the same file."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def write_models(source: Source) -> list[str]:
    """A page for each model that ships."""
    cards = shipped_models()
    for card in cards:
        source.write(f"models/{card['name']}.md", model_page(card))
    rows = [
        f"| [{card['name']}]({card['name']}.md) | {card['about']} | {int(card['parameters']):,} |" for card in cards
    ]
    table = "\n".join(["| model | what it is | parameters |", "|---|---|---|", *rows])
    prose = "Every model that a chapter takes apart was trained by this repository and ships with it."
    tree = TOCTREE.format(options=":hidden:", entries="\n".join(card["name"] for card in cards))
    source.write("models/index.md", f"# The models that ship\n\n{prose}\n\n{table}\n\n{tree}")
    return ["models/index"]


def write_api(source: Source) -> list[str]:
    """A page for each module of the helper package, from its docstrings; checks of single exercises are left out."""
    modules = [
        module.name
        for module in pkgutil.walk_packages(course_utils.__path__, "course_utils.")
        if not module.name.startswith(("course_utils.checks.", "course_utils.chapters"))
    ]
    for name in modules:
        source.write(f"api/{name}.rst", f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n")
    prose = "What the helper package offers to notebooks, and to those who write chapters."
    tree = TOCTREE.format(options="", entries="\n".join(modules))
    source.write("api/index.md", f"# API of `course_utils`\n\n{prose}\n\n{tree}")
    return ["api/index"]


def write_guides(source: Source) -> list[str]:
    """The pages of docs/ for teachers and researchers, with their pictures."""
    release = read_release(ROOT)
    for name in GUIDES:
        guide = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        text = moved_links(guide, "docs", f"{release.repository}/blob/{release.tag}/")
        for picture in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", text):
            source.copy(ROOT / picture, picture)
        source.write(f"{name}.md", text)
    return list(GUIDES)


def write_licences(source: Source) -> list[str]:
    """Whose work is part of what, from docs/licences.md, and the licences of what the site carries: their own texts."""
    release = read_release(ROOT)
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    parts = [moved_links(page, "docs", f"{release.repository}/blob/{release.tag}/").strip()]
    for name in SHIPPED:
        package = distribution(name)
        licence = package.metadata["License-Expression"] or package.metadata["License"] or "see its text"
        files = [path for path in package.files or [] if "licen" in path.name.lower() and "dist-info" in str(path)]
        parts.append(f"### {package.metadata['Name']} {package.version}\n\n{licence.splitlines()[0]}")
        for path in files:
            text = path.locate().read_text(encoding="utf-8").replace("```", "'''")
            parts.append(f"<details><summary>{path.name}</summary>\n\n```text\n{text.strip()}\n```\n\n</details>")
    source.write("licences.md", "\n\n".join(parts) + "\n")
    return ["licences"]


def write_landing(source: Source, chosen: list[Path], groups: dict[str, list[str]]) -> None:
    """The first page: the hand-written text, with the picture and the list of everything."""
    text = (HERE / "written" / "index.md").read_text(encoding="utf-8")
    card = next(card for card in shipped_models() if card["name"] == birth.MODEL)
    picture = " ".join(birth.svg(card).splitlines())  # one block of HTML: no blank line ends it
    trees = [
        TOCTREE.format(options=f":hidden:\n:caption: {caption}", entries="\n".join(entries))
        for caption, entries in groups.items()
    ]
    by_number = {lesson.stem[:2]: lesson for lesson in chosen}
    chapters = "\n\n".join(
        "\n".join([f"### {part.heading}\n", *(f"- {summary(by_number[number])}" for number in numbers)])
        for part, numbers in by_part(by_number).items()
    )
    first = f"chapters/{chosen[0].stem}"
    moments = words(len(shipped_steps(birth.MODEL)) + 1)  # and the finished model
    parts = {"PICTURE": picture, "MOMENTS": moments, "CHAPTERS": chapters}
    parts |= {"FIRST": f"{first}.ipynb", "FIRST_PAGE": f"{first}.html"}
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    source.write("index.md", text + "\n" + "\n".join(trees))


def summary(lesson: Path) -> str:
    """A link to a chapter, how much there is to write, and whether it has a part on a real language model."""
    cells = read_lesson(lesson)
    exercises = [
        (cell, parts[0]) for cell, parts in zip(cells, in_parts(cells), strict=True) if "exercise" in cell.tags
    ]
    optional = sum(part.optional for _, part in exercises)
    title = cells[0].source.partition("\n")[0].removeprefix("# ")
    hours = f"{sum(int(cell.options['minutes']) for cell, _ in exercises) / 60:.0f} hours"
    which = {0: ",", len(exercises): ", all optional,"}.get(optional, f" ({optional} of them optional),")
    how_much = f"{len(exercises)} exercises{which} about {hours} of writing, and the reading"
    if any(part.title == REAL for parts in in_parts(cells) for part in parts):
        how_much += "; it ends on a real language model"
    return f"[{title}](chapters/{lesson.stem}.ipynb): {how_much}"


def write_scripts(static: Path) -> None:
    """The scripts of plotly and CircuitsVis from the installed packages, and the template that all figures share."""
    static.mkdir(parents=True, exist_ok=True)
    for package, path, name in [
        ("plotly", "package_data/plotly.min.js", "plotly.min.js"),
        ("circuitsvis", "dist/cdn/iife.js", "circuitsvis.js"),
    ]:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None  # the course needs both
        shutil.copyfile(Path(spec.origin).parent / path, static / name)
    text = f"window.plotlyTemplate = {json.dumps(template().to_plotly_json())};\n"
    (static / "plotly-template.js").write_text(text, encoding="utf-8")


def made_of(chapters: Iterable[str]) -> str:
    """A hash of all that the site is made of: files of the project, what is installed, and the chapters to be shown."""
    installed = sorted({f"{package.name} {package.version}" for package in distributions()})
    files = [path for name in ("chapters", "course_utils", "docs", "solutions") for path in (ROOT / name).rglob("*")]
    return hash_of(" ".join([*chapters, *installed]), [*ROOT.iterdir(), *files], ROOT)


def main() -> int:
    """Write the pages and run Sphinx, unless nothing has changed; its exit code, which is 1 after any warning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapters", nargs="+", metavar="NN", help="only these chapters, for a quick look")
    args = parser.parse_args()
    stamp, now = BUILD / "made_of", made_of(args.chapters or ())
    if SITE.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == now:
        print("Nothing that the site is made of has changed since it was built.")
        return 0
    stamp.unlink(missing_ok=True)
    from sphinx.cmd.build import main as sphinx

    chosen = [lesson for lesson in lessons() if not args.chapters or lesson.stem[:2] in args.chapters]
    source = Source(BUILD / "source")
    write_scripts(BUILD / "static")
    write_chapters(source, chosen, BUILD / "extra" / "notebooks")
    for path in (HERE / "written").glob("*.md"):
        if path.name != "index.md":
            source.write(path.name, path.read_text(encoding="utf-8"))
    source.write("glossary.md", glossary_page(GLOSSARY.read_text(encoding="utf-8")))
    names = {lesson.stem[:2]: f"chapters/{lesson.stem}" for lesson in chosen}
    groups = {part.heading: [names[number] for number in numbers] for part, numbers in by_part(names).items()} | {
        "Beside the chapters": ["glossary", *write_models(source), *write_guides(source)],
        "For authors": [*write_api(source), *write_licences(source)],
    }
    write_landing(source, chosen, groups)
    source.clean()
    # All pages are written anew (-a), for each lists all others beside its text; read again are those that changed.
    folders = [str(source.folder), str(HTML), "-c", str(HERE), "-d", str(BUILD / "doctrees")]
    code = sphinx(["-q", "-a", "-W", "--keep-going", "-b", "html", *folders])
    if code == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        shutil.copytree(HTML, SITE)
        stamp.write_text(now, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
