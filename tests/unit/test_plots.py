"""The figures' contents: what stands on the axes, which colours mean what, and which inputs are refused."""

import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from course_utils import plots
from course_utils.diagrams import draw_circuit
from course_utils.sliders import slider
from tests.conftest import ROOT

TOKENS = ["<|eos|>", " Mary", " and", " Mary", "\n"]
MATRIX = torch.arange(15.0).reshape(3, 5) - 4


def test_heatmap_has_labels_the_first_row_on_top_and_colours_around_zero() -> None:
    figure = plots.heatmap(MATRIX, x="key", y="layer", title="Effect", x_ticks=TOKENS)
    picture = figure.data[0]
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("key", "layer")
    assert figure.layout.title.text == "Effect" and figure.layout.yaxis.autorange == "reversed"
    assert torch.equal(torch.as_tensor(picture.z), MATRIX.double())
    assert (picture.zmin, picture.zmax) == (-10, 10)
    assert figure.layout.xaxis.tickvals == (0, 1, 2, 3, 4)  # by index: the two Marys stay apart
    assert figure.layout.xaxis.ticktext == ("&lt;|eos|&gt;", "·Mary", "·and", "·Mary", "\\n")
    assert picture.text[2][3] == "layer 2, key ·Mary"


def test_probabilities_run_from_0_to_1() -> None:
    picture = plots.heatmap(MATRIX.softmax(-1), x="key", y="query", title="Pattern", signed=False).data[0]
    assert (picture.zmin, picture.zmax) == (0, 1)
    assert plots.heatmap(MATRIX.abs(), x="a", y="b", title="Norms", signed=False).data[0].zmax == 10
    with pytest.raises(ValueError, match="some values are negative"):
        plots.heatmap(MATRIX, x="key", y="query", title="Pattern", signed=False)


