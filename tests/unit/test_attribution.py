"""The drawing of an attribution graph."""

import pytest

from course_utils.attribution import draw_attribution
from course_utils.plots import BLUE, RED

ROWS, TOKENS = ("embeddings", "layer 0"), ("<b>", " the")


def drawn(**changes: object) -> object:
    """Three nodes, two of them at one place."""
    given = {
        "places": [(0, 0), (1, 1), (1, 1)],
        "says": ["first\nline", "second", "<third>"],
        "strengths": [1.0, -4.0, 0.5],
        "edges": [(0, 1, 2.0), (0, 2, -1.0)],
    }
    return draw_attribution(**(given | changes), tokens=TOKENS, rows=ROWS, title="A graph")  # type: ignore[arg-type]


def test_nodes_stand_at_their_places_and_say_what_they_are() -> None:
    *lines, nodes = drawn().data  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert list(nodes.y) == [0, 1, 1]
    assert nodes.x[0] == 0
    assert nodes.x[1] < 1 < nodes.x[2]
    assert list(nodes.hovertext) == ["first<br>line", "second", "&lt;third&gt;"]
    assert nodes.marker.size[1] == max(nodes.marker.size)
    assert list(nodes.marker.color) == [f"rgb{BLUE}", f"rgb{RED}", f"rgb{BLUE}"]


def test_the_heaviest_edge_is_the_thickest_and_lies_on_top() -> None:
    figure = drawn()
    light, heavy = figure.data[:2]  # type: ignore[attr-defined]
    assert light.line.width < heavy.line.width
    assert list(heavy.y) == [0, 1]


def test_many_nodes_at_one_place_do_not_hide_each_other() -> None:
    figure = drawn(places=[(1, 0)] * 5, says=["a"] * 5, strengths=[1.0] * 5, edges=[])
    nodes = figure.data[-1]  # type: ignore[attr-defined]
    assert len(set(zip(nodes.x, nodes.y, strict=True))) == 5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3, 1 and 3 entries"):
        drawn(says=["one"])
    with pytest.raises(ValueError, match="an edge \\(0, 7"):
        drawn(edges=[(0, 7, 1.0)])
