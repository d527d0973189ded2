"""An attribution graph as a drawing: layers go up, positions go across, and the pointer asks a node what it is."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

from course_utils.plots import BLUE, RED, Figure, Ticks, label_axes, visible

ROW = 1.0  # between two layers, as between two positions
SPREAD = 0.8  # how much of a column the nodes at one place fill


def draw_attribution(
    places: Sequence[tuple[int, int]],
    says: Sequence[str],
    strengths: Sequence[float],
    edges: Sequence[tuple[int, int, float]],
    *,
    tokens: Ticks,
    rows: Ticks,
    title: str,
) -> Figure:
    """Nodes at (row, position), from the lowest row up, joined by edges (source, target, weight).

    `says` is what a node tells when the pointer is on it; a line break begins a new line. The larger the absolute
    value of its strength, the larger a node is; it is blue where its strength is positive and red where it is negative.
    So are edges, by their weight. Nodes at one place stand side by side. `tokens` stand below the positions, `rows`
    beside the rows. The figure has every node's words in it, and keeps them as a page: `figure.write_html(path)`.

    Raises ValueError unless there is a text and a strength for each node, and for an edge to a node that is not there.
    """
    import plotly.graph_objects as go

    if not len(places) == len(says) == len(strengths):
        sizes = f"{len(places)}, {len(says)} and {len(strengths)}"
        raise ValueError(
            f"draw_attribution: places, says and strengths have {sizes} entries, one is needed for each node."
        )
    if unknown := [edge for edge in edges if not (0 <= edge[0] < len(places) and 0 <= edge[1] < len(places))]:
        raise ValueError(f"draw_attribution: there is an edge {unknown[0]}, but there are {len(places)} nodes.")
    together: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for node, place in enumerate(places):
        together[place].append(node)
    across, up = [0.0] * len(places), [0.0] * len(places)
    for (row, position), nodes in together.items():
        for i, node in enumerate(nodes):
            across[node] = position + SPREAD * ((i + 0.5) / len(nodes) - 0.5)
            up[node] = ROW * row + 0.12 * (i % 3 - 1) * (len(nodes) > 3)  # many side by side: at three heights
    figure = go.Figure()
    heaviest = max((abs(weight) for _, _, weight in edges), default=0.0) or 1.0
    for source, target, weight in sorted(edges, key=lambda edge: abs(edge[2])):
        red, green, blue = BLUE if weight > 0 else RED
        share = abs(weight) / heaviest
        figure.add_scatter(
            x=[across[source], across[target]],
            y=[up[source], up[target]],
            mode="lines",
            line={"width": 0.5 + 4 * share, "color": f"rgba({red}, {green}, {blue}, {0.12 + 0.7 * share:.2f})"},
            hoverinfo="skip",
        )
    largest = max(map(abs, strengths), default=0.0) or 1.0
    colours = [f"rgb{BLUE}" if strength > 0 else f"rgb{RED}" for strength in strengths]
    figure.add_scatter(
        x=across,
        y=up,
        mode="markers",
        marker={
            "size": [7 + 15 * (abs(strength) / largest) ** 0.5 for strength in strengths],
            "color": colours,
            "line": {"width": 1, "color": "white"},
        },
        hovertext=["<br>".join(map(escape, text.split("\n"))) for text in says],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    label_axes(figure, "position", "layer", title)
    figure.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=[escape(visible(token)) for token in tokens], showgrid=False
    )
    figure.update_yaxes(tickvals=[ROW * row for row in range(len(rows))], ticktext=list(map(escape, rows)))
    return figure.update_layout(showlegend=False, height=120 + 85 * len(rows), hovermode="closest")
