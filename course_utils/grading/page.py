"""The teacher's page: one HTML file, complete in itself, that asks nobody for anything.

It shows how far everybody got in each chapter; part by part, a heat map of exercises by learners for each chapter,
what most people fail and the commonest mistake there; then problems and tricks, and the time it took. Every text is
escaped; besides, the page's own policy lets no script run but ours (by its digest) and no address be asked.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from course_utils.exercises import CoursePart, by_part, chapter_titles, course_exercises
from course_utils.grading.results import ExerciseResult, Result
from course_utils.grading.text import file_name
from course_utils.grading.weights import Points, Weights, number, points

# The class, and the sign, of each state: what a cell of the heat map shows.
CELLS = {
    "correct": ("correct", "✓"),
    "wrong": ("wrong", "✗"),
    "not written yet": ("unwritten", "·"),
    "timed out": ("timeout", "T"),
    "cheated": ("cheated", "!"),
    "error": ("error", "E"),
}
SLOWEST = 10


def page(results: Sequence[Result], weights: Weights) -> str:
    """The page as text."""
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'"
    chapters: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.chapter):
        chapters.setdefault(result.chapter, []).append(result)
    body = [
        "<h1>Circuits from Scratch: report</h1>",
        f"<p>{len({r.learner for r in results})} learners, {len(results)} notebooks, of "
        f"{'chapters' if len(chapters) > 1 else 'chapter'} {', '.join(chapters) or 'none'}.</p>",
        legend(),
        '<p class="tools"><label>Show the learner <input id="search" type="search" placeholder="any part of the name">'
        "</label></p>",
    ]
    groups, titles = by_part(chapters), chapter_titles()
    if len(chapters) > 1:
        body += [*contents(groups), "<h2>All chapters</h2>", *overview(chapters, weights)]
    for part, numbers in groups.items():
        body.append(f"<h2>{escape(part.heading)}</h2>")
        for chapter in numbers:
            own = chapters[chapter]
            heading = f'<h3 id="chapter-{chapter}">Chapter {escape(titles[chapter])}</h3>'
            body += [heading, *heat_map(chapter, own, weights)]
            body += [f"<h3>Chapter {chapter}: what people fail</h3>", *failures(chapter, own)]
    body += ['<h2 id="problems">Problems and tricks</h2>', *problems(results)]
    body += ['<h2 id="times">Time used</h2>', *times(results)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>Circuits from Scratch: report</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            *body,
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def digest(text: str) -> str:
    """What stands in the policy for a script or a style that may be used."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def legend() -> str:
    """Which colour and sign means what."""
    signs = (f'<span class="{css}">{sign}</span> {state}' for state, (css, sign) in CELLS.items())
    return f'<p class="legend">{" ".join(signs)}</p>'


def contents(groups: Mapping[CoursePart, Sequence[str]]) -> Iterator[str]:
    """Links to the chapters, a line for each part, and to what comes after them."""
    titles = chapter_titles()
    yield '<nav aria-label="contents"><ul>'
    for part, numbers in groups.items():
        links = (f'<a href="#chapter-{number}">{escape(titles[number])}</a>' for number in numbers)
        yield f"<li>{escape(part.heading)}: {' · '.join(links)}</li>"
    yield '<li><a href="#problems">Problems and tricks</a> · <a href="#times">Time used</a></li>'
    yield "</ul></nav>"


# --- overview -------------------------------------------------------------------------------------------------------


def overview(chapters: Mapping[str, Sequence[Result]], weights: Weights) -> Iterator[str]:
    """A row for each learner: the points in all, and the share of each chapter's points; nothing where none came."""
    own: dict[str, dict[str, Points]] = {}
    for chapter, results in chapters.items():
        for result in results:
            own.setdefault(result.learner, {})[chapter] = points(result, weights)
    yield '<div class="scroll" tabindex="0"><table class="map" id="map-all"><thead><tr>'
    for head in ("learner", "points", *chapters):
        yield f'<th scope="col"><button>{escape(head)}</button></th>'
    yield "</tr></thead><tbody>"
    for learner in sorted(own):
        got, of = (sum(numbers) for numbers in zip(*own[learner].values(), strict=True))
        yield f'<tr><th scope="row">{escape(learner)}</th>'
        yield f'<td class="points" data-value="{number(got)}">{number(got)} of {number(of)}</td>'
        for chapter in chapters:
            yield share(own[learner].get(chapter))
        yield "</tr>"
    yield "</tbody></table></div>"


def share(reached: Points | None) -> str:
    """A cell of the overview; what is worth nothing is all reached."""
    if reached is None:
        return '<td class="points" data-value="-1"></td>'
    percent = 100 * reached.got / reached.of if reached.of else 100.0
    return f'<td class="points" data-value="{percent:.1f}">{percent:.0f}%</td>'


# --- heat map -------------------------------------------------------------------------------------------------------


