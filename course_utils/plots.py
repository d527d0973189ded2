"""A few plots with labelled axes: each returns a figure, which a notebook shows as the last expression of a cell.

The colours follow the meaning: blue is positive, red negative and white zero (a pair that colour-blind readers can tell
apart); probabilities run from white to blue on [0, 1]; each model of the course has one colour, and chance is grey.
Values may be on any device, of any dtype, and in a graph. Nothing here needs the network.
"""

import functools
import html
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Figure = Any  # a plotly.graph_objects.Figure; plotly is imported by the functions, because that takes a while
Ticks = Sequence[str]

BLUE, RED = (33, 102, 172), (178, 24, 43)
FEW = 20  # up to here every index gets its tick
WIDE = 58  # characters of a title that fit into 560 pixels, which a figure has even on the site's narrowest page

# Okabe and Ito's colours, which colour-blind readers can tell apart; those that are faint on white come last.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"]
GREY = "#5f6670"
MODEL_COLOURS = dict(
    zip(
        ("tales", "attn-only-2l", "attn-only-4l", "reverse-increment", "gpt2", "smollm2", "pythia"),
        COLOURS,
        strict=True,
    )
)
# The digits of the ticks on a logarithmic axis, in tenths, from the sparsest to the densest.
LOG_DIGITS = ((10,), (10, 20, 50), (10, 15, 20, 30, 50, 70), range(10, 100, 5), range(10, 100, 2), range(10, 100))
# Beginnings of the names of series that others are compared with.
BY_CHANCE = ("random", "chance", "uniform", "untrained", "shuffled", "knowing nothing")


def heatmap(
    values: Tensor,
    *,
    x: str,
    y: str,
    title: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
    signed: bool = True,
    colour: str = "",
) -> Figure:
    """A matrix, its first row at the top; `x` says what the columns are, `y` what the rows are, `colour` what it shows.

    `signed` centres the colours on zero; otherwise they run over [0, 1], or up to the maximum where that is larger.
    Infinite values and NaN stay blank. Ticks are texts, one per column or row; the same text may come several times.
    """
    import plotly.graph_objects as go

    matrix = _finite(_numbers(values, 2, "heatmap"))
    scale, lowest, highest = _colours([matrix], signed, "heatmap")
    n_rows, n_columns = matrix.shape
    cells = _cells(x, y, _texts(x_ticks, n_columns, "x_ticks"), _texts(y_ticks, n_rows, "y_ticks"))
    colours = {"colorscale": scale, "zmin": lowest, "zmax": highest, "colorbar": _colour_bar(colour)}
    figure = go.Figure(go.Heatmap(z=matrix.numpy(), **cells, **colours))
    label_axes(figure, x, y, title)
    figure.update_xaxes(_axis(x_ticks, n_columns), showgrid=False, zeroline=False)
    figure.update_yaxes(_axis(y_ticks, n_rows), showgrid=False, zeroline=False, autorange="reversed")
    return figure