def test_heatmaps_stand_side_by_side_in_the_same_colours() -> None:
    tables = {"small": MATRIX.abs() / 100, "large <b>": torch.ones(2, 4)}
    figure = plots.heatmaps(tables, x="head", y="layer", title="Scores", signed=False)
    assert [tuple(picture.z.shape) for picture in figure.data] == [(3, 5), (2, 4)]
    assert {picture.coloraxis for picture in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert [note.text for note in figure.layout.annotations] == ["small", "large &lt;b&gt;"]
    assert figure.layout.xaxis2.title.text == "head" and figure.layout.yaxis.title.text == "layer"
    assert figure.layout.yaxis2.title.text is None and figure.layout.yaxis2.autorange == "reversed"
    rows = [f"failure {n}" for n in range(len(MATRIX))]
    worded = plots.heatmaps({"a": MATRIX, "b": MATRIX}, x="a", y="b", title="c", y_ticks=rows).layout
    assert [worded.yaxis.showticklabels, worded.yaxis2.showticklabels] == [None, False]
    long = plots.heatmaps(dict.fromkeys("abc", MATRIX), x="head of layer 1, which reads", y="b", title="c")
    assert long.layout.xaxis2.title.text == "head of layer 1,<br>which reads"  # no wider than its picture
    signed = plots.heatmaps({"a": MATRIX, "b": 2 * MATRIX}, x="a", y="b", title="c").layout.coloraxis
    assert (signed.cmin, signed.cmax) == (-20, 20)
    with pytest.raises(ValueError, match="some values are negative"):
        plots.heatmaps({"a": MATRIX}, x="a", y="b", title="c", signed=False)


def test_vectors_are_lines_from_the_origin_one_panel_for_each_name() -> None:
    pentagon = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    figure = plots.vectors({"a": pentagon, "b": pentagon[:1]}, title="c", weights=torch.tensor([1.0, 0.5]))
    first, second = figure.data
    assert np.nan_to_num(first.x, nan=9).tolist() == [0, 3, 9, 0, 0, 9] and len(second.x) == 3
    assert (first.text[1], first.text[4]) == ("0: 5", "1: 1")
    assert first.marker.color[1] == 1 and first.marker.color[4] == 0.5
    assert [note.text for note in figure.layout.annotations] == ["a", "b"]
    assert figure.layout.xaxis2.range == (-5.75, 5.75)  # one scale for all, with some room
    assert plots.vectors({"a": pentagon}, title="c", limit=2.0).layout.yaxis.range == (-2.3, 2.3)
    with pytest.raises(ValueError, match="vectors with two numbers"):
        plots.vectors({"a": torch.zeros(2, 3)}, title="c")


def test_masked_scores_stay_blank_and_do_not_spoil_the_scale() -> None:
    scores = MATRIX.masked_fill(torch.ones(3, 5).triu(1).bool(), -torch.inf)
    picture = plots.heatmap(scores, x="key", y="query", title="Scores").data[0]
    assert (picture.zmin, picture.zmax) == (-8, 8)
    assert torch.equal(torch.as_tensor(picture.z).isnan(), scores.isinf())
    assert plots.heatmap(torch.zeros(2, 2), x="a", y="b", title="Nothing").data[0].zmax == 1


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_one_infinite_value_leaves_the_others_their_colours(odd: float) -> None:
    values = torch.tensor([[1.0, -2.0, odd]])
    figure = plots.heatmaps({"a": values, "b": values / 2}, x="key", y="query", title="Scores")
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-2, 2)
    assert [torch.as_tensor(picture.z)[0].isnan().tolist() for picture in figure.data] == [[False, False, True]] * 2
    sizes = plots.heatmaps({"a": values.abs()}, x="key", y="query", title="Sizes", signed=False)
    assert sizes.layout.coloraxis.cmax == 2
    source = plots.token_colours(["one", "two", "odd"], values[0], title="Effect").source
    opacities = re.findall(r"rgba\(.*?, ([^,]+)\)", source)
    assert opacities == ["0.375", "0.750", "0.000" if odd != odd else "0.750"]
    assert "darkest: 2)" in source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_any_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 2, 4]).to(dtype)
    assert list(plots.bar(values, x="a", y="b", title="c").data[0].y) == [1, 2, 4]
    assert list(plots.line(values, x="a", y="b", title="c").data[0].y) == [1, 2, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_on_a_gpu() -> None:
    assert list(plots.bar(torch.ones(2, device="cuda"), x="a", y="b", title="c").data[0].y) == [1, 1]


def test_values_in_a_graph() -> None:
    values = torch.ones(2, 2, requires_grad=True) * 2
    plots.heatmap(values, x="a", y="b", title="c")
    plots.scatter(values[0], values[1], x="a", y="b", title="c")
    plots.token_colours(["a", "b"], values[0], title="c")


def test_line_and_bar_draw_one_series_per_name() -> None:
    loss = {"train": torch.tensor([3.0, 2.0]), "held out": torch.tensor([4.0, 3.0])}
    lines = plots.line(loss, x="step", y="loss (nats)", title="Loss", x_values=torch.tensor([0, 100]))
    assert [series.name for series in lines.data] == ["train", "held out"]
    assert [list(series.x) for series in lines.data] == [[0, 100]] * 2
    bars = plots.bar(loss, x="name", y="loss (nats)", title="Loss", ticks=[" Mary", " Mary"])
    assert [list(series.x) for series in bars.data] == [[0, 1]] * 2
    assert bars.layout.xaxis.ticktext == ("·Mary", "·Mary")
    assert (bars.layout.xaxis.title.text, bars.layout.yaxis.title.text) == ("name", "loss (nats)")
    assert plots.bar(torch.ones(3), x="layer", y="score", title="c").layout.xaxis.dtick == 1


def test_spaces_show_where_a_token_begins_or_ends_and_labels_stay_readable() -> None:
    shown = {"": "", "  ": "··", " a ": "·a·", "after layer 0": "after layer 0", " \n": "·\\n"}
    assert {text: plots.visible(text) for text in shown} == shown


def test_the_diagonal_is_where_both_values_are_equal() -> None:
    across, up = torch.tensor([-1.0, 3]), torch.tensor([0.0, 5])
    (line,) = plots.scatter(across, up, x="a", y="b", title="c", diagonal=True).layout.shapes
    assert (line.x0, line.y0, line.x1, line.y1) == (0, 0, 3, 3)
    assert not plots.scatter(across, up, x="a", y="b", title="c").layout.shapes


def test_scatter_names_its_dots() -> None:
    figure = plots.scatter(torch.tensor([1.0, 2]), torch.tensor([3.0, 4]), x="a", y="b", title="c", labels=["p", "q"])
    assert list(figure.data[0].x) == [1, 2] and list(figure.data[0].y) == [3, 4]
    assert list(figure.data[0].hovertext) == ["p", "q"]


@pytest.mark.parametrize(
    "figure",
    [
        plots.heatmap(MATRIX, x="a", y="b", title="c"),
        plots.heatmaps({"one": MATRIX}, x="a", y="b", title="c"),
        plots.line(MATRIX[0], x="a", y="b", title="c"),
        plots.bar(MATRIX[0], x="a", y="b", title="c"),
        plots.scatter(MATRIX[0], MATRIX[0], x="a", y="b", title="c"),
        draw_circuit({"head": (0, 1)}, [], tokens=TOKENS, title="c"),
        slider({"one": plots.line(MATRIX[0], x="a", y="b", title="c")}, steps="step"),
    ],
)
def test_all_figures_have_the_look_of_the_course_and_no_address(figure) -> None:
    assert figure.layout.template == plots.template()
    assert figure.layout.template.layout.paper_bgcolor == "white"  # on dark pages too
    assert "http" not in figure.to_json()


def relative_luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_first_colours_and_the_grey_stand_out_from_white() -> None:
    for colour in [*plots.COLOURS[:5], plots.GREY]:
        assert 1.05 / (relative_luminance(colour) + 0.05) >= 3  # what WCAG asks of graphics


def test_a_model_has_one_colour_in_every_figure() -> None:
    series = torch.arange(3.0)
    first = plots.line(dict.fromkeys(["attn-only-2l", "mine", "random"], series), x="a", y="b", title="c")
    again = plots.bar(dict.fromkeys(["uniform", "tales", "attn-only-2l, head 1.3"], series), x="a", y="b", title="c")
    colours = {one.name: one.marker.color for one in (*first.data, *again.data)}
    assert colours["attn-only-2l"] == colours["attn-only-2l, head 1.3"] == plots.MODEL_COLOURS["attn-only-2l"]
    assert colours["random"] == colours["uniform"] == plots.GREY
    assert colours["mine"] not in {colours["attn-only-2l"], plots.GREY}
    many = plots.line({f"tales, seed {i}": series for i in range(7)}, x="a", y="b", title="c")
    assert len({one.line.color for one in many.data}) == 7


def test_long_titles_break_into_lines_that_have_room() -> None:
    title = "Where three heads look & what each of them reads there, at the last token of a story that is long"
    for figure in (
        plots.line(MATRIX[0], x="a", y="b", title=title),
        plots.heatmaps({"one": MATRIX}, x="a", y="b", title=title),
        draw_circuit({"head": (0, 1)}, [], tokens=TOKENS, title=title),
    ):
        lines = figure.layout.title.text.split("<br>")
        assert len(lines) == 2 and max(map(len, lines)) <= plots.WIDE + len("&amp;")
        assert "heads look &amp; what" in figure.layout.title.text
        assert figure.layout.margin.t >= 80
    side_by_side = plots.heatmaps(dict.fromkeys([title, "b", "c"], MATRIX), x="a", y="b", title="c")
    assert "<br>" in side_by_side.layout.annotations[0].text


def test_heatmaps_share_ticks_and_say_what_their_colours_are() -> None:
    figure = plots.heatmaps(
        {"a": MATRIX, "b": MATRIX},
        x="key",
        y="layer",
        title="c",
        x_ticks=TOKENS,
        y_ticks=["x", "y", "z"],
        colour="nats",
    )
    for axis in (figure.layout.xaxis, figure.layout.xaxis2):
        assert axis.ticktext == ("&lt;|eos|&gt;", "·Mary", "·and", "·Mary", "\\n")
    assert figure.layout.yaxis2.ticktext == ("x", "y", "z")
    assert figure.data[1].text[2][3] == "layer z, key ·Mary"
    assert figure.layout.coloraxis.colorbar.title.text == "nats"
    assert plots.heatmap(MATRIX, x="a", y="b", title="c", colour="p < 1").data[0].colorbar.title.text == "p &lt; 1"
    with pytest.raises(ValueError, match="x_ticks has 5 texts for 3 places"):
        plots.heatmaps({"a": MATRIX, "b": MATRIX.T}, x="a", y="b", title="c", x_ticks=TOKENS, y_ticks=["x", "y", "z"])


@pytest.mark.parametrize(
    ("lowest", "highest", "words"),
    [
        (1, 100, ["1", "2", "5", "10", "20", "50", "100"]),
        (2.2, 4.8, ["2.5", "3", "3.5", "4", "4.5"]),
        (1e-4, 10, ["0.0001", "0.001", "0.01", "0.1", "1", "10"]),
        (1e-8, 5e-7, [f"{digit}10<sup>{power}</sup>" for power in (-8, -7) for digit in ("", "2·", "5·")]),
        (1000, 500_000, ["1000", "2000", "5000", "10000", "20000", "50000", "100000", "200000", "500000"]),
    ],
)
def test_logarithmic_axes_have_round_numbers(lowest: float, highest: float, words: list[str]) -> None:
    values = torch.tensor([lowest, highest], dtype=torch.float64)
    axes = [
        plots.line(values, x="a", y="b", title="c", y_log=True).layout.yaxis,
        plots.line({"a": values}, x="a", y="b", title="c", x_values=values, x_log=True).layout.xaxis,
        plots.scatter(values, values, x="a", y="b", title="c", x_log=True).layout.xaxis,
    ]
    for axis in axes:
        ticks = zip(axis.ticktext, axis.tickvals, strict=True)
        assert axis.type == "log"
        assert [word for word, at in ticks if lowest * 0.999 <= at <= highest * 1.001] == words


@pytest.mark.parametrize("values", [[0.0, -1.0], [], [3.0, 3.0], [0.0, 5.0, torch.inf, torch.nan]])
def test_logarithmic_axes_of_odd_values(values: list[float]) -> None:
    axis = plots.line(torch.tensor(values), x="a", y="b", title="c", y_log=True).layout.yaxis
    assert axis.type == "log" and axis.tickvals is None  # plotly's own


def test_named_dots_carry_their_names_where_there_is_room() -> None:
    across, up = torch.tensor([0.0, 0.5, 0.505, 1.0]), torch.tensor([0.0, 0.5, 0.5, 1.0])
    figure = plots.scatter(across, up, x="a", y="b", title="c", texts=[None, "1.3", "1.4", "<b>"])
    picture = figure.data[0]
    assert picture.mode == "markers+text" and list(picture.text) == ["", "1.3", "1.4", "&lt;b&gt;"]
    assert picture.textposition[1] != picture.textposition[2]
    assert plots.scatter(across, up, x="a", y="b", title="c").data[0].mode == "markers"
    with pytest.raises(ValueError, match="texts has 1 texts for 4 places"):
        plots.scatter(across, up, x="a", y="b", title="c", texts=["one"])


# --- a slider ---------------------------------------------------------------------------------------------------------


def steps_of(figure) -> dict[str, list]:
    return {step.label: list(step.args) for step in figure.layout.sliders[0].steps}


def test_a_slider_holds_every_table_on_one_scale_of_colours() -> None:
    tables = {"0": MATRIX, "100": 3 * MATRIX, "200": MATRIX.masked_fill(MATRIX < 0, torch.nan)}
    axes = {"x": "key", "y": "query", "title": "Head 1.3", "x_ticks": TOKENS}
    figures = {name: plots.heatmap(table, **axes) for name, table in tables.items()}
    figure = slider(figures, steps="step")
    assert figure.layout.sliders[0].currentvalue.prefix == "step: "
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-30, 30)
    assert figures["0"].data[0].zmax == 10  # what was given stays as it was
    steps = steps_of(figure)
    assert list(steps) == list(tables)
    assert steps["100"] == [{"z": [(3 * MATRIX).tolist()]}, {}]  # ticks and texts are the same, so they come once
    assert steps["200"][0]["z"][0][0] == [None] * 4 + [0.0]
    assert not figure.frames  # the site keeps data and layout only


