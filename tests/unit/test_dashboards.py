"""Pages about latents: what stands in them, and that nothing comes from elsewhere."""

from html.parser import HTMLParser

from course_utils.dashboards import LatentCard, dashboard

CARDS = [
    LatentCard(
        7,
        "a <name>",
        [([" Mary", " &"], [2.0, 0.0])],
        [9, 0, 1],
        [0.0, 1.0, 2.0, 3.0],
        [(" she", 1.5)],
        [("<|end|>", -2.0)],
    ),
    LatentCard(12, "never", []),
]


class Seen(HTMLParser):
    """Tags that are open, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.cards: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "details":
            self.cards.append(dict(attrs)["data-words"] or "")
        if tag not in ("input", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_text_is_shown_as_it_is_and_every_tag_is_closed() -> None:
    source = dashboard(CARDS, title="Two <latents>")._repr_html_()
    seen = Seen(source)
    assert seen.open == []
    for words in ("Two <latents>", "a <name>", "·Mary", "·&", "·she", "<|end|>", "-2.00"):
        assert words in seen.text
    assert "http" not in source and "<script" not in source


def test_a_card_is_found_by_its_number_its_note_and_its_texts() -> None:
    first, second = Seen(dashboard(CARDS, title="").source).cards
    assert all(word in first for word in ("7", "a <name>", " mary", " she"))
    assert "12" in second and "mary" not in second


def test_the_largest_value_is_the_darkest_and_a_silent_latent_has_no_colour() -> None:
    source = dashboard(CARDS[:1], title="").source
    assert "0.750" in source and "0.000" in source
    assert "1 to 2: 0 tokens" in source
