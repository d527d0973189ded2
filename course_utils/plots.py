"""A few plots with labelled axes: each returns a figure, which a notebook shows as the last expression of a cell.

The colours follow the meaning: blue is positive, red negative and white zero (a pair that colour-blind readers can tell
apart); probabilities run from white to blue on [0, 1]; each model of the course has one colour, whatever random is grey.
Values may be on any device, of any dtype, and in a graph. Nothing here needs the network.
"""

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

Figure = Any  # a plotly.graph_objects.Figure; plotly is imported by the functions, because that takes a while
Ticks = Sequence[str]

BLUE, RED = (33, 102, 172), (178, 24, 43)
FEW = 20  # up to here every index gets its tick
WIDE = 70  # characters of a title that a figure in a notebook has room for; on a phone it is scrolled

# Okabe and Ito's colours, which colour-blind readers can tell apart; a series named after a model gets the model's.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MODEL_COLOURS = {
    "tales": "#0072B2",
    "attn-only-2l": "#D55E00",
    "attn-only-4l": "#009E73",
    "reverse-increment": "#CC79A7",
    "gpt2": "#E69F00",
    "smollm2": "#000000",
    "pythia": "#56B4E9",
}
GREY = "#80868f"
BY_CHANCE = ("random", "chance", "uniform", "untrained", "shuffled")  # series that begin so are what others are held to


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
    columns = _texts(x_ticks, n_columns, "x_ticks")
    rows = _texts(y_ticks, n_rows, "y_ticks")
    cells = [[f"{escape(y)} {row}, {escape(x)} {column}" for column in columns] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            z=matrix.numpy(),
            text=cells,
            hovertemplate="%{text}: %{z:.4g}<extra></extra>",
            colorscale=scale,
            zmin=lowest,
            zmax=highest,
            colorbar=_bar_title(colour),
        )
    )
    _label(figure, x, y, title)
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
    names = [escape(name) for name in tables]
    figure = make_subplots(1, len(tables), subplot_titles=names, horizontal_spacing=0.25 / len(tables))
    for column, table in enumerate(values, start=1):
        n_rows, n_columns = table.shape
        columns, rows = _texts(x_ticks, n_columns, "x_ticks"), _texts(y_ticks, n_rows, "y_ticks")
        cells = [[f"{escape(y)} {row}, {escape(x)} {one}" for one in columns] for row in rows]
        hover = "%{text}: %{z:.4g}<extra></extra>"
        picture = go.Heatmap(z=table.numpy(), text=cells, coloraxis="coloraxis", hovertemplate=hover)
        figure.add_trace(picture, 1, column)
        crowded = n_columns * len(values) > 2 * FEW and x_ticks is None  # together they have the width of one figure
        figure.update_yaxes(_axis(y_ticks, n_rows), showgrid=False, zeroline=False, row=1, col=column)
        x_axis = {} if crowded else _axis(x_ticks, n_columns)
        figure.update_xaxes(x_axis, showgrid=False, zeroline=False, row=1, col=column)
    _label(figure, x, y, title)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title=None, selector=lambda axis: axis.anchor != "x")  # only the first needs its name
    colours = {"colorscale": scale, "cmin": lowest, "cmax": highest, "colorbar": _bar_title(colour)}
    return figure.update_layout(coloraxis=colours, margin={"t": figure.layout.margin.t + 30, "b": 60})