def test_a_slider_stands_below_ticks_of_any_length() -> None:
    def below(ticks: list[str]) -> float:
        drawn = plots.heatmap(MATRIX, x="key", y="query", title="c", x_ticks=ticks)
        return slider({"one": drawn}, steps="step").layout.sliders[0].pad.t

    assert below(["<|endoftext|>"] + ["a"] * 4) > below(["a"] * 5) + 20


def test_a_slider_is_small() -> None:
    patterns = torch.rand(12, 20, 20, dtype=torch.float64)
    axes = {"x": "key", "y": "query", "title": "c", "signed": False, "x_ticks": ["token"] * 20}
    figures = {str(i): plots.heatmap(pattern, **axes) for i, pattern in enumerate(patterns)}
    assert len(slider(figures, steps="step").to_json()) < 60_000


def test_a_slider_over_bars_changes_heights_and_tokens_and_keeps_the_axis() -> None:
    hot = plots.bar(torch.tensor([0.6, 0.4]), x="token", y="p", title="Hot", ticks=["a", "b"])
    cold = plots.bar(torch.tensor([0.9, 0.1]), x="token", y="p", title="Cold", ticks=["c", "b"])
    figure = slider({"1.0": hot, "0.5": cold}, steps="temperature")
    assert figure.layout.yaxis.range == (0, pytest.approx(0.945))
    data, words = steps_of(figure)["0.5"]
    assert data == {"y": [[0.9, 0.1]], "hovertext": [["c", "b"]]}
    assert words == {"title.text": "Cold", "xaxis.ticktext": ["c", "b"]}


