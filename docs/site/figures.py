"""Outputs of a run as HTML that needs nothing but the site: plotly's figures and CircuitsVis's attention views.

A notebook stores a figure as JSON, or as a script of 1.3 MB with its data. A page holds the data only, in words too for
those who do not see the picture; `static/figures.js` draws it with the scripts of both packages, served once.
"""

import base64
import json
import re
from collections.abc import Iterator
from html import escape, unescape
from typing import Any

import numpy as np

PLOTLY = "application/vnd.plotly.v1+json"
CIRCUITSVIS = re.compile(
    r'CircuitsVis\.render\(\s*"[^"]+",\s*CircuitsVis\.(?P<component>\w+),\s*(?P<data>\{.*\})\s*\)\s*</script>',
    re.DOTALL,
)


def plotly_html(figure: dict[str, Any]) -> str:
    """A figure's data and its description. The template that all figures share is left out: the site serves it once."""
    layout = {key: value for key, value in figure["layout"].items() if key != "template"}
    return _figure("plotly-figure", {"data": figure["data"], "layout": layout}, plotly_words(figure))


def circuitsvis_html(source: str) -> str | None:
    """The view that this HTML draws with CircuitsVis's own script; None where it draws none."""
    match = CIRCUITSVIS.search(source)
    if match is None:
        return None
    data = json.loads(match["data"])
    words = [f"Interactive view of {len(data['attention'])} attention patterns"] if "attention" in data else []
    words += [f"over {len(data['tokens'])} tokens: {' '.join(data['tokens'])}"] if "tokens" in data else []
    description = " ".join(words) or f"Interactive view {match['component']}"
    return _figure("attention-view", {"component": match["component"], "data": data}, description)


def _figure(kind: str, data: dict[str, Any], words: str) -> str:
    stored = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no `</script>` inside the script
    return (
        f'<figure class="{kind}"><div class="drawing"><script type="application/json">{stored}</script></div>'
        f'<figcaption class="visually-hidden">{escape(words)}</figcaption></figure>'
    )


# --- in words -------------------------------------------------------------------------------------------------------


def plotly_words(figure: dict[str, Any]) -> str:
    """What a figure shows: its title, its axes, and of each of its parts the kind, the name and the extremes."""
    layout = figure["layout"]
    axes = [_plain(layout.get(axis, {}).get("title")) for axis in ("yaxis", "xaxis")]
    title = _plain(layout.get("title"))
    words = [f"{title}."] if title else ["A figure."]
    if all(axes):
        words.append(f"{axes[0]} against {axes[1]}.")
    traces = figure["data"]
    names = [_plain(note.get("text")) for note in layout.get("annotations", [])]
    if all(trace.get("type") == "heatmap" for trace in traces) and len(names) == len(traces):  # titles of subplots
        traces = [{"name": name, **trace} for name, trace in zip(names, traces, strict=True)]
        names = []
    words += _traces(traces)
    for control in layout.get("sliders", []):
        prefix = _plain(control.get("currentvalue", {}).get("prefix"))
        words.append(f"A slider, {prefix} {', '.join(_plain(step['label']) for step in control['steps'])}.")
    if any(names):
        words.append(f"Labels: {', '.join(filter(None, names))}.")
    return " ".join(words)


def _traces(traces: list[dict[str, Any]]) -> Iterator[str]:
    for trace in traces[:12]:
        kind = trace.get("type", "scatter")
        values = _numbers(trace.get("z" if kind == "heatmap" else "y"))
        label = f" “{_plain(trace['name'])}”" if trace.get("name") else ""
        finite = values[np.isfinite(values)]
        if kind == "scatter":
            kind = "line" if "lines" in trace.get("mode", "lines") else "points"
        if not finite.size:
            continue
        size = f", {values.shape[0]} rows and {values.shape[1]} columns" if values.ndim == 2 else ""
        extremes = f"values from {finite.min():.3g} to {finite.max():.3g}"
        if kind == "line":
            yield f"Line{label}: begins at {finite[0]:.3g}, ends at {finite[-1]:.3g}; {extremes}."
        else:
            name = {"heatmap": "Heat map", "bar": "Bars", "points": "Points"}.get(kind, kind.capitalize())
            yield f"{name}{label}{size}: {extremes}."
    if len(traces) > 12:
        yield f"And {len(traces) - 12} more."


def _plain(title: Any) -> str:
    """A title as plotly stores it, without the tags that it knows."""
    text = title.get("text") if isinstance(title, dict) else title
    return unescape(re.sub(r"<[^>]*>", " ", text or "")).strip()


def _numbers(values: Any) -> np.ndarray:
    """The numbers of a trace, which plotly stores as a list or in base64; none where they are no numbers."""
    if isinstance(values, dict) and "bdata" in values:
        array = np.frombuffer(base64.b64decode(values["bdata"]), dtype=np.dtype(values["dtype"]))
        shape = values.get("shape")
        return array.reshape([int(size) for size in str(shape).split(",")]) if shape else array
    try:
        return np.array(values if values is not None else [], dtype=float)
    except (TypeError, ValueError):  # texts, or rows of different lengths
        return np.array([])
