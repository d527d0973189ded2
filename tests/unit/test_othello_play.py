"""The board to click on: for which lines of play the model's side is known, what it says, and the browser's rules."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from course_utils.data.othello import OthelloBoards, legal_games, random_games, with_bos
from course_utils.othello_play import answers, lines_of_play, othello_board
from solutions.ch02_transformer import Transformer
from solutions.ch14_othello import relative_labels
from solutions.recipes.othello_6 import CFG

GAME = random_games(1, 6, torch.Generator().manual_seed(0), 9)[0]


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CFG).eval()


def test_lines_are_the_game_and_all_that_is_legal_around_it() -> None:
    lines = lines_of_play(GAME, 6, ahead=2)
    assert len(lines) == len(set(lines))
    assert all(tuple(GAME[:n].tolist()) in lines for n in range(10))
    for n in (1, 3, 6):
        assert legal_games(torch.tensor([line for line in lines if len(line) == n])).all()
    assert len([line for line in lines if len(line) == 2]) == 12
    assert max(map(len, lines)) == 9


def test_what_it_says_is_what_model_and_probe_say() -> None:
    W, b = torch.randn(36, 128, 3), torch.randn(36, 3)
    known = answers(model(), [(), (9,), tuple(GAME.tolist())], W, b, layer=1)
    board, chances = known[",".join(map(str, GAME.tolist()))]
    with torch.no_grad():
        share = model()(with_bos(GAME[None]))[0, -1].softmax(-1)
    assert [int(chances[2 * i : 2 * i + 2]) for i in range(37)] == (100 * share[:37]).round().clamp(
        max=99
    ).int().tolist()
    assert len(board) == 36
    assert set(board) <= set("emt")
    assert set(known) == {"", "9", ",".join(map(str, GAME.tolist()))}


def test_a_perfect_probe_shows_the_true_board() -> None:
    """The start as it is known: a probe with biases alone."""
    labels = relative_labels(OthelloBoards(1).colours()[:, None])[0, 0]
    b = torch.nn.functional.one_hot(labels, 3).float()
    known = answers(model(), [()], torch.zeros(36, 128, 3), b, layer=0)
    assert known[""][0] == "".join("emt"[label] for label in labels.tolist())


def page() -> str:
    return othello_board(model(), GAME, torch.randn(36, 128, 3), torch.randn(36, 3), layer=0, ahead=1)._repr_html_()


def test_the_page_needs_nothing_from_elsewhere() -> None:
    source = page()
    assert "http" not in source
    assert "/* DATA */" not in source
    data = json.loads(re.search(r"const data = (\{.*\});", source)[1])  # type: ignore[index]
    assert data["game"] == GAME.tolist()
    assert data["size"] == 6


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_browsers_rules_are_the_engines() -> None:
    script = page().partition("<script>")[2].partition("</script>")[0]
    script = script.replace(
        "draw();\n})();", "console.log(JSON.stringify([replay(data.game), legal(...replay(data.game))]));})();"
    )
    stub = (
        "const stand = {querySelectorAll: () => [], querySelector: () => stand}; "
        "const document = {currentScript: {parentElement: stand}, getElementsByClassName: () => [stand]};"
    )
    out = subprocess.run(["node", "-e", stub + script], capture_output=True, text=True, check=True, timeout=60).stdout
    (board, player), moves = json.loads(out)
    boards = OthelloBoards(1)
    for move in GAME:
        boards.play(move[None])
    assert board == boards.colours()[0].flatten().tolist()
    assert player == -1
    assert moves == boards.legal()[0, :36].nonzero().flatten().tolist()
