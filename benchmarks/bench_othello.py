"""Random games of Othello: all games side by side on bit boards, against a plain engine of loops over a grid."""

import random

import pytest
import torch

from course_utils.data.othello import random_games
from tests.ch14.other_othello import grid_after, grid_moves, grid_start

N_GAMES = 1000  # side by side: with fifty there would be no gain


def plain_games(n: int, size: int) -> list[list[int]]:
    """Random games, one after the other."""
    chance, games = random.Random(0), []
    for _ in range(n):
        grid, player, game = grid_start(size), 1, []
        for _ in range(size**2 - 4):
            moves = [size * row + col for row, col, _ in grid_moves(grid, player)] or [size**2]
            game.append(chance.choice(moves))
            grid, player = grid_after(grid, player, game[-1]), -player
        games.append(game)
    return games


@pytest.mark.parametrize("size", (6, 8))
def test_random_games(race, size: int) -> None:
    rival = {"loops over a grid": (lambda: plain_games(N_GAMES, size), "below a tenth; about 0.03 on a free core")}
    race(
        f"{N_GAMES} random games on {size} x {size}",
        lambda: random_games(N_GAMES, size, torch.Generator().manual_seed(0)),
        rival,
        3,
    )
