"""A circuit as a drawing: which parts of a model do the work, at which token, and what each hands to which.

The same function draws a hypothesis before the experiments and the circuit that they leave. The figure has a fixed size
and both axes count its pixels, so that boxes, arrows and labels can make room for each other.
"""

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from course_utils.plots import BLUE, GREY, RED, Figure, Ticks, label_axes, visible

Edges = Mapping[tuple[str, str], str | int | float] | Sequence[tuple[str, str]]
Nodes = Mapping[str, tuple[int | float, int]]  # `int | float`: what checks types in tests takes no int for a float
Point = tuple[float, float]

ROOM, ROW, GAP = (
    600.0,
    84.0,
    26.0,
)  # the width of the drawing at least, the height of a layer, the space between two boxes
STEPS = 120  # in which an edge is measured
MARGIN = {"l": 110, "r": 20, "b": 70}
BOX: dict[str, Any] = {"bgcolor": "#e3ecf7", "bordercolor": GREY, "borderpad": 4, "font": {"size": 13}}
LABEL: dict[str, Any] = {"bgcolor": "rgba(255, 255, 255, 0.9)", "font": {"size": 11}}
EMBEDDINGS = -1  # the layer below the first


def draw_circuit(nodes: Nodes, edges: Edges, *, tokens: Ticks, title: str, layers: Ticks | None = None) -> Figure:
    """Nodes by name at (layer, position): layers go up, positions go across, and the ticks below are the tokens.

    Edges are pairs of names. In a mapping each has a label: a text, or a number, which makes the edge blue where it is
    positive, red where it is negative, and the thicker the larger. Layer -1 is the embeddings'; the logits stand one
    above the last layer. `layers` are names for the layers, from the lowest drawn to the highest, instead of numbers.
    Positions without a node are left out, nodes at one place stand side by side, and an edge bends around a node in
    its way.

    Raises ValueError for an edge to or from a node that is not drawn, and for a position without a token.
    """
    import plotly.graph_objects as go

    labels = dict(edges) if isinstance(edges, Mapping) else dict.fromkeys(edges, "")
    for edge in labels:
        unknown = [name for name in edge if name not in nodes]
        if unknown:
            raise ValueError(f"draw_circuit: the edge {edge} needs a node {unknown[0]!r}; add it to nodes.")
    for name, (_, position) in nodes.items():
        if position not in range(len(tokens)):
            raise ValueError(f"draw_circuit: {name} is at position {position}, but there are {len(tokens)} tokens.")
    lowest = math.floor(min((layer for layer, _ in nodes.values()), default=0))
    highest = math.ceil(max((layer for layer, _ in nodes.values()), default=0))
    rows = range(lowest, highest + 1)
    if layers is not None and len(layers) != len(rows):
        raise ValueError(f"draw_circuit: layers has {len(layers)} names for the layers from {lowest} to {highest}.")
    boxes, columns, width = _arrange(nodes)
    low, high = ROW * (lowest - 0.5), ROW * (highest + 0.5)
    ground = Box(width / 2, (low + high) / 2, width, high - low)
    figure = go.Figure()
    label_axes(figure, "position", "layer", title)
    taken = list(boxes.values())  # by boxes and labels
    largest = max((abs(float(label)) for label in labels.values() if not isinstance(label, str)), default=0.0)
    for (start, end), label in labels.items():
        points = _path(boxes[start], boxes[end], [boxes[name] for name in boxes if name not in (start, end)], ground)
        _draw_edge(figure, points, boxes[start], boxes[end], label, largest or 1.0)
        shown = label if isinstance(label, str) else f"{label:+.3g}"
        if shown:
            free = _free_place(points, shown, taken)
            taken.append(free)
            says = escape(f"{start} → {end}: {shown}")
            figure.add_annotation(x=free.x, y=free.y, text=escape(shown), hovertext=says, showarrow=False, **LABEL)
    for name, box in boxes.items():
        text = "<br>".join(map(escape, _lines(name)))
        figure.add_annotation(x=box.x, y=box.y, text=text, showarrow=False, **BOX)
    # A pointer does not find these boxes, so each has a dot without colour.
    where = [
        escape(f"{name}: layer {layer:g}, position {place} ({visible(tokens[place])})")
        for name, (layer, place) in nodes.items()
    ]
    across, up = [box.x for box in boxes.values()], [box.y for box in boxes.values()]
    dots = {"mode": "markers", "marker": {"opacity": 0, "size": 24}, "hovertext": where, "hoverinfo": "text"}
    figure.add_scatter(x=across, y=up, **dots)
    ticks = [escape(visible(tokens[position])) for position in columns]
    figure.update_xaxes(range=[0, width], tickvals=list(columns.values()), ticktext=ticks)
    numbers = ["embeddings" if row == EMBEDDINGS else str(row) for row in rows]
    ticks = numbers if layers is None else [escape(name) for name in layers]
    figure.update_yaxes(range=[low, high], tickvals=[ROW * row for row in rows], ticktext=ticks)
    figure.update_xaxes(showgrid=False, zeroline=False, automargin=False)
    figure.update_yaxes(zeroline=False, automargin=False)
    margin = MARGIN | {"t": figure.layout.margin.t}
    size = {"width": width + margin["l"] + margin["r"], "height": high - low + margin["t"] + margin["b"]}
    return figure.update_layout(showlegend=False, margin=margin, **size)