def heatmaps(
    tables: Mapping[str, Tensor],
    *,
    x: str,
    y: str,
    title: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
    signed: bool = True,
    colour: str = "",
) -> Figure:
    """Several matrices side by side, in the same colours and with the same ticks, each under its name; as `heatmap`."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    values = [_finite(_numbers(table, 2, "heatmaps")) for table in tables.values()]
    scale, lowest, highest = _colours(values, signed, "heatmaps")
    names = [_wrapped(name, max(12, WIDE // len(tables))) for name in tables]
    figure = make_subplots(1, len(tables), subplot_titles=names, horizontal_spacing=0.25 / len(tables))
    for column, table in enumerate(values, start=1):
        n_rows, n_columns = table.shape
        cells = _cells(x, y, _texts(x_ticks, n_columns, "x_ticks"), _texts(y_ticks, n_rows, "y_ticks"))
        figure.add_trace(go.Heatmap(z=table.numpy(), coloraxis="coloraxis", **cells), 1, column)
        figure.update_yaxes(_axis(y_ticks, n_rows), showgrid=False, zeroline=False, row=1, col=column)
        x_axis = _axis(x_ticks, n_columns)
        if n_columns * len(values) > 2 * FEW:  # together they have the width of one figure
            x_axis = x_axis | {"tickfont": {"size": 8}} if x_ticks is not None else {}
        figure.update_xaxes(x_axis, showgrid=False, zeroline=False, row=1, col=column)
    label_axes(figure, x, y, title)
    x_name = _wrapped(x, max(12, WIDE // len(tables)))
    figure.update_xaxes(title_text=x_name)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title=None, selector=lambda axis: axis.anchor != "x")  # only the first needs its name
    if y_ticks is not None:  # words, which would lie on the panel to the left
        figure.update_yaxes(showticklabels=False, selector=lambda axis: axis.anchor != "x")
    colours = {"colorscale": scale, "cmin": lowest, "cmax": highest, "colorbar": _colour_bar(colour)}
    n_lines = 1 + max((name.count("<br>") for name in names), default=0)
    top, bottom = figure.layout.margin.t + 10 + 20 * n_lines, 60 + 20 * x_name.count("<br>")
    return figure.update_layout(coloraxis=colours, margin={"t": top, "b": bottom})


def line(
    values: Tensor | Mapping[str, Tensor],
    *,
    x: str,
    y: str,
    title: str,
    x_values: Tensor | None = None,
    x_log: bool = False,
    y_log: bool = False,
) -> Figure:
    """One line, or one per name in a mapping; the horizontal position is the index unless `x_values` says otherwise.

    `x_log` and `y_log` make an axis logarithmic; what is not positive has no place on it.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    n_longest = 0
    x_all, y_all = [], []
    for name, series, colour in _series(values, y):
        heights = _numbers(series, 1, "line")
        n_longest = max(n_longest, len(heights))
        positions = torch.arange(len(heights)) if x_values is None else _numbers(x_values, 1, "line")
        if len(positions) != len(heights):
            raise ValueError(f"line: {name} has {len(heights)} values, but x_values has {len(positions)}.")
        style = {"color": colour}
        figure.add_scatter(x=positions.numpy(), y=heights.numpy(), name=name, mode="lines", line=style, marker=style)
        x_all.append(positions)
        y_all.append(heights)
    label_axes(figure, x, y, title)
    if x_values is None and not x_log:
        figure.update_xaxes(_axis(None, n_longest))
    return _log_axes(figure, x_all if x_log else None, y_all if y_log else None)


