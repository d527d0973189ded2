"""A circuit as a drawing: which parts of a model do the work, at which token, and what each hands to which.

The same function draws a hypothesis before the experiments and the circuit that they leave.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from course_utils.plots import BLUE, RED, Figure, Ticks, template, visible

NODE, LINE = "#dfe8f5", "#5b7083"
Edges = Mapping[tuple[str, str], str | float] | Sequence[tuple[str, str]]


def draw_circuit(
    nodes: Mapping[str, tuple[float, float]], edges: Edges, *, tokens: Ticks, title: str, layers: Ticks | None = None
) -> Figure:
    """Nodes by name at (layer, position): layers go up, positions go across, and the ticks below are the tokens.

    Edges are pairs of names. In a mapping each has a label: a text, or a number, which is drawn blue where it is positive
    and red where it is negative, the thicker the larger. Layer -1 is for embeddings, and one more than the last for
    the logits; `layers` names them from the lowest drawn to the highest. Nodes at one place stand side by side.

    Raises ValueError for an edge between nodes that are not drawn, and for a position without a token.
    """
    import plotly.graph_objects as go

    labels = dict(edges) if isinstance(edges, Mapping) else dict.fromkeys(edges, "")
    for pair in labels:
        unknown = [name for name in pair if name not in nodes]
        if unknown:
            raise ValueError(f"draw_circuit: an edge names {unknown[0]!r}, but the nodes are {', '.join(nodes)}.")
    for name, (_, position) in nodes.items():
        if not 0 <= position < len(tokens):
            raise ValueError(f"draw_circuit: {name} is at position {position}, but there are {len(tokens)} tokens.")
    places = _spread(nodes)
    figure = go.Figure()
    sizes = [abs(float(label)) for label in labels.values() if not isinstance(label, str)]
    for (start, end), label in labels.items():
        figure.add_annotation(_arrow(places[start], places[end], label, max(sizes, default=1.0) or 1.0))
        (x0, y0), (x1, y1) = places[start], places[end]
        shown = label if isinstance(label, str) else f"{label:+.3g}"
        if shown:
            figure.add_annotation(x=(x0 + x1) / 2, y=(y0 + y1) / 2, text=escape(shown), showarrow=False, **_SMALL)
    for name, (x, y) in places.items():
        figure.add_annotation(x=x, y=y, text=escape(name), showarrow=False, **_BOX)
    # Annotations do not stretch the axes, and a pointer does not find them: these dots do both.
    hover = [
        f"{escape(name)}: layer {nodes[name][0]:g}, {escape(visible(tokens[round(nodes[name][1])]))}" for name in places
    ]
    x_all, y_all = [x for x, _ in places.values()], [y for _, y in places.values()]
    figure.add_scatter(x=x_all, y=y_all, mode="markers", marker={"opacity": 0}, hovertext=hover, hoverinfo="text")
    lowest, highest = (int(min(y_all)), int(max(y_all))) if y_all else (0, 0)
    rows = list(range(lowest, highest + 1))
    if layers is not None and len(layers) != len(rows):
        raise ValueError(f"draw_circuit: {len(layers)} names for the {len(rows)} layers from {lowest} to {highest}.")
    texts = [str(row) for row in rows] if layers is None else [escape(name) for name in layers]
    columns = sorted({round(position) for _, position in nodes.values()})
    figure.update_layout(template=template(), title=escape(title), margin={"t": 60, "b": 60}, showlegend=False)
    figure.update_xaxes(
        title="position",
        tickvals=columns,
        ticktext=[escape(visible(tokens[column])) for column in columns],
        range=[min(columns, default=0) - 0.8, max(columns, default=0) + 0.8],
        zeroline=False,
        automargin=True,
    )
    return figure.update_yaxes(
        title="layer", tickvals=rows, ticktext=texts, range=[lowest - 0.5, highest + 0.5], zeroline=False
    )


_BOX: dict[str, Any] = {"bgcolor": NODE, "bordercolor": LINE, "borderpad": 4, "borderwidth": 1, "font": {"size": 12}}
_SMALL: dict[str, Any] = {"bgcolor": "rgba(255, 255, 255, 0.85)", "font": {"size": 11}}


def _spread(nodes: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Where each is drawn, as (x, y): those at one place stand side by side."""
    together: defaultdict[tuple[float, float], list[str]] = defaultdict(list)
    for name, place in nodes.items():
        together[place].append(name)
    return {
        name: (position + (i - (len(names) - 1) / 2) * 0.9 / len(names), layer)
        for (layer, position), names in together.items()
        for i, name in enumerate(names)
    }


def _arrow(start: tuple[float, float], end: tuple[float, float], label: str | float, largest: float) -> dict[str, Any]:
    colour, width = LINE, 1.5
    if not isinstance(label, str):
        colour = "rgb({}, {}, {})".format(*(BLUE if label > 0 else RED))
        width = 1.0 + 3.0 * abs(float(label)) / largest
    head = {"arrowhead": 2, "arrowwidth": width, "arrowcolor": colour, "standoff": 14, "startstandoff": 12}
    return {"ax": start[0], "ay": start[1], "x": end[0], "y": end[1], "axref": "x", "ayref": "y", "text": "", **head}