@dataclass(frozen=True)
class Box:
    """A rectangle with words in it, by its middle."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: "Box", room: float = 0.0) -> bool:
        beside = abs(self.x - other.x) > (self.width + other.width) / 2 + room
        return not beside and abs(self.y - other.y) <= (self.height + other.height) / 2 + room


def _lines(name: str) -> list[str]:
    return textwrap.wrap(name, 12) or [""]


def _arrange(nodes: Nodes) -> tuple[dict[str, Box], dict[int, float], float]:
    """The box of each node, the middle of each column, and the width of all; its fullest layer makes a column wide."""
    together: defaultdict[tuple[int, float], list[str]] = defaultdict(list)
    sizes = {name: (7.2 * max(map(len, _lines(name))) + 12, 17.0 * len(_lines(name)) + 10) for name in nodes}
    for name, (layer, position) in nodes.items():
        together[position, layer].append(name)
    widths: dict[int, float] = dict.fromkeys(sorted({position for position, _ in together}), 0.0)
    for (position, _), names in together.items():
        widths[position] = max(widths[position], sum(sizes[name][0] + GAP for name in names))
    stretched = max(1.0, ROOM / (sum(widths.values()) or 1.0))
    columns, left = {}, 0.0
    for position, width in widths.items():
        columns[position] = left + width * stretched / 2
        left += width * stretched
    boxes = {}
    for (position, layer), names in together.items():
        x = columns[position] - sum(sizes[name][0] + GAP for name in names) / 2
        for name in names:
            width, height = sizes[name]
            boxes[name] = Box(x + (width + GAP) / 2, ROW * layer, width, height)
            x += width + GAP
    return {name: boxes[name] for name in nodes}, columns, max(left, ROOM)


def _path(start: Box, end: Box, others: Sequence[Box], inside: Box) -> list[Point]:
    """Points from one box to another: a straight line, or the flattest arc with the fewest other boxes in its way."""
    (along, up), paths = (end.x - start.x, end.y - start.y), []
    for bend in (0.0, 0.12, -0.12, 0.2, -0.2, 0.3, -0.3, 0.4, -0.4):  # as a share of the length, to the right or left
        middle = ((start.x + end.x) / 2 + 2 * bend * up, (start.y + end.y) / 2 - 2 * bend * along)
        paths.append([_on_arc((start.x, start.y), middle, (end.x, end.y), step / STEPS) for step in range(STEPS + 1)])
    return min(
        paths,
        key=lambda path: (
            sum(any(_touches(point, box) for point in path) for box in others)
            + any(not _touches(point, inside) for point in path)
        ),
    )


def _touches(point: Point, box: Box) -> bool:
    return box.overlaps(Box(*point, 0.0, 0.0), 4.0)


def _on_arc(start: Point, middle: Point, end: Point, share: float) -> Point:
    near, both, far = (1 - share) ** 2, 2 * share * (1 - share), share**2
    x, y = (near * a + both * b + far * c for a, b, c in zip(start, middle, end, strict=True))
    return x, y


def _draw_edge(
    figure: Figure, points: list[Point], start: Box, end: Box, label: str | int | float, largest: float
) -> None:
    """The line from border to border, and on its last piece an arrow's head."""
    colour, width = GREY, 1.5
    if not isinstance(label, str):
        colour = "rgb({}, {}, {})".format(*(BLUE if label > 0 else RED))
        width = 1.0 + 3.0 * abs(float(label)) / largest
    outside = [
        one for one in points if not start.overlaps(Box(*one, 0.0, 0.0)) and not end.overlaps(Box(*one, 0.0, 0.0), 2.0)
    ]
    outside = outside if len(outside) > 1 else [points[0], points[-1]]  # boxes that touch
    path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in [*outside[:-1:6], outside[-1]])
    figure.add_shape(type="path", path=path, line={"color": colour, "width": width}, layer="below")
    (x, y), far = outside[-1], [one for one in outside if math.dist(one, outside[-1]) > 4 * width + 6]
    before = far[-1] if far else outside[0]  # far enough away for a head; plotly draws none on a shorter line
    head: dict[str, Any] = {"axref": "x", "ayref": "y", "arrowhead": 2, "arrowsize": max(0.6, 1.6 / width)}
    figure.add_annotation(x=x, y=y, ax=before[0], ay=before[1], arrowwidth=width, arrowcolor=colour, **head)


def _free_place(points: Sequence[Point], text: str, taken: Sequence[Box]) -> Box:
    """A place for the label on its edge, near the half of it, where it covers no box and no other label."""
    width = 6.5 * len(text) + 6
    near_half = sorted(range(STEPS // 6, STEPS - STEPS // 6), key=lambda step: abs(step - STEPS // 2))
    places = [Box(*points[step], width, 16.0) for step in near_half]
    return next((place for place in places if not any(place.overlaps(other, 2.0) for other in taken)), places[0])