def test_a_slider_over_lines_shares_both_axes() -> None:
    def draw(values: torch.Tensor, **options):
        return plots.line({"model": values, "random": values * 0 + 1}, x="a", y="b", title="c", **options)

    low, high = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 1000.0])
    assert slider({"1": draw(low), "2": draw(high)}, steps="layer").layout.yaxis.range == (-48.95, 1049.95)
    logarithmic = slider({"1": draw(low, y_log=True), "2": draw(high, y_log=True)}, steps="layer")
    assert logarithmic.layout.yaxis.range == (pytest.approx(-0.15), pytest.approx(3.15))
    assert {"1", "10", "100", "1000"} <= set(logarithmic.layout.yaxis.ticktext)
    assert steps_of(logarithmic)["2"] == [{"y": [[10, 1000], [1, 1]]}, {}]
    chosen = draw(low).update_yaxes(range=[0, 5])
    assert slider({"1": chosen, "2": draw(high)}, steps="layer").layout.yaxis.range == (0, 5)


def test_a_slider_over_heatmaps_has_one_scale_for_all() -> None:
    figures = {
        name: plots.heatmaps({"a": table, "b": -table}, x="a", y="b", title="c")
        for name, table in {"0": MATRIX, "1": 2 * MATRIX}.items()
    }
    figure = slider(figures, steps="layer")
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-20, 20)
    assert np.array(steps_of(figure)["1"][0]["z"]).shape == (2, 3, 5)