def bar(values: Tensor | Mapping[str, Tensor], *, x: str, y: str, title: str, ticks: Ticks | None = None) -> Figure:
    """One bar per value, side by side for the names of a mapping; `ticks` are the texts below them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    n_bars = 0
    for name, series, colour in _series(values, y):
        heights = _numbers(series, 1, "bar")
        n_bars = max(n_bars, len(heights))
        texts = _texts(ticks, len(heights), "ticks")
        figure.add_bar(
            x=list(range(len(heights))),
            y=heights.numpy(),
            name=name,
            marker={"color": colour},
            hovertext=texts,
            hovertemplate="%{hovertext}: %{y:.4g}",
        )
    label_axes(figure, x, y, title)
    figure.update_xaxes(_axis(ticks, n_bars))
    return figure


def scatter(
    horizontal: Tensor,
    vertical: Tensor,
    *,
    x: str,
    y: str,
    title: str,
    labels: Ticks | None = None,
    texts: Sequence[str | None] | None = None,
    x_log: bool = False,
    y_log: bool = False,
    diagonal: bool = False,
) -> Figure:
    """One dot per pair of values; `labels` appear when the pointer is on a dot, `texts` stand beside it for good.

    A dot whose text is None or "" has none; give texts to the few dots that the prose names.
    With `diagonal`, a dotted line shows where both values are equal.
    """
    import plotly.graph_objects as go

    across, up = _numbers(horizontal, 1, "scatter"), _numbers(vertical, 1, "scatter")
    if len(across) != len(up):
        raise ValueError(f"scatter: {len(across)} horizontal values do not pair with {len(up)} vertical ones.")
    hover = _texts(labels, len(across), "labels")
    beside = _texts([text or "" for text in texts], len(across), "texts") if texts is not None else None
    places = _free_places(_shares(across, x_log), _shares(up, y_log), beside) if beside is not None else None
    figure = go.Figure(
        go.Scatter(
            x=across.numpy(),
            y=up.numpy(),
            mode="markers" if beside is None else "markers+text",
            marker={"color": COLOURS[0], "size": 7},
            text=beside,
            textposition=places,
            cliponaxis=False,
            hovertext=hover,
            hovertemplate="%{hovertext}: (%{x:.4g}, %{y:.4g})<extra></extra>",
        )
    )
    if diagonal and len(across):
        low, high = max(across.min(), up.min()).item(), min(across.max(), up.max()).item()
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line={"dash": "dot"}, layer="below")
    label_axes(figure, x, y, title)
    return _log_axes(figure, [across] if x_log else None, [up] if y_log else None)


def vectors(
    panels: Mapping[str, Tensor],
    *,
    title: str,
    weights: Tensor | None = None,
    colour: str = "",
    limit: float | None = None,
    columns: int = 5,
) -> Figure:
    """Vectors in the plane, [vector 2], as lines from the origin: one panel for each name, all on the same scale.

    `weights`, one for each vector, colour the tips, and `colour` says what they are. The axes reach as far as the
    longest vector, or up to `limit`. The pointer reads a vector's number and its length.
    """
    from plotly.subplots import make_subplots

    tables = [_numbers(table, 2, "vectors") for table in panels.values()]
    for table in tables:
        if table.shape[1] != 2:
            raise ValueError(f"vectors: it draws vectors with two numbers, but these have shape {tuple(table.shape)}.")
    columns = min(columns, len(tables))
    n_rows = math.ceil(len(tables) / columns)
    names = [_wrapped(name, WIDE // columns) for name in panels]
    figure = make_subplots(n_rows, columns, subplot_titles=names, horizontal_spacing=0.02, vertical_spacing=0.12)
    reach = 1.15 * (limit or max((float(table.norm(dim=1).max()) for table in tables if len(table)), default=1.0))
    for panel, table in enumerate(tables):
        start, gap = torch.zeros(len(table)), torch.full((len(table),), torch.nan)
        tips = [torch.stack([start, coordinate, gap], dim=1).flatten().numpy() for coordinate in table.unbind(dim=1)]
        shades = None if weights is None else _numbers(weights, 1, "vectors").repeat_interleave(3).numpy()
        marker = {"size": [0, 7, 0] * len(table), "color": COLOURS[0] if shades is None else shades}
        figure.add_scatter(
            x=tips[0],
            y=tips[1],
            mode="lines+markers",
            line={"color": GREY, "width": 1.5},
            marker={**marker, "opacity": 1, "line": {"width": 0}, "coloraxis": None if shades is None else "coloraxis"},
            text=[f"{number}: {size:.3g}" for number, size in enumerate(table.norm(dim=1).tolist()) for _ in range(3)],
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
            row=panel // columns + 1,
            col=panel % columns + 1,
        )
    label_axes(figure, "", "", title)
    figure.update_xaxes(range=[-reach, reach], showticklabels=False, ticks="", constrain="domain")
    figure.update_yaxes(range=[-reach, reach], showticklabels=False, ticks="", constrain="domain")
    for panel in range(len(tables)):  # a circle is to look like one
        axis = "" if panel == 0 else str(panel + 1)
        figure.layout[f"yaxis{axis}"].scaleanchor = f"x{axis}"
    colours = {"colorscale": "Viridis", "reversescale": True, "colorbar": _colour_bar(colour)}
    height = 90 + n_rows * max(160, 640 // columns)
    return figure.update_layout(coloraxis=colours, height=height, margin={"t": figure.layout.margin.t + 30, "b": 20})


KEY_AND_QUERY = "In this view, the source is the key's token, and the destination is the query's token."


class Html:
    """A picture made of HTML; a notebook draws it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def _repr_html_(self) -> str:
        return self.source