def slider_heatmap(
    tables: Mapping[str, Tensor],
    *,
    x: str,
    y: str,
    title: str,
    slider: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
    signed: bool = True,
    colour: str = "",
) -> Figure:
    """One matrix of several, chosen by a slider whose steps are the names; the colours mean the same at every step.

    `slider` says what its steps are, such as "step" or "layer". The matrices have one shape; the first is shown.
    """
    import plotly.graph_objects as go

    values = [_finite(_numbers(table, 2, "slider_heatmap")) for table in tables.values()]
    if len({tuple(table.shape) for table in values}) != 1:
        shapes = ", ".join(str(tuple(table.shape)) for table in values) or "none"
        raise ValueError(f"slider_heatmap: its matrices need one shape, got {shapes}.")
    scale, lowest, highest = _colours(values, signed, "slider_heatmap")
    options: dict[str, Any] = {"x_ticks": x_ticks, "y_ticks": y_ticks, "signed": signed, "colour": colour}
    figure = heatmap(values[0], x=x, y=y, title=title, **options)
    figure.update_traces(zmin=lowest, zmax=highest, colorscale=scale)
    names = [escape(visible(name)) for name in tables]
    figure.frames = [
        go.Frame(name=name, data=[{"type": "heatmap", "z": table.numpy().astype("float32")}])
        for name, table in zip(names, values, strict=True)
    ]
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": name, "args": [[name], at_once]} for name in names]
    shown = {"prefix": f"{escape(slider)}: "}
    return figure.update_layout(sliders=[{"steps": steps, "currentvalue": shown, "pad": {"t": 50}, "len": 1.0}])


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
    named = _named(values, y)
    for (name, series), colour in zip(named, _series_colours([name for name, _ in named]), strict=True):
        heights = _numbers(series, 1, "line")
        n_longest = max(n_longest, len(heights))
        positions = torch.arange(len(heights)) if x_values is None else _numbers(x_values, 1, "line")
        if len(positions) != len(heights):
            raise ValueError(f"line: {name} has {len(heights)} values, but x_values has {len(positions)}.")
        style = {"color": colour}
        figure.add_scatter(x=positions.numpy(), y=heights.numpy(), name=name, mode="lines", line=style, marker=style)
        x_all.append(positions)
        y_all.append(heights)
    _label(figure, x, y, title)
    if x_values is None and not x_log:
        figure.update_xaxes(_axis(None, n_longest))
    return _log_axes(figure, x_all if x_log else None, y_all if y_log else None)


def bar(values: Tensor | Mapping[str, Tensor], *, x: str, y: str, title: str, ticks: Ticks | None = None) -> Figure:
    """One bar per value, side by side for the names of a mapping; `ticks` are the texts below them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    n_bars = 0
    named = _named(values, y)
    for (name, series), colour in zip(named, _series_colours([name for name, _ in named]), strict=True):
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
    _label(figure, x, y, title)
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
) -> Figure:
    """One dot per pair of values; `labels` appear when the pointer is on a dot, `texts` stand beside it for good.

    A dot whose text is None or "" has none; give texts to the few dots that the prose names.
    """
    import plotly.graph_objects as go

    across, up = _numbers(horizontal, 1, "scatter"), _numbers(vertical, 1, "scatter")
    if len(across) != len(up):
        raise ValueError(f"scatter: {len(across)} horizontal values do not pair with {len(up)} vertical ones.")
    hover = _texts(labels, len(across), "labels")
    beside = _texts([text or "" for text in texts], len(across), "texts") if texts is not None else None
    figure = go.Figure(
        go.Scatter(
            x=across.numpy(),
            y=up.numpy(),
            mode="markers" if beside is None else "markers+text",
            marker={"color": COLOURS[0], "size": 7},
            text=beside,
            textposition="top center",
            cliponaxis=False,
            hovertext=hover,
            hovertemplate="%{hovertext}: (%{x:.4g}, %{y:.4g})<extra></extra>",
        )
    )
    _label(figure, x, y, title)
    return _log_axes(figure, [across] if x_log else None, [up] if y_log else None)


class Html:
    """A picture made of HTML; a notebook draws it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def _repr_html_(self) -> str:
        return self.source


