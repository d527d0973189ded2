"""The drawing of an attribution graph: what is where, what a click opens, and that nothing comes from elsewhere."""

import re
from html.parser import HTMLParser

import pytest

from course_utils.attribution import draw_attribution
from course_utils.plots import BLUE, GREY, RED

ROWS, TOKENS = ("embeddings", "layer 0"), ("<b>", " the")
EXAMPLES = ([], [([" a", " &"], [0.0, 2.0])], [])


def drawn(**changes: object) -> str:
    """Three nodes, two of them at one place."""
    given = {
        "places": [(0, 0), (1, 1), (1, 1)],
        "says": ["first\nline", "second", "<third>"],
        "strengths": [1.0, -4.0, 0.0],
        "edges": [(0, 1, 2.0), (0, 2, -1.0)],
        "examples": EXAMPLES,
    }
    return draw_attribution(**(given | changes), tokens=TOKENS, rows=ROWS, title="A <graph>").source  # type: ignore[arg-type]


class Seen(HTMLParser):
    """Tags that are open, nodes and edges with what they carry, and the text of each dashboard."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.nodes: list[dict[str, str]] = []
        self.edges: list[dict[str, str]] = []
        self.ways: list[str] = []
        self.cards: list[str] = []
        self.visible: list[int] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag in ("circle", "rect"):
            self.nodes.append(found | {"tag": tag})
        if tag == "button":
            self.ways.append(found["data-go"])
        if "data-from" in found:
            self.edges.append(found)
        if "data-card" in found:
            if "hidden" not in found:
                self.visible.append(len(self.cards))
            self.cards.append("")
        if tag not in ("br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cards:
            self.cards[-1] += data


def test_every_text_is_shown_as_it_is_and_every_tag_is_closed() -> None:
    source = drawn()
    seen = Seen(source)
    assert seen.open == []
    for words in ("A <graph>", "<third>", "<b>", "·the", "embeddings", "layer 0", "·a", "·&"):
        assert words in seen.text
    assert "http" not in source and "<script" not in source


def test_nodes_stand_at_their_places_in_their_colours() -> None:
    first, second, third = Seen(drawn()).nodes
    assert float(first["cy"]) > float(second["cy"]) == float(third["cy"])  # rows go up
    assert float(first["cx"]) < float(second["cx"]) < float(third["cx"])
    assert float(second["r"]) > float(first["r"]) > float(third["r"])
    assert [node["fill"] for node in (first, second, third)] == [f"rgb{BLUE}", f"rgb{RED}", GREY]


def test_squares_are_squares() -> None:
    first, second, _ = Seen(drawn(squares=[1])).nodes
    assert (first["tag"], second["tag"]) == ("circle", "rect")
    assert float(second["width"]) == float(second["height"])


def test_the_heaviest_edge_is_the_thickest_and_lies_on_top() -> None:
    light, heavy = Seen(drawn()).edges
    assert (heavy["data-from"], heavy["data-to"]) == ("0", "1")
    assert float(light["stroke-width"]) < float(heavy["stroke-width"])
    assert (heavy["stroke"], light["stroke"]) == (f"rgb{BLUE}", f"rgb{RED}")


def test_a_dashboard_has_words_examples_and_the_edges_on_both_sides() -> None:
    seen = Seen(drawn())
    first, second, third = seen.cards
    assert seen.visible == [1]  # the largest strength
    assert "line" in first and "to: +2.00 second -1.00 <third>" in first and "from" not in first
    assert "·a·&" in second and "from: +2.00 first" in second and "-4.00" in second
    assert "from: -1.00 first" in third
    assert seen.ways == ["1", "2", "0", "0"]


def test_a_dashboard_lists_the_strongest_edges_alone() -> None:
    edges = [(i, 9, float(i + 1)) for i in range(9)]
    places, says = [(0, 0)] * 9 + [(1, 1)], [f"node {i}" for i in range(10)]
    last = Seen(drawn(places=places, says=says, strengths=[1.0] * 10, edges=edges, examples=None)).cards[-1]
    assert re.findall(r"node (\d)", last) == ["9", "8", "7", "6", "5", "4", "3"]  # itself, then from the strongest on
    assert "and 3 more" in last


def test_many_nodes_at_one_place_do_not_hide_each_other() -> None:
    source = drawn(places=[(1, 0)] * 5, says=["a"] * 5, strengths=[1.0] * 5, edges=[], examples=None)
    assert len({(node["cx"], node["cy"]) for node in Seen(source).nodes}) == 5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3, 1 and 3"):
        drawn(says=["one"])
    with pytest.raises(ValueError, match="3, 3 and 3 and 1"):
        drawn(examples=[()])
    with pytest.raises(ValueError, match="an edge \\(0, 7"):
        drawn(edges=[(0, 7, 1.0)])