def attention_pattern(pattern: Tensor, tokens: Ticks, head_names: Sequence[str] | None = None) -> Html:
    """CircuitsVis's view of one layer's attention, [head query key]: choose a head, point at a token.

    CircuitsVis calls the query's token the destination and the key's token the source; the view says so below itself.
    The script comes from the installed package, never from a server: 1.3 MB in the output of the cell.
    """
    from circuitsvis.attention import attention_heads

    weights = _numbers(pattern, 3, "attention_pattern")
    if weights.shape[1:] != (len(tokens), len(tokens)):
        raise ValueError(
            f"attention_pattern: {len(tokens)} tokens need a pattern [head query key] of shape "
            f"(heads, {len(tokens)}, {len(tokens)}), got {tuple(weights.shape)}."
        )
    names = [str(head) for head in range(len(weights))] if head_names is None else list(head_names)
    shown = [visible(token) for token in tokens]
    view = attention_heads(
        weights.float(), shown, attention_head_names=names, min_value=0.0, max_value=1.0, mask_upper_tri=True
    )
    return Html(f"{view.local_src}<p><small>{KEY_AND_QUERY}</small></p>")


def token_colours(tokens: Ticks, values: Tensor, *, title: str) -> Html:
    """The tokens as running text, each on a ground that shows its value: blue positive, red negative, none for zero.

    An infinite value is as dark as the largest finite one, and NaN has no ground.
    """
    numbers = _numbers(values, 1, "token_colours")
    if len(numbers) != len(tokens):
        raise ValueError(f"token_colours: {len(tokens)} tokens, but {len(numbers)} values.")
    largest = _largest([_finite(numbers)])
    strengths = (numbers.abs() / (largest or 1.0)).clamp(max=1.0).nan_to_num()
    spans = []
    for token, number, strength in zip(tokens, numbers.tolist(), strengths.tolist(), strict=True):
        red, green, blue = BLUE if number > 0 else RED
        opacity = 0.75 * strength  # never opaque: the text stays readable on light and dark pages
        spans.append(
            f'<span title="{number:.4g}" style="background: rgba({red}, {green}, {blue}, {opacity:.3f}); '
            f'padding: 2px 1px">{plain(visible(token))}</span>'
        )
    words = "<wbr>".join(spans)
    return Html(
        f"<div><b>{plain(title)}</b> <small>(darkest: {largest:.3g})</small>"
        f'<p style="font-family: monospace; line-height: 2">{words}</p></div>'
    )


def visible(token: str) -> str:
    """A token as one readable word: spaces at its ends become `·`, and a line break is spelled out."""
    return re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), token).replace("\n", "\\n")


# --- common to all ------------------------------------------------------------------------------------------------


def _numbers(values: Tensor, n_axes: int, name: str) -> Tensor:
    if values.ndim != n_axes:
        raise ValueError(
            f"{name}: it draws tensors with {n_axes} axes, but this one has shape {tuple(values.shape)}; "
            "index or average the others away."
        )
    return values.detach().cpu().double()


def _finite(numbers: Tensor) -> Tensor:
    """NaN, which plotly leaves blank, in the place of infinite values, which have no colour on any scale."""
    return numbers.masked_fill(~numbers.isfinite(), torch.nan)


def _largest(tables: Sequence[Tensor]) -> float:
    """The largest absolute value, 0 where there is none; NaN does not count."""
    return max((float(table.nan_to_num().abs().max()) for table in tables if table.numel()), default=0.0)


