"""A board of Othello to click on: the moves that a model expects, and the board that a probe reads inside it.

One cell's output, HTML and JavaScript without anything from elsewhere. The rules run in the browser; what the model
says was computed when the cell ran, so that a page without Python shows it too.
"""

import json
from importlib.resources import files
from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from course_utils.data.othello import OthelloBoards, with_bos
from course_utils.hooks import run_with_cache
from course_utils.plots import Html

Lines = list[tuple[int, ...]]  # moves from the start


def lines_of_play(game: Int[Tensor, " move"], size: int, ahead: int) -> Lines:
    """All beginnings of a game, each with every legal continuation of up to `ahead` moves; none comes twice."""
    moves = game.tolist()
    found = dict.fromkeys(tuple(moves[:n]) for n in range(len(moves) + 1))
    edge = list(found)
    for _ in range(ahead):
        longer: dict[tuple[int, ...], None] = {}
        for played in edge:
            boards = OthelloBoards(1, size)
            for move in played:
                boards.play(torch.tensor([move]))
            if len(played) < len(moves) and not bool(boards.over()):
                longer |= dict.fromkeys((*played, move) for move in boards.legal()[0].nonzero().flatten().tolist())
        edge = [played for played in longer if played not in found]
        found |= longer
    return list(found)


@torch.no_grad()
def answers(
    model: Any,
    lines: Lines,
    W: Float[Tensor, "square d_model state"],
    b: Float[Tensor, "square state"],
    layer: int,
) -> dict[str, list[str]]:
    """For each line of play, the model's side: {"3,9": [its board, its probabilities]}.

    The board has a letter for each square, as the player to move sees it: "e", "m", "t". The probabilities, of the
    squares and of PASS, have two digits each, in per cent (99 at most).
    """
    n_squares, longest = len(W), max(map(len, lines))
    rows = torch.tensor([[*line, *[n_squares] * (longest - len(line))] for line in lines], dtype=torch.long)
    name = f"blocks.{layer}.hook_resid_post"
    device = next(model.parameters()).device
    tokens = with_bos(rows.reshape(len(lines), longest), round(n_squares**0.5)).to(device)
    places = torch.tensor([len(line) for line in lines], device=device)
    every = torch.arange(len(lines), device=device)
    logits, seen = run_with_cache(model, tokens, names=name)
    scores = einops.einsum(
        seen[name][every, places], W.to(device), "line d_model, square d_model state -> line square state"
    )
    states = (scores + b.to(device)).argmax(dim=-1).tolist()
    chances = (100 * logits[every, places].softmax(dim=-1)[:, : n_squares + 1]).round().long().clamp(max=99).tolist()
    return {
        ",".join(map(str, line)): ["".join("emt"[s] for s in board), "".join(f"{p:02d}" for p in row)]
        for line, board, row in zip(lines, states, chances, strict=True)
    }


def othello_board(
    model: Any,
    game: Int[Tensor, " move"],
    W: Float[Tensor, "square d_model state"],
    b: Float[Tensor, "square state"],
    *,
    layer: int,
    ahead: int = 2,
) -> Html:
    """A board to play on, beside the model's: W and b are a probe of the stream after `layer`, as in chapter 14.

    One steps through `game`, or plays other legal moves. The model's side is known for every beginning of the game and
    `ahead` moves beyond it; further on it stays empty.
    """
    size = round(len(W) ** 0.5)
    known = answers(model, lines_of_play(game, size, ahead), W, b, layer)
    data = json.dumps({"size": size, "game": game.tolist(), "known": known}, separators=(",", ":"))
    page = files("course_utils").joinpath("othello_play.html").read_text(encoding="utf-8")
    return Html(page.replace("/* DATA */", data))