def test_a_slider_refuses_figures_that_do_not_match() -> None:
    line = plots.line(MATRIX[0], x="a", y="b", title="c")
    for others in ({}, {"2": plots.bar(MATRIX[0], x="a", y="b", title="c")}):
        with pytest.raises(ValueError, match="figures that one function drew"):
            slider({"1": line, **others} if others else {}, steps="step")


# --- a circuit --------------------------------------------------------------------------------------------------------

NODES = {"embed": (-1, 1), "0.1": (0, 1), "0.2": (0, 1), "1.3 <b>": (1, 3), "logits": (2, 3)}


def notes(figure) -> dict[str, tuple[float, float]]:
    return {note.text: (note.x, note.y) for note in figure.layout.annotations if note.text}


def test_a_circuit_has_its_layers_up_and_its_tokens_across() -> None:
    edges = {("embed", "0.1"): "word", ("0.1", "1.3 <b>"): 2.0, ("1.3 <b>", "logits"): -0.5}
    figure = draw_circuit(NODES, edges, tokens=TOKENS, title="Copying")
    places = notes(figure)
    assert {"embed", "0.1", "0.2", "1.3 &lt;b&gt;", "logits", "word", "+2", "-0.5"} == set(places)
    assert places["embed"][1] < places["0.1"][1] < places["1.3 &lt;b&gt;"][1] < places["logits"][1]
    assert places["embed"][0] < places["1.3 &lt;b&gt;"][0] == places["logits"][0]
    assert places["0.1"][1] == places["0.2"][1] and places["0.2"][0] - places["0.1"][0] > 40  # side by side
    assert figure.layout.xaxis.ticktext == ("·Mary", "·Mary")  # of the columns that hold a node
    assert figure.layout.xaxis.tickvals[1] == places["logits"][0]
    assert figure.layout.yaxis.ticktext == ("embeddings", "0", "1", "2")
    assert figure.data[0].hovertext[4] == "logits: layer 2, position 3 (·Mary)"