def _colours(tables: Sequence[Tensor], signed: bool, name: str) -> tuple[str, float, float]:
    """The colours that suit all of these values, and the values at their two ends."""
    largest = _largest(tables)
    if signed:
        return "RdBu", -(largest or 1.0), largest or 1.0
    if any((table < 0).any() for table in tables):
        raise ValueError(f"{name}: some values are negative; signed=False is for probabilities and other sizes.")
    return "Blues", 0.0, max(1.0, largest)


def plain(text: str) -> str:
    """A text in which plotly and HTML read no tags; quotes stay, since plotly would show `&quot;` as it is."""
    return html.escape(text, quote=False)


def _series(values: Tensor | Mapping[str, Tensor], y: str) -> list[tuple[str, Tensor, str]]:
    """Each series with its name and its colour; a single one is named after the axis."""
    named = {y: values} if isinstance(values, Tensor) else {plain(name): series for name, series in values.items()}
    return list(zip(named, named.values(), _series_colours(list(named)), strict=True))


def _texts(ticks: Ticks | None, n: int, name: str) -> list[str]:
    """The text of each index, safe for plotly, which reads tags in texts: `<|endoftext|>` would vanish."""
    if ticks is None:
        return [str(i) for i in range(n)]
    if len(ticks) != n:
        raise ValueError(f"{name} has {len(ticks)} texts for {n} places.")
    return [plain(visible(tick)).replace("$", "&#36;") for tick in ticks]


def _axis(ticks: Ticks | None, n: int) -> dict[str, Any]:
    if ticks is not None:  # by index: two places with the same text must not fall together
        return {"tickmode": "array", "tickvals": list(range(n)), "ticktext": _texts(ticks, n, "ticks")}
    return {"dtick": 1} if n <= FEW else {}


def _cells(x: str, y: str, columns: Sequence[str], rows: Sequence[str]) -> dict[str, Any]:
    """What the pointer reads on each cell of a heatmap: its row and column in words, then its value."""
    words = [[f"{plain(y)} {row}, {plain(x)} {column}" for column in columns] for row in rows]
    return {"text": words, "hovertemplate": "%{text}: %{z:.4g}<extra></extra>"}


def _colour_bar(colour: str) -> dict[str, Any]:
    return {"title": {"text": plain(colour), "side": "right"}, "thickness": 14}


def _series_colours(names: Sequence[str]) -> list[str]:
    """One colour per series: its model's, grey for what is there by chance, else the next that is free."""
    chosen: list[str | None] = []
    for name in names:
        known = [colour for model, colour in MODEL_COLOURS.items() if name.startswith(model)]
        known += [GREY] if name.startswith(BY_CHANCE) else []
        free = [colour for colour in known if colour not in chosen]  # a second line of one model must look different
        chosen.append(free[0] if free else None)
    others = itertools.cycle([colour for colour in COLOURS if colour not in chosen] or COLOURS)
    return [colour or next(others) for colour in chosen]


def _log_axes(figure: Figure, across: list[Tensor] | None, up: list[Tensor] | None) -> Figure:
    if across is not None:
        figure.update_xaxes(log_axis(torch.cat(across)))
    if up is not None:
        figure.update_yaxes(log_axis(torch.cat(up)))
    return figure


def log_axis(numbers: Tensor) -> dict[str, Any]:
    """A logarithmic axis with round numbers on it, about seven; plotly's own are "3 2 10 9 8 7" or "100µ"."""
    positive = numbers[(numbers > 0) & numbers.isfinite()]
    if not len(positive):
        return {"type": "log"}
    lowest, highest = float(positive.min()), float(positive.max())
    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    decades = decades[:: math.ceil(len(decades) / 8)]
    inside: list[list[float]] = []
    for digits in LOG_DIGITS:
        numbers_on_it = [digit / 10 * 10.0**decade for decade in decades for digit in digits]
        inside.append([number for number in numbers_on_it if lowest <= number <= highest * 1.001])
    best = min(range(len(inside)), key=lambda i: abs(len(inside[i]) - 7))
    if len(inside[best]) < 2:  # too short for any of them
        return {"type": "log"}
    ticks = [(digit, decade) for decade in decades for digit in LOG_DIGITS[best]]
    values = [digit / 10 * 10.0**decade for digit, decade in ticks]
    return {"type": "log", "tickmode": "array", "tickvals": values, "ticktext": [_round(*tick) for tick in ticks]}


