"""Numbers in prose that nothing in the executed notebook shows are found, in made-up chapters."""

import base64
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_utils.build import build
from course_utils.lint import LessonCell
from tests.support.prose_numbers import PLOTLY, compare

SETUP = new_code_cell("import torch")


def printed(text: str, code: str = "show()") -> nbformat.NotebookNode:
    return new_code_cell(code, outputs=[new_output("stream", name="stdout", text=text)])


def drawn(*values: float, **layout: str) -> nbformat.NotebookNode:
    data = base64.b64encode(np.array(values, dtype="f4").tobytes()).decode()
    figure = {"data": [{"y": {"dtype": "f4", "bdata": data}, "marker": {"size": [77.7]}}], "layout": layout}
    return new_code_cell("show()", outputs=[new_output("display_data", {PLOTLY: figure})])


def box(prose: str) -> str:
    return f"<details><summary>What you just saw</summary>\n\n{prose}\n\n</details>"


def problems(*cells: str | nbformat.NotebookNode) -> list[str]:
    """What is wrong in a chapter of these cells of prose and of code."""
    cells = (SETUP, *cells)
    lesson = [
        LessonCell("markdown", cell, [], {}, f"07_toy.md:{10 * place}")
        if isinstance(cell, str)
        else LessonCell("code", cell.source, [], {}, f"07_toy.md:{10 * place}")
        for place, cell in enumerate(cells)
    ]
    run = [new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    return compare(lesson, new_notebook(cells=[new_code_cell("from_the_builder = 0.123"), *run])).problems


@pytest.mark.parametrize(
    ("output", "prose"),
    [
        ("loss 0.9634", "It falls to 0.96."),
        ("loss 0.9", "It falls to 0.90."),
        ("share 0.5712", "That is 57% of them, or 57.1%."),
        ("share 57%", "A share of 0.57."),
        ("-6.384", "It goes down to −6.38, or -6.4, that is by 6.38."),
        ("12,345 tokens, 1.5e-02 each", "All 12,345 of them, with 0.015 each."),
        ("1,124,000 parameters", "There are 1.12 million."),
        ("from 0.25-0.75", "From 0.25–0.75 (0.75)."),
        ("strongest: 2.4, 23.0", "The heads are 2.4 and 23.0."),
        ("\x1b[31m0.31\x1b[0m", "It is 0.31."),
    ],
)
def test_a_right_number_passes(output: str, prose: str) -> None:
    assert problems(printed(output), box(prose)) == []


@pytest.mark.parametrize(
    ("output", "prose", "wrong"),
    [
        ("loss 0.9634", "It falls to 0.97.", "0.97"),
        ("loss 0.9634", "It falls to 0.960.", "0.960"),
        ("share 0.5712", "That is 58% of them, not 57%.", "58%"),
        ("6.38", "It goes down to −6.38.", "−6.38"),
        ("strongest: 2.4", "The head is 2.5.", "2.5"),
        ("303 tokens", "There are 304 tokens and 303 of them.", "304"),
    ],
)
def test_a_wrong_number_is_found(output: str, prose: str, wrong: str) -> None:
    assert problems(printed(output), box(prose)) == [f"07_toy.md:22: no output shows {wrong}"]


def test_numbers_that_are_only_drawn_count() -> None:
    figure = drawn(0.25, 0.377, title="Head 2.4")
    assert problems(figure, box("It is 0.38 for head 2.4.")) == []
    assert problems(figure, box("It is 0.39, or 77.7.")) == ["07_toy.md:22: no output shows 0.39, 77.7"]


def test_what_only_hovering_or_the_style_says_does_not_count() -> None:
    trace = {"type": "heatmap", "z": [[0.25]], "text": [["head 2.4"]], "hovertext": "0.91", "line": {"width": [3.5]}}
    figure = {"data": [trace], "layout": {"xaxis": {"domain": [0.0, 0.45]}}}
    cell = new_code_cell("show()", outputs=[new_output("display_data", {PLOTLY: figure})])
    wrong = problems(cell, box("It is 0.25 in head 2.4, or 0.91, or 3.5, or 0.45."))
    assert wrong == ["07_toy.md:22: no output shows 2.4, 0.91, 3.5, 0.45"]


def test_a_picture_may_have_gaps() -> None:
    figure = {"data": [{"y": [0.25, None, 0.38]}]}
    cell = new_code_cell("show()", outputs=[new_output("display_data", {PLOTLY: figure})])
    assert problems(cell, box("It is 0.38.")) == []


def test_of_a_long_curve_the_ends_and_extremes_count() -> None:
    curve = drawn(*np.linspace(1.01, 1.99, 99), 0.42, 3.38, 2.22)
    assert problems(curve, box("From 1.01 down to 0.42, up to 3.38, ends at 2.22.")) == []
    assert problems(curve, box("It passes 1.51.")) == ["07_toy.md:22: no output shows 1.51"]


def test_html_shows_its_text_and_its_tooltips() -> None:
    html = '<p style="opacity: 0.88"><span title="2.752">Nora</span> 0.31</p><script>x = 0.99</script>'
    cell = new_code_cell("show()", outputs=[new_output("display_data", {"text/html": html})])
    assert problems(cell, box("Nora pays 2.75, and 0.31.")) == []
    assert problems(cell, box("It is 0.88 or 0.99.")) == ["07_toy.md:22: no output shows 0.88, 0.99"]


def test_a_short_number_belongs_to_its_section_and_a_long_one_to_the_chapter() -> None:
    first = printed("0.42 and 0.417")
    assert problems("## One", first, "## Two", printed("nothing"), box("It was 0.417 above.")) == []
    wrong = problems("## One", first, "## Two", printed("nothing"), box("It was 0.42 above."))
    assert wrong == ["07_toy.md:52: no output shows 0.42"]


def test_a_figure_of_an_earlier_section_is_no_witness() -> None:
    assert problems("## One", drawn(0.417), "## Two", box("It was 0.417.")) == ["07_toy.md:42: no output shows 0.417"]


def test_prose_may_announce_what_the_cells_below_it_do_and_a_box_may_not() -> None:
    below = printed("", code="sample(temperature=0.7)")
    assert problems("**Predict.** What happens at 0.7?", below) == []
    assert problems(box("What happens at 0.7?"), below) == ["07_toy.md:12: no output shows 0.7"]


@pytest.mark.parametrize(
    "prose",
    [
        "`0.5` and $0.5$, [here](0.5.md), “0.5” <b title='0.5'>",
        "```text\n0.5\n```",
        "## Version 0.5",
        "<details><summary>Hint 1</summary>\n\nTake 0.5.\n\n</details>",
        "See Olah et al. (2020), arXiv:1902.10186, Python 3.11.2, AVX-512.",
        "It takes 0.5 s, 2.5 minutes and 1.5 GB.",
        "Forty of 12, half of 100.",
        "It is 0.5. <!-- cited: 0.5 -->",
        "There are 32,491 of 1.1 million, or 5%. <!-- cited: 32,491, 1.1 million, 5% -->",
        "## References\n\nPages 0.5.",
    ],
)
def test_what_is_left_alone(prose: str) -> None:
    assert problems(prose) == []


def test_a_mark_holds_for_its_number_and_paragraph_and_must_be_needed_there() -> None:
    assert problems("It is 0.5, not 17.7%. <!-- cited: 17.7%, 0.6 -->\n\nIt is 17.7%.") == [
        "07_toy.md:10: no output shows 0.5",
        "07_toy.md:10: marked as cited, but not in the paragraph: 0.6",
        "07_toy.md:12: no output shows 17.7%",
    ]


def test_the_notebooks_do_not_show_the_mark(small_course: Path) -> None:
    lesson = small_course / "chapters/src/07_toy.md"
    lesson.write_text(lesson.read_text().replace("Prose with $x^2$.", "It is 0.5. <!-- cited: 0.5 -->"))
    build(small_course)
    assert 'It is 0.5."' in (small_course / "chapters/07_toy.ipynb").read_text()