def test_an_edge_is_as_wide_as_it_is_large_and_says_its_sign_in_colour() -> None:
    edges = {("embed", "0.1"): "", ("0.1", "1.3 <b>"): 2.0, ("1.3 <b>", "logits"): -0.5}
    figure = draw_circuit(NODES, edges, tokens=TOKENS, title="c")
    plain, positive, negative = (shape.line for shape in figure.layout.shapes)
    assert (positive.color, negative.color, plain.color) == ("rgb(33, 102, 172)", "rgb(178, 24, 43)", plots.GREY)
    assert positive.width == 4 > negative.width == 1.75
    heads = [note for note in figure.layout.annotations if note.showarrow is not False]
    assert [head.arrowcolor for head in heads] == [plain.color, positive.color, negative.color]
    assert heads[0].ay < heads[0].y  # it points up
    assert "0.1 → 1.3 &lt;b&gt;: +2" in [note.hovertext for note in figure.layout.annotations]


def test_a_hypothesis_needs_no_labels_and_may_name_its_layers() -> None:
    edges = [("embed", "0.1"), ("0.1", "logits")]
    figure = draw_circuit(NODES, edges, tokens=TOKENS, title="c", layers=["words", "0", "1", "logits"])
    assert set(notes(figure)) == {"embed", "0.1", "0.2", "1.3 &lt;b&gt;", "logits"}
    assert figure.layout.yaxis.ticktext == ("words", "0", "1", "logits") and len(figure.layout.shapes) == 2
    assert draw_circuit({}, [], tokens=TOKENS, title="Nothing yet").layout.title.text == "Nothing yet"


def test_an_edge_bends_around_the_node_in_its_way() -> None:
    column = {"embed": (-1, 0), "0.1": (0, 0), "logits": (1, 0)}
    figure = draw_circuit(column, [("embed", "logits"), ("embed", "0.1")], tokens=["a"], title="c")
    middle = notes(figure)["0.1"][0]
    bent, straight = (
        [abs(float(x) - middle) for x in re.findall(r"([\d.]+),", shape.path)] for shape in figure.layout.shapes
    )
    assert max(straight) < 1 and max(bent) > 20


def test_labels_of_a_circuit_cover_neither_boxes_nor_each_other() -> None:
    nodes = {"logits": (1, 1)} | {f"0.{head}": (0, 1) for head in range(6)}
    figure = draw_circuit(nodes, {(f"0.{i}", "logits"): i - 2.5 for i in range(6)}, tokens=TOKENS, title="c")
    places = list(notes(figure).values())
    for number, (x, y) in enumerate(places):
        assert all(abs(x - other_x) > 20 or abs(y - other_y) > 15 for other_x, other_y in places[:number])