def _round(digit: int, decade: int) -> str:
    if -5 < decade < 6:
        return f"{digit / 10 * 10.0**decade:.6f}".rstrip("0").rstrip(".")
    return f"{digit / 10:g}·10<sup>{decade}</sup>" if digit > 10 else f"10<sup>{decade}</sup>"


def _shares(numbers: Tensor, log: bool) -> Tensor:
    """Where on an axis they stand, from 0 to 1."""
    places = numbers.log10() if log else numbers
    finite = places[places.isfinite()]
    if not len(finite) or finite.min() == finite.max():
        return torch.full_like(places, 0.5)
    return (places - finite.min()) / (finite.max() - finite.min())


def _free_places(across: Tensor, up: Tensor, texts: Sequence[str]) -> list[str]:
    """On which side of its dot each text stands: where it covers the fewest texts and dots, above if that is free.

    The texts' sizes are those in a figure of 700 by 450 pixels; in another they are about right.
    """
    taken: list[tuple[float, float, float, float]] = []
    chosen = []
    for x, y, text in zip(across.tolist(), up.tolist(), texts, strict=True):
        width, height, gap = 0.013 * len(html.unescape(text)), 0.055, 0.015
        boxes = {
            "top center": (x - width / 2, x + width / 2, y + gap, y + gap + height),
            "bottom center": (x - width / 2, x + width / 2, y - gap - height, y - gap),
            "middle right": (x + gap, x + gap + width, y - height / 2, y + height / 2),
            "middle left": (x - gap - width, x - gap, y - height / 2, y + height / 2),
        }
        costs = {}
        for side, (left, right, low, high) in boxes.items():
            covered = (across > left) & (across < right) & (up > low) & (up < high)
            crossed = [a < right and left < b and c < high and low < d for a, b, c, d in taken]
            outside = max(0.0, -0.05 - left, right - 1.05)
            costs[side] = int(covered.sum()) + 5 * sum(crossed) + 20 * outside
        side = min(costs, key=lambda one: costs[one])
        chosen.append(side)
        if text:
            taken.append(boxes[side])
    return chosen


@functools.cache
def template() -> Any:
    """The look that all figures share: white paper, a thin grid, black text; plotly's own is a grey ground."""
    import plotly.graph_objects as go

    axis = {
        "gridcolor": "#e8ebef",
        "linecolor": "#9aa3ad",
        "zerolinecolor": "#b9c0c8",
        "zerolinewidth": 1,
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#9aa3ad",
        "exponentformat": "power",
    }
    layout = go.Layout(
        paper_bgcolor="white",
        plot_bgcolor="white",
        colorway=COLOURS,
        font={
            "family": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
            "size": 13,
            "color": "#1f2328",
        },
        title={"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
        xaxis=axis,
        yaxis=axis,
        hoverlabel={"font": {"size": 13}},
        legend={"bgcolor": "rgba(255, 255, 255, 0.7)"},
    )
    return go.layout.Template(layout=layout)


def _wrapped(text: str, width: int) -> str:
    """A title in lines, which plotly does not make by itself: it cuts."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, width))


def label_axes(figure: Figure, x: str, y: str, title: str) -> None:
    """The title in lines, the names of the axes, and the look of the course."""
    text = _wrapped(title, WIDE)
    figure.update_layout(template=template(), title=text, margin={"t": 60 + 20 * text.count("<br>"), "b": 60})
    # automargin: long tokens make room for themselves; standoff keeps the axis' name clear of them
    figure.update_xaxes(title={"text": plain(x), "standoff": 10}, automargin=True)
    figure.update_yaxes(title={"text": plain(y), "standoff": 10}, automargin=True)