def heat_map(chapter: str, results: Sequence[Result], weights: Weights) -> Iterator[str]:
    """A row for each learner, a column for each exercise in the order of the lesson, and how many are right."""
    exercises = [e.name for e in course_exercises()[chapter]]
    yield f'<div class="scroll" tabindex="0"><table class="map" id="map-{escape(chapter)}"><thead><tr>'
    yield '<th scope="col"><button>learner</button></th><th scope="col"><button>points</button></th>'
    for exercise in exercises:
        yield f'<th scope="col" class="exercise"><button>{escape(exercise)}</button></th>'
    yield "</tr></thead><tbody>"
    for result in results:
        yield row(result, weights)
    yield '</tbody><tfoot><tr><th scope="row">correct, in %</th><td></td>'
    for exercise in exercises:
        right = sum(e.state == "correct" for result in results for e in result.exercises if e.exercise == exercise)
        yield f"<td>{100 * right / len(results):.0f}</td>"
    yield "</tr></tfoot></table></div>"


def row(result: Result, weights: Weights) -> str:
    """A learner's line of the heat map; the name leads to the feedback, a cell tells what the check said."""
    got, of = points(result, weights)
    address = quote(f"feedback/{file_name(result.learner)}.md")
    cells = [
        f'<tr><th scope="row"><a href="{address}" title="{escape(result.learner)}">{escape(result.learner)}</a></th>',
        f'<td class="points" data-value="{number(got)}">{number(got)} of {number(of)}</td>',
    ]
    order = list(CELLS)
    for e in result.exercises:
        css, sign = CELLS[e.state]
        cells.append(f'<td class="{css}" data-value="{order.index(e.state)}" title="{escape(tip(e))}">{sign}</td>')
    return "".join(cells) + "</tr>"


def tip(result: ExerciseResult) -> str:
    """What a cell says when it is pointed at."""
    return result.message if result.message.startswith(result.exercise) else f"{result.exercise}: {result.message}"


# --- lists ----------------------------------------------------------------------------------------------------------


def opening(*columns: str) -> str:
    """The start of a table with these columns; `#` marks one of numbers."""
    heads = (f'<th scope="col"{" class=number" * c.endswith("#")}>{c.removesuffix(" #")}</th>' for c in columns)
    return f'<table class="list"><thead><tr>{"".join(heads)}</tr></thead><tbody>'


def failures(chapter: str, results: Sequence[Result]) -> Iterator[str]:
    """The exercises that somebody tried in vain, the worst first, with the mistake made most often."""
    by_exercise: dict[str, list[ExerciseResult]] = {exercise.name: [] for exercise in course_exercises()[chapter]}
    for result in results:
        for e in result.exercises:
            by_exercise[e.exercise].append(e)
    rows = []
    for exercise, own in by_exercise.items():
        tried = [e for e in own if e.state != "not written yet"]
        failed = [e for e in tried if e.state != "correct"]
        if failed:
            seconds = sum(e.seconds for e in own) / len(own)
            rows.append((len(failed), len(tried), exercise, commonest(failed), seconds))
    if not rows:
        yield "<p>Nobody failed an exercise that they had begun.</p>"
        return
    yield opening("exercise", "failed #", "of those who tried", "the commonest mistake", "seconds per check #")
    for n_failed, n_tried, exercise, mistake, seconds in sorted(rows, key=lambda row: -row[0]):
        share = f'<progress value="{n_failed}" max="{n_tried}" aria-label="share that failed"></progress>'
        yield f'<tr><th scope="row">{escape(exercise)}</th><td class="number">{n_failed}</td>'
        yield f'<td>{share} {n_tried}</td><td class="words">{escape(mistake)}</td>'
        yield f'<td class="number">{seconds:.2f}</td></tr>'
    yield "</tbody></table>"


def commonest(failed: Sequence[ExerciseResult]) -> str:
    """The cause named most often among these; the first by alphabet where several are."""
    named = Counter(e.mistake for e in failed if e.mistake)
    if not named:
        return "none has a known cause"
    mistake, count = min(named.items(), key=lambda item: (-item[1], item[0]))
    return f"{count} × {mistake}"


def problems(results: Sequence[Result]) -> Iterator[str]:
    """What was found about whole notebooks, tricks too; the same words once, with all the names."""
    found: dict[str, list[str]] = {}
    for result in results:
        for words in result.problems:
            found.setdefault(words, []).append(f"{result.learner} ({result.chapter})")
    if not found:
        yield "<p>None.</p>"
        return
    yield opening("what", "whose")
    for words, learners in found.items():
        yield f'<tr><td class="words">{escape(words)}</td><td class="words">{escape(", ".join(learners))}</td></tr>'
    yield "</tbody></table>"


def times(results: Sequence[Result]) -> Iterator[str]:
    """The time that the notebooks took, and those that took longest."""
    total = sum(result.seconds for result in results)
    memory = max((result.peak_mb or 0.0 for result in results), default=0.0)
    mean = total / len(results) if results else 0.0
    most = f"at most {memory:.0f} MB of memory" if memory else "memory was not measured"
    yield f"<p>{total:.0f} s for all notebooks together, {mean:.1f} s for one on average; {most}.</p>"
    yield opening("the longest", "chapter", "seconds #", "MB #")
    for result in sorted(results, key=lambda result: -result.seconds)[:SLOWEST]:
        megabytes = "" if result.peak_mb is None else f"{result.peak_mb:.0f}"
        yield f'<tr><th scope="row">{escape(result.learner)}</th><td>{escape(result.chapter)}</td>'
        yield f'<td class="number">{result.seconds:.1f}</td><td class="number">{megabytes}</td></tr>'
    yield "</tbody></table>"
