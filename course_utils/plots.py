"""A few plots with labelled axes: each returns a figure, which a notebook shows as the last expression of a cell.

The colours follow the meaning: blue is positive, red negative and white zero (a pair that colour-blind readers can tell
apart); probabilities run from white to blue on [0, 1]. Values may be on any device, of any dtype, and in a graph.
Nothing here needs the network.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

Figure = Any  # a plotly.graph_objects.Figure; plotly is imported by the functions, because that takes a while
Ticks = Sequence[str]

BLUE, RED = (33, 102, 172), (178, 24, 43)
FEW = 20  # up to here every index gets its tick


def heatmap(
    values: Tensor,
    *,
    x: str,
    y: str,
    title: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
    signed: bool = True,
) -> Figure:
    """A matrix, its first row at the top; `x` says what the columns are, `y` what the rows are.

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
        )
    )
    _label(figure, x, y, title)
    figure.update_xaxes(_axis(x_ticks, n_columns), showgrid=False, zeroline=False)
    figure.update_yaxes(_axis(y_ticks, n_rows), showgrid=False, zeroline=False, autorange="reversed")
    return figure


def heatmaps(tables: Mapping[str, Tensor], *, x: str, y: str, title: str, signed: bool = True) -> Figure:
    """Several matrices side by side, in the same colours, each under its name; otherwise as `heatmap`."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    values = [_finite(_numbers(table, 2, "heatmaps")) for table in tables.values()]
    scale, lowest, highest = _colours(values, signed, "heatmaps")
    names = [escape(name) for name in tables]
    figure = make_subplots(1, len(tables), subplot_titles=names, horizontal_spacing=0.25 / len(tables))
    for column, table in enumerate(values, start=1):
        hover = f"{escape(y)} %{{y}}, {escape(x)} %{{x}}: %{{z:.4g}}<extra></extra>"
        figure.add_trace(go.Heatmap(z=table.numpy(), coloraxis="coloraxis", hovertemplate=hover), 1, column)
        n_rows, n_columns = table.shape
        crowded = n_columns * len(values) > 2 * FEW  # together they have the width of one figure
        figure.update_yaxes(_axis(None, n_rows), showgrid=False, zeroline=False, row=1, col=column)
        x_axis = {} if crowded else _axis(None, n_columns)
        figure.update_xaxes(x_axis, showgrid=False, zeroline=False, row=1, col=column)
    _label(figure, x, y, title)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title=None, selector=lambda axis: axis.anchor != "x")  # only the first needs its name
    colours = {"colorscale": scale, "cmin": lowest, "cmax": highest}
    return figure.update_layout(coloraxis=colours, margin={"t": 90, "b": 60})


def line(
    values: Tensor | Mapping[str, Tensor], *, x: str, y: str, title: str, x_values: Tensor | None = None
) -> Figure:
    """One line, or one per name in a mapping; the horizontal position is the index unless `x_values` says otherwise."""
    import plotly.graph_objects as go

    figure = go.Figure()
    n_longest = 0
    for name, series in _named(values, y):
        heights = _numbers(series, 1, "line")
        n_longest = max(n_longest, len(heights))
        positions = torch.arange(len(heights)) if x_values is None else _numbers(x_values, 1, "line")
        if len(positions) != len(heights):
            raise ValueError(f"line: {name} has {len(heights)} values, but x_values has {len(positions)}.")
        figure.add_scatter(x=positions.numpy(), y=heights.numpy(), name=name, mode="lines")
    _label(figure, x, y, title)
    if x_values is None:
        figure.update_xaxes(_axis(None, n_longest))
    return figure


def bar(values: Tensor | Mapping[str, Tensor], *, x: str, y: str, title: str, ticks: Ticks | None = None) -> Figure:
    """One bar per value, side by side for the names of a mapping; `ticks` are the texts below them."""
    import plotly.graph_objects as go

    figure = go.Figure()
    n_bars = 0
    for name, series in _named(values, y):
        heights = _numbers(series, 1, "bar")
        n_bars = max(n_bars, len(heights))
        texts = _texts(ticks, len(heights), "ticks")
        figure.add_bar(
            x=list(range(len(heights))),
            y=heights.numpy(),
            name=name,
            hovertext=texts,
            hovertemplate="%{hovertext}: %{y:.4g}",
        )
    _label(figure, x, y, title)
    figure.update_xaxes(_axis(ticks, n_bars))
    return figure


def scatter(horizontal: Tensor, vertical: Tensor, *, x: str, y: str, title: str, labels: Ticks | None = None) -> Figure:
    """One dot per pair of values; `labels` are the texts that appear when the pointer is on a dot."""
    import plotly.graph_objects as go

    across, up = _numbers(horizontal, 1, "scatter"), _numbers(vertical, 1, "scatter")
    if len(across) != len(up):
        raise ValueError(f"scatter: {len(across)} horizontal values do not pair with {len(up)} vertical ones.")
    texts = _texts(labels, len(across), "labels")
    figure = go.Figure(
        go.Scatter(
            x=across.numpy(),
            y=up.numpy(),
            mode="markers",
            hovertext=texts,
            hovertemplate="%{hovertext}: (%{x:.4g}, %{y:.4g})<extra></extra>",
        )
    )
    _label(figure, x, y, title)
    return figure


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


def _label(figure: Figure, x: str, y: str, title: str) -> None:
    figure.update_layout(title=escape(title), margin={"t": 60, "b": 60})
    # automargin: long tokens make room for themselves; standoff keeps the axis' name clear of them
    figure.update_xaxes(title={"text": escape(x), "standoff": 10}, automargin=True)
    figure.update_yaxes(title={"text": escape(y), "standoff": 10}, automargin=True)
