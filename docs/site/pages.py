"""A chapter as a page: its solution notebook, run, with every exercise folded back into what a learner sees.

Where the notebook shows a solution, the page shows difficulty, time and the stub; hints stay folded, and after the
last one, in place of the command that prints it, comes the solution, folded too. Terms of the glossary become links
where a chapter first uses them. The result is a notebook again, which myst-nb turns into a page.
"""

import posixpath
import re
from collections.abc import Iterable
from typing import Any

import nbformat
from figures import PLOTLY, circuitsvis_html, plotly_html
from nbformat import NotebookNode

from course_utils.build import HINTS, WAY_OUT

# What must stay as it is: code, formulas, links, tags with what is in a summary, headings, lines of a table.
KEEP = re.compile(
    r"""^(`{3,}|~{3,}).*?^\1|^\$\$.*?^\$\$|^\#.*?$|^\|.*?$|<summary>.*?</summary>|<[^>\n]+>
    |(`+)[^`].*?\2|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|\{[\w:]+\}""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


ENTRY = re.compile(r"^\*\*(.+?)\*\*: (.+)$", re.MULTILINE)


def page(executed: NotebookNode, learner: NotebookNode, terms: Iterable[str], links: str) -> NotebookNode:
    """The notebook behind a chapter's page; `links` is put under its title, `terms` are linked to the glossary."""
    stubs = {cell.id: cell.source for cell in learner.cells}
    cells: list[NotebookNode] = []
    symbol, solution = "", None  # of the exercise that we are in; the solution waits for the hints
    unlinked = set(terms)
    for cell in executed.cells:
        course = cell.metadata.get("course")
        if cell.id == "course-setup":
            continue
        if cell.cell_type == "markdown":
            text = link_terms(cell.source.replace(WAY_OUT.format(name=symbol), ""), unlinked)
            if not cells:
                title, _, rest = text.partition("\n")
                text = f"{title}\n\n{links}\n{rest}"
            if solution:
                hints = HINTS.match(text)
                end = hints.end() if hints else 0
                text, solution = f"{text[:end]}\n\n{solution}\n\n{text[end:]}", None
            cells.append(_prose(text))
        elif course:
            cells.append(_prose(exercise(stubs[cell.id], course)))
            symbol, solution = course["exercise"], folded_solution(cell.source, course)
        else:
            if solution and not is_check(cell.source):
                cells.append(_prose(solution))
                solution = None
            cells.append(shown(cell))
    if solution:
        cells.append(_prose(solution))
    return nbformat.v4.new_notebook(cells=cells, metadata=executed.metadata)


def is_check(source: str) -> bool:
    """Whether the cell is the one below an exercise, before its hints."""
    return source.startswith("check(")


def _prose(text: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(text)


def without_header(source: str) -> str:
    """An exercise without its first line, which says how hard it is."""
    return source.split("\n", 1)[1]


def exercise(stub: str, course: dict[str, Any]) -> str:
    """The stub of an exercise, under its difficulty and time."""
    dots = "●" * course["difficulty"] + "○" * (5 - course["difficulty"])
    optional = " · optional" if course.get("optional") else ""
    return (
        f'<p class="exercise">Your turn · difficulty <span role="img" aria-label="{course["difficulty"]} of 5">{dots}'
        f"</span> · about {course['minutes']} minutes{optional}</p>\n\n```python\n{without_header(stub)}\n```"
    )


def folded_solution(source: str, course: dict[str, Any]) -> str:
    """The solution of an exercise, which opens on demand."""
    return (
        f'<details class="solution"><summary>Solution of <code>{course["exercise"]}</code></summary>\n\n'
        f"```python\n{without_header(source)}\n```\n\n</details>"
    )


def shown(cell: NotebookNode) -> NotebookNode:
    """A code cell with outputs that a page can draw; imports, which every chapter begins with, are folded."""
    cell = nbformat.from_dict(cell)
    cell.outputs = [_drawable(output) for output in cell.outputs]
    cell.metadata = {"tags": ["hide-input"]} if "setup" in cell.metadata.get("tags", []) else {}
    return cell


def _drawable(output: NotebookNode) -> NotebookNode:
    data = output.get("data", {})
    html = plotly_html(data[PLOTLY]) if PLOTLY in data else circuitsvis_html(data.get("text/html", ""))
    return nbformat.v4.new_output("display_data", {"text/html": html}) if html else output


# --- links ---------------------------------------------------------------------------------------------------------


def moved_links(text: str, folder: str, elsewhere: str) -> str:
    """Markdown from a folder of the repository, its links made to fit the site.

    Links to a chapter lead to its page; those to any other file of the repository begin with `elsewhere`. Pictures are
    named from the top of the repository. Addresses and links within the text stay.
    """

    def move(match: re.Match[str]) -> str:
        words, target = match.groups()
        if target.startswith(("#", "mailto:")) or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        chapter = re.fullmatch(r"(?:chapters|solutions)/(?:src/)?(\d\d_\w+)\.(?:ipynb|md)", path)
        if chapter:
            return f"{words}(chapters/{chapter[1]}.ipynb)"
        return f"{words}({path if words.startswith('!') else elsewhere + path})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", move, text)


# --- glossary -------------------------------------------------------------------------------------------------------


def glossary_terms(text: str) -> list[str]:
    """The terms of docs/glossary.md: each begins a paragraph, in bold."""
    return [term for term, _ in ENTRY.findall(text)]


def glossary_page(text: str) -> str:
    """The same as Sphinx's directive, so that chapters can link to its terms."""
    before = text[: ENTRY.search(text).start()]  # type: ignore[union-attr]
    entries = "\n\n".join(f"{term}\n  {words}" for term, words in ENTRY.findall(text))
    return f"{before}:::{{glossary}}\n{entries}\n:::\n"


def link_terms(text: str, terms: set[str]) -> str:
    """The text with a link at the first mention of each term, in the singular or plural; these leave `terms`."""
    kept = list(KEEP.finditer(text))
    pieces, position = [], 0
    for match in [*kept, None]:
        pieces.append(_link_plain(text[position : match.start() if match else len(text)], terms))
        if match:
            pieces.append(match[0])
            position = match.end()
    return "".join(pieces)


def _link_plain(text: str, terms: set[str]) -> str:
    if not terms:
        return text
    choices = "|".join(re.escape(term).replace(r"\ ", r"\s+") for term in sorted(terms, key=len, reverse=True))
    mention = re.compile(rf"(?<![\w{{`-])({choices})(?:e?s)?(?![\w-])", re.IGNORECASE)
    known = {term.casefold(): term for term in terms}

    def link(match: re.Match[str]) -> str:
        term = known[" ".join(match[1].split()).casefold()]
        if term not in terms:  # mentioned just before, in this piece
            return match[0]
        terms.discard(term)
        return f"{{term}}`{' '.join(match[0].split())} <{term}>`"

    return mention.sub(link, text)
