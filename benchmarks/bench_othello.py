"""Random games of Othello: all games side by side on bit boards, against a plain engine of loops over a grid."""

import random

import pytest
import torch

from course_utils.data.othello import random_games
from tests.ch14.other_othello import grid_after, grid_moves, grid_start

N_PLAIN, N_OURS = 10, 2000


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
    """As many games as take each of them about as long: `ratio` has to be divided by two hundred."""
    rival = {f"loops over a grid, {N_PLAIN} games": (lambda: plain_games(N_PLAIN, size), "about 1: 200 times as fast")}
    race(
        f"{N_OURS} random games on {size} x {size}",
        lambda: random_games(N_OURS, size, torch.Generator().manual_seed(0)),
        rival,
        3,
    )