def attention_pattern(pattern: Tensor, tokens: Ticks, head_names: Sequence[str] | None = None) -> Html:
    """CircuitsVis's view of one layer's attention, [head query key]: choose a head, point at a token.

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
    return Html(view.local_src)


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
            f'padding: 2px 1px">{escape(visible(token))}</span>'
        )
    words = "<wbr>".join(spans)
    return Html(
        f"<div><b>{escape(title)}</b> <small>(darkest: {largest:.3g})</small>"
        f'<p style="font-family: monospace; line-height: 2">{words}</p></div>'
    )


def visible(token: str) -> str:
    """A token as one readable word: spaces become `·`, and a line break is spelled out."""
    return token.replace(" ", "·").replace("\n", "\\n")


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


def _named(values: Tensor | Mapping[str, Tensor], y: str) -> list[tuple[str, Tensor]]:
    return [(y, values)] if isinstance(values, Tensor) else [(escape(name), series) for name, series in values.items()]


def _texts(ticks: Ticks | None, n: int, name: str) -> list[str]:
    """The text of each index, safe for plotly, which reads tags in texts: `<|endoftext|>` would vanish."""
    if ticks is None:
        return [str(i) for i in range(n)]
    if len(ticks) != n:
        raise ValueError(f"{name} has {len(ticks)} texts for {n} places.")
    return [escape(visible(tick)).replace("$", "&#36;") for tick in ticks]


def _axis(ticks: Ticks | None, n: int) -> dict[str, Any]:
    if ticks is not None:  # by index: two places with the same text must not fall together
        return {"tickmode": "array", "tickvals": list(range(n)), "ticktext": _texts(ticks, n, "ticks")}
    return {"dtick": 1} if n <= FEW else {}


def _bar_title(colour: str) -> dict[str, Any]:
    """The colour bar, which says beside it what its colours measure."""
    return {"title": {"text": escape(colour), "side": "right"}, "thickness": 14} if colour else {"thickness": 14}


def _series_colours(names: Sequence[str]) -> list[str]:
    """One colour per series: its model's, grey for what is there by chance, else the next that is free."""
    chosen: list[str | None] = []
    for name in names:
        models = [colour for model, colour in MODEL_COLOURS.items() if name.startswith(model)]
        by_chance = GREY if name.startswith(BY_CHANCE) else None
        wanted = models[0] if models else by_chance
        chosen.append(None if wanted in chosen else wanted)
    free = [colour for colour in COLOURS if colour not in chosen] or COLOURS
    unnamed = iter(range(len(names)))
    return [colour or free[next(unnamed) % len(free)] for colour in chosen]


def _log_axes(figure: Figure, across: list[Tensor] | None, up: list[Tensor] | None) -> Figure:
    if across is not None:
        figure.update_xaxes(_log_axis(torch.cat(across)))
    if up is not None:
        figure.update_yaxes(_log_axis(torch.cat(up)))
    return figure


def _log_axis(numbers: Tensor) -> dict[str, Any]:
    """A logarithmic axis with round numbers on it: 1, 2, 5 where it is short, powers of ten where it is long."""
    positive = numbers[(numbers > 0) & numbers.isfinite()]
    if not len(positive):
        return {"type": "log"}
    lowest, highest = math.log10(float(positive.min())), math.log10(float(positive.max()))
    decades = range(math.floor(lowest), math.ceil(highest) + 1)
    steps = (1, 2, 5) if highest - lowest <= 2 else (1,)
    every = max(1, math.ceil(len(decades) / 8))
    ticks = [(step, decade) for decade in decades[::every] for step in steps]
    return {
        "type": "log",
        "tickmode": "array",
        "tickvals": [step * 10.0**decade for step, decade in ticks],
        "ticktext": [_round_number(step, decade) for step, decade in ticks],
    }


def _round_number(step: int, decade: int) -> str:
    if -4 <= decade <= 5:
        return f"{step * 10.0**decade:.{max(0, -decade)}f}"
    return f"{step}·10<sup>{decade}</sup>" if step > 1 else f"10<sup>{decade}</sup>"


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


def _label(figure: Figure, x: str, y: str, title: str) -> None:
    lines = textwrap.wrap(title, WIDE) or [""]
    text = "<br>".join(escape(one) for one in lines)
    figure.update_layout(template=template(), title=text, margin={"t": 40 + 20 * len(lines), "b": 60})
    # automargin: long tokens make room for themselves; standoff keeps the axis' name clear of them
    figure.update_xaxes(title={"text": escape(x), "standoff": 10}, automargin=True)
    figure.update_yaxes(title={"text": escape(y), "standoff": 10}, automargin=True)
