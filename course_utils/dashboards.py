"""Pages about latents that need no network: coloured examples, a histogram, tokens up and down, and a search box.

A `LatentCard` holds what is known of one latent, and `dashboard` shows many of them in one picture of HTML, which works
in a notebook, in an executed notebook as HTML, and on the site.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from course_utils.plots import BLUE, GREY, RED, Html, visible

FILTER = (
    "const wanted = this.value.toLowerCase();"
    "for (const card of this.closest('div').querySelectorAll('details'))"
    " card.style.display = card.dataset.words.includes(wanted) ? '' : 'none';"
)


@dataclass(frozen=True)
class LatentCard:
    """What is known of one latent; texts of tokens are as the tokenizer decodes them.

    `examples` are pairs (tokens, values), the value of the latent at each token. `counts` is a histogram with one edge
    more than counts. `up` and `down` are tokens with the latent's effect on their logits.
    """

    number: int
    note: str
    examples: Sequence[tuple[Sequence[str], Sequence[float]]]
    counts: Sequence[int] = ()
    edges: Sequence[float] = ()
    up: Sequence[tuple[str, float]] = ()
    down: Sequence[tuple[str, float]] = ()
    words: str = field(default="")  # further words by which a search finds it


def dashboard(cards: Sequence[LatentCard], *, title: str) -> Html:
    """All cards, the first one open, below a box that shows only those in which a word occurs."""
    shown = "".join(_card(card, is_open=place == 0) for place, card in enumerate(cards))
    box = (
        f'<label>Search {len(cards)} latents: <input type="search" placeholder="a word or a number" '
        f'oninput="{escape(FILTER)}"></label>'
    )
    return Html(f"<div><b>{escape(title)}</b><p>{box}</p>{shown}</div>")


def _card(card: LatentCard, is_open: bool) -> str:
    texts = ["".join(tokens) for tokens, _ in card.examples]
    known = " ".join([str(card.number), card.note, card.words, *texts, *(token for token, _ in card.up)])
    largest = max((value for _, values in card.examples for value in values), default=0.0)
    examples = "".join(f"<li>{coloured_tokens(tokens, values, largest)}</li>" for tokens, values in card.examples)
    effects = _effects("more likely", card.up, BLUE) + _effects("less likely", card.down, RED)
    return (
        f'<details data-words="{escape(known.lower())}"{" open" if is_open else ""}>'
        f"<summary>latent {card.number}: {escape(card.note)}</summary>"
        f"{_histogram(card.counts, card.edges)}{effects}"
        f'<ul style="font-family: monospace; line-height: 1.8">{examples}</ul></details>'
    )


def coloured_tokens(tokens: Sequence[str], values: Sequence[float], largest: float) -> str:
    """A text as HTML, each token the bluer the nearer its value is to the largest; the pointer reads the values."""
    red, green, blue = BLUE
    spans = []
    for token, value in zip(tokens, values, strict=True):
        opacity = 0.75 * max(0.0, value) / (largest or 1.0)  # never opaque: readable on light and dark pages
        spans.append(
            f'<span title="{value:.3g}" style="background: rgba({red}, {green}, {blue}, {opacity:.3f})">'
            f"{escape(visible(token))}</span>"
        )
    return "<wbr>".join(spans)


def _effects(words: str, tokens: Sequence[tuple[str, float]], colour: tuple[int, int, int]) -> str:
    if not tokens:
        return ""
    red, green, blue = colour
    style = f"border-bottom: 3px solid rgba({red}, {green}, {blue}, 0.6)"
    named = ", ".join(f'<code style="{style}">{escape(visible(token))}</code> {value:+.2f}' for token, value in tokens)
    return f"<p>{words}: {named}</p>"


def _histogram(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Bars as high as the logarithm of their counts; the pointer reads them."""
    if not counts:
        return ""
    highest, width, height = max(len(str(count)) for count in counts), 22, 60
    bars = []
    for place, count in enumerate(counts):
        size = 0.0 if not count else height * (len(str(count)) - 1 + int(str(count)[0]) / 10) / highest
        label = f"{edges[place]:.3g} to {edges[place + 1]:.3g}: {count} tokens"
        bars.append(
            f'<rect x="{place * width}" y="{height - size:.1f}" width="{width - 2}" height="{size:.1f}" fill="{GREY}">'
            f"<title>{label}</title></rect>"
        )
    total = len(counts) * width
    words = f"tokens (logarithmic) by value, {edges[0]:.3g} to {edges[-1]:.3g}"
    return (
        f'<svg role="img" aria-label="{words}" width="{total}" height="{height}">{"".join(bars)}</svg>'
        f"<br><small>{words}</small>"
    )