@pytest.mark.parametrize(
    ("edges", "options", "words"),
    [
        ([("embed", "9.9")], {}, r"the edge \('embed', '9.9'\) needs a node '9.9'; add it to nodes"),
        ({("9.9", "embed"): 1.0}, {}, "needs a node '9.9'"),
        ([], {"tokens": TOKENS[:3]}, "1.3 <b> is at position 3, but there are 3 tokens"),
        ([], {"layers": ["a"]}, "layers has 1 names for the layers from -1 to 2"),
    ],
)
def test_what_no_circuit_can_be_is_refused(edges, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_circuit(NODES, edges, **{"tokens": TOKENS, "title": "c"} | options)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.heatmap(torch.ones(2, 3, 4), x="a", y="b", title="c"), r"heatmap: .* 2 axes.*\(2, 3, 4\)"),
        (lambda: plots.heatmap(MATRIX, x="a", y="b", title="c", y_ticks=TOKENS), "y_ticks has 5 texts for 3 places"),
        (lambda: plots.line(MATRIX, x="a", y="b", title="c"), "line: it draws tensors with 1 axes"),
        (lambda: plots.line(MATRIX[0], x="a", y="b", title="c", x_values=MATRIX[:, 0]), "has 5 values, but .* has 3"),
        (lambda: plots.bar(MATRIX[0], x="a", y="b", title="c", ticks=["p"]), "ticks has 1 texts for 5 places"),
        (lambda: plots.scatter(MATRIX[0], MATRIX[:, 0], x="a", y="b", title="c"), "5 horizontal values do not pair"),
        (lambda: plots.attention_pattern(torch.ones(1, 4, 4), TOKENS), r"5 tokens need a pattern .* \(heads, 5, 5\)"),
        (lambda: plots.token_colours(TOKENS, torch.ones(4), title="c"), "5 tokens, but 4 values"),
    ],
)
def test_what_does_not_fit_is_refused(draw, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw()


def test_labels_are_demanded() -> None:
    with pytest.raises(TypeError, match="missing"):
        plots.heatmap(MATRIX, x="a")


def test_attention_pattern_brings_its_script_along() -> None:
    source = plots.attention_pattern(torch.ones(2, 5, 5) / 5, TOKENS, head_names=["0.1", "0.2"])._repr_html_()
    assert '"0.2"' in source and r"\u00b7Mary" in source
    assert len(source) > 1e6  # the script itself, not a link to it
    assert "cdn" not in source[:500]
    assert "the source is the key's token, and the destination is the query's token" in source


def test_token_colours_shows_sign_by_colour_and_size_by_strength() -> None:
    source = plots.token_colours(TOKENS, torch.tensor([0.0, 2.0, -1.0, 0.5, 0.0]), title="Who < whom")._repr_html_()
    assert "Who &lt; whom" in source and "&lt;|eos|&gt;" in source
    assert "rgba(33, 102, 172, 0.750)" in source and "rgba(178, 24, 43, 0.375)" in source


def test_importing_plots_loads_no_plotting_library() -> None:
    modules = "('plotly', 'circuitsvis', 'pandas')"
    script = (
        f"import sys, course_utils.diagrams, course_utils.sliders; print([m for m in {modules} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["JupyterLab", "VS Code"])
def test_what_a_cell_stores_is_drawn_without_network(editor: str) -> None:
    """Figures in plotly's own type, which JupyterLab and VS Code know; CircuitsVis with its script inside."""
    cells = [
        "import torch\nfrom course_utils.plots import attention_pattern, heatmap",
        'heatmap(torch.eye(3), x="a", y="b", title="c")',
        'attention_pattern(torch.eye(2)[None], ["a", "b"])',
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("VSCODE_")}
    variables["PYTHONPATH"] = str(ROOT)
    NotebookClient(notebook, startup_timeout=600).execute(
        env=variables | {"VSCODE_PID": "1"} if editor == "VS Code" else variables
    )
    (figure,), (view,) = (cell.outputs for cell in notebook.cells[1:])
    assert set(figure.data) - {"text/plain"} == {"application/vnd.plotly.v1+json"}
    assert figure.data["application/vnd.plotly.v1+json"]["data"][0]["type"] == "heatmap"
    assert "<script" in view.data["text/html"] and not re.search(r"<script[^>]+src=", view.data["text/html"])
    assert not re.search(r"""import\(?["' ]*https?:""", view.data["text/html"])


def test_quotes_are_shown_as_they_are() -> None:
    """Plotly knows `&lt;` and `&amp;`, and shows `&quot;` as six characters."""
    series = {'at "because"': torch.ones(3), "<b>": torch.zeros(3)}
    figure = plots.line(series, x="x", y='a "y"', title='"t"')
    assert [trace.name for trace in figure.data] == ['at "because"', "&lt;b&gt;"]
    assert figure.layout.yaxis.title.text == 'a "y"' and figure.layout.title.text == '"t"'
