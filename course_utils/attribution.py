"""An attribution graph as a drawing: layers up, positions across, and a click on a node opens its dashboard.

It is one picture of HTML without anything from elsewhere: it works in a notebook, in its HTML export, and on the site.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from html import escape

from course_utils.dashboards import coloured_tokens
from course_utils.plots import BLUE, GREY, RED, Html, Ticks, visible

Examples = Sequence[tuple[Sequence[str], Sequence[float]]]  # texts of tokens, each with a value for every token

COLUMN, ROW = 44.0, 76.0  # between two positions and between two layers, in pixels
LEFT, TOP, BELOW = 100.0, 30.0, 84.0
SPREAD = 0.8  # how much of a column the nodes at one place fill
STRONGEST = 6  # edges that a dashboard lists

# One listener for the whole picture. What was clicked says by `data-go` which node it means; a click beside all nodes
# gives every edge its colour back.
CLICK = (
    "const hit = event.target.closest('[data-go]'), go = hit ? hit.dataset.go : null;"
    "for (const edge of this.querySelectorAll('[data-from]'))"
    " edge.style.opacity = go === null || edge.dataset.from === go || edge.dataset.to === go ? '' : 0.12;"
    "for (const node of this.querySelectorAll('svg [data-go]'))"
    " node.style.stroke = node.dataset.go === go ? 'orange' : '';"
    "if (go !== null) for (const card of this.querySelectorAll('[data-card]')) card.hidden = card.dataset.card !== go;"
)
ENTER = "if (event.key === 'Enter' && event.target.closest('svg')) this.onclick(event);"


def draw_attribution(
    places: Sequence[tuple[int, int]],
    says: Sequence[str],
    strengths: Sequence[float],
    edges: Sequence[tuple[int, int, float]],
    *,
    tokens: Ticks,
    rows: Ticks,
    title: str,
    examples: Sequence[Examples] | None = None,
    squares: Collection[int] = (),
) -> Html:
    """Nodes at (row, position), from the lowest row up, joined by edges (source, target, weight).

    `says` is what a node tells when the pointer is on it; a line break begins a new line. A click on it, or Enter when
    it has the focus, opens its dashboard: these words, its `examples` with coloured tokens, and its strongest edges in
    and out, each of which leads to the dashboard at its other end. The node of the largest strength is open at first.

    The larger the absolute value of its strength, the larger a node is; it is blue where its strength is positive, red
    where it is negative, and grey where it is 0. So are edges, by their weight. The nodes listed in `squares` are
    squares, all others circles. Nodes at one place stand side by side. `tokens` stand below the positions, `rows`
    beside the rows. The picture has all of it inside, and its `source` is a page of its own.

    Raises ValueError unless there is a text, a strength and, if there are any, a list of examples for each node, and
    for an edge to a node that is not there.
    """
    shown: Sequence[Examples] = [()] * len(places) if examples is None else examples
    if not len(places) == len(says) == len(strengths) == len(shown):
        sizes = f"{len(places)}, {len(says)} and {len(strengths)}" + (f" and {len(shown)}" if examples else "")
        raise ValueError(
            f"draw_attribution: places, says and strengths have {sizes} entries, one is needed for each node."
        )
    if unknown := [edge for edge in edges if not (0 <= edge[0] < len(places) and 0 <= edge[1] < len(places))]:
        raise ValueError(f"draw_attribution: there is an edge {unknown[0]}, but there are {len(places)} nodes.")
    spots = _spots(places, len(rows))
    width, height = LEFT + COLUMN * len(tokens), TOP + ROW * len(rows) + BELOW
    largest = max(map(abs, strengths), default=0.0) or 1.0
    drawing = [*_axes(tokens, rows), *_lines(spots, edges)]
    for node, (x, y) in enumerate(spots):
        size = 3.5 + 7.5 * (abs(strengths[node]) / largest) ** 0.5
        drawing.append(_mark(node, x, y, size, strengths[node], says[node], node in squares))
    opened = max(range(len(places)), key=lambda node: abs(strengths[node]), default=None)
    cards = [
        _card(node, node == opened, says, strengths[node], shown[node], [edge for edge in edges if node in edge[:2]])
        for node in range(len(places))
    ]
    return Html(
        f'<div class="attribution" onclick="{escape(CLICK)}" onkeydown="{escape(ENTER)}"><b>{escape(title)}</b>'
        f'<svg role="group" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'style="max-width: 100%; height: auto; display: block; font: 12px sans-serif">{"".join(drawing)}</svg>'
        f"<small>Click on a node to see what it is, and its edges alone; click beside it to see all edges.</small>"
        f"{''.join(cards)}</div>"
    )


def _spots(places: Sequence[tuple[int, int]], n_rows: int) -> list[tuple[float, float]]:
    """Where each node is drawn: several at one place stand side by side, many of them at three heights."""
    together: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for node, place in enumerate(places):
        together[place].append(node)
    spots = [(0.0, 0.0)] * len(places)
    for (row, position), nodes in together.items():
        for i, node in enumerate(nodes):
            across = position + 0.5 + SPREAD * ((i + 0.5) / len(nodes) - 0.5)
            up = row + 0.5 + 0.15 * (i % 3 - 1) * (len(nodes) > 3)
            spots[node] = LEFT + COLUMN * across, TOP + ROW * (n_rows - up)
    return spots


def _axes(tokens: Ticks, rows: Ticks) -> list[str]:
    found = []
    right, bottom = LEFT + COLUMN * len(tokens), TOP + ROW * len(rows)
    for row, name in enumerate(rows):
        y = TOP + ROW * (len(rows) - row - 0.5)
        found.append(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="{GREY}" stroke-opacity="0.25"/>')
        found.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="currentColor">{escape(name)}</text>')
    for position, token in enumerate(tokens):
        x, y = LEFT + COLUMN * (position + 0.4), bottom + 14
        found.append(
            f'<text x="{x:.1f}" y="{y}" transform="rotate(35 {x:.1f} {y})" fill="currentColor">'
            f"{escape(visible(token))}</text>"
        )
    return found


def _colour(value: float) -> str:
    return f"rgb{BLUE}" if value > 0 else f"rgb{RED}" if value < 0 else GREY


def _lines(spots: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int, float]]) -> list[str]:
    """The heaviest edge is the thickest, and lies on top."""
    heaviest = max((abs(weight) for _, _, weight in edges), default=0.0) or 1.0
    found = []
    for source, target, weight in sorted(edges, key=lambda edge: abs(edge[2])):
        (x1, y1), (x2, y2), share = spots[source], spots[target], abs(weight) / heaviest
        found.append(
            f'<line data-from="{source}" data-to="{target}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{_colour(weight)}" stroke-width="{0.5 + 4 * share:.2f}" '
            f'stroke-opacity="{0.12 + 0.7 * share:.2f}"/>'
        )
    return found


def _mark(node: int, x: float, y: float, size: float, strength: float, words: str, is_square: bool) -> str:
    shape, where = "circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"'
    if is_square:
        shape, where = "rect", f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size:.1f}" height="{2 * size:.1f}"'
    return (
        f'<{shape} data-go="{node}" role="button" tabindex="0" {where} fill="{_colour(strength)}" stroke="white" '
        f'stroke-width="1.5" style="cursor: pointer"><title>{escape(words)}</title></{shape}>'
    )


def _card(
    node: int,
    is_open: bool,
    says: Sequence[str],
    strength: float,
    examples: Examples,
    edges: Sequence[tuple[int, int, float]],
) -> str:
    """The dashboard of one node."""
    name, *more = says[node].split("\n")
    largest = max((value for _, values in examples for value in values), default=0.0)
    texts = "".join(f"<li>{coloured_tokens(tokens, values, largest)}</li>" for tokens, values in examples)
    parts = "".join(f"<br>{escape(line)}" for line in more)
    if texts:
        parts += f'<ul style="font-family: monospace; line-height: 1.8">{texts}</ul>'
    sources = [(source, weight) for source, target, weight in edges if target == node]
    targets = [(target, weight) for source, target, weight in edges if source == node]
    for words, ways in (("from", sources), ("to", targets)):
        if ways:
            strongest = sorted(ways, key=lambda way: -abs(way[1]))
            n_more = len(strongest) - STRONGEST
            listed = "".join(_way(other, weight, says) for other, weight in strongest[:STRONGEST])
            parts += f"<div>{words}: {listed}{f'and {n_more} more' if n_more > 0 else ''}</div>"
    hidden = "" if is_open else " hidden"
    return f'<div data-card="{node}"{hidden}><p><b>{escape(name)}</b>, {strength:+.2f}</p>{parts}</div>'


def _way(node: int, weight: float, says: Sequence[str]) -> str:
    """A button that leads to the dashboard at the other end of an edge."""
    name = escape(says[node].split("\n")[0])
    return (
        f'<button data-go="{node}" style="color: {_colour(weight)}; background: white">{weight:+.2f} {name}</button> '
    )
