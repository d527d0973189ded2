"""Several figures in one, with a slider that chooses: how a pattern changes over training, a distribution with heat.

The slider is plotly's own and needs no network and no kernel: it works in a notebook, in HTML and on the site.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from course_utils.plots import Figure, log_axis, plain, visible

DIGITS = 4  # of every number, which keeps a notebook small
DRAWN = ("x", "y", "z", "text", "hovertext")


def slider(figures: Mapping[str, Figure], *, steps: str) -> Figure:
    """One of several figures, chosen by a slider; `steps` says what their names are, such as "step" or "layer".

    The figures come from the same function, with as many matrices, lines or bars each. They share one scale, so that a
    colour or a height means the same at every step. The first is shown until the slider moves.
    """
    import plotly.graph_objects as go

    drawn = list(figures.values())
    if len({tuple(trace.type for trace in figure.data) for figure in drawn}) != 1:
        raise ValueError("slider: it takes figures that one function drew, with equally many series in each.")
    figure = go.Figure(drawn[0])
    _one_scale(figure, drawn)
    # A step changes data and layout in place. Frames would too, but whatever shows data and layout only loses them.
    data, words = _what_differs([_data(one) for one in drawn]), _what_differs([_words(one) for one in drawn])
    choices = [
        {"method": "update", "label": plain(visible(name)), "args": [of_data, of_layout]}
        for name, of_data, of_layout in zip(figures, data, words, strict=True)
    ]
    ticks = max((len(tick) for tick in figure.layout.xaxis.ticktext or ()), default=0)
    below = 70 + max(0, 7 * ticks - 30)  # pixels: ticks may stand upright, and the axis' name comes below them
    control = {"steps": choices, "currentvalue": {"prefix": f"{plain(steps)}: "}, "pad": {"t": below}}
    return figure.update_layout(
        sliders=[control], margin={"b": below + 60}, height=(figure.layout.height or 450) + below
    )


def _one_scale(figure: Figure, drawn: Sequence[Figure]) -> None:
    """The colours and the axes of the figure reach as far as those of all."""
    for number, trace in enumerate(figure.data):
        if trace.type == "heatmap" and trace.zmin is not None:
            trace.zmin = min(one.data[number].zmin for one in drawn)
            trace.zmax = max(one.data[number].zmax for one in drawn)
    if figure.layout.coloraxis.cmin is not None:
        figure.layout.coloraxis.cmin = min(one.layout.coloraxis.cmin for one in drawn)
        figure.layout.coloraxis.cmax = max(one.layout.coloraxis.cmax for one in drawn)
    kinds = {trace.type for trace in figure.data}
    if kinds <= {"scatter", "bar"}:
        if "bar" not in kinds:
            _one_range(figure.layout.xaxis, [trace.x for one in drawn for trace in one.data])
        _one_range(figure.layout.yaxis, [trace.y for one in drawn for trace in one.data], with_zero="bar" in kinds)


def _one_range(axis: Any, values: Sequence[Any], with_zero: bool = False) -> None:
    numbers = np.concatenate([np.asarray(value, dtype=float) for value in values])
    if axis.type == "log":
        axis.update(log_axis(torch.from_numpy(numbers)))
        numbers = np.log10(numbers[numbers > 0])
    numbers = numbers[np.isfinite(numbers)]
    if axis.range is None and numbers.size:  # else the caller chose one
        lowest, highest = numbers.min(), numbers.max()
        if with_zero:
            lowest, highest = min(lowest, 0), max(highest, 0)
        room = 0.05 * (highest - lowest or 1)
        axis.range = [lowest - room * (lowest != 0 or not with_zero), highest + room * (highest != 0 or not with_zero)]


def _data(figure: Figure) -> dict[str, list[Any]]:
    return {key: [_short(trace[key]) if key in trace else None for trace in figure.data] for key in DRAWN}


def _words(figure: Figure) -> dict[str, Any]:
    """Title and ticks; those of a logarithmic axis are the same at every step."""
    words = {"title.text": figure.layout.title.text}
    for name, axis in figure.layout.to_plotly_json().items():
        if re.fullmatch(r"[xy]axis\d*", name) and axis.get("type") != "log":
            words |= {f"{name}.{key}": _short(axis.get(key)) for key in ("tickvals", "ticktext")}
    return words


def _what_differs(figures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each figure what is not the same in all of them."""
    same = {key for key, value in figures[0].items() if all(one.get(key) == value for one in figures)}
    return [{key: value for key, value in one.items() if key not in same} for one in figures]


def _short(values: Any) -> Any:
    """Lists for JSON, with their numbers rounded; what is no number is None, which plotly leaves blank."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list | tuple):
        return [_short(value) for value in values]
    if isinstance(values, float):
        return float(f"{values:.{DIGITS}g}") if np.isfinite(values) else None
    return values
