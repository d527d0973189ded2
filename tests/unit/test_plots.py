"""The figures' contents: what stands on the axes, which colours mean what, and which inputs are refused."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from course_utils import plots
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
    signed = plots.heatmaps({"a": MATRIX, "b": 2 * MATRIX}, x="a", y="b", title="c").layout.coloraxis
    assert (signed.cmin, signed.cmax) == (-20, 20)
    with pytest.raises(ValueError, match="some values are negative"):
        plots.heatmaps({"a": MATRIX}, x="a", y="b", title="c", signed=False)


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


def test_scatter_names_its_dots() -> None:
    figure = plots.scatter(torch.tensor([1.0, 2]), torch.tensor([3.0, 4]), x="a", y="b", title="c", labels=["p", "q"])
    assert list(figure.data[0].x) == [1, 2] and list(figure.data[0].y) == [3, 4]
    assert list(figure.data[0].hovertext) == ["p", "q"]


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


def test_token_colours_shows_sign_by_colour_and_size_by_strength() -> None:
    source = plots.token_colours(TOKENS, torch.tensor([0.0, 2.0, -1.0, 0.5, 0.0]), title="Who < whom")._repr_html_()
    assert "Who &lt; whom" in source and "&lt;|eos|&gt;" in source
    assert "rgba(33, 102, 172, 0.750)" in source and "rgba(178, 24, 43, 0.375)" in source


def test_importing_plots_loads_no_plotting_library() -> None:
    script = (
        "import sys, course_utils.plots; print([m for m in ('plotly', 'circuitsvis', 'pandas') if m in sys.modules])"
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
